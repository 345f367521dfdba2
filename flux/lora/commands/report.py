"""The change that LoRA files make, layer by layer.

    python -m flux.lora report x.safetensors [y.safetensors ...] [--base MODEL] [--output FOLDER]

Needs no GPU, and no weights of a model. With an output folder, report.html and report.json are written too.
"""

from typing import Annotated

from pydantic import Field

from flux.settings.fields import FilePath

POSITIONAL = "files"


def main(
    files: Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)],
    base: FilePath | None = None,
    output: FilePath | None = None,
) -> None:
    """Print a report on LoRA files.

    Args:
        files: LoRA files for one model
        base: file or folder of their transformer: sizes are then relative to its weights
        output: folder to write report.html and report.json to
    """
    from flux.files import check_folder
    from flux.lora.report import look_into, report_text, write_report

    if output is not None:
        check_folder(output)
    reports = look_into(files, base, progress=base is not None)
    print(report_text(reports))
    if output is not None:
        print(write_report(output, reports))
