"""A picture's way from noise: what each step holds, and the clean picture that it points at.

    python demo_1_layer.py layer.json [--seed 7] [any other field of the file]

Writes step_00_noisy.png, step_00_clean.png, ..., steps.png, steps.gif and run.json to the file's output_dir;
with several prompts, each into a folder prompt_000, prompt_001, ... of its own.
"""

from pathlib import Path

import fire

from flux.errors import exit_on_input_error
from flux.settings import LayerSettings, read_settings


@exit_on_input_error()
def main(file: str = "layer.json", **overrides) -> None:
    settings = read_settings(LayerSettings, file, overrides)

    from flux.images import grid, save_animation, save_image, write_json
    from flux.pipeline import Pipeline
    from flux.record import about, run_record
    from flux.specs import complete

    settings = complete(settings)
    pipe = Pipeline.load(settings)
    out = Path(settings.output_dir)
    for number, entry in enumerate(settings.prompts):
        folder = out if len(settings.prompts) == 1 else out / f"prompt_{number:03d}"
        steps = []
        [final] = pipe.generate([entry.prompt], [entry.seed], on_step=steps.append, **settings.sampling())
        rows = {"noisy": [], "clean": []}
        for index, step in enumerate(steps):
            for kind, latent in (("noisy", step.noisy), ("clean", step.clean)):
                [picture] = pipe.decode(latent, settings.width, settings.height)
                save_image(
                    picture,
                    folder / f"step_{index:02d}_{kind}.png",
                    about(settings, entry.prompt, entry.seed),
                )
                rows[kind].append(picture)
        titles = [f"step {index}, t = {step.t:.2f}" for index, step in enumerate(steps)]
        sheet = grid(
            [[*row, final] for row in rows.values()], [[*titles, "end"]] * 2, ["noisy", "predicted clean"]
        )
        save_image(sheet, folder / "steps.png")
        save_animation([*rows["clean"], final], folder / "steps.gif", seconds_per_frame=0.25)
        print(folder / "steps.png")
    write_json(out / "run.json", run_record(settings, timings=pipe.timings))


if __name__ == "__main__":
    fire.Fire(main)
