"""How much each layer matters: DINOv2 similarity of demo 2's images to their references.

    python demo_3_dino.py dino.json [--top 5] [--threshold 0.1] [any other field of the file]

Reads the folder that demo_2_skip.py wrote. Writes similarity.csv, vitality.png, heat_map.png, report.html and
vital_layers.json to the file's output_dir. demo_4_edit.py reads the last one as "vital_layers".
"""

from pathlib import Path
from typing import Any

from flux.errors import exit_on_input_error
from flux.settings.command_line import run
from flux.settings.demos import DinoSettings
from flux.settings.files import read_settings


@exit_on_input_error()
def main(file: str = "dino.json", **overrides: Any) -> None:
    """Run demo 3 with the settings of a JSON file.

    Args:
        file: JSON file of settings, looked for as given, then in configs/
        overrides: fields of the settings, in place of those of the file
    """
    settings = read_settings(DinoSettings, file, overrides)

    from flux.files import claim_folder
    from flux.metrics.table import load_metrics
    from flux.runtime.devices import pick_device
    from flux.scan.publish import publish
    from flux.scan.scores import Rule
    from flux.scan.similarity import score
    from flux.scan.sweep import read_sweep
    from flux.specs import encoder_of

    folder = Path(settings.input_dir)
    out = Path(settings.output_dir or folder)
    read_sweep(folder)  # an unfinished one is refused before a model loads
    claim_folder(out)
    sources = {"dino": encoder_of(settings.model)}
    scores = score(folder, load_metrics(settings.metrics, sources, pick_device(settings.device)))
    vital = publish(folder, out, scores, Rule.of(settings), sources)
    print(f"vital layers: {vital}\n{out / 'report.html'}")


if __name__ == "__main__":
    run(main, __doc__, DinoSettings.model_fields, positional="file")
