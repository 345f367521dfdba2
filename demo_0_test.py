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

    from flux.files import write_json
    from flux.images.io import crop_to_fit, read_image, save_image
    from flux.images.sheets import grid
    from flux.pipeline import Pipeline, batch_name
    from flux.runs.record import image_metadata, run_record
    from flux.runtime.parallel import join
    from flux.settings.complete import check_run, resolve

    ranks = join(settings.parallel, settings.device)
    settings = resolve(settings)
    check_run(settings)
    source = read_image(settings.image) if settings.image else None
    if source:
        source = crop_to_fit(source, settings.width, settings.height)
    pipe = Pipeline.load(settings, ranks)
    folder = Path(settings.output_dir)
    images = []
    for start in range(0, len(settings.prompts), settings.batch_size):
        batch = settings.prompts[start : start + settings.batch_size]
        made = pipe.generate(
            [entry.prompt for entry in batch],
            [entry.seed for entry in batch],
            image=source,
            strength=settings.strength,
            cache=settings.cache,
            progress=batch_name(start, len(batch), len(settings.prompts)),
            **settings.sampling(),
        )
        if ranks.rank:  # only the first process writes
            continue
        for entry, image in zip(batch, made):
            record = image_metadata(settings, entry.prompt, entry.seed)
            save_image(image, folder / f"{len(images):03d}.png", record)
            images.append(image)
    if ranks.rank:
        return

    rows = [slice(start, start + 6) for start in range(0, len(images), 6)]
    captions = [entry.prompt for entry in settings.prompts]
    save_image(grid([images[row] for row in rows], [captions[row] for row in rows]), folder / "grid.png")
    write_json(folder / "run.json", run_record(settings, timings=pipe.timings))
    print(folder / "grid.png")


if __name__ == "__main__":
    run(main, __doc__, GenerateSettings.model_fields, positional="file")
