"""The decoder: documents, taps under the scan, generation from a cache, what the head gives, what remat keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd import types
from jkd.errors import InputError
from jkd.models import decoder
from jkd.models.rope import Linear, Llama3, Rope, rotate

TINY = functools.partial(decoder.Config, vocab=24, dim=16, depth=3, heads=4, kv_heads=2, hidden=24)
MIXED = TINY(
    tokens=21,
    window=4,
    windowed=(True, False, True),
    local_rope=Rope(theta=100.0),
    query_norm=True,
    sandwich_norm=True,
    attention_softcap=3.0,
    logit_softcap=2.0,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 21, (3, 12)))
MASK = jnp.asarray([[1] * 12, [0] * 3 + [1] * 9, [1] * 4 + [0] * 3 + [1] * 5])
TAPS = ("embed", "layers", "layers@1", "layers@-1", "layers/attention/query@0", "layers/mlp", "norm")


@pytest.fixture(scope="module")
def model():
    return fill(MIXED.build())


@pytest.fixture(scope="module")
def run(model):
    """The answer to a batch with ``mask`` and ``segment``; one program for all tests."""
    return jit(lambda batch: model.apply(model.params, {}, batch, taps=TAPS)[0])


@pytest.fixture(scope="module")
def plain(run):
    return run({"tokens": TOKENS, "mask": jnp.ones_like(TOKENS), "segment": jnp.zeros_like(TOKENS)})


def test_no_token_sees_what_comes_after(run, plain):
    changed = run({"tokens": TOKENS.at[:, 7].set(20), "mask": jnp.ones_like(TOKENS), "segment": jnp.zeros_like(TOKENS)})
    np.testing.assert_allclose(changed.logits[:, :7], plain.logits[:, :7], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(changed.logits - plain.logits).max((0, 2))[7:] > 1e-4).all()


def test_packed_documents_answer_as_if_alone(run, plain):
    """The first five tokens behind two of another document, and a row of padding's worth of difference beside them."""
    packed = jnp.concatenate([TOKENS[:, 5:7], TOKENS[:, :5], TOKENS[:, :5]], axis=1)
    segment = jnp.asarray([[3] * 2 + [8] * 5 + [9] * 5] * 3)
    mask = jnp.ones_like(packed).at[:, 0].set(0)
    found = run({"tokens": packed, "mask": mask, "segment": segment})
    for start in (2, 7):
        np.testing.assert_allclose(found.logits[:, start : start + 5], plain.logits[:, :5], rtol=1e-4, atol=1e-5)


def test_taps_under_the_scan(model, plain):
    taps = plain.taps
    assert {path: taps[path].shape for path in TAPS} == {
        "embed": (3, 12, 16),
        "layers": (3, 3, 12, 16),
        "layers@1": (3, 12, 16),
        "layers@-1": (3, 12, 16),
        "layers/attention/query@0": (3, 12, 4, 4),
        "layers/mlp": (3, 3, 12, 16),
        "norm": (3, 12, 16),
    }
    np.testing.assert_array_equal(taps["layers@1"], taps["layers"][1])
    np.testing.assert_array_equal(taps["norm"], plain.hidden)
    np.testing.assert_array_equal(taps["embed"], model.params["embed"]["embedding"][TOKENS])
    layer = jax.tree.map(lambda leaf: leaf[0], model.params["layers"])
    x = taps["embed"]
    normal = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * layer["norm1"]["scale"][None, None]
    query = jnp.einsum("btd,dhk->bthk", normal, layer["attention"]["query"]["kernel"])
    np.testing.assert_allclose(taps["layers/attention/query@0"], query, rtol=1e-5, atol=1e-5)
    assert MIXED.features == ("layers@0", "layers@1", "layers@2")


def test_logits_are_capped_and_padding_rows_cut(model, plain):
    assert plain.logits.shape == plain.logits_shape == (3, 12, 21)
    bare = jnp.einsum("btd,dv->btv", plain.hidden, model.params["head"]["kernel"])[..., :21]
    np.testing.assert_allclose(plain.logits, 2 * jnp.tanh(bare / 2), rtol=1e-5, atol=1e-5)
    shifted = types.Outputs(hidden=plain.hidden, head=plain.head, bias=jnp.arange(24.0))
    assert shifted.logits_shape == (3, 12, 24)
    expected = jnp.einsum("btd,dv->btv", plain.hidden, plain.head) + jnp.arange(24.0)[None, None]
    np.testing.assert_allclose(shifted.logits, expected, rtol=1e-5, atol=1e-5)
    again = jax.tree.map(lambda leaf: leaf, plain.replace(taps={}))
    assert (again.softcap, again.classes) == (2.0, 21)


@pytest.fixture(scope="module")
def generate(model):
    """Seven tokens of prompt at once, three of the next one by one, the last two at once, all as a recipe would inside jit."""

    def run(tokens, mask):
        call = lambda part, cache: model.apply(  # noqa: E731
            model.params, {}, {"tokens": tokens[:, part], "mask": mask[:, part], "cache": cache}
        )[0]
        prompt = call(slice(0, 7), model.cache(3, 14))

        def step(cache, column):
            batch = {"tokens": column[0][:, None], "mask": column[1][:, None], "cache": cache}
            outputs = model.apply(model.params, {}, batch)[0]
            return outputs.heads["cache"], outputs.logits[:, 0]

        cache, middle = jax.lax.scan(step, prompt.heads["cache"], (tokens[:, 7:10].T, mask[:, 7:10].T))
        rest = call(slice(10, 12), cache)
        return jnp.concatenate([prompt.logits, middle.swapaxes(0, 1), rest.logits], axis=1), rest.heads["cache"]

    return jit(run)


