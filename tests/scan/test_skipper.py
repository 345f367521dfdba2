"""Images with layers skipped: bit for bit what they are without shortcuts, decoded beside the next steps."""

import time

import pytest
from helpers.images import difference
from helpers.sweep import PROMPTS, image_names, run_sweep, same_sweeps, skip_settings
from PIL import Image

from flux.errors import InputError
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.sampling import sample
from flux.scan.skipper import LayerSkipper, SkipTask
from flux.scan.sweep import sweep
from flux.settings.resolved import ResolvedSkip


def full(pipe, given: ResolvedSkip, layers: tuple[int, ...]) -> Image.Image:
    """An image without shortcuts: every layer of every step computed for it alone."""
    prompt, size = given.prompts[0], (given.width, given.height)
    cond = pipe.condition([prompt.prompt], given.guidance, given.true_cfg, given.negative_prompt)
    levels = pipe.schedule(given.num_steps, *size)
    skipping = Intervention(skip=frozenset(layers), skip_scale=given.scale)
    *_, last = sample(
        pipe.model, pipe.noise([prompt.seed], *size), pipe.image_ids(1, *size), cond, levels, skipping
    )
    return pipe.decode(last.latent, *size, given.watermark)[0]


WAYS = {
    "plain": {"num_steps": 3},
    "scaled": {"scale": 0.5},
    "true CFG": {"true_cfg": 3.0, "negative_prompt": "grass"},
    "one step": {"num_steps": 1, "true_cfg": 3.0, "scale": 0.5},
}
# The first and the last layer, the last double-stream one and the first single-stream one, pairs across.
SETS = [(), (0,), (4,), (5,), (14,), (2, 9), (13, 14)]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_steps_shortcut_changes_no_bit(nano, tmp_path, way):
    """In the first step, the reference's own streams enter the first skipped layer."""
    given = skip_settings(tmp_path, **WAYS[way])
    skipper, found = LayerSkipper(given, nano), []
    for layers in SETS:
        [image] = skipper.make(SkipTask(0, *PROMPTS[0].values(), (layers,)))
        assert difference(image, full(nano, given, layers)) == 0, layers
        found.append(image.tobytes())
    assert len(set(found)) == len(SETS)


def test_the_shortcut_spares_the_layers_below(nano, tmp_path, monkeypatch):
    """In the only step, an image without the last layer computes no layer, one without layer 12 the last
    two.
    """
    computed = []
    for layer, block in enumerate((*nano.model.double_blocks, *nano.model.single_blocks)):
        run = block.run

        def counted(*given, layer=layer, run=run, **more):
            computed.append(layer)
            return run(*given, **more)

        monkeypatch.setattr(block, "run", counted)
    skipper, expected = LayerSkipper(skip_settings(tmp_path, num_steps=1), nano), {(14,): [], (12,): [13, 14]}
    skipper.make(SkipTask(0, "a dog", 0, ((0,),)))
    for layers, layers_above in expected.items():
        computed.clear()
        skipper.make(SkipTask(0, "a dog", 0, (layers,)))
        assert computed == layers_above


@pytest.mark.parametrize("way", ["plain", "scaled"])
def test_rows_of_a_batch_are_images_of_their_own(nano, tmp_path, way):
    """As one by one but for rounding; and whatever another row skips, not a bit of this row changes."""
    given = skip_settings(tmp_path, **WAYS[way])
    skipper = LayerSkipper(given, nano)

    def batch(*sets):
        return skipper.make(SkipTask(0, *PROMPTS[0].values(), sets))

    rows = batch((), (1,), (12,), (3, 8))
    for layers, row in zip([(), (1,), (12,), (3, 8)], rows):
        assert difference(row, full(nano, given, layers)) <= 1
    others = batch((6,), (1,), (12,), (14,))
    changed = [difference(row, other) for row, other in zip(rows, others)]
    assert changed[1] == changed[2] == 0
    assert changed[0] > 5 < changed[3]


def test_a_text_is_encoded_once_for_all_its_layers(nano, tmp_path, monkeypatch):
    texts, condition = [], nano.condition
    monkeypatch.setattr(nano, "condition", lambda *given: texts.append(given[0]) or condition(*given))
    run_sweep(nano, tmp_path, width=64, num_steps=1, true_cfg=2.0, batch_size=3)
    assert texts == [[entry["prompt"]] for entry in PROMPTS]


# ---- decoding beside the steps


@pytest.fixture
def beside(monkeypatch):
    """As on a GPU with room for all models."""
    monkeypatch.setattr("flux.scan.skipper.decodes_beside", lambda pipe: True)


def test_steps_do_not_wait_for_the_last_images(nano, swept, tmp_path, monkeypatch, beside):
    """Here a task is decoded only when the next one has been denoised; and no third one is begun."""
    waiting, decoded = [], []
    denoise, decode = LayerSkipper.denoise, LayerSkipper.decode

    def denoised(skipper, task):
        latents = denoise(skipper, task)
        waiting.append(len(waiting) + 1 - len(decoded))
        return latents

    def decode_late(skipper, latents):
        end = time.monotonic() + 60
        while len(waiting) < min(len(decoded) + 2, 8):
            assert time.monotonic() < end, "the steps wait"
            time.sleep(0.005)
        decoded.append(1)
        return decode(skipper, latents)

    monkeypatch.setattr(LayerSkipper, "denoise", denoised)
    monkeypatch.setattr(LayerSkipper, "decode", decode_late)
    assert same_sweeps(swept, run_sweep(nano, tmp_path))
    assert waiting == [1, *[2] * 7]


@pytest.mark.parametrize("error", [InputError("Got images full of NaN"), KeyboardInterrupt()], ids=repr)
def test_what_stops_the_thread_stops_the_sweep(nano, swept, tmp_path, monkeypatch, beside, error):
    """At the next task; started again, it ends as if undisturbed."""
    begun, decode = [], LayerSkipper.decode

    def failing(skipper, latents):
        begun.append(1)
        if len(begun) == 3:
            raise error
        return decode(skipper, latents)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSkipper, "decode", failing)
        with pytest.raises(type(error)):
            run_sweep(nano, tmp_path)
    assert len(image_names(tmp_path)) == 2
    assert same_sweeps(swept, run_sweep(nano, tmp_path))


@pytest.mark.gpu
def test_decoding_on_a_stream_of_its_own_changes_no_bit(tmp_path, monkeypatch):
    given = skip_settings(tmp_path / "beside", device="cuda", layers=list(range(12)), batch_size=2)
    pipe = LoadedModel.load(given)
    assert LayerSkipper(given, pipe).decodes_beside
    folder = sweep(given, pipe, progress=False)
    monkeypatch.setattr("flux.scan.skipper.decodes_beside", lambda pipe: False)
    other = sweep(given.model_copy(update={"output_dir": str(tmp_path / "other")}), pipe, progress=False)
    assert same_sweeps(folder, other)
