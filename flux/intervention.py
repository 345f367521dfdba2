"""Interventions on a forward pass: skip layers, keep image keys and values, inject those of another pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.errors import InputError
from flux.math import (
    PLAIN,
    AttentionEdit,
    KeysValues,
    PartialParts,
    Parts,
    QueriesKeysValues,
    TokenCounts,
    choose_tokens,
)


@dataclass(frozen=True, eq=False)
class FreeTokens:
    """The image tokens that a pass computes, where all others are those of another pass.

    Attributes:
        computed: Places of the tokens that are computed, "M", in ascending order.
        others: Places of all others in `kv`, "I - M".
        kv: Image keys and values of all tokens in every layer, "R H I D" each, of which those of the others
            are attended to. R divides the batch. Queries behind them are not needed.
    """

    computed: Tensor
    others: Tensor
    kv: Mapping[int, Parts] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor) -> "FreeTokens":
        """The tokens where `mask` is true, "I", still without keys and values of the others."""
        computed, others = (x.nonzero()[:, 0] for x in (mask, ~mask))
        return cls(computed, others)

    def in_place(self, velocity: Tensor, num_img: int) -> Tensor:
        """Place the velocity of the computed tokens, "B M c", among all tokens, "B I c". Others have 0."""
        batch, _, channels = velocity.shape
        return velocity.new_zeros(batch, num_img, channels).index_copy(1, self.computed, velocity)

    def map(self, change: Callable[[Tensor], Tensor]) -> "FreeTokens":
        """The same with each tensor changed, without queries."""
        kv = {layer: (change(k), change(v)) for layer, (k, v, *_) in self.kv.items()}
        return FreeTokens(change(self.computed), change(self.others), kv)

    def kv_at(self, layer: int, batch: int) -> KeysValues:
        """Keys and values of all tokens in one layer, for a batch of so many rows."""
        k, v = (rows_to_batch(x, batch) for x in self.kv[layer][:2])
        return k, v


@dataclass(frozen=True, eq=False)
class Intervention:
    """The changes to one forward pass, and what it hands out.

    The empty intervention changes nothing, bit for bit. The image tokens here are the noise tokens, those of
    the image to make. Fields that do not name the context leave a context image's tokens alone. Only where a
    layer is skipped, these pass on with all others.

    Layers are numbered over the whole model, double-stream blocks first (0..18 in FLUX.1), single-stream
    blocks after (19..56). For another intervention in each step, hand a sequence of them to
    `flux.sampling.denoise`.

    Attributes:
        skip: Layers that are not computed; their input streams pass on (Stable Flow, section 3.1). One set
            for the whole batch, or a tuple with one set for each row.
        skip_scale: Fraction of a skipped layer's output that is kept. At 0 the layer is not even computed if
            every row skips it; at 1 the skip has no effect.
        keep: Layers whose image keys and values are handed out.
        keep_queries: Layers of `keep` whose image queries are handed out as well, behind keys and values.
        watch: Layers whose queries and keys are handed out, see `Recorded`.
        inject: Image keys and values to use in place of a layer's own, by layer: "R H I D" each, after
            QK-norm and rotary embedding (Stable Flow, section 3.2). The R rows must divide the batch; each
            serves batch / R rows in turn. If the keys or the values are None, the row's own are used. Image
            queries may stand behind them, to be used likewise. The text's always stay the row's own.
        inject_weights: Weight of what is injected, 0..1, by layer: own + weight * (injected - own). A tensor
            has one weight for each image token, "R I", its rows as in `inject`. In a layer without a weight,
            the injected ones replace the row's own, which are then not computed.
        hide_context: Layers in which text and noise tokens do not attend to the context tokens, which are
            computed all the same.
        keep_context: Whether the context tokens' keys and values are handed out, those of every layer.
        inject_context: Keys and values of all context tokens to use in place of a layer's own, by layer: "R H
            J D" each, as `Recorded.context` has them. If no layer is left that needs their own, the context
            tokens are not computed.
        free: The image tokens to compute. The velocity of all others is 0. What is kept and watched is that
            of the computed ones. If None, all are computed.
    """

    skip: frozenset[int] | tuple[frozenset[int], ...] = frozenset()
    skip_scale: float = 0.0
    keep: frozenset[int] = frozenset()
    keep_queries: frozenset[int] = frozenset()
    watch: frozenset[int] = frozenset()
    inject: Mapping[int, PartialParts] = field(default_factory=dict)
    inject_weights: Mapping[int, float | Tensor] = field(default_factory=dict)
    hide_context: frozenset[int] = frozenset()
    keep_context: bool = False
    inject_context: Mapping[int, KeysValues] = field(default_factory=dict)
    free: FreeTokens | None = None

    def check(self, num_layers: int, batch: int, num_img: int, num_context: int = 0) -> None:
        """Raise InputError for layers that the model lacks, and for rows or tokens that do not fit."""
        named = self.keep, self.inject, self.watch, self.hide_context, self.inject_context
        check_layers(frozenset().union(*self._skip_rows, *named), num_layers)
        if isinstance(self.skip, tuple) and len(self.skip) != batch:
            raise InputError(
                f"Got {len(self.skip)} sets of layers to skip for a batch of {batch}: give one for each row"
            )
        for layer, parts in self.inject.items():
            _check_shapes(layer, parts, batch, num_img)
        for layer, kv in self.inject_context.items():
            _check_shapes(layer, kv, batch, num_context)
        for layer, weight in self.inject_weights.items():
            if isinstance(weight, Tensor):
                if weight.ndim != 2 or batch % weight.shape[0] or weight.shape[1] != num_img:
                    raise InputError(
                        f"Got weights of shape {tuple(weight.shape)} for layer {layer}: their rows must "
                        f"divide the batch of {batch}, their tokens be {num_img}"
                    )
            elif not 0 <= weight <= 1:
                raise InputError(f"Got the weight {weight} for layer {layer}: expected 0..1")
        if self.free is not None and (missing := sorted(set(range(num_layers)) - self.free.kv.keys())):
            raise InputError(
                f"Got free tokens without the others' keys and values for layers {missing}: give all layers"
            )

    @property
    def _skip_rows(self) -> tuple[frozenset[int], ...]:
        """The set of each row, or a single set that stands for all rows."""
        return self.skip if isinstance(self.skip, tuple) else (self.skip,)

    @property
    def _changed_layers(self) -> tuple[object, ...]:
        """The layers of each change. Two passes can be one batch if all of these are equal."""
        of_image = self.skip, self.skip_scale, self.keep, self.keep_queries, self.inject.keys()
        return *of_image, self.hide_context, self.keep_context, self.inject_context.keys()

    @property
    def skips_layers(self) -> bool:
        """Whether any row skips a layer."""
        return any(self._skip_rows)

    @property
    def is_plain(self) -> bool:
        """Whether the pass is left as it is."""
        changes = self.keep or self.inject or self.watch or self.free is not None
        of_context = self.hide_context or self.keep_context or self.inject_context
        return not (changes or of_context or self.skips_layers)

    def needs_context(self, layers: Iterable[int]) -> bool:
        """Whether the context tokens are computed in a pass of these layers.

        They are, unless theirs are injected in each layer that is computed and does not hide the context.
        """
        skipped = frozenset.intersection(*self._skip_rows) if self.skip_scale == 0 else frozenset()
        served = self.inject_context.keys() | self.hide_context | skipped
        return not self.inject_context or not served.issuperset(layers)

    def skip_at(self, layer: int, device: torch.device) -> "LayerSkip":
        """How the rows of a batch on that device skip the layer."""
        flags = [layer in row for row in self._skip_rows]
        alike = all(flags) or not any(flags)
        return LayerSkip(
            flags[0] if alike else torch.tensor(flags, device=device)[:, None, None], self.skip_scale
        )

    def edit_at(self, layer: int, batch: int, plain: AttentionEdit = PLAIN) -> AttentionEdit:
        """The change in the attention of one layer, for a batch of so many rows.

        Args:
            layer: The layer.
            batch: Number of rows.
            plain: What holds for the attention of all layers.
        """
        plain = replace(
            plain,
            record=layer in self.keep or layer in self.watch or self.keep_context,
            hides_context=layer in self.hide_context,
        )
        if layer in self.inject_context:
            k, v = (rows_to_batch(x, batch) for x in self.inject_context[layer])
            plain = replace(plain, context_kv=(k, v))
        if self.free is not None:
            plain = replace(plain, others=self.free.kv_at(layer, batch), other_places=self.free.others)
        if layer not in self.inject:
            return plain
        parts = [None if x is None else rows_to_batch(x, batch) for x in self.inject[layer]]
        k, v, queries = parts if len(parts) == 3 else (*parts, None)
        kv = None if k is None and v is None else (k, v)
        like = next(x for x in parts if x is not None)
        return replace(plain, kv=kv, queries=queries, kv_weight=self._weight_at(layer, batch, like))

    def _weight_at(self, layer: int, batch: int, like: Tensor) -> Tensor | None:
        """The weight of what is injected in one layer, in a shape that broadcasts to "B H I D".

        It has the device and dtype of `like`. If None, the injected ones replace the row's own.
        """
        weight = self.inject_weights.get(layer, 1.0)
        if isinstance(weight, Tensor):
            return rows_to_batch(weight, batch).to(like)[:, None, :, None]
        # A tensor, since compiled blocks would be compiled anew for each number.
        return None if weight == 1 else like.new_full((1, 1, 1, 1), weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Intervention":
        """The same with each tensor changed."""
        return replace(
            self,
            inject=_map_parts(self.inject, change),
            inject_weights=self._weights(change),
            inject_context=_map_pairs(self.inject_context, change),
            free=self.free and self.free.map(change),
        )

    def at_tokens(self, places: Tensor) -> "Intervention":
        """The same with what is injected restricted to the image tokens at these places, "M"."""
        inject = _map_parts(self.inject, lambda x: choose_tokens(x, places))
        return replace(self, inject=inject, inject_weights=self._weights(lambda x: x[:, places]))

    def at_rows(self, rows: Sequence[int], batch: int) -> "Intervention":
        """The same for some rows of a batch, each with its own part of what is injected.

        Args:
            rows: The rows.
            batch: Number of rows of the whole batch.

        Raises:
            ValueError: The rows of the batch skip different layers.
        """
        if isinstance(self.skip, tuple):
            raise ValueError("Got a set of layers to skip for each row: a part of the rows cannot have it")
        inject = _map_parts(self.inject, lambda x: rows_of(x, rows, batch))
        context = _map_pairs(self.inject_context, lambda x: rows_of(x, rows, batch))
        weights = self._weights(lambda x: rows_of(x, rows, batch))
        return replace(self, inject=inject, inject_weights=weights, inject_context=context)

    def _weights(self, change: Callable[[Tensor], Tensor]) -> dict[int, float | Tensor]:
        """The weights, with those of each image token changed."""
        return {
            layer: change(weight) if isinstance(weight, Tensor) else weight
            for layer, weight in self.inject_weights.items()
        }

    def stacked(self, other: "Intervention") -> "Intervention":
        """Two interventions as that of one batch: the rows of this one, then those of `other`.

        Raises:
            ValueError: The two differ in more than what they inject, or do not compute all tokens.
        """
        if self.free is not None or other.free is not None:
            raise ValueError("Both passes must compute all tokens to be one batch")
        if self._changed_layers != other._changed_layers:
            raise ValueError(
                "Both passes must skip, keep, inject and hide in the same layers to be one batch"
            )

        def both(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            return None if x is None or y is None else torch.cat((x, y))

        inject = {
            layer: tuple(both(x, y) for x, y in zip(parts, other.inject[layer], strict=True))
            for layer, parts in self.inject.items()
        }
        others = other.inject_context
        context = {
            layer: (torch.cat((k, others[layer][0])), torch.cat((v, others[layer][1])))
            for layer, (k, v) in self.inject_context.items()
        }
        weights = self._weights(lambda x: x.repeat(2, 1))
        skip = 2 * self.skip if isinstance(self.skip, tuple) else self.skip
        return replace(self, skip=skip, inject=inject, inject_weights=weights, inject_context=context)


def rows_to_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat each of R rows batch / R times, in order. A single row is expanded without a copy."""
    if x.shape[0] == 1:
        return x.expand(batch, *x.shape[1:])
    return x if x.shape[0] == batch else x.repeat_interleave(batch // x.shape[0], dim=0)


def rows_of(x: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    """Those of R rows that serve some rows of a batch. A single row serves all; one row is not copied."""
    if x.shape[0] == 1:
        return x
    served = [row * x.shape[0] // batch for row in rows]
    return x[served[0] : served[0] + 1] if len(set(served)) == 1 else x[served]


def _map_parts(
    inject: Mapping[int, PartialParts], change: Callable[[Tensor], Tensor]
) -> dict[int, PartialParts]:
    """Change each tensor that is injected, by layer. Missing ones stay missing."""
    return {layer: tuple(x if x is None else change(x) for x in parts) for layer, parts in inject.items()}


def _map_pairs(
    pairs: Mapping[int, tuple[Tensor, Tensor]], change: Callable[[Tensor], Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Change both tensors of each layer."""
    return {layer: (change(x), change(y)) for layer, (x, y) in pairs.items()}


def check_layers(layers: Iterable[int], num_layers: int) -> None:
    """Raise InputError if one of `layers` is not a layer of a model with `num_layers`."""
    wrong = sorted(layer for layer in layers if not 0 <= layer < num_layers)
    if wrong:
        raise InputError(f"Got layers {wrong}, but this model numbers its layers 0..{num_layers - 1}")


def _check_shapes(layer: int, parts: PartialParts, batch: int, tokens: int) -> None:
    """Raise InputError if what is injected does not fit a pass of so many rows and tokens of its kind."""
    shapes = {tuple(x.shape) for x in parts if x is not None}
    if len(shapes) != 1 or any(batch % shape[0] or shape[2] != tokens for shape in shapes):
        raise InputError(
            f"Got keys and values of shapes {sorted(shapes)} for layer {layer}: their shapes must be "
            f"equal, their rows divide the batch of {batch}, their tokens be {tokens}"
        )


@dataclass(frozen=True, eq=False)
class Recorded:
    """The tensors that a forward pass hands out beside its velocity, by layer.

    Attributes:
        kept: Image keys and values, and the queries that are kept, "B H I D" each, after QK-norm and rotary
            embedding.
        watched: Queries of the prompt's tokens and the noise tokens, "B H T+I D"; keys of the same tokens and
            then of all others, "B H N D".
        context: Keys and values of the context tokens, "B H J D" each, likewise. Those of a pass that does
            not compute these tokens are not handed out.
    """

    kept: dict[int, Parts] = field(default_factory=dict)
    watched: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    context: dict[int, KeysValues] = field(default_factory=dict)

    def add(
        self, intervention: Intervention, layer: int, counts: TokenCounts, qkv: QueriesKeysValues | None
    ) -> None:
        """Store what the intervention asks for of a layer's queries, keys and values."""
        if qkv is None:
            return
        q, k, v = qkv
        txt_q, _, img_q, _ = q.split(counts, dim=2)
        txt_k, image_txt_k, img_k, context_k = k.split(counts, dim=2)
        _, _, img_v, context_v = v.split(counts, dim=2)
        if layer in intervention.keep:
            parts = (img_k, img_v, img_q) if layer in intervention.keep_queries else (img_k, img_v)
            self.kept[layer] = tuple(map(_copy, parts))
        if intervention.keep_context and counts.context:
            self.context[layer] = (_copy(context_k), _copy(context_v))
        if layer in intervention.watch:
            if not counts.context and layer in intervention.inject_context:
                context_k = rows_to_batch(intervention.inject_context[layer][0], len(k))
            if counts.image_txt or context_k.shape[2]:
                q = torch.cat((txt_q, img_q), dim=2)
                k = torch.cat((txt_k, img_k, image_txt_k, context_k), dim=2)
            self.watched[layer] = (q, k)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Recorded":
        """The same with each tensor changed."""
        kept = {layer: tuple(map(change, parts)) for layer, parts in self.kept.items()}
        return Recorded(kept, _map_pairs(self.watched, change), _map_pairs(self.context, change))

    def rows(self, rows: slice) -> "Recorded":
        """Some rows of the batch."""
        return self.map(lambda x: x[rows])


def _copy(heads: Tensor) -> Tensor:
    """A copy of some tokens' heads: a view would keep the whole projection in memory."""
    return heads.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class LayerSkip:
    """How one layer is skipped.

    Attributes:
        rows: Whether all rows skip the layer or none does. If they differ, which ones do, "B 1 1", bool.
        scale: Fraction of a skipped layer's output that is kept.
    """

    rows: bool | Tensor
    scale: float

    @property
    def everywhere(self) -> bool:
        """Whether the layer need not be computed at all."""
        return self.rows is True and self.scale == 0

    def apply(self, before: Tensor, after: Tensor) -> Tensor:
        """The stream to pass on, from those before and after the layer, "B n C" each."""
        if self.rows is False:
            return after
        skipped = before if self.scale == 0 else torch.lerp(before, after, self.scale)
        return skipped if isinstance(self.rows, bool) else torch.where(self.rows, skipped, after)


NOTHING = Intervention()
