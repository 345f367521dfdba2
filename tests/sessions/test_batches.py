"""Images of many prompts, batch by batch."""

from types import SimpleNamespace

from PIL import Image

from flux.sessions.batches import batch_name, generate_all
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings


def test_batches_have_names():
    assert [batch_name(0, 8, 8), batch_name(2, 1, 8), batch_name(4, 4, 8)] == [
        "denoise", "image 3 of 8", "images 5-8 of 8",
    ]  # fmt: skip


def test_a_batch_is_yielded_before_the_next_one_is_made():
    """All prompts in their order; an image to start from has the size of the images."""
    calls = []

    def generate(prompts, seeds, *, image, progress, **how):
        calls.append((prompts, seeds, image.size, progress, how["num_steps"]))
        return prompts

    settings = GenerateSettings(
        prompts=["a", "b", "c"], seed=5, batch_size=2, width=64, height=32, num_steps=3
    )
    images = generate_all(SimpleNamespace(generate=generate), resolve(settings), Image.new("RGB", (50, 50)))
    assert next(images) == "a"
    assert calls == [(["a", "b"], [5, 6], (64, 32), "images 1-2 of 3", 3)]
    assert list(images) == ["b", "c"]
    assert calls[1:] == [(["c"], [7], (64, 32), "image 3 of 3", 3)]
