"""The chunked losses are those of whole logits, values and gradients, and hold no array of all tokens and classes.

One program answers for many parts: their values, and by `jax.vmap` of the pullback the gradient of each.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import losses
from jkd.losses import chunked
from jkd.losses.chunked.heads import Side
from jkd.losses.chunked.places import mesh_of
from jkd.losses.chunked.plan import choose
from jkd.losses.chunked.sweeps import Problem

LEADING, CLASSES, DIM, TEACHER_DIM = (3, 17), 197, 8, 12
# the two heads are padded differently
COLUMNS, TEACHER_COLUMNS = 203, 208
SOFTCAP = 20.0
SCHEDULES = {
    # blocks that divide neither the tokens nor the columns
    "tokens": chunked.Tokens(16, 60),
    "vocabulary": chunked.Vocabulary(31),
}
SUMS = (
    chunked.ForwardKL(),
    chunked.ReverseKL(),
    chunked.JS(0.3),
    chunked.SkewForwardKL(0.2),
    chunked.SkewReverseKL(0.2),
    chunked.AlphaBeta(0.2, 0.7),
    chunked.CrossEntropy(),
)
LIMITS = (
    chunked.AlphaBeta(0.0, 0.0),
    chunked.AlphaBeta(0.0, 0.7),
    chunked.AlphaBeta(0.7, 0.0),
    chunked.AlphaBeta(0.5, -0.5),
    chunked.JS(0),
    chunked.JS(1.0),
    chunked.SkewForwardKL(0.0),
    chunked.SkewReverseKL(0),
)
ONLINE = (chunked.ForwardKL(), chunked.ReverseKL(), chunked.CrossEntropy())


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape, scale=1.0: (scale * rng.normal(size=shape)).astype(dtype)  # noqa: E731
    return dict(
        student_hidden=normal(*LEADING, DIM),
        student_kernel=normal(DIM, COLUMNS, scale=2 / np.sqrt(DIM)),
        student_bias=normal(COLUMNS),
        teacher_hidden=normal(*LEADING, TEACHER_DIM),
        teacher_kernel=normal(TEACHER_DIM, TEACHER_COLUMNS, scale=2 / np.sqrt(TEACHER_DIM)),
    )


RNG = np.random.default_rng(1)
LABELS = RNG.integers(0, CLASSES, LEADING).astype(np.int32)
WEIGHTS = (RNG.random(LEADING) * (RNG.random(LEADING) > 0.3)).astype(np.float32)
SHARE = RNG.random(LEADING).astype(np.float32)


def sides(given):
    student = chunked.Head(given["student_kernel"], bias=given["student_bias"], softcap=SOFTCAP, classes=CLASSES)
    return given["student_hidden"], student, given["teacher_hidden"], chunked.Head(given["teacher_kernel"], classes=CLASSES)


def logits(given):
    student = jnp.einsum("...d,dv->...v", given["student_hidden"], given["student_kernel"])
    student = SOFTCAP * jnp.tanh((student + given["student_bias"][None, None]) / SOFTCAP)
    teacher = jnp.einsum("...d,dv->...v", given["teacher_hidden"], given["teacher_kernel"])
    return student[..., :CLASSES], teacher[..., :CLASSES]


def whole(parts, given, temperature):
    both = logits(given)
    return jnp.stack([part.full(*both, LABELS, temperature) for part in parts])


def blocked(parts, given, temperature, **options):
    mix = [(1.0, part) for part in parts]
    return jnp.stack(chunked.per_part(mix, *sides(given), labels=LABELS, temperature=temperature, **options))


def answers(function, parts, given, temperature, **options):
    """Values ``[parts, …]``, and for each part the gradient of its weighted sum by everything given."""

    @jax.jit
    def run(given):
        values, pullback = jax.vjp(lambda given: function(parts, given, temperature, **options), given)
        asked = jnp.eye(len(parts))[:, :, None, None] * WEIGHTS[None, None]
        return values, jax.vmap(pullback)(asked.astype(values.dtype))[0]

    return jax.device_get(run(given))


@functools.cache
def reference(parts, temperature):
    return answers(whole, parts, draw(), temperature)


def close(found, wanted, tolerance):
    """To this share of each array's largest entry."""
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-3))


def close_by_part(found, wanted, tolerances):
    """Values and gradients, each part by itself: the parts are of different sizes."""
    for k in range(len(found[0])):
        for mine, theirs, tolerance in zip(found, wanted, tolerances, strict=True):
            close(*(jax.tree.map(lambda x, k=k: x[k], tree) for tree in (mine, theirs)), tolerance)


