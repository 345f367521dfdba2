"""The same pictures with layers bypassed: what does each layer do?

    python demo_2_skip.py skip.json [--layers "[0,5,14]"] [any other field of the file]

Writes prompt_000/reference.png, prompt_000/skip_05.png, ..., grid.png and run.json to the file's output_dir.
Stopped and started again, it goes on where it was. demo_3_dino.py reads the folder.
"""

import fire

from flux.errors import exit_on_input_error
from flux.settings.demos import SkipSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "skip.json", **overrides) -> None:
    settings = read_settings(SkipSettings, file, overrides)

    from flux.scan.sweep import sweep
    from flux.settings.complete import resolve

    print(sweep(resolve(settings)) / "grid.png")


if __name__ == "__main__":
    fire.Fire(main)
