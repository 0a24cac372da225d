"""What the papers claim of their methods, on handwritten digits, with fixed seeds and a margin."""

from __future__ import annotations

import pytest

import jkd
from jkd import Experiment, Run, data, models, optim, recipes, schedules


@pytest.mark.slow
def test_with_the_teachers_head_simkd_beats_kd_on_the_same_budget():
    """Student, steps, data, optimizer and teacher are the same; the projector and the head belong to SimKD's product."""
    small = models.resnet.Config(depths=(1, 1), widths=(4, 4, 8), channels=1, classes=10)
    large = models.resnet.Config(depths=(1, 1, 1), widths=(16, 16, 32, 64), channels=1, classes=10)
    adam = optim.adamw(schedules.WarmupCosine(3e-3), weight_decay=1e-2)
    shared = dict(data=data.digits(), batch_size=64, optimizer=adam, evaluate_every=0, checkpoint_every=0)
    simkd = recipes.SimKD(student_taps=("stages/1",), teacher_taps=("stages/2",))
    nodes = {"teacher": Run(student=large, recipe=recipes.Supervised(), steps=200, **shared)}
    for seed in (0, 1):
        student = dict(student=small, teacher="teacher", steps=150, seed=seed, **shared)
        nodes[f"kd_{seed}"] = Run(recipe=recipes.KD(), **student)
        nodes[f"simkd_{seed}"] = Run(recipe=simkd, **student)
    found = jkd.train(Experiment(**nodes)).summary
    assert found["teacher"]["accuracy"] > 0.95
    for seed in (0, 1):
        assert found[f"simkd_{seed}"]["accuracy"] > found[f"kd_{seed}"]["accuracy"] + 0.1
