"""Runs whose teacher is a cache: the answers fit the rows, the training is the same, and nothing wrong goes unnoticed."""

import dataclasses
import json
import pickle
import signal
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jkd
from jkd import cache, data, recipes, sharding, sparse
from jkd.cache import filling
from jkd.cache.training import attached, keys_of
from jkd.cli import main
from jkd.errors import InputError
from jkd.models.rope import Rope
from jkd.types import Model, Outputs, Preprocess

SIZE, VOCAB, TIME = 44, 11, 6
WHOLE = cache.Dense(classes=tiny.CLASSES, taps={"body": (48,)}, dtype="float32")


def images(**fields):
    rows = tiny.batch(SIZE)
    held_out = tiny.batch(12, seed=1)
    return data.arrays(
        image=rows["image"],
        label=rows["label"],
        classes=tiny.CLASSES,
        eval={name: held_out[name] for name in ("image", "label")},
        **fields,
    )


def online(**fields):
    return tiny.run(**dict(data=images(), batch_size=16, steps=4, evaluate_every=0) | fields)


def cached(folder, *, codec=WHOLE, teacher=None, fingerprint=None, **fields):
    answers = cache.Cache(path=str(folder), codec=codec, teacher=teacher, fingerprint=fingerprint)
    return online(teacher=answers, **fields)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that a training filled, what it told, and what it and an online training gave."""
    folder, told = tmp_path_factory.mktemp("cache"), []

    class Told(jkd.Listener):
        def message(self, text):
            told.append(text)

    run = cached(folder, teacher=tiny.teacher())
    found = jkd.train(run, listener=Told())
    return folder, told, found, jkd.train(online(teacher=tiny.teacher()))


def test_training_from_a_cache_is_training_with_the_teacher(filled):
    """Answers in float32: parameters after four steps, and the evaluation, differ by rounding alone."""
    _, _, found, wanted = filled
    assert tiny.distance(found.state.params, wanted.state.params) < 1e-6
    for name, value in wanted.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert {"agreement", "kl", "teacher_accuracy"} <= set(found.metrics)


def test_it_is_filled_once_with_what_the_teacher_says(filled):
    """Forty-four training rows and twelve others, by eight devices; asked for once more nothing is computed."""
    folder, told, *_ = filled
    assert len(told) == 1
    assert "56 answers (56 of them new)" in told[0]
    reader = cache.Reader(folder)
    assert reader.facts.teacher == filling.fingerprint(tiny.teacher())
    rows = tiny.batch(SIZE)
    outputs, _ = tiny.teacher().apply(*(tiny.teacher().params, {}), rows, taps=("body",))
    found = reader.answers(reader.rows(keys_of(rows, ("image",))))
    np.testing.assert_allclose(found["logits"], outputs.logits, atol=1e-5)
    np.testing.assert_allclose(found["taps/body"], outputs.taps["body"], atol=1e-5)
    again = []
    run = cached(folder, teacher=tiny.teacher())
    filling.ready(run.teacher, jkd.make_context(run), {}, again.append, whole=True)
    assert "56 answers (0 of them new)" in again[0]
    wrong = cache.Cache(path=str(folder), codec=WHOLE, teacher=tiny.teacher(), fingerprint="Qwen3-4B")
    with pytest.raises(InputError, match="Cache.fingerprint = 'Qwen3-4B': Cache.teacher is 'teacher"):
        filling.ready(wrong, jkd.make_context(run), {}, again.append, whole=True)


def test_a_mesh_that_splits_weights_gives_the_same_answers(filled, tmp_path):
    folder, *_ = filled
    run = cached(tmp_path / "fsdp", teacher=tiny.teacher(), mesh=tiny.FSDP, data=dataclasses.replace(images(), eval=None))
    filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)
    first, second = (cache.Reader(where) for where in (folder, tmp_path / "fsdp"))
    assert (len(first), len(second)) == (56, 44)
    keys = keys_of(tiny.batch(SIZE), ("image",))
    one, two = (reader.answers(reader.rows(keys)) for reader in (first, second))
    np.testing.assert_allclose(one["logits"], two["logits"], atol=1e-5)


def made(folder, source, codec=WHOLE, inputs=("image",), **facts):
    """A cache in which every training example's answer is its own index."""
    batches = dataclasses.replace(source, eval=source.train, eval_maps=source.train_maps).eval_batches(4)
    with cache.Writer(folder, codec, inputs=inputs, **dict(teacher="numbers") | facts) as writer:
        for batch in batches:
            for row, key in enumerate(keys_of(batch, inputs)):
                index = float(batch["index"][row])
                shapes = codec.shapes(TIME)
                writer.add(key, {name: np.full(shape, index) for name, (shape, _) in shapes.items()})
    return folder


