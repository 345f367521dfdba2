"""How each tensor of a network is made of a checkpoint's tensors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.modules import gguf_blocks
from flux.weights.checkpoint import Checkpoint
from flux.weights.identify import require_part
from flux.weights.layouts import SWAPPED, Part
from flux.weights.scales import EIGHT_BIT_FLOATS, ScaledTensor


@dataclass(frozen=True)
class TensorSource:
    """How one of our tensors is made: these tensors of a file, concatenated along their rows.

    Attributes:
        parts: The file's tensors.
        swapped: Whether the file has the two halves of the rows in the other order.
        pointwise: Whether the file has a 1x1 convolution as a matrix, without the two last axes.
        columns: Columns of the matrix. Those that the file's lacks are zero. If None, it has the file's.
    """

    parts: tuple[ScaledTensor, ...]
    swapped: bool = False
    pointwise: bool = False
    columns: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result; empty if the parts' shapes do not match."""
        first, *others = (part.shape for part in self.parts)
        if others and (not first or any(shape[1:] != first[1:] for shape in others)):
            return ()
        # Queries, keys and values have equally many rows; a fourth part may have another number.
        if any(shape[:1] != first[:1] for shape in others[:2]):
            return ()
        rows = first[:1] and (sum(part.shape[0] for part in self.parts),)
        rest = first[1:] if self.columns is None else (self.columns,)
        return (*rows, *rest, *((1, 1) if self.pointwise else ()))

    @property
    def kind(self) -> str | None:
        """The number format of all parts; None if they differ."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def is_packed(self) -> bool:
        """Whether a matrix can stay as it is stored: GGUF blocks, or 8-bit floats from one tensor."""
        if self.columns is not None:
            return False
        if self.kind in EIGHT_BIT_FLOATS:
            return len(self.parts) == 1 and not self.swapped
        return self.kind in gguf_blocks.BLOCKS

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Read the tensor in `dtype`."""
        whole = self._joined([part.read(device, is_filled=True).to(dtype) for part in self.parts])
        if self.columns is not None:
            whole = F.pad(whole, (0, self.columns - whole.shape[1]))
        return whole[..., None, None] if self.pointwise else whole

    def read_packed(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Read a packed matrix as uint8, "rows bytes", and its scale, if it has one."""
        whole = self._joined([part.stored.read(device, is_filled=True) for part in self.parts]).view(
            torch.uint8
        )
        return whole, self.parts[0].read_scale(device)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole


def _other_name(name: str) -> str | None:
    """The second name that files of our own layout have for this tensor."""
    if name == "shared.weight":  # T5's one embedding
        return "encoder.embed_tokens.weight"
    if name.endswith("_norm.scale"):  # as ComfyUI writes norms
        return name.removesuffix("scale") + "weight"
    return None


def find_sources(
    checkpoint: Checkpoint, part: Part, names: Iterable[str]
) -> tuple[dict[str, TensorSource], list[str]]:
    """Find how each of a network's tensors is made of a checkpoint's.

    Args:
        checkpoint: The opened file or folder.
        part: The network.
        names: Names of the network's tensors.

    Returns:
        A source for each name that the checkpoint has all parts of; and the names in the checkpoint that
        belong to the network by their prefix but are not used.

    Raises:
        InputError: The checkpoint does not hold the network. The message says what it holds.
    """
    layout, prefix = require_part(checkpoint, part)
    left = {name for name in checkpoint.tensors if name.startswith(prefix)}
    sources = {}
    for name in names:
        theirs = [prefix + their for their in layout.names(name)]
        other = _other_name(name)
        if other is not None and theirs[0] not in left:
            theirs = [prefix + other]
        if all(their in left for their in theirs):
            sources[name] = TensorSource(
                tuple(checkpoint.tensors[their] for their in theirs),
                swapped=layout.is_diffusers and name.startswith(SWAPPED),
                pointwise=layout.is_diffusers
                and bool(re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)),
            )
            left -= set(theirs)
    return sources, sorted(name for name in left if not re.fullmatch(layout.unused, name[len(prefix) :]))
