"""Small edits: settings, images and how far these are apart."""

from PIL import Image

from flux.editing.edit import Edits, edit
from flux.editing.photo import Photograph
from flux.loaded_model import LoadedModel
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedEdit

DOG = "a dog on the grass"
EDITS = ["a cat on the grass", "a dog wearing a top hat on the grass", "a dog in the snow"]
WIDTH, HEIGHT, STEPS = 96, 64, 5
TOKENS = WIDTH * HEIGHT // 256
LAYERS = (0, 1, 2, 3, 4)
ONE = {"edits": EDITS[:1]}


def settings(**changes) -> ResolvedEdit:
    """Small and quick, with two passes; the paper's dose unless another is named."""
    given = {"prompt": DOG, "edits": EDITS, "dose": "paper", "width": WIDTH, "height": HEIGHT, "seed": 3}
    given |= {"num_steps": STEPS, "guidance": 3.5, "true_cfg": 2.5, "device": "cpu"}
    return resolve(check_settings(EditSettings, given | changes))


def make(pipe: LoadedModel, photo=None, layers=LAYERS, mask=None, on_step=None, **changes) -> Edits:
    """A reference and its edits, with the small settings above."""
    return edit(pipe, settings(**changes), layers, photo, mask, on_step, progress=False)


def half_mask(size=(WIDTH, HEIGHT)) -> Image.Image:
    """White on the left half."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def through(pipe: LoadedModel, photo: Image.Image) -> Image.Image:
    """Encodes and decodes a photograph's part."""
    return pipe.decode(pipe.encode(Photograph.of(photo, WIDTH, HEIGHT).part), WIDTH, HEIGHT)[0]