def answered(folder, source, **fields):
    return attached(cached(folder, data=source, **fields))[0].data


@pytest.mark.parametrize("maps", [False, True])
def test_answers_follow_their_examples(tmp_path, maps):
    """Any seed, batch size, host, epoch and start; from memory, and record by record."""

    def brighter(record, rng):
        return record | {"image": record["image"] * 2}

    source = images(train_maps=(brighter,) if maps else ())
    source = answered(made(tmp_path, source), source)
    for batch_size, seed, start, process in ((4, 0, 0, (0, 1)), (12, 1, 5, (1, 2)), (32, 0, 2, (0, 1))):
        batches = source.batches(batch_size, seed=seed, start=start, process=process)
        for _ in range(4):
            batch = next(batches)
            np.testing.assert_array_equal(batch["teacher"].logits, batch["index"][:, None] * np.ones(5, np.float32)[None])
            assert batch["teacher"].taps["body"].shape == (len(batch["index"]), 48)
        batches.close()
    one, two = (source.batches(8, seed=3, start=start) for start in (0, 2))
    next(one), next(one)
    third, also = next(one), next(two)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(third), jax.tree.leaves(also), strict=True))
    one.close()
    two.close()
    # its evaluation examples are not in this cache
    assert all("teacher" not in batch for batch in source.eval_batches(8))