# --- values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parts", [SUMS, LIMITS, ONLINE], ids=["sums", "limits", "online"])
def test_every_part_is_its_twin_on_whole_logits(parts, schedule):
    """1e-6 and 1e-5 of the largest: float32 sums in another order. Bias, soft-cap, padding and remainders are in it."""
    found = answers(blocked, parts, draw(), 2.0, schedule=SCHEDULES[schedule])
    assert found[0].shape == (len(parts), *LEADING)
    close_by_part(found, reference(parts, 2.0), (1e-6, 1e-5))
    # nothing passes to columns that are no classes
    assert not np.abs(found[1]["student_kernel"][..., CLASSES:]).any()
    assert not np.abs(found[1]["teacher_kernel"][..., CLASSES:]).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hyperparameters_may_be_traced_and_differ_by_token(schedule):
    share = np.where(SHARE < 0.2, 0, np.where(SHARE > 0.8, 1, SHARE)).astype(np.float32)
    temperature = (1 + SHARE).astype(np.float32)

    @jax.jit
    def found(given, share, temperature):
        parts = (chunked.JS(share), chunked.SkewForwardKL(share[0, 0]), chunked.CrossEntropy())
        return jax.value_and_grad(
            lambda given: jnp.sum(blocked(parts, given, temperature, schedule=SCHEDULES[schedule]) * WEIGHTS[None])
        )(given)

    @jax.jit
    def wanted(given, share, temperature):
        def total(given):
            student, teacher = logits(given)
            each = lambda s, t, beta, kelvin: losses.js(s, t, beta=beta, temperature=kelvin)  # noqa: E731
            js = jax.vmap(jax.vmap(each))(student, teacher, share, temperature)
            skew = losses.skew_forward_kl(student, teacher, lam=share[0, 0], temperature=temperature)
            return jnp.sum((js + skew + losses.cross_entropy(student, LABELS)) * WEIGHTS)

        return jax.value_and_grad(total)(given)

    (value, gradient), (exact, slope) = (f(draw(), share, temperature) for f in (found, wanted))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    close(gradient, slope, 1e-5)


def test_any_loss_of_logits_block_by_block():
    """A sort, a target made from both sides with a number for each token, and a loss that asks no teacher."""

    def interpolated(student, teacher, t):
        t = jnp.asarray(t)[..., None]
        return losses.soft_cross_entropy(student, (1 - t) * jax.lax.stop_gradient(student) + t * teacher)

    def entropy(student):
        return -jnp.sum(jax.nn.softmax(student) * jax.nn.log_softmax(student), axis=-1)

    parts = (chunked.Each(losses.adaptive_kl), chunked.Each(interpolated, (SHARE,)), chunked.Each(entropy, teacher=False))
    parts += (chunked.CrossEntropy(),)
    found = answers(blocked, parts, draw(), 2.0, schedule=SCHEDULES["tokens"])
    close_by_part(found, answers(whole, parts, draw(), 2.0), (1e-6, 1e-5))
    with pytest.raises(ValueError, match="an Each reads whole logits"):
        blocked(parts[:1], draw(), 1.0, schedule=SCHEDULES["vocabulary"])


MIX = ((0.5, chunked.CrossEntropy()), (2.0, chunked.JS(0.5)))


@functools.cache
def mixed(factor):
    """Value and gradient of the mix of whole logits, by the weights too."""

    def total(given, weights):
        values = whole([part for _, part in MIX], given, 2.0)
        return jnp.sum((0.5 * values[0] + factor * values[1]) * weights)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(draw(), WEIGHTS)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "chosen"])
