"""The steps of an image as a film."""

from typing import Any

from flux.attention.sheets import layers_sheet, words_sheet
from flux.attention.tokens import prompt_words
from flux.attention.watch import check_watch, watch
from flux.images.io import save_animation, save_image
from flux.images.sheets import grid
from flux.runs.record import about
from flux.settings.demos import LayerSettings
from flux.studio.engine import Engine, Teller
from flux.studio.forms import SAMPLING, whole
from flux.studio.limits import text_in
from flux.studio.sessions import Run
from flux.studio.state import Studio
from flux.studio.widgets import layers_on


def film_settings_of(studio: Studio, form: dict[str, Any]) -> LayerSettings:
    """What a filled form asks for. Raises InputError where it cannot be had."""
    prompt, words = text_in(form, "prompt"), text_in(form, "words")
    studio.limits.check_texts([prompt, words], 2, "texts")
    words = [word.strip() for word in words.split(",") if word.strip()]
    layers = layers_on(form["layers"], studio.spec.num_layers)
    plain = whole({name: form.get(name) for name in (*SAMPLING, "seed")})
    settings = studio.checked(LayerSettings, {**plain, "prompt": prompt, "layers": layers, "words": words})
    check_watch(settings)
    return settings


def make_film(engine: Engine, settings: LayerSettings, tell: Teller, run: Run) -> None:
    """Tells "picture", and the paths of "film", "steps" and, if layers are looked at, "layers" and "words",
    which it writes to the run's folder as demo 1 does.
    """
    [entry], pipe, size = settings.prompts, engine.pipe, (settings.width, settings.height)
    tell.begin("drawing", settings.num_steps, *size)
    steps, seen = watch(pipe, entry.prompt, entry.seed, settings, progress=False, on_step=tell.step)
    tell.begin("developing the film", len(steps))
    [final] = pipe.decode(steps[-1].latent, *size, settings.watermark)
    tell.made("picture", (engine.check(final), entry.prompt, entry.seed))
    rows: dict[str, list] = {"noisy": [], "clean": []}
    for step in steps:
        for kind, latent in (("noisy", step.noisy), ("clean", step.clean)):
            rows[kind] += pipe.decode(latent, *size)
        tell.advance()
    save_animation([*rows["clean"], final], run.folder / "film.webp", seconds_per_frame=0.25)
    tell.made("film", run.folder / "film.webp")
    titles = [*(f"step {index}, t = {step.t:.2f}" for index, step in enumerate(steps)), "end"]
    parts = [slice(start, start + 7) for start in range(0, len(titles), 7)]
    sheet = [[*rows[kind], final][part] for part in parts for kind in rows]
    captions = [titles[part] for part in parts for _ in rows]
    sheets = {"steps": grid(sheet, captions, ["noisy", "predicted clean"] * len(parts))}
    if seen:
        sheets["layers"] = layers_sheet(final, seen, pipe.spec.params.depth)
        if prompt_words(entry.prompt):
            sheets["words"] = words_sheet(final, seen, pipe.spec.params.depth)
    for name, picture in sheets.items():
        save_image(
            picture,
            run.folder / f"{name}.png",
            about(run.settings, entry.prompt, entry.seed),
        )
        tell.made(name, run.folder / f"{name}.png")
