"""Methods of editing compared on a benchmark.

    python -m flux.evaluate evaluate.json [--count 60] [--judge measuring.pt] [any other field of the file]

Writes results.csv, summary.md, summary.csv, sheet.png and the edits to the file's output_dir, and goes on
where it was if it is started again. Methods that the file gains are added to what is there.
"""

from flux.errors import exit_on_input_error
from flux.evaluate.settings import EvaluateSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "evaluate.json", **overrides) -> None:
    settings = read_settings(EvaluateSettings, file, overrides)

    from flux.evaluate.run import evaluate

    folder = evaluate(settings)
    print((folder / "summary.md").read_text(encoding="utf-8"))
    print(folder / "summary.md")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
