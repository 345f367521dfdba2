"""FLUX.1 with its layers open: skip them, score them, and edit through the vital ones.

    from flux import Pipeline

    pipe = Pipeline.load("flux-nano")

Importing this package loads nothing: `Pipeline` is read when it is first asked for.
"""

TYPE_CHECKING = False  # typing's own would cost more time than all the rest
if TYPE_CHECKING:
    from flux.front import Pipeline

__all__ = ["Pipeline"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        from importlib import import_module

        return import_module("flux.front").Pipeline
    raise AttributeError(f"module 'flux' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
