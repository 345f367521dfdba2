"""Doses: what the numbers mean."""

import pytest

from flux.settings.doses import DOSES, Dose


def test_weights_of_layers():
    assert Dose(weight=0.5).of_layer(3) == 0.5
    by_layer = Dose(weight={0: 0.25, 2: 0.0})
    assert [by_layer.of_layer(layer) for layer in range(3)] == [0.25, 1.0, 0.0]


@pytest.mark.parametrize(("falling", "expected"), [(False, [1, 1, 1, 1]), (True, [1, 0.75, 0.5, 0.25])])
def test_shares_of_steps(falling, expected):
    """Falling, it is whole in the first step, and would be nothing in the one after the last."""
    assert Dose(falling=falling).shares(range(3, 7)) == expected


def test_the_papers_dose_is_everything_everywhere():
    assert DOSES["paper"] == Dose(weight=1.0, inject_from=0.0, inject_until=1.0, falling=False, top=None)
