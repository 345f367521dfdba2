"""Train a LoRA on a folder of images.

    python -m flux.lora train train.json [--images FOLDER] [any other field of the file]

Writes the LoRA, samples and curves to the file's output_dir. Started again, it resumes.
"""

from typing import Any

from flux.errors import only_rank_zero_prints
from flux.settings.files import read_settings
from flux.settings.train import TrainSettings

POSITIONAL = "file"
FIELDS = TrainSettings.model_fields


@only_rank_zero_prints()
def main(file: str = "train.json", **overrides: Any) -> None:
    """Train with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(TrainSettings, file, overrides)

    from flux.lora.train import train

    print(train(settings))
