"""The standard KD benchmark: ResNet32x4 into ResNet8x4 on CIFAR-100.

    jkd train configs/cifar100_resnet32x4_resnet8x4.py

For one GPU or TPU core (240 epochs of batch 64, three runs). Prepare the data once, which needs TensorFlow:
`tfds build cifar100 --file_format=array_record`. Published top-1 (mean of 3-5 runs; Tian et al., ICLR 2020, and Zhao et al.,
CVPR 2022): teacher 79.42, student alone 72.50, KD 73.33, DKD 76.32. Measured here: not yet.
"""

from jkd import Experiment, Preprocess, Run, data, models, optim, recipes, schedules


def config(*, seed=0, epochs=240, batch_size=64, learning_rate=0.05, data_dir=None):
    cifar = data.tfds("cifar100", data_dir=data_dir, in_memory=True)
    # the benchmark's constants of normalisation, on the 0..1 scale
    pixels = Preprocess(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
    decay = {150 / 240: 0.1, 180 / 240: 0.1, 210 / 240: 0.1}
    teacher = models.resnet.cifar("resnet32x4", classes=100, preprocess=pixels)
    student = models.resnet.cifar("resnet8x4", classes=100, preprocess=pixels)
    shared = dict(
        data=cifar,
        augment=(data.Crop(padding=4), data.Flip()),
        steps=epochs * 50_000 // batch_size,
        batch_size=batch_size,
        optimizer=optim.sgd(schedules.Piecewise(learning_rate, decay), momentum=0.9, weight_decay=5e-4),
        seed=seed,
        best="accuracy",
    )
    return Experiment(
        teacher=Run(student=teacher, recipe=recipes.Supervised(), **shared),
        control=Run(student=student, teacher="teacher", recipe=recipes.Supervised(), **shared),
        kd=Run(student=student, teacher="teacher", recipe=recipes.KD(temperature=4.0, weight=0.9, task_weight=0.1), **shared),
        dkd=Run(student=student, teacher="teacher", recipe=recipes.DKD(alpha=1.0, beta=8.0, temperature=4.0), **shared),
    )
