"""The state that all parts of the studio share: the model, the limits, the sessions and the folder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from flux.bfl import track_usage_via_api
from flux.errors import InputError
from flux.images.given import Images
from flux.settings.demos import ModelSettings
from flux.settings.files import with_fields
from flux.settings.resolved import ResolvedModel
from flux.specs import ModelSpec, get_spec
from flux.studio.callers import Callers
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.line import Job, Line
from flux.studio.progress import MadeImage, Progress, Update
from flux.studio.sessions import Disk, Run, Session, Sessions

S = TypeVar("S", bound=ModelSettings)
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Studio:
    """The state that all parts of the studio share, as far as they serve one of its models.

    Each model has a Studio of its own. They share all but the engine and the limits.

    Attributes:
        engine: The model.
        limits: The largest request that is accepted.
        sessions: What each visitor has made.
        folder: The folder of everything that is written or served.
        track_usage: Whether to report each image to Black Forest Labs, as some licences ask for.
        publish_scans: Whether the layers that a visitor's scan finds become the default of everybody, of
            the studio and of the demos on this machine.
        line: The runs that wait for the model.
        callers: Who is connected.
        disk: How much has been written.
        models: The studio of each model, this one included, by the model's name. The first one's page is at
            the root of the server.
    """

    engine: Engine
    limits: Limits
    sessions: Sessions
    folder: Path
    track_usage: bool = False
    publish_scans: bool = False
    line: Line = field(default_factory=Line)
    callers: Callers = field(default_factory=Callers)
    disk: Disk = field(default_factory=Disk)
    models: dict[str, "Studio"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models[self.defaults.model] = self

    def add(self, engine: Engine) -> "Studio":
        """Serve a further model, in the same line and to the same visitors."""
        return replace(self, engine=engine, limits=Limits.of(get_spec(engine.settings.model)))

    @property
    def defaults(self) -> ResolvedModel:
        """The settings that the model was started with."""
        return self.engine.settings

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model."""
        return get_spec(self.defaults.model)

    @property
    def page(self) -> str:
        """The name of the model's page, as part of its address. The first model's is empty."""
        return "" if self is next(iter(self.models.values())) else self.defaults.model

    def settings(self, cls: type[S], fields: Mapping[str, Any]) -> S:
        """Make settings from the studio's defaults and the given fields.

        Args:
            cls: The kind of settings.
            fields: Values by field. A field that is None keeps its default.

        Raises:
            InputError: A value cannot be used.
        """
        return with_fields(cls, self.defaults, fields)

    def has_own_lora(self, settings: ModelSettings) -> bool:
        """Tell whether a run had a visitor's LoRA, beside those that the studio was started with."""
        return len(settings.lora) > len(self.defaults.lora)

    @contextmanager
    def turn(
        self, caller: str | None, tab: str, address: str | None = None
    ) -> Iterator[tuple[Job, Session, Iterator[Update]]]:
        """Join the line of runs for a caller's tab. If `address` is None, it is the caller's last one.

        Within the block, the session's `stop` is this run's, once its turn has come.

        Returns:
            The place in the line, the caller's session, and the updates of the time until its turn. They end
            early if the run is cancelled: `job.stop` is set then.

        Raises:
            InputError: As `Line.join`.
        """
        address = self.callers.address(caller) if address is None else address
        with self.line.join(caller, tab, address) as job:
            session = self.sessions.of(caller)

            def waiting() -> Iterator[Update]:
                yield from self.line.wait(job)
                if not job.stop.is_set():
                    session.stop = job.stop

            yield job, session, waiting()

    def run(
        self,
        session: Session,
        settings: ModelSettings,
        work: Callable[[Progress[R], Run], object],
        inputs: Mapping[str, Images] | None = None,
        **about: Any,
    ) -> Iterator[tuple[Update[R], Run]]:
        """Run the work, and save each image that it emits.

        Args:
            session: The session that the run belongs to.
            settings: The run's settings, written to its run.json.
            work: The work, called when the model is free.
            inputs: Input images, or lists of them, by the settings field that names them.
            about: What else the image files say of themselves.

        Yields:
            Each update, with the run.
        """
        if not self.disk.has_room():
            raise InputError("The studio's disk quota is used up: try again tomorrow")
        session.make_room(self.limits.visit_bytes)
        run = session.begin_run(settings, inputs)

        def in_run(progress: Progress[R]) -> None:
            work(progress, run)

        try:
            for update in self.engine.run(in_run, session.stop):
                made = update.result
                if isinstance(made, MadeImage):
                    run.save(made.name, made.image, made.prompt, made.seed, **about)
                    if self.track_usage:
                        track_usage_via_api(self.defaults.model, 1)
                yield update, run
        finally:
            if not run.images:  # it was cancelled or refused
                session.remove(run)
