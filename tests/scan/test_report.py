"""The report as a file, and in a browser: what it shows, that it shows nothing else, and how it is used."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.errors import InputError
from flux.images.io import save_image
from flux.scan.report import THUMBNAIL, thumbnail, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: apt-get install chromium")

HOSTILE = "a \"red\" <script>document.title = 'run'</script> & 'cat' $5 </title>"
PROMPTS = [{"prompt": HOSTILE, "seed": 7}, {"prompt": "a dog", "seed": 1}, {"prompt": "a Dogfish", "seed": 2}]
SETS = [(0,), (1,), (2,), (3,), (0, 1, 2), (1, 3)]
SIMILARITY = np.array(
    [[0.4, 0.9, 0.8, 0.7, 0.2, 0.5], [0.5, 1.0, 0.6, 0.7, 0.1, 0.6], [0.3, 0.95, 0.4, 0.6, 0.3, 0.6]]
)
VITALITY = dict(zip(SETS, (1 - SIMILARITY.mean(0)).tolist(), strict=True))
INTERVALS = {layers: (value - 0.06, value + 0.12) for layers, value in VITALITY.items()}
BY_VITALITY = [4, 0, 5, 2, 3, 1]
RECORD = {
    "demo": "skip",
    "settings": {
        "model": "flux-<b>",
        "width": 160,
        "height": 120,
        "num_steps": 4,
        "guidance": 3.5,
        "true_cfg": None,
        "negative_prompt": "<i>",
        "prompts": PROMPTS,
        "layers": SETS,
    },
    "versions": {"flux": "0.1.0"},
}


def image_path(folder: Path, number: int, layers: tuple[int, ...]) -> Path:
    return folder / str(number) / f"{'-'.join(map(str, layers)) or 'reference'}.png"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    for number in range(len(PROMPTS)):
        for layers in ((), *SETS):
            colour = tuple(rng.integers(0, 256, 3).tolist())
            save_image(Image.new("RGB", (160, 120), colour), image_path(folder, number, layers))
    return folder


def report(folder: Path, out: Path, **changes) -> str:
    given = {
        "record": RECORD,
        "image_path": lambda number, layers: image_path(folder, number, layers),
        "layer_sets": SETS,
        "similarity": SIMILARITY.tolist(),
        "vitality": VITALITY,
        "intervals": INTERVALS,
        "vital": [0, 2],
        "num_double": 2,
        "progress": False,
    }
    write_report(out, **given | changes)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory) -> str:
    return report(sweep, tmp_path_factory.mktemp("page") / "report.html")


class Elements(HTMLParser):
    """The elements of a page as (name, attributes), and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name in names]


# The file


def test_everything_is_there_with_its_scores(page, sweep):
    elements = Elements(page)
    pictures = [a for a in elements.of("li") if "data-set" in a]
    cells = [a for a in elements.of("td") if "data-set" in a]
    for found in (pictures, cells):
        assert [a["data-change"] for a in found] == [f"{1 - value:.3f}" for value in SIMILARITY.ravel()]
    classes = ["double vital", "double", "single vital", "single", "both", "both"]
    assert [a["class"] for a in pictures] == classes * len(PROMPTS)
    bars = [a for a in elements.of("svg") if "data-vitality" in a]
    assert [float(a["data-vitality"]) for a in bars] == list(VITALITY.values())
    assert bars[0]["aria-label"] == "layer 0, double-stream, vital: vitality 0.600 (95 %: 0.540 to 0.720)"
    assert bars[4]["aria-label"].startswith("layers 0\N{EN DASH}2, both kinds: vitality 0.800")

    shown = elements.of("img")
    paths = [image_path(sweep, number, layers) for number in range(3) for layers in ((), *SETS)]
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


def test_without_intervals_and_vital_layers(sweep, tmp_path):
    page = report(sweep, tmp_path / "r.html", intervals=None, vital=[])
    assert "95 %" not in page
    assert "\N{BLACK STAR}" not in page
    assert "none" in page
    assert not any("vital" in (a.get("class") or "") for a in Elements(page).of("li", "th", "tr"))


def test_sweep_that_ended_early_and_seeds(sweep, tmp_path):
    """Two seeds of each prompt are six rows; three of them were made."""
    record = RECORD | {"settings": RECORD["settings"] | {"seeds": 2}}
    text = Elements(report(sweep, tmp_path / "r.html", record=record)).text
    assert "3 prompts, 2 seeds each; ended after 3 of 6" in text
    assert re.findall(r"prompt (\d), seed (\d), mean", text) == [("0", "7"), ("1", "8"), ("2", "1")]


