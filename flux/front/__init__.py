"""The front door for Python: a model by its name, and an image, an edit or a scan in one call each."""

from flux.front.pipeline import Pipeline

__all__ = ["Pipeline"]
