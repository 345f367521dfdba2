"""Results that show themselves in a notebook, and their files, which are those that the demos write."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from PIL import Image

from flux.attention.film import Film
from flux.errors import InputError
from flux.files import check_folder, write_json
from flux.images.given import Images, file_names
from flux.images.io import read_image, save_image, thumbnail
from flux.images.sheets import grid
from flux.metrics.pixels import psnr_or_none
from flux.runs.earlier import warn_of_earlier_images
from flux.runs.record import image_metadata, run_record
from flux.scan.layers import REFERENCE, LayerSet, layer_ranges, layer_sets, layers_text
from flux.scan.sweep import image_path, open_sweep
from flux.settings.complete import check_nothing_lost
from flux.settings.resolved import (
    ResolvedEdit,
    ResolvedGenerate,
    ResolvedLayer,
    ResolvedModel,
    ResolvedScan,
    ResolvedSkip,
)
from flux.specs import get_spec

SHOWN_SIDE = 1600  # pixels: the longer side of what a notebook shows
SHEET_COLUMNS = 6

S = TypeVar("S", bound=ResolvedModel)


class Result:
    """The result of a call. A notebook shows it as an image, and `save` writes it to a folder."""

    def sheet(self) -> Image.Image:
        """Draw the whole result as one image."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Write the files that the demo of this kind writes; its run.json repeats the run.

        Args:
            folder: The folder to write to. It is made if there is none.

        Returns:
            The folder.

        Raises:
            InputError: A file cannot be written.
        """
        raise NotImplementedError

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        thumbnail(self.sheet(), SHOWN_SIDE).save(buffer, "PNG")
        return buffer.getvalue()


# ---- demo 0: images


@dataclass(frozen=True, eq=False, repr=False)
class ImagesResult(Result):
    """Images of prompts. Used like a list of PIL images.

    Attributes:
        settings: The settings that made them.
        images: The images, one for each prompt.
        timings: Seconds spent by the model so far, by stage.
        inputs: The images that they start from or that steer them, where they came from no file.
    """

    settings: ResolvedGenerate
    images: list[Image.Image]
    timings: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Images] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = f"{self.settings.width}x{self.settings.height}"
        return f"<{len(self.images)} image{'s' * (len(self.images) != 1)} of {size}, {self.settings.model}>"

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]

    def sheet(self) -> Image.Image:
        """Draw all images with their prompts; a single image is drawn as it is."""
        return self.images[0] if len(self.images) == 1 else images_sheet(self.settings, self.images)

    def save(self, folder: str | Path) -> Path:
        """Write 000.png, 001.png, ..., grid.png and run.json, as demo 0 does. See `Result.save`."""
        settings = _saved_in(folder, self.settings, self.inputs)
        write_images(settings, self.images, self.timings)
        return Path(settings.output_dir)


def write_images(
    settings: ResolvedGenerate, images: Iterable[Image.Image], timings: Mapping[str, float]
) -> None:
    """Write images to `output_dir` as they come, then grid.png and run.json."""
    folder = Path(settings.output_dir)
    made, written = [], [folder / "grid.png"]
    for number, (entry, image) in enumerate(zip(settings.prompts, images)):
        made.append(image)
        written.append(folder / f"{number:03d}.png")
        save_image(image, written[-1], image_metadata(settings, entry.prompt, entry.seed))
    save_image(images_sheet(settings, made), folder / "grid.png")
    warn_of_earlier_images(settings, written)
    write_json(folder / "run.json", run_record(settings, timings=dict(timings)))


def images_sheet(settings: ResolvedGenerate, images: Sequence[Image.Image]) -> Image.Image:
    """Draw images in rows, each with its prompt."""
    rows = [slice(start, start + SHEET_COLUMNS) for start in range(0, len(images), SHEET_COLUMNS)]
    captions = [entry.prompt for entry in settings.prompts]
    return grid([images[row] for row in rows], [captions[row] for row in rows])


# ---- demo 1: the way from noise to an image


@dataclass(frozen=True, eq=False, repr=False)
class FilmResult(Result):
    """One image's way from noise, and what its layers attend to.

    Attributes:
        settings: The settings that made it.
        film: All steps, decoded, with the attention of the watched ones.
        timings: Seconds spent by the model so far, by stage.
        inputs: The images that steer the run, where they came from no file.
    """

    settings: ResolvedLayer
    film: Film
    timings: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Images] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers = f", layers {layer_ranges(self.settings.layers)}" if self.settings.layers else ""
        return f"<{len(self.film.clean)} steps of {self.film.prompt!r:.60}{layers}, {self.settings.model}>"

    @property
    def image(self) -> Image.Image:
        """The finished image."""
        return self.film.final

    @cached_property
    def sheets(self) -> dict[str, Image.Image]:
        """Its sheets by name: "steps", and with layers "layers" and "words"."""
        return dict(self.film.sheets())

    def sheet(self) -> Image.Image:
        """Draw the attention of each word if layers were watched, else all steps."""
        return next(self.sheets[name] for name in ("words", "layers", "steps") if name in self.sheets)

    def save(self, folder: str | Path) -> Path:
        """Write step_00_noisy.png, ..., steps.gif, the sheets and run.json, as demo 1. See `Result.save`."""
        settings = _saved_in(folder, self.settings, self.inputs)
        write_films(settings, [self.film], self.timings)
        return Path(settings.output_dir)


def write_films(settings: ResolvedLayer, films: Iterable[Film], timings: Mapping[str, float]) -> list[Path]:
    """Write films to `output_dir` as they come, then run.json. Each of several gets a folder of its own.

    Args:
        settings: The settings that made the films.
        films: The film of each prompt.
        timings: Seconds spent by the model, by stage. They are read after the last film.

    Returns:
        The paths of the sheets.
    """
    folder = Path(settings.output_dir)
    written, sheets = [], []
    for number, (entry, film) in enumerate(zip(settings.prompts, films)):
        place = folder if len(settings.prompts) == 1 else folder / f"prompt_{number:03d}"
        record = image_metadata(settings, entry.prompt, entry.seed)
        for index, (noisy, clean) in enumerate(zip(film.noisy, film.clean)):
            for kind, image in (("noisy", noisy), ("clean", clean)):
                written.append(place / f"step_{index:02d}_{kind}.png")
                save_image(image, written[-1], record)
        written.append(place / "steps.gif")
        film.save(written[-1])
        for name, sheet in film.sheets():
            sheets.append(place / f"{name}.png")
            save_image(sheet, sheets[-1], None if name == "steps" else record)
    warn_of_earlier_images(settings, [*written, *sheets])
    write_json(folder / "run.json", run_record(settings, timings=dict(timings)))
    return sheets


# ---- demo 4: a reference and its edits


@dataclass(frozen=True, eq=False, repr=False)
class EditResult(Result):
    """A reference and its edits.

    Attributes:
        settings: The settings that made them.
        reference: The source image. Of a photograph, it is the autoencoder's reconstruction.
        edits: The edits, one for each prompt.
        timings: Seconds spent by the model so far, by stage.
        evaluations: Number of evaluations of the transformer that this run took.
        inputs: The photograph, the mask and the images that steer the run, where they came from no file.
    """

    settings: ResolvedEdit
    reference: Image.Image
    edits: list[Image.Image]
    timings: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    inputs: Mapping[str, Images] = field(default_factory=dict)

    def __repr__(self) -> str:
        source = "a photograph" if self.settings.photo else f"{self.settings.prompt!r:.60}"
        return f"<{len(self.edits)} edit{'s' * (len(self.edits) != 1)} of {source}, {self.settings.model}>"

    @property
    def prompts(self) -> list[str]:
        """The prompt of each edit."""
        return [entry.prompt for entry in self.settings.entries]

    def sheet(self) -> Image.Image:
        """Draw the reference and the edits side by side, each with its prompt."""
        return grid([[self.reference, *self.edits]], [[self.settings.prompt or "", *self.prompts]])

    def save(self, folder: str | Path) -> Path:
        """Write reference.png, edit_0.png, ..., comparison.png and run.json, as demo 4. See `Result.save`."""
        settings = _saved_in(folder, self.settings, self.inputs)
        folder = Path(settings.output_dir)
        layers = list(settings.named_layers)
        names = ["reference", *(f"edit_{number}" for number in range(len(self.edits)))]
        written = [folder / f"{name}.png" for name in (*names, "comparison")]
        prompts = [settings.prompt or "", *self.prompts]
        for path, prompt, image in zip(written, prompts, [self.reference, *self.edits]):
            save_image(image, path, image_metadata(settings, prompt, settings.seed, layers=layers))
        save_image(self.sheet(), written[-1])
        warn_of_earlier_images(settings, written)
        scores = [{"psnr_to_reference": psnr_or_none(self.reference, image)} for image in self.edits]
        cost = {"timings": dict(self.timings), "evaluations": self.evaluations}
        write_json(folder / "run.json", run_record(settings, layers=layers, scores=scores, **cost))
        return folder


# ---- demos 2 and 3: layers skipped, layers scored


@dataclass(frozen=True, eq=False, repr=False)
class SkipResult(Result):
    """Images, and the same images with layers skipped.

    Attributes:
        settings: The settings that made them.
        files: The folder that holds them. Without a folder of its own, it is temporary.
    """

    settings: ResolvedSkip
    files: "Path | TemporaryDirectory[str]"

    def __repr__(self) -> str:
        sets, prompts = len(self.layer_sets), len(self.settings.entries)
        skipped = f"{sets} layer{'s' * (sets != 1)}"
        return f"<{prompts} prompt{'s' * (prompts != 1)} with {skipped} skipped, {self.settings.model}>"

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.files if isinstance(self.files, Path) else Path(self.files.name)

    @property
    def layer_sets(self) -> list[LayerSet]:
        """The layers that are skipped together, for each image."""
        return layer_sets(self.settings.layers, get_spec(self.settings.model).num_layers)

    def image(self, *skipped: int, row: int = 0) -> Image.Image:
        """Read one image.

        Args:
            *skipped: The layers that are skipped in it. If there are none, it is the reference.
            row: Which prompt, in the order of the prompts.

        Raises:
            InputError: There is no such image.
        """
        path = image_path(self.folder, row, tuple(sorted(skipped)) or REFERENCE)
        if not path.is_file():
            sets, last = ", ".join(map(layers_text, self.layer_sets)), len(self.settings.entries) - 1
            raise InputError(
                f"Got layers {list(skipped)} of row {row}: skipped were {sets}, of the rows 0 to {last}"
            )
        return read_image(path)

    def sheet(self) -> Image.Image:
        """Draw each prompt's image, and beside it those with layers skipped."""
        return read_image(self.folder / "grid.png")

    def save(self, folder: str | Path) -> Path:
        """Copy the files, which are those of demo 2, or of a scan. See `Result.save`."""
        folder = _writable(folder)
        if folder.resolve() != self.folder.resolve():
            open_sweep(self.settings.model_copy(update={"output_dir": str(folder)}))
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            record["settings"]["output_dir"] = str(folder)
            write_json(folder / "run.json", record)
        return folder


