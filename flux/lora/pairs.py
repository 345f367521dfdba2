"""Low-rank changes as pairs of factors under our own names, and as files in the forms that programs read.

    kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha
    bfl         double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight

In the last two, alpha / rank is multiplied into the second factor. diffusers has queries, keys and values
apart: a pair is cut by rows, which is exact. The other way they become one pair of three times the rank,
unless they share their first factor. kohya and diffusers have names for the text encoders' matrices as well.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import InputError, warn
from flux.files import write_bytes
from flux.lora.contents import OpenLora
from flux.model import Flux, FluxParams
from flux.weights.headers import short_name
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.lora_formats import LowRank
from flux.weights.lora_places import diffusers_places, match_text_patches
from flux.weights.save import safetensors_bytes

Form = Literal["kohya", "bfl", "diffusers"]
CPU = torch.device("cpu")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OF_PEFT = "lora_adapter_metadata"
# How names of the text encoders' modules begin in the forms that have some.
TEXT_NAMES: dict[Form, dict[Part, str]] = {
    "kohya": {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te3_"},
    "diffusers": {"text_encoder": "text_encoder.text_model.", "text_encoder_2": "text_encoder_2."},
}
ENCODERS: dict[Part, str] = {"text_encoder": "CLIP", "text_encoder_2": "T5"}


@dataclass(frozen=True, eq=False)
class Pair:
    """A low-rank change to rows of a matrix: scale * up @ down.

    Attributes:
        start: The first row.
        down: First factor, "rank columns", in float32.
        up: Second factor, "rows rank", in float32, rows in our order.
        scale: Alpha / rank, times the strength.
    """

    start: int
    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + len(self.up)

    @property
    def rank(self) -> int:
        """The size between the factors."""
        return len(self.down)

    def rows(self, start: int, stop: int) -> "Pair | None":
        """The change to some rows, without what is zero there; None if all of it is."""
        up = self.up[max(start - self.start, 0) : max(stop - self.start, 0)]
        used = up.any(dim=0)
        if not used.any():
            return None
        if not used.all():
            return Pair(max(start, self.start), self.down[used], up[:, used], self.scale)
        return Pair(max(start, self.start), self.down, up, self.scale)


@dataclass(frozen=True, eq=False)
class Pairs:
    """All low-rank changes to a transformer and its text encoders.

    Attributes:
        params: The transformer's sizes.
        pairs: The changes of each of its modules, in our names.
        biases: The change to the bias of a module, "rows" in our order, strength included.
        texts: The changes of each module of the text encoders, likewise.
    """

    params: FluxParams
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[Part, dict[str, list[Pair]]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the model's matrices by module."""
        modules = on_meta(Flux, self.params).named_modules()
        return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, nn.Linear)}

    def add(self, other: "Pairs", strength: float = 1.0) -> None:
        """Add another LoRA's changes, times a strength. Ranks add up, the sum is exact."""
        every = [(self.pairs, other.pairs)]
        every += [(self.texts.setdefault(part, {}), pairs) for part, pairs in other.texts.items()]
        for own, theirs in every:
            for module, pairs in theirs.items():
                scaled = [Pair(pair.start, pair.down, pair.up, pair.scale * strength) for pair in pairs]
                own.setdefault(module, []).extend(scaled)
        for module, bias in other.biases.items():
            self.biases[module] = self.biases.get(module, torch.zeros_like(bias)) + strength * bias


def read_pairs(lora: OpenLora) -> Pairs:
    """Read the low-rank changes of a file.

    Raises:
        InputError: It has changes of another form to the transformer.
    """
    found = Pairs(lora.params)
    for part in lora.text_encoders:
        found.texts[part] = _text_pairs(lora, part)
    shapes = found.shapes
    for patch in lora.patches:
        module, place = patch.place.module, patch.place
        if isinstance(patch.change, LowRank):
            down, up = patch.change.factors(place, 1.0, CPU)
            down = F.pad(down, (0, shapes[module][1] - down.shape[1]))  # img_in may have more columns
            pair = Pair(place.start, down, up, patch.scale * patch.strength)
            found.pairs.setdefault(module, []).append(pair)
        elif patch.change is not None:
            raise InputError(
                f"Got {lora.path}, with {lora.form}: only pairs of factors can be written anew; merge "
                "it into a model's weights instead (python -m flux.lora merge ... --base MODEL)"
            )
        if patch.biases:
            bias = found.biases.setdefault(module, torch.zeros(shapes[module][0]))
            bias[place.start : place.stop] += patch.bias(CPU)
    return replace(found, pairs={module: regrouped(pairs) for module, pairs in found.pairs.items()})


