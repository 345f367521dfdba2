"""Vitality, selection and the bootstrap, by hand and on numbers whose truth is known."""

import csv
import io

import numpy as np
import pytest
import torch
from helpers.scores import TABLE, scattered, table
from hypothesis import given
from hypothesis import strategies as st

from flux.errors import InputError
from flux.metrics.table import METRICS
from flux.scan.scores import Rule, Scores, is_settled, settled_after, spearman
from flux.settings.demos import DinoSettings


@pytest.mark.parametrize("metric", METRICS)
def test_less_alike_is_more_vital(metric):
    similarities = np.array([[80.0, 30, 10, 2]]) if metric == "psnr" else np.array([[0.99, 0.7, 0.2, -0.1]])
    scores = Scores([(0,), (1,), (2,), (3,)], {metric: similarities})
    assert np.all(np.diff(list(scores.vitality().values())) > 0)


# ---- vitality and selection


def test_vitality_is_1_minus_the_mean_similarity():
    assert TABLE.vitality() == {(0,): 0.2, (1, 2): 0.9, (2,): 0.1, (1,): 0.4}


def test_vitality_by_psnr_is_the_mean_root_mean_square_error():
    assert TABLE.vitality("psnr") == {(0,): 0.055, (1, 2): 0, (2,): 0.01, (1,): 0.1}


def test_only_single_layers_are_candidates():
    assert TABLE.layers == [0, 1, 2]
    assert TABLE.vital(Rule(top=1)) == [1]
    assert TABLE.vital(Rule(top=99)) == [0, 1, 2]
    assert TABLE.vital(Rule(gap=True)) == [1]
    pairs = Scores([(0, 1), (1, 2)], {"dino": np.full((9, 2), 0.5)})
    for rule in (Rule(top=1), Rule(threshold=0.1), Rule(gap=True)):
        assert pairs.vital(rule) == []
        assert not is_settled(pairs, rule)


def test_a_layer_that_just_reaches_the_threshold_is_vital():
    """Layer 0 is at 0.2 as the file shows it, at 0.19999999999999996 as floats add up."""
    assert TABLE.vital(Rule(threshold=0.2)) == [0, 1]
    assert TABLE.vital(Rule(threshold=0.200001)) == [1]
    assert TABLE.vital(Rule(threshold=1.5)) == []


def test_of_equally_vital_layers_the_first_come_first():
    assert table(0.5, 0.9, 0.5, 0.5).vital(Rule(top=2)) == [0, 1]


@pytest.mark.parametrize(
    ("vitalities", "vital"),
    [
        ([0.1, 0.9, 0.2, 0.8], [1, 3]),
        ([0.9, 0.8, 0.1], [0, 1]),  # the widest gap may leave out one layer only
        ([0.9, 0.5, 0.5, 0.1], [0]),  # of equally wide gaps the first
        ([0.5, 0.9, 0.9], [1, 2]),  # equally vital layers are never parted
        ([0.4, 0.4, 0.4], [0, 1, 2]),  # no gap, no difference
        ([0, 0], [0, 1]),
        ([0.3], [0]),
        ([-0.1, 0], [1]),  # a cosine may pass 1 by a rounding error
    ],
    ids=str,
)
def test_selection_by_the_largest_gap(vitalities, vital):
    assert table(*vitalities).vital(Rule(gap=True)) == vital


def test_rules_choose_row_by_row():
    rows = np.array([[0.1, 0.5, 0.6], [0.9, 0.2, 0.1], [0.3, 0.3, 0.3]])
    for rule in (Rule(top=2), Rule(threshold=0.3), Rule(gap=True)):
        assert np.array_equal(rule.choose(rows), np.stack([rule.choose(row) for row in rows]))


def test_a_rule_says_one_thing():
    assert Rule.of(DinoSettings(input_dir="x", threshold=0.0)) == Rule(threshold=0.0)
    assert [rule.to_json() for rule in (Rule(top=3), Rule(threshold=0.0), Rule(gap=True))] == [
        {"top": 3},
        {"threshold": 0.0},
        {"gap": True},
    ]
    for wrong in ({}, {"top": 1, "gap": True}, {"top": 1, "threshold": 0.5}):
        with pytest.raises(ValueError, match=r"exactly one"):
            Rule(**wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value):
    similarities = np.ones((2, 2))
    similarities[1, 0] = value
    with pytest.raises(
        InputError, match=f"Got {value} as the dino similarity of prompt 1 without layers 03-05"
    ):
        Scores([(3, 5), (4,)], {"dino": similarities})


# ---- agreement


def test_rank_correlation_by_hand():
    assert spearman([1, 2, 3], [10, 20, 90]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    # Ranks 1 2.5 2.5 4 and 1 2 3 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(np.sqrt(0.9), abs=1e-6)


def test_no_rank_correlation_without_an_order():
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [2]) is None


def test_agreement_of_each_two_metrics():
    # By falling vitality: dino (1, 2), (1,), (0,), (2,); psnr (1,), (0,), (2,), (1, 2).
    assert TABLE.agreement() == {"dino": {"psnr": -0.2}}
    assert table(0.1, 0.2).agreement() == {}


# ---- bootstrap


def test_samples_are_the_same_at_every_call():
    scores = scattered([0.2, 0.5], 20, 0.1)
    assert np.array_equal(scores.resampled(), scores.resampled())
    assert scores.resampled().mean(axis=0) == pytest.approx(list(scores.vitality().values()), abs=2e-3)


def test_an_interval_is_as_wide_as_the_standard_error_says():
    scores = scattered([0.3], 64, 0.1)
    [(low, high)] = scores.intervals().values()
    error = scores.tables["dino"].std() / 8
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert low < scores.vitality()[(0,)] < high


