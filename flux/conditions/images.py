"""The images that steer a run: from the settings that name them to the condition of a pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from PIL import Image

from flux.conditions.base import Encode
from flux.conditions.control import MapEncoder, check_shape, control_condition
from flux.conditions.fill import fill_condition, fill_images, paste_unmasked
from flux.conditions.kontext import aspect_ratio_to_height_width, kontext_condition, kontext_size
from flux.conditions.redux import ImageEncoder, redux_condition
from flux.images.io import ImageLike, as_rgb, crop_to_fit
from flux.images.masks import take_mask
from flux.images.outpaint import outpaint
from flux.images.sizes import TOKEN, natural_size
from flux.inputs import Condition
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings, SessionSettings
from flux.settings.resolved import SteeredSettings
from flux.specs import get_spec

S = TypeVar("S", bound=ModelSettings)

Given = Mapping[str, Any]
"""Images that a program hands over in place of the files that settings name, by the names of the fields."""


@dataclass(frozen=True, eq=False)
class ConditionImages:
    """The images that steer a run, read and checked.

    Attributes:
        context: Context images, for Kontext.
        filled: The image to fill, of mode RGB, and its mask, of mode "L", white where it is painted anew.
        control: The image whose edges or depth are taken.
        redux: The images to vary.
    """

    context: tuple[Image.Image, ...] = ()
    filled: tuple[Image.Image, Image.Image] | None = None
    control: Image.Image | None = None
    redux: tuple[Image.Image, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.context or self.filled or self.control or self.redux)

    @property
    def mask(self) -> Image.Image | None:
        """The mask of the image to fill."""
        return self.filled and self.filled[1]


@dataclass(frozen=True, eq=False)
class Steering:
    """The effect of a run's images on each pass, and on each image that is decoded.

    Attributes:
        condition: Steers the passes.
        context_every: See `flux.sampling.Conditioning`.
        kept: An image and its mask. Where the mask is black, decoded images get the image's own pixels back.
    """

    condition: Condition = field(default_factory=Condition)
    context_every: int = 1
    kept: tuple[Image.Image, Image.Image] | None = None

    def finish(self, image: Image.Image) -> Image.Image:
        """Return a decoded image with the pixels that are kept."""
        return paste_unmasked(image, *self.kept) if self.kept else image


UNSTEERED = Steering()


def read_conditions(settings: ModelSettings, given: Given | None = None) -> ConditionImages:
    """Read the images that the settings name.

    Image and mask of Fill are scaled and cropped to the size of the run, if that is given.

    Args:
        settings: Settings of any run.
        given: Images in place of files.

    Raises:
        InputError: An image cannot be read, or Fill's image and mask do not go together.
    """
    if not isinstance(settings, ConditionSettings):
        return ConditionImages()
    images: dict[str, Any] = {**settings.named_conditions(), **(given or {})}
    filled = None
    if settings.fill is not None:
        filled = _read_filled(settings, images["fill"], images.get("mask"))
    return ConditionImages(
        _read_all(images.get("context", ())),
        filled,
        as_rgb(images["control"]) if "control" in images else None,
        _read_all(images.get("redux", ())),
    )


def _read_all(given: ImageLike | Sequence[ImageLike]) -> tuple[Image.Image, ...]:
    """Read one image or several."""
    many: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    return tuple(as_rgb(each) for each in many)


def _read_filled(
    settings: ConditionSettings, image: ImageLike, mask: ImageLike | None
) -> tuple[Image.Image, Image.Image] | None:
    """Read the image to fill and its mask. None without such a mask, which `check_conditions` reports."""
    source = as_rgb(image)
    if settings.outpaint is not None:
        source, painted = outpaint(source, settings.outpaint, settings.overlap)
    elif mask is None or settings.mask in ("auto", "none"):
        return None
    else:
        painted = take_mask(mask)
    size = getattr(settings, "width", None), getattr(settings, "height", None)
    if any(size) and painted.size == source.size:
        width, height = ((side or own) // TOKEN * TOKEN for side, own in zip(size, source.size))
        source, painted = (crop_to_fit(each, width, height) for each in (source, painted))
    return fill_images(source, painted)


def sized(settings: S, images: ConditionImages) -> S:
    """Return the settings with the size that the images ask for, where none is given.

    That is the size of the image to fill, one of the control image's shape, or Kontext's preferred size of
    the shape of the first context image. An aspect ratio comes before the last two.

    Raises:
        InputError: The aspect ratio is none, or the control image has another shape than the size.
    """
    if settings.width is None or settings.height is None:
        settings = _with_size_of(images, settings)
    if images.control and settings.width is not None and settings.height is not None:
        check_shape(images.control, settings.width, settings.height)
    return settings


def _with_size_of(images: ConditionImages, settings: S) -> S:
    """Return the settings with the sides that they lack."""
    side = get_spec(settings.model).size
    if images.filled:
        width, height = images.filled[0].size
        return settings.model_copy(update={"width": width, "height": height})
    if isinstance(settings, SessionSettings) and settings.aspect_ratio is not None:
        size = shape = aspect_ratio_to_height_width(settings.aspect_ratio, side**2)
    elif images.control:
        size, shape = natural_size(images.control, side), images.control.size
    elif images.context:
        size = shape = kontext_size(*images.context[0].size, side)
    else:
        return settings
    width, height = size
    if settings.width is not None:
        width, height = settings.width, round(settings.width * shape[1] / shape[0])
    elif settings.height is not None:
        width, height = round(settings.height * shape[0] / shape[1]), settings.height
    return settings.model_copy(update={"width": width, "height": height})


@dataclass(frozen=True)
class Encoders:
    """How images become tensors. The last two load a model once they are called.

    Attributes:
        encode: Encodes pixels to a packed latent.
        load_map: Loads the encoder of control maps. It returns None if control images are maps already.
        load_redux: Loads Redux's encoder.
    """

    encode: Encode
    load_map: Callable[[], MapEncoder | None]
    load_redux: Callable[[], ImageEncoder]


def encode_conditions(images: ConditionImages, settings: SteeredSettings, encoders: Encoders) -> Steering:
    """Encode the images that steer a run.

    Args:
        images: The images.
        settings: How they steer, and the size of the images to make.
        encoders: How the images are encoded.

    Raises:
        InputError: A control image has another shape than the images to make, or a model cannot be loaded.
    """
    condition, kept, encode = Condition(), None, encoders.encode
    if images.context:
        side, method = get_spec(settings.model).size, settings.context_positions
        condition = kontext_condition(encode, images.context, side, method, settings.reference_strength)
    elif images.filled:
        condition = fill_condition(encode, *images.filled)
        kept = images.filled if settings.pastes_unmasked else None
    elif images.control:
        size = settings.width, settings.height
        condition = control_condition(encode, images.control, *size, encoders.load_map())
    if images.redux:
        redux = redux_condition(encoders.load_redux(), images.redux, settings.redux_strength)
        condition = replace(condition, txt=redux.txt)
    return Steering(condition, settings.context_every, kept)