def _text_pairs(lora: OpenLora, part: Part) -> dict[str, list[Pair]]:
    """The changes to the modules of a text encoder. Those of other forms are left out."""
    patches, others = match_text_patches(lora.file, part)
    if others:
        warn(
            f"{lora.path}: {len(others)} changes to {ENCODERS[part]} are no pairs of factors and left out: "
            f"{', '.join(map(short_name, others[:3]))}"
        )
    pairs: dict[str, list[Pair]] = {}
    for patch in patches:
        if isinstance(patch.change, LowRank):
            down, up = patch.change.factors(patch.place, 1.0, CPU)
            pairs[patch.place.module] = [Pair(0, down, up, patch.scale * patch.strength)]
    return pairs


def stored_dtype(lora: OpenLora) -> torch.dtype:
    """The dtype to write a file's factors in: its own, or bfloat16 for a file in 8 bits."""
    kinds = {tensor.kind for fields in lora.file.modules.values() for tensor in fields.values()}
    found = [dtype for kind, dtype in DTYPES.items() if kind in kinds - {"F32"}]
    return found[0] if found else torch.float32 if kinds <= {"F32"} else torch.bfloat16


# ---- written in a form


def joined(pairs: Sequence[Pair], rows: int) -> Pair:
    """Several changes to a matrix as one of all its rows. Their ranks add up."""
    first = pairs[0]
    if len(pairs) == 1 and len(first.up) == rows:
        return first
    # alpha / rank stays what it is if all have the same, so that no number changes.
    same_scale = all(pair.scale == first.scale for pair in pairs)
    ups = []
    for pair in pairs:
        up = torch.zeros(rows, pair.rank)
        up[pair.start : pair.stop] = pair.up if same_scale else pair.scale * pair.up
        ups.append(up)
    scale = first.scale if same_scale else 1.0
    return Pair(0, torch.cat([pair.down for pair in pairs]), torch.cat(ups, dim=1), scale)


def regrouped(pairs: Sequence[Pair]) -> list[Pair]:
    """Change to different rows of a matrix as one, if they share their first factor: a pair that was cut."""
    first, order = pairs[0], sorted(pairs, key=lambda pair: pair.start)
    apart = all(before.stop <= after.start for before, after in pairwise(order))
    if not apart or any(
        pair.scale != first.scale or not torch.equal(pair.down, first.down) for pair in pairs
    ):
        return list(pairs)
    start = order[0].start
    up = torch.zeros(order[-1].stop - start, first.rank)
    for pair in order:
        up[pair.start - start : pair.stop - start] = pair.up
    return [Pair(start, first.down, up, first.scale)]


