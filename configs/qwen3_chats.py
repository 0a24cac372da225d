"""A published Qwen3 into a smaller one, on your own chats.

    jkd train configs/qwen3_chats.py --set teacher=models/Qwen3-1.7B --set student=models/Qwen3-0.6B --set 'chats=chats/*.jsonl'

For one GPU of 40 GB or a small TPU slice. `teacher` and `student` are directories as Hugging Face publishes them. Each line of
`chats` is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}; the student's own chat template
writes them, and what the assistant says is counted, no more (`jkd data` shows it). `eval_chats` are measured in bits per byte.
Without directories the networks have the published shapes and no weights: enough for `jkd plan` and `jkd describe`.
docs/language-models.md is the guide. Measured here: not yet.
"""

from jkd import Experiment, MeshShape, Run, data, models, optim, recipes, schedules
from jkd.models.rope import Rope

QWEN3 = dict(vocab=151_936, tokens=151_669, heads=16, kv_heads=8, head_dim=128, query_norm=True, tied=True, length=40_960)
SHAPES = {
    "1.7B": models.decoder.Config(dim=2048, depth=28, hidden=6144, rope=Rope(theta=1e6), **QWEN3),
    "0.6B": models.decoder.Config(dim=1024, depth=28, hidden=3072, rope=Rope(theta=1e6), **QWEN3),
}


def conversations(chats, eval_chats, tokenizer, length):
    """Whole chats, as many in a row as fit; without files a row of their shape."""
    if not chats:
        return data.documents([("no", "chats")], length=length, layout="fit")
    options = dict(columns="messages", tokenizer=tokenizer, length=length, layout="fit")
    return data.jsonl(chats, eval=eval_chats or None, **options)


def config(
    *,
    teacher="",
    student="",
    chats="",
    eval_chats="",
    seed=0,
    steps=3_000,
    batch_size=16,
    microbatches=1,
    length=2048,
    task_weight=0.3,
    compute_dtype="bfloat16",
    teacher_dtype="bfloat16",
):
    tokenizer = data.tokenizer.File(student) if student else None
    return Experiment(
        student=Run(
            student=models.Pretrained(directory=student) if student else SHAPES["0.6B"],
            teacher=models.Pretrained(directory=teacher) if teacher else SHAPES["1.7B"],
            recipe=recipes.TokenKD(weight=1 - task_weight, task_weight=task_weight),
            data=conversations(chats, eval_chats, tokenizer, length),
            optimizer=optim.adamw(schedules.WarmupCosine(2e-5, warmup=0.03), weight_decay=0.01, clip=1.0),
            steps=steps,
            batch_size=batch_size,
            microbatches=microbatches,
            compute_dtype=compute_dtype,
            teacher_dtype=teacher_dtype,
            mesh=MeshShape(data=1, fsdp=-1),
            seed=seed,
        )
    )
