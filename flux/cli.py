"""`python -m flux`: pictures from prompts, once or in a loop, as upstream's command line does it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flux.bfl import track_usage_via_api
from flux.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_PROMPT = "a dog wearing a top hat on the grass"


@dataclass
class SamplingOptions:
    """One picture to be made. Sizes in pixels; a seed of None is drawn anew for each picture."""

    prompt: str
    width: int
    height: int
    num_steps: int
    guidance: float
    seed: int | None


HELP = """Type a prompt and press Enter. Beside that:
  /w N   width      /h N   height     /n N   steps
  /g X   guidance   /s N   seed (without a number: a new one each time)
  /q     quit       an empty line repeats the last prompt"""


def read_command(line: str, options: SamplingOptions) -> tuple[SamplingOptions, str | None]:
    """The options after one line typed in the loop, and what to tell the user if the line was no prompt.

    Raises:
        InputError: an unknown command, or a value that is no number.
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


def next_index(folder: Path) -> int:
    """One more than the highest number of the pictures img_N.jpg in a folder."""
    numbers = [
        int(match[1])
        for path in folder.glob("img_*.*")
        if (match := re.fullmatch(r"img_(\d+)\.\w+", path.name))
    ]
    return max(numbers, default=-1) + 1


def save_sample(
    nsfw_classifier: Callable | None, name: str, output_name: str, idx: int, x: "Tensor",
    add_sampling_metadata: bool, prompt: str, track_usage: bool = False,
) -> int:  # fmt: skip
    """Marks a picture, "1 3 h w" in -1..1, and saves it: upstream's `save_image`.

    Args:
        nsfw_classifier: called with the picture, returns scores with "label" and "score"; None: nothing is
            checked. A picture it finds unsafe is not saved.
        output_name: path with {idx} in it.

    Returns:
        The next index: idx + 1 if the picture was saved, else idx.
    """
    from flux.images.io import save_image, to_pil
    from flux.images.watermark import embed_watermark

    picture = to_pil(embed_watermark(x.float().clamp(-1, 1))[0])
    if nsfw_classifier is not None:
        scores = {entry["label"]: entry["score"] for entry in nsfw_classifier(picture)}
        if scores.get("nsfw", 0.0) >= 0.85:
            print("The picture may be unsafe for work and was not saved")
            return idx
    path = Path(output_name.format(idx=idx))
    save_image(picture, path, {"model": name, "prompt": prompt} if add_sampling_metadata else None)
    if track_usage:
        track_usage_via_api(name, 1)
    return idx + 1


def main(
    name: str = "flux-nano", width: int | None = None, height: int | None = None, seed: int | None = None,
    prompt: str = DEFAULT_PROMPT, device: str = "auto", num_steps: int | None = None, loop: bool = False,
    guidance: float | None = None, offload: bool | str = False, output_dir: str = "output",
    add_sampling_metadata: bool = True, track_usage: bool = False,
    init_image: str | None = None, strength: float = 0.8,
    true_cfg: float | None = None, negative_prompt: str = "",
) -> None:  # fmt: skip
    """Makes pictures and saves them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, one of `flux.util.configs`, or of `flux.bfl.HOSTED` (key in BFL_API_KEY).
        width: in pixels, rounded down to a multiple of 16; the model's own by default, like height,
            num_steps, guidance.
        seed: of the first picture, each further one's is one higher; drawn anew if not given.
        prompt: what to show; several, with | between them, make several pictures.
        loop: ask for further prompts on the terminal.
        offload: keep each net in host memory until its turn comes; or "blocks", "auto", see flux.settings.demos.
        add_sampling_metadata: write prompt and model into the file.
        track_usage: report each picture to BFL (licensed users; key in BFL_API_KEY).
        init_image: start from this picture: image-to-image. It is scaled and cropped to width and height.
        strength: how much of the schedule then runs, above 0 and at most 1; 1 keeps nothing of the picture.
        true_cfg: two-pass guidance away from negative_prompt, above 1.
    """
    with exit_on_input_error():
        _run(
            SamplingOptions(str(prompt), width, height, num_steps, guidance, seed),
            loop=loop,
            output_dir=Path(output_dir),
            metadata=add_sampling_metadata,
            track_usage=track_usage,
            init_image=init_image,
            strength=strength,
            model={"model": name, "device": device, "offload": offload},
            steering={"true_cfg": true_cfg, "negative_prompt": str(negative_prompt)},
        )


