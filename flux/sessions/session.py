"""Sessions: one image after another by one model, saved as img_0.jpg, img_1.jpg, ..."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flux.errors import InputError
from flux.sessions.files import reserve_path
from flux.sessions.options import SamplingOptions, ask, help_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from flux.loaded_model import LoadedModel
    from flux.settings.demos import SessionSettings

Options = TypeVar("Options", bound=SamplingOptions)
UPSTREAM_EXAMPLES = {"assets/cup.png", "assets/cup_mask.png", "assets/robot.webp"}
"""The defaults of upstream's options for images. Only a checkout of its repository has these files."""
HOSTED_TAKES = ("prompt", "seed", "width", "height", "num_steps", "guidance")

# Fields of a model's settings that the programs have under another name, or no use for.
NOT_OPTIONS = {"model", "batch_size", "metadata"}


@dataclass(frozen=True)
class CommandOptions:
    """The options of a command that hold for all its images.

    Attributes:
        device: Where the model runs.
        offload: What waits in main memory.
        output_dir: Folder to write to.
        loop: Whether to ask for further prompts.
        add_sampling_metadata: Whether prompt and settings are written into the files.
        track_usage: Whether each image is reported to BFL.
    """

    device: str
    offload: bool | str
    output_dir: str
    loop: bool
    add_sampling_metadata: bool
    track_usage: bool


class PromptSession(Generic[Options]):
    """Makes one image after another by one model and saves them as img_N.jpg.

    Args:
        name: Name of the model.
        how: The options of the command.
    """

    def __init__(self, name: str, how: CommandOptions):
        self.name, self.how = name, how
        self.seed: int | None = None

    def run(self, options: Options) -> None:
        """Make an image of each prompt in the options, and in a loop of each one typed after them.

        Raises:
            InputError: An option cannot be used.
        """
        self.use(options)
        prompts = [text.strip() for text in options.prompt.split("|") if text.strip()]
        if not prompts and self.needs_prompt:
            raise InputError("Got an empty prompt: say what to show")
        self.load()
        if self.how.loop:
            print(help_of(options))
        prompts = prompts or [""]
        for prompt in prompts:
            self.generate(prompt)
        options = replace(options, prompt=prompts[-1])
        while self.how.loop and (answer := ask(replace(options, seed=self.seed), self.use)):
            options = answer
            try:
                self.generate(options.prompt)
            except InputError as error:
                print(f"error: {error}")

    @property
    def needs_prompt(self) -> bool:
        """Whether there is nothing to show without a prompt."""
        return True

    def generate(self, prompt: str) -> None:
        """Make, save and report one image; the next one's seed is one higher."""
        from flux.bfl import track_usage_via_api
        from flux.images.io import save_image

        seed = self.seed if self.seed is not None else time.time_ns() % 2**32
        begin = time.perf_counter()
        image = self.draw(prompt, seed)
        about = {"model": self.name, "prompt": prompt, "seed": seed, **self.about()}
        path = reserve_path(Path(self.how.output_dir))
        try:
            save_image(image, path, about if self.how.add_sampling_metadata else None)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if self.how.track_usage:
            track_usage_via_api(self.name, 1)
        print(f"{path}  seed {seed}  {time.perf_counter() - begin:.1f} s")
        if self.seed is not None:
            self.seed = (self.seed + 1) % 2**63  # as high as a seed may be

    def use(self, options: Options) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.settings.demos import SessionSettings
        from flux.settings.files import check_settings

        check_settings(SessionSettings, {"seed": options.seed, **options.numbers()})
        self.seed = options.seed

    def load(self) -> None:
        """Prepare the model for the options in use."""

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """Return the numbers in use, for the image's metadata."""
        raise NotImplementedError


