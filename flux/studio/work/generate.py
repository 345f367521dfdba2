"""Pictures from prompts: the settings, the work, and the page's tab."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from flux.errors import InputError
from flux.images.io import crop_to_fit
from flux.settings.demos import GenerateSettings
from flux.studio.engine import Engine, Teller
from flux.studio.forms import SAMPLING, whole
from flux.studio.limits import text_in
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio

# ---- settings and work


def settings_of(studio: Studio, form: dict[str, Any]) -> GenerateSettings:
    """What a filled form asks for. Raises InputError where it cannot be had."""
    fields = whole({name: form.get(name) for name in (*SAMPLING, "seed", "count", "strength")})
    count = fields.pop("count")
    if count is None:
        count = 1
    if type(count) is not int or not 1 <= count <= studio.limits.images:
        raise InputError(f"count: expected an integer from 1 to {studio.limits.images}, got {count!r:.60}")
    prompt = text_in(form, "prompt")
    studio.limits.check_texts([prompt, text_in(form, "negative_prompt")], 2, "texts")
    return studio.checked(GenerateSettings, {**fields, "prompts": [prompt] * count})


def make(engine: Engine, settings: GenerateSettings, tell: Teller, image: Image.Image | None = None) -> None:
    """Makes and tells the pictures one by one, as demo 0 does."""
    size, steps = (settings.width, settings.height), settings.num_steps
    start = {}
    if image is not None:
        engine.check(image)
        start = {"image": crop_to_fit(image, *size), "strength": settings.strength}
        steps -= round((1 - settings.strength) * steps)
    tell.begin("drawing", steps * len(settings.prompts), *size)
    for number, entry in enumerate(settings.prompts):
        [picture] = engine.pipe.generate(
            [entry.prompt], [entry.seed], on_step=tell.step, progress=False, **start, **settings.sampling()
        )
        tell.made(f"{number:03d}", (engine.check(picture), entry.prompt, entry.seed))


def run_generate(
    studio: Studio, visit: Visit, settings: GenerateSettings, image: Image.Image | None = None
) -> Iterator[tuple[Any, Run]]:
    """Makes the pictures, and yields each report with the run whose folder they go to."""
    inputs = {"image": image} if image is not None else {}
    run = visit.begin(settings, inputs)
    work = studio.engine.run(lambda tell: make(studio.engine, settings, tell, image), visit.stop)
    for report in work:
        if report.made:
            name, (picture, prompt, seed) = report.made
            run.save(name, picture, prompt, seed)
            studio.count(1)
        yield report, run


# ---- the tab
