"""Distil Qwen3-4B into Qwen3-0.6B, online, without ever holding the logits of a text.

    jkd train configs/qwen3_4b_to_0p6b.py --set teacher=models/Qwen3-4B --set student=models/Qwen3-0.6B

For a TPU pod slice or a node of GPUs: parameters, optimizer and average are split over all devices (FSDP), `--set tensor=4` splits
heads and vocabulary besides. `teacher` and `student` are directories as Hugging Face publishes them (config.json, safetensors,
tokenizer.json). Without them the networks have the same shapes and no weights: enough for `jkd plan` and `jkd describe`, not to
train. The text is C4's, prepared once (`tfds build c4/en --file_format=array_record`); the tokens of as much of it as the steps read
once (`share`, in percent) are kept in `tokens`, by the first host that gets there. Teacher and student walk 2,048 tokens of 151,936
classes in blocks; the teacher's weights are bfloat16, each layer keeps its input alone for the backward pass. Measured here: not yet.
"""

from jkd import Experiment, MeshShape, Run, data, models, optim, recipes, schedules
from jkd.models.rope import Rope

QWEN3 = dict(
    vocab=151_936, tokens=151_669, kv_heads=8, head_dim=128, query_norm=True, tied=True, rope=Rope(theta=1e6), length=40_960
)
SHAPES = {
    "4B": models.decoder.Config(dim=2560, depth=36, heads=32, hidden=9728, **QWEN3),
    "0.6B": models.decoder.Config(dim=1024, depth=28, heads=16, hidden=3072, **QWEN3),
}
# the heads are the embeddings: there is no other matrix for the last rule
RULES = tuple(rule for rule in models.decoder.RULES if rule[0] != "head/kernel")


def text(directory, length, data_dir, folder, share):
    """Part of C4 in whole rows, numbered by the student's tokenizer."""
    tokenizer = data.tokenizer.File(directory) if directory else None
    places = dict(split=f"train[:{share}%]", eval_split="validation", data_dir=data_dir, folder=folder)
    return data.tfds_text("c4/en", **places, length=length, eval_rows=512, tokenizer=tokenizer)


def network(directory, size, mesh):
    """The published weights, each device its part; without a directory the shapes alone."""
    return models.Pretrained(directory=directory, mesh=mesh, rules=RULES) if directory else SHAPES[size]


def config(
    *,
    teacher="",
    student="",
    seed=0,
    steps=20_000,
    batch_size=256,
    microbatches=1,
    length=2048,
    task_weight=0.1,
    tensor=1,
    data_dir=None,
    folder="tokens",
    share=8,  # 20,000 steps of 256 x 2,048 tokens are 10.5e9; the whole has more than 150e9
):
    mesh = MeshShape(data=1, fsdp=-1, tensor=tensor)
    return Experiment(
        student=Run(
            student=network(student, "0.6B", mesh),
            teacher=network(teacher, "4B", mesh),
            recipe=recipes.TokenKD(weight=1 - task_weight, task_weight=task_weight),
            data=text(student, length, data_dir, folder, share),
            optimizer=optim.adamw(schedules.WarmupCosine(1e-4, warmup=0.02), weight_decay=0.1, clip=1.0),
            steps=steps,
            batch_size=batch_size,
            microbatches=microbatches,
            compute_dtype="bfloat16",
            teacher_dtype="bfloat16",
            mesh=mesh,
            rules=RULES,
            teacher_rules=RULES,
            seed=seed,
            evaluate_every=0.1,
        )
    )
