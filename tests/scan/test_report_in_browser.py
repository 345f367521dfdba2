"""The report in a browser: how it is used."""

import re

import numpy as np
import pytest
from helpers.report import BY_VITALITY, HOSTILE


@pytest.fixture(scope="module")
def window(browser):
    return browser.new_page()


@pytest.fixture
def browse(window, page, tmp_path):
    """Opens the page, runs a script in it and returns what that returns."""
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")

    def run(script: str, view: str = "", width: int = 1600, scheme: str = "light"):
        window.set_viewport_size({"width": width, "height": 900})
        window.emulate_media(color_scheme=scheme)
        window.goto("about:blank")  # another view of the same page would not load it anew
        window.goto(f"{file.as_uri()}{view}")
        return window.evaluate(f"() => {{ {script} }}")

    return run


ORDERS = """
const places = selector => all(selector).map(row => all(":scope > [data-set]", row).map(i => +i.dataset.set));
const x = bar => parseFloat(bar.getAttribute("x"));
const bars_shown = [...bars].sort((a, b) => x(a) - x(b));
const orders = () => [...places(".row"), bars_shown.map(bar => +bar.dataset.set)];
"""


def test_order_by_address(browse):
    script = ORDERS + "return orders();"
    assert browse(script) == [list(range(6))] * 9, "chart, map's head and rows, images"
    assert browse(script, "#sort=vitality") == [BY_VITALITY] * 9
    assert browse(script, "#sort=nonsense&prompt=%") == [list(range(6))] * 9


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


def test_keyboard(browse):
    """One stop of the Tab key for the chart, one for the map, one for each prompt's images; arrows inside;
    Enter in the map goes to the image; what has the focus tells its scores, until Escape."""
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
    stops, bar, cell, image, after, escaped = browse(script)
    assert stops == [1, 1, 1]
    layer = "layer 1, double-stream: vitality 0.050 (95 %: -0.010 to 0.170)"
    both = "layers 0\N{EN DASH}2, both kinds: vitality 0.800 (95 %: 0.740 to 0.920)"
    assert bar == ["svg", None, 4, both]
    change = "change 0.000"
    assert cell == ["td", "heat-prompt-1", 1, f"{change}\n{layer}\nprompt 1, seed 1: a dog"]
    assert image == ["li", "prompt-1", 1, f"{change}\n{layer}"]
    assert after == [1, 1, 1, True]
    assert escaped is False


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
    window, content, font, image, loaded = browse(script, width=width)
    assert window == width
    assert content <= window
    assert font >= 12
    assert image >= 80
    assert loaded


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scheme(scheme, browse):
    """Each text has a contrast of at least 4.5 to the page in both colour schemes (WCAG 1.4.3)."""
    script = """
    const style = selector => getComputedStyle(document.querySelector(selector));
    return [style("body").backgroundColor, style(".bars text").fill,
            ...["body", ".quiet", "dt", ".numbers", ".heat thead th"].map(selector => style(selector).color)];
    """
    paper, *inks = browse(script, scheme=scheme)

    def luminance(colour: str) -> float:
        channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert (luminance(paper) > 0.5) == (scheme == "light")
    for ink in inks:
        dark, light = sorted((luminance(paper), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