class LocalSession(PromptSession[Options]):
    """A session with a model that runs here.

    Args:
        name: Name of the model.
        how: The options of the command.
        settings: The model and how it runs, what to start from, and the first options.
    """

    pipe: "LoadedModel"
    loaded: "SessionSettings | None"

    def __init__(self, name: str, how: CommandOptions, settings: "SessionSettings"):
        super().__init__(name, how)
        self.given = settings
        self.steered: LoadedModel | None = None
        self.warned: set[str] = set()

    @property
    def needs_prompt(self) -> bool:
        """Whether there is nothing to show without a prompt: Redux's images are enough."""
        return not self.settings.redux

    def use(self, options: Options) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.conditions.images import read_conditions, sized
        from flux.settings.complete import resolve
        from flux.settings.demos import SessionSettings
        from flux.settings.effect import settings_warnings
        from flux.settings.files import check_settings
        from flux.specs import get_spec

        super().use(options)
        spec = get_spec(self.name)
        settings = check_settings(SessionSettings, {**self.given.model_dump(), **options.as_settings()})
        images = read_conditions(settings)
        self.settings = resolve(sized(settings, images))
        self.images, self.steered = images, None
        for line in settings_warnings(settings, spec):
            if line not in self.warned:
                print(f"warning: {line}", file=sys.stderr)
                self.warned.add(line)

    def load(self) -> None:
        """Read the image to start from and load the model, in place of an earlier one."""
        from flux.images.io import read_image
        from flux.loaded_model import LoadedModel

        start = self.given.init_image
        self.image = read_image(start) if start else None
        vars(self).pop("pipe", None)  # two models may not fit into memory
        self.loaded = None
        self.pipe, self.loaded = LoadedModel.load(self.settings), self.settings

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        from flux.images.io import crop_to_fit

        settings = self.settings
        if self.loaded is None or settings.lora_scale != self.loaded.lora_scale:  # it is in the weights
            self.load()
        if self.steered is None:
            self.steered = self.pipe.steered(self.images, settings)
        start = crop_to_fit(self.image, settings.width, settings.height) if self.image else None
        sampling = {"image": start, "strength": settings.strength, **settings.sampling()}
        return self.steered.generate([prompt], [seed], **sampling)[0]

    def about(self) -> dict[str, Any]:
        """Return the numbers and images in use, for the image's metadata."""
        settings = self.settings
        start = {"init_image": settings.init_image, "strength": settings.strength}
        return {
            **settings.sampling(),
            **(start if settings.init_image else {}),
            **settings.named_conditions(),
        }


class HostedSession(PromptSession[Options]):
    """A session with a model that only Black Forest Labs runs."""

    def use(self, options: Options) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.bfl import HostedSettings

        super().use(options)
        self.settings = HostedSettings(self.name, **options.numbers())

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        from flux.bfl import generate

        return generate(self.settings, prompt, seed)

    def about(self) -> dict[str, Any]:
        """Return the numbers in use, for the image's metadata."""
        return self.settings.sampling()


def run_session(name: str, options: SamplingOptions, how: CommandOptions, fields: Mapping[str, Any]) -> None:
    """Make the images of a command.

    Args:
        name: The model.
        options: The options of the first images.
        how: The options that hold for all images.
        fields: More fields of the settings, such as `quantize`.

    Raises:
        InputError: A value cannot be used. It is raised before a model is loaded.
    """
    from flux.files import check_folder
    from flux.settings.demos import SessionSettings
    from flux.settings.files import check_settings
    from flux.specs import HOSTED

    _check_images_named(options)
    placed = {"device": how.device, "offload": how.offload, "output_dir": how.output_dir}
    settings = check_settings(SessionSettings, {"model": name, **placed, **fields, **options.as_settings()})
    check_folder(settings.output_dir)
    how = replace(how, output_dir=settings.output_dir)
    if name not in HOSTED:
        LocalSession(name, how, settings).run(options)
        return
    usual = SessionSettings.model_fields
    given = [each for each in fields if each in usual and fields[each] != usual[each].default]
    given = [each for each in given if each not in HOSTED_TAKES]
    if given or how.track_usage:
        got = ", ".join([*given, *["track_usage"] * how.track_usage])
        raise InputError(
            f"Got {got} for {name}, which is not run here: it takes prompt, seed, width and height, some "
            "models num_steps and guidance too"
        )
    HostedSession(name, how).run(options)


def _check_images_named(options: SamplingOptions) -> None:
    """Raise InputError if an image is upstream's example, the option's default, which is not here."""
    for option in ("img_cond_path", "img_mask_path"):
        paths = getattr(options, option, None) or ()
        for path in [paths] if isinstance(paths, str) else paths:
            if path in UPSTREAM_EXAMPLES and not Path(path).exists():
                raise InputError(f"Got no {option}: name the image (upstream's {path} is not here)")
