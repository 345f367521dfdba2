"""Who attends to whom, against the softmax of a block's own queries and keys, recomputed by hand."""

import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_models
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import flux.attention.watch as watch_room
from flux.attention import sheets
from flux.attention.maps import layer_attention, mean_attention
from flux.attention.sheets import colour_scale, heat_map, layers_sheet, percent, words_sheet
from flux.attention.tokens import TextTokens, find_word, prompt_words, text_tokens
from flux.attention.watch import check_watch, steps_to_watch, watch
from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Inputs
from flux.settings.complete import resolve
from flux.settings.demos import LayerSettings

ROOT = Path(__file__).parents[2]
NUM_TXT = 5
DOG = "a dog wearing a top hat on the grass"


def mask(*places: int) -> torch.Tensor:
    return torch.tensor([place in places for place in range(NUM_TXT)])


TOKENS = TextTokens(padding=mask(3, 4), words={"dog": mask(1), "top hat": mask(0, 2)})


def settings(**fields) -> LayerSettings:
    small = {"prompt": DOG, "seed": 7, "width": 96, "height": 64, "num_steps": 4, "layers": (3, 12)}
    return resolve(LayerSettings(**{**small, **fields}))


# ---- the numbers, in a toy net


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def given():
    """Two rows of 3 x 4 image tokens."""
    return tiny_models.inputs(2, 48, 64, NUM_TXT)


@pytest.fixture(scope="module")
def watched(model, given):
    layers = frozenset(range(tiny_models.NUM_LAYERS))
    return model.observe(Inputs(**given), intervention=Intervention(watch=layers))[1].watched


