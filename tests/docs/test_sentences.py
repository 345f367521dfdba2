"""Sentences that are understood at first reading are short."""

import pytest
from helpers.markdown import PAGES, ROOT, name_of, sentences_of

FIRST_READ = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "quickstart.md"]
GUIDES = [page for page in PAGES if page.parent == ROOT / "docs"]


def lengths(page):
    return {sentence: len(sentence.split()) for sentence in sentences_of(page)}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", FIRST_READ, ids=name_of)
def test_sentences_have_18_words_on_average(page):
    found = lengths(page).values()
    assert sum(found) / len(found) <= 18


@pytest.mark.parametrize("page", [FIRST_READ[0], *GUIDES], ids=name_of)
def test_no_sentence_is_longer_than_35_words(page):
    assert not [sentence for sentence, count in lengths(page).items() if count > 35]
