"""Law 4: an update is the same for any number of microbatches, devices and hosts; only rows with weight count."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from jkd import models, optim, trees
from jkd.config import Ema
from jkd.data import augment
from jkd.errors import InputError
from jkd.models import decoder
from jkd.recipes import KD, RKD, Combine, FitNet, Supervised, TokenKD
from jkd.recipes.projectors import Linear, Regressor
from jkd.resolve import make_context
from jkd.sharding import MeshShape

GRADIENT, PARAMETERS, ADAM_LOSS = 1e-5, 1e-5, 2e-4

LAYOUTS = {
    "2 microbatches": (1, {"microbatches": 2}),
    "4 microbatches": (1, {"microbatches": 4}),
    "8 devices": (8, {}),
    "fsdp": (8, {"mesh": MeshShape(data=1, fsdp=8)}),
    "data x fsdp, 2 microbatches": (8, {"mesh": MeshShape(data=2, fsdp=4), "microbatches": 2}),
    "data x tensor": (8, {"mesh": MeshShape(data=4, tensor=2), "rules": (("*kernel", P("tensor")),)}),
}
COUPLED = {name: layout for name, layout in LAYOUTS.items() if "micro" not in name}


def engine(layout: str | None, **fields) -> tiny.Engine:
    devices, laid_out = LAYOUTS[layout] if layout else (1, {})
    return tiny.Engine(tiny.run(**fields | laid_out), devices=devices)


@functools.cache
def trained(kind: str, layout: str | None, adam: bool = False) -> tiny.Trained:
    """Five steps of a run that is as uneven as data gets, on one device whole or laid out as named."""
    fields = {
        "independent": {},
        "coupled": {
            "student": tiny.student(norm="batch"),
            "teacher": tiny.teacher(norm="batch"),
            "augment": (augment.Mixup(0.8, classes=tiny.CLASSES),),
        },
    }[kind]
    optimizer = optim.adamw(1e-2) if adam else optim.sgd(tiny.FIRST_STEP, momentum=0.9, weight_decay=1e-3)
    made = engine(layout, optimizer=optimizer, ema=Ema(decay=0.5), **fields)
    return made.train(tiny.batches(ragged=kind == "independent"))


@pytest.mark.parametrize(("kind", "layout"), [("independent", n) for n in LAYOUTS] + [("coupled", n) for n in COUPLED])
def test_an_update_is_the_same_however_the_batch_is_cut_and_placed(kind, layout):
    whole, cut = trained(kind, None), trained(kind, layout)
    assert tiny.identical(whole.start.params, cut.start.params)
    moved = [jax.tree.map(np.subtract, one.first.params, one.start.params) for one in (cut, whole)]
    assert tiny.distance(*moved) < GRADIENT
    assert tiny.distance(cut.state.params, whole.state.params) < PARAMETERS
    assert tiny.distance(cut.state.ema, whole.state.ema) < PARAMETERS
    for found, wanted in zip(cut.metrics, whole.metrics, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)
    if kind == "coupled":
        assert tiny.distance(cut.state.buffers, whole.state.buffers) < PARAMETERS


PLACES = {
    "fsdp": dict(mesh=MeshShape(data=1, fsdp=8)),
    "tensor": dict(mesh=MeshShape(data=1, tensor=8)),
    "data x fsdp x tensor": dict(mesh=MeshShape(data=2, fsdp=2, tensor=2)),
}
SPLIT = (("*body/kernel", P("fsdp", "tensor")), ("*head/kernel", P(("fsdp", "tensor"))))
PROJECTOR = ("0/kernel", P("fsdp", "tensor"))


def text(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    rows = {"tokens": rng.integers(0, 64, (tiny.ROWS, 8)).astype(np.int32), "weight": np.ones(tiny.ROWS, np.float32)}
    return rows | {"mask": (np.arange(8)[None] < rng.integers(3, 9, (tiny.ROWS, 1))).astype(np.int32)}


@functools.cache
def placed(method: str, place: str | None) -> tiny.Trained:
    """Three steps of a vision, a relational or a language recipe, or of one with parameters; on one device or over eight."""
    taps = {"student_taps": ("body",), "teacher_taps": ("body",)}
    vision = {"vision": KD(), "relational": RKD(**taps), "projected": FitNet(**taps, projector=Linear())}
    fields = {"recipe": vision.get(method)}
    rules, rows = SPLIT, [tiny.batch(seed=seed) for seed in range(3)]
    if method == "language":
        shape = dict(vocab=64, depth=1, heads=8, remat=None, tied=True)
        networks = [decoder.Config(dim=dim, hidden=2 * dim, **shape) for dim in (32, 64)]
        student, teacher = (tiny.weights(config.build(), seed) for seed, config in enumerate(networks))
        fields = {"recipe": TokenKD(), "student": student, "teacher": teacher}
        rules = tuple(rule for rule in decoder.RULES if rule[0] != "head/kernel")  # the head is the embedding
        rows = [text(seed) for seed in range(3)]
    if place is not None:
        own = (PROJECTOR,) if method == "projected" else ()
        fields |= PLACES[place] | ({"rules": rules + own, "teacher_rules": rules} if "tensor" in place else {})
    run = tiny.run(optimizer=optim.sgd(0.05, momentum=0.9), **fields)
    made = tiny.Engine(run, rows[0], devices=8 if place else 1)
    if place is not None:
        assert all(any(len(spec) for spec in trees.flatten(specs).values()) for specs in made.ctx.specs.values())
    return made.train(rows)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["vision", "relational", "projected", "language"])
def test_replicated_split_and_mixed_parameters_make_one_update(method, place):
    whole, split = placed(method, None), placed(method, place)
    moved = [jax.tree.map(np.subtract, one.first.params, one.start.params) for one in (split, whole)]
    assert tiny.distance(*moved) < GRADIENT
    assert tiny.distance(split.state.params, whole.state.params) < PARAMETERS
    np.testing.assert_allclose(split.losses, whole.losses, rtol=2e-5)


class Convolution(nnx.Module):
    """As others write them: nothing in it knows of a mesh."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(tiny.IMAGE[-1], 64, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, tiny.CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


