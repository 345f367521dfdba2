"""Show one image's way from noise: each step's noisy latent, and the clean image that it predicts.

    python demo_1_layer.py layer.json [--layers "[1,3,6]"] [--words '["dog"]'] [any other field of the file]

Writes step_00_noisy.png, step_00_clean.png, ..., steps.png, steps.gif and run.json to the file's output_dir,
or with several prompts into one folder each: prompt_000, prompt_001, ... With layers, it also writes what
these attend to: layers.png (image tokens to text, layer by step) and words.png (each word and the image, by
layer).
"""

from collections.abc import Iterator
from typing import Any

from flux.errors import exit_on_input_error, only_rank_zero_prints
from flux.settings.command_line import run
from flux.settings.demos import LayerSettings
from flux.settings.files import read_settings


@exit_on_input_error()
@only_rank_zero_prints()
def main(file: str = "layer.json", **overrides: Any) -> None:
    """Run demo 1 with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(LayerSettings, file, overrides)

    from flux.attention.film import Film
    from flux.attention.watch import check_watch, watch
    from flux.conditions.images import read_conditions, sized
    from flux.loaded_model import LoadedModel
    from flux.results import write_films
    from flux.runtime.parallel import join
    from flux.settings.complete import check_run, resolve

    ranks = join(settings.parallel, settings.device)
    conditions = read_conditions(settings)
    settings = resolve(sized(settings, conditions))
    check_run(settings)
    check_watch(settings)
    pipe = LoadedModel.load(settings, ranks).steered(conditions, settings)

    def films() -> Iterator[Film]:
        for entry in settings.prompts:
            steps, attention = watch(pipe, entry.prompt, entry.seed, settings)
            if ranks.rank == 0:  # only the first process writes
                [final] = pipe.decode(steps[-1].latent, settings.width, settings.height, settings.watermark)
                yield Film.of(pipe, entry.prompt, steps, attention, final)

    if ranks.rank:
        list(films())
        return
    print(*write_films(settings, films(), pipe.timings), sep="\n")


if __name__ == "__main__":
    run(main, __doc__, LayerSettings.model_fields, positional="file")
