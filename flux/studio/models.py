"""The models that one studio serves: which they are, and what a visitor reads about each."""

from collections.abc import Sequence

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.find import find_model, find_redux

RUNNING = ("device", "dtype", "offload", "quantize", "t5", "tiled", "compile")
"""The fields that say how a model runs. All models of a studio share them."""
FILES = ("weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "redux_weights")
"""The fields that name files. Models of one family share them."""
TITLES = {
    "kontext": "changes an image as an instruction says",
    "fill": "paints a part of an image anew, or what lies around it",
    "canny": "draws with the edges of an image",
    "depth": "draws with the depth of an image",
    "redux": "varies an image",
}


def about_model(spec: ModelSpec) -> str:
    """Say in a few words what a model does for a visitor."""
    if spec.condition is None:
        return f"draws prompts and edits them, in {spec.num_steps} steps"
    return TITLES[spec.control or spec.condition]


def settings_beside(settings: ModelSettings, name: str) -> ModelSettings:
    """Make the settings of a further model: it runs as the first one, with the files that both share.

    Raises:
        InputError: There is no such model.
    """
    shared = (*RUNNING, *FILES) if _family(get_spec(name)) == _family(get_spec(settings.model)) else RUNNING
    fields = {field: getattr(settings, field) for field in shared}
    return check_settings(ModelSettings, {**fields, "model": name})


def models_beside(
    settings: ModelSettings, names: Sequence[str] | None, is_public: bool
) -> list[ModelSettings]:
    """Find the models that a studio serves beside its first one.

    Args:
        settings: The first model.
        names: The models that the operator names. If None, those that share the first one's transformer and
            whose other files are on this machine; but none if the studio is public, where each visitor's
            model takes the time of all.
        is_public: Whether others than this machine's user can open the page.

    Raises:
        InputError: A named model does not exist, or its files are not on this machine, or wrong.
    """
    if names is not None:
        others = [settings_beside(settings, name) for name in dict.fromkeys(names) if name != settings.model]
        for other in others:
            check_files(other)
        return others
    if is_public:
        return []
    family = _family(get_spec(settings.model))
    siblings = [name for name, spec in configs.items() if name != settings.model and _family(spec) == family]
    return [other for name in siblings if _is_here(other := settings_beside(settings, name))]


def check_files(settings: ModelSettings) -> None:
    """Check that all files of a model are on this machine. Reads headers only.

    Raises:
        InputError: One is not, or is wrong.
    """
    find_model(settings, download=False).check()
    spec = get_spec(settings.model)
    if spec.condition == "redux":
        find_redux(spec, settings.redux_weights, download=False)


def _is_here(settings: ModelSettings) -> bool:
    try:
        check_files(settings)
    except InputError:
        return False
    return True


def _family(spec: ModelSpec) -> tuple[object, ...]:
    """The transformer's file that a model begins with."""
    return spec.folder, spec.repo_id, spec.repo_flow
