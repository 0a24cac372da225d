"""Distil a ResNet into an MLP 30 times smaller, on scikit-learn's handwritten digits, with 5 % of the labels.

    jkd train configs/digits.py

About a minute on two CPU cores. The teacher sees every label; student and control see the same 5 % of them, and the student asks
the teacher about all images. Measured over five seeds by benchmarks/digits.py: see the README.
"""

from jkd import Experiment, Run, data, models, optim, recipes, schedules


def config(*, seed=0, steps=1500, labelled=0.05, temperature=4.0):
    adam = optim.adamw(schedules.WarmupCosine(3e-3), weight_decay=1e-2)
    shared = dict(data=data.digits(labelled=labelled, seed=seed), steps=steps, batch_size=128, optimizer=adam, seed=seed)
    teacher = models.resnet.Config(depths=(1, 1, 1), widths=(16, 16, 32, 64), channels=1, classes=10)
    student = models.mlp.Config(features=64, hidden=(32,), classes=10)
    return Experiment(
        teacher=Run(student=teacher, recipe=recipes.Supervised(), **shared | dict(data=data.digits(), steps=steps // 3)),
        # the control is shown the teacher for its agreement only: Supervised reads nothing of it
        control=Run(student=student, teacher="teacher", recipe=recipes.Supervised(), **shared),
        student=Run(student=student, teacher="teacher", recipe=recipes.KD(temperature=temperature), **shared),
    )