class Perceptron(linen.Module):
    """Likewise."""

    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Dense(64)(x.reshape(x.shape[0], -1)))
        return linen.Dense(tiny.CLASSES)(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_networks_of_others_split_as_they_are_make_the_same_update(kind):
    pair = [models.from_nnx(lambda rngs: Convolution(rngs)), models.from_linen(Perceptron(), example=tiny.batch(2))]
    student, teacher = pair if kind == "nnx" else reversed(pair)
    fields = dict(student=student, teacher=teacher.with_weights(*teacher.init(jax.random.key(5))))
    whole, split = (
        tiny.Engine(tiny.run(optimizer=optim.sgd(0.05, momentum=0.9), **fields | place), devices=devices)
        for devices, place in ((1, {}), (8, {"mesh": MeshShape(data=2, fsdp=4)}))
    )
    for specs in split.ctx.specs.values():
        assert any("fsdp" in spec for spec in trees.flatten(specs).values())
    one, other = whole.train(tiny.batches(3)), split.train(tiny.batches(3))
    moved = [jax.tree.map(np.subtract, each.first.params, each.start.params) for each in (other, one)]
    assert tiny.distance(*moved) < GRADIENT
    assert tiny.distance(other.state.params, one.state.params) < PARAMETERS
    np.testing.assert_allclose(other.losses, one.losses, rtol=2e-5)


@pytest.mark.parametrize("layout", ["data x fsdp, 2 microbatches"])
def test_with_adam_the_loss_stays_the_same(layout):
    whole, cut = trained("independent", None, adam=True), trained("independent", layout, adam=True)
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=ADAM_LOSS)


@functools.cache
def plain_engine(layout: str | None) -> tiny.Engine:
    return engine(layout, optimizer=tiny.UNIT)


def test_each_term_is_divided_by_its_own_global_weight_and_not_by_rows():
    rows, made = tiny.batch(ragged=True), plain_engine("4 microbatches")
    metrics = made.train([rows]).metrics[0]
    logits = made.ctx.student.apply(made.start.params["student"], {}, rows)[0].logits
    nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(tiny.ROWS), rows["label"]]
    weight = rows["weight"] * rows["labelled"]
    np.testing.assert_allclose(metrics["term/task"], (nll * weight).sum() / weight.sum(), rtol=1e-5)
    assert abs(metrics["term/task"] - nll[weight > 0].mean()) > 1e-3


@pytest.mark.parametrize("layout", [None, "4 microbatches", "fsdp"])
def test_rows_of_weight_zero_change_nothing(layout):
    rows = tiny.batch(ragged=True)
    empty = rows["weight"] == 0
    other = rows | {
        "image": np.where(empty[:, None, None, None], 1e3, rows["image"]).astype(np.float32),
        "label": np.where(empty, -1, rows["label"]).astype(np.int32),
    }
    assert empty.any()
    assert tiny.distance(*(plain_engine(layout).gradient(one) for one in (other, rows))) < 1e-6