def test_missing_picture_leaves_the_older_report(sweep, tmp_path):
    (tmp_path / "r.html").write_text("older")
    with pytest.raises(InputError, match=r"nowhere.png"):
        report(sweep, tmp_path / "r.html", image_path=lambda *_: tmp_path / "nowhere.png")
    assert (tmp_path / "r.html").read_text() == "older"


def test_thumbnails_of_busy_pictures_are_small(tmp_path):
    """A whole scan of FLUX.1, 64 prompts and 57 layers, stays under 25 MB even if every picture has as much
    detail as at every scale the eye can take (noise whose amplitude falls as 1/f, as in photographs)."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512))
    frequencies[0, 0] = 1
    noise = np.fft.fft2(rng.normal(size=(3, 512, 512))) / frequencies
    x = np.moveaxis(np.fft.ifft2(noise).real, 0, -1)
    x = 0.5 + 0.2 * (x - x.mean()) / x.std()
    save_image(Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8)), tmp_path / "busy.png")
    assert 3000 < len(thumbnail(tmp_path / "busy.png").url) + 100 < 25e6 / (64 * 58)


# The browser


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--window-size=1700,1000",
]


PROBE = """<script>
const told = document.createElement("pre");
told.id = "told";
told.textContent = JSON.stringify((() => { SCRIPT })());
document.body.append(told);
</script></body>"""
# In a frame, since no window of Chromium is narrower than 500 pixels.
FRAME = """<!doctype html><iframe src="probed.html" width="0" height="900"></iframe><pre id="told"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  document.getElementById("told").textContent = frame.contentDocument.getElementById("told").textContent;
};
</script>"""


@pytest.fixture
def browse(page, tmp_path):
    """Opens the page in headless Chromium, runs a script in it and returns what that returns."""

    def run(script: str, view: str = "", width: int = 1600, flags: tuple[str, ...] = ()):
        probed = page.replace("</body>", PROBE.replace("SCRIPT", script))
        (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
        frame = FRAME.replace("probed.html", f"probed.html{view}").replace('width="0"', f'width="{width}"')
        (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--dump-dom", "--allow-file-access-from-files", (tmp_path / "frame.html").as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        text = re.search(r'<pre id="told">(.+?)</pre>', dom, re.DOTALL)
        assert text, "the script failed"
        return json.loads(Elements(text[0]).text)

    return run


ORDERS = """
const places = selector => all(selector).map(row => all(":scope > [data-set]", row).map(i => +i.dataset.set));
const x = bar => parseFloat(bar.getAttribute("x"));
const bars_shown = [...bars].sort((a, b) => x(a) - x(b));
const orders = () => [...places(".row"), bars_shown.map(bar => +bar.dataset.set)];
"""


@in_browser
def test_order_by_address(browse):
    script = ORDERS + "return orders();"
    assert browse(script) == [list(range(6))] * 9, "chart, map's head and rows, pictures"
    assert browse(script, "#sort=vitality") == [BY_VITALITY] * 9
    assert browse(script, "#sort=nonsense&prompt=%") == [list(range(6))] * 9


@in_browser
def test_order_by_button(browse):
    """The buttons tell their state, and leave the view in the address."""
    script = """
    const told = [];
    const note = () => told.push([location.hash, ...all("[data-sort]").map(b => b.ariaPressed),
                                  ...all("#prompt-1 li").map(i => +i.dataset.set)]);
    for (const button of all("[data-sort]").reverse()) { button.click(); note(); }
    return told;
    """
    first, second = browse(script)
    assert first == ["#sort=vitality&prompt=", "false", "true", *BY_VITALITY]
    assert second == ["#sort=layer&prompt=", "true", "false", *range(6)]


@in_browser
def test_filter(browse):
    shown = """
    const rows = selector => all(selector).filter(row => row.checkVisibility()).map(row => row.id);
    const shown = () => [rows(".prompt"), rows("tbody .row"), toolbar.querySelector("output").textContent];
    """
    dogs = [["prompt-1", "prompt-2"], ["heat-prompt-1", "heat-prompt-2"], "2 of 3"]
    assert browse(shown + "return shown();", "#prompt=DOG") == dogs
    script = (
        shown
        + "filter.value = 'dog'; filter.dispatchEvent(new Event('input')); return [shown(), location.hash];"
    )
    assert browse(script) == [dogs, "#sort=layer&prompt=dog"]
    assert browse(shown + "return shown();", "#prompt=%3Cscript%3E")[2] == "1 of 3"


KEYBOARD = """
const press = key => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const stops = selector => all(selector + " [tabindex='0']").length;
const here = () => {
  const item = document.activeElement;
  item.dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
  return [item.localName, (item.closest("[id]") || {}).id, +item.dataset.set, tip.textContent];
};
"""


@in_browser
def test_keyboard(browse):
    """One stop of the Tab key for the chart, one for the map, one for each prompt's pictures; arrows inside;
    Enter in the map goes to the picture; what has the focus tells its scores, until Escape."""
    script = (
        KEYBOARD
        + """
    const told = [[stops(".bars"), stops(".heat"), stops("#prompt-0 ul")]];
    bars[0].focus();
    for (const key of ["End", "ArrowRight", "ArrowLeft"]) press(key);
    told.push(here());
    document.querySelector(".heat td").focus();
    for (const key of ["ArrowUp", "ArrowDown", "ArrowRight"]) press(key);
    told.push(here());
    press("Enter");
    told.push(here());
    told.push([stops(".bars"), stops(".heat"), stops("#prompt-1 ul"), tip.checkVisibility()]);
    press("Escape");
    told.push(tip.checkVisibility());
    return told;
    """
    )
    stops, bar, cell, picture, after, escaped = browse(script)
    assert stops == [1, 1, 1]
    layer = "layer 1, double-stream: vitality 0.050 (95 %: -0.010 to 0.170)"
    both = "layers 0\N{EN DASH}2, both kinds: vitality 0.800 (95 %: 0.740 to 0.920)"
    assert bar == ["svg", None, 4, both]
    change = "change 0.000, similarity 1.000"
    assert cell == ["td", "heat-prompt-1", 1, f"{change}\n{layer}\nprompt 1, seed 1: a dog"]
    assert picture == ["li", "prompt-1", 1, f"{change}\n{layer}"]
    assert after == [1, 1, 1, True]
    assert escaped is False


@in_browser
def test_keyboard_passes_over_what_the_filter_hides(browse):
    script = (
        KEYBOARD
        + """
    const first = document.querySelector(".heat td[tabindex='0']");
    const from = first.parentElement.id;
    first.focus();
    press("ArrowUp");
    return [from, document.activeElement.parentElement.id];
    """
    )
    assert browse(script, "#prompt=dog") == ["heat-prompt-1"] * 2


@in_browser
def test_pointer(browse):
    """The scores show within the window, also for the last column."""
    script = """
    const cell = document.querySelector(".heat tbody tr").lastElementChild;
    cell.scrollIntoView({ block: "end" });
    cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    const box = tip.getBoundingClientRect();
    const told = [tip.textContent, box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight];
    document.querySelector("h1").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    return [...told, tip.checkVisibility(), document.title];
    """
    text, within, visible, title = browse(script, width=500)
    assert text.splitlines()[-1] == f"prompt 0, seed 7: {HOSTILE}"
    assert within
    assert not visible
    assert title == "Vital layers of flux-<b>"


@in_browser
@pytest.mark.parametrize("width", [400, 1600])
def test_width(width, browse):
    """The page never scrolls sideways (its wide parts do), and its texts keep a readable size."""
    script = """
    for (const section of all(".prompt")) section.style.contentVisibility = "visible";
    const texts = all("p, dd, li span, th, button, .bars text").filter(e => e.checkVisibility());
    return [innerWidth, document.documentElement.scrollWidth,
            Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
            Math.min(...all("li img").map(e => e.getBoundingClientRect().width)),
            all("img").every(e => e.complete && e.naturalWidth > 0)];
    """
    window, content, font, picture, loaded = browse(script, width=width)
    assert window == width
    assert content <= window
    assert font >= 12
    assert picture >= 80
    assert loaded


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scheme(scheme, browse):
    """Each text has a contrast of at least 4.5 to the page in both colour schemes (WCAG 1.4.3)."""
    script = """
    const style = selector => getComputedStyle(document.querySelector(selector));
    return [style("body").backgroundColor, style(".bars text").fill,
            ...["body", ".quiet", "dt", ".numbers", ".heat thead th"].map(selector => style(selector).color)];
    """
    setting = 0 if scheme == "dark" else 1
    paper, *inks = browse(script, flags=(f"--blink-settings=preferredColorScheme={setting}",))

    def luminance(colour: str) -> float:
        channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert (luminance(paper) > 0.5) == (scheme == "light")
    for ink in inks:
        dark, light = sorted((luminance(paper), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
