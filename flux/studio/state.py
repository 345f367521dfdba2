"""What all tabs of the page share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flux.bfl import track_usage_via_api
from flux.settings.complete import complete
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.specs import ModelSpec, get_spec
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Visits

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Studio:
    """What all tabs of the page share.

    Attributes:
        defaults: complete settings of the model that is loaded.
        folder: everything that is written or served lies in it.
        track_usage: report each picture to Black Forest Labs, as some licences ask for.
    """

    engine: Engine
    limits: Limits
    visits: Visits
    folder: Path
    track_usage: bool = False

    @property
    def defaults(self) -> ModelSettings:
        return self.engine.settings

    @property
    def spec(self) -> ModelSpec:
        return get_spec(self.defaults.model)

    def checked(self, cls: type, fields: dict[str, Any]) -> Any:
        """Complete settings of that kind: the studio's model and the given fields, within the limits.

        Raises InputError where they cannot be used.
        """
        defaults = self.defaults.model_dump(exclude={"output_dir"})
        given = {name: value for name, value in fields.items() if value is not None}
        settings = complete(check_settings(cls, {**defaults, **given}))
        self.limits.check_size(settings)
        return settings

    def count(self, pictures: int) -> None:
        """Reports that many new pictures, if they are to be reported."""
        if self.track_usage and pictures:
            track_usage_via_api(self.defaults.model, pictures)
