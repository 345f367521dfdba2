"""Images as text tokens."""

import pytest
import torch
from helpers.conditions import draw

from flux.conditions.redux import prepare_redux, redux_condition
from flux.errors import InputError
from flux.images.io import to_tensor


def colours(image):
    """Stands for the encoder: three tokens of 20 features, from an image's first pixels."""
    return to_tensor(image)[:, 0, :20][None]


def test_tokens_of_several_images_stand_in_a_row(image):
    other = draw(96, 64, seed=1)
    txt = redux_condition(colours, [image, other]).txt
    assert torch.equal(txt, torch.cat((colours(image), colours(other)), dim=1))
    assert torch.equal(redux_condition(colours, image, strength=0.5).txt, colours(image) / 2)


def test_upstreams_call(texts, image):
    """The tokens come after the prompt's, in every row, with positions of 0."""
    given = prepare_redux(texts.t5, texts.clip, torch.zeros(2, 16, 8, 8), ["", ""], colours, image)
    assert torch.equal(given["txt"], torch.cat((texts.txt, colours(image)), dim=1).expand(2, -1, -1))
    assert torch.equal(given["txt_ids"], torch.zeros(2, 8, 3))
    assert given.keys() == {"img", "img_ids", "txt", "txt_ids", "vec"}


def test_no_image_and_no_strength(image):
    with pytest.raises(InputError, match="an empty list"):
        redux_condition(colours, [])
    with pytest.raises(InputError, match="strength nan"):
        redux_condition(colours, image, strength=float("nan"))
