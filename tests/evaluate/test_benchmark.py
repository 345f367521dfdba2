"""PIE-Bench's layout: masks by hand, what is read of an entry, and how wrong ones are told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flux.errors import InputError
from flux.evaluate.benchmark import (
    benchmark_fingerprint,
    decode_mask,
    encode_mask,
    read_benchmark,
    select_evenly,
    select_kinds,
    write_benchmark,
)
from flux.images.io import save_image


def entry(number: int = 0, **more) -> dict:
    """As PIE-Bench has them."""
    return {
        "image_path": f"0_random_140/{number}.jpg",
        "original_prompt": "a [round] cake on a table",
        "editing_prompt": "a [square] cake with [orange frosting] on a table",
        "editing_instruction": "Change the cake's shape",
        "editing_type_id": "6",
        "blended_word": "cake cake",
        "mask": [0, 4],
        **more,
    }


def write(folder, *entries, size=(64, 48)):
    for each in entries:
        save_image(Image.new("RGB", size, "red"), folder / "annotation_images" / each["image_path"])
    write_benchmark(folder, ((f"{number:012d}", each) for number, each in enumerate(entries)))
    return folder


def test_a_mask_by_hand():
    """Start and length in turn, over rows; a run goes on in the next row; the frame is always set."""
    mask = decode_mask([8, 2, 16, 3, 33, 100], width=7, height=6)
    assert mask.astype(int).tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 1],
        [1, 0, 1, 1, 1, 0, 1],
        [1, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]


masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: arrays(bool, shape))


def with_frame(mask: np.ndarray) -> np.ndarray:
    framed = mask.copy()
    framed[[0, -1]] = framed[:, [0, -1]] = True
    return framed


@given(masks)
def test_decoding_restores_an_encoded_mask(mask):
    height, width = mask.shape
    assert (decode_mask(encode_mask(mask), width, height) == with_frame(mask)).all()


@given(masks)
def test_runs_are_as_few_as_can_be(mask):
    """They ascend, and a pixel that is false stands between each and the next."""
    runs = encode_mask(mask)
    starts, lengths = runs[::2], runs[1::2]
    assert sum(lengths) == mask.sum()
    assert all(length > 0 for length in lengths)
    ends = [start + length for start, length in zip(starts, lengths)]
    assert all(end < start for end, start in zip(ends, starts[1:]))


@given(st.lists(st.integers(0, 99), max_size=12), st.integers(1, 8), st.integers(1, 8))
def test_any_runs_make_a_mask_of_the_right_size(numbers, width, height):
    """Runs may overlap, come in any order, and lead beyond the last pixel."""
    runs = numbers[: len(numbers) // 2 * 2]
    mask = decode_mask(runs, width, height)
    covered = {start + n for start, length in zip(runs[::2], runs[1::2]) for n in range(length)}
    by_pixel = np.array([number in covered for number in range(width * height)])
    assert (mask == with_frame(by_pixel.reshape(height, width))).all()


def test_what_is_read_of_an_entry(tmp_path):
    [item] = read_benchmark(write(tmp_path, entry()))
    assert (item.key, item.kind, item.seed) == ("000000000000", "colour", 0)
    assert item.source == "a round cake on a table"
    assert item.target == "a square cake with orange frosting on a table"
    assert item.path.read_bytes()
    assert item.truth is None
    assert item.asked is None


def test_photo_and_mask_are_cut_and_scaled_alike(tmp_path):
    """A picture whose left half is blue, and may change, keeps both together at another shape."""
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste("blue", (0, 0, 48, 64))
    mask = np.zeros((64, 96), dtype=bool)
    mask[:, :48] = True
    write(tmp_path, entry(image_path="one.png", mask=encode_mask(mask)))
    save_image(picture, tmp_path / "annotation_images" / "one.png")
    [item] = read_benchmark(tmp_path)
    photo, cut = item.photo(32, 32), item.mask(32, 32)
    assert photo.size == cut.size == (32, 32)
    blue = np.asarray(photo)[..., 2] > 128
    # But for the frame, and for where colours mix.
    inner = np.s_[2:-2, 2:-2]
    assert (np.asarray(cut) == blue)[inner].all()


def test_spread_takes_each_kind_evenly(tmp_path):
    kinds = ["1"] * 8 + ["2"] * 4
    items = read_benchmark(write(tmp_path, *(entry(n, editing_type_id=kind) for n, kind in enumerate(kinds))))
    chosen = select_evenly(items, 6)
    assert [item.kind for item in chosen] == ["replace"] * 4 + ["add"] * 2
    assert {item.key for item in select_evenly(items, 3)} < {item.key for item in chosen}
    assert select_evenly(items, 100) == select_evenly(items, None) == items


def test_kinds_are_chosen_by_name(tmp_path):
    items = read_benchmark(write(tmp_path, entry(0), entry(1, editing_type_id="9")))
    assert select_kinds(items, ["style"]) == items[1:]
    assert select_kinds(items, []) == items
    with pytest.raises(InputError, match="kinds colours, but the benchmark has colour, style"):
        select_kinds(items, ["colours", "style"])


def test_another_file_is_another_benchmark(tmp_path):
    first = benchmark_fingerprint(write(tmp_path, entry()))
    assert first != benchmark_fingerprint(write(tmp_path, entry(seed=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": [1, 2, 3]}, "no list of starts and lengths"),
        ({"mask": [0, -1]}, "no list of starts and lengths"),
        ({"mask": None}, "no list of starts and lengths"),
        ({"editing_prompt": None}, "has no text 'editing_prompt'"),
        ({"editing_prompt": " "}, "has no text 'editing_prompt'"),
        ({"original_prompt": "[]"}, "has no text 'original_prompt'"),
        ({"target_image_path": "lost.png"}, "lost.png is not there"),
        ({"target_image_path": 3}, "has no text 'target_image_path'"),
        ({"kind": ["add"]}, "has no text 'kind'"),
        ({"editing_instruction": 5}, "has no text 'editing_instruction'"),
        ({"seed": "7"}, 'expected seed to be an integer of at least 0, got "7"'),
        ({"seed": -1}, "expected seed to be an integer of at least 0, got -1"),
        ({"asked": "a cat"}, 'expected asked to be an object, got "a cat"'),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    write(tmp_path, entry())
    write_benchmark(tmp_path, [("one", entry()), ("two", entry() | change)])
    with pytest.raises(InputError, match=f"Got the edit 'two' of .*{message}"):
        read_benchmark(tmp_path)


def test_photos_that_cannot_be_edited_are_refused_while_reading(tmp_path):
    with pytest.raises(InputError, match=r"0\.jpg has a side of less than 16 pixels"):
        read_benchmark(write(tmp_path, entry(), size=(64, 8)))
    (tmp_path / "annotation_images" / "0_random_140" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.jpg, not a readable image"):
        read_benchmark(tmp_path)


def test_a_number_that_leads_elsewhere(tmp_path):
    write(tmp_path, entry())
    write_benchmark(tmp_path, [("../../one", entry())])
    with pytest.raises(InputError, match="made of letters"):
        read_benchmark(tmp_path)


def test_no_benchmark(tmp_path):
    with pytest.raises(InputError, match=r"holds no mapping_file\.json.*training\.benchmark"):
        read_benchmark(tmp_path)
    for text, why in {"[]": "no edits", "{}": "no edits", "no": "JSON", '{"one": 1}': "no object"}.items():
        (tmp_path / "mapping_file.json").write_text(text)
        with pytest.raises(InputError, match=rf"mapping_file\.json, which .*{why}"):
            read_benchmark(tmp_path)
