"""Images from prompts, once or in a loop, with the options of upstream's command line.

    python -m flux [--name flux-dev] [--prompt "a dog|a cat"] [--width 1024] [--height 1024] [--loop] [...]
    python -m flux download NAME

The first form writes img_0.jpg, img_1.jpg, ... to output_dir. Further fields of a demo's model (--weights,
--lora, --quantize, ...) may be given too. The second form fetches a model's files in advance.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from flux.settings.demos import SessionSettings

DEFAULT_PROMPT = "a dog wearing a top hat on the grass"


@dataclass
class SamplingOptions:
    """One image to be made, with sizes in pixels.

    If the seed is None, each image gets a new one. If another number is None, the model's own is used.
    """

    prompt: str
    width: int | None
    height: int | None
    num_steps: int | None
    guidance: float | None
    seed: int | None


HELP = """Type a prompt and press Enter. The commands are:
  /w N   width      /h N   height     /n N   steps
  /g X   guidance   /s N   seed (without a number: a new one each time)
  /q     quit       an empty line repeats the last prompt"""


def read_command(line: str, options: SamplingOptions) -> tuple[SamplingOptions, str | None]:
    """Read one line typed in the loop.

    Returns:
        The options after it, and the answer if the line was a command. If that is None, it was a prompt.

    Raises:
        InputError: The command is unknown, or its value is not a number.
    """
    if not line.startswith("/"):
        return (replace(options, prompt=line) if line else options), None
    word, *values = line.split()
    fields = {
        "/w": ("width", int),
        "/h": ("height", int),
        "/n": ("num_steps", int),
        "/g": ("guidance", float),
    }
    try:
        if word == "/s":
            options = replace(options, seed=int(values[0]) if values else None)
            return options, f"seed: {options.seed}"
        name, kind = fields[word]
        options = replace(options, **{name: kind(values[0])})
        return options, f"{name}: {getattr(options, name)}"
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"Got {line!r}. {HELP}") from error


# Fields of a model's settings that `main` has under another name, or no use for.
NOT_OPTIONS = {"model", "batch_size", "metadata"}


def next_index(folder: Path) -> int:
    """Return one more than the highest number of the images img_N.jpg in a folder."""
    numbers = [
        int(match[1])
        for path in folder.glob("img_*.*")
        if (match := re.fullmatch(r"img_(\d+)\.\w+", path.name))
    ]
    return max(numbers, default=-1) + 1


def reserve_path(folder: Path) -> Path:
    """Create the next img_N.jpg, still empty, so that no other process takes the same number.

    Raises:
        InputError: The folder cannot be written to.
    """
    number = next_index(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"img_{number}.jpg"
            try:
                path.touch(exist_ok=False)
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"Cannot write to {folder} ({error.strerror}): name another folder") from error


def save_sample(
    nsfw_classifier: Callable | None, name: str, output_name: str, idx: int, x: "Tensor",
    add_sampling_metadata: bool, prompt: str, track_usage: bool = False,
) -> int:  # fmt: skip
    """Watermark an image and save it, as upstream's `save_image` does.

    Args:
        nsfw_classifier: Called with the image, returns scores with "label" and "score". An image that it
            finds unsafe is not saved. If None, nothing is checked.
        name: Name of the model.
        output_name: Path with {idx} in it.
        idx: Number of the image.
        x: The image, "1 3 h w" in -1..1.
        add_sampling_metadata: Whether model and prompt are written into the file.
        prompt: The prompt.
        track_usage: Whether the image is reported to BFL.

    Returns:
        The next index: idx + 1 if the image was saved, else idx.
    """
    from flux.bfl import track_usage_via_api
    from flux.images.io import save_image, to_pil
    from flux.images.watermark import embed_watermark

    image = to_pil(embed_watermark(x.float().clamp(-1, 1))[0])
    if nsfw_classifier is not None:
        scores = {entry["label"]: entry["score"] for entry in nsfw_classifier(image)}
        if scores.get("nsfw", 0.0) >= 0.85:
            print("The image may be unsafe for work and was not saved")
            return idx
    path = Path(output_name.format(idx=idx))
    save_image(image, path, {"model": name, "prompt": prompt} if add_sampling_metadata else None)
    if track_usage:
        track_usage_via_api(name, 1)
    return idx + 1


def main(
    name: str = "flux-nano", width: int | None = None, height: int | None = None, seed: int | None = None,
    prompt: str = DEFAULT_PROMPT, device: str = "auto", num_steps: int | None = None, loop: bool = False,
    guidance: float | None = None, offload: bool | str = False, output_dir: str = "output",
    add_sampling_metadata: bool = True, track_usage: bool = False,
    init_image: str | None = None, strength: float = 0.8,
    true_cfg: float | None = None, negative_prompt: str = "", **model: Any,
) -> None:  # fmt: skip
    """Make images and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, one of flux.util.configs, or of flux.specs.HOSTED (key in BFL_API_KEY)
        width: width in pixels, rounded down to a multiple of 16; if not set, the model's own
        height: height in pixels, likewise
        seed: seed of the first image, each later one's is one higher; if not set, each image gets a new one
        prompt: what to show; several prompts, with | between them, make several images
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        num_steps: number of denoising steps; if not set, the model's own
        loop: ask for further prompts on the terminal
        guidance: distilled guidance; if not set, the model's own
        offload: keep each model in main memory until it is used; or "blocks", "auto" as in the demos
        output_dir: folder to write to
        add_sampling_metadata: write prompt and model into the files
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        init_image: start from this image: image-to-image; it is scaled and cropped to width and height
        strength: how much of the schedule then runs, above 0 and at most 1; 1 keeps nothing of the image
        true_cfg: true CFG away from negative_prompt, above 1
        negative_prompt: what true CFG leads away from
        model: more fields of a model's settings
    """
    with exit_on_input_error():
        from flux.files import check_folder
        from flux.settings.demos import SessionSettings
        from flux.settings.files import check_settings
        from flux.specs import HOSTED

        options = SamplingOptions(prompt, width, height, num_steps, guidance, seed)
        fields = {
            "device": device,
            "offload": offload,
            "true_cfg": true_cfg,
            "negative_prompt": negative_prompt,
            "output_dir": output_dir,
            "init_image": init_image,
            "strength": strength,
            **model,
        }
        settings = check_settings(
            SessionSettings, {"model": name, **fields, "seed": seed, **numbers_of(options)}
        )
        check_folder(settings.output_dir)
        saving = Path(settings.output_dir), add_sampling_metadata, track_usage
        if name not in HOSTED:
            LocalSession(name, *saving, settings).run(options, loop)
        elif init_image or true_cfg or negative_prompt or track_usage or model:
            given = "".join(f", {field}" for field in model)
            raise InputError(
                f"Got init_image, true_cfg, negative_prompt, track_usage{given} for {name}, which is not run "
                "here: it takes prompt, seed, width and height, some models num_steps and guidance too"
            )
        else:
            HostedSession(name, *saving).run(options, loop)


class PromptSession:
    """Makes one image after another by one model and saves them as img_N.jpg.

    Args:
        name: Name of the model.
        output_dir: Folder to write to.
        metadata: Whether the prompt and the settings are written into the files.
        track_usage: Whether each image is reported to BFL.
    """

    def __init__(self, name: str, output_dir: Path, metadata: bool, track_usage: bool):
        self.name, self.output_dir, self.metadata, self.track_usage = name, output_dir, metadata, track_usage
        self.seed: int | None = None

    def run(self, options: SamplingOptions, loop: bool) -> None:
        """Make an image of each prompt in the options, and in a loop of each one typed after them.

        Raises:
            InputError: An option cannot be used.
        """
        self.use(options)
        prompts = [text.strip() for text in options.prompt.split("|") if text.strip()]
        if not prompts:
            raise InputError("Got an empty prompt: say what to show")
        self.load()
        if loop:
            print(HELP)
        for prompt in prompts:
            self.generate(prompt)
        options = replace(options, prompt=prompts[-1])
        while loop and (answer := ask(replace(options, seed=self.seed), self.use)):
            options = answer
            try:
                self.generate(options.prompt)
            except InputError as error:
                print(f"error: {error}")

    def generate(self, prompt: str) -> None:
        """Make, save and report one image; the next one's seed is one higher."""
        from flux.bfl import track_usage_via_api
        from flux.images.io import save_image

        seed = self.seed if self.seed is not None else time.time_ns() % 2**32
        begin = time.perf_counter()
        image = self.draw(prompt, seed)
        about = {"model": self.name, "prompt": prompt, "seed": seed, **self.about()}
        path = reserve_path(self.output_dir)
        try:
            save_image(image, path, about if self.metadata else None)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if self.track_usage:
            track_usage_via_api(self.name, 1)
        print(f"{path}  seed {seed}  {time.perf_counter() - begin:.1f} s")
        if self.seed is not None:
            self.seed = (self.seed + 1) % 2**63  # as high as a seed may be

    def use(self, options: SamplingOptions) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.settings.demos import SessionSettings
        from flux.settings.files import check_settings

        check_settings(SessionSettings, {"seed": options.seed, **numbers_of(options)})
        self.seed = options.seed

    def load(self) -> None:
        """Prepare the model for the options in use."""

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """Return the numbers in use, for the image's metadata."""
        raise NotImplementedError


