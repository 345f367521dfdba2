"""The five nodes. Each holds no state: it returns a changed copy of what it is given."""

from collections.abc import Iterator
from pathlib import Path

import torch
from comfy_api.latest import ComfyExtension, io

from . import scan
from .injection import Window, add_injection, add_skip, count_blocks, hold_rows
from .layers import PRESETS, parse_layers, read_vital_layers, scan_record
from .prompts import encode_rows, read_prompts, repeat_latent

CATEGORY = "Stable Flow"
VitalLayersType = io.Custom("VITAL_LAYERS")
LAYERS = 'Numbers and ranges: "0, 1, 17-19". Double-stream first.'


def percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    """An input for a fraction of the sampling."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class VitalLayers(io.ComfyNode):
    """Chooses the layers to inject in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="StableFlowVitalLayers",
            display_name="Vital Layers",
            category=CATEGORY,
            description="The layers that an edit injects in: a published set, a list, or a scan's file.",
            inputs=[
                io.Combo.Input("preset", options=list(PRESETS), default=next(iter(PRESETS))),
                io.String.Input("layers", default="", tooltip=f"If not empty, these. {LAYERS}"),
                io.String.Input("file", default="", tooltip="If not empty, the path of a vital_layers.json."),
            ],
            outputs=[VitalLayersType.Output(display_name="layers")],
        )

    @classmethod
    def execute(cls, preset: str, layers: str, file: str) -> io.NodeOutput:
        """Return global layer numbers. `layers` and `file` cannot both be given."""
        if layers.strip() and file.strip():
            raise ValueError("Got layers and a file: give one of them")
        if file.strip():
            return io.NodeOutput(read_vital_layers(Path(file.strip()).expanduser()))
        return io.NodeOutput(parse_layers(layers) or PRESETS[preset])


class StableFlowPrompts(io.ComfyNode):
    """Makes one batch of a reference and its edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="StableFlowPrompts",
            display_name="Stable Flow Prompts",
            category=CATEGORY,
            description="A reference and its edits as rows of one batch, all from the same noise.",
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("reference", multiline=True, tooltip="The prompt of the image to edit."),
                io.String.Input("edits", multiline=True, tooltip="One prompt a line, for the whole image."),
                io.Latent.Input("latent", tooltip="An empty latent, or a photograph's. One row."),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1),
            ],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Latent.Output()],
        )

    @classmethod
    def execute(cls, clip, reference: str, edits: str, latent: dict, guidance: float) -> io.NodeOutput:
        """Return the conditioning, a row for each prompt, and the latent, repeated."""
        prompts = [reference.strip(), *read_prompts(edits)]
        return io.NodeOutput(encode_rows(clip, prompts, guidance), repeat_latent(latent, len(prompts)))


class StableFlowEdit(io.ComfyNode):
    """Injects the reference's keys and values in the edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="StableFlowEdit",
            display_name="Stable Flow Edit",
            category=CATEGORY,
            description="The rows after the first take the first row's keys and values in the vital layers.",
            inputs=[
                io.Model.Input("model"),
                VitalLayersType.Input("layers"),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.01),
                percent("start_percent", 0.0, "Where in the sampling the injection starts."),
                percent("end_percent", 0.25, "Where it ends. 1 is the paper's."),
                io.Mask.Input("mask", optional=True, tooltip="White may change, the rest stays."),
                io.Latent.Input("photograph", optional=True, tooltip="The latent of a photograph to edit."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        layers,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask=None,
        photograph=None,
    ) -> io.NodeOutput:
        """Return a copy of the model that edits."""
        model = model.clone()
        add_injection(model, layers, strength, Window.of(model, start_percent, end_percent))
        if mask is None and photograph is None:
            return io.NodeOutput(model)
        source = None
        if photograph is not None:
            source = model.model.process_latent_in(photograph["samples"][:1])
        if mask is not None:
            mask = mask.reshape(-1, 1, *mask.shape[-2:])[:1]
            if not bool((mask > 0).any()):
                raise ValueError("Got a mask without white: paint what the edit may change")
        hold_rows(model, source, mask)
        return io.NodeOutput(model)


