"""The steps of one image as a film: the predicted clean image of each step, and sheets that show them all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flux.attention.sheets import layers_sheet, words_sheet
from flux.attention.tokens import prompt_words
from flux.attention.watch import StepAttention
from flux.images.io import save_animation
from flux.images.sheets import grid
from flux.loaded_model import LoadedModel
from flux.sampling import Step

COLUMNS = 7  # steps in a row of the sheet
SECONDS_PER_FRAME = 0.25


@dataclass(frozen=True, eq=False)
class Film:
    """One image's way from noise, decoded.

    Attributes:
        prompt: What the image shows.
        levels: The noise level at which each step begins.
        noisy: The latent of each step, decoded.
        clean: The clean image that each step predicts.
        final: The finished image.
        attention: The watched steps' attention, empty if none was watched.
        num_double: Number of double-stream layers of the model.
    """

    prompt: str
    levels: list[float]
    noisy: list[Image.Image]
    clean: list[Image.Image]
    final: Image.Image
    attention: Sequence[StepAttention]
    num_double: int

    @classmethod
    def of(
        cls,
        pipe: LoadedModel,
        prompt: str,
        steps: Sequence[Step],
        attention: Sequence[StepAttention],
        final: Image.Image,
        on_step: Callable[[], object] | None = None,
    ) -> "Film":
        """Decode the steps that `flux.attention.watch.watch` returned, with their attention.

        Args:
            pipe: The models that made the image.
            prompt: What the image shows.
            steps: All steps.
            attention: The attention of the watched steps.
            final: The last latent, decoded; the film has its size.
            on_step: Called after each step is decoded. An exception from it ends the work.
        """
        noisy, clean = [], []
        for step in steps:
            noisy += pipe.decode(step.noisy, *final.size)
            clean += pipe.decode(step.clean, *final.size)
            if on_step:
                on_step()
        levels = [step.t for step in steps]
        return cls(prompt, levels, noisy, clean, final, attention, pipe.spec.params.depth)

    def save(self, path: str | Path) -> None:
        """Write the predicted clean images and the final one as a GIF or WebP, by the name's suffix."""
        save_animation([*self.clean, self.final], path, SECONDS_PER_FRAME)

    def sheets(self) -> Iterator[tuple[str, Image.Image]]:
        """Draw the sheets one by one, each with its name.

        Yields:
            "steps", all steps noisy and clean. If attention was watched, "layers" (what image tokens attend
            to) and, for a prompt with words, "words" (the attention between each word and the image).
        """
        yield "steps", self._steps_sheet()
        if self.attention:
            yield "layers", layers_sheet(self.final, self.attention, self.num_double)
            if prompt_words(self.prompt):
                yield "words", words_sheet(self.final, self.attention, self.num_double)

    def _steps_sheet(self) -> Image.Image:
        titles = [*(f"step {index}, t = {t:.2f}" for index, t in enumerate(self.levels)), "end"]
        rows = {"noisy": [*self.noisy, self.final], "predicted clean": [*self.clean, self.final]}
        images, captions, row_titles = [], [], []
        for start in range(0, len(titles), COLUMNS):
            columns = slice(start, start + COLUMNS)
            for title, row in rows.items():
                images.append(row[columns])
                captions.append(titles[columns])
                row_titles.append(title)
        return grid(images, captions, row_titles)