class LocalSession(PromptSession):
    """A session with a model that runs here.

    Args:
        name: Name of the model.
        output_dir: Folder to write to.
        metadata: Whether the prompt and the settings are written into the files.
        track_usage: Whether each image is reported to BFL.
        settings: The model and how it runs, what to start from, and the first options.
    """

    def __init__(
        self,
        name: str,
        output_dir: Path,
        metadata: bool,
        track_usage: bool,
        settings: "SessionSettings",
    ):
        super().__init__(name, output_dir, metadata, track_usage)
        self.given, self.init_image, self.strength = settings, settings.init_image, settings.strength
        self.warned: set[str] = set()

    def use(self, options: SamplingOptions) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.settings.complete import resolve
        from flux.settings.effect import settings_warnings
        from flux.specs import get_spec

        super().use(options)
        settings = self.given.model_copy(update=numbers_of(options))
        self.settings = resolve(settings)
        for line in settings_warnings(settings, get_spec(self.name)):
            if line not in self.warned:
                print(f"warning: {line}", file=sys.stderr)
                self.warned.add(line)

    def load(self) -> None:
        """Read the image to start from and load the model."""
        from flux.images.io import read_image
        from flux.pipeline import Pipeline

        self.image = read_image(self.init_image) if self.init_image else None
        self.pipe = Pipeline.load(self.settings)

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        from flux.images.io import crop_to_fit

        settings = self.settings
        start = crop_to_fit(self.image, settings.width, settings.height) if self.image else None
        sampling = {"image": start, "strength": self.strength, **settings.sampling()}
        return self.pipe.generate([prompt], [seed], **sampling)[0]

    def about(self) -> dict[str, Any]:
        """Return the numbers in use, for the image's metadata."""
        start = {"init_image": self.init_image, "strength": self.strength} if self.init_image else {}
        return {**self.settings.sampling(), **start}


