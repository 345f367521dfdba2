"""The tab that generates images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from flux.settings.demos import GenerateSettings
from flux.studio.engine import Report
from flux.studio.forms import SAMPLING
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio
from flux.studio.tabs.common import QUIET, connect, fill, guidance_slider, size_slider, words_place
from flux.studio.widgets import held_picture, news, picture_input
from flux.studio.work.generate import run_generate, settings_of

EXAMPLES = {
    "flux-nano": [
        ("a dog wearing a top hat on the grass", 7),
        ("an owl in the forest", 4),
        ("a red car on the street", 3),
        ("a penguin in front of mountains", 5),
    ],
    "": [
        ("a red fox curled up asleep on mossy roots in an old beech wood, soft light after rain", 1001),
        ("a lone lighthouse on black basalt cliffs with a storm rolling in, long exposure", 1003),
        ("a steam locomotive crossing a stone viaduct in autumn woodland, aerial photograph", 1021),
    ],
}


class GenerateTab:
    """Attributes: form: the components that a run's settings are read from, by name."""

    def __init__(self, studio: Studio):
        self.studio = studio
        defaults, limits = studio.defaults, studio.limits
        with gr.Row(elem_classes="room"):
            with gr.Column(elem_classes="ask", min_width=280):
                self.prompt = gr.Textbox(
                    label="Prompt",
                    lines=1,
                    max_lines=6,
                    max_length=limits.letters,
                    autofocus=True,
                    placeholder="What should the picture show?",
                    elem_id="generate-prompt",
                    info="Enter draws it.",
                )
                self.words = words_place()
                with gr.Row(elem_classes="actions"):
                    self.go = gr.Button("Draw", variant="primary", elem_id="generate-go")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="generate-stop")
                self.samples = EXAMPLES.get(defaults.model, EXAMPLES[""])
                self.examples = gr.Dataset(
                    components=[gr.Textbox(visible=False), gr.Number(visible=False)],
                    samples=[list(pair) for pair in self.samples],
                    sample_labels=[prompt for prompt, _ in self.samples],
                    label="For example",
                    elem_classes="examples",
                )
            with gr.Column(elem_classes="see"):
                self.news = gr.HTML(news(None, "Ready."), elem_id="generate-news")
                self.picture = gr.Image(
                    label="Picture",
                    show_label=False,
                    interactive=False,
                    format="png",
                    elem_id="generate-picture",
                    elem_classes="stage",
                    placeholder="Your picture appears here.",
                    buttons=["fullscreen"],
                )
                with gr.Row(elem_classes="save"):
                    self.png = gr.DownloadButton("Picture", size="sm", interactive=False)
                    self.record = gr.DownloadButton("run.json", size="sm", interactive=False)
            with gr.Column(elem_classes="tune", min_width=280):
                with gr.Accordion("Settings", open=False, elem_id="generate-settings"):
                    with gr.Row():
                        self.width = size_slider(studio, "Width", defaults.width)
                        self.height = size_slider(studio, "Height", defaults.height)
                    self.steps = gr.Slider(1, limits.steps, defaults.num_steps, step=1, label="Steps")
                    with gr.Row():
                        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                        self.count = gr.Slider(1, limits.images, 1, step=1, label="Pictures")
                    self.fresh = gr.Checkbox(False, label="A new seed each time")
                    self.guidance = guidance_slider(studio)
                    self.true_cfg = gr.Slider(
                        1, 10, defaults.true_cfg, step=0.1, label="True CFG (1: off, one pass)"
                    )
                    self.negative = gr.Textbox(
                        label="Negative prompt",
                        info="What true CFG leads away from",
                        max_length=limits.letters,
                    )
                with gr.Accordion("Start from a picture", open=False, elem_id="generate-start"):
                    self.place, self.image = picture_input(studio, label="Picture", elem_id="generate-image")
                    self.strength = gr.Slider(
                        0.05, 1, 0.8, step=0.05, label="Strength", info="1 keeps nothing of the picture"
                    )
        self.form: dict[str, Any] = {
            "prompt": self.prompt,
            "width": self.width,
            "height": self.height,
            "num_steps": self.steps,
            "seed": self.seed,
            "count": self.count,
            "guidance": self.guidance,
            "true_cfg": self.true_cfg,
            "negative_prompt": self.negative,
            "image": self.image,
            "strength": self.strength,
        }

    def wire(self, history: Any) -> None:
        """What happens on a click; `history` is told of each new picture."""

        def check(*values: Any) -> GenerateSettings:
            return settings_of(self.studio, dict(zip(self.form, values)))

        def work(visit: Visit, *values: Any) -> Iterator[tuple[Any, dict]]:
            form = dict(zip(self.form, values))
            settings = settings_of(self.studio, form)
            image = held_picture(form["image"])
            for report, run in run_generate(self.studio, visit, settings, image):
                yield report, self.shown(report, run, history, visit)

        outputs = [self.picture, self.png, self.record, *history.components]
        connect(
            self.studio,
            [self.go.click, self.prompt.submit],
            list(self.form.values()),
            check,
            work,
            outputs,
            self.news,
            [self.go],
            self.stop,
            self.words,
            seed=(self.fresh, self.seed),
        )
        self.examples.click(
            None,
            self.examples,
            [self.prompt, self.seed, self.fresh],
            js=fill(self.samples, False),
            queue=False,
            **QUIET,
        )

    def shown(self, report: Report, run: Run, history: Any, visit: Visit) -> dict:
        """What a report changes on the page."""
        if report.made:
            name, (picture, *_) = report.made
            return {self.picture: picture, **self.saved(run, run.pictures[name]), **history.shown(visit)}
        return {self.picture: report.preview} if report.preview else {}

    def saved(self, run: Run, path: Path) -> dict:
        """The downloads of a picture of that run."""
        return {
            self.png: gr.update(value=str(path), interactive=True),
            self.record: gr.update(value=str(run.record), interactive=True),
        }

    def restored(self, settings: GenerateSettings, about: dict[str, Any], image: Path | None = None) -> dict:
        """The form filled as for the picture that `about` speaks of."""
        first = settings.prompts[0]
        values = {name: getattr(settings, name) for name in SAMPLING}
        values |= {"prompt": about.get("prompt", first.prompt), "seed": about.get("seed", first.seed)}
        values |= {"count": 1 if "prompt" in about else len(settings.prompts), "strength": settings.strength}
        values["image"] = image and str(image)
        return {
            self.fresh: False,
            self.place: values["image"],
            **{self.form[name]: value for name, value in values.items()},
        }

    @property
    def returned(self) -> list[Any]:
        """What `restored` and `again` change."""
        return [self.fresh, self.place, *self.form.values(), self.picture, self.png, self.record, self.news]

    def again(self, run: Run, name: str) -> dict:
        """A picture of this visit shown once more."""
        path = run.pictures[name]
        return {self.picture: str(path), self.news: news(None, "From this visit."), **self.saved(run, path)}