def test_random_views_are_drawn_once_for_all(tmp_path):
    """Two views of each image, whatever seed a run has; without `fixed_views` the cache has no answer to what the maps draw."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    source = data.arrays(image=pixels, label=np.arange(10) % 5, train_maps=(data.vision.random_crop(2), data.vision.flip()))
    views = data.fixed_views(source, 2, seed=4)
    codec = cache.Dense(classes=5)
    assert views.train_size == 20
    run = answered(made(tmp_path, views, codec), views, codec=codec)
    seen = {}
    for seed in (0, 1):
        batches = run.batches(20, seed=seed)
        for batch in (next(batches), next(batches)):
            for image, index, logits in zip(batch["image"], batch["index"], batch["teacher"].logits, strict=True):
                assert np.array_equal(seen.setdefault(int(index), image), image)
                assert (logits == index).all()
        batches.close()
    assert len(seen) == 20
    assert len({image.tobytes() for image in seen.values()}) == 20
    # a view's number says its example: same pixels, moved
    assert source.train.records([3])[0]["label"] == views.train.records([13])[0]["label"]
    batches = answered(tmp_path, source, codec=codec).batches(8, seed=0)
    with pytest.raises(
        InputError, match=r"no answer to example \d+ \(key .*random train_maps must be drawn once, by data.fixed_views"
    ):
        next(batches)
    with pytest.raises(InputError, match=r"fixed_views\(count=0\)"):
        data.fixed_views(source, 0)


# --- text ---


def chain(width=4, vocab=VOCAB, tokenizer=None) -> Model:
    """What comes next depends on the last token alone; hidden and head."""
    rng = np.random.default_rng(width)
    params = {
        "embed": rng.normal(size=(vocab, width)).astype(np.float32),
        "head": rng.normal(size=(width, vocab)).astype(np.float32),
    }

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        return Outputs(hidden=jnp.take(params["embed"], batch["tokens"], axis=0), head=params["head"]), buffers

    return Model(init=lambda key: (params, {}), apply=apply, params=params, buffers={}, tokenizer=tokenizer, name="chain")


def text():
    rng = np.random.default_rng(0)
    return data.arrays(tokens=rng.integers(0, VOCAB, (20, TIME)), mask=np.arange(TIME)[None] < rng.integers(3, 7, (20, 1)))


def reading(folder, codec, recipe, *, student=None, **fields):
    return tiny.run(
        student=student or chain(3),
        teacher=cache.Cache(path=str(folder), codec=codec, **fields),
        recipe=recipe,
        data=text(),
        batch_size=8,
        steps=2,
    )


def test_text_is_answered_token_by_token(tmp_path):
    """Of a token the likeliest three and the rest; or draws that are as frequent as the teacher says."""
    logits = np.asarray(chain().apply(chain().params, {}, {"tokens": np.arange(VOCAB)[None]})[0].logits)[0]
    top = cache.TopK(k=3, vocab=VOCAB)
    wanted = top.of(logits)
    for codec, recipe in ((top, recipes.TopKKD(k=3)), (cache.Sampled(draws=400, vocab=VOCAB), recipes.RandomSamplingKD())):
        run = reading(tmp_path / type(codec).__name__, codec, recipe, teacher=chain())
        ctx = jkd.make_context(run)
        filling.ready(run.teacher, ctx, {}, lambda line: None)
        batches = ctx.run.data.batches(16, seed=0)
        batch = next(batches)
        batches.close()
        ids = batch["teacher"].heads["topk" if codec is top else "sampled"]["ids"]
        if codec is top:
            answer = batch["teacher"].heads["topk"]
            order = np.argsort(-wanted["log_probs"], axis=-1)
            np.testing.assert_array_equal(ids, np.take_along_axis(wanted["ids"], order, -1)[batch["tokens"]])
            np.testing.assert_allclose(answer["leftover"], wanted["leftover"][batch["tokens"]], rtol=1e-5)
        else:
            share = np.bincount(ids[batch["tokens"] == 4].ravel(), minlength=VOCAB)
            p = np.exp(logits[4] - logits[4].max()) / np.exp(logits[4] - logits[4].max()).sum()
            # 5 standard errors; the same text draws the same, so there are as many draws as rows are different
            spread = np.sqrt(p * (1 - p) * 400 * (batch["tokens"] == 4).sum())
            assert (np.abs(share - p * share.sum()) < 5 * spread + 1).all()


# --- what is wrong ---


def other(model):
    return model.with_weights(jax.tree.map(lambda leaf: leaf + 1, model.params), model.buffers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=other(tiny.teacher())), 'has teacher "teacher .*", not "teacher .*"'),
        (dict(fingerprint="Qwen3-4B"), 'has teacher "teacher .*", not "Qwen3-4B"'),
        (dict(teacher=tiny.teacher(), fingerprint="Qwen3-4B"), 'has teacher "teacher .*", not "Qwen3-4B"'),
        (dict(codec=cache.Dense(classes=tiny.CLASSES)), "has codec .*float32.*, not .*float16"),
        (dict(teacher=jkd.Ensemble((tiny.teacher(),))), 'has teacher "teacher .*", not "ensemble of 1 '),
        (dict(teacher=tiny.network()), "Cache.teacher: tiny holds no weights"),
        (
            dict(data=data.arrays(image=tiny.batch(40, seed=9)["image"])),
            r"no answer to example 0 \(key .*; 40 of 40 are missing",
        ),
        (
            dict(data=data.arrays(tokens=np.zeros((16, 3), int))),
            "knows its examples by image; the data's batches have no 'image'",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(filled, changes, message):
    run = cached(filled[0], **changes)
    if "tokens" in run.data.spec(1):
        run = dataclasses.replace(run, student=echo())
    with pytest.raises(InputError, match=message):
        filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)


def echo():
    return chain(vocab=tiny.CLASSES)


def test_other_tokens_are_refused(tmp_path):
    codec, recipe = cache.TopK(k=3, vocab=VOCAB), recipes.TopKKD(k=3)
    run = reading(tmp_path, codec, recipe, teacher=chain(tokenizer="bytes"))
    filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)
    run = reading(tmp_path, codec, recipe, student=chain(3, tokenizer="words"))
    with pytest.raises(InputError, match="is of tokenizer bytes, student chain of words"):
        filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)
    bytes_ = dataclasses.replace(run.data, tokenizer=data.tokenizer.Bytes())
    run = dataclasses.replace(reading(tmp_path, codec, recipe), data=bytes_)
    with pytest.raises(InputError, match="is of tokenizer bytes, the data of "):
        filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)
    run = reading(tmp_path / "b", cache.TopK(k=3, vocab=12), recipe, student=chain(vocab=12), teacher=chain())
    with pytest.raises(InputError, match="vocab = 12, but the teacher tells 11 classes apart"):
        filling.ready(run.teacher, jkd.make_context(run), {}, lambda line: None)
    run = reading(tmp_path / "c", cache.TopK(k=3, vocab=11), recipes.TopKKD(k=4), teacher=chain())
    with pytest.raises(InputError, match="the 4 likeliest classes of an answer that holds 3"):
        sparse.fewer(attached(run)[0].data.spec(8)["teacher"].heads["topk"], 4)


@pytest.mark.parametrize("vocab", [10, 12])
def test_answers_about_other_classes_than_the_students_are_refused(tmp_path, vocab):
    """An id beyond the student's would be read as its last class."""
    for codec, recipe in (
        (cache.TopK(k=3, vocab=vocab), recipes.TopKKD(k=3)),
        (cache.Sampled(draws=3, vocab=vocab), recipes.RandomSamplingKD()),
    ):
        kind = type(codec).__name__
        wrong = rf"{kind}.vocab = {vocab}, but the student chain tells 11 classes apart; give {kind}\(vocab=11\)"
        with pytest.raises(InputError, match=wrong):
            jkd.make_context(reading(tmp_path, codec, recipe))


