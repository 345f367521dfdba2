"""The ideas behind the page's fields: a line beside the field, and a list below that explains each."""

import html

PAGES = {
    "conditions": "docs/conditions.md",
    "editing": "docs/editing.md",
    "vital-layers": "docs/vital-layers.md",
    "weights": "docs/weights.md",
}
WORDS = {
    "reference": (
        "Reference",
        "The image that edits start from: drawn from a prompt, or a photograph. An edit starts from the same "
        "noise, with another prompt.",
        "editing",
    ),
    "layers": (
        "Layers",
        "The transformer's blocks, numbered from 0: double-stream layers first, then single-stream ones. A "
        "few are vital: skipping one of them changes the image most. Injecting there keeps what the prompt "
        "does not change.",
        "vital-layers",
    ),
    "kv": (
        "Keys and values (kv)",
        "What a layer's attention reads from the image. An edit reads those of its reference instead of its "
        "own. Keys alone steer where it looks, values alone what it finds there. Queries are what each place "
        "looks for: injected too, they keep even more of the layout.",
        "editing",
    ),
    "dose": (
        "Dose",
        "How much of the reference is injected: at which strength, in which steps, and where. The dose auto "
        "also finds out where each edit may change the reference.",
        "editing",
    ),
    "window": (
        "Window",
        "The share of the steps in which kv is injected: from 0 until 0.25 is the first quarter. Early steps "
        "decide what is where, late ones how it looks.",
        "editing",
    ),
    "mask": (
        "Mask",
        "Where an edit may change the reference. Everything else stays as it is, exactly.",
        "editing",
    ),
    "turn": (
        "Further turn",
        "An edit of an edit, written below it in a line that begins with >. Each turn starts from the first "
        "reference's keys and values, so errors do not add up.",
        "editing",
    ),
    "inversion": (
        "Inversion",
        "How a photograph becomes noise, from which its edits start. Noising adds new noise in each step. An "
        "inversion finds the noise from which the model draws the photograph. FlowEdit needs none: its edits "
        "lead from the photograph itself.",
        "editing",
    ),
    "context": (
        "Context image",
        "The image that an instruction is for. Its tokens stand beside those of the new image in every "
        "layer. The reference strength scales their keys about their mean.",
        "conditions",
    ),
    "guidance": (
        "Guidance and true CFG",
        "Guidance is a number that the model is given: more follows the prompt more closely. True CFG above "
        "1 adds a second pass, which steers away from the negative prompt and takes twice the time.",
        "editing",
    ),
    "vitality": (
        "Vitality",
        "How much the image changes when a layer is skipped: 1 minus the mean DINOv2 similarity.",
        "vital-layers",
    ),
}
"""Title, explanation and page of each idea."""


def about(line: str, word: str) -> str:
    """Add to a field's line, in Markdown, the link to what explains an idea."""
    return f"{line} [{WORDS[word][0]}?](#word-{word})"


def list_of_words() -> str:
    """Render all ideas, each where the links of `about` lead."""
    entries = "".join(
        f'<dt id="word-{name}" tabindex="-1">{html.escape(title)}</dt>'
        f"<dd>{html.escape(text)} <code>{PAGES[page]}</code> says more.</dd>"
        for name, (title, text, page) in WORDS.items()
    )
    return f"<details><summary>The words of this page</summary><dl>{entries}</dl></details>"
