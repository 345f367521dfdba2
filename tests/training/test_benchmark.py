"""The benchmark of rendered edits shows what its entries say."""

import json

import numpy as np
from helpers.evaluation import RENDERED_EDITS, SIDE

from flux.evaluate.benchmark import read_benchmark
from flux.images.io import read_image
from training.benchmark import EDITS, mark_changes, write


def test_every_kind_is_there_in_turn(rendered_edits):
    items = read_benchmark(rendered_edits)
    assert [item.kind for item in items] == [
        list(EDITS)[number % len(EDITS)] for number in range(RENDERED_EDITS)
    ]
    assert [item.seed for item in items] == list(range(RENDERED_EDITS))
    wanted = [item.asked for item in items if item.kind == "attribute"]
    assert "worn" in wanted[0]
    assert "colour" in wanted[1]


def test_images_differ_where_the_mask_says(rendered_edits):
    """For another background or time, all but the subject may differ; else nothing outside the mask does."""
    for item in read_benchmark(rendered_edits):
        before, after = (np.asarray(read_image(path), dtype=int) for path in (item.path, item.truth))
        outside = ~np.asarray(item.mask(SIDE, SIDE))
        differ = np.abs(before - after).max(axis=2)
        assert before.shape == (SIDE, SIDE, 3)
        assert differ.max() > 5, item
        if item.kind not in ("background", "time"):
            assert differ[outside].max() == 0, item
        else:
            assert outside.any()
            assert outside.mean() < 0.6


def test_a_longer_benchmark_begins_with_a_shorter_one(rendered_edits, tmp_path):
    write(tmp_path / "later", 2, SIDE, first=1)
    later = json.loads((tmp_path / "later" / "mapping_file.json").read_text())
    write(tmp_path, 3, SIDE)
    short, long = (
        json.loads((each / "mapping_file.json").read_text()) for each in (tmp_path, rendered_edits)
    )
    assert list(long.items())[:3] == list(short.items())
    assert list(long.items())[1:3] == list(later.items())
    for entry in short.values():
        files = [each / "annotation_images" / entry["image_path"] for each in (tmp_path, rendered_edits)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_an_edit_changes_is_marked_in_the_prompt():
    assert mark_changes("a dog on snow", "a red dog on snow") == "a dog on snow"
    assert mark_changes("a red dog on snow", "a dog in a room") == "a [red] dog [on snow]"


def test_edits_are_said_as_instructions(rendered_edits):
    """An instruction names what is added. If something is removed, it names only that."""
    for item in read_benchmark(rendered_edits):
        new = {word for word in item.target.split() if word not in item.source.split()}
        if item.kind == "remove":
            assert item.instruction.startswith(("remove the", "take the"))
        else:
            assert new & set(item.instruction.split()), (item.instruction, item.target)
