"""Compare editing methods on a benchmark.

    python -m flux.evaluate evaluate.json [--count 60] [any other field of the file]

Writes results.csv, summary.md, summary.csv, sheet.png and the edits to the file's output_dir. Started again,
it resumes; methods that the file has gained are added.
"""

from typing import Any

from flux.errors import exit_on_input_error
from flux.evaluate.settings import EvaluateSettings
from flux.settings.command_line import run
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "evaluate.json", **overrides: Any) -> None:
    """Run a comparison with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(EvaluateSettings, file, overrides)

    from flux.evaluate.run import evaluate

    folder = evaluate(settings)
    print((folder / "summary.md").read_text(encoding="utf-8"))
    print(folder / "summary.md")


if __name__ == "__main__":
    run(main, __doc__, EvaluateSettings.model_fields, positional="file")
