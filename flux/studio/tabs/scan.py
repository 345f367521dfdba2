"""The page's tab that looks inside: the scan, and the film of a picture."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from flux.scan.sweep import REFERENCE, layer_sets, picture_path
from flux.settings.demos import LayerSettings, ScanSettings
from flux.studio.engine import Report
from flux.studio.forms import SAMPLING
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio
from flux.studio.tabs.common import QUIET, connect, size_slider, words_place
from flux.studio.widgets import layer_strip, news, strip_value
from flux.studio.work.film import film_settings_of, make_film
from flux.studio.work.scan import read_vitality, run_scan, scan_settings_of

PROMPT = "a cat wearing a top hat in the snow"
PROMPTS = "a dog on the grass\nan owl in the forest\na red car on the street"


class LookTab:
    """Attributes: form: the components that a film's settings are read from, by name."""

    def __init__(self, studio: Studio):
        self.studio = studio
        with gr.Tabs(elem_classes="inner"):
            with gr.Tab("Which layers matter", id="scan"):
                self.add_scan()
            with gr.Tab("Step by step", id="film"):
                self.add_film()
        self.found = gr.State(None)  # the folder of the scan that is shown

    def all_layers(self, on: Sequence[int]) -> dict:
        spec = self.studio.spec
        return strip_value(spec.num_layers, spec.params.depth, on)

    def add_scan(self) -> None:
        studio, spec = self.studio, self.studio.spec
        with gr.Row(elem_classes="room"):
            with gr.Column(elem_classes="ask", min_width=280):
                self.prompts = gr.Textbox(
                    PROMPTS,
                    label="Prompts",
                    lines=4,
                    elem_id="scan-prompts",
                    max_length=studio.limits.letters * 4,
                    info="One a line. Each is drawn whole, then with each layer bypassed.",
                )
                self.scan_words = words_place()
                with gr.Row(elem_classes="actions"):
                    self.go = gr.Button("Scan", variant="primary", elem_id="scan-go")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="scan-stop")
                gr.Markdown(
                    "Stop ends it within a step; started again, it goes on where it was.",
                    elem_classes="label",
                )
            with gr.Column(elem_classes="see"):
                self.news = gr.HTML(news(None, "Ready."), elem_id="scan-news")
                self.plot = gr.Image(
                    show_label=False,
                    label="Vitality",
                    interactive=False,
                    format="png",
                    elem_id="scan-plot",
                    elem_classes="stage paper",
                    placeholder="The vitality of each layer grows here.",
                    buttons=["fullscreen"],
                )
                self.verdict = gr.Markdown("", elem_id="scan-verdict")
                with gr.Row(elem_classes="save"):
                    self.send = gr.Button(
                        "Edit with this set", size="sm", interactive=False, elem_id="scan-send"
                    )
                    self.vital = gr.DownloadButton("vital_layers.json", size="sm", interactive=False)
                    self.report = gr.DownloadButton("report.html", size="sm", interactive=False)
                self.layer = gr.Slider(
                    0,
                    spec.num_layers - 1,
                    0,
                    step=1,
                    label="Pictures without layer",
                    visible=False,
                    elem_id="scan-layer",
                )
                self.without = gr.Gallery(
                    label="Bypassed",
                    show_label=False,
                    columns=4,
                    fit_columns=False,
                    allow_preview=True,
                    interactive=False,
                    height="auto",
                    elem_classes="results",
                    buttons=[],
                    visible=False,
                    elem_id="scan-without",
                )
            with gr.Column(elem_classes="tune", min_width=280):
                gr.Markdown("Layers to bypass, one after the other", elem_classes="label")
                self.layers = layer_strip(self.all_layers(range(spec.num_layers)), elem_id="scan-layers")
                with gr.Row(elem_classes="presets"):
                    double = range(spec.params.depth)
                    sets = {"All": range(spec.num_layers), "Double": double, "None": ()}
                    self.presets = [
                        (gr.Button(name, size="sm", min_width=60), on) for name, on in sets.items()
                    ]
                self.top = gr.Slider(
                    0,
                    spec.num_layers,
                    0,
                    step=1,
                    label="How many are vital",
                    info="0: all above the largest gap",
                )
                with gr.Accordion("Settings", open=False, elem_id="scan-settings"):
                    self.scan_form = model_form(studio)

    def add_film(self) -> None:
        studio, spec = self.studio, self.studio.spec
        with gr.Row(elem_classes="room"):
            with gr.Column(elem_classes="ask", min_width=280):
                self.prompt = gr.Textbox(
                    PROMPT,
                    label="Prompt",
                    elem_id="film-prompt",
                    lines=1,
                    max_lines=6,
                    max_length=studio.limits.letters,
                )
                self.film_words = words_place()
                with gr.Row(elem_classes="actions"):
                    self.film_go = gr.Button("Watch", variant="primary", elem_id="film-go")
                    self.film_stop = gr.Button("Stop", interactive=False, elem_id="film-stop")
            with gr.Column(elem_classes="see"):
                self.film_news = gr.HTML(news(None, "Ready."), elem_id="film-news")
                self.film = gr.Image(
                    show_label=False,
                    label="Film",
                    interactive=False,
                    elem_classes="stage",
                    elem_id="film-film",
                    placeholder="The film of the picture's steps plays here.",
                    buttons=["fullscreen"],
                )
                self.sheets = gr.Gallery(
                    label="Sheets",
                    show_label=False,
                    columns=3,
                    fit_columns=False,
                    allow_preview=True,
                    interactive=False,
                    height="auto",
                    object_fit="contain",
                    elem_classes="results",
                    buttons=["fullscreen"],
                    visible=False,
                    elem_id="film-sheets",
                )
                with gr.Row(elem_classes="save"):
                    self.gif = gr.DownloadButton("Film", size="sm", interactive=False)
                    self.record = gr.DownloadButton("run.json", size="sm", interactive=False)
            with gr.Column(elem_classes="tune", min_width=280):
                gr.Markdown("Layers whose attention is shown", elem_classes="label")
                middle = spec.params.depth + spec.params.depth_single_blocks // 2
                self.watched = layer_strip(self.all_layers([1, middle]), elem_id="film-layers")
                self.words = gr.Textbox(
                    label="Words to look at", info="With commas between them; none: every word of the prompt"
                )
                with gr.Accordion("Settings", open=False, elem_id="film-settings"):
                    self.film_form = model_form(studio)
        self.form = {"prompt": self.prompt, "layers": self.watched, "words": self.words, **self.film_form}

    def wire(self, history: Any) -> None:
        quiet = {"queue": False, **QUIET}
        names = ["prompts", "layers", "top", *self.scan_form]
        inputs = [self.prompts, self.layers, self.top, *self.scan_form.values()]

        def check(*values: Any) -> ScanSettings:
            return scan_settings_of(self.studio, dict(zip(names, values)))

        def work(visit: Visit, *values: Any) -> Iterator[tuple[Report, dict]]:
            settings = scan_settings_of(self.studio, dict(zip(names, values)))
            for report in run_scan(self.studio, visit, settings):
                yield report, self.shown(report, settings)

        outputs = [
            self.plot,
            self.verdict,
            self.send,
            self.vital,
            self.report,
            self.layer,
            self.without,
            self.found,
        ]
        buttons = ([self.go], self.stop, self.scan_words)
        connect(self.studio, [self.go.click], inputs, check, work, outputs, self.news, *buttons)
        self.layer.change(self.pictures, [self.found, self.layer], self.without, **quiet)
        for button, on in self.presets:
            button.click(lambda on=on: self.all_layers(on), None, self.layers, **quiet)
        self.wire_film(history)

    def wire_film(self, history: Any) -> None:
        def check(*values: Any) -> LayerSettings:
            return film_settings_of(self.studio, dict(zip(self.form, values)))

        def work(visit: Visit, *values: Any) -> Iterator[tuple[Report, dict]]:
            settings = film_settings_of(self.studio, dict(zip(self.form, values)))
            run = visit.begin(settings)
            sheets: list[tuple[str, str]] = []
            engine = self.studio.engine
            for report in engine.run(lambda tell: make_film(engine, settings, tell, run), visit.stop):
                shown: dict = {self.film: report.preview} if report.preview else {}
                if report.made:
                    name, thing = report.made
                    if name == "picture":
                        run.save(name, *thing)
                        self.studio.count(1)
                        shown = {self.film: thing[0], **history.shown(visit)}
                    elif name == "film":
                        shown = {
                            self.film: str(thing),
                            self.gif: gr.update(value=str(thing), interactive=True),
                        }
                        shown[self.record] = gr.update(value=str(run.record), interactive=True)
                    else:
                        sheets.append((str(thing), SHEETS[name]))
                        shown = {self.sheets: gr.update(value=sheets, visible=True)}
                yield report, shown

        outputs = [self.film, self.gif, self.record, self.sheets, *history.components]
        connect(
            self.studio,
            [self.film_go.click, self.prompt.submit],
            list(self.form.values()),
            check,
            work,
            outputs,
            self.film_news,
            [self.film_go],
            self.film_stop,
            self.film_words,
        )

    def wire_sending(self, tabs: gr.Tabs, edit: Any) -> None:
        """The set that was found goes to the Edit tab."""

        def send(folder: str) -> dict:
            scan = Path(folder) / "vital_layers.json"
            vital = json.loads(scan.read_text(encoding="utf-8"))["vital_layers"]
            return {tabs: gr.Tabs(selected="edit"), edit.layers: edit.strip(vital, read_vitality(scan))}

        self.send.click(send, self.found, [tabs, edit.layers], queue=False, **QUIET)

    def shown(self, report: Report, settings: ScanSettings) -> dict:
        """What a report of a scan changes on the page."""
        if not report.made:
            return {}
        folder = Path(settings.output_dir)
        name, thing = report.made
        if name == "vitality":
            # By its bytes: the file is drawn anew under the same name.
            return {self.plot: str(thing), self.found: str(folder)}
        first = min(layers[0] for layers in layer_sets(settings.layers, self.studio.spec.num_layers))
        scanned = (
            f"Vital: **{', '.join(map(str, thing))}**, found with {len(settings.entries)} pictures a layer."
        )
        files = {self.vital: "vital_layers.json", self.report: "report.html"}
        downloads = {
            part: gr.update(value=str(folder / file), interactive=True) for part, file in files.items()
        }
        return {
            self.verdict: scanned,
            self.send: gr.update(interactive=True),
            **downloads,
            self.layer: gr.update(visible=True, value=first),
            self.without: self.pictures(str(folder), first),
        }

    def pictures(self, folder: str | None, layer: int) -> Any:
        """Each reference beside its picture without the layer."""
        if not folder:
            return gr.skip()
        found = []
        for row, place in enumerate(sorted(Path(folder).glob("prompt_*"))):
            path = picture_path(Path(folder), row, (int(layer),))
            if path.is_file():
                found += [
                    (str(picture_path(Path(folder), row, REFERENCE)), "whole"),
                    (str(path), f"without {layer}"),
                ]
        return gr.update(visible=True, value=found)

    @property
    def returned(self) -> list[Any]:
        """What `restored` and `again` change."""
        return [*self.form.values(), self.film, self.record, self.film_news]

    def restored(self, settings: LayerSettings, about: dict) -> dict:
        """The film's form filled as for these settings."""
        [entry] = settings.prompts[:1]
        values = {name: getattr(settings, name) for name in SAMPLING}
        layers = [layer for layer in settings.layers if layer < self.studio.spec.num_layers]
        values |= {"prompt": entry.prompt, "seed": entry.seed, "words": ", ".join(settings.words)}
        values["layers"] = self.all_layers(layers)
        return {self.form[name]: value for name, value in values.items() if name in self.form}

    def again(self, run: Run, name: str) -> dict:
        film = run.folder / "film.webp"
        return {
            self.film: str(film if film.is_file() else run.pictures[name]),
            self.record: gr.update(value=str(run.record), interactive=True),
            self.film_news: news(None, "From this visit."),
        }


SHEETS = {
    "steps": "Every step",
    "layers": "Attention to the text",
    "words": "Attention of words",
}


def model_form(studio: Studio) -> dict[str, Any]:
    """Size, steps, seed and guidance, by name."""
    defaults = studio.defaults
    with gr.Row():
        width = size_slider(studio, "Width", defaults.width)
        height = size_slider(studio, "Height", defaults.height)
    with gr.Row():
        steps = gr.Slider(1, studio.limits.steps, defaults.num_steps, step=1, label="Steps")
        seed = gr.Number(3, label="Seed", precision=0, minimum=0)
    true_cfg = gr.Slider(1, 10, defaults.true_cfg, step=0.1, label="True CFG (1: off, one pass)")
    return {"width": width, "height": height, "num_steps": steps, "seed": seed, "true_cfg": true_cfg}