class SkipLayers(io.ComfyNode):
    """Skips layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="StableFlowSkipLayers",
            display_name="Skip Layers",
            category=CATEGORY,
            description="Layers that are not computed: each passes on what it was given.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("layers", default="0", tooltip=LAYERS),
                percent("start_percent", 0.0, "Where in the sampling the layers are skipped first."),
                percent("end_percent", 1.0, "Where they are computed again."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, layers: str, start_percent: float, end_percent: float) -> io.NodeOutput:
        """Return a copy of the model that skips the layers."""
        chosen, model = parse_layers(layers), model.clone()
        if not chosen:
            raise ValueError('Got no layers to skip: write numbers and ranges, such as "0, 1, 17-19"')
        add_skip(model, chosen, Window.of(model, start_percent, end_percent))
        return io.NodeOutput(model)


class LayerScan(io.ComfyNode):
    """Finds the vital layers of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="StableFlowLayerScan",
            display_name="Layer Scan",
            category=CATEGORY,
            description="Skips each layer in turn; scores with DINOv2 how much the images change.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.String.Input("prompts", multiline=True, tooltip="One prompt a line. The paper takes 64."),
                io.Latent.Input("latent", tooltip="An empty latent, one row: the size of the images."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Int.Input("steps", default=15, min=1, max=100),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1),
                io.Int.Input("top", default=10, min=1, max=200, tooltip="How many layers are vital."),
                io.String.Input("dinov2", default="facebook/dinov2-base", tooltip="Hub id or folder."),
                io.String.Input("model_name", default="flux-dev", tooltip="Stands in the file."),
                io.String.Input("file", default="vital_layers.json", tooltip="Path, or a name in output/."),
            ],
            outputs=[
                VitalLayersType.Output(display_name="layers"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="file"),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, latent, seed, steps, guidance, top, dinov2, model_name, file
    ) -> io.NodeOutput:
        """Scan, write the file, and return the layers, the chart and the file's path."""
        import comfy.model_management
        import comfy.sample
        import comfy.utils
        import folder_paths

        blocks = count_blocks(model)
        if top > sum(blocks):
            raise ValueError(f"Got top {top}, but this model has {sum(blocks)} layers")
        # A path that is absolute stays as it is.
        path = Path(folder_paths.get_output_directory()) / Path(file.strip()).expanduser()
        scan.check_writable(path)
        texts = read_prompts(prompts)
        positives = [encode_rows(clip, [text], guidance) for text in texts]
        samples = comfy.sample.fix_empty_latent_channels(model, repeat_latent(latent, 1)["samples"])
        noises = [comfy.sample.prepare_noise(samples, seed + row) for row in range(len(texts))]
        score = scan.DinoScore(dinov2, comfy.model_management.get_torch_device())
        progress = comfy.utils.ProgressBar(len(texts) * (1 + sum(blocks)))

        def render(layer: int | None) -> Iterator[torch.Tensor]:
            patched = model.clone()
            if layer is not None:
                add_skip(patched, (layer,), Window.of(patched, 0.0, 1.0))
            for positive, noise in zip(positives, noises, strict=True):
                more = {"disable_pbar": True, "seed": seed}
                names = 1.0, "euler", "simple"
                yield vae.decode(
                    comfy.sample.sample(patched, noise, steps, *names, positive, positive, samples, **more)
                )
                progress.update(1)

        vitality = scan.measure(render, score.features, range(sum(blocks)))
        vital = scan.most_vital(vitality, top)
        size = {"width": 8 * samples.shape[-1], "height": 8 * samples.shape[-2]}
        rule = {"metric": dinov2, "top": top}
        protocol = {"prompts": texts, "seed": seed, "num_steps": steps, "guidance": guidance, "layers": "all"}
        scan.write_scan(path, scan_record(model_name, *blocks, vitality, vital, rule, protocol | size))
        return io.NodeOutput(vital, scan.bar_chart(vitality, blocks[0], vital), str(path))


class StableFlowExtension(ComfyExtension):
    """Lists the nodes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of this pack."""
        return [VitalLayers, StableFlowPrompts, StableFlowEdit, SkipLayers, LayerScan]
