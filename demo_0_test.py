"""One image for each prompt: is everything installed, and what does the model draw?

    python demo_0_test.py test.json [--num_steps 30] [any other field of the file]

Writes 000.png, 001.png, ..., grid.png and run.json to the file's output_dir.
"""

from pathlib import Path
from typing import Any

from flux.errors import exit_on_input_error, only_rank_zero_prints
from flux.settings.command_line import run
from flux.settings.demos import GenerateSettings
from flux.settings.files import read_settings


@exit_on_input_error()
@only_rank_zero_prints()
def main(file: str = "test.json", **overrides: Any) -> None:
    """Run demo 0 with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(GenerateSettings, file, overrides)

    from flux.conditions.images import read_conditions, sized
    from flux.images.io import read_image
    from flux.loaded_model import LoadedModel
    from flux.results import write_images
    from flux.runtime.parallel import join
    from flux.sessions.batches import generate_all
    from flux.settings.complete import check_run, resolve

    ranks = join(settings.parallel, settings.device)
    conditions = read_conditions(settings)
    settings = resolve(sized(settings, conditions))
    check_run(settings)
    source = read_image(settings.image) if settings.image else None
    pipe = LoadedModel.load(settings, ranks).steered(conditions, settings)
    images = generate_all(pipe, settings, source)
    if ranks.rank:  # only the first process writes
        for _ in images:
            pass
        return
    write_images(settings, images, pipe.timings)
    print(Path(settings.output_dir) / "grid.png")


if __name__ == "__main__":
    run(main, __doc__, GenerateSettings.model_fields, positional="file")
