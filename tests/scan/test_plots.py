"""The scan's plots: every bar, mark, whisker and name where it belongs."""

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.scores import TABLE
from matplotlib import colormaps
from PIL import Image

from flux.scan import plots
from flux.scan.findings import Findings
from flux.scan.layers import scored_sets
from flux.scan.plots import COLOUR_MAP, KIND_COLOURS, plot_heat_map, plot_vitality
from flux.scan.scores import Rule, Scores

HOOKED = "\u1d81"  # a letter of STIX that DejaVu Sans lacks


@pytest.fixture
def axes(monkeypatch):
    """Filled with the axes of every figure that is saved."""
    from matplotlib.figure import Figure

    seen = []
    original = Figure.savefig

    def savefig(self, *args, **options):
        seen.extend(self.axes)
        return original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def findings(similarity, layer_sets, prompts, num_double, vital=()) -> Findings:
    change = 1 - np.array(similarity)
    sets = scored_sets(dict(zip(layer_sets, change.mean(axis=0).tolist())), num_double, vital)
    return Findings(sets, change, prompts, list(vital))


def colour_of(bar) -> str:
    """Which of the named colours a bar has, and whether it is pale."""
    from matplotlib.colors import to_rgb

    shown = np.array(bar.get_facecolor()[:3])
    for kind, colour in KIND_COLOURS.items():
        full = np.array(to_rgb(colour))
        if np.allclose(shown, full):
            return kind
        if np.allclose(shown, 1 - 0.4 * (1 - full)):
            return f"pale {kind}"
    raise AssertionError(f"unknown colour {shown}")


@pytest.mark.parametrize(
    ("num_layers", "num_double", "vital"), [(15, 5, {0, 1, 6}), (57, 19, {0, 1, 2, 18, 53})]
)
def test_plot_of_layers(num_layers, num_double, vital, axes, tmp_path):
    scores = {(layer,): (layer * 7 % 11) / 11 for layer in reversed(range(num_layers))}
    plot_vitality(scored_sets(scores, num_double, vital), tmp_path / "p.png", 0.3)
    (ax,) = axes
    assert [bar.get_height() for bar in ax.patches] == [scores[layer,] for layer in range(num_layers)]
    for layer, bar in enumerate(ax.patches):
        kind = "double-stream" if layer < num_double else "single-stream"
        assert colour_of(bar) == (kind if layer in vital else f"pale {kind}")
    stars = next(line for line in ax.lines if line.get_marker() == "*")
    assert stars.get_xdata().tolist() == sorted(vital)
    assert all(y > scores[layer,] for layer, y in zip(sorted(vital), stars.get_ydata(), strict=True))
    assert max(stars.get_ydata()) < ax.get_ylim()[1]
    assert any(np.allclose(line.get_ydata(), 0.3) for line in ax.lines)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [str(layer) for layer in range(num_layers)]
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "labels overlap"
    legend = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert legend == ["double-stream", "single-stream", "vital", "threshold 0.3"]
    with Image.open(tmp_path / "p.png") as image:
        assert image.width >= 1000
        frame = ax.figure.legends[0].get_window_extent()
        assert frame.x0 >= 0
        assert frame.x1 <= image.width


def test_plot_of_layer_sets(axes, tmp_path):
    scores = {(5, 7): 0.3, (0, 1, 2, 4): 0.6, (3, 6, 5): -0.1, (9,): 0.2}
    plot_vitality(scored_sets(scores, 5, {5, 7, 9}), tmp_path / "p.svg", 0.25)
    (ax,) = axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0–2, 4", "3, 5, 6", "5, 7", "9"]
    assert [colour_of(bar) for bar in ax.patches] == [
        "pale double-stream",
        "pale both kinds",
        "single-stream",
        "single-stream",
    ]
    assert ax.get_ylim()[0] < -0.1
    assert "together" in ax.get_xlabel()
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    frame = ax.figure.legends[0].get_window_extent()
    assert frame.x0 >= 0
    assert frame.x1 <= ax.figure.bbox.width


