"""The folder of an evaluation."""

import pytest
from helpers.evaluation import SIDE, settings_of

from flux.errors import InputError
from flux.evaluate.benchmark import read_benchmark, write_benchmark
from flux.evaluate.resolve import resolve_evaluation
from flux.evaluate.run import evaluate
from flux.evaluate.store import Store
from flux.images.io import save_image


def test_another_benchmark_is_refused(benchmark, tmp_path, painting):
    settings = settings_of(benchmark, tmp_path / "out")
    evaluate(settings, progress=False)
    other = tmp_path / "other"
    [item, *_] = read_benchmark(benchmark)
    save_image(item.photo(SIDE, SIDE), other / "annotation_images" / "one.png")
    entry = {"image_path": "one.png", "original_prompt": "", "editing_prompt": "", "mask": []}
    write_benchmark(other, [("000", entry)])
    with pytest.raises(InputError, match="another edits"):
        Store(resolve_evaluation(settings.model_copy(update={"benchmark": str(other)})))
