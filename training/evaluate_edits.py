"""Compares editing methods on flux-nano's benchmark, with a judge that tells which edits succeed.

    python -m training.evaluate_edits evaluate.json [--judge measuring.pt] [any other field of the file]

Writes what `python -m flux.evaluate` writes, with the judge's verdicts in further columns. Unless another
judge is named, it is the one in this folder.
"""

from typing import Any

from flux.errors import exit_on_input_error
from flux.evaluate.settings import EvaluateSettings
from flux.settings.command_line import run
from flux.settings.files import read_settings
from training.judge import SHIPPED, MeasuringJudge


def load_judge(settings: EvaluateSettings) -> MeasuringJudge:
    """Load the judge that the settings name.

    Raises:
        InputError: the file is missing or holds something else.
    """
    from flux.runtime.devices import pick_device

    return MeasuringJudge.load(settings.judge or SHIPPED, pick_device(settings.device))


@exit_on_input_error()
def main(file: str = "evaluate.json", **overrides: Any) -> None:
    """Run a comparison with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(EvaluateSettings, file, overrides)
    if settings.judge is None:
        settings = settings.model_copy(update={"judge": str(SHIPPED)})
    judge = load_judge(settings)

    from flux.evaluate.run import evaluate

    folder = evaluate(settings, judge=judge)
    print((folder / "summary.md").read_text(encoding="utf-8"))
    print(folder / "summary.md")


if __name__ == "__main__":
    run(main, __doc__ or "", EvaluateSettings.model_fields, positional="file")
