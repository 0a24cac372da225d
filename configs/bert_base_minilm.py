"""MiniLMv2: the self-attention relations of BERT-base into an encoder of six layers, 384 wide, on plain text and without labels.

    jkd train configs/bert_base_minilm.py --set teacher=models/bert-base-uncased --set 'texts=corpus/**/*.txt'

For a few GPUs or a TPU slice. `teacher` is a directory as Hugging Face publishes it (config.json, safetensors, tokenizer.json);
without it the teacher has BERT-base's shape and no weights: enough for `jkd plan` and `jkd describe`, not to train. `texts` and
`eval_texts` are globs of text files; without them the text is English Wikipedia, prepared once (`tfds build
wikipedia/20230601.en --file_format=array_record`). Its tokens are kept in `tokens`. Queries, keys and values of the two last layers
are cut into 48 relation heads, as in the paper; the student (6x384) is fine-tuned on each task afterwards. docs/language-models.md
is the guide. Measured here: not yet.
"""

from jkd import Experiment, MeshShape, Run, data, models, optim, recipes, schedules

BASE = models.encoder.Config(vocab=30_522, dim=768, depth=12, heads=12, hidden=3072)


def projections(layer):
    """Taps of a layer's queries, keys and values."""
    return tuple(f"layers/attention/{name}@{layer}" for name in ("query", "key", "value"))


def corpus(texts, eval_texts, data_dir, **options):
    """Whole documents, as many in a row as fit."""
    if texts:
        return data.text_files(texts, eval=eval_texts or None, layout="fit", **options)
    splits = dict(split="train[5000:]", eval_split="train[:5000]", data_dir=data_dir)
    return data.tfds_text("wikipedia/20230601.en", **splits, layout="fit", **options)


def config(
    *,
    teacher="",
    texts="",
    eval_texts="",
    seed=0,
    steps=400_000,
    batch_size=256,
    length=512,
    width=384,
    depth=6,
    heads=12,
    teacher_layer=11,
    relation_heads=48,
    data_dir=None,
    folder="tokens",
):
    tokenizer = data.tokenizer.File(teacher) if teacher else None
    vocab = tokenizer.size if tokenizer else BASE.vocab
    options = dict(length=length, tokenizer=tokenizer, folder=folder, eval_rows=512)
    return Experiment(
        student=Run(
            student=models.encoder.Config(vocab=vocab, dim=width, depth=depth, heads=heads, hidden=4 * width, length=length),
            teacher=models.Pretrained(directory=teacher, architecture="BertModel") if teacher else BASE,
            recipe=recipes.MiniLMv2(
                student_taps=projections(depth - 1),
                teacher_taps=projections(teacher_layer),
                relation_heads=relation_heads,
            ),
            data=corpus(texts, eval_texts, data_dir, **options),
            optimizer=optim.adamw(schedules.WarmupCosine(6e-4, warmup=0.01), weight_decay=0.01, clip=1.0),
            steps=steps,
            batch_size=batch_size,
            compute_dtype="bfloat16",
            teacher_dtype="bfloat16",
            mesh=MeshShape(data=-1),
            seed=seed,
        )
    )