def test_generation_from_a_cache_is_the_whole_row_at_once(run, generate):
    """Prompts padded on the left, and on the right (which leaves holes between prompt and answer)."""
    found, cache = generate(TOKENS, MASK)
    # without holes the third row is this one
    closed = TOKENS.at[2, :9].set(jnp.concatenate([TOKENS[2, :4], TOKENS[2, 7:]]))
    mask = MASK.at[2].set(jnp.asarray([1] * 9 + [0] * 3))
    whole = run({"tokens": closed, "mask": mask, "segment": jnp.zeros_like(mask)}).logits
    for row, places in enumerate(([*range(12)], [*range(3, 12)])):
        np.testing.assert_allclose(found[row, places], whole[row, places], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2, [0, 1, 2, 3, 7, 8, 9, 10, 11]], whole[2, :9], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache["position"][2], [0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, 8, -1, -1])
    assert cache["filled"] == 12
    assert cache["key"].shape == (3, 3, 14, 2, 4)


def test_what_a_finished_row_writes_is_seen_by_nobody(generate):
    found = [generate(TOKENS.at[:, 8].set(token), MASK.at[:, 8].set(0))[0] for token in (1, 2)]
    np.testing.assert_array_equal(found[0][:, 9:], found[1][:, 9:])


def test_remat_keeps_the_inputs_of_layers_alone(model):
    def kept(config):
        built = config.build()

        def loss(params):
            return built.apply(params, {}, {"tokens": TOKENS}, train=True)[0].logits.sum()

        shapes = [var.aval for var in jax.make_jaxpr(lambda p: jax.vjp(loss, p)[1])(model.params).jaxpr.outvars]
        return sum(shape.size for shape in shapes)

    small, large = kept(MIXED), kept(dataclasses.replace(MIXED, remat=None))
    assert small < 0.5 * large


def test_llama3_scaling_by_hand():
    """Context 64, factor 8: periods of less than 16 tokens keep their frequency, of more than 64 have it divided."""
    scaling = Llama3(factor=8.0, low=1.0, high=4.0, length=64)
    tau = 2 * np.pi
    np.testing.assert_allclose(scaling(np.array([tau / 10, tau / 16])), [tau / 10, tau / 16])
    np.testing.assert_allclose(scaling(np.array([tau / 64, tau / 100])), [tau / 512, tau / 800])
    # two periods fit: a third of the way from 1 to 4
    np.testing.assert_allclose(scaling(np.array([tau / 32])), [tau / 32 * (1 / 3 + 2 / 3 / 8)])
    np.testing.assert_allclose(Linear(factor=4.0)(np.array([2.0])), [0.5])


def test_rotation_keeps_lengths_and_depends_on_distances_alone():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8)).repeat(3, 0)
    places = jnp.asarray([[0, 3], [40, 43], [0, 4]])
    turned = np.asarray(jit(lambda x: rotate(x, Rope(theta=50.0).table(places, 8)))(x))[:, :, 0]
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x[:, :, 0], axis=-1), rtol=1e-5)
    near, far, further = (first @ second for first, second in turned)
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - further) > 1e-3


def test_bfloat16_all_the_way():
    model = MIXED.build()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params)
    taps = tuple(path for path in model.paths({"tokens": TOKENS}) if ":" not in path)
    apply = functools.partial(model.apply, taps=taps)
    batch = {"tokens": TOKENS, "cache": model.cache(3, 12, jnp.bfloat16)}
    outputs, _ = jax.eval_shape(lambda params: apply(params, {}, {"tokens": TOKENS}), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}
    cached, _ = jax.eval_shape(lambda params: model.apply(params, {}, batch), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(cached)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}


def test_sharding_rules_fit_every_parameter():
    from jkd.sharding import MeshShape, parameter_specs

    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    specs = parameter_specs(TINY().build().params, mesh, decoder.RULES)
    assert specs["layers"]["attention"]["query"]["kernel"] == jax.P(None, "fsdp", "tensor")
    assert specs["layers"]["attention"]["out"]["kernel"] == jax.P(None, "tensor", None, "fsdp")
    assert specs["head"]["kernel"] == jax.P("fsdp", "tensor")
    assert specs["layers"]["norm1"]["scale"] == jax.P()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TINY(kv_heads=3), "heads=4: must be a multiple of kv_heads=3"),
        (lambda: TINY(dim=18), "dim=18: must be a multiple of heads=4, or give head_dim"),
        (lambda: TINY(head_dim=5), "head_dim=5: must be even"),
        (lambda: TINY(windowed=(True, False, True)), "give window, and one value for each of the 3 layers"),
        (lambda: TINY(window=4, windowed=(True,)), "one value for each of the 3 layers"),
        (lambda: TINY(activation="relu"), "activation='relu': give one of silu, gelu"),
        (lambda: TINY(tokens=25), "tokens=25: must be from 1 to vocab=24"),
        (lambda: (model := TINY().build()).apply(model.params, {}, {"image": TOKENS}), r"a decoder reads batch\['tokens'\]"),
        (lambda: types.Model(init=len, apply=len, params={}, buffers={}).cache(1, 2), "this model does not generate"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(InputError, match=message):
        make()
