"""The metrics against what they are defined as; vitality, selection and the bootstrap by hand and on numbers
whose truth is known; the files.
"""

import csv
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flux.errors import InputError
from flux.metrics.features import Clip, Dino, Lpips
from flux.metrics.pixels import MAX_PSNR, Psnr, Ssim
from flux.metrics.table import METRICS, load_metrics
from flux.runs.record import run_record
from flux.scan.publish import write_scores
from flux.scan.scores import Rule, Scores, is_settled, settled_after, spearman
from flux.scan.similarity import score
from flux.scan.sweep import image_path
from flux.settings.complete import resolve
from flux.settings.demos import DinoSettings, SkipSettings
from flux.specs import configs
from flux.vital_layers import find_vital_layers

RANDOM = np.random.default_rng(0)


def noise(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def table(*vitalities: float, rows: int = 1) -> Scores:
    """Single layers 0, 1, ... of these vitalities, every row the same."""
    sets = [(layer,) for layer in range(len(vitalities))]
    return Scores(sets, {"dino": 1 - np.array([vitalities] * rows)})


def scattered(truth, rows: int, spread: float, sets=None, prompts=None) -> Scores:
    """Vitalities that scatter normally about their truth from row to row."""
    truth = np.asarray(truth)
    values = truth + spread * np.random.default_rng(5).standard_normal((rows, len(truth)))
    return Scores(sets or [(layer,) for layer in range(len(truth))], {"dino": 1 - values}, prompts)


# ---- metrics


def test_psnr_by_hand():
    """A fifth of the range off everywhere: 20 log10(5) dB, and a fifth is the change."""
    black, grey = Image.new("RGB", (20, 16)), Image.new("RGB", (20, 16), (51, 51, 51))
    values = Psnr().compare([black, black], [grey, black])
    assert values == pytest.approx([20 * np.log10(5), MAX_PSNR])
    assert Psnr.change(np.array(values)) == pytest.approx([0.2, 0])


def test_psnr_of_nearly_equal_pictures_is_below_that_of_equal_ones():
    black, dot = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))
    dot.putpixel((3, 3), (1, 0, 0))
    assert Psnr().compare([black], [dot]) == pytest.approx([10 * np.log10(255**2 * 64 * 64 * 3)])


def literal_ssim(a: Image.Image, b: Image.Image) -> float:
    """Window by window, as section III-B of the paper has it."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    a, b = (np.asarray(image, dtype=float) for image in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top, left, colour in np.ndindex(a.shape[0] - 10, a.shape[1] - 10, 3):
        x, y = (image[top : top + 11, left : left + 11, colour] for image in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition():
    """Of unrelated and of related pictures, one flat, which is where rounding would show."""
    a, flat = noise(), Image.new("RGB", (32, 24), (250, 3, 128))
    pairs = [(a, noise()), (a, Image.blend(a, noise(), 0.3)), (flat, Image.blend(flat, a, 0.02)), (a, a)]
    values = Ssim.load().compare(*zip(*pairs))
    assert values == pytest.approx([literal_ssim(*pair) for pair in pairs], abs=1e-7)
    assert values[-1] == pytest.approx(1)


def test_ssim_needs_a_whole_window():
    tiny = Image.new("RGB", (30, 10))
    with pytest.raises(InputError, match="30x10.*11x11"):
        Ssim().compare([tiny], [tiny])


def test_dino_is_the_cosine_and_embeds_a_reference_once(monkeypatch):
    metric = Dino.load(configs["flux-nano"].dinov2)
    reference, others = noise(), [noise(), noise()]
    features = metric.encoder.embed([reference, *others])
    embed, embedded = metric.encoder.embed, []
    monkeypatch.setattr(metric.encoder, "embed", lambda images: embedded.extend(images) or embed(images))
    values = metric.compare([reference] * 3, [*others, reference])
    assert values == pytest.approx([*(features[1:] @ features[0]).tolist(), 1], abs=1e-5)
    assert len(embedded) == 3


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP vision model of random weights."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


def test_clip_is_the_cosine_of_its_image_embeddings(clip_folder):
    """At the model's own size nothing is resized, so the preparation is one line."""
    from transformers import CLIPVisionModelWithProjection

    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    pictures = [noise(32, 32) for _ in range(3)]
    pixels = np.stack([(np.asarray(picture) / 255 - mean) / std for picture in pictures])
    pixels = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
    a, *others = model(pixel_values=pixels).image_embeds
    expected = [torch.cosine_similarity(a, b, dim=0).item() for b in others]
    values = Clip.load(str(clip_folder)).compare([pictures[0]] * 2, pictures[1:])
    assert values == pytest.approx(expected, abs=1e-5)


