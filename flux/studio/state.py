"""The state that all parts of the studio share: the model, the limits, the sessions and the folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from flux.bfl import track_usage_via_api
from flux.settings.demos import ModelSettings
from flux.settings.files import with_fields
from flux.settings.resolved import ResolvedModel
from flux.specs import ModelSpec, get_spec
from flux.studio.engine import Engine, MadeImage, Progress, Update
from flux.studio.limits import Limits
from flux.studio.sessions import Run, Session, Sessions

S = TypeVar("S", bound=ModelSettings)
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Studio:
    """The state that all parts of the studio share.

    Attributes:
        engine: The loaded model.
        limits: The largest request that is accepted.
        sessions: What each visitor has made.
        folder: The folder of everything that is written or served.
        track_usage: Whether to report each image to Black Forest Labs, as some licences ask for.
    """

    engine: Engine
    limits: Limits
    sessions: Sessions
    folder: Path
    track_usage: bool = False

    @property
    def defaults(self) -> ResolvedModel:
        """The settings that the studio was started with."""
        return self.engine.settings

    @property
    def spec(self) -> ModelSpec:
        """The spec of the loaded model."""
        return get_spec(self.defaults.model)

    def settings(self, cls: type[S], fields: Mapping[str, Any]) -> S:
        """Makes settings from the studio's defaults and the given fields.

        Args:
            cls: The kind of settings.
            fields: Values by field. A field that is None keeps its default.

        Raises:
            InputError: A value cannot be used.
        """
        return with_fields(cls, self.defaults, fields)

    def run(
        self,
        session: Session,
        settings: ModelSettings,
        work: Callable[[Progress[R], Run], object],
        inputs: Mapping[str, Image.Image] | None = None,
        **about: Any,
    ) -> Iterator[tuple[Update[R], Run]]:
        """Runs the work, and saves each image that it emits.

        Args:
            session: The session that the run belongs to.
            settings: The run's settings, written to its run.json.
            work: The work, called when the model is free.
            inputs: Input images by the settings field that names them.
            about: What else the image files say of themselves.

        Yields:
            Each update, with the run.
        """
        run = session.begin_run(settings, inputs)

        def in_run(progress: Progress[R]) -> None:
            work(progress, run)

        for update in self.engine.run(in_run, session.stop):
            made = update.result
            if isinstance(made, MadeImage):
                run.save(made.name, made.image, made.prompt, made.seed, **about)
                if self.track_usage:
                    track_usage_via_api(self.defaults.model, 1)
            yield update, run
