"""Low-rank and other differences to a model's weights, in the forms that trainers write them.

A difference is merged into plain weights, in float32. Beside weights that stay packed a low-rank one is kept
apart; any other is added to the expanded matrix, which then stays in the model's own numbers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.modules.linear import LowRankLinear, PackedLinear
from flux.weights.checkpoint import Checkpoint, Weight, json_of, open_checkpoint, short
from flux.weights.layouts import SWAPPED, diffusers_modules

# How a tensor's name ends, and what it then is to the module that the rest names.
FIELDS = (
    (r"\.(?:lora_down|lora_A|lora_A\.default|lora_linear_layer\.down|lora\.down|down)\.weight", "down"),
    (r"\.(?:lora_up|lora_B|lora_B\.default|lora_linear_layer\.up|lora\.up|up)\.weight", "up"),
    (r"\.(?:lora_B|lora_B\.default|lora_up)\.bias", "bias"),
    (r"\.diff_b", "diff_b"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "diff"),
    (r"\.set_weight|(?<=_norm)\.scale", "set"),
    (r"\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab])", None),
)
BIASES = ("bias", "diff_b")
DORA = r"\.(dora_scale|lora_magnitude_vector)\b"
TEXT_PREFIXES = {
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
}
PREFIXES = (
    "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_",
    "lora_transformer_", "lycoris_",
)  # fmt: skip
# One form has two names for the image's and the text's projections in each block.
XLABS = {
    r"double_blocks\.(\d+)\.img_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora1",
    r"double_blocks\.(\d+)\.txt_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora2",
    r"single_blocks\.(\d+)\.linear1": r"single_blocks.\1.processor.qkv_lora",
    r"single_blocks\.(\d+)\.linear2": r"single_blocks.\1.processor.proj_lora",
}


@dataclass(frozen=True)
class Place:
    """Rows of a module's matrix, and whether their halves stand the other way round in files."""

    module: str
    start: int
    stop: int
    columns: int | None
    swapped: bool = False


