"""The same images with layers skipped: what does each layer do?

    python demo_2_skip.py skip.json [--layers "[0,5,14]"] [any other field of the file]

Writes prompt_000/reference.png, prompt_000/skip_05.png, ..., grid.png and run.json to the file's output_dir.
Stopped and started again, it resumes. demo_3_dino.py reads the folder.
"""

from typing import Any

from flux.errors import exit_on_input_error
from flux.settings.command_line import run
from flux.settings.demos import SkipSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "skip.json", **overrides: Any) -> None:
    """Run demo 2 with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(SkipSettings, file, overrides)

    from flux.conditions.images import read_conditions, sized
    from flux.scan.sweep import sweep
    from flux.settings.complete import check_run, resolve

    settings = resolve(sized(settings, read_conditions(settings)))
    check_run(settings)
    print(sweep(settings) / "grid.png")


if __name__ == "__main__":
    run(main, __doc__, SkipSettings.model_fields, positional="file")