def test_the_weighted_sum_of_a_mix(schedule):
    def total(given, weights):
        options = dict(labels=LABELS, temperature=2.0, schedule=SCHEDULES.get(schedule))
        return chunked.weighted_sum(MIX, *sides(given), weights=weights, **options)

    value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(draw(), WEIGHTS)
    np.testing.assert_allclose(value, mixed(2.0)[0], rtol=1e-6)
    close(gradient, mixed(2.0)[1], 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_is_right_whatever_was_expected(schedule):
    """The weights that were named, by a factor as a mean brings it; parts in another relation; tokens of other weights."""

    @jax.jit
    def gradient(given, factor, weights):
        def total(given):
            options = dict(labels=LABELS, temperature=2.0, weights=WEIGHTS, schedule=SCHEDULES[schedule])
            entropy, js = chunked.per_part(MIX, *sides(given), **options)
            return jnp.sum((0.5 * entropy + factor * js) * weights)

        return jax.grad(total)(given)

    close(jax.tree.map(lambda x: 7 * x, gradient(draw(), 2.0, WEIGHTS / 7)), mixed(2.0)[1][0], 1e-5)
    close(gradient(draw(), 3.0, WEIGHTS), mixed(3.0)[1][0], 1e-5)
    # some tokens, then the others
    half = (SHARE > 0.5).astype(np.float32)
    parts = [gradient(draw(), 2.0, WEIGHTS * share) for share in (half, 1 - half)]
    close(jax.tree.map(jnp.add, *parts), mixed(2.0)[1][0], 1e-5)


def test_only_what_is_asked_gets_a_gradient():
    def total(hidden, given):
        return chunked.weighted_sum(chunked.ReverseKL(), *sides(given | {"student_hidden": hidden}), weights=WEIGHTS)

    given = draw()
    gradient = jax.jit(jax.grad(total))(given["student_hidden"], given)
    close(gradient, reference((chunked.ReverseKL(),), 1.0)[1]["student_hidden"][0], 1e-5)
    with pytest.raises(TypeError, match="not by a temperature"):
        jax.grad(lambda t: jnp.sum(blocked((chunked.JS(),), given, t)))(2.0)


def test_extremes():
    """Logits of ±1e4, one-hot on either side: finite, and what whole logits give."""
    rng = np.random.default_rng(2)
    kernel = np.eye(6, dtype=np.float32) * 1e4
    hidden = np.concatenate([np.eye(6), -np.eye(6), rng.choice([-1, 0, 1], (4, 6))]).astype(np.float32)
    other = np.roll(hidden, 1, axis=0)
    parts = tuple(part for part in SUMS if not isinstance(part, chunked.CrossEntropy | chunked.AlphaBeta))

    @jax.jit
    def run(hidden):
        mix = [(1.0, part) for part in parts]
        mine = lambda h: jnp.stack(chunked.per_part(mix, h, kernel, other, kernel, schedule=chunked.Tokens(5, 4)))  # noqa: E731
        theirs = lambda h: jnp.stack([part.full(h @ kernel, other @ kernel, None, 1.0) for part in parts])  # noqa: E731
        return tuple((f(hidden), jax.grad(lambda h, f=f: f(h).sum())(hidden)) for f in (mine, theirs))

    (values, gradient), wanted = jax.device_get(run(hidden))
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()
    close((*values, gradient), (*wanted[0], wanted[1]), 1e-5)


def test_low_precision_is_summed_in_float32_and_float64_stays():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw())
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    found, wanted = answers(blocked, ONLINE, half, 1.0), answers(whole, ONLINE, rounded, 1.0)
    assert found[0].dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(found[1])} == {jnp.dtype(jnp.bfloat16)}
    # products of bfloat16 are exact in float32; the gradient's factors and itself are rounded to 2^-9
    close_by_part(found, wanted, (1e-5, 2e-2))
    with jax.enable_x64(True):
        exact = draw(np.float64)
        found = jax.jit(lambda given: blocked(ONLINE, given, 1.0, schedule=SCHEDULES["vocabulary"]))(exact)
        wanted = jax.jit(lambda given: whole(ONLINE, given, 1.0))(exact)
        assert found.dtype == jnp.float64
        close(found, wanted, 1e-13)


# --- memory and devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [chunked.Tokens(32), chunked.Vocabulary(128)], ids=["tokens", "vocabulary"])
def test_no_array_of_all_tokens_and_classes(schedule):
    tokens, vocab = 512, 2048

    def loss(hidden, head, teacher_hidden, teacher_head):
        weights = jnp.ones(tokens)
        return chunked.weighted_sum(
            chunked.JS(), hidden, head, teacher_hidden, teacher_head, weights=weights, schedule=schedule
        )

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, 16), (16, vocab), (tokens, 24), (24, vocab))]
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert max(numbers(program.as_text())) <= tokens * vocab // 16
    assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2