def test_plot_of_many_sets_turns_its_labels(axes, tmp_path):
    scores = {(0, 5, layer): layer / 40 for layer in range(7, 37)}
    plot_vitality(scored_sets(scores, 19), tmp_path / "p.png")
    boxes = [tick.get_window_extent() for tick in axes[0].get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "labels overlap"


@pytest.mark.parametrize("vital", [set(), {0, 2}])
def test_plot_of_intervals(vital, axes, tmp_path):
    """Whiskers stand whole within the plot and below the stars, also where they reach beyond all bars."""
    scores = {(0,): 0.3, (1,): 0.05, (2,): 0.4}
    intervals = {(0,): (0.1, 0.75), (1,): (-0.1, 0.1), (2,): (0.35, 0.45)}
    plot_vitality(scored_sets(scores, 1, vital, intervals), tmp_path / "p.png")
    (ax,) = axes
    (whiskers,) = ax.collections
    drawn = {round(x): (low, high) for (x, low), (_, high) in whiskers.get_segments()}
    assert drawn == {layer: ends for (layer,), ends in intervals.items()}
    bottom, top = ax.get_ylim()
    assert bottom < -0.1
    assert top > 0.75
    for line in ax.lines:
        if line.get_marker() == "*":
            stars = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert all(intervals[layer,][1] < y < top for layer, y in stars.items())
            assert set(stars) == vital
    assert "95 % interval" in [text.get_text() for text in ax.figure.legends[0].get_texts()]


def test_plot_of_one_score_or_none(axes, tmp_path):
    plot_vitality(scored_sets({(3,): 0.0}, 5), tmp_path / "p.png")
    (bar,) = axes[0].patches
    left, right = axes[0].get_xlim()
    assert bar.get_width() < (right - left) / 8
    with pytest.raises(ValueError, match=r"at least one score"):
        plot_vitality([], tmp_path / "p.png")


@pytest.mark.parametrize(
    ("metric", "name"), [("dino", "1 \N{MINUS SIGN} similarity"), ("psnr", "root mean square error")]
)
def test_the_change_is_named_as_the_metric_computes_it(axes, tmp_path, metric, name):
    scores = Scores(TABLE.layer_sets, {metric: TABLE.tables[metric]})
    plot_heat_map(Findings.of(scores, Rule(top=1), 1), tmp_path / "h.png")
    assert axes[1].get_ylabel() == f"change ({name})"


def test_heat_map(axes, tmp_path):
    similarity = [[1.0, 0.4, 0.7], [0.2, 1.0, 0.5]]
    prompts = ["a cat for $5 or a dog for $6_", "word " * 40]
    plot_heat_map(findings(similarity, [(0,), (1,), (2, 3)], prompts, 1, [0, 2]), tmp_path / "h.png")
    ax = axes[0]
    (image,) = ax.images
    assert np.allclose(image.get_array(), [[0, 0.6, 0.3], [0.8, 0, 0.5]])
    assert image.get_clim() == (0, 0.8)
    assert image.get_cmap() == colormaps[COLOUR_MAP]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names[0] == prompts[0]
    assert names[1].endswith("\N{HORIZONTAL ELLIPSIS}")
    assert len(names[1]) < 70
    ticks = ax.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["0", "1", "2, 3"]
    assert [tick.get_fontweight() for tick in ticks] == ["bold", "normal", "normal"]
    assert [tick.get_color() for tick in ticks] == [
        KIND_COLOURS[kind] for kind in ("double-stream", "single-stream", "single-stream")
    ]
    legend = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert legend == ["double-stream", "single-stream"]
    with Image.open(tmp_path / "h.png") as picture:
        for tick in (*ticks, *ax.get_yticklabels()):
            box = tick.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= picture.width
            assert box.y0 >= 0
            assert box.y1 <= picture.height


def test_heat_map_without_any_change(axes, tmp_path):
    plot_heat_map(findings([[1.0000001]], [(3,)], ["a dog"], 5), tmp_path / "h.svg")
    low, high = axes[0].images[0].get_clim()
    assert low < 0 < high
    assert b"<svg" in (tmp_path / "h.svg").read_bytes()


def test_heat_map_of_a_whole_scan(axes, tmp_path):
    """64 prompts and 57 layers: no name lies on another."""
    similarity = np.random.default_rng(0).uniform(0.5, 1, (64, 57))
    found = findings(similarity, [(i,) for i in range(57)], ["a dog"] * 64, 19, [0])
    plot_heat_map(found, tmp_path / "h.png")
    across = [tick.get_window_extent() for tick in axes[0].get_xticklabels()]
    down = [tick.get_window_extent() for tick in axes[0].get_yticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(across))
    assert all(b.y1 < a.y0 for a, b in pairwise(down))


@pytest.mark.filterwarnings("error")
def test_prompts_in_other_letters_have_an_installed_font(tmp_path, monkeypatch):
    """STIX has a letter that DejaVu Sans lacks. What no font has is told in one line, by `font_file`."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in ("STIXGeneral", "DejaVuSans"):

        def found(letters: str, name: str = name) -> Path:
            return folder / f"{name if HOOKED in letters else 'DejaVuSans'}.ttf"

        monkeypatch.setattr(plots, "font_file", found)
        for number, prompt in enumerate([f"a {HOOKED}og", "a dog", f"a {HOOKED}og and 草地"]):
            plot_heat_map(findings([[0.5]], [(0,)], [prompt], 1), tmp_path / f"{name}{number}.png")
    with_letter, with_box = (
        (tmp_path / f"{name}0.png").read_bytes() for name in ("STIXGeneral", "DejaVuSans")
    )
    assert with_letter != with_box
    plain, same = ((tmp_path / f"{name}1.png").read_bytes() for name in ("STIXGeneral", "DejaVuSans"))
    assert plain == same
