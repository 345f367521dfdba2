"""Whole runs over a folder, with tiny captioners and with stand-ins that fail."""

import json
import sys

import pytest
from helpers.commands import run as run_command
from helpers.images import noise
from PIL import Image

from flux.captions.captioner import Captioner, Description
from flux.captions.run import caption_folder, compose
from flux.errors import InputError
from flux.settings.captions import CaptionSettings
from flux.specs import configs

NANO = str(configs["flux-nano"].folder)
NAMES = ["a.png", "b.jpg", "c.webp", "d.png"]


class StandIn(Captioner):
    """Says how wide an image is, and fails where it is told to."""

    def __init__(self, fails=lambda images: None):
        self.fails, self.batches = fails, []

    def describe(self, images, prompt=None, max_new_tokens=256):
        self.batches.append([image.width for image in images])
        if error := self.fails(images):
            raise error
        return [Description(f"{image.width} wide", True) for image in images]

    def inputs(self, images, prompt):
        raise NotImplementedError


def settings(folder, **fields):
    return CaptionSettings(images=str(folder), caption_model="x", text_encoders=NANO, **fields)


def caption(folder, captioner, **fields):
    return caption_folder(settings(folder, **fields), captioner, progress=False)


def texts_of(folder):
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def fault(*widths):
    """An error if one of the images has one of these widths."""
    return lambda images: InputError("it is at fault") if {i.width for i in images} & set(widths) else None


@pytest.mark.parametrize("kind", ["blip", "llava", "florence"])
def test_a_folder(kind, request, images):
    model = request.getfixturevalue(kind)
    fields = {"images": str(images), "caption_model": model, "text_encoders": NANO, "device": "cpu"}
    report = caption_folder(
        CaptionSettings(**fields, batch_size=3, max_new_tokens=6, prefix="photo:", trigger="ohwx"),
        progress=False,
    )
    assert report.new == NAMES == list(report.texts)
    expected = Captioner.load(model).describe(
        [Image.open(images / name).convert("RGB") for name in NAMES], max_new_tokens=6
    )
    written = texts_of(images)
    for name, found in zip(NAMES, expected):
        assert written[name[0]] == f"ohwx, photo: {found.text}\n"
    assert lines_of(images) == [{"file_name": n, "text": report.texts[n]} for n in NAMES]
    assert report.cut == [name for name, found in zip(NAMES, expected) if not found.whole]


def test_texts_are_kept(images):
    (images / "b.txt").write_text("mine")
    (images / "metadata.jsonl").write_text('{"file_name": "c.webp", "text": "given"}')
    report = caption(images, StandIn())
    assert report.new == ["a.png", "d.png"]
    assert texts_of(images) == {"a": "50 wide\n", "b": "mine", "d": "80 wide\n"}
    assert [line["text"] for line in lines_of(images)] == ["50 wide", "mine", "given", "80 wide"]
    assert caption(images, StandIn(fault(50, 60, 70, 80))).new == [], "nothing left to do"
    assert caption(images, StandIn(), recaption=True).new == NAMES
    assert texts_of(images)["b"] == "60 wide\n"


def test_images_are_scaled_down(images):
    stand_in = StandIn()
    caption(images, stand_in, max_side=16)
    assert stand_in.batches == [[16], [16], [16], [16]]


def test_a_stopped_run_resumes(images):
    def stop(found):
        if found[0].width == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(images, StandIn(stop))
    assert lines_of(images) == [
        {"file_name": "a.png", "text": "50 wide"}, {"file_name": "b.jpg", "text": "60 wide"},
    ]  # fmt: skip
    second = StandIn()
    assert caption(images, second).new == ["c.webp", "d.png"]
    assert second.batches == [[70], [80]]
    assert len(lines_of(images)) == 4


def test_what_fails_is_told_and_the_rest_goes_on(images, capsys):
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:200])
    noise(90, 40).save(images / "d.jpeg")
    stand_in = StandIn(fault(70))
    report = caption(images, stand_in, batch_size=4)
    assert report.new == ["a.png", "d.jpeg"]
    assert report.errors.keys() == {"b.jpg", "c.webp", "d.png"}
    assert "d.png beside d.jpeg, with one .txt file for both" in report.errors["d.png"]
    assert stand_in.batches == [[50, 70, 90], [50], [70], [90]]
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["d.png", "b.jpg", "c.webp"]


def test_a_captioner_that_always_fails_ends_the_run(images):
    stand_in = StandIn(fault(50, 60, 70, 80))
    with pytest.raises(InputError, match="it is at fault"):
        caption(images, stand_in)
    assert len(stand_in.batches) == 3


def test_a_description_without_words(images):
    stand_in = StandIn()
    stand_in.describe = lambda found, *_: [Description("", True) for _ in found]
    report = caption(images, stand_in)
    assert report.errors.keys() == set(NAMES)
    assert not texts_of(images)


def test_folders_that_cannot_be_written(images, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match=r"Cannot write to .*no permission"):
        caption(images, StandIn())


@pytest.mark.parametrize(
    ("prefix", "trigger", "expected"),
    [
        ("", "", "a dog"),
        ("photo of", "", "photo of a dog"),
        ("", "ohwx", "ohwx, a dog"),
        ("photo of ", "ohwx", "ohwx, photo of a dog"),
        ("photo of ohwx,", "ohwx", "photo of ohwx, a dog"),
        ("Ohwx:", "ohwx", "Ohwx: a dog"),
        ("a hotdog,", "hot", "hot, a hotdog, a dog"),
        ("", "do", "do, a dog"),
    ],
)
def test_prefix_and_trigger(prefix, trigger, expected):
    assert compose("a dog", prefix, trigger) == expected


# ---- the command


def command(arguments, monkeypatch, capsys):
    return run_command("flux.captions", arguments, monkeypatch, capsys)


def test_the_command(images, florence, monkeypatch, capsys):
    more = ["--caption_model", florence, "--text_encoders", NANO, "--max_new_tokens", "4"]
    ended = command(["captions.json", "--images", str(images), *more], monkeypatch, capsys)
    assert ended.status == 0
    assert f"4 described, 0 kept: {images / 'captions.jsonl'}" in ended.output
    assert "CLIP: at most 6 tokens" in ended.output
    assert "cut off after max_new_tokens 4" in ended.output


def test_the_command_ends_with_one_line(images, florence, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # nothing heavy is needed for these
    (tmp_path / "empty").mkdir()
    for folder, problem in (("nothing", "does not exist"), ("empty", "holds no image")):
        ended = command(["--images", str(tmp_path / folder)], monkeypatch, capsys)
        assert ended.status == 2
        assert len(ended.output.splitlines()) == 1
        assert problem in ended.output


def test_the_command_s_status_tells_of_errors(images, florence, monkeypatch, capsys):
    (images / "b.jpg").write_text("no image")
    more = ["--caption_model", florence, "--text_encoders", NANO, "--max_new_tokens", "4"]
    ended = command(["--images", str(images), *more], monkeypatch, capsys)
    assert ended.status == 2
    assert "Got 1 of 4 images that could not be described (b.jpg)" in ended.output
    assert "3 described" in ended.output
