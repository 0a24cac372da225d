"""Ensembles, and answers that come with the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd import models
from jkd.errors import InputError
from jkd.types import Outputs

BATCH = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), "weight": jnp.ones(4)}
MEMBER = models.mlp.Config(features=6, hidden=(5,), classes=3, dropout=0.5)


@pytest.fixture(scope="module")
def members():
    built = [MEMBER.build() for _ in range(2)]
    return [fill(model, seed) for seed, model in enumerate(built)]


def answers(members):
    return [model.apply(model.params, model.buffers, BATCH)[0].logits for model in members]


def test_mean_of_probabilities(members):
    model = models.ensemble(members)
    assert model.initialised
    assert model.params.keys() == {"0", "1"}
    logits = model.apply(model.params, model.buffers, BATCH)[0].logits
    expected = sum(jax.nn.softmax(answer) for answer in answers(members)) / 2
    np.testing.assert_allclose(jnp.exp(logits), expected, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(logits).sum(-1), 1, rtol=1e-6)


def test_mean_of_logits(members):
    model = models.ensemble(members, mean="logits")
    logits = model.apply(model.params, model.buffers, BATCH)[0].logits
    np.testing.assert_allclose(logits, sum(answers(members)) / 2, rtol=1e-5)


@pytest.mark.parametrize("mean", ["probabilities", "logits", None])
def test_each_members_answers_are_there_too(members, mean):
    model = models.ensemble(members, mean=mean)
    outputs, _ = model.apply(model.params, model.buffers, BATCH)
    assert outputs.heads.keys() == {"0", "1"}
    for name, answer in zip("01", answers(members), strict=True):
        np.testing.assert_array_equal(outputs.heads[name], answer)
    assert outputs.has_logits == (mean is not None)


def test_without_a_mean_members_may_know_different_classes_or_none(members):
    feature = models.from_function(
        lambda params, x: x, {}, output=lambda x: Outputs(heads={"embedding": x}, taps={"all": x}), name="feature"
    )
    model = models.ensemble([members[0], models.ensemble([two(), feature], mean=None)], mean=None)
    assert {"0/head", "1/1/all"} <= set(model.paths(BATCH))
    outputs, _ = model.apply(model.params, model.buffers, BATCH, taps=("1/1/all",))
    shapes = {name: head.shape for name, head in outputs.heads.items()}
    assert shapes == {"0": (4, 3), "1/0": (4, 2), "1/1/embedding": (4, 6)}
    np.testing.assert_array_equal(outputs.taps["1/1/all"], BATCH["image"])
    assert not outputs.has_logits


def test_one_member_is_itself(members):
    model = models.ensemble(members[:1])
    logits = model.apply(model.params, model.buffers, BATCH)[0].logits
    np.testing.assert_allclose(logits, jax.nn.log_softmax(answers(members)[0]), rtol=1e-5)


def test_large_logits_stay_finite():
    huge = models.from_function(lambda params, x: params * x, jnp.float32(1e4))
    model = models.ensemble([huge, huge])
    batch = {"image": jnp.array([[1.0, -1.0, 0.0]], jnp.bfloat16)}
    logits = model.apply(model.params, model.buffers, batch)[0].logits
    np.testing.assert_allclose(logits, [[0, -2e4, -1e4]], rtol=1e-2)
    half = {name: jnp.bfloat16(1e4) for name in model.params}
    assert model.apply(half, model.buffers, batch)[0].logits.dtype == jnp.float32


def test_taps_parts_and_paths(members):
    model = models.ensemble(members)
    paths = model.paths(BATCH)
    assert {"0/layers/0", "1/head"} <= set(paths)
    outputs, _ = model.apply(model.params, model.buffers, BATCH, taps=("1/layers/0", "0/head"))
    assert set(outputs.taps) == {"1/layers/0", "0/head"}
    head = model.submodule("1/head")
    np.testing.assert_array_equal(head.params["kernel"], members[1].params["head"]["kernel"])
    logits = head.apply(head.params, head.buffers, outputs.taps["1/layers/0"])[0].logits
    np.testing.assert_allclose(logits, answers(members)[1], rtol=1e-5)
    assert model.submodule("0") is members[0]


def test_members_are_made_and_draw_apart():
    model = models.ensemble([MEMBER.build(), MEMBER.build()])
    assert not model.initialised
    params, buffers = jit(model.init)(jax.random.key(0))
    assert not np.array_equal(params["0"]["head"]["kernel"], params["1"]["head"]["kernel"])
    taps = ("0/layers/0/dropout", "1/layers/0/dropout")
    same = {"0": params["0"], "1": params["0"]}
    outputs, _ = model.apply(same, buffers, BATCH, taps=taps, train=True, key=jax.random.key(0))
    assert not np.array_equal(*(outputs.taps[path] for path in taps))


def test_members_read_one_vocabulary(members):
    def of(*tokenizers, mean="probabilities"):
        told = [dataclasses.replace(model, tokenizer=one) for model, one in zip(members, tokenizers, strict=True)]
        return models.ensemble(told, mean=mean).tokenizer

    assert of("bytes", "bytes") == of("bytes", None) == "bytes"
    assert of(None, None) is of("bytes", "words", mean=None) is None
    with pytest.raises(InputError, match=r"tokenizers of member 0 \(bytes\) and member 1 \(words\) differ"):
        of("bytes", "words")


def test_buffers_of_every_member():
    small = models.resnet.Config(depths=(1,), widths=(4, 4), classes=3)
    model = models.ensemble([small.build(), MEMBER.build()])
    assert model.couples_batch
    assert model.buffers["1"] == {}
    assert set(model.buffers["0"]) == {"stem", "stages"}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: models.ensemble([]), "give at least one model"),
        (lambda m: models.ensemble(m, mean="votes"), "mean='votes'.*choose 'probabilities', 'logits' or None"),
        (
            lambda m: models.ensemble(m).submodule("head"),
            "submodule 'head': begin with the number of a member, 0 to 1, as in '0/head'",
        ),
        (lambda m: run(models.ensemble(m), taps=("2/head",)), "tap '2/head': begin with the number"),
        (lambda m: run(models.ensemble(m), taps=("0/heat",)), "tap 'heat': mlp computes nothing .* did you mean 'head'"),
        (
            lambda m: run(models.ensemble([m[0], two()])),
            r"the members' logits differ in shape: \[\(4, 3\), \(4, 2\)\]; mean=None",
        ),
    ],
)
def test_wrong_values(members, run, message):
    with pytest.raises(InputError, match=message):
        run(members)


def run(model, **options):
    return model.apply(model.params, model.buffers, BATCH, **options)


def two():
    return models.from_function(lambda params, x: x[:, :2], {})


# --- prepared --------------------------------------------------------------------------------------------------------------


def test_prepared_answers():
    model = models.prepared()
    answer = Outputs(
        jnp.ones((4, 3)), heads={"box": jnp.ones((4, 2))}, taps={"features": jnp.ones((4, 8)), "more": jnp.ones(4)}
    )
    batch = BATCH | {"teacher": answer}
    assert model.init(jax.random.key(0)) == ({}, {})
    outputs, buffers = jit(lambda batch: model.apply({}, {}, batch, taps=("features",)))(batch)
    assert buffers == {}
    np.testing.assert_array_equal(outputs.logits, answer.logits)
    assert set(outputs.heads) == {"box"}
    assert set(outputs.taps) == {"features"}
    assert {path: shape.shape for path, shape in model.paths(batch).items()} == {"features": (4, 8), "more": (4,)}


@pytest.mark.parametrize(
    ("batch", "taps", "message"),
    [
        (BATCH, (), r"batch\['teacher'\] is missing"),
        (BATCH | {"teacher": jnp.ones(3)}, (), r"batch\['teacher'\] is ArrayImpl, not jkd.Outputs"),
        (BATCH | {"teacher": Outputs(taps={"head": jnp.ones(1)})}, ("heed",), "did you mean 'head'"),
    ],
)
def test_answers_that_are_not_there(batch, taps, message):
    with pytest.raises(InputError, match=message):
        models.prepared().apply({}, {}, batch, taps=taps)
