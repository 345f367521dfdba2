"""The site's pages that stand elsewhere in the repository, and the links to and from them."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/*.json",
    "training/README.md",
    "flux/assets/nano/README.md",
    "flux/assets/nano/vocabulary.txt",
    "examples/*",
    "comfyui/example_workflows/*.jpg",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the files that they link to."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages. A link to a file that is not on the site becomes its text."""
    here = Path(page.file.abs_src_path or "")

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        if not path or "://" in path:
            return match[0]
        target = (here.parent / path).resolve()
        docs = Path(config.docs_dir)
        uri = target.relative_to(docs if target.is_relative_to(docs) else ROOT).as_posix()
        if files.get_file_from_path(uri) is None:
            return text
        start = os.path.dirname(page.file.src_uri) or "."
        return f"{mark}[{text}]({os.path.relpath(uri, start)}{hash_sign}{anchor})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", moved, markdown)