@dataclass(frozen=True, eq=False, repr=False)
class ScanResult(SkipResult):
    """The vitality of each layer.

    Attributes:
        settings: The settings of the scan.
        files: The folder that holds them. Without a folder of its own, it is temporary.
        vital_layers: The vital layers, as numbers of the whole model.
    """

    settings: ResolvedScan
    vital_layers: list[int]

    def __repr__(self) -> str:
        return f"<vital layers {self.vital_layers} of {self.settings.model}>"

    @property
    def vitality(self) -> dict[int | LayerSet, float]:
        """The vitality by layer, or by set of layers where several were skipped together."""
        entries = json.loads((self.folder / "vital_layers.json").read_text(encoding="utf-8"))["vitality"]
        return {
            int(name) if name.isdecimal() else tuple(map(int, name.split("-"))): entry["vitality"]
            for name, entry in entries.items()
        }

    @property
    def heat_map(self) -> Image.Image:
        """The change that each skipped layer makes to each prompt's image."""
        return read_image(self.folder / "heat_map.png")

    def sheet(self) -> Image.Image:
        """Draw the vitality of each layer as a bar chart."""
        return read_image(self.folder / "vitality.png")


# ---- folders


def _saved_in(folder: str | Path, settings: S, inputs: Mapping[str, Images]) -> S:
    """Return the settings with this folder as theirs, and write the images that no file held into it.

    Raises:
        InputError: As `check_nothing_lost` and `_writable`.
    """
    folder = _writable(folder)
    settings = settings.model_copy(update={"output_dir": str(folder)})
    check_nothing_lost(settings)
    files: dict[str, str | tuple[str, ...]] = {}
    for field_name, given in inputs.items():
        several = isinstance(given, list)
        names = file_names(field_name, len(given)) if several else [f"{field_name}.png"]
        for name, image in zip(names, given if several else [given]):
            save_image(image.convert("RGB"), folder / name)
        files[field_name] = tuple(names) if several else names[0]
    return settings.model_copy(update=files)


def _writable(folder: str | Path) -> Path:
    """Return the folder to save to, with ~ as the home folder.

    Raises:
        InputError: It is named as an image, or as `check_folder`.
    """
    folder = Path(os.path.expanduser(folder))
    if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"Got {folder}, the name of an image: save writes a folder of several files")
    check_folder(folder)
    return folder
