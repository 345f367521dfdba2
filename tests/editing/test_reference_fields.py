"""The key of a reference changes exactly when the reference does, bit for bit."""

import pytest
import torch
from helpers.editing import LAYERS, settings
from PIL import Image

from flux.editing.edit import edit_reference
from flux.editing.reference import Reference, keep_reference
from flux.editing.reference_fields import STEERING, reference_fields
from flux.errors import InputError
from flux.settings.edits import EditSettings

LOADING = {
    "model", "weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "lora", "lora_weights",
    "lora_scale", "device",
    "dtype", "offload", "quantize", "t5", "tiled", "compile", "parallel",
}  # fmt: skip
"""The fields that a model is loaded with. With other values, the pipe is another one."""
STEERS = {*STEERING, *(name for names in STEERING.values() for name in names)} - {"mask"}
"""The fields that steer a model. With other values, `LoadedModel.steered` makes another pipe."""
OTHER = {
    "prompt": "a cat", "photo": "other.png", "seed": 9, "width": 80, "height": 80, "num_steps": 4,
    "guidance": 2.0, "true_cfg": 3.0, "negative_prompt": "an owl", "cfg_from": 0.5, "mimic_scale": 1.5,
    "mimic_percentile": 0.9, "watermark": True, "inversion": "fireflow", "nudging": 1.2,
    "correct_drift": False, "as_published": True, "paste_back": True, "caption_model": "caption",
    "edits": ["a bird"], "vital_layers": [0, 1], "dose": "add", "weight": 0.5, "inject_from": 0.2,
    "inject_until": 0.7, "falling": True, "top": 1, "parts": "qkv", "mask": "auto", "batch_size": 2,
    "output_dir": "elsewhere", "metadata": False, "sparse": False,
}  # fmt: skip
"""Another value of every field."""
MIMIC = {"mimic_scale": 2.0}
PHOTO = {"photo": "photo.png", "num_steps": 3}
BASES = {
    "generated": {"num_steps": 3, "true_cfg": 1.0},
    "two passes": {"num_steps": 3},
    "two passes, mimicked": {"num_steps": 3, **MIMIC},
    "photo": {**PHOTO, "true_cfg": 1.0},
    "photo, two passes": {**PHOTO, **MIMIC},
    "photo, inverted": {**PHOTO, "inversion": "midpoint", "true_cfg": 1.0},
    "photo, inverted, two passes": {**PHOTO, "inversion": "midpoint", **MIMIC},
    "photo, as published": {**PHOTO, "true_cfg": 1.0, "as_published": True},
    "photo, DirectEdit": {**PHOTO, "inversion": "directedit", "true_cfg": 1.0},
    "photo, FlowEdit": {**PHOTO, "inversion": "none", **MIMIC},
}


def fingerprint(reference: Reference) -> list[bytes]:
    """Every bit of a reference that its edits or its visitor can see."""
    source, found = reference.source, [reference.image.tobytes(), repr(reference.image.size).encode()]
    tensors = [
        source.start,
        *(source.path or ()),
        torch.tensor(source.levels),
        source.cond.txt,
        source.cond.guidance,
    ]
    for step in reference.steps:
        tensors += [step.latent, step.next_latent, *step.tensors()]
        tensors += [] if step.drift is None else [step.drift]
    if source.inversion_free and source.cond.negative is not None:  # all of it steers the edits
        cond = source.cond
        tensors += [cond.negative.txt, torch.tensor([cond.true_cfg, cond.mimic_scale or 0.0])]
        tensors += [torch.tensor(cond.mimic_percentile if cond.mimic_scale else 0.0)]
    return found + [x.contiguous().numpy().tobytes() for x in tensors]


