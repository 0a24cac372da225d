"""What a paper claims of its method, on handwritten digits, with fixed seeds and a margin."""

from __future__ import annotations

import numpy as np
import pytest
import small
import tiny
from claims import Trial, epochs, rows
from sklearn.datasets import load_digits

from jkd import optim, recipes, schedules

TRAIN = 1472
STEPS = 300


def digits() -> tuple[np.ndarray, np.ndarray]:
    """``(image [examples, 4, 4, 2], label)``: mean and maximum of every 2x2 pixels."""
    found = load_digits()
    pixels = (found.images / 16).reshape(-1, 4, 2, 4, 2)
    order = np.random.default_rng(0).permutation(len(pixels))
    image = np.stack([pixels.mean((2, 4)), pixels.max((2, 4))], -1).astype(np.float32)
    return image[order], found.target[order].astype(np.int32)


@pytest.mark.slow
def test_with_the_teachers_head_simkd_beats_kd_on_the_same_budget():
    """Student, steps, data, optimizer and teacher are the same; the projector and the head belong to SimKD's product."""
    image, label = digits()
    shared = dict(optimizer=optim.adamw(schedules.WarmupCosine(2e-2), weight_decay=1e-2), batch_size=64, steps=STEPS)

    def batches(seed):
        return (rows(image, label, index) for _, index in zip(range(STEPS), epochs(TRAIN, 64, 20, seed), strict=False))

    def accuracy(model):
        answer, _ = model.apply(model.params, model.buffers, {"image": image[TRAIN:]})
        return np.mean(np.argmax(answer.logits, -1) == label[TRAIN:])

    def trial(recipe, **sides):
        return Trial(tiny.run(recipe=recipe, **shared | sides), rows(image, label, range(64)), train_size=TRAIN)

    teacher = trial(recipes.Supervised(), student=small.network(width=24, classes=10), teacher=None).product(batches(0))
    assert accuracy(teacher) > 0.7
    sides = dict(student=small.network(width=2, classes=10), teacher=teacher)
    simkd = trial(recipes.SimKD(student_taps=("late",), teacher_taps=("late",)), **sides)
    kd = trial(recipes.KD(), **sides)
    gains = [
        accuracy(simkd.product(batches(seed), seed=seed)) - accuracy(kd.product(batches(seed), seed=seed)) for seed in (1, 2, 3)
    ]
    assert min(gains) > 0.05
    assert np.mean(gains) > 0.15
