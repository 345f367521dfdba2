"""A whole scan in a row: skip every layer, score, select, report.

    python -m flux.scan scan.json [--stop_when stable] [--workers 4] [any other field of the file]

Writes what demos 2 and 3 write, and report.html, to the file's output_dir.
"""

from pathlib import Path
from typing import Any

from flux.errors import exit_on_input_error
from flux.settings.command_line import run
from flux.settings.demos import ScanSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "scan.json", **overrides: Any) -> None:
    """Run a scan with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(ScanSettings, file, overrides)

    from flux.conditions.images import read_conditions, sized
    from flux.scan.run import scan
    from flux.settings.complete import check_run, resolve

    settings = resolve(sized(settings, read_conditions(settings)))
    check_run(settings)
    vital = scan(settings)
    print(f"vital layers: {vital}\n{Path(settings.output_dir) / 'report.html'}")


if __name__ == "__main__":
    run(main, __doc__, ScanSettings.model_fields, positional="file")
