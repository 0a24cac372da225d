"""Networks of a few thousand parameters, batches for them, and a loop: what the engine's tests train."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jkd import losses, optim, schedules, sharding, trees
from jkd.config import Run
from jkd.prepare import make_prepare
from jkd.recipe import Recipe
from jkd.recipes import KD
from jkd.resolve import make_context
from jkd.state import State, init_state, state_shardings
from jkd.step import make_step
from jkd.types import Model, Outputs, Term

CLASSES = 5
IMAGE = (4, 4, 2)
FEATURES = 32
ROWS = 32
FSDP = sharding.MeshShape(data=1, fsdp=8)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def dense_init(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def network(*, width=64, classes=CLASSES, norm="layer", dropout=0.0, name="tiny") -> Model:
    """Flattened image -> dense -> norm -> tanh (tap ``body``) -> (dropout) -> dense ``head``; ``body`` and ``head`` are parts.

    ``norm``: ``layer`` leaves examples independent, ``batch`` couples them and has buffers.
    """

    def init(key):
        first, last = jax.random.split(key)
        norms = {"scale": jnp.ones(width), "shift": jnp.zeros(width)}
        params = {"body": dense_init(first, FEATURES, width) | norms, "head": dense_init(last, width, classes)}
        buffers = {"body": {"mean": jnp.zeros(width), "variance": jnp.ones(width)}} if norm == "batch" else {}
        return params, buffers

    def body(params, buffers, image, train):
        x = dense(params, image.reshape(image.shape[0], -1).astype(params["kernel"].dtype))
        if norm == "layer":
            centred = x - x.mean(-1, keepdims=True)
            x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        else:
            mean, variance = x.mean(0), x.var(0)
            if not train:
                mean, variance = buffers["mean"].astype(x.dtype), buffers["variance"].astype(x.dtype)
            x = (x - mean[None]) * jax.lax.rsqrt(variance + 1e-5)[None]
            if train:
                new = {"mean": mean, "variance": variance}
                buffers = {name: 0.9 * old + 0.1 * new[name].astype(jnp.float32) for name, old in buffers.items()}
        return jnp.tanh(x * params["scale"][None] + params["shift"][None]), buffers

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x, inner = body(params["body"], buffers.get("body", {}), batch["image"], train)
        outputs = {"body": x}
        if dropout and train:
            x = x * jax.random.bernoulli(key, 1 - dropout, x.shape) / (1 - dropout)
        outputs["head"] = dense(params["head"], x)
        if unknown := set(taps) - set(outputs):
            raise ValueError(f"tap {min(unknown)!r}: there are body, head")
        answer = Outputs(outputs["head"], taps={path: outputs[path] for path in taps})
        return answer, ({"body": inner} if buffers else buffers)

    def submodule(path):
        def part(params, buffers, batch, *, taps=(), train=False, key=None):
            if path == "head":
                return Outputs(dense(params, batch)), buffers
            x, buffers = body(params, buffers, batch, train)
            return Outputs(x), buffers

        shapes = jax.eval_shape(init, jax.random.key(0))
        return Model(
            init=lambda key: (init(key)[0][path], init(key)[1].get(path, {})),
            apply=part,
            params=shapes[0][path],
            buffers=shapes[1].get(path, {}),
            name=f"{name}/{path}",
        )

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(
        init=init,
        apply=apply,
        params=params,
        buffers=buffers,
        submodule=submodule,
        couples_batch=norm == "batch",
        name=name,
    )


def weights(model: Model, seed: int = 7) -> Model:
    """The network holding weights, made by NumPy: that compiles nothing."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        spread = 1 / np.sqrt(shape.shape[0]) if len(shape.shape) > 1 else 0.1
        centre = 1 if path.rpartition("/")[2] in ("scale", "variance") else 0
        return (centre + spread * rng.normal(size=shape.shape)).astype(np.float32)

    return model.with_weights(*(trees.map_with_path(leaf, tree) for tree in (model.params, model.buffers)))


@functools.cache
def student(**options) -> Model:
    return weights(network(**{"name": "student"} | options), seed=3)


@functools.cache
def teacher(**options) -> Model:
    return weights(network(**{"width": 48, "name": "teacher"} | options))


