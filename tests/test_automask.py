import torch

from flux.attention_maps import text_tokens
from flux.automask import led_apart, subject_tokens
from flux.pipeline import Pipeline
from flux.settings import ModelSettings
from flux.specs import complete

SIDE = 16


def apart(share: float) -> torch.Tensor:
    """A map that is 0.05 but for a square of 1 that fills such a share of the picture."""
    image = torch.full((SIDE, SIDE), 0.05)
    side = round(SIDE * share**0.5)
    image[:side, :side] = 1.0
    return image.reshape(1, -1)


def test_a_part_and_the_whole():
    """In rows of one batch, however strong the difference is."""
    maps = torch.cat([scale * apart(share) for share in (0.1, 0.3, 0.8, 1.0) for scale in (0.01, 1, 50)])
    found = led_apart(maps, 16 * SIDE, 16 * SIDE)
    assert found.all(dim=1)[:, 0].tolist() == [False] * 6 + [True] * 6
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_the_part_and_its_neighbours():
    """A square of five tokens: means round its inner corner off, neighbours add a rim."""
    [found] = led_apart(apart(0.1), 16 * SIDE, 16 * SIDE).reshape(-1, SIDE, SIDE)
    rim = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    rim[:6, :6] = True
    rim[5, 5] = False
    assert torch.equal(found, rim)


def test_a_few_large_values_are_no_measure():
    """One token that stands out does not make the rest of a picture small."""
    maps = apart(1.0)
    maps[0, 100] = 30.0
    assert led_apart(maps, 32 * SIDE, 8 * SIDE).all()


def test_the_subject_is_where_a_shared_word_is_looked_at():
    """A square of six tokens attends to "dog", all else to everything alike: articles count for nothing."""
    t5, prompt = Pipeline.load(complete(ModelSettings(device="cpu"))).t5, "a dog on the grass"
    tokens = text_tokens(t5, prompt)
    num_txt = len(tokens.padding)
    q, k = torch.zeros(2, 1, 1, num_txt + SIDE**2, 4)
    k[0, 0, :num_txt][tokens.words["dog"]] = 1.0
    q[0, 0, num_txt:].view(SIDE, SIDE, 4)[4:10, 4:10] = 5.0

    def found(other: str) -> torch.Tensor:
        return subject_tokens(t5, {0: (q, k)}, [prompt], [other], 16 * SIDE, 16 * SIDE).reshape(SIDE, SIDE)

    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[4:10, 4:10] = True
    rim = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    rim[3:11, 3:11] = True
    subject = found("a dog in the snow")
    assert subject[inside].all() and not subject[~rim].any()
    assert not found("cats").any(), "no word is shared"
