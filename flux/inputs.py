"""The inputs of a pass of the transformer, and the streams between its layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.errors import InputError
from flux.math import TokenCounts


@dataclass(frozen=True, eq=False)
class Condition:
    """An image that steers a pass, as tensors. The empty condition changes nothing, bit for bit.

    Each tensor has one row that serves a whole batch, or one for each row.

    Attributes:
        channels: Channels to put behind those of each noise token, "R I c" (Fill, Canny, Depth).
        context: Tokens to put behind the noise tokens, "R J channels" (Kontext).
        context_ids: Positions of these tokens, "R J 3".
        context_strength: Scale of the context's keys about their mean, in every layer: mean + strength * (key
            - mean). Above 1, attention tells the places of the context image apart more clearly; at 0, it
            does not tell them apart.
        txt: Text tokens to put behind those of the prompt, "R n features" (Redux).
    """

    channels: Tensor | None = None
    context: Tensor | None = None
    context_ids: Tensor | None = None
    context_strength: float = 1.0
    txt: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """The same with each tensor changed."""
        return replace(self, **{name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def to(self, like: Tensor) -> "Condition":
        """The same on the device and in the dtype of `like`; positions keep their dtype."""
        ids = self.context_ids
        moved = self.map(lambda x: x.to(like))
        return moved if ids is None else replace(moved, context_ids=ids.to(like.device))

    def expanded(self, batch: int) -> "Condition":
        """Expand a single row to the whole batch, without a copy.

        Raises:
            InputError: The rows are neither one nor those of the batch.
        """

        def expand(x: Tensor) -> Tensor:
            if len(x) not in (1, batch):
                raise InputError(
                    f"Got a condition of {len(x)} rows for a batch of {batch}: give 1 or {batch}"
                )
            return x.expand(batch, -1, -1)

        return self.map(expand)

    def at_rows(self, rows: Sequence[int]) -> "Condition":
        """The condition of some rows."""
        return self.map(lambda x: x if len(x) == 1 else x[list(rows)])

    def at_tokens(self, places: Tensor) -> "Condition":
        """The same for the noise tokens at these places, "M". All context tokens stay."""
        return self if self.channels is None else replace(self, channels=self.channels[:, places])

    def without_context(self) -> "Condition":
        """The same without context tokens."""
        return replace(self, context=None, context_ids=None, context_strength=1.0)

    def stacked(self, other: "Condition") -> "Condition":
        """These rows, then those of `other`, as one batch.

        Raises:
            ValueError: The two are conditions of different kinds or strengths.
        """
        stacked = {}
        for name, own in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(own, Tensor) and isinstance(theirs, Tensor):
                stacked[name] = torch.cat((own, theirs))
            elif own != theirs:
                raise ValueError(f"Both passes must have the same kind of condition, but {name} differs")
        return replace(self, **stacked)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of the transformer.

    Attributes:
        img: Packed latent, "B I channels". Its tokens are the noise tokens.
        img_ids: Position of each noise token, "B I 3".
        txt: T5 features, "B T features".
        txt_ids: Position of each text token, "B T 3".
        timesteps: Noise level 0..1 of each row, "B".
        y: Pooled CLIP features, "B features".
        guidance: Distilled guidance scale of each row, "B". Needed by models with `guidance_embed`.
        condition: Channels and context tokens of an image, with B rows.

    Raises:
        ValueError: `img` or `txt` has another rank.
    """

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    timesteps: Tensor
    y: Tensor
    guidance: Tensor | None = None
    condition: Condition = field(default_factory=Condition)

    def __post_init__(self):
        if self.img.ndim != 3 or self.txt.ndim != 3:
            raise ValueError(
                f"Input img and txt tensors must have 3 dimensions, got {self.img.ndim} and {self.txt.ndim}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are given, by name."""
        of_condition = {f"condition.{name}": x for name, x in vars(self.condition).items()}
        named = vars(self) | of_condition
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with each tensor changed."""
        changed = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed, condition=self.condition.map(change))

    def at_tokens(self, places: Tensor) -> "Inputs":
        """The inputs of the noise tokens at these places, "M", and of all context tokens."""
        condition = self.condition.at_tokens(places)
        return replace(self, img=self.img[:, places], img_ids=self.img_ids[:, places], condition=condition)

    def check(self, in_channels: int) -> None:
        """Raise InputError if the condition does not fit the latent, or a model of so many channels."""
        condition, (_, tokens, channels) = self.condition, self.img.shape
        extra = 0 if condition.channels is None else condition.channels.shape[2]
        if channels + extra != in_channels:
            raise InputError(
                f"Got tokens of {channels} channels and {extra} of a condition, but the model takes "
                f"{in_channels}: give the model the kind of condition that it was trained with"
            )
        if condition.channels is not None and condition.channels.shape[1] != tokens:
            raise InputError(
                f"Got a condition of {condition.channels.shape[1]} tokens for an image of {tokens}: make "
                "them of one size"
            )
        if condition.context is not None and condition.context.shape[2] != in_channels:
            raise InputError(
                f"Got context tokens of {condition.context.shape[2]} channels, but the model takes "
                f"{in_channels}: give the model the kind of condition that it was trained with"
            )
        if (condition.context is None) != (condition.context_ids is None):
            raise InputError("Got context tokens without positions, or the reverse: give both")

    @property
    def counts(self) -> TokenCounts:
        """The number of tokens of each kind."""
        of_condition = self.condition.txt, self.condition.context
        image_txt, context = (0 if x is None else x.shape[1] for x in of_condition)
        return TokenCounts(self.txt.shape[1], image_txt, self.img.shape[1], context)

    @property
    def img_in(self) -> Tensor:
        """The tokens of the image stream: noise tokens with all their channels, then context tokens."""
        condition, img = self.condition, self.img
        if condition.channels is not None:
            img = torch.cat((img, condition.channels), dim=2)
        return img if condition.context is None else torch.cat((img, condition.context), dim=1)

    @property
    def txt_in(self) -> Tensor:
        """The tokens of the text stream."""
        return self.txt if self.condition.txt is None else torch.cat((self.txt, self.condition.txt), dim=1)

    @property
    def ids(self) -> Tensor:
        """The positions of all tokens, "B N 3". Those of text that is made of an image are 0."""
        ids = [self.txt_ids, self.img_ids]
        if self.condition.txt is not None:
            ids.insert(1, self.txt_ids.new_zeros(*self.condition.txt.shape[:2], 3))
        if self.condition.context_ids is not None:
            ids.append(self.condition.context_ids)
        return torch.cat(ids, dim=1)


@dataclass(frozen=True, eq=False)
class Streams:
    """Both streams between two layers, on their way into `layer`: img "B I+J C", txt "B T C".

    They hold the tokens of `Inputs.img_in` and `Inputs.txt_in`.
    """

    layer: int
    img: Tensor
    txt: Tensor

    def expanded(self, batch: int) -> "Streams":
        """Expand a single row to the whole batch, without a copy."""
        return Streams(self.layer, self.img.expand(batch, -1, -1), self.txt.expand(batch, -1, -1))

    def cut(self, tokens: int) -> "Streams":
        """The same with only the first tokens of the image stream, so many."""
        return Streams(self.layer, self.img[:, :tokens], self.txt)

    def stacked(self, other: "Streams") -> "Streams":
        """These rows, then those of `other`, as one batch."""
        return Streams(self.layer, torch.cat((self.img, other.img)), torch.cat((self.txt, other.txt)))
