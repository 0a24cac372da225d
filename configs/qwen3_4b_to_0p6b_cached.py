"""Distil Qwen3-4B into Qwen3-0.6B from the teacher's answers on disk: 64 classes a token, and exactly what is left for the others.

    jkd cache configs/qwen3_4b_to_0p6b_cached.py --set teacher=models/Qwen3-4B --set student=models/Qwen3-0.6B
    jkd train configs/qwen3_4b_to_0p6b_cached.py --set teacher=models/Qwen3-4B --set student=models/Qwen3-0.6B

For a TPU pod slice or a node of GPUs; networks, text and directories are those of configs/qwen3_4b_to_0p6b.py. The teacher runs once,
on all hosts, and is not in memory while the student learns: about 210 bytes a token (uint8). A cache that another program filled
(a server of the same weights) is read in the same way. Measured here: not yet.
"""

import dataclasses

from jkd import Experiment, cache, configfile, recipes

online = configfile.load("qwen3_4b_to_0p6b")
TOKENS = 151_669
"""What the teacher tells apart: the tokenizer's numbers, not the rows that only pad its head."""


def config(
    *,
    teacher="",
    student="",
    seed=0,
    steps=20_000,
    batch_size=256,
    microbatches=1,
    length=2048,
    k=64,
    task_weight=0.1,
    tensor=1,
    data_dir=None,
    folder="tokens",
    share=8,
    answers="caches/qwen3-4b",
):
    networks = dict(teacher=teacher, student=student, tensor=tensor)
    text = dict(length=length, data_dir=data_dir, folder=folder, share=share)
    run = online(**networks, **text, seed=seed, steps=steps, batch_size=batch_size, microbatches=microbatches).nodes["student"]
    kept = cache.Cache(path=answers, codec=cache.TopK(k=k, vocab=TOKENS, values="uint8"), teacher=run.teacher)
    recipe = recipes.TopKKD(k=k, weight=1 - task_weight, task_weight=task_weight)
    return Experiment(student=dataclasses.replace(run, teacher=kept, recipe=recipe))
