"""A whole scan in a row: bypass every layer, score, select, report.

    python -m flux.scan scan.json [--stop_when stable] [--workers 4] [any other field of the file]

Writes what demos 2 and 3 write, and report.html, to the file's output_dir.
"""

from pathlib import Path

from flux.errors import exit_on_input_error
from flux.scan.run import scan
from flux.settings.demos import ScanSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "scan.json", **overrides) -> None:
    from flux.settings.complete import resolve

    settings = resolve(read_settings(ScanSettings, file, overrides))
    vital = scan(settings)
    print(f"vital layers: {vital}\n{Path(settings.output_dir) / 'report.html'}")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
