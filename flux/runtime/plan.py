"""What a run takes of a device's memory, worked out before anything is loaded, and the plan that fits it.

All the accounting is here. Weights are counted from their shapes. What a net needs beside them while it
computes is found by running it without memory (on torch's meta device), at full width but with one block of
each kind, and watching which tensors live at the same time.
"""

import math
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flux.errors import InputError
from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoder
from flux.modules.linear import PackedLinear
from flux.runtime.offload import spread
from flux.runtime.quantize import BITS, quantize_linears, quantized_bytes, to_fp8
from flux.runtime.tiling import TILE
from flux.settings.demos import EditSettings, ModelSettings, SkipSettings
from flux.settings.doses import dose_of
from flux.specs import ModelSpec
from flux.weights.checkpoint import EIGHT_BIT
from flux.weights.find import ModelFiles
from flux.weights.layouts import Source
from flux.weights.load import fit, flow_on_meta, on_meta, text_on_meta

MIB, GIB = 2**20, 2**30
WORKSPACE = 32 * MIB  # cuBLAS's own, on a CUDA device
# A plan fits if there is room for this much more: what kernels take on the side, and what the allocator holds
# in pieces too small to use, the more the more lies there (`benchmarks.memory`: 0.3 to 1.5 GiB of 8 to 24).
SLACK, WEIGHT_MARGIN, ACTIVATION_MARGIN = 512 * MIB, 1.04, 1.15
ALL = sys.maxsize  # blocks to stream
BLOCK = r"(double_blocks|single_blocks|encoder\.block)\.(\d+)\."
T5_HEAD, T5_WIDENING = 64, 2.5  # channels of a head, and the wide layer's width over the model's, in T5-XXL


# ---- what lives at the same time