def test_a_clip_that_is_not_whole_is_refused(clip_folder, tmp_path):
    """transformers would fill the projection with random numbers and go on."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="no whole CLIP vision model: visual_projection.weight is missing"):
        Clip.load(str(tmp_path / "clip"))
    with pytest.raises(InputError, match="no whole CLIP vision model"):
        Clip.load(str(configs["flux-nano"].dinov2))
    with pytest.raises(InputError, match="a folder without a whole CLIP vision model"):
        Clip.load(str(tmp_path))


def test_a_clip_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match="nobody/nothing.*the hub did not give it: give a folder"):
        Clip.load("nobody/nothing")


def test_lpips_is_turned_into_a_similarity(monkeypatch):
    """The package's net takes -1..1 and hands back a distance for each row, "B 1 1 1"."""

    class Net(torch.nn.Module):
        def forward(self, a, b):
            assert a.min() == -1
            assert a.max() == 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True) / 4

    def make(net, verbose):
        assert net == "alex"
        return Net()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=make))
    half = Image.new("RGB", (16, 16))
    half.paste("white", (0, 0, 16, 8))
    values = Lpips.load().compare([half, half], [half, half.rotate(180)])
    assert values == pytest.approx([1, 0.5])
    assert Lpips.change(np.array(values)) == pytest.approx([0, 0.5])


def test_lpips_without_its_package_or_weights(monkeypatch):
    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match="pip install lpips"):
        Lpips.load()
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(InputError, match="no route to host.*put alexnet-owt-7be5be79.pth into"):
        Lpips.load()


def test_only_the_metrics_asked_for_are_loaded(monkeypatch):
    monkeypatch.setattr(Dino, "load", lambda *_: pytest.fail("loaded"))
    assert list(load_metrics(["ssim", "psnr"])) == ["ssim", "psnr"]
    with pytest.raises(InputError, match="unknown metric 'dine': expected some of dino, psnr"):
        load_metrics(["psnr", "dine"])


def test_a_bypass_that_changes_nothing_has_no_vitality():
    for name, unchanged in {"dino": 1, "clip": 1, "ssim": 1, "lpips": 1, "psnr": MAX_PSNR}.items():
        assert METRICS[name].change(np.array([unchanged])) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_less_alike_is_more_vital(metric):
    similarities = np.array([[80.0, 30, 10, 2]]) if metric == "psnr" else np.array([[0.99, 0.7, 0.2, -0.1]])
    scores = Scores([(0,), (1,), (2,), (3,)], {metric: similarities})
    assert np.all(np.diff(list(scores.vitality().values())) > 0)


# ---- vitality and selection

TABLE = Scores(
    [(0,), (1, 2), (2,), (1,)],
    {
        "dino": np.array([[0.9, 0.1, 0.8, 0.5], [0.7, 0.1, 1.0, 0.7]]),
        "psnr": np.array([[20.0, 100, 40, 20], [40, 100, 40, 20]]),
    },
)


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
        with pytest.raises(ValueError, match="exactly one"):
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
    """Of 1000 intervals for 32 prompts about 95 %: a percentile interval is a little narrow."""
    truth = np.linspace(0, 1, 1000)
    intervals = scattered(truth, 32, 0.1).intervals()
    covered = np.mean([low <= value <= high for value, (low, high) in zip(truth, intervals.values())])
    assert 0.92 < covered < 0.96


def test_prompts_are_drawn_with_all_their_seeds():
    """The same picture under three more seeds adds nothing, and must not make an interval narrower."""
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


# ---- folders and files


def test_the_table_as_csv():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert list(rows[0]) == ["prompt", "layers", "metric", "similarity"]
    assert len(rows) == 2 * 4 * 2
    assert rows[2] == {"prompt": "0", "layers": "01-02", "metric": "dino", "similarity": "0.100000"}
    assert rows[9] == {"prompt": "1", "layers": "00", "metric": "psnr", "similarity": "40.000000"}


def write(folder, scores, rule, **more) -> dict:
    given = {"model": "flux-nano", "checkpoint": "sha256:12ab", "protocol": {"prompts": ["é"] * 64}}
    layers = write_scores(folder, scores, rule, **{**given, **more})
    data = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
    assert layers == data["vital_layers"] == scores.vital(rule)
    return data