class HostedSession(PromptSession):
    """A session with a model that only Black Forest Labs runs."""

    def use(self, options: SamplingOptions) -> None:
        """Make the next images with these options. Raises InputError if the model cannot use them."""
        from flux.bfl import HostedSettings

        super().use(options)
        self.settings = HostedSettings(self.name, **numbers_of(options))

    def draw(self, prompt: str, seed: int) -> "Image":
        """Return one image with the options in use."""
        from flux.bfl import generate

        return generate(self.settings, prompt, seed)

    def about(self) -> dict[str, Any]:
        """Return the numbers in use, for the image's metadata."""
        return self.settings.sampling()


def numbers_of(options: SamplingOptions) -> dict[str, Any]:
    """Return the options that are fields of a model's settings."""
    return {name: getattr(options, name) for name in ("width", "height", "num_steps", "guidance")}


def ask(options: SamplingOptions, use: Callable[[SamplingOptions], None]) -> SamplingOptions | None:
    """Ask for the next prompt on the terminal, and answer the commands before it.

    Args:
        options: The options so far.
        use: Called with the options after each command. Options that raise InputError are not kept.

    Returns:
        The options for the next image. If None, the user has quit.
    """
    while True:
        try:
            line = input("prompt> ").strip()
        except EOFError:
            return None
        if line in ("/q", "/quit"):
            return None
        try:
            changed, answer = read_command(line, options)
            if answer is not None:
                use(changed)
            options = changed
        except InputError as error:
            answer = str(error)
        if answer is None:
            return options
        print(answer)


def fetch_model(name: str) -> None:
    """Fetch a model's files in advance and print where they are.

    Args:
        name: the model, one of flux.util.configs
    """
    with exit_on_input_error():
        from flux.weights.hub import download

        download(name)


def app() -> None:
    """Run `python -m flux` and the `flux` command. Upstream's sub-command t2i may be named or left out."""
    from flux.settings.command_line import run
    from flux.settings.demos import ModelSettings

    first = sys.argv[1:2]
    if first == ["download"]:
        run(fetch_model, __doc__, positional="name", arguments=sys.argv[2:])
    else:
        fields = {
            name: field for name, field in ModelSettings.model_fields.items() if name not in NOT_OPTIONS
        }
        run(main, __doc__, fields, arguments=sys.argv[2:] if first == ["t2i"] else sys.argv[1:])