def test_what_a_network_is_built_from_is_part_of_its_fingerprint():
    """Equal weights, and other answers; how it is rematerialised changes none."""
    config = jkd.models.decoder.Config(vocab=16, dim=8, depth=1, heads=2, hidden=16)
    weights = tiny.weights(config.build()).params

    def said(**changes):
        return filling.fingerprint(dataclasses.replace(config, **changes).build().with_weights(weights, {}))

    others = [
        dict(rope=Rope(theta=1e6)),
        dict(window=4),
        dict(attention_softcap=30.0),
        dict(query_scale=0.1),
        dict(tokens=15),
    ]
    prints = [said(), *(said(**changes) for changes in others)]
    assert len(set(prints)) == len(prints)
    assert said(remat=None) == said() == said(remat=jax.checkpoint_policies.everything_saveable)
    image = dataclasses.replace(tiny.teacher(), preprocess=Preprocess(mean=(0.5,)))
    assert filling.fingerprint(image) != filling.fingerprint(tiny.teacher())

    def together(*members, mean="probabilities"):
        return filling.fingerprint(jkd.models.ensemble(members, mean=mean))

    plain, other = (dataclasses.replace(config, window=window).build().with_weights(weights, {}) for window in (None, 4))
    lean = dataclasses.replace(config, remat=None).build().with_weights(weights, {})
    prints = [
        together(plain, plain),
        together(plain, other),
        together(other, plain),
        together(plain, plain, mean="logits"),
        together(tiny.teacher(), plain, mean=None),
        together(image, plain, mean=None),
        together(jkd.models.ensemble([plain, other]), plain),
        together(jkd.models.ensemble([plain, plain]), plain),
    ]
    assert len(set(prints)) == len(prints)
    assert together(plain, lean) == prints[0]


