"""What one visitor may ask for, how uploads come in, and how errors go out."""

import html
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec


@dataclass(frozen=True)
class Limits:
    """The most of everything: picture sides and area in pixels, guidance of both kinds, steps, pictures of a
    run, edits of a run with all their turns, prompts of a scan, letters of a text, bytes and pixels of an
    upload, waiting visitors.
    """

    side: int
    area: int
    scale: float = 100.0
    steps: int = 100
    images: int = 4
    edits: int = 6
    prompts: int = 64
    letters: int = 4000
    upload_bytes: int = 20 * 2**20
    upload_pixels: int = 50_000_000
    waiting: int = 64

    @classmethod
    def of(cls, spec: ModelSpec) -> "Limits":
        """Twice the model's own side, and twice its own area."""
        return cls(side=2 * spec.size, area=2 * spec.size**2)

    def check_size(self, settings: ModelSettings) -> None:
        """Raises InputError for a picture that is too large or takes too many steps."""
        width, height = settings.width or 0, settings.height or 0
        if max(width, height) > self.side or width * height > self.area:
            raise InputError(
                f"Got a size of {width}x{height}, expected sides of at most {self.side} and an area of at "
                f"most {self.area} pixels: choose a smaller one"
            )
        if (settings.num_steps or 0) > self.steps:
            raise InputError(f"Got {settings.num_steps} steps, expected at most {self.steps}")
        for name in ("guidance", "true_cfg"):
            if (scale := getattr(settings, name) or 0) > self.scale:
                raise InputError(f"Got {name} {scale:g}, expected at most {self.scale:g}")

    def check_texts(self, texts: Sequence[str], most: int, what: str) -> None:
        """Raises InputError for too many texts, or too long ones."""
        if len(texts) > most:
            raise InputError(f"Got {len(texts)} {what}, expected at most {most}")
        if (longest := max((len(text) for text in texts), default=0)) > self.letters:
            raise InputError(f"Got a text of {longest} letters, expected at most {self.letters}")

    def read_upload(self, upload: Any, inside: Path) -> Image.Image:
        """An uploaded picture as bare pixels, by what a browser or a program says of it: {"path": ...}.

        Raises InputError for what is none, is too large, or does not lie in the folder `inside` that uploads
        go to.
        """
        try:
            path = Path(upload["path"]).resolve()
            there = path.is_relative_to(inside.resolve()) and path.is_file()
        except (TypeError, KeyError, ValueError, OSError):  # also a zero byte in it, or too long a name
            there = False
        if not there:
            raise InputError("Got a picture that was not uploaded, or no longer is there: upload it first")
        if (size := path.stat().st_size) > self.upload_bytes:
            most = self.upload_bytes // 2**20
            raise InputError(f"Got a picture of {size // 2**20} MB, expected at most {most}: scale it down")
        try:
            with Image.open(path) as opened:
                pixels = opened.width * opened.height
        except Exception:
            pixels = 0  # read_image says what is wrong with it
        if pixels > self.upload_pixels:
            most = self.upload_pixels // 10**6
            raise InputError(f"Got {pixels // 10**6} million pixels, expected at most {most}: scale it down")
        try:
            return read_image(path)
        except InputError as error:
            # The visitor knows the file by its name alone.
            raise InputError(str(error).replace(str(path), path.name)) from None


def text_in(form: Mapping[str, Any], name: str) -> str:
    """The text of that name in a filled form, "" where nothing was typed. Raises InputError for others."""
    text = form.get(name)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{name}: expected a text, got {text!r:.60}")
    return text or ""


@contextmanager
def readable() -> Iterator[None]:
    """Whatever goes wrong ends as one line in the visitor's browser; a fault of ours is printed here too."""
    import gradio as gr
    import torch

    try:
        yield
    except gr.Error:
        raise
    except InputError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "This needs more memory than there is: choose a smaller size, or fewer layers"
    except Exception:
        traceback.print_exc(file=sys.stderr)
        message = "Something went wrong here that should not; the terminal of the server says what"
    else:
        return
    # The page shows messages as HTML, and they quote what the visitor typed.
    raise gr.Error(html.escape(message, quote=False), print_exception=False)