def batch(rows: int = ROWS, *, seed: int = 0, ragged: bool = False, classes: int = CLASSES) -> dict:
    """A batch in NumPy. Ragged: weights between 0 and 2, a few rows of 0 in no order, a third of the labels unknown."""
    rng = np.random.default_rng(seed)
    weight, labelled = np.ones(rows, np.float32), np.ones(rows, np.float32)
    if ragged:
        weight = rng.uniform(0.1, 2, rows).astype(np.float32) * (rng.random(rows) > 0.25)
        labelled = (rng.random(rows) > 0.33).astype(np.float32)
    return {
        "image": rng.normal(size=(rows, *IMAGE)).astype(np.float32),
        "label": rng.integers(0, classes, rows).astype(np.int32),
        "weight": weight,
        "labelled": labelled,
        "index": (np.arange(rows) + rows * seed).astype(np.int32),
    }


def batches(count: int = 5, **options) -> list[dict]:
    return [batch(seed=seed, **options) for seed in range(count)]


def run(**fields) -> Run:
    """A run of KD on the tiny network with SGD; any field may be given."""
    defaults = dict(student=student(), teacher=teacher(), recipe=KD(), optimizer=optim.sgd(0.1), steps=5, batch_size=ROWS)
    return Run(**defaults | fields)


# One program measures both: a first step of length 1 shows the gradient, the next ones are short enough to stay stable.
FIRST_STEP = schedules.Piecewise(1.0, {1 / 5: 0.05})
# An update is minus the gradient.
UNIT = optim.sgd(1.0, momentum=0.0)


@dataclasses.dataclass
class Trained:
    """What five or so steps left: every tree NumPy."""

    start: State
    first: State
    state: State
    metrics: list[dict]

    @property
    def losses(self) -> np.ndarray:
        return np.array([float(metrics["loss"]) for metrics in self.metrics])


class Engine:
    """A run compiled once, to be trained from its first state as often as a test likes."""

    def __init__(self, run: Run, example: dict | None = None, *, devices: int = 1, train_size=None, seed: int = 0):
        example = batch(run.batch_size) if example is None else example
        self.ctx = make_context(run, example, train_size=train_size, devices=jax.devices()[:devices])
        state, self.frozen = init_state(self.ctx, jax.random.key(seed))
        self.start = jax.device_get(state)
        self.step = make_step(self.ctx)
        made = make_prepare(self.ctx)
        self.prepare = made[0] if made else lambda state, frozen, batch, step: batch

    def fresh(self) -> State:
        """The first state, on the devices."""
        return sharding.put(self.start, state_shardings(self.ctx))

    def put(self, rows: dict) -> dict:
        return sharding.put_batch(rows, self.ctx.mesh)

    def train(self, rows: list[dict]) -> Trained:
        state, states, metrics = self.fresh(), [], []
        for one in rows:
            ready = self.prepare(state, self.frozen, self.put(one), state.step)
            state, found = self.step(state, self.frozen, ready)
            metrics.append(jax.device_get(found))
            if len(states) == 0:
                states.append(jax.device_get(state))
        return Trained(self.start, states[0], jax.device_get(state), metrics)

    def gradient(self, rows: dict) -> dict:
        """What the first step takes off the parameters: the gradient, where the optimizer is `UNIT`."""
        after = self.train([rows]).first
        return jax.tree.map(np.subtract, self.start.params, after.params)


def distance(found, wanted) -> float:
    """Norm of the difference over the norm of ``wanted``, both trees."""
    found, wanted = (_vector(tree) for tree in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _vector(tree) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(jax.device_get(tree))]
    return np.concatenate(leaves)


def identical(first, second) -> bool:
    """Bit for bit, every leaf."""
    first, second = jax.device_get((first, second))
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), first, second)
    return all(jax.tree.leaves(same)) and trees.count(first) > 0


# --- arithmetic by hand, next to which the engine's is put

RATE = 0.5
SGD = optim.sgd(RATE, momentum=0.0)


def logits(model, params, rows, **options):
    return model.apply(params, {}, rows, **options)[0].logits


def nll(answers, rows):
    return losses.cross_entropy(answers, rows["label"]).mean()


def down(params, gradient, rate=RATE):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def close(found, wanted, tolerance=1e-5):
    assert distance(found, wanted) < tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Recipe):
    """The smallest recipe: the student's logits, squared."""

    needs_teacher = False

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"square": Term(jnp.square(student.logits).mean(-1), batch["weight"])}
