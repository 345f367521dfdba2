"""The project's pages, taken apart: code blocks, links, anchors, sentences."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "NOTES.md",
    ROOT / "training" / "README.md",
    ROOT / "flux" / "assets" / "nano" / "README.md",
]
NEEDS = re.compile(r"<!-- needs (\w+) -->")


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        page: The page it is on.
        line: The number of its first line.
        language: The word after its fence.
        text: Its lines.
        needs: What its commands need that a test has not got: the word of a `<!-- needs ... -->` before it.
    """

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def commands(self) -> list[str]:
        """The shell commands, one for each line; a line that ends with a backslash goes on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        stripped = (re.sub(r"(^|\s)#\s.*", "", line).strip() for line in lines)
        return [command for line in stripped if line for command in line.split(" && ")]


def name_of(page: Path) -> str:
    """Return the page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """Return the page's code blocks."""
    found, needs, start = [], None, 0
    language: str | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            language, lines, start = fence[1], [], number + 1
        elif fence:
            found.append(Block(page, start, language or "", "\n".join(lines) + "\n", needs))
            language = needs = None
        elif language is not None:
            lines.append(line)
        elif line.strip():
            mark = NEEDS.fullmatch(line.strip())
            needs = mark[1] if mark else None
    return found


def prose_of(page: Path) -> str:
    """Return the page without its code blocks and comments."""
    text = re.sub(r"^\s*```.*?^\s*```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def links_of(page: Path) -> list[str]:
    """Return the targets of the page's links and images."""
    text = re.sub(r"`[^`\n]*`", "", prose_of(page))
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the page's headings that GitHub and mkdocs both make."""
    github, mkdocs = set(), set()
    for heading in re.findall(r"^#+ +(.*)$", prose_of(page), flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        kept = re.sub(r"[^\w\- ]", "", plain)
        github.add(kept.replace(" ", "-"))
        mkdocs.add(re.sub(r"[-\s]+", "-", kept))
    return github & mkdocs


def sentences_of(page: Path) -> list[str]:
    """Return the sentences of the page's paragraphs and lists, code and links counting as their text."""
    paragraphs: list[str] = [""]
    for line in prose_of(page).splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "|", "!", "[!", "<", "---")):
            paragraphs.append("")
        elif re.match(r"([-*]|\d+\.) ", stripped):
            paragraphs.append(re.sub(r"^([-*]|\d+\.) ", "", stripped))
        else:
            paragraphs[-1] += f" {stripped}"
    found = []
    for paragraph in paragraphs:
        text = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", paragraph))
        found += [each.strip() for each in re.split(r"(?<=[.!?])[*_\"”)]* ", text) if each.strip()]
    return found
