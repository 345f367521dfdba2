"""Every message that the troubleshooting page quotes still stands in the code."""

import ast
import re

import pytest
from helpers.markdown import ROOT

OF_OTHERS = ("ModuleNotFoundError: No module named 'flux'", "Killed")
SHORTEST = 6  # letters of a quoted piece that say something

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [text for text in re.findall(r"^\*\*`([^`]+)`\*\*", PAGE, flags=re.M) if text not in OF_OTHERS]


@pytest.fixture(scope="module")
def literals():
    """The texts in the package's code, with a letter that no text has for each changing part."""
    found = []
    for path in [*ROOT.glob("flux/**/*.py"), *ROOT.glob("demo_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
    return found


def test_messages_are_quoted():
    assert len(QUOTED) > 40


@pytest.mark.parametrize("text", QUOTED)
def test_message_stands_in_the_code(text, literals):
    pieces = [piece.strip() for piece in text.removeprefix("warning: ").split("…")]
    assert max(map(len, pieces)) >= SHORTEST, "too short to prove anything"
    pattern = re.compile(".*".join(map(re.escape, pieces)), flags=re.S)
    assert any(pattern.search(literal) for literal in literals)
