"""A reference image and its edits, which keep what the prompt does not change.

    python demo_4_edit.py edit.json [--seed 7] [--num_steps 30] [any other field of the file]

Writes reference.png, edit_0.png, edit_1.png, ..., comparison.png and run.json to the file's output_dir.
"""

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

    from flux.conditions.images import read_conditions, sized
    from flux.editing.edit import check_edits, edit
    from flux.editing.prepare import complete_edit, with_caption
    from flux.images.io import read_image
    from flux.loaded_model import LoadedModel, count_evaluations
    from flux.results import EditResult
    from flux.runtime.parallel import join
    from flux.settings.complete import check_run
    from flux.weights.find import local_model

    ranks = join(settings.parallel, settings.device)
    photo = read_image(settings.photo) if settings.photo else None
    conditions = read_conditions(settings)
    settings = sized(settings, conditions)
    opened = local_model(settings)
    settings, layers = complete_edit(settings, photo, opened.fingerprint() if opened else None)
    check_run(settings)
    check_edits(settings, layers, photo, conditions.mask)
    settings = with_caption(settings, photo)
    pipe = LoadedModel.load(settings, ranks, opened).steered(conditions, settings)
    with count_evaluations(pipe) as evaluations:
        made = edit(pipe, settings, layers, photo, conditions.mask)
    if ranks.rank:  # only the first process writes
        return
    result = EditResult(settings, made.reference, made.edits, pipe.timings, evaluations())
    print(result.save(settings.output_dir) / "comparison.png")


if __name__ == "__main__":
    run(main, __doc__, EditSettings.model_fields, positional="file")
