"""Stage "text": the T5 encoder learns to read captions, before any image.

FLUX.1's text encoders could read before its transformer was trained. A small encoder that is trained on
images alone learns the words but hardly their order: which of two objects comes first, and which object has a
colour or a hat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop.optimizer import Optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.labels import things_of
from training.scenes.vocabulary import COLOUR_NAMES, HATS, INDEX, OBJECTS, PLACES, TIME_NAMES
from training.stages.flow import autocast, first_generator

_HAT_SPRITES = [INDEX[hat] for hat in HATS]
_ANSWERS = {"there": 1, "colour": 1 + len(COLOUR_NAMES), "hat": 1 + len(HATS), "where": 3}


class CaptionReader(nn.Module):
    """A text encoder, and queries that attend to its tokens: one for each object, and one for the scene."""

    def __init__(self, t5: nn.Module, width: int):
        super().__init__()
        self.t5 = t5
        self.questions = nn.Parameter(torch.randn(len(OBJECTS) + 1, width))
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.of_object = nn.Linear(width, sum(_ANSWERS.values()))
        self.of_scene = nn.Linear(width, len(PLACES) + len(TIME_NAMES))

    def forward(self, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Read token ids `B T`: answers for each object, `B 91 n` by name, and logits of place and time."""
        txt = self.t5(input_ids=tokens).last_hidden_state
        keys, values = self.keys(txt)[:, None], self.values(txt)[:, None]
        questions = self.questions.expand(len(txt), 1, -1, -1).to(keys.dtype)
        read = F.scaled_dot_product_attention(questions, keys, values)[:, 0]
        answers = self.of_object(read[:, :-1]).float().split(list(_ANSWERS.values()), dim=-1)
        scene = self.of_scene(read[:, -1]).float()
        return dict(zip(_ANSWERS, answers)), *scene.split([len(PLACES), len(TIME_NAMES)], dim=-1)


def reading_loss(reader: CaptionReader, tokens: Tensor, rows: Tensor) -> Tensor:
    """Compute the reader's loss on scenes' rows `B COLUMNS`: objects, their colours, hats and places."""
    answers, place, time = reader(tokens)
    things = things_of(rows)
    scene, slot = (things[:, :, 0] >= 0).nonzero(as_tuple=True)
    thing = things[scene, slot]
    sprite = thing[:, 0].long()
    there = torch.zeros(answers["there"].shape[:2], device=rows.device)
    there[scene, sprite] = 1
    hats = torch.tensor(_HAT_SPRITES, device=rows.device)
    hat = torch.where(thing[:, 5] >= 0, 1 + (thing[:, 5, None] == hats).int().argmax(dim=1), 0)
    asked = {name: answer[scene, sprite] for name, answer in answers.items()}
    return (
        10 * F.binary_cross_entropy_with_logits(answers["there"][..., 0], there)
        + F.cross_entropy(asked["colour"], thing[:, 4].long() + 1)
        + F.cross_entropy(asked["hat"], hat)
        + 20 * F.smooth_l1_loss(asked["where"], thing[:, 1:4], beta=0.05)
        + F.cross_entropy(place, rows[:, 0].long())
        + F.cross_entropy(time, rows[:, 1].long())
    )


def train_text(work: Work) -> bool:
    """Train the T5 encoder. Return False if the call's budget ran out first."""
    plan, device = work.plan_for("text"), work.cluster.device
    torch.manual_seed(3)
    pool = work.pool("text")
    rows, tokens = pool.rows.to(device), pool.t5.to(device)
    reader = CaptionReader(first_generator(work).t5, work.sizes.flux.context_in_dim)
    adamw = torch.optim.AdamW(
        reader.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    trainer = work.trainer("text", reader.to(device), Optimizers(adamw))

    def loss() -> Tensor:
        picks = torch.randint(len(rows), (plan.batch,), device=device)
        with autocast(device):
            return reading_loss(reader, tokens[picks].long(), rows[picks])

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        learned = trainer.averaged()
        encoder = {n.removeprefix("t5."): v for n, v in learned.items() if n.startswith("t5.")}
        save_atomically(encoder, work.result("text"))
    return True