def _run(
    options: SamplingOptions,
    *,
    loop: bool,
    output_dir: Path,
    metadata: bool,
    track_usage: bool,
    init_image: str | None,
    strength: float,
    model: dict,
    steering: dict,
) -> None:
    from flux.bfl import HOSTED, Hosted, HostedSettings
    from flux.settings.demos import ModelSettings
    from flux.settings.files import check_settings

    hosted = model["model"] in HOSTED
    if hosted and (init_image or steering["true_cfg"] or steering["negative_prompt"] or track_usage):
        raise InputError(
            f"Got init_image, true_cfg, negative_prompt or track_usage for {model['model']}, which is not "
            "run here: it takes prompt, seed, width and height, some models num_steps and guidance too"
        )

    def checked(options: SamplingOptions) -> ModelSettings | HostedSettings:
        fields = ("width", "height", "num_steps", "guidance")
        if hosted:
            return HostedSettings(model["model"], **{field: getattr(options, field) for field in fields})
        from flux.settings.complete import resolve

        return resolve(
            check_settings(ModelSettings, {**model, **steering, **{f: getattr(options, f) for f in fields}})
        )

    settings = checked(options)
    if not 0 < strength <= 1:
        raise InputError(f"Got strength {strength}, expected a number above 0 and at most 1")
    prompts = [text.strip() for text in options.prompt.split("|") if text.strip()]
    if not prompts:
        raise InputError("Got an empty prompt: say what to show")

    from flux.images.io import crop_to_fit, read_image, save_image

    image = read_image(init_image) if init_image else None
    started = {"init_image": init_image, "strength": strength} if init_image else {}
    if hosted:
        pipe = Hosted(settings.model)
    else:
        from flux.pipeline import Pipeline

        pipe = Pipeline.load(settings)
    index = next_index(output_dir)
    if loop:
        print(HELP)
    while True:
        for text in prompts:
            seed = options.seed if options.seed is not None else time.time_ns() % 2**32
            begin = time.perf_counter()
            start = crop_to_fit(image, settings.width, settings.height) if image else None
            [picture] = pipe.generate([text], [seed], image=start, strength=strength, **settings.sampling())
            path = output_dir / f"img_{index}.jpg"
            about = {"model": settings.model, "prompt": text, "seed": seed, **settings.sampling(), **started}
            save_image(picture, path, about if metadata else None)
            if track_usage:
                track_usage_via_api(settings.model, 1)
            print(f"{path}  seed {seed}  {time.perf_counter() - begin:.1f} s")
            index += 1
            if options.seed is not None:
                options = replace(options, seed=options.seed + 1)
        if not loop:
            return
        answer = ask(replace(options, prompt=prompts[-1]))
        if answer is None:
            return
        options, settings, prompts = answer, checked(answer), [answer.prompt]


def ask(options: SamplingOptions) -> SamplingOptions | None:
    """The options for the next picture, from the terminal; None: the user has had enough."""
    while True:
        try:
            line = input("prompt> ").strip()
        except EOFError:
            return None
        if line in ("/q", "/quit"):
            return None
        try:
            options, answer = read_command(line, options)
        except InputError as error:
            answer = str(error)
        if answer is None:
            return options
        print(answer)


def fetch_model(name: str) -> None:
    """Fetches a model's files ahead of its first use, and says where they lie."""
    with exit_on_input_error():
        from flux.weights.hub import download

        download(name)


def app() -> None:
    """Entry point of `python -m flux` and of the `flux` command; upstream's sub-command t2i may be named or
    left out.
    """
    import sys

    import fire

    arguments = sys.argv[1:]
    if arguments[:1] == ["download"]:
        return fire.Fire(fetch_model, command=arguments[1:], name="python -m flux download")
    if arguments[:1] == ["t2i"]:
        arguments = arguments[1:]
    fire.Fire(main, command=arguments, name="python -m flux")
    return None
