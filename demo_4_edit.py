"""A reference image and its edits, which keep what the prompt does not change.

    python demo_4_edit.py edit.json [--seed 7] [--num_steps 30] [any other field of the file]

Writes reference.png, edit_0.png, edit_1.png, ..., comparison.png and run.json to the file's output_dir.
"""

from pathlib import Path
from typing import Any

from flux.errors import exit_on_input_error, only_rank_zero_prints
from flux.settings.command_line import run
from flux.settings.edits import EditSettings
from flux.settings.files import read_settings


@exit_on_input_error()
@only_rank_zero_prints()
def main(file: str = "edit.json", **overrides: Any) -> None:
    """Run demo 4 with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(EditSettings, file, overrides)

    from flux.editing.caption import describe_image
    from flux.editing.edit import check_edits, edit
    from flux.editing.photo import Photograph, natural_size
    from flux.files import write_json
    from flux.images.io import read_image, save_image
    from flux.images.sheets import grid
    from flux.metrics.pixels import psnr_or_none
    from flux.pipeline import Pipeline, count_evaluations
    from flux.runs.record import image_metadata, run_record
    from flux.runtime.devices import pick_device
    from flux.runtime.parallel import join
    from flux.settings.complete import check_run, resolve
    from flux.specs import get_spec
    from flux.vital_layers import find_vital_layers
    from flux.weights.find import local_model

    ranks = join(settings.parallel, settings.device)
    spec = get_spec(settings.model)
    photo = read_image(settings.photo) if settings.photo else None
    if photo and settings.width is None and settings.height is None:
        width, height = natural_size(photo, spec.size)
        settings = settings.model_copy(update={"width": width, "height": height})
    settings = resolve(settings)
    opened = local_model(settings)
    checkpoint = opened.fingerprint() if opened else None
    layers = find_vital_layers(settings.vital_layers, spec, checkpoint)
    # run.json repeats this run even after "auto" has come to mean other layers.
    settings = settings.model_copy(update={"vital_layers": layers})
    check_run(settings)
    check_edits(settings, layers, photo)
    if photo:
        part = Photograph.of(photo, settings.width, settings.height).part
        if settings.prompt is None and settings.caption_model:
            prompt = describe_image(part, settings.caption_model, str(pick_device(settings.device)))
            settings = settings.model_copy(update={"prompt": prompt})
    pipe = Pipeline.load(settings, ranks, opened)
    with count_evaluations(pipe) as evaluations:
        made = edit(pipe, settings, layers, photo)

    if ranks.rank:  # only the first process writes
        return
    folder, entries = Path(settings.output_dir), settings.entries
    prompts = [settings.prompt, *(entry.prompt for entry in entries)]
    images = [made.reference, *made.edits]
    names = ["reference.png", *(f"edit_{i}.png" for i in range(len(made.edits)))]
    for name, prompt, image in zip(names, prompts, images):
        save_image(image, folder / name, image_metadata(settings, prompt, settings.seed, layers=layers))
    save_image(grid([images], [prompts]), folder / "comparison.png")
    scores = [{"psnr_to_reference": psnr_or_none(made.reference, image)} for image in made.edits]
    cost = {"timings": pipe.timings, "evaluations": evaluations()}
    write_json(folder / "run.json", run_record(settings, layers=layers, scores=scores, **cost))
    print(folder / "comparison.png")


if __name__ == "__main__":
    run(main, __doc__, EditSettings.model_fields, positional="file")
