"""Networks with feature maps, of a few thousand parameters, and what a recipe's terms are on them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jkd import models
from jkd.context import Context
from jkd.recipe import Recipe, Vars
from jkd.recipes import NoisedLabels
from jkd.recipes.pseudoclasses import splitting
from jkd.resolve import make_context
from jkd.state import frozen_shapes, init_state, state_shapes
from jkd.step import models_of
from jkd.types import Model, Outputs

TAPS = ("early", "late")
PRE = ("early:pre", "late:pre")
LEVELS = (*TAPS, "pool")
QKV = ("query", "key", "value")
ROWS = tiny.ROWS


def _norm_init(width):
    return {"scale": jnp.ones(width), "bias": jnp.full(width, 0.1)}


def _layer(params, x):
    x = x @ params["kernel"]
    centred = x - x.mean(-1, keepdims=True)
    x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    one = (1,) * (x.ndim - 1) + (-1,)
    return x * params["scale"].reshape(one) + params["bias"].reshape(one)


def network(*, width=6, classes=tiny.CLASSES, token=False, name="small") -> Model:
    """Image 4x4 -> ``early`` ``[batch, 4, 4, width]`` -> ``late`` ``[batch, 2, 2, 2 width]`` -> ``pool`` -> ``head``.

    LayerNorm and relu in both layers, ``:pre`` before the relu. The head is a part; ``token`` adds a second head.
    """

    def init(key):
        first, second, third, fourth = jax.random.split(key, 4)
        params = {
            "early": {"kernel": jax.random.normal(first, (2, width)), **_norm_init(width)},
            "late": {"kernel": jax.random.normal(second, (4 * width, 2 * width)) / 4, **_norm_init(2 * width)},
            "head": tiny.dense_init(third, 2 * width, classes),
        }
        return params | ({"token": tiny.dense_init(fourth, 2 * width, classes)} if token else {}), {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        found, image = {}, batch["image"].astype(params["head"]["kernel"].dtype)
        found["early:pre"] = _layer(params["early"], image)
        found["early"] = jax.nn.relu(found["early:pre"])
        rows = image.shape[0]
        corners = found["early"].reshape(rows, 2, 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(rows, 2, 2, -1)
        found["late:pre"] = _layer(params["late"], corners)
        found["late"] = jax.nn.relu(found["late:pre"])
        found["pool"] = found["late"].mean((1, 2))
        heads = {"distillation": tiny.dense(params["token"], found["pool"])} if token else {}
        if unknown := set(taps) - set(found):
            raise ValueError(f"tap {min(unknown)!r}: there are {sorted(found)}")
        answer = tiny.dense(params["head"], found["pool"])
        return Outputs(answer, heads=heads, taps={path: found[path] for path in taps}), buffers

    def submodule(path):
        def part(params, buffers, batch, *, taps=(), train=False, key=None):
            return Outputs(tiny.dense(params, batch)), buffers

        shapes = jax.eval_shape(init, jax.random.key(0))[0][path]
        return Model(init=lambda key: (init(key)[0][path], {}), apply=part, params=shapes, buffers={}, name=f"{name}/{path}")

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, submodule=submodule, name=name)


def transformer(*, width=8, heads=2, classes=tiny.CLASSES, name="small transformer") -> Model:
    """Image 4x4 -> four tokens -> one attention (taps ``query``, ``key``, ``value``: ``[batch, 4, heads, width / heads]``) -> head."""
    shape = (width, heads, width // heads)

    def init(key):
        keys = jax.random.split(key, 5)
        params = {tap: {"kernel": jax.random.normal(one, shape) / 2} for tap, one in zip(QKV, keys[:3], strict=True)}
        return params | {"embed": tiny.dense_init(keys[3], 8, width), "head": tiny.dense_init(keys[4], width, classes)}, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        image = batch["image"].astype(params["head"]["kernel"].dtype)
        corners = image.reshape(-1, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        tokens = corners @ params["embed"]["kernel"] + params["embed"]["bias"].reshape(1, 1, -1)
        found = {tap: jnp.einsum("btw,whd->bthd", tokens, params[tap]["kernel"]) for tap in QKV}
        attended = jax.nn.dot_product_attention(*(found[tap] for tap in QKV))
        answer = tiny.dense(params["head"], (tokens + attended.reshape(tokens.shape)).mean(1))
        return Outputs(answer, taps={path: found[path] for path in taps}), buffers

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, name=name)


def dense(*, width=6, classes=tiny.CLASSES, channels=2, name="small dense") -> Model:
    """Image -> 3x3 convolution -> relu -> logits for each pixel, ``[batch, height, width, classes]``."""

    def init(key):
        first, last = jax.random.split(key)
        kernel = jax.random.normal(first, (3, 3, channels, width)) / 4
        return {"conv": {"kernel": kernel, "bias": jnp.zeros(width)}, "head": tiny.dense_init(last, width, classes)}, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        conv, head = params["conv"], params["head"]
        x = jax.lax.conv_general_dilated(
            batch["image"].astype(conv["kernel"].dtype),
            conv["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + conv["bias"].reshape(1, 1, 1, -1))
        return Outputs(x @ head["kernel"] + head["bias"].reshape(1, 1, 1, -1)), buffers

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, name=name)


VOCAB = 7


def chain(*, width=4, vocab=VOCAB, name="small chain") -> Model:
    """Tokens -> embedding -> tanh -> hidden and head: what comes next depends on the last token alone. Generates."""

    def init(key):
        first, last = jax.random.split(key)
        return {
            "embed": {"kernel": jax.random.normal(first, (vocab, width))},
            "head": {"kernel": jax.random.normal(last, (width, vocab)) / 2},
        }, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        hidden = jnp.tanh(jnp.take(params["embed"]["kernel"], batch["tokens"], axis=0))
        heads = {"cache": {"read": batch["cache"]["read"] + batch["tokens"].shape[1]}} if "cache" in batch else {}
        return Outputs(hidden=hidden, head=params["head"]["kernel"], heads=heads), buffers

    def cache(rows, length, dtype=jnp.float32):
        return {"read": jnp.int32(0)}

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, cache=cache, name=name)


def reader(*, width=8, heads=2, depth=2, vocab=VOCAB, name="small reader") -> Model:
    """Tokens -> embedding (tap ``embed``) -> attention both ways (``layer@i``, ``query@i``, ``key@i``) -> hidden and head."""
    shape = (width, heads, width // heads)

    def init(key):
        first, last, *keys = jax.random.split(key, 2 + depth)
        layers = [
            {tap: {"kernel": jax.random.normal(one, shape) / 2} for tap, one in zip(QKV, jax.random.split(key, 3), strict=True)}
            for key in keys
        ]
        head = {"kernel": jax.random.normal(last, (width, vocab)) / 2}
        embed = {"kernel": jax.random.normal(first, (vocab, width))}
        return {"embed": embed, "head": head} | {f"layer{i}": layer for i, layer in enumerate(layers)}, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x = jnp.take(params["embed"]["kernel"], batch["tokens"], axis=0)
        found, real = {"embed": x}, batch.get("mask", jnp.ones_like(batch["tokens"])) > 0
        for i in range(depth):
            q, k, v = (jnp.einsum("btw,whd->bthd", x, params[f"layer{i}"][tap]["kernel"]) for tap in QKV)
            attended = jax.nn.dot_product_attention(q, k, v, mask=real[:, None, None, :])
            x = jnp.tanh(x + attended.reshape(x.shape))
            found |= {f"query@{i}": q, f"key@{i}": k, f"layer@{i}": x}
        return Outputs(hidden=x, head=params["head"]["kernel"], taps={path: found[path] for path in taps}), buffers

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, name=name)


def privileged(**options) -> Model:
    """`dense` with the labels' channel."""
    return NoisedLabels(network=dense(channels=3, **options), classes=tiny.CLASSES, scale=1.0).build()


