"""The demands of a run that decide how much memory it needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The demands that a run makes on the models, beyond the size of its images and the number of steps.

    Attributes:
        batch: Number of images sampled at once.
        interleaved: Number of images whose steps are interleaved, batch by batch. All of them hold their
            context's keys and values at the same time. If None, the images of one batch.
        kept_layers: Number of layers whose image kv a reference keeps for its edits. None stands for all the
            vital layers of the model.
        keeps_queries: Whether it keeps their image queries too.
        keeps_all_layers: Whether it may keep those of all layers, for edits that compute some tokens only.
        finds_masks: Whether attention is recorded at the junction of the streams to find where an edit may
            change the image.
        keeps_streams: Whether the streams that enter each layer are kept for the first step of later images.
        decodes_alongside: Whether images are decoded while the next ones are denoised.
        encodes: Whether an image is encoded.
    """

    batch: int
    interleaved: int | None = None
    kept_layers: int | None = 0
    keeps_queries: bool = False
    keeps_all_layers: bool = False
    finds_masks: bool = False
    keeps_streams: bool = False
    decodes_alongside: bool = False
    encodes: bool = False
