"""The report as a file: what it shows, and that it shows nothing else."""

import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
from helpers.report import HOSTILE, PROMPTS, RECORD, SETS, SIMILARITY, VITALITY, Elements, image_path, report
from PIL import Image

from flux.errors import InputError
from flux.images.io import save_image
from flux.scan.report import THUMBNAIL, embedded_thumbnail


def test_everything_is_there_with_its_scores(page, coloured_images):
    elements = Elements(page)
    images = [a for a in elements.of("li") if "data-set" in a]
    cells = [a for a in elements.of("td") if "data-set" in a]
    for found in (images, cells):
        assert [a["data-change"] for a in found] == [f"{1 - value:.3f}" for value in SIMILARITY.ravel()]
    classes = ["double vital", "double", "single vital", "single", "both", "both"]
    assert [a["class"] for a in images] == classes * len(PROMPTS)
    bars = [a for a in elements.of("svg") if "data-vitality" in a]
    assert [float(a["data-vitality"]) for a in bars] == list(VITALITY.values())
    assert bars[0]["aria-label"] == "layer 0, double-stream, vital: vitality 0.600 (95 %: 0.540 to 0.720)"
    assert bars[4]["aria-label"].startswith("layers 0\N{EN DASH}2, both kinds: vitality 0.800")

    shown = elements.of("img")
    paths = [image_path(coloured_images, number, layers) for number in range(3) for layers in ((), *SETS)]
    for attributes, path in zip(shown, paths, strict=True):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/webp;base64,"))
        with Image.open(BytesIO(data)) as small, Image.open(path) as original:
            assert small.size == (THUMBNAIL, THUMBNAIL * 3 // 4)
            assert np.allclose(small.getpixel((50, 50)), original.getpixel((50, 50)), atol=6)
        assert (attributes["width"], attributes["height"]) == (str(THUMBNAIL), str(THUMBNAIL * 3 // 4))
        assert attributes["loading"] == "lazy"
        assert attributes["alt"]
    assert shown[0]["alt"] == f"reference: {HOSTILE}"
    assert shown[1]["alt"] == "layer 0 skipped, double-stream"


def test_protocol(page):
    text = Elements(page).text
    for expected in (
        "flux-<b>",
        "160 \N{MULTIPLICATION SIGN} 120",
        "3 prompts",
        "<i>",
        "flux 0.1.0",
        "seed 7",
    ):
        assert expected in text
    assert "true CFG" not in text
    assert json.dumps(RECORD, indent=2) in text


def test_texts_of_the_user_stay_texts(page):
    elements = Elements(page)
    assert len(elements.of("script")) == 1
    assert not elements.of("b")[0]
    assert not elements.of("i")[0].get("onclick")
    assert HOSTILE in elements.text
    assert next(a["title"] for a in elements.of("th") if "title" in a) == f"prompt 0, seed 7: {HOSTILE}"
    assert "<script>document" not in page


def test_nothing_is_fetched(page):
    for name, attributes in Elements(page).found:
        assert name not in ("link", "iframe", "object", "embed", "base"), name
        for key in ("src", "href", "srcset", "action", "xlink:href", "data"):
            assert (attributes.get(key) or "data:").startswith("data:")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(", page)


def test_names_and_numbers_are_unique(page):
    identities = [a["id"] for _, a in Elements(page).found if "id" in a]
    assert len(identities) == len(set(identities))
    assert "$" not in page.replace("$5", "")


def test_without_intervals_and_vital_layers(coloured_images, tmp_path):
    page = report(coloured_images, tmp_path / "r.html", intervals=None, vital=[])
    assert "95 %" not in page
    assert "\N{BLACK STAR}" not in page
    assert "none" in page
    assert not any("vital" in (a.get("class") or "") for a in Elements(page).of("li", "th", "tr"))


def test_sweep_that_ended_early_and_seeds(coloured_images, tmp_path):
    """Two seeds of each prompt are six rows; three of them were made."""
    record = RECORD | {"settings": RECORD["settings"] | {"seeds": 2}}
    text = Elements(report(coloured_images, tmp_path / "r.html", record=record)).text
    assert "3 prompts, 2 seeds each; ended after 3 of 6" in text
    assert re.findall(r"prompt (\d), seed (\d), mean", text) == [("0", "7"), ("1", "8"), ("2", "1")]


def test_missing_image_leaves_the_older_report(coloured_images, tmp_path):
    (tmp_path / "r.html").write_text("older")
    with pytest.raises(InputError, match=r"nowhere.png"):
        report(coloured_images, tmp_path / "r.html", image_path=lambda *_: tmp_path / "nowhere.png")
    assert (tmp_path / "r.html").read_text() == "older"


def test_thumbnails_of_busy_images_are_small(tmp_path):
    """A whole scan of FLUX.1, 64 prompts and 57 layers, stays under 25 MB even if every image has as much
    detail as at every scale the eye can take (noise whose amplitude falls as 1/f, as in photographs)."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512))
    frequencies[0, 0] = 1
    noise = np.fft.fft2(rng.normal(size=(3, 512, 512))) / frequencies
    x = np.moveaxis(np.fft.ifft2(noise).real, 0, -1)
    x = 0.5 + 0.2 * (x - x.mean()) / x.std()
    save_image(Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8)), tmp_path / "busy.png")
    assert 3000 < len(embedded_thumbnail(tmp_path / "busy.png").url) + 100 < 25e6 / (64 * 58)
