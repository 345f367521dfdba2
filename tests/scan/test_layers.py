"""Sets of layers and their names."""

import re

from hypothesis import given
from hypothesis import strategies as st

from flux.scan.layers import kind_of, layer_ranges, layer_sets, layers_text, scored_sets

LAYERS = st.sets(st.integers(0, 56), min_size=1, max_size=12).map(sorted).map(tuple)


def test_all_layers_one_by_one():
    assert layer_sets("all", 15) == [(layer,) for layer in range(15)]
    assert layer_sets([3, 1], 15) == [(3,), (1,)]
    assert layer_sets([[7, 5], [1]], 15) == [(5, 7), (1,)]


@given(st.lists(LAYERS.map(list), min_size=1, max_size=5))
def test_sets_keep_their_order_and_are_sorted(entries):
    assert layer_sets([entry[::-1] for entry in entries], 57) == [tuple(entry) for entry in entries]


@given(LAYERS)
def test_a_file_name_says_which_layers(layers):
    text = layers_text(layers)
    assert tuple(int(number) for number in text.split("-")) == layers
    assert re.fullmatch(r"\d\d(-\d\d)*", text)


@given(st.sets(LAYERS, min_size=2, max_size=2))
def test_no_two_sets_share_a_name(pair):
    a, b = pair
    assert layers_text(a) != layers_text(b)
    assert layer_ranges(a) != layer_ranges(b)


def test_ranges_by_hand():
    assert layer_ranges((0, 1, 2, 5, 7)) == "0–2, 5, 7"
    assert layer_ranges((5, 6)) == "5, 6"
    assert layer_ranges(()) == ""


@given(st.sets(st.integers(0, 56), max_size=40))
def test_ranges_name_each_layer_once(layers):
    """In order, whatever the order they came in; a range has three layers or more and ends before a hole."""
    parts = [part.split("–") for part in layer_ranges(list(layers)).split(", ") if part]
    spans = [range(int(ends[0]), int(ends[-1]) + 1) for ends in parts]
    assert [layer for span in spans for layer in span] == sorted(layers)
    assert all(len(span) >= 3 for span, ends in zip(spans, parts) if len(ends) == 2)
    for span in spans:
        neighbours = {span.start - 1, span.start, span.stop - 1, span.stop} & layers
        if len(span) >= 3:
            assert neighbours == {span.start, span.stop - 1}


@given(LAYERS, st.integers(0, 57))
def test_the_kind_of_a_set_is_that_of_its_layers(layers, num_double):
    kinds = {kind_of((layer,), num_double) for layer in layers}
    assert kinds <= {"double-stream", "single-stream"}
    assert kind_of(layers, num_double) == (kinds.pop() if len(kinds) == 1 else "both kinds")


def test_a_set_is_vital_if_all_its_layers_are():
    sets = scored_sets({(0, 2): 0.7, (0,): 0.5, (1,): 0.1}, 2, [0, 2])
    assert [entry.is_vital for entry in sets] == [True, True, False]
    assert [entry.ends for entry in sets] == [(0.7, 0.7), (0.5, 0.5), (0.1, 0.1)]