def test_files_of_the_scores(tmp_path):
    scores = scattered([0.9, 0.1, 0.7], 10, 0.01, [(0,), (2,), (0, 2)])
    scores.tables["psnr"] = scores.tables["dino"] * 50
    data = write(tmp_path / "new", scores, Rule(gap=True), sources={"dino": "facebook/dinov2-giant"})
    assert (tmp_path / "new" / "similarity.csv").read_text() == scores.csv()
    assert (data["model"], data["checkpoint"]) == ("flux-nano", "sha256:12ab")
    assert data["rule"] == {"metric": "dino", "gap": True}
    assert data["rows"] == 10
    assert data["stable"] is True
    assert data["stable_after"] == 8
    low, high = scores.intervals()[(0,)]
    vitality = scores.vitality()[(0,)]
    assert data["vitality"]["00"] == {"vitality": vitality, "low": low, "high": high, "membership": 1.0}
    assert data["vitality"]["00-02"].keys() == {"vitality", "low", "high"}
    assert data["vitality_by_other_metrics"]["psnr"]["02"] == scores.vitality("psnr")[(2,)]
    assert data["agreement"] == {"dino": {"psnr": 1.0}}
    assert data["nets"] == {"dino": "facebook/dinov2-giant"}
    assert data["protocol"]["prompts"] == ["é"] * 64
    assert find_vital_layers(str(tmp_path / "new" / "vital_layers.json"), configs["flux-nano"]) == (0,)


def test_few_prompts_say_no_more_than_they_can(tmp_path):
    data = write(tmp_path, TABLE, Rule(threshold=0.15))
    assert data["vitality"]["00"] == {"vitality": 0.2}
    assert data["stable"] is False
    assert data["stable_after"] is None


def test_a_person_can_read_the_file(tmp_path):
    """A line for each layer, none beyond an editor's width."""
    write(tmp_path, scattered(np.linspace(0, 1, 57), 16, 0.1), Rule(top=40))
    lines = (tmp_path / "vital_layers.json").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110
    assert sum('"membership"' in line for line in lines) == 57


SETTINGS = {"prompts": ["a", "b"], "layers": [3, 0], "width": 32, "height": 32, "output_dir": ""}


@pytest.fixture
def folder(tmp_path):
    """A finished sweep: the first prompt's reference with noise of 0 and 1/5 of the range, the other's
    pictures equal.
    """
    settings = resolve(SkipSettings(**{**SETTINGS, "output_dir": str(tmp_path)}))
    for number in (0, 1):
        (tmp_path / f"prompt_{number:03d}").mkdir()
        for layers, value in (((), 0), ((3,), 51 * (1 - number)), ((0,), 0)):
            Image.new("RGB", (32, 32), (value,) * 3).save(image_path(tmp_path, number, layers))
    (tmp_path / "run.json").write_text(json.dumps(run_record(settings)))
    return tmp_path


def test_scores_of_a_folder(folder, monkeypatch):
    """In the order of the sets, whatever the number of pictures in memory at once."""
    for chunk in (32, 1):
        monkeypatch.setattr("flux.scan.similarity.CHUNK", chunk)
        scores = score(folder, load_metrics(["psnr", "ssim"]), progress=False)
        assert scores.layer_sets == [(3,), (0,)]
        assert scores.prompts == ["a", "b"]
        assert scores.tables["psnr"].tolist() == [[round(20 * np.log10(5), 6), 100], [100, 100]]
        assert scores.vitality() == {(3,): 0.1, (0,): 0}
        assert scores.tables["ssim"].argmin() == 0
        assert scores.tables["ssim"][1].tolist() == [1, 1]


def test_rows_of_one_prompt_are_known_as_such(folder):
    settings = resolve(SkipSettings(**{**SETTINGS, "prompts": ["a"], "seeds": 2, "output_dir": str(folder)}))
    (folder / "run.json").write_text(json.dumps(run_record(settings)))
    scores = score(folder, load_metrics(["psnr"]), progress=False)
    assert scores.prompts == ["a", "a"]
    assert scores.num_rows == 2


def test_pictures_of_unequal_size(folder):
    Image.new("RGB", (16, 48)).save(image_path(folder, 1, (0,)))
    with pytest.raises(InputError, match="unequal size: .*prompt_001.*skip_00.png has 16x48.*32x32"):
        score(folder, load_metrics(["psnr"]), progress=False)


def test_an_unfinished_sweep_is_not_scored(folder):
    image_path(folder, 1, (0,)).unlink()
    with pytest.raises(InputError, match="lacks 1 of its 6 images.*skip_00.png"):
        score(folder, load_metrics(["psnr"]), progress=False)