def numbers(text: str) -> list[int]:
    """How many numbers every array has that a compiled program speaks of."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]", text)
    return [int(np.prod([int(length) for length in shape.split(",") if length] or [1])) for shape in shapes]


@pytest.mark.parametrize(
    ("schedule", "prepared"),
    [(chunked.Tokens(4), False), (chunked.Tokens(4), True), (chunked.Vocabulary(64), False)],
    ids=["tokens", "tokens, by part", "vocabulary"],
)
def test_a_split_head_is_never_gathered(schedule, prepared):
    """Tokens over four devices, the vocabulary over two: nothing is gathered, and what the devices found is added up once."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rng, rows, vocab = np.random.default_rng(0), 8, 512
    shapes = ((rows, 8, DIM), (DIM, vocab), (rows, 8, TEACHER_DIM), (TEACHER_DIM, vocab))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    by_row, by_column = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(None, "tensor"))
    weights = rng.random((rows, 8)).astype(np.float32)
    labels = rng.integers(0, vocab, (rows, 8)).astype(np.int32)

    def loss(*sides):
        asked = dict(labels=labels, weights=weights, schedule=schedule)
        if not prepared:
            return chunked.weighted_sum(MIX, *sides, **asked)
        # as a step takes it: the gradient is prepared in the forward pass, and completed in the backward pass where it must be
        values = chunked.per_part(MIX, *sides, **asked)
        return sum(coef * (value * weights).sum() for (coef, _), value in zip(MIX, values, strict=True))

    placed = [jax.device_put(array, by_column if array.ndim == 2 else by_row) for array in arrays]
    function = jax.value_and_grad(loss, argnums=(0, 1))
    program = jax.jit(function, out_shardings=(NamedSharding(mesh, P()), (by_row, by_column))).lower(*placed).compile()
    text = program.as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    # a device's part of the gradients: of the head's and of the hidden states'
    head, hidden = DIM * vocab // 2, rows * 8 // 4 * DIM
    sums = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    of = lambda size: [("while" in line) for line in sums if size in numbers(line.split(" all-reduce")[0])]  # noqa: E731
    if isinstance(schedule, chunked.Tokens):
        assert of(head) == [False]  # once, after the last block
        assert of(hidden) == []  # each block's own, which add up to the same
    else:
        assert of(head) == []
        assert of(hidden) == [False]
    (value, gradient), (alone, wanted) = program(*placed), jax.jit(function)(*arrays)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    close(gradient, wanted, 1e-5)


# --- choices and mistakes ------------------------------------------------------------------------------------------------


def problem(tokens, columns, *parts, dim=512):
    def side():
        return Side(jax.ShapeDtypeStruct((tokens, dim), jnp.float32), jax.ShapeDtypeStruct((dim, columns), jnp.float32))

    fixed = dict(fixed=1.0, classes=columns, mesh=mesh_of(), shards=1, lanes=1)
    return Problem(side(), side(), None, None, ({},) * len(parts), ((),) * len(parts), parts, **fixed)


def test_the_cheaper_schedule_is_chosen():
    kl, js, each = chunked.ForwardKL(), chunked.JS(), chunked.Each(losses.adaptive_kl)
    assert isinstance(choose(problem(2048, 32768, kl), weighted=True), chunked.Tokens)
    # few tokens for the size of the head: its gradient would be read and written for each block of them
    assert isinstance(choose(problem(128, 32768, kl), weighted=True), chunked.Vocabulary)
    # logits are computed twice anyway
    assert isinstance(choose(problem(1024, 32768, kl), weighted=False), chunked.Vocabulary)
    assert isinstance(choose(problem(128, 32768, js, each), weighted=False), chunked.Tokens)
    for tokens, columns in ((2048, 32768), (100_000, 150_000), (7, 64)):
        for weighted in (True, False):
            found = choose(problem(tokens, columns, kl), weighted=weighted)
            part = found.rows / tokens if isinstance(found, chunked.Tokens) else found.columns / columns
            # logits of 256 tokens take the room of the gradient of a head 512 wide
            assert part <= (max(1 / 16, 256 / tokens) if tokens > 1000 else 4 / 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(student_kernel=lambda x: x[1:]),
            r"student_head must be \[dim, vocab\] with the dim of student_hidden float32\[3,17,8\]",
        ),
        (dict(student_bias=lambda x: x[1:]), r"student_head's bias must be \[vocab\]"),
        (dict(teacher_hidden=lambda x: x[1:]), r"teacher_hidden must have the leading shape \[3, 17\] of student_hidden"),
        (dict(teacher_kernel=lambda x: x[:, :190]), "the same classes, got 197 and 190; where one vocabulary is padded"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    given = draw()
    with pytest.raises(ValueError, match=message):
        blocked((chunked.ForwardKL(),), given | {name: f(given[name]) for name, f in change.items()}, 1.0)


def test_what_is_missing_is_named():
    given = sides(draw())
    with pytest.raises(ValueError, match="labels must be given"):
        chunked.per_token(chunked.CrossEntropy(), *given[:2])
    with pytest.raises(ValueError, match="teacher_hidden and teacher_head must be given"):
        chunked.per_token(chunked.ForwardKL(), *given[:2])
    with pytest.raises(ValueError, match=r"weights must be \[3, 17\]"):
        chunked.weighted_sum(chunked.ForwardKL(), *given, weights=WEIGHTS[0])