def weights_by_hand(model, given, layer: int) -> torch.Tensor:
    """The full map of all heads, "B H N N", from the streams into the layer and its linear layers alone."""
    streams, p = model.streams(Inputs(**given))[layer], model.params
    vec = F.silu(tiny_models.hand_vec(model, given))
    ids = torch.cat((given["txt_ids"], given["img_ids"]), dim=1)

    def heads(x, lin, parts, qkv, norm):
        shift, scale = lin(vec)[:, None].chunk(parts, dim=-1)[:2]
        projected = qkv(tiny_models.hand_norm(x) * (1 + scale) + shift)[..., : 2 * p.hidden_size]
        q, k = projected.unflatten(-1, (2, p.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return tiny_models.hand_rms(q, norm.query_norm.scale), tiny_models.hand_rms(k, norm.key_norm.scale)

    if layer < p.depth:
        block, pairs = model.double_blocks[layer], []
        for name, x in (("txt", streams.txt), ("img", streams.img)):
            attn = getattr(block, f"{name}_attn")
            pairs.append(heads(x, getattr(block, f"{name}_mod").lin, 6, attn.qkv, attn.norm))
        q, k = (torch.cat(both, dim=2) for both in zip(*pairs))
    else:
        block = model.single_blocks[layer - p.depth]
        x = torch.cat((streams.txt, streams.img), dim=1)
        q, k = heads(x, block.modulation.lin, 3, block.linear1, block.norm)
    q, k = (tiny_models.hand_rotation(x, ids, p) for x in (q, k))
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


@pytest.mark.parametrize("layer", range(tiny_models.NUM_LAYERS))
def test_shares_are_those_of_the_full_map(model, given, watched, layer):
    full = weights_by_hand(model, given, layer)
    assert_close(full.sum(-1), torch.ones(full.shape[:3]))
    full = full.mean(dim=1)
    from_img, to_img = full[:, NUM_TXT:], full[:, :, NUM_TXT:]

    got = layer_attention(*watched[layer], TOKENS, chunk=5)
    tolerance = {"atol": 1e-5, "rtol": 0}
    assert_close(got.text, from_img[..., :NUM_TXT].sum(-1), **tolerance)
    assert_close(got.image, from_img[..., NUM_TXT:].sum(-1), **tolerance)
    assert_close(got.padding, from_img[..., 3] + from_img[..., 4], **tolerance)
    assert_close(got.to_words["dog"], from_img[..., 1], **tolerance)
    assert_close(got.to_words["top hat"], from_img[..., 0] + from_img[..., 2], **tolerance)
    assert_close(got.from_words["dog"], to_img[:, 1], **tolerance)
    assert_close(got.from_words["top hat"], (to_img[:, 0] + to_img[:, 2]) / 2, **tolerance)
    assert_close(got.text + got.image, torch.ones(2, 12))


def test_no_layer_looks_like_another(watched):
    """Else the test above would prove nothing about which layer was watched."""
    shares = torch.stack([layer_attention(*pair, TOKENS).text.flatten() for pair in watched.values()])
    assert torch.cdist(shares, shares).add(torch.eye(len(shares))).min() > 0.05


def random_heads(batch=2, heads=3, queries=40, keys=50, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, heads, tokens, size, generator=generator).mul(3).to(dtype)
        for tokens in (queries, keys)
    )


@pytest.mark.parametrize("chunk", [1, 7, 20, 40, 1000])
def test_chunks_change_nothing(chunk):
    q, k = random_heads()
    full = torch.softmax(q.double() @ k.double().mT / math.sqrt(8), dim=-1).mean(dim=1).float()
    groups = F.one_hot(torch.arange(50) % 3).float()
    assert_close(mean_attention(q, k, chunk=chunk), full)
    summed = mean_attention(q, k, groups, chunk)
    assert_close(summed, full @ groups)
    assert_close(summed.sum(-1), torch.ones(2, 40))


def test_softmax_is_float32():
    """Of half-precision queries and keys too: bfloat16 scores would be wrong in the second digit."""
    q, k = random_heads(dtype=torch.bfloat16)
    full = torch.softmax(q.double() @ k.double().mT / math.sqrt(8), dim=-1).mean(dim=1).float()
    got = mean_attention(q, k)
    assert got.dtype == torch.float32
    assert_close(got, full)


class HighWater(TorchDispatchMode):
    """The largest tensor made, and the most numbers alive at once, of all made inside."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in [out] if isinstance(out, torch.Tensor) else out:
            storage = x.untyped_storage()
            if storage.data_ptr() in inputs | self.known:
                continue
            numbers = storage.nbytes() // x.itemsize
            self.largest = max(self.largest, numbers)
            self.alive += numbers
            self.peak = max(self.peak, self.alive)
            self.known.add(storage.data_ptr())
            weakref.finalize(x, self.forget, numbers, storage.data_ptr())
        return out

    def forget(self, numbers: int, pointer: int) -> None:
        self.alive -= numbers
        self.known.discard(pointer)


@pytest.mark.parametrize("heads", [2, 24])
def test_memory_is_that_of_one_head_and_chunk(heads):
    """Whatever the number of heads and queries: a chunk's scores twice, and what is small beside them."""
    q, k = random_heads(1, heads, 640, 640, 4)
    tokens = TextTokens(torch.arange(40) > 20, {"dog": torch.arange(40) == 3})
    with HighWater() as made:
        layer_attention(q, k, tokens, chunk=64)
    scores = 64 * 640
    assert made.largest == scores
    small = 640 * (4 + 4 * 3 + 4)  # a head's keys; groups, shares and their copies; the word's own row
    assert 2 * scores <= made.peak <= 2 * scores + small


# ---- words and tokens


def test_words_of_a_prompt():
    assert prompt_words("A dog, a cat's top-hat — and a Dog!") == ["A", "dog", "cat's", "top-hat", "and"]
    assert prompt_words("") == []


def test_words_are_found_whole():
    assert find_word("a dog and dogs, Dog", "dog") == [(2, 5), (16, 19)]
    assert find_word("a (top hat)", "top hat") == [(3, 10)]
    assert find_word("3.5 metres", "3.5") == [(0, 3)]


def test_unknown_words_name_those_there_are():
    with pytest.raises(InputError, match=r"'dogs', which is not in .*: give some of a, dog, on, the, grass$"):
        find_word("a dog on the grass", "dogs")
    with pytest.raises(InputError, match="it has none"):
        find_word("", "dog")


def test_tokens_of_the_small_model(nano):
    """A known word or a comma is a token, another word is spelled; then the end, and padding up to 40."""
    tokens = text_tokens(nano.t5, "A dog, a zyzzyva and a dog", ["a", "DOG", "zyzzyva"])
    assert tokens.padding.tolist() == [False] * 15 + [True] * 25
    assert {word: found.nonzero().flatten().tolist() for word, found in tokens.words.items()} == {
        "a": [0, 3, 12],
        "DOG": [1, 13],
        "zyzzyva": [4, 5, 6, 7, 8, 9, 10],
    }


def test_no_words_are_all_words(nano):
    tokens = text_tokens(nano.t5, "a dog and a cat")
    assert list(tokens.words) == ["a", "dog", "and", "cat"]
    assert text_tokens(nano.t5, "").words == {}


def test_words_that_were_cut_off(nano):
    prompt = "a dog " * 25 + "cat"
    assert list(text_tokens(nano.t5, prompt).words) == ["a", "dog"]
    with pytest.raises(InputError, match="'cat', which lies behind the prompt's first 40 tokens"):
        text_tokens(nano.t5, prompt, ["dog", "cat"])


class SentencePieces:
    """An embedder whose tokenizer cuts words into pieces and marks the blanks before them, as T5's does."""

    max_length = 12

    def __init__(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁pen", "gu", "in", "▁in", "▁", "s", "now", ","]
        scores = [(piece, -1.0 - 0.1 * number) for number, piece in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_words_of_several_pieces():
    t5 = SentencePieces()
    prompt = "a penguin, in snow"
    pieces = t5.tokenizer.tokenize(prompt)
    assert pieces == ["▁a", "▁pen", "gu", "in", ",", "▁in", "▁", "s", "now"]
    tokens = text_tokens(t5, prompt, ["penguin", "in", "snow"])
    found = {word: [pieces[i] for i in places.nonzero()] for word, places in tokens.words.items()}
    assert found == {"penguin": ["▁pen", "gu", "in"], "in": ["▁in"], "snow": ["s", "now"]}
    assert tokens.padding.sum() == 3


# ---- watching a picture's making


def test_watching_changes_no_step(nano):
    """The very steps of `generate`, the chosen ones looked at and nothing of them kept."""
    chosen = settings(at_steps=(2, 0), words=("dog",))
    expected = []
    nano.generate([DOG], [7], **chosen.sampling(), on_step=expected.append, progress=False)
    steps, seen = watch(nano, DOG, 7, chosen, progress=False)
    assert len(steps) == 4
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(steps, expected))
    assert not any(step.watched for step in steps)
    assert [(step.index, step.t) for step in seen] == [(0, expected[0].t), (2, expected[2].t)]
    for step in seen:
        assert list(step.layers) == [3, 12]
        for found in step.layers.values():
            assert found.text.shape == found.to_words["dog"].shape == found.from_words["dog"].shape == (1, 24)
            assert (found.padding < found.text).all()
            assert (found.to_words["dog"] < found.text).all()


def test_the_word_is_where_its_object_is(nano):
    """Seed 7 puts the dog on the left, below the middle, and layer 8 knows so at the first step."""
    one_step = settings(num_steps=1, width=256, height=256, layers=(8,))
    _, [first] = watch(nano, "a dog on the grass", 7, one_step, progress=False)
    words = first.layers[8].to_words
    row, column = divmod(int(words["dog"].argmax()), 16)
    assert 9 <= row <= 14
    assert 2 <= column <= 8
    assert words["dog"].max() > max(0.1, 5 * words["the"].max())


def test_nothing_is_watched_unasked(nano, monkeypatch):
    monkeypatch.setattr(watch_room, "layer_attention", lambda *_: pytest.fail("no layers were named"))
    steps, seen = watch(nano, DOG, 7, settings(layers=(), num_steps=2), progress=False)
    assert len(steps) == 2
    assert seen == []


def test_steps_to_watch():
    assert steps_to_watch(settings(num_steps=20)) == [0, 10, 19]
    assert steps_to_watch(settings(num_steps=1)) == [0]
    assert steps_to_watch(settings(num_steps=20, at_steps=(7, 3))) == [3, 7]
    with pytest.raises(InputError, match=r"Got at_steps \[4\], but the 4 steps are numbered 0..3"):
        steps_to_watch(settings(at_steps=(1, 4)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": (3, 15)}, r"layers \[15\].* 0..14"),
        ({"at_steps": (20,)}, r"at_steps \[20\]"),
        ({"words": ("dog", "cat")}, "the word 'cat', which is not in the prompt"),
    ],
)
def test_what_is_not_there_is_told_before_loading(wrong, message):
    check_watch(settings(at_steps=(3,), words=("dog", "top hat")))
    with pytest.raises(InputError, match=message):
        check_watch(settings(**wrong))


# ---- pictures


def test_heat_is_where_the_values_are():
    """Tokens run along the rows; the colour of the top value is the map's last."""
    from matplotlib import colormaps

    values = torch.zeros(2 * 4)
    values[6] = 0.02
    pixels = np.asarray(heat_map(Image.new("RGB", (64, 32), "white"), values, 0.02)).astype(int)
    assert pixels.shape == (32, 64, 3)
    for place, value in (((0, 0), 0.0), ((31, 8), 0.0), ((31, 40), 1.0)):
        expected = 255 * (0.7 * np.array(colormaps["magma"](value)[:3]) + 0.3)
        assert np.abs(pixels[place] - expected).max() < 12


def test_scale_runs_upwards():
    bar = np.asarray(colour_scale(96, 96, 0.4).convert("L")).astype(int)[:, 15]
    inside = bar[11:85]
    assert inside[0] > inside[-1] + 100
    assert (np.diff(inside) <= 0).all()
    assert (bar[:11] == 255).all()
    assert (bar[85:] == 255).all()


def test_percentages():
    assert [percent(share) for share in (0, 0.00067, 0.0312, 0.0996, 0.5, 1)] == [
        "0%", "0.067%", "3.1%", "10%", "50%", "100%",
    ]  # fmt: skip


def test_sheets_have_a_place_for_everything(nano, monkeypatch):
    rows = {}

    def spy(images, captions, titles):
        rows.update(images=images, captions=captions, titles=titles)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(sheets, "grid", spy)
    chosen = settings(at_steps=(0, 1, 3), words=("dog", "top hat"))
    _, seen = watch(nano, DOG, 7, chosen, progress=False)
    picture = Image.new("RGB", (96, 64))

    layers_sheet(picture, seen, num_double=5)
    assert rows["titles"] == ["layer 3 (double-stream)", "layer 12 (single-stream)"]
    assert [len(row) for row in rows["images"]] == [len(row) for row in rows["captions"]] == [5, 5]
    found = seen[1].layers[12]
    assert rows["captions"][1][2] == (
        f"step 1, t = {seen[1].t:.2f}: text {percent(found.text.mean())} "
        f"(padding {percent(found.padding.mean())}), image {percent(found.image.mean())}"
    )

    words_sheet(picture, seen, num_double=5)
    assert [len(row) for row in rows["images"]] == [len(row) for row in rows["captions"]] == [4] * 4
    assert rows["titles"][0] == (
        "layer 3 (double-stream): image tokens attend to the word (mean of steps 0, 1, 3)"
    )
    mean = torch.stack([step.layers[12].from_words["top hat"] for step in seen]).mean(dim=0)
    assert rows["captions"][3][2] == f"top hat: up to {percent(mean.max())}, mean {percent(mean.mean())}"
    assert all(image.size == (96, 64) for row in rows["images"] for image in row)


# ---- the demo


def demo(monkeypatch, *names, **fields):
    monkeypatch.syspath_prepend(ROOT)
    import demo_1_layer

    demo_1_layer.main(*names, **fields)


@pytest.fixture
def file(tmp_path):
    """A file of the demo for a picture made at once."""
    path = tmp_path / "layer.json"
    path.write_text(
        '{"prompt": "a dog on the grass", "seed": 7, "width": 64, "height": 64, "num_steps": 2, '
        f'"layers": [3, 12], "words": ["dog"], "output_dir": "{tmp_path / "out"}"}}'
    )
    return str(path)


def test_demo_writes_both_sheets(monkeypatch, nano, file, tmp_path):
    monkeypatch.setattr("flux.pipeline.Pipeline.load", lambda *_: nano)
    demo(monkeypatch, file)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"layers.png", "words.png", "steps.png", "steps.gif", "run.json"} <= names
    assert Image.open(tmp_path / "out" / "layers.png").info["flux"]

    demo(monkeypatch, file, layers=[], output_dir=str(tmp_path / "plain"))
    assert not {"layers.png", "words.png"} & {path.name for path in (tmp_path / "plain").iterdir()}


def test_demo_tells_a_wrong_word_before_loading(monkeypatch, file, capsys):
    monkeypatch.setattr("flux.pipeline.Pipeline.load", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit) as end:
        demo(monkeypatch, file, words=["cat"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: Got the word 'cat'")


def test_import_is_light():
    """matplotlib and transformers only when there is something to draw or to read."""
    code = "import sys, flux.attention.maps; print({'matplotlib', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
