"""The board on which a mask is painted over an image. gradio's own editor cannot take a mask back."""

import json
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import FileData
from gradio.utils import get_upload_folder
from PIL import Image

from flux.errors import InputError
from flux.images.io import save_image

PAINT = "#ff7a00"
PNG = "data:image/png;base64,"
MOST_PIXELS = 2**21  # of a board: images of 1024x1024 and less are painted on


def painter(elem_id: str, value: dict[str, Any] | None, about: str, is_open: bool = False) -> gr.HTML:
    """Make a board in a fold. Its value comes from `board`; `painted_mask` reads what was painted.

    Args:
        elem_id: The element's id.
        value: The first value.
        about: What is said above it, in HTML.
        is_open: Whether its fold is open at first.
    """
    # The page builds it (studio.js) beside the template, which is drawn anew with every stroke.
    start = f"studio.painter(element, props, watch, {json.dumps(about)}, {json.dumps(is_open)})"
    return gr.HTML(value, label="Mask", html_template=" ", js_on_load=start, elem_id=elem_id)


def board(image: Image.Image | Path, mask: Image.Image | None = None) -> dict[str, Any]:
    """Make the value of a `painter`.

    Args:
        image: The image to paint on, or its file.
        mask: White where it is painted already. If None, nothing is.
    """
    file = image if isinstance(image, Path) else _saved(image)
    painted = None
    if mask:
        with Image.open(file) as opened:
            painted = _as_address(mask, opened.size)
    return {"image": FileData(path=str(file), orig_name=file.name).model_dump(), "painted": painted}


def painted_mask(value: Any) -> Image.Image | None:
    """Return what was painted on a `painter`, white on black, or None if nothing was.

    Raises:
        InputError: The value is none that a page sends.
    """
    painted = value.get("painted") if isinstance(value, dict) else value
    if not painted:  # a board without an image sends an empty text
        return None
    try:
        file = BytesIO(b64decode(painted.removeprefix(PNG), validate=True))
        with Image.open(file, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError("too large")
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except Exception:  # damage makes pillow raise OSError, SyntaxError, struct.error and more
        raise InputError("Got a mask that cannot be read: clear it, and paint it again") from None
    return Image.fromarray(np.where(alpha > 127, 255, 0).astype(np.uint8)) if (alpha > 127).any() else None


def _saved(image: Image.Image) -> Path:
    """Write an image where the page can read it, under a name that its pixels give it."""
    name = sha256(image.tobytes() + repr(image.size).encode()).hexdigest()
    file = Path(get_upload_folder()) / name / "board.png"
    if not file.is_file():
        save_image(image, file)
    return file


def _as_address(mask: Image.Image, size: tuple[int, int]) -> str:
    """Write a mask as a page paints it: opaque paint on a transparent PNG, in an address."""
    layer, file = Image.new("RGBA", size, PAINT), BytesIO()
    alpha = mask.convert("L").resize(size, Image.Resampling.NEAREST)
    layer.putalpha(alpha.point([0] * 128 + [255] * 128))
    layer.save(file, "PNG")
    return PNG + b64encode(file.getvalue()).decode()
