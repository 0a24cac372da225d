"""A published ViT into a small one, on your own images: a folder for each class.

    jkd train configs/vit_folder.py --set images=photos --set teacher=models/vit-base-patch16-224

For one GPU (CPUs will do for a few thousand small images). `teacher` is a directory as Hugging Face publishes it (config.json,
safetensors, preprocessor_config.json): it gets a new head for the folder's classes and is fine-tuned first. `student` may be another
such directory to begin with, a DeiT-S say; without it a ViT of `width` and `depth` begins with random weights, which wants tens of
thousands of images or the teacher's patience: a long run. A tenth of each class is held out. Without directories the networks and
images have the published shapes and hold nothing: enough for `jkd plan` and `jkd describe`. docs/your-data.md is the guide.
Measured here: not yet.
"""

import dataclasses

import numpy as np

from jkd import Experiment, Run, data, models, optim, recipes, schedules


def photos(images, size):
    """The folder's images, cropped at random to train on; without a folder their shapes."""
    if not images:
        return data.arrays(image=np.zeros((8, size, size, 3), np.uint8), label=np.arange(8), classes=1000, name="no images")
    return data.image_folder(
        images, train_maps=data.vision.imagenet_train(size), eval_maps=data.vision.imagenet_eval(size), name="images"
    )


def config(
    *,
    images="",
    teacher="",
    student="",
    seed=0,
    steps=20_000,
    tuning_steps=2_000,
    batch_size=128,
    size=224,
    patch=16,
    width=192,
    depth=12,
    heads=3,
    temperature=2.0,
    compute_dtype="bfloat16",
):
    folder = photos(images, size)
    fresh = dict(changes={"classes": folder.classes}, fresh=("head/*",))
    big = models.Pretrained(directory=teacher, **fresh) if teacher else models.vit.base(classes=folder.classes)
    sizes = dict(size=(size, size), preprocess=dataclasses.replace(models.vit.IMAGENET, size=(size, size)))
    small = models.vit.Config(patch=patch, dim=width, depth=depth, heads=heads, classes=folder.classes, **sizes)
    small = models.Pretrained(directory=student, **fresh) if student else small
    shared = dict(data=folder, batch_size=batch_size, compute_dtype=compute_dtype, seed=seed)
    adam = dict(optimizer=optim.adamw(schedules.WarmupCosine(1e-3, warmup=0.05), weight_decay=0.05, clip=1.0))
    tuning = dict(optimizer=optim.adamw(schedules.WarmupCosine(5e-5, warmup=0.1), weight_decay=0.01, clip=1.0))
    return Experiment(
        teacher=Run(student=big, recipe=recipes.Supervised(), steps=tuning_steps, **tuning, **shared),
        control=Run(student=small, teacher="teacher", recipe=recipes.Supervised(), steps=steps, **adam, **shared),
        student=Run(
            student=small, teacher="teacher", recipe=recipes.KD(temperature=temperature), steps=steps, **adam, **shared
        ),
    )
