"""The tab that scans for the vital layers."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flux.scan.layers import REFERENCE, layer_sets
from flux.scan.sweep import image_path
from flux.settings.resolved import ResolvedScan
from flux.studio.form_values import Form
from flux.studio.forms import notes_about, scan_settings
from flux.studio.progress import Update
from flux.studio.sessions import Session
from flux.studio.state import Studio
from flux.studio.strip import layer_strip, strip_value
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.edit import EditTab
from flux.studio.tabs.fields import (
    FormFields,
    add_presets,
    connect_notes,
    guidance_fields,
    size_and_seed_fields,
)
from flux.studio.tabs.runs import RunButton
from flux.studio.tabs.steering_image import SteeringImage
from flux.studio.viewer import image_alone, viewer
from flux.studio.widgets import CONCURRENT, Changes, download_button, downloadable, results
from flux.studio.words import about
from flux.studio.work.scan import Vital, read_vitality, run_scan, steered_scan

PLOT = "The vitality of each layer"
PROMPTS = "a dog on the grass\nan owl in the forest\na red car on the street"


class ScanTab:
    """The tab that scans for the vital layers."""

    def __init__(self, studio: Studio, first: Path | None = None):
        """Add the tab. `first` is the image that steers a scan at first, for models that need one."""
        self.studio, self.controls = studio, RunControls(studio, "scan")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.steering = SteeringImage(studio, "scan", first)
                prompts = gr.Textbox(
                    PROMPTS,
                    label="Prompts",
                    lines=4,
                    elem_id="scan-prompts",
                    max_length=studio.limits.letters * 4,
                    info="One per line. Each is drawn whole, then with each layer skipped.",
                )
                [self.go] = self.controls.add_buttons("Scan")
                gr.Markdown(
                    "Stop cancels the scan within a step; started again, it resumes.", elem_classes="label"
                )
            with gr.Column(elem_classes="outputs"):
                self._outputs()
            with gr.Column(elem_classes="options"):
                self.fields = {"prompts": prompts, **self.steering.fields, **self._options()}
        self.scanned = gr.State(None)  # the folder of the scan that is shown

    def _outputs(self) -> None:
        self.controls.add_status()
        self.plot = viewer("scan-plot", None, "The vitality of each layer appears here.")
        self.verdict = gr.Markdown("", elem_id="scan-verdict")
        with gr.Row(elem_classes="save"):
            self.send = gr.Button("Edit with these layers", size="sm", interactive=False, elem_id="scan-send")
            self.vital = download_button("Save vital_layers.json")
            self.report = download_button("Save report.html")
        self.layer = gr.Dropdown(label="Images without layer", visible=False, elem_id="scan-layer")
        self.skipped = results(
            "Images without the layer", "scan-skipped", object_fit="contain", zoomable=True
        )

    def _options(self) -> FormFields:
        spec = self.studio.spec
        every = range(spec.num_layers)
        gr.Markdown(about("Layers to skip, one after the other.", "layers"), elem_classes="label")
        strip = layer_strip(self._strip(every), elem_id="scan-layers")
        add_presets({"All": every, "Double": range(spec.params.depth), "None": ()}, strip, self._strip)
        top = gr.Slider(
            0,
            spec.num_layers,
            0,
            step=1,
            label="How many are vital",
            info=about("0: those above the largest gap in vitality.", "vitality"),
        )
        with gr.Accordion("Settings", open=False, elem_id="scan-settings"):
            fields = size_and_seed_fields(self.studio, seed=3)
            return {"layers": strip, "top": top, **fields, **guidance_fields(self.studio)}

    def _strip(self, on: Iterable[int]) -> dict[str, Any]:
        return strip_value(self.studio, on)

    def connect(self, tabs: gr.Tabs, edit: EditTab) -> None:
        """Connect the events; the set of layers that is found goes to the tab `edit` of `tabs`."""
        self.steering.connect(self.fields)

        def settings_of(form: Form) -> ResolvedScan:
            self.steering.check(form)
            return scan_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedScan, form: Form
        ) -> Iterator[tuple[Update[Path | Vital], Changes]]:
            settings = steered_scan(settings, self.steering.images(form))
            for update in run_scan(self.studio, session, settings):
                yield update, self._shown(update.result, settings)

        def send(folder: str) -> Changes:
            scan = Path(folder) / "vital_layers.json"
            vital = json.loads(scan.read_text(encoding="utf-8"))["vital_layers"]
            return {tabs: gr.Tabs(selected="edit"), edit.layers: edit.strip(vital, read_vitality(scan))}

        downloads = [self.send, self.vital, self.report]
        outputs = [self.plot, self.verdict, *downloads, self.layer, self.skipped, self.scanned]
        scan = RunButton(self.controls, self.fields, settings_of, work)
        scan.connect([self.go.click], outputs)
        connect_notes(self.fields, partial(notes_about, self.studio, scan_settings))
        self.layer.change(images_without, [self.scanned, self.layer], self.skipped, **CONCURRENT)
        self.send.click(send, self.scanned, [tabs, edit.layers], **CONCURRENT)

    def _shown(self, result: Path | Vital | None, settings: ResolvedScan) -> Changes:
        if result is None:
            return {}
        folder = Path(settings.output_dir)
        if isinstance(result, Path):
            return {self.plot: image_alone(result, PLOT), self.scanned: str(folder)}
        scanned = sorted(layer for [layer] in layer_sets(settings.layers, self.studio.spec.num_layers))
        layers, images = ", ".join(map(str, result.layers)), len(settings.entries)
        counted = f"{images} image{'s' * (images > 1)} per layer"
        return {
            self.verdict: f"Vital: **{layers}**, found with {counted}.",
            self.send: gr.update(interactive=True),
            self.vital: downloadable(folder / "vital_layers.json"),
            self.report: downloadable(folder / "report.html"),
            self.layer: gr.update(visible=True, choices=scanned, value=scanned[0]),
            self.skipped: images_without(str(folder), scanned[0]),
        }


def images_without(folder: str | None, layer: int) -> dict[str, Any]:
    """Show each reference of a scan beside its image without the layer."""
    if not folder:
        return gr.skip()
    images = []
    for row in range(len(list(Path(folder).glob("prompt_*")))):
        skipped = image_path(Path(folder), row, (layer,))
        if skipped.is_file():
            reference = image_path(Path(folder), row, REFERENCE)
            images += [(str(reference), "whole"), (str(skipped), f"without {layer}")]
    return gr.update(visible=True, value=images)
