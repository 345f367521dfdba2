"""Attention in numbers, against the softmax of a block's own queries and keys, recomputed by hand."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import conditions, tiny_models
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from flux.attention.maps import layer_attention, mean_attention
from flux.attention.tokens import TextTokens
from flux.intervention import Intervention
from flux.model import Inputs

NUM_TXT = 5


def mask(*places: int) -> torch.Tensor:
    return torch.tensor([place in places for place in range(NUM_TXT)])


TOKENS = TextTokens(padding=mask(3, 4), words={"dog": mask(1), "top hat": mask(0, 2)})


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
    assert not got.condition.any()


@pytest.mark.parametrize("layer", [0, tiny_models.NUM_LAYERS - 1])
def test_a_condition_has_a_share_of_its_own(model, given, layer):
    """Beside the full map of a pass whose tokens are joined by hand: prompt, Redux, noise, context."""
    whole = conditions.condition(2, 12)
    whole = replace(whole, channels=None, context=whole.context[..., :64])
    watching = Intervention(watch=frozenset({layer}))
    q, k = model.observe(Inputs(**conditions.joined(given, whole)), watching)[1].watched[layer]
    full = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).mean(dim=1)
    prompt, redux, noise, context = torch.arange(NUM_TXT + 4 + 12 + 9).split((NUM_TXT, 4, 12, 9))
    from_img = full[:, noise]

    got = layer_attention(
        *model.observe(Inputs(**given, condition=whole), watching)[1].watched[layer], TOKENS
    )
    tolerance = {"atol": 1e-5, "rtol": 0}
    assert_close(got.text, from_img[..., prompt].sum(-1), **tolerance)
    assert_close(got.condition, from_img[..., [*redux, *context]].sum(-1), **tolerance)
    assert_close(got.image, from_img[..., noise].sum(-1), **tolerance)
    assert_close(got.to_words["dog"], from_img[..., 1], **tolerance)
    assert_close(got.from_words["dog"], full[:, 1][:, noise], **tolerance)
    assert got.condition.min() > 0.05


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
    """Half-precision queries and keys count as well: bfloat16 scores would be wrong in the second digit."""
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
    small = 640 * (4 + 4 * 4 + 4)  # a head's keys; groups, shares and their copies; the word's own row
    assert 2 * scores <= made.peak <= 2 * scores + small
