"""How much each layer matters: DINOv2 similarity of demo 2's bypassed pictures to their references.

    python demo_3_dino.py dino.json [--top 5] [--threshold 0.1] [any other field of the file]

Reads the folder that demo_2_skip.py wrote. Writes similarity.csv, vitality.png and vital_layers.json to the
file's output_dir; demo_4_edit.py takes the last as "vital_layers".
"""

from pathlib import Path

import fire

from flux.errors import exit_on_input_error
from flux.settings import DinoSettings, read_settings


@exit_on_input_error()
def main(file: str = "dino.json", **overrides) -> None:
    settings = read_settings(DinoSettings, file, overrides)

    from flux.perceptual import PerceptualEncoder

    from flux.images import plot_vitality
    from flux.pipeline import pick_device
    from flux.specs import configs, get_spec
    from flux.vitality import check_sweep, score, write_scores

    folder = Path(settings.input_dir)
    record, _ = check_sweep(folder)
    encoder = configs[settings.model].dinov2 if settings.model in configs else settings.model
    spec = get_spec(record["settings"]["model"])
    scores = score(folder, PerceptualEncoder.load(encoder, pick_device(settings.device)))

    out = Path(settings.output_dir or folder)
    layers = write_scores(out, scores, record, settings)
    plot_vitality(scores.vitality, spec.params.depth, set(layers), settings.threshold, out / "vitality.png")
    print(f"vital layers: {layers}\n{out / 'vitality.png'}")


if __name__ == "__main__":
    fire.Fire(main)
