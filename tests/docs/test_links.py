"""Links between the pages: every file is there, and every anchor is a heading of its page."""

import pytest
from helpers.markdown import PAGES, ROOT, anchors_of, links_of, name_of


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    broken = []
    for link in links_of(page):
        if link.startswith(("http://", "https://", "mailto:", "../../actions/")):  # the last: GitHub's own
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = target.exists() and target.is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_images_have_a_text(page):
    assert "![](" not in page.read_text(encoding="utf-8")


def test_every_page_is_on_the_site():
    """In the order of mkdocs.yml."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and "space" not in page.parts]
    assert not [name for page in pages if (name := page.relative_to(ROOT / "docs").as_posix()) not in nav]
