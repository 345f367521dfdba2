"""Which layers of a LoRA matter: the same images with its update left out in one layer after the other.

    python -m flux.lora ablate ablate.json [any field of the file]

Writes every image, ablation.json, effect.png and report.html to the file's output_dir. Started again, it
resumes.
"""

from typing import Any

from flux.settings.ablate import AblateSettings
from flux.settings.files import read_settings

POSITIONAL = "file"
FIELDS = AblateSettings.model_fields


def main(file: str = "ablate.json", **overrides: Any) -> None:
    """Ablate a LoRA with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(AblateSettings, file, overrides)

    from pathlib import Path

    from flux.lora.effects import ablate, effects_text
    from flux.settings.complete import check_run, resolve

    settings = resolve(settings)
    check_run(settings)
    print(effects_text(settings, ablate(settings)))
    print(Path(settings.output_dir) / "report.html")