def tensors_of(lora: Pairs, form: Form, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write changes as a file's tensors.

    Args:
        lora: The changes.
        form: Whose names they get.
        dtype: The dtype of the factors in the file.

    Returns:
        The tensors by name, and the entries of the metadata that belong to the form.
    """
    shapes, (tensors, texts) = lora.shapes, _of_text_encoders(lora, form, dtype)
    if form == "diffusers":
        own, config = _in_diffusers(lora, shapes, dtype)
        metadata = {OF_PEFT: json.dumps(config | texts, sort_keys=True)} if config or texts else {}
        return own | tensors, metadata
    for module in sorted({*lora.pairs, *lora.biases}):
        name = f"lora_unet_{module.replace('.', '_')}" if form == "kohya" else module
        if module in lora.pairs:
            tensors |= _factors(name, joined(lora.pairs[module], shapes[module][0]), form, dtype)
        if module in lora.biases:
            # Beside a pair, a bias of BFL's form is scaled by 1, as the pair is.
            ending = "lora_B.bias" if form == "bfl" else "diff_b"
            tensors[f"{name}.{ending}"] = lora.biases[module].to(dtype)
    return tensors, {}


def _factors(name: str, pair: Pair, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module's pair, which has all its rows in the file's order."""
    if form == "kohya":
        factors = {"lora_down.weight": pair.down.to(dtype), "lora_up.weight": pair.up.to(dtype)}
        factors["alpha"] = torch.tensor(pair.scale * pair.rank)
    else:
        factors = {"lora_A.weight": pair.down.to(dtype), "lora_B.weight": (pair.scale * pair.up).to(dtype)}
    return {f"{name}.{role}": factor for role, factor in factors.items()}


def _of_text_encoders(
    lora: Pairs, form: Form, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the text encoders' changes, and PEFT's configuration of them."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part, modules in lora.texts.items():
        if form not in TEXT_NAMES:
            warn(f"The changes to {ENCODERS[part]} are left out: {form} has no names for them")
            continue
        prefix, ranks = TEXT_NAMES[form][part], {}
        for module, pairs in sorted(modules.items()):
            pair = joined(pairs, len(pairs[0].up))
            name = prefix + (module.replace(".", "_") if form == "kohya" else module)
            tensors |= _factors(name, pair, form, dtype)
            ranks[name.removeprefix(f"{part}.")] = pair.rank
        if ranks:
            config |= _peft_config(ranks, False, part)
    return tensors, config


def _in_diffusers(
    lora: Pairs, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the transformer's changes, and PEFT's configuration of them."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted({*lora.pairs, *lora.biases}):
        rows, columns = shapes[module]
        for their, place in diffusers_places(module, rows, columns).items():
            cut = [pair.rows(place.start, place.stop) for pair in lora.pairs.get(module, ())]
            parts = [Pair(pair.start - place.start, pair.down, pair.up, pair.scale) for pair in cut if pair]
            bias = lora.biases.get(module, torch.zeros(rows))[place.start : place.stop]
            if not parts and not bias.any():
                continue
            nothing = Pair(0, torch.zeros(1, columns), torch.zeros(place.rows, 1))
            pair = joined(parts or [nothing], place.rows)
            ranks[their] = pair.rank
            name = f"transformer.{their}"
            tensors |= _factors(name, replace(pair, up=place.in_order(pair.up)), "diffusers", dtype)
            if lora.biases:  # PEFT has them in all modules or in none
                tensors[f"{name}.lora_B.bias"] = place.in_order(bias).to(dtype)
    return tensors, _peft_config(ranks, bool(lora.biases), "transformer") if ranks else {}


def _peft_config(ranks: Mapping[str, int], has_biases: bool, part: Part) -> dict[str, Any]:
    """PEFT's configuration of a file whose modules' scale is 1. diffusers takes ranks that differ from it."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_bias": has_biases,
    }
    return {f"{part}.{key}": value for key, value in config.items()}


def form_of(lora: OpenLora) -> Form:
    """The form whose names a file has, or BFL's for those of others."""
    forms: dict[str, Form] = {"kohya": "kohya", "diffusers": "diffusers"}
    return forms.get(lora.names, "bfl")


# ---- files


def check_output(path: str | Path, force: bool) -> Path:
    """Check that a safetensors file may be written.

    Raises:
        InputError: Its name is that of another kind of file; or it exists, and is not to be replaced.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"Got output {path}, which is a folder: name a file in it")
    if path.exists() and not force:
        raise InputError(f"Got output {path}, which exists: name another file, or give --force to replace it")
    if path.suffix not in (".safetensors", ".sft"):  # by which other programs know it
        raise InputError(f"Got output {path}, expected a name that ends in .safetensors")
    return path


def write_pairs(path: Path, lora: Pairs, form: Form, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write changes as a file.

    Args:
        path: The file.
        lora: The changes.
        form: Whose names they get.
        dtype: The dtype of the factors in the file.
        metadata: Entries of its metadata. PEFT's configuration is written anew.

    Raises:
        InputError: Nothing is changed, a number does not fit into the dtype, or the file cannot be written.
    """
    tensors, own = tensors_of(lora, form, dtype)
    if not tensors:
        raise InputError(f"Got nothing to write to {path}: no layer is changed")
    if not all(x.isfinite().all() for x in tensors.values()):
        raise InputError(f"Cannot write {path}: a number is too large for {dtype}, give --dtype bfloat16")
    kept = {key: text for key, text in metadata.items() if key != OF_PEFT}
    write_bytes(path, safetensors_bytes(tensors, {"format": "pt", **kept, **own}))