@pytest.mark.parametrize("layout", [None, "4 microbatches"])
def test_weights_count_by_proportion_however_small_their_sum(layout):
    rows = tiny.batch(ragged=True)
    small = rows | {"weight": rows["weight"] * np.float32(2**-12)}
    assert tiny.distance(*(plain_engine(layout).gradient(one) for one in (small, rows))) < 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(tiny.Plain):
    """A loss that is not finite on rows that are padding."""

    def terms(self, vars, student, teacher, batch, *, clock, key):
        term = super().terms(vars, student, teacher, batch, clock=clock, key=key)["square"]
        return {"square": dataclasses.replace(term, values=jnp.where(batch["weight"] > 0, term.values, jnp.nan))}


def test_what_a_loss_says_of_padding_is_not_looked_at():
    rows = [tiny.batch(ragged=True)]
    poisoned, plain = (engine(None, recipe=recipe, teacher=None).train(rows) for recipe in (Poisoned(), tiny.Plain()))
    assert tiny.distance(poisoned.state.params, plain.state.params) < 1e-6
    np.testing.assert_allclose(poisoned.losses, plain.losses, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, tiny.CLASSES + 3])
def test_labels_of_unlabelled_rows_are_never_read(label):
    rows = tiny.batch(ragged=True)
    unknown = rows | {"label": np.where(rows["labelled"] == 0, label, rows["label"]).astype(np.int32)}
    assert tiny.identical(*(plain_engine(None).gradient(one) for one in (unknown, rows)))


@pytest.mark.parametrize("layout", [None, "4 microbatches", "fsdp"])
def test_a_total_weight_of_zero_gives_zero(layout):
    rows = tiny.batch() | {"weight": np.zeros(tiny.ROWS, np.float32)}
    trained = plain_engine(layout).train([rows])
    assert all(np.isfinite(value) for value in trained.metrics[0].values())
    assert trained.metrics[0]["loss"] == 0
    assert trained.metrics[0]["share/kd"] == 0
    assert tiny.identical(trained.start.params, trained.first.params)


def test_no_labelled_row_leaves_the_teachers_term_alone():
    rows = tiny.batch() | {"labelled": np.zeros(tiny.ROWS, np.float32)}
    wanted = engine(None, optimizer=tiny.UNIT, recipe=KD(task_weight=0.0)).gradient(rows)
    assert tiny.distance(plain_engine(None).gradient(rows), wanted) < 1e-6


@pytest.mark.parametrize("layout", [None, "4 microbatches", "fsdp"])
def test_padding_does_not_depend_on_where_it_stands(layout):
    rows = tiny.batch(16)
    padded = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in rows.items()}
    order = np.random.default_rng(1).permutation(32)
    mixed = {name: value[order] for name, value in padded.items()}
    wanted = half_engine().gradient(rows)
    for one in (padded, mixed):
        assert tiny.distance(plain_engine(layout).gradient(one), wanted) < GRADIENT


@functools.cache
def half_engine() -> tiny.Engine:
    return engine(None, optimizer=tiny.UNIT, batch_size=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(KD):
    @property
    def couples_batch(self):
        return True


BATCH_NORM = {"student": tiny.student(norm="batch", name="with BatchNorm")}


@pytest.mark.parametrize(("fields", "names"), [(BATCH_NORM, "with BatchNorm"), ({"recipe": Coupled()}, "Coupled")])
def test_microbatches_are_refused_where_examples_are_coupled(fields, names):
    def resolve(**more):
        return make_context(tiny.run(microbatches=2, **fields, **more), tiny.batch(), devices=jax.devices()[:1])

    with pytest.raises(InputError, match=f"microbatches = 2.*{names}.*microbatch_statistics='local'"):
        resolve()
    resolve(microbatch_statistics="local")


def test_local_statistics_are_those_of_each_microbatch():
    rows, fields = tiny.batch(), {"recipe": Supervised(), "teacher": None, **BATCH_NORM}
    cut = engine("2 microbatches", microbatch_statistics="local", optimizer=tiny.UNIT, **fields)
    halves = [{name: value[i::2] for name, value in rows.items()} for i in range(2)]
    half = engine(None, batch_size=tiny.ROWS // 2, optimizer=tiny.UNIT, **fields)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(half.gradient(one) for one in halves))
    assert tiny.distance(cut.gradient(rows), mean) < GRADIENT
    # the running statistics saw one microbatch after the other
    still = engine(None, batch_size=tiny.ROWS // 2, optimizer=optim.sgd(0.0), **fields)
    assert tiny.distance(cut.train([rows]).first.buffers, still.train(halves).state.buffers) < PARAMETERS


@pytest.mark.parametrize(
    ("projector", "couples"), [(Linear(), False), (Regressor(), True), (Regressor(batch_norm=False), False)]
)
def test_what_couples_is_told_by_the_part_that_couples(projector, couples):
    recipe = FitNet(student_taps=("body",), teacher_taps=("body",), projector=projector)
    assert recipe.couples_batch == couples
    assert Combine(recipes=(KD(), recipe)).couples_batch == couples