class _Lives(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on: those alive now, and the most there were."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.seen:
                self._begin(x.untyped_storage())
        if function is torch.ops.aten.conv2d.default:  # in inference mode operations arrive whole
            # cuDNN copies both sides into the layout that it likes.
            self.most = max(self.most, self.now + args[0].nbytes + made.nbytes)
        return made

    def _begin(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())

    def _end(self, name: int, nbytes: int) -> None:
        self.seen.discard(name)
        self.now -= nbytes


class _Attention(TorchFunctionMode):
    """Attention as the kernels of a GPU do it: nothing but the result is stored."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def live_bytes(run: Callable[[], object], known: list[Tensor]) -> int:
    """The most bytes that tensors made by `run` take at a time; `known` are those that are there before."""
    with torch.inference_mode(), _Lives(known) as lives, _Attention():
        run()
    return lives.most


# ---- the nets


@dataclass(frozen=True)
class Sizes:
    """Bytes of a net's weights: of its blocks, in the order in which they compute, and of all the rest."""

    blocks: tuple[int, ...]
    rest: int

    @property
    def whole(self) -> int:
        return sum(self.blocks) + self.rest

    def streamed(self, count: int) -> int:
        """On the device while `count` blocks are streamed: the others, and room for the largest two."""
        if not count:
            return self.whole
        chosen = [self.blocks[number] for number in spread(count, len(self.blocks))]
        return self.whole - sum(chosen) + 2 * max(chosen)


@dataclass(frozen=True)
class Form:
    """How weights lie on the device: what a file packs stays packed, the rest is in `dtype`.

    Attributes:
        bits: of the other matrices inside the blocks; with 8, 8-bit floats stay as they are stored too.
        fp8: the bits are those of `flux.fp8`, which leaves modulations alone.
    """

    dtype: torch.dtype
    bits: int = 16
    fp8: bool = False

    def packs(self, source: Source) -> bool:
        return source.is_packed and (self.bits == 8 or source.kind not in EIGHT_BIT)

    def nbytes(self, source: Source, in_block: bool) -> int:
        if len(source.shape) == 2 and self.packs(source):
            return sum(part.stored.size for part in source.parts)
        if len(source.shape) == 2 and in_block and self.bits < 16:
            return quantized_bytes(source.shape, self.bits, self.dtype.itemsize)
        return math.prod(source.shape) * self.dtype.itemsize

    def sizes(self, made: dict[str, Source]) -> Sizes:
        """Of the net that is made of these."""
        blocks: dict[tuple[str, int], int] = {}
        rest = 0
        for name, source in made.items():
            block = re.match(BLOCK, name)
            if block:
                key = (block[1], int(block[2]))
                packs = not (self.fp8 and re.search(r"mod(ulation)?\.lin\.", name))
                blocks[key] = blocks.get(key, 0) + self.nbytes(source, packs)
            else:
                rest += self.nbytes(source, False)
        return Sizes(tuple(blocks[key] for key in sorted(blocks)), rest)


def thin(params: FluxParams, made: dict[str, Source], form: Form) -> Flux:
    """The transformer with the first block of each kind only, without memory, its weights in that form."""
    with torch.device("meta"):
        net = Flux(replace(params, depth=1, depth_single_blocks=1)).to(form.dtype)
        for name, module in list(net.named_modules()):
            source = made.get(f"{name}.weight")
            if isinstance(module, nn.Linear) and form.packs(source):
                row_bytes = sum(part.stored.size for part in source.parts) // source.shape[0]
                packed = torch.empty(source.shape[0], row_bytes, dtype=torch.uint8)
                scale = torch.empty(()) if source.kind in EIGHT_BIT else None
                parent, _, own = name.rpartition(".")
                linear = PackedLinear(packed, source.kind, module.bias, scale, form.dtype)
                setattr(net.get_submodule(parent), own, linear)
        if form.fp8:
            to_fp8([net.double_blocks, net.single_blocks])
        elif form.bits < 16:
            quantize_linears([net.double_blocks, net.single_blocks], form.bits)
    return net


# ---- the stages of a run


@dataclass(frozen=True)
class Stage:
    """One part of a run: bytes of the weights on the device meanwhile, and of what lives beside them."""

    name: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations

    @property
    def needed(self) -> int:
        """Free memory from which on it is sure to run."""
        return round(WEIGHT_MARGIN * self.weights + ACTIVATION_MARGIN * self.activations) + SLACK

    def fits(self, free: int) -> bool:
        return self.needed <= free


@dataclass(frozen=True)
class Plan:
    """Where the nets lie, and what that takes of the device.

    Attributes:
        offload: "none", "model" or "blocks".
        streamed: how many blocks of the transformer are streamed, `ALL` or fewer; streamed_t5 of T5.
        tiled: whether pictures are decoded and encoded in tiles.
        stages: of a run; none for a plan that the settings name, which is not worked out.
    """

    offload: str
    streamed: int
    streamed_t5: int
    tiled: bool
    stages: tuple[Stage, ...] = ()

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def fits(self, free: int) -> bool:
        return all(stage.fits(free) for stage in self.stages)

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device at most, expected within a tenth."""
        return max(stage.peak for stage in self.stages)


class Accounts:
    """What each stage of a run with these settings takes, whatever the plan.

    Args:
        made: what the tensors of each net are made of, by the net's folder in diffusers' layout.
        dtype: of the transformer and the autoencoder; text_dtype that of the text encoders.
        on_gpu: whether kernels take a workspace.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: ModelSpec,
        made: Mapping[str, dict[str, Source]],
        dtype: torch.dtype,
        text_dtype: torch.dtype,
        on_gpu: bool,
    ):
        self.settings, self.spec, self.dtype = settings, spec, dtype
        self.width, self.height = (side or spec.size for side in (settings.width, settings.height))
        self.passes = 2 if (settings.true_cfg or spec.true_cfg) > 1 else 1
        self.workspace = WORKSPACE if on_gpu else 0

        form, text_form = Form(dtype, BITS[settings.quantize], settings.quantize == "fp8"), Form(text_dtype)
        self.flow = form.sizes(made["transformer"])
        self.ae = Form(dtype).sizes(made["vae"]).whole
        self.clip = text_form.sizes(made["text_encoder"]).whole
        t5_form = Form(text_dtype, 8) if settings.t5 == "8bit" else text_form
        self.t5 = t5_form.sizes(made["text_encoder_2"])
        if settings.t5 == "cpu":
            self.t5 = Sizes((), 0)

        tokens = self.height // 16 * (self.width // 16) + spec.text_length
        # Of a sweep: what enters each layer in the reference's first step.
        self.streams = self.passes * spec.num_layers * tokens * spec.params.hidden_size * dtype.itemsize
        self.denoise = self._denoise(thin(spec.params, made["transformer"], form))
        self.text = self._text(text_dtype.itemsize)
        ae = on_meta(AutoEncoder, spec.ae_params).to(dtype)
        self.pictures = {tiled: self._pictures(ae, tiled) for tiled in (False, True)}

    def _denoise(self, flow: Flux) -> int:
        """Of one pass, and for an edit the keys and values that the reference hands over."""
        spec, batch, tokens = self.spec, self.settings.batch_size, self.height // 16 * (self.width // 16)
        params = spec.params

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        given = {
            "img": empty(batch, tokens, params.in_channels),
            "img_ids": empty(batch, tokens, 3, dtype=torch.float32),
            "txt": empty(batch, spec.text_length, params.context_in_dim),
            "txt_ids": empty(batch, spec.text_length, 3, dtype=torch.float32),
            "timesteps": empty(batch),
            "y": empty(batch, params.vec_in_dim),
            "guidance": empty(batch),
        }
        known = [*flow.parameters(), *flow.buffers(), *given.values()]
        most = live_bytes(lambda: flow(**given), known)
        if isinstance(self.settings, EditSettings):
            layers = self.settings.vital_layers
            count = len(spec.vital_layers or ()) if isinstance(layers, str) else len(layers)
            most += self.passes * count * 2 * tokens * params.hidden_size * self.dtype.itemsize
            if any(dose_of(entry).mask == "auto" for entry in self.settings.entries):
                # Queries and keys that the search for the mask looks at, of the edits and of their sources.
                watched = 2 * len(params.around_the_joint) * 2 * batch * (tokens + spec.text_length)
                most += watched * params.hidden_size * self.dtype.itemsize
        # Modulations of a whole schedule, in the worst case other ones for each row.
        parts = 12 * params.depth + 3 * params.depth_single_blocks + 2
        steps = self.settings.num_steps or spec.num_steps
        most += steps * batch * parts * params.hidden_size * self.dtype.itemsize
        return most

    def _text(self, itemsize: int) -> int:
        """Of T5: attention scores as they are, with their bias, and as float32; and the wide layer."""
        prompts, tokens = self.settings.batch_size + self.passes - 1, self.spec.text_length
        width = self.spec.params.context_in_dim
        scores = width // T5_HEAD * tokens**2
        return prompts * (scores * (3 * itemsize + 4) + round(3 * T5_WIDENING * width) * tokens * itemsize)

    def _pictures(self, ae: AutoEncoder, tiled: bool) -> int:
        """Of decoding one picture, or encoding one, while the batch's finished ones are there as float32."""
        sides = (self.height // 8, self.width // 8)
        height, width = (min(side, TILE) if tiled else side for side in sides)
        shapes = (ae.params.z_channels, height, width), (ae.params.in_channels, 8 * height, 8 * width)
        latent, picture = (torch.empty(1, *shape, dtype=self.dtype, device="meta") for shape in shapes)
        known = [*ae.parameters(), latent, picture]
        most = live_bytes(lambda: ae.decode(latent), known)
        if getattr(self.settings, "photo", None):
            most = max(most, live_bytes(lambda: ae.encode(picture), known))
        finished = 4 * ae.params.out_ch * self.height * self.width
        return most + (self.settings.batch_size + 2 * tiled) * finished

    def plan(self, offload: str, streamed: int = 0, streamed_t5: int = 0, tiled: bool = False) -> Plan:
        """What this choice takes: with "none" all nets all the time, else each while it works."""
        weights = {
            "text": self.t5.streamed(streamed_t5) + self.clip,
            "denoise": self.flow.streamed(streamed),
            "decode": self.ae,
        }
        beside = {"text": self.text, "denoise": self.denoise, "decode": self.pictures[tiled]}
        if isinstance(self.settings, SkipSettings):
            if offload == "none":  # then it decodes beside the steps of the next pictures
                beside["denoise"] += beside["decode"]
            for name in ("denoise", "decode"):
                beside[name] += self.streams
        everything = sum(weights.values())
        stages = (
            Stage(name, everything if offload == "none" else weights[name], beside[name] + self.workspace)
            for name in weights
        )
        return Plan(offload, streamed, streamed_t5, tiled, tuple(stages))

    def fitting(self, free: int) -> Plan:
        """The fastest plan for so many free bytes: all nets on the device, else one at a time, else as many
        blocks streamed as it takes. In tiles, which changes the picture a little, only if it must be.

        Raises:
            InputError: not even the smallest one fits.
        """
        for tiled in (True,) if self.settings.tiled else (False, True):
            plan = self.plan("none", tiled=tiled)
            if plan.fits(free):
                return plan
        blocks, t5_blocks = len(self.flow.blocks), len(self.t5.blocks)
        # Of two blocks that are streamed both lie on the device: the gain begins with the third.
        counts = (0, *range(3, blocks))
        fewest = (n for n in counts if self.plan("blocks", n).stage("denoise").fits(free))
        one_by_one = self.plan("model")
        streamed = next(fewest, blocks)
        streamed_t5 = 0 if one_by_one.stage("text").fits(free) else t5_blocks
        tiled = self.settings.tiled or not one_by_one.stage("decode").fits(free)
        plan = self.plan("blocks" if streamed or streamed_t5 else "model", streamed, streamed_t5, tiled)
        if not plan.fits(free):
            stage = plan.largest
            raise InputError(
                f"Got {free / GIB:.1f} GiB of free memory on the device, expected {stage.needed / GIB:.1f} "
                f"({stage.name}, {self.width}x{self.height}, batch_size {self.settings.batch_size}): make "
                "the image or the batch smaller"
            )
        return plan


def sources_of(spec: ModelSpec, files: ModelFiles) -> dict[str, dict[str, Source]]:
    """What the tensors of each net are made of, from the heads of its files."""
    return {
        "transformer": flow_on_meta(spec, files)[1],
        "vae": fit(on_meta(AutoEncoder, spec.ae_params), files.ae, "vae"),
        **{part: text_on_meta(files, part)[1] for part in ("text_encoder", "text_encoder_2")},
    }


def make_plan(
    settings: ModelSettings,
    spec: ModelSpec,
    files: ModelFiles,
    dtype: torch.dtype,
    text_dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """The plan that the settings name; for "auto" the one that fits the device's free memory, printed.

    Raises:
        InputError: "auto", and nothing fits.
    """
    if settings.offload != "auto":
        streamed = ALL if settings.offload == "blocks" else 0
        return Plan(settings.offload, streamed, streamed, settings.tiled)
    accounts = Accounts(settings, spec, sources_of(spec, files), dtype, text_dtype, device.type == "cuda")
    free = free_memory(device)
    # Where the device's memory is the host's, nothing is won by going from one to the other.
    plan = accounts.plan("none", tiled=settings.tiled) if free is None else accounts.fitting(free)
    print(describe(plan, accounts, free))
    return plan


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take of a GPU's memory; None: the device has none of its own."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    taken, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # It alone does not take a device without a number; None is the current one.
    allowed = torch.cuda.get_per_process_memory_fraction(device.index) * total
    return round(min(free + reserved, allowed) - taken)


def describe(plan: Plan, accounts: Accounts, free: int | None) -> str:
    """The plan in a line: what goes where, and how much memory that is expected to take at most."""
    where = ["all nets stay on the device" if plan.offload == "none" else "each net comes when it works"]
    if plan.streamed:
        where.append(f"{plan.streamed} of {len(accounts.flow.blocks)} transformer blocks are streamed")
    if plan.streamed_t5:
        where.append("T5's blocks are streamed")
    if plan.tiled:
        where.append("pictures are decoded in tiles")
    of = "" if free is None else f" of {free / GIB:.1f}"
    return f"memory: {', '.join(where)}; at most {plan.peak / GIB:.1f}{of} GiB, to {plan.largest.name}"
