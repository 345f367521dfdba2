"""Describe a folder of images, to train a LoRA on them.

    python -m flux.captions captions.json --images photos [any other field of the file]

Writes a .txt file beside each image and captions.jsonl with all of them. Texts that are there are kept.
Started again, it resumes.
"""

from typing import Any

from flux.errors import InputError, exit_on_input_error
from flux.settings.captions import CaptionSettings
from flux.settings.command_line import run
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "captions.json", **overrides: Any) -> None:
    """Describe a folder with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(CaptionSettings, file, overrides)

    from flux.captions.run import caption_folder

    report = caption_folder(settings)
    print(f"{len(report.new)} described, {len(report.texts) - len(report.new)} kept: {report.file}")
    for line in report.tokens:
        print(line)
    if report.cut:
        print(f"cut off after max_new_tokens {settings.max_new_tokens}: {', '.join(report.cut)}")
    if report.errors:
        raise InputError(
            f"Got {len(report.errors)} of {len(report.texts | report.errors)} images that could not be "
            f"described ({', '.join(report.errors)}): the lines above say why; mend them and start again"
        )


if __name__ == "__main__":
    run(main, __doc__, CaptionSettings.model_fields, positional="file")