@dataclass(frozen=True)
class Patch:
    """One difference to one place: its tensors by what they are.

    Attributes:
        strength: what the user wants of it; factor: that times alpha / rank.
    """

    place: Place
    fields: dict[str, Weight]
    strength: float = 1.0
    factor: float = 1.0

    @property
    def is_low_rank(self) -> bool:
        return "down" in self.fields

    @property
    def has_matrix(self) -> bool:
        return not self.fields.keys() <= {"alpha", *BIASES}

    def _in_order(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2)[::-1]) if self.place.swapped else x

    def _float(self, name: str, device: torch.device) -> Tensor:
        return self.fields[name].read(device).float()

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Down "rank in" and up "out rank", the factor multiplied into the latter."""
        return self._float("down", device), self._in_order(self._float("up", device)) * self.factor

    def matrix(self, device: torch.device) -> Tensor:
        """The whole difference, "out in"."""
        if "down" in self.fields:
            down, up = self.factors(device)
            return up @ down
        if "diff" in self.fields:
            return self._in_order(self._float("diff", device)) * self.factor
        first, second = (self._product(name, device) for name in self._halves())
        whole = torch.kron(first, second) if "lokr" in self._halves()[0] else first * second
        return self._in_order(whole) * self.factor

    def _halves(self) -> tuple[str, str]:
        kind = "lokr" if any(name.startswith("lokr") for name in self.fields) else "hada"
        return f"{kind}_w1", f"{kind}_w2"

    def _product(self, name: str, device: torch.device) -> Tensor:
        if name in self.fields:
            return self._float(name, device)
        return self._float(f"{name}_a", device) @ self._float(f"{name}_b", device)

    def bias(self, device: torch.device) -> Tensor:
        """The difference of the bias."""
        named = {"bias": self.factor, "diff_b": self.strength}
        biases = (self._float(name, device).flatten() * named[name] for name in named if name in self.fields)
        return self._in_order(sum(biases))

    def replacement(self, device: torch.device) -> Tensor:
        """The values that take the place of the model's own."""
        return self._in_order(self._float("set", device))

    def check(self, path: Path) -> None:
        """Raises InputError unless all tensors are there and of the place's size. Reads none of them."""
        place, shapes = self.place, {name: weight.shape for name, weight in self.fields.items()}
        rows = place.stop - place.start
        kinds = shapes.keys() - {"alpha", *BIASES}
        if place.columns is None:
            fits = kinds == {"set"} and shapes["set"] == (rows,)
        elif not kinds:
            fits = not shapes.keys().isdisjoint(BIASES)
        elif kinds == {"down", "up"}:
            down, up = shapes["down"], shapes["up"]
            fits = len(down) == len(up) == 2 and (*up, *down) == (rows, down[0], down[0], place.columns)
        elif kinds <= {"diff", "set"}:
            fits = all(shapes[name] == (rows, place.columns) for name in kinds)
        else:
            fits = self._product_shape(shapes) == (rows, place.columns)
        fits &= all(math.prod(shapes.get(name, (rows,))) == rows for name in BIASES)
        fits &= math.prod(shapes.get("alpha", ())) == 1
        if not fits:
            found = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
            hint = ""
            if place.module == "img_in":
                hint = " (one for canny, depth or fill needs more inputs than the models known here have)"
            raise InputError(
                f"Got {path}, a difference for another model: for {place.module} it has {found}, expected "
                f"one of {rows} x {place.columns}{hint}"
            )

    def _product_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        halves = []
        for name in self._halves():
            a, b = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
            joined = (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else ()
            halves.append(shapes.get(name, joined))
        if any(len(half) != 2 for half in halves):
            return None
        first, second = halves
        if "lokr" in self._halves()[0]:
            return first[0] * second[0], first[1] * second[1]
        return first if first == second else None


@dataclass(frozen=True)
class Lora:
    """One file of differences and the strength it is added with."""

    path: Path
    weight: float
    modules: dict[str, dict[str, Weight]]
    metadata: dict[str, str]


def read_lora(path: Path, weight: float = 1.0) -> Lora:
    """The tensors of a file of differences, by the module they are for. Reads its head only.

    Raises:
        InputError: no readable file, or a form that is no sum (DoRA).
    """
    checkpoint = open_checkpoint(path)
    modules: dict[str, dict[str, Weight]] = {}
    unknown = []
    for name, entry in checkpoint.weights.items():
        if re.search(DORA, name):
            raise InputError(
                f"Got {path}, which is a DoRA ({short(name)}): not supported, only plain sums are"
            )
        found = next(((re.search(f"(?:{end})$", name), field) for end, field in FIELDS
                      if re.search(f"(?:{end})$", name)), None)  # fmt: skip
        if found is None:
            unknown.append(name)
            continue
        match, field = found
        modules.setdefault(name[: match.start()], {})[field or match[1]] = entry
    if unknown or not modules:
        _refuse(path, unknown or ["none at all"])
    return Lora(path, weight, modules, _metadata(path, checkpoint))


def _metadata(path: Path, checkpoint: Checkpoint) -> dict:
    """PEFT's configuration: in the file's header, or beside it; its own names with the part before them."""
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if text is not None:
        return json_of(text, path)
    file = checkpoint.heads[0].path
    beside = file.with_name("adapter_config.json")
    if file.name == "adapter_model.safetensors" and beside.is_file():
        return {f"transformer.{key}": value for key, value in json_of(beside.read_bytes(), beside).items()}
    return {}


def _refuse(path: Path, names: list[str]) -> None:
    some = ", ".join(map(short, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise InputError(
        f"Got {path}, with tensors that belong to no part of this model: {some}; it is for another model, or "
        "of a form not known here"
    )


# ---- from a file's names to the model's


def match(lora: Lora, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Patch]:
    """What a file changes in one net.

    Args:
        part: "transformer", "text_encoder" or "text_encoder_2".
        shapes: of the net's tensors, by name.

    Raises:
        InputError: tensors that this net has no place for, or of another size.
    """
    places = _places(part, shapes)
    places |= {name.replace(".", "_"): place for name, place in places.items()}
    prefixes = TEXT_PREFIXES.get(part, PREFIXES)
    patches, unmatched = [], []
    for module, fields in lora.modules.items():
        if _part_of(module) != part:
            continue
        names = [module]
        for _ in range(2):
            names += [name[len(prefix) :] for name in names for prefix in prefixes if name.startswith(prefix)]
        place = next((places[name] for name in names if name in places), None)
        if place is None:
            unmatched.append(module)
            continue
        Patch(place, fields).check(lora.path)
        factor = lora.weight * _scale(lora, module, part, fields)
        patches.append(Patch(place, fields, lora.weight, factor))
    if unmatched:
        _refuse(lora.path, unmatched)
    return patches


def parts(lora: Lora) -> set[str]:
    """The nets that a file has differences for."""
    return {_part_of(module) for module in lora.modules}


def _part_of(module: str) -> str:
    text = (part for part, prefixes in TEXT_PREFIXES.items() if module.startswith(prefixes))
    return next(text, "transformer")


def _places(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Every name that files have for a module of ours, without prefix."""
    places = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "scale":
            places[module] = Place(module, 0, shape[0], None)
        if leaf != "weight" or len(shape) != 2:
            continue
        rows, columns = shape
        whole = Place(module, 0, rows, columns)
        places[module] = whole
        if part == "text_encoder":
            places[f"text_model.{module}"] = whole
        if part != "transformer":
            continue
        theirs, start = diffusers_modules(module), 0
        for index, their in enumerate(theirs):
            # Queries, keys and values have as many rows as the model has columns; the rest follows them.
            stop = start + columns if index < 3 and len(theirs) > 1 else rows
            places[their] = Place(module, start, stop, columns, module == SWAPPED)
            start = stop
        for pattern, name_there in XLABS.items():
            if re.fullmatch(pattern, module):
                stop = 3 * columns if module.endswith("linear1") else rows
                places[re.sub(pattern, name_there, module)] = Place(module, 0, stop, columns)
    return places


def _scale(lora: Lora, module: str, part: str, fields: Mapping[str, Weight]) -> float:
    """alpha / rank. LoKr: with both factors stored whole there is no rank, and the factor is 1."""
    inner = [weight.shape[0] for name, weight in fields.items() if name == "down" or name.endswith("_b")]
    if not inner:
        return 1.0
    if "alpha" in fields:
        return float(fields["alpha"].read()) / inner[0]
    about = {key.removeprefix(f"{part}."): value for key, value in lora.metadata.items()}
    try:
        special = (about.get("alpha_pattern") or {}).items()
        own = (value for key, value in special if re.search(rf"(^|\.){key}$", module))
        alpha = next(own, about.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(inner[0]) if about.get("use_rslora") else inner[0])
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"Got {lora.path}, whose alpha and rank cannot be read: fetch it again") from error


# ---- adding it


def add(net: nn.Module, patches: list[Patch], dtype: torch.dtype) -> None:
    """Adds differences to a net, in place. What the net computes in is `dtype`."""
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.place.module, []).append(patch)
    for name, group in by_module.items():
        module = net.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        device = next(module.parameters()).device
        if group[0].place.columns is None:
            module.scale = _parameter(group[-1].replacement(device), dtype)
            continue
        matrices = [patch for patch in group if patch.has_matrix]
        apart = not isinstance(module, nn.Linear) and all(patch.is_low_rank for patch in matrices)
        changed = module
        if matrices:
            changed = _beside(module, matrices, dtype) if apart else _merged(module, matrices, dtype)
        for patch in group:
            if patch.fields.keys() & set(BIASES):
                _add_to_bias(changed, patch, device, dtype)
        setattr(net.get_submodule(parent), leaf, changed)


def _parameter(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(x.to(dtype), requires_grad=False)


def _merged(module: nn.Module, group: list[Patch], dtype: torch.dtype) -> nn.Linear:
    """A plain layer with the differences in it."""
    weight = module.weight.float()
    for patch in group:
        place = patch.place
        if "set" in patch.fields:
            weight[place.start : place.stop] = patch.replacement(weight.device)
        else:
            weight[place.start : place.stop] += patch.matrix(weight.device)
    merged = nn.Linear(1, 1, bias=False, device="meta")
    merged.out_features, merged.in_features = weight.shape
    merged.weight, merged.bias = _parameter(weight, dtype), module.bias
    return merged


def _beside(module: PackedLinear, group: list[Patch], dtype: torch.dtype) -> LowRankLinear:
    """The layer and all its low-rank differences as one: their downs below, their ups beside each other."""
    device = module.packed.device
    downs, ups = [], []
    for patch in group:
        down, up = patch.factors(device)
        rows = torch.zeros(module.packed.shape[0], up.shape[1], device=device)
        rows[patch.place.start : patch.place.stop] = up
        downs.append(down)
        ups.append(rows)
    return LowRankLinear(module, torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype))


def _add_to_bias(module: nn.Module, patch: Patch, device: torch.device, dtype: torch.dtype) -> None:
    layer = module.base if isinstance(module, LowRankLinear) else module
    rows = layer.packed.shape[0] if isinstance(layer, PackedLinear) else layer.out_features
    bias = torch.zeros(rows, device=device) if layer.bias is None else layer.bias.float()
    bias[patch.place.start : patch.place.stop] += patch.bias(device)
    layer.bias = _parameter(bias, dtype)
