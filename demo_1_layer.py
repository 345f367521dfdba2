"""A picture's way from noise: what each step holds, and the clean picture that it points at.

    python demo_1_layer.py layer.json [--layers "[1,3,6]"] [--words '["dog"]'] [any other field of the file]

Writes step_00_noisy.png, step_00_clean.png, ..., steps.png, steps.gif and run.json to the file's output_dir;
with several prompts, each into a folder prompt_000, prompt_001, ... of its own. With layers, also what these
attend to: layers.png (image tokens to text, layer by step) and words.png (each word and the image, by layer).
"""

from pathlib import Path

import fire

from flux.errors import exit_on_input_error, one_voice
from flux.settings.demos import LayerSettings
from flux.settings.files import read_settings


@exit_on_input_error()
@one_voice()
def main(file: str = "layer.json", **overrides) -> None:
    settings = read_settings(LayerSettings, file, overrides)

    from flux.attention.sheets import layers_sheet, words_sheet
    from flux.attention.tokens import prompt_words
    from flux.attention.watch import check_watch, watch
    from flux.files import write_json
    from flux.images.io import save_animation, save_image
    from flux.images.sheets import grid
    from flux.pipeline import Pipeline
    from flux.runs.record import about, run_record
    from flux.runtime.parallel import join
    from flux.settings.complete import complete

    ranks = join(settings)
    settings = complete(settings)
    check_watch(settings)
    pipe = Pipeline.load(settings, ranks)
    out = Path(settings.output_dir)
    for number, entry in enumerate(settings.prompts):
        folder = out if len(settings.prompts) == 1 else out / f"prompt_{number:03d}"
        record = about(settings, entry.prompt, entry.seed)
        size = (settings.width, settings.height)
        steps, seen = watch(pipe, entry.prompt, entry.seed, settings)
        if ranks.rank:  # Of several processes the first one writes.
            continue
        [final] = pipe.decode(steps[-1].latent, *size, settings.watermark)
        rows = {"noisy": [], "clean": []}
        for index, step in enumerate(steps):
            for kind, latent in (("noisy", step.noisy), ("clean", step.clean)):
                [picture] = pipe.decode(latent, *size)
                save_image(picture, folder / f"step_{index:02d}_{kind}.png", record)
                rows[kind].append(picture)
        titles = [*(f"step {index}, t = {step.t:.2f}" for index, step in enumerate(steps)), "end"]
        columns = [slice(start, start + 7) for start in range(0, len(titles), 7)]
        sheet = [[*rows[kind], final][part] for part in columns for kind in rows]
        captions = [titles[part] for part in columns for _ in rows]
        save_image(grid(sheet, captions, ["noisy", "predicted clean"] * len(columns)), folder / "steps.png")
        save_animation([*rows["clean"], final], folder / "steps.gif", seconds_per_frame=0.25)
        print(folder / "steps.png")
        if seen:
            num_double = pipe.spec.params.depth
            save_image(layers_sheet(final, seen, num_double), folder / "layers.png", record)
            print(folder / "layers.png")
            if prompt_words(entry.prompt):
                save_image(words_sheet(final, seen, num_double), folder / "words.png", record)
                print(folder / "words.png")
    if ranks.rank:
        return
    write_json(out / "run.json", run_record(settings, timings=pipe.timings))


if __name__ == "__main__":
    fire.Fire(main)
