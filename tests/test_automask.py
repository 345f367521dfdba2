import torch

from flux.automask import led_apart

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
