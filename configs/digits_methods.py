"""Every method that fits image classification, on scikit-learn's digits: one teacher, one student, the same data and steps.

    jkd train configs/digits_methods.py                                        # every method, one seed
    jkd train configs/digits_methods.py --seeds 5 --set 'methods=("kd", "dkd")'    # two of them, mean and deviation

For CPU (two cores). The teacher sees every label; students see 10 % of them and all images. Nothing is tuned: each method has its
paper's defaults (those of the CIFAR-100 benchmark), which were chosen for other networks and more steps, so that a method that loses
here may win elsewhere. One number had to follow the data: CRD draws 1024 negatives, not 16384, from 1437 examples. Epochs are short
here, so DKD's and ReviewKD's 20 epochs of warm-up are most of the run. Methods that need the label (`jkd recipes`) have the labelled
10 % only; all others ask the teacher about every image. PSKD, USKD, ELR and Mean Teacher distil the student into itself: no teacher,
so beside the control rather than beside the others. AB takes an eighth of its steps for the stage that initialises the student. MLLD
and Mean Teacher compare views, so these two alone see shifted images, and two of them a step.

`jkd report` puts what was published of CIFAR-100 beside what is measured here. Measured over three seeds: docs/methods.md
(`python benchmarks/digits_methods.py`). Plain KD gains 15 points over the control and ends 2 below the teacher; attention transfer,
factor transfer, PS-KD and Mean Teacher lose to the control.

Left out: FSP, which needs as many channels in the student as in the teacher; DeiT, MiniLM and MiniLMv2, which need transformers;
TransKD, whose feature pyramid is a segmentation network's; methods with other data (a stream of unlabelled images, several teachers,
a teacher prepared for its method): FixMatch, FlexMatch, FST, MPL, MEAL V2, Knowledge Concentration, LELP, LAD, MCMI.
"""

import dataclasses

from jkd import Ema, Experiment, Run, StudentEma, data, models, optim, recipes, schedules

TEACHER = models.resnet.Config(depths=(1, 1, 1), widths=(16, 16, 32, 64), channels=1, classes=10)
STUDENT = models.resnet.Config(depths=(1, 1, 1), widths=(4, 4, 8, 16), channels=1, classes=10)


def taps(*paths):
    """The same paths on both sides: the two networks have the same modules."""
    return dict(student_taps=paths, teacher_taps=paths)


MAPS, LAST, POOL = taps(*STUDENT.features[1:]), taps(STUDENT.features[-1]), taps("pool")
PREACTIVATIONS = taps(*STUDENT.preactivations[1:])

METHODS = {
    "kd": recipes.KD(),
    "funmatch": recipes.FunMatch(),
    "dkd": recipes.DKD(),
    "dist": recipes.DIST(),
    "nkd": recipes.NKD(),
    "wsld": recipes.WSLD(),
    "standardized": recipes.StandardizedKD(),
    "fitnet": recipes.FitNet(**taps(STUDENT.features[2])),
    "vid": recipes.VID(**MAPS),
    "reviewkd": recipes.ReviewKD(**taps(*STUDENT.features[1:], "pool")),
    "at": recipes.AT(**MAPS),
    "nst": recipes.NST(**MAPS),
    "ab": recipes.AB(**PREACTIVATIONS),
    "ofd": recipes.OFD(**PREACTIVATIONS, teacher_norms=tuple(f"stages/{stage}/blocks/0/norm2" for stage in range(3))),
    "ft": recipes.FT(**LAST),
    "sp": recipes.SP(**LAST),
    "pkt": recipes.PKT(**POOL),
    "rkd": recipes.RKD(**POOL),
    "cc": recipes.CC(**POOL),
    "crd": recipes.CRD(**POOL, negatives=1024),
    "simkd": recipes.SimKD(**LAST),
    "srrl": recipes.SRRL(**LAST),
    "ctkd": recipes.CTKD(),
    "instance_ctkd": recipes.InstanceCTKD(),
    "mlld": recipes.MLLD(),
    "pld": recipes.PLD(),
    "dhkd": recipes.DHKD(student_taps=("pool",)),
    "dho": recipes.DHO(student_taps=("pool",)),
    "hard": recipes.HARD(),
    "pskd": recipes.PSKD(),
    "uskd": recipes.USKD(student_taps=(STUDENT.features[-2],)),
    "elr": recipes.ELR(),
    "mean_teacher": recipes.MeanTeacher(),
}
INITIALISE = ("ab",)
SHIFTED = data.Crop(padding=1)
FIELDS = {
    "mlld": dict(augment=(recipes.View("strong", SHIFTED),)),
    "mean_teacher": dict(
        teacher=StudentEma(),
        ema=Ema(decay=schedules.Piecewise(0.99, {4 / 15: 0.999 / 0.99}), warmup=True),
        evaluate_ema=True,
        augment=(recipes.View("second", SHIFTED), SHIFTED),
    ),
}
PUBLISHED_ON = "CIFAR-100, ResNet32x4 into ResNet8x4, top-1: other data and networks, so compare the gains if anything"
PUBLISHED = {
    # Tian et al., ICLR 2020 (RepDistiller)
    "teacher": 79.42,
    "control": 72.50,
    "kd": 73.33,
    "fitnet": 73.50,
    "at": 73.44,
    "sp": 72.94,
    "cc": 72.97,
    "vid": 73.09,
    "rkd": 71.90,
    "pkt": 73.64,
    "ab": 73.17,
    "ft": 72.86,
    "nst": 73.30,
    "crd": 75.51,
    # Zhao et al., CVPR 2022 (mdistiller)
    "dkd": 76.32,
    # the table of that paper
    "ofd": 74.95,
    "reviewkd": 75.63,
    # Huang et al., NeurIPS 2022
    "dist": 76.31,
    # Jin et al., CVPR 2023
    "mlld": 77.08,
    # Sun et al., CVPR 2024 (logit-standardization-KD)
    "standardized": 76.62,
    # Chen et al., CVPR 2022 (SimKD), with their control
    "simkd": (78.08, 73.09),
    "srrl": (75.39, 73.09),
}


def config(*, seed=0, methods=tuple(METHODS), steps=300, labelled=0.1, batch_size=64):
    adam = optim.adamw(schedules.WarmupCosine(3e-3), weight_decay=1e-2)
    shared = dict(steps=steps, batch_size=batch_size, optimizer=adam, evaluate_every=0.1, log_every=10, seed=seed)
    # the control is shown the teacher for its agreement only: Supervised reads nothing of it
    part = data.digits(labelled=labelled, seed=seed)
    control = Run(student=STUDENT, teacher="teacher", recipe=recipes.Supervised(), data=part, **shared)
    nodes = dict(
        teacher=Run(student=TEACHER, recipe=recipes.Supervised(), data=data.digits(), **shared),
        control=control,
    )
    for name in methods:
        if name in INITIALISE:
            last = dataclasses.replace(control, steps=steps - steps // 8)  # as many as all others, together
            nodes |= recipes.two_stages(name, last, METHODS[name], steps=steps // 8)
        else:
            nodes[name] = dataclasses.replace(control, recipe=METHODS[name], **FIELDS.get(name, {}))
    return Experiment(**nodes)
