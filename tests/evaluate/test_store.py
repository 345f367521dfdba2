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
    entry = {"image_path": "one.png", "original_prompt": "a dog", "editing_prompt": "a cat", "mask": []}
    write_benchmark(other, [("000", entry)])
    with pytest.raises(InputError, match="differs in edits"):
        Store(resolve_evaluation(settings.model_copy(update={"benchmark": str(other)})))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("psnr", "decibels", 1), "it has no column psnr"),
        (lambda text: "junk" + text, "it has no column item"),
        (lambda text: text[: text.rindex(",")], "too many or too few fields"),
        (lambda text: text + "000,add,default,1\n", "too many or too few fields"),
        (lambda text: text.replace("100.0", "much", 1), "could not convert"),
        (lambda text: "\xe9" + text, "can't decode"),  # not UTF-8
    ],
)
def test_damaged_results_are_named_and_stay(benchmark, tmp_path, painting, damage, message):
    settings = settings_of(benchmark, tmp_path)
    file = evaluate(settings, progress=False) / "results.csv"
    damaged = damage(file.read_text()).encode("latin-1")
    file.write_bytes(damaged)
    painting.clear()
    with pytest.raises(InputError, match=rf"results\.csv, which is not as .*{message}.* remove it"):
        evaluate(settings, progress=False)
    assert file.read_bytes() == damaged
    assert not painting


def test_a_damaged_edit_is_named_and_made_again_once_removed(benchmark, tmp_path, painting):
    settings = settings_of(benchmark, tmp_path)
    file = evaluate(settings, progress=False) / "default" / "001.png"
    file.write_bytes(file.read_bytes()[:100])
    painting.clear()
    with pytest.raises(InputError, match=r"001\.png, and the next start makes it again"):
        evaluate(settings, progress=False)
    file.unlink()
    evaluate(settings, progress=False)
    assert [task.method for task in painting] == ["default"]
