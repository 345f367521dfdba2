"""The former name of `flux.loaded_model`. `flux.Pipeline`, in `flux/front/`, is another class."""

from flux.loaded_model import LoadedModel, count_evaluations
from flux.sessions.batches import batch_name, generate_all

__all__ = ["Pipeline", "batch_name", "count_evaluations", "generate_all"]

Pipeline = LoadedModel
