"""A stand-in for ComfyUI: its node classes, its model patcher, and its hooks around this package's blocks.

It follows the hook contract of ComfyUI's FLUX models. It proves the nodes' arithmetic, and nothing about
ComfyUI itself: `tests/comfyui/try_core.py` runs the nodes in the real one.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from flux.math import AttentionEdit
from flux.model import Flux, Inputs

INPUT_TYPES = (
    "Model",
    "Clip",
    "Vae",
    "Latent",
    "Mask",
    "Image",
    "Conditioning",
    "Combo",
    "String",
    "Float",
    "Int",
)


@dataclass
class Socket:
    """An input or output of a schema, with what it was declared with."""

    kind: str
    id: str | None = None
    options: list | None = None
    declared: dict[str, Any] = field(default_factory=dict)


def _type(kind: str) -> SimpleNamespace:
    def make_input(name, options=None, **declared):
        return Socket(kind, name, options, declared)

    def make_output(display_name=None, **declared):
        return Socket(kind, display_name, None, declared)

    return SimpleNamespace(Input=make_input, Output=make_output)


class NodeOutput:
    """The result of a node."""

    def __init__(self, *args):
        self.args = args


def modules() -> dict[str, ModuleType]:
    """The modules that the nodes import from ComfyUI."""
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: SimpleNamespace(**fields),
        NodeOutput=NodeOutput,
        Custom=_type,
        **{kind: _type(kind) for kind in INPUT_TYPES},
    )
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, type("ComfyExtension", (), {})
    return {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest}


def import_nodes(monkeypatch) -> ModuleType:
    """Import the node pack beside the stand-in's modules."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.split(".")[0] == "comfyui"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("comfyui.nodes")


class Patcher:
    """ComfyUI's model patcher as far as the nodes use it."""

    def __init__(self, flux: Flux, calls_attn1: bool = True):
        self.flux, self.calls_attn1 = flux, calls_attn1
        # The source of a block's module decides which hook the nodes take.
        block = type("Block", (), {"__module__": __name__ if calls_attn1 else "math"})()
        diffusion_model = SimpleNamespace(
            double_blocks=[block] * len(flux.double_blocks), single_blocks=[block] * len(flux.single_blocks)
        )
        self.model = SimpleNamespace(diffusion_model=diffusion_model, process_latent_in=lambda x: x)
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: list[Callable] = []
        self.post_cfg: list[Callable] = []

    def clone(self) -> "Patcher":
        other = copy.copy(self)
        options = self.model_options["transformer_options"]
        replaced = dict(options.get("patches_replace", {}).get("dit", {}))
        patches = {name: list(each) for name, each in options.get("patches", {}).items()}
        other.model_options = {
            "transformer_options": {"patches": patches, "patches_replace": {"dit": replaced}}
        }
        other.wrappers, other.post_cfg = list(self.wrappers), list(self.post_cfg)
        return other

    def get_model_object(self, name: str) -> SimpleNamespace:
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def set_model_attn1_patch(self, patch: Callable) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), patch]

    def set_model_patch_replace(self, patch: Callable, name: str, block_name: str, number: int) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[block_name, number] = patch

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        assert (kind, key) == ("diffusion_model", "stable_flow")
        self.wrappers.append(wrapper)

    def set_model_sampler_post_cfg_function(self, function: Callable) -> None:
        self.post_cfg.append(function)

    def run(self, inputs: Inputs, sigma: float, size: tuple[int, int], chunks: int = 1) -> Tensor:
        """The velocity of a batch of rows, with all hooks called as ComfyUI's FLUX calls them.

        Args:
            inputs: Of all rows. More image tokens than those of `size` are those of context images.
            sigma: The noise level that the hooks see.
            size: Height and width of the latent.
            chunks: Number of prompts of sampling, positive and negative, whose rows follow each other.
        """
        options = {
            **self.model_options["transformer_options"],
            "sigmas": [sigma],
            "cond_or_uncond": list(range(chunks)),
        }

        def run(_x, _timestep, _context, options):
            with self._hooks(options, inputs.txt.shape[1]):
                return self.flux.observe(inputs)[0]

        for wrapper in self.wrappers:
            run = partial(wrapper, _Executor(run))
        latent = inputs.img.new_zeros(1, 16, *size)
        return run(latent, None, inputs.txt, options)

    @contextmanager
    def _hooks(self, options: dict, num_txt: int):
        """Hooks around the blocks and around attention."""
        own, current = AttentionEdit.attend, {}

        def attend(edit: AttentionEdit, q: Tensor, k: Tensor, v: Tensor):
            given, plain = current["options"], partial(own, edit)
            if self.calls_attn1:
                extra = {**given, **current["block"], "img_slice": [num_txt, q.shape[2]]}
                for patch in given.get("patches", {}).get("attn1_patch", []):
                    changed = patch(q, k, v, pe=None, attn_mask=None, extra_options=extra)
                    q, k, v = (changed.get(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
            override = given.get("optimized_attention_override")
            return override(plain, q, k, v) if override else plain(q, k, v)

        def around(block, kind: str, index: int) -> Callable:
            inner = block.run

            def run(*args, **kwargs):
                def original(args_in: dict) -> dict:
                    current["options"] = args_in["transformer_options"]
                    current["block"] = {"block_type": kind, "block_index": index}
                    given = (args_in["img"], args_in["txt"]) if kind == "double" else (args_in["img"],)
                    out = inner(*given, *args[len(given) :], **kwargs)
                    return {"img": out[0], "txt": out[1]} if kind == "double" else {"img": out[0]}

                given = {"img": args[0], "transformer_options": options}
                if kind == "double":
                    given["txt"] = args[1]
                replacement = options.get("patches_replace", {}).get("dit", {}).get((f"{kind}_block", index))
                out = replacement(given, {"original_block": original}) if replacement else original(given)
                return (out["img"], out["txt"], None) if kind == "double" else (out["img"], None)

            return run

        kinds = ("double", self.flux.double_blocks), ("single", self.flux.single_blocks)
        wrapped = [(block, kind, index) for kind, blocks in kinds for index, block in enumerate(blocks)]
        try:
            AttentionEdit.attend = attend
            for block, kind, index in wrapped:
                block.run = around(block, kind, index)
            yield
        finally:
            AttentionEdit.attend = own
            for block, _, _ in wrapped:
                del block.__dict__["run"]


class _Executor:
    """A call of the wrapped function, as a wrapper is given it."""

    class_obj = SimpleNamespace(patch_size=2)

    def __init__(self, inner: Callable):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