def test_a_tap_that_is_not_kept_is_told_before_anything_is_read(tmp_path):
    recipe = recipes.Match(student_taps=("body",), teacher_taps=("head",))
    with pytest.raises(InputError, match="Match reads 'head' of the teacher, which the cache does not hold"):
        jkd.make_context(cached(tmp_path, recipe=recipe))


def test_shapes_need_no_cache(tmp_path):
    run = cached(tmp_path / "nowhere")
    ctx = jkd.make_context(run)
    assert ctx.batch["teacher"].logits.shape == (16, tiny.CLASSES)
    assert jkd.make_context(run, run.data.spec(16)).batch.keys() == ctx.batch.keys()
    again = pickle.loads(pickle.dumps(ctx.run.data))  # as the worker processes of `Data.workers` get it
    assert again.answers.spec(run.data.spec(4)).taps["body"].shape == (4, 48)
    with pytest.raises(InputError, match="there is no cache in .*nowhere"):
        jkd.train(cached(tmp_path / "nowhere"))


# --- the command ---

CONFIG = """
import os
import signal
import tiny
from jkd import Experiment, Run, cache, data, recipes

def notice(record, rng):  # at the first record that is read after the teacher was trained
    if os.path.exists("notice") and os.path.exists("w/teacher/result.json"):
        os.remove("notice")
        os.kill(os.getpid(), signal.SIGTERM)
    return record

def config(*, folder="answers"):
    rows = tiny.batch(40)
    shared = dict(batch_size=8, steps=2)
    answers = cache.Cache(path=folder, codec=cache.Dense(classes=tiny.CLASSES), teacher="teacher")
    plain, watched = (data.arrays(image=rows["image"], label=rows["label"], train_maps=maps) for maps in ((), (notice,)))
    return Experiment(
        teacher=tiny.run(recipe=recipes.Supervised(), teacher=None, data=plain, **shared),
        student=tiny.run(teacher=answers, data=watched, **shared),
    )
"""


def test_the_command_fills_stops_when_it_is_told_to_goes_on_and_training_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(textwrap.dedent(CONFIG))
    Path("notice").touch()
    before = signal.getsignal(signal.SIGTERM)
    assert main(["cache", "mine.py", "--workdir", "w"]) == 75
    told = " ".join(capsys.readouterr().err.split())
    assert "cache answers: stopped at 8 answers, which are kept" in told  # the batch that was under way
    assert told.endswith("jkd: stopped before student, saved in w; to go on: jkd cache mine.py --workdir w")
    assert not Path("answers/manifest.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before

    assert main(["cache", "mine.py", "--workdir", "w"]) == 0
    told = capsys.readouterr().err
    assert "cache answers: 40 answers (32 of them new)" in told.replace("\n", " ")
    assert json.loads(Path("answers/manifest.json").read_text())["manifest"]["examples"] == 40
    assert not Path("w/student").exists() or not Path("w/student/result.json").exists()
    assert main(["train", "mine.py", "--workdir", "w"]) == 0
    told = capsys.readouterr().err
    assert "teacher: was finished before" in told
    assert "student:" in told
    Path("plain.py").write_text("import tiny\n\ndef config():\n    return tiny.run()\n")
    assert main(["cache", "plain.py"]) == 2
    assert "no run of it has a cache for its teacher" in capsys.readouterr().err


def test_rows_stay_where_they_are(filled):
    """`sharding.put_batch` and microbatches cut answers like any other rows."""
    run = dataclasses.replace(attached(cached(filled[0]))[0], microbatches=2, mesh=sharding.MeshShape(data=2, fsdp=4))
    ctx = jkd.make_context(run)
    state, frozen = jkd.init_state(ctx, jax.random.key(0))
    batches = run.data.batches(16, seed=0)
    _, metrics = jkd.make_step(ctx)(state, frozen, sharding.put_batch(next(batches), ctx.mesh))
    batches.close()
    assert np.isfinite(metrics["loss"])
