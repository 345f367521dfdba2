"""The training loop: schedule, logs, and resumed stages."""

import time
from dataclasses import replace

import pytest
import torch
from helpers.training import MOMENT

from training.loop.plan import TOY_PLAN
from training.loop.trainer import Budget, Schedule
from training.stages.vision import train_dinov2


def test_learning_rate_over_a_stage():
    schedule = Schedule(seconds=100, decay=0.5)
    assert schedule.factor(0, 0) < 0.01
    assert schedule.factor(1000, 40) == 1
    assert schedule.factor(1000, 75) == pytest.approx(0.5)
    assert schedule.factor(1000, 100) == pytest.approx(0.01)


def test_logs_are_written(work):
    for stage in TOY_PLAN:
        assert (work.folder / f"{stage}.csv").read_text().startswith("iteration,seconds,samples,loss")


def test_a_stage_stops_at_its_budget_and_resumes(work, tmp_path):
    """The second call continues the first one's count of iterations and its log, and finishes."""
    plan = {**MOMENT, "dinov2": replace(TOY_PLAN["dinov2"], seconds=0.6)}
    early = replace(work, folder=tmp_path, plan=plan, budget=Budget(15.05 / 60, time.time()))
    (tmp_path / "tokenizers").symlink_to(work.tokenizers)
    assert not train_dinov2(early)
    assert not (tmp_path / "assets").exists()
    saved = torch.load(tmp_path / "dinov2.state.pt", weights_only=True)["progress"]
    assert train_dinov2(replace(early, budget=Budget(60, time.time())))
    done = torch.load(tmp_path / "dinov2.state.pt", weights_only=True)["progress"]
    assert done[0] > saved[0]
    assert done[2] >= 0.6