def test_intervals_cover_the_truth():
    """About 95 % of 1000 intervals for 32 prompts hold the truth: percentile intervals are narrow."""
    truth = np.linspace(0, 1, 1000)
    intervals = scattered(truth, 32, 0.1).intervals()
    covered = np.mean([low <= value <= high for value, (low, high) in zip(truth, intervals.values())])
    assert 0.92 < covered < 0.96


def test_prompts_are_drawn_with_all_their_seeds():
    """The same image under three more seeds adds nothing, and must not make an interval narrower."""
    once = scattered([0.2, 0.3], 12, 0.1)
    names = [f"prompt {number:02d}" for number in range(12)]
    similarities = np.repeat(once.tables["dino"], 4, axis=0)
    again = Scores(once.layer_sets, {"dino": similarities}, [name for name in names for _ in range(4)])
    assert again.intervals() == once.intervals()
    taken_apart = Scores(once.layer_sets, {"dino": similarities})
    assert np.diff(taken_apart.intervals()[(0,)]) < 0.6 * np.diff(once.intervals()[(0,)])


def test_too_few_prompts_have_no_interval():
    few = scattered([0.2, 0.9], 7, 0.01)
    assert few.intervals() == few.membership(Rule(top=1)) == {}
    assert not is_settled(few, Rule(top=1))
    one = scattered([0.2, 0.9], 64, 0.01, prompts=["a dog"] * 64)
    assert one.intervals() == {}


def test_membership_is_how_often_a_layer_is_chosen():
    """A coin's toss between layers 1 and 2; 0 is always in, 3 never."""
    scores = scattered([0.9, 0.5, 0.5, 0.1], 40, 0.1)
    share = scores.membership(Rule(top=2))
    assert share[0] == 1
    assert share[3] == 0
    assert share[1] + share[2] == pytest.approx(1)
    ahead = scores.tables["dino"][:, 2] - scores.tables["dino"][:, 1]
    z = ahead.mean() / (ahead.std() / np.sqrt(40))
    assert share[1] == pytest.approx(0.5 * (1 + torch.erf(torch.tensor(z / 2**0.5)).item()), abs=0.03)
    assert not is_settled(scores, Rule(top=2))
    assert is_settled(scores, Rule(top=1))
    assert is_settled(scores, Rule(top=3))


def test_membership_is_of_candidates_by_their_number():
    sets = [(7,), (1, 2), (2,)]
    assert scattered([0.9, 1.5, 0.1], 10, 0.01, sets).membership(Rule(gap=True)) == {2: 0.0, 7: 1.0}


def test_a_set_settles_when_there_are_enough_prompts():
    """At once for what is clear, later the closer the layers are, never for what is equal."""
    rule = Rule(top=1)
    assert settled_after(scattered([0.9, 0.1], 64, 0.05), rule) == 8
    close = scattered([0.5, 0.45], 64, 0.1)
    count = settled_after(close, rule)
    assert 8 < count < 64
    assert is_settled(close.part(range(count)), rule)
    assert not is_settled(close.part(range(count - 1)), rule)
    both_ways = np.concatenate((close.tables["dino"], close.tables["dino"][:, ::-1]))
    assert not is_settled(Scores(close.layer_sets, {"dino": both_ways}), rule)


def test_a_part_of_the_rows():
    scores = scattered([0.2, 0.4], 4, 0.1, prompts=list("abcd"))
    part = scores.part([2, 0])
    assert np.array_equal(part.tables["dino"], scores.tables["dino"][[2, 0]])
    assert part.prompts == ["c", "a"]
    assert part.num_rows == 2


# ---- the table


def test_the_table_as_csv():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert list(rows[0]) == ["prompt", "layers", "metric", "similarity"]
    assert len(rows) == 2 * 4 * 2
    assert rows[2] == {"prompt": "0", "layers": "01-02", "metric": "dino", "similarity": "0.100000"}
    assert rows[9] == {"prompt": "1", "layers": "00", "metric": "psnr", "similarity": "40.000000"}


# ---- properties of ranks and rules

# Few different values, so that many are equal.
VALUES = st.integers(0, 5).map(float)


def by_definition(a: list[float], b: list[float]) -> float | None:
    """Pearson's correlation of the mean ranks."""
    ranks = [
        [sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values]
        for values in (a, b)
    ]
    if any(len(set(each)) < 2 for each in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12))
def test_rank_correlation_is_its_definition(pairs):
    a, b = (list(values) for values in zip(*pairs))
    assert spearman(a, b) == pytest.approx(by_definition(a, b), abs=1e-6)
    assert spearman(a, b) == spearman(b, a)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12))
def test_rank_correlation_depends_on_the_order_alone(pairs):
    a, b = (list(values) for values in zip(*pairs))
    assert spearman([x**3 - 7 for x in a], b) == spearman(a, b)


@given(st.lists(VALUES, min_size=1, max_size=12), st.integers(1, 15))
def test_the_top_layers_are_the_most_vital(vitalities, top):
    chosen = Rule(top=top).choose(np.array(vitalities))
    assert chosen.sum() == min(top, len(vitalities))
    values = np.array(vitalities)
    if not chosen.all():
        assert values[chosen].min() >= values[~chosen].max()


@given(st.lists(VALUES, min_size=1, max_size=12))
def test_a_gap_parts_the_layers_or_there_is_none(vitalities):
    values = np.array(vitalities)
    chosen = Rule(gap=True).choose(values)
    if len(set(vitalities)) == 1:
        assert chosen.all()
    else:
        gap = values[chosen].min() - values[~chosen].max()
        assert gap == max(np.diff(sorted(values)))