@pytest.mark.parametrize("name", BASES)
def test_the_key_has_the_fields_that_matter_and_no_others(small, photo, name, monkeypatch):
    """Each field of the key changes the reference by itself; the others do not, all at once."""
    # These images are too small to hold the real one.
    monkeypatch.setattr("flux.loaded_model.embed_watermark", lambda images: -images)
    photos = {"photo.png": photo, "other.png": photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), None: None}
    base = {"negative_prompt": "a dog", **BASES[name]}
    has_photo = "photo" in base

    def key(**changes) -> dict:
        return reference_fields(settings(**{**base, **changes}), has_photo)

    def bits(**changes) -> list[bytes]:
        wanted = settings(**{**base, **changes})
        return fingerprint(keep_reference(small, wanted, LAYERS, photos[wanted.photo], progress=False))

    own = bits()
    fields = EditSettings.model_fields.keys() - LOADING - STEERS - ({"photo"} if not has_photo else set())
    assert fields <= OTHER.keys(), "a new field: does it shape a reference?"
    without_effect = {field: OTHER[field] for field in fields if key(**{field: OTHER[field]}) == key()}
    assert bits(**without_effect) == own, without_effect
    for field in sorted(fields - without_effect.keys()):
        assert bits(**{field: OTHER[field]}) != own, field


@pytest.mark.parametrize(
    ("image", "beside"),
    [
        ({"context": ("cup.png",)}, {"reference_strength": 1.2}),
        ({"context": ("cup.png", "hat.png")}, {"context_positions": "offset"}),
        ({"fill": "cup.png", "mask": "mask.png"}, {"mask": "other.png"}),
        ({"fill": "cup.png", "outpaint": (0.1, 0.1, 0.0, 0.0)}, {"overlap": 0.1}),
        ({"control": "cup.png"}, {"control": "hat.png"}),
        ({"redux": ("cup.png",)}, {"redux_strength": 0.5}),
    ],
)
def test_images_that_steer_are_part_of_it(image, beside):
    plain = settings()
    steered = plain.model_copy(update=image)
    keys = [reference_fields(each, False) for each in (plain, steered, steered.model_copy(update=beside))]
    assert keys[0] != keys[1] != keys[2]
    assert reference_fields(plain.model_copy(update={"reference_strength": 2.0}), False) == keys[0]


def test_a_caption_is_part_of_it():
    wanted = settings(photo="photo.png", prompt=None, caption_model="one")
    other = wanted.model_copy(update={"caption_model": "two"})
    assert reference_fields(wanted, True) != reference_fields(other, True)


def test_edits_of_a_kept_reference_use_their_own_seed(small, photo):
    """FlowEdit draws noise for edits alone."""
    how = {"photo": "photo.png", "inversion": "none", "edits": ["a cat"], "true_cfg": 1.0}
    kept = keep_reference(small, settings(**how), LAYERS, photo, progress=False)
    other = settings(**how, seed=9)
    images = [
        edit_reference(small, kept, ["a cat"], each, progress=False)[0] for each in (other, settings(**how))
    ]
    alone = keep_reference(small, other, LAYERS, photo, progress=False)
    assert images[0].tobytes() == edit_reference(small, alone, ["a cat"], other, progress=False)[0].tobytes()
    assert images[0].tobytes() != images[1].tobytes()


def test_another_guidance_needs_another_reference(small):
    kept = keep_reference(small, settings(num_steps=1), LAYERS, progress=False)
    with pytest.raises(InputError, match="another guidance than"):
        edit_reference(small, kept, ["a cat"], settings(num_steps=1, guidance=1.0), progress=False)


def test_edits_of_a_photograph_may_mimic_another_scale(small, photo):
    """The path of a photograph is unguided, so the scale shapes its edits alone."""
    wanted = settings(num_steps=2, photo="photo.png")
    kept = keep_reference(small, wanted, LAYERS, photo, progress=False)
    mimicking = settings(num_steps=2, photo="photo.png", **MIMIC)
    [image] = edit_reference(small, kept, ["a cat"], mimicking, progress=False)
    alone = keep_reference(small, mimicking, LAYERS, photo, progress=False)
    assert image.tobytes() == edit_reference(small, alone, ["a cat"], mimicking, progress=False)[0].tobytes()