def split(*, parts=4, **options) -> Model:
    """`network` whose classes are split in parts, along directions that mean nothing."""
    whole = network(**options)
    width = 2 * whole.params["early"]["kernel"].shape[-1]
    shapes = {"mean": (tiny.CLASSES, width), "directions": (tiny.CLASSES, width, parts // 2)}
    return splitting(whole, "pool", {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})


@functools.cache
def student(*, kind=network, **options) -> Model:
    return tiny.weights(kind(name="student", **options), seed=3)


@functools.cache
def teacher(*, kind=network, members=(), mean="probabilities", **options) -> Model:
    """One network, or an ensemble of as many as there are numbers of classes in ``members``."""
    if members:
        made = [tiny.weights(kind(width=8, classes=classes), seed=7 + i) for i, classes in enumerate(members)]
        for model in made:  # so sure of their answers that the mean is not next to uniform
            model.params["head"]["kernel"] *= 8
        return models.ensemble(made, mean=mean)
    return tiny.weights(kind(**{"width": 8, "name": "teacher"} | options))


def echo(side: str) -> Model:
    """A network that answers what the batch says: its logits are ``{side}_logits``, its taps the batch's entries of that name."""

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        if f"{side}_logits" in batch:
            logits = batch[f"{side}_logits"]
        else:
            logits = jnp.zeros((batch["weight"].shape[0], 2))
        return Outputs(logits * params["scale"], taps={path: batch[path] * params["scale"] for path in taps}), buffers

    params = {"scale": np.float32(1)}
    return Model(init=lambda key: (params, {}), apply=apply, params=params, buffers={}, name=f"{side} echo")


class Terms:
    """What a recipe's terms are on a batch, through a context; nothing is differentiated or updated."""

    def __init__(self, recipe: Recipe, rows: dict, *, train_size: int | None = None, **fields):
        run = tiny.run(recipe=recipe, batch_size=len(rows["weight"]), **fields)
        self.ctx: Context = make_context(run, rows, train_size=train_size, devices=jax.devices()[:1])
        self.state, self.frozen = init_state(self.ctx, jax.random.key(0))
        terms = jax.jit(functools.partial(evaluate, self.ctx))(self.state, self.frozen, rows)
        self.terms = jax.device_get(terms)

    def mean(self, name: str) -> float:
        values, weight, _ = self.terms[name]
        values = values.reshape(*weight.shape, -1).mean(-1)
        return float((values * weight).sum() / weight.sum())


def coefs(recipe: Recipe, rows: dict, **fields) -> dict[str, float]:
    """The terms' weights at the first step."""
    run = tiny.run(recipe=recipe, batch_size=len(rows["weight"]), **fields)
    ctx = make_context(run, rows, train_size=len(rows["weight"]), devices=jax.devices()[:1])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (state_shapes(ctx), frozen_shapes(ctx)))
    found = jax.jit(lambda *zeros: {name: coef for name, (_, _, coef) in evaluate(ctx, *zeros, rows).items()})(*zeros)
    return {name: float(coef) for name, coef in found.items()}


def evaluate(ctx, state, frozen, rows):
    models = models_of(ctx, state, frozen)
    first, second = jax.random.split(jax.random.key(1))
    student, teacher, models = ctx.recipe.forward(models, rows, first)
    vars = Vars(params=dict(models.params), memory=models.memory, buffers=dict(models.buffers))
    terms = ctx.recipe.terms(vars, student, teacher, rows, clock=models.clock, key=second)
    return {name: (term.values, term.weight, term.coef) for name, term in terms.items()}


def taps(model: Model, rows: dict, *paths: str, params=None) -> list[np.ndarray]:
    """What a network computes, NumPy."""
    outputs, _ = model.apply(model.params if params is None else params, model.buffers, rows, taps=paths)
    return [np.asarray(outputs.taps[path], np.float64) for path in paths]
