"""Identities and limits that tie the logit losses to each other. In float64, so that a tolerance is the distance to the limit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiled, grad, value_and_grad

import jkd.losses
import jkd.targets

losses, targets = Compiled(jkd.losses), Compiled(jkd.targets)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return jnp.asarray(2 * rng.normal(size=(6, 10))), jnp.asarray(2 * rng.normal(size=(6, 10)))


@pytest.fixture
def labels():
    return jnp.asarray(np.random.default_rng(1).integers(0, 10, size=6))


def equal(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-12)


def at(p, labels):
    return jnp.take_along_axis(p, labels[:, None], -1)[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_dkd_with_the_teachers_own_weight(pair, labels, temperature):
    """KL = TCKD + (1 - p_y) NCKD (Zhao et al., their reformulation of KD)."""
    student, teacher = pair

    def dkd(alpha, beta):
        alpha, beta = jnp.asarray(alpha), jnp.asarray(beta)  # traced: one program for all of them
        return losses.dkd(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)

    rest = 1 - at(jax.nn.softmax(teacher / temperature), labels)
    equal(dkd(1.0, 0.0) + rest * dkd(0.0, 1.0), losses.forward_kl(student, teacher, temperature=temperature))
    equal(dkd(2.0, 3.0), 2 * dkd(1.0, 0.0) + 3 * dkd(0.0, 1.0))


def test_skew_without_mixture_is_the_plain_divergence(pair):
    equal(losses.skew_forward_kl(*pair, lam=0.0), losses.forward_kl(*pair))
    equal(losses.skew_reverse_kl(*pair, lam=0.0), losses.reverse_kl(*pair))
    equal(losses.skew_forward_kl(*pair, lam=1e-9), losses.forward_kl(*pair), rtol=1e-5)


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_skew_is_bounded(pair, name):
    assert jnp.all(getattr(losses, name)(1e4 * pair[0], 1e4 * pair[1], lam=0.1) <= np.log(10) + 1e-12)


def test_js_ends(pair):
    forward, reverse = losses.forward_kl(*pair), losses.reverse_kl(*pair)
    equal(losses.js(*pair, beta=0.0), forward)
    equal(losses.js(*pair, beta=1.0), reverse)
    # The formula itself vanishes at the ends with exactly these slopes; the next order is beta * chi², hence 1e-4.
    equal(losses.js(*pair, beta=1e-8) / 1e-8, forward, rtol=1e-4)
    equal(losses.js(*pair, beta=1 - 1e-8) / 1e-8, reverse, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_js_takes_a_schedule(pair, beta):
    """A traced beta gives what the number gives, at the ends too, and finite gradients there."""
    traced = jax.jit(lambda beta: losses.js(*pair, beta=beta))(beta)
    equal(traced, losses.js(*pair, beta=beta))
    gradient = grad(lambda s, beta: losses.js(s, pair[1], beta=beta).sum())(pair[0], beta)
    equal(gradient, grad(lambda s: losses.js(s, pair[1], beta=beta).sum())(pair[0]))


def test_js_is_symmetric_and_bounded(pair):
    student, teacher = pair
    equal(losses.js(student, teacher), losses.js(teacher, student))
    assert jnp.all(losses.js(1e4 * student, 1e4 * teacher) <= np.log(2) + 1e-12)


def test_alpha_beta_special_cases(pair):
    student, teacher = pair
    q, p = jax.nn.softmax(student), jax.nn.softmax(teacher)
    equal(losses.alpha_beta(*pair, alpha=1, beta=0), losses.forward_kl(*pair))
    equal(losses.alpha_beta(*pair, alpha=0, beta=1), losses.reverse_kl(*pair))
    equal(losses.alpha_beta(*pair, alpha=0.5, beta=0.5), 2 * jnp.sum((jnp.sqrt(p) - jnp.sqrt(q)) ** 2, -1))
    equal(losses.alpha_beta(*pair, alpha=1, beta=1), 0.5 * jnp.sum((p - q) ** 2, -1))


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.6), (0.5, -0.5), (0.0, 0.0)])
def test_alpha_beta_is_continuous(pair, alpha, beta):
    """The limits are those of the general formula: a step of 1e-4 changes the value by about as much."""
    near = losses.alpha_beta(*pair, alpha=alpha + 1e-4, beta=beta + 1.3e-4)
    equal(near, losses.alpha_beta(*pair, alpha=alpha, beta=beta), rtol=5e-3)


def test_hot_kl_is_half_the_centred_logit_mse(pair):
    """T -> infinity; the next order is 1 / T, hence 1e-3 at T = 1e4."""
    centred = [z - z.mean(-1, keepdims=True) for z in pair]
    equal(losses.forward_kl(*pair, temperature=1e4), 0.5 * losses.logit_mse(*centred), rtol=2e-3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "soft_cross_entropy"])
def test_gradients_keep_their_size_with_temperature(pair, name):
    """T² inside: scaling all logits by T and the temperature by T multiplies the value by T² and the gradient by T."""
    loss, T = getattr(losses, name), 3.0

    @grad
    def gradient(student, teacher, temperature):
        return loss(student, teacher, temperature=temperature).sum()

    student, teacher = pair
    equal(loss(T * student, T * teacher, temperature=T), T**2 * loss(student, teacher))
    equal(gradient(T * student, T * teacher, T), T * gradient(student, teacher, 1.0))


def test_temperature_for_each_position(pair):
    temperature = jnp.linspace(1.0, 4.0, 6)
    expected = [losses.forward_kl(*(z[i] for z in pair), temperature=temperature[i]) for i in range(6)]
    equal(losses.forward_kl(*pair, temperature=temperature), jnp.stack(expected))


@pytest.mark.parametrize(
    ("name", "classes"),
    [("forward_kl", 10), ("forward_kl", 100), ("soft_cross_entropy", 100), ("dkd", 10), ("topk_forward_kl", 10)],
)
def test_a_learned_temperature_has_its_slope_beside_masked_classes(name, classes):
    """The value's derivative with respect to T is that without the classes at -inf (or the padding of a sparse teacher)."""
    rng = np.random.default_rng(2)
    short = [jnp.asarray(2 * rng.normal(size=(6, classes))) for _ in range(2)]
    long = [jnp.concatenate([z, jnp.full((6, 3), -jnp.inf)], -1) for z in short]
    more = {"dkd": (jnp.arange(6),)}.get(name, ())

    @jax.jit
    def slopes(*inputs):
        function = getattr(losses, name)
        return [jax.grad(lambda t, x=x: function(*x, *more, temperature=t).sum())(2.0) for x in inputs]

    if name == "topk_forward_kl":
        ids, log_p, rest = kept(short[1], 3)
        padding = (jnp.concatenate([x, jnp.full((6, 1), fill)], -1) for x, fill in ((ids, 0), (log_p, -jnp.inf)))
        long, short = (long[0], *padding, rest), (short[0], ids, log_p, rest)
    equal(*slopes(long, short))


def test_tinyberts_soft_loss():
    """Its code: ``(- softmax(t / T) * log_softmax(s / T)).mean()``, over batch and classes."""
    student, teacher = np.random.default_rng(6).normal(size=(2, 4, 5))
    q, p = (np.exp(z / 2) / np.exp(z / 2).sum(-1, keepdims=True) for z in (student, teacher))
    equal(losses.soft_cross_entropy(student, teacher, temperature=2.0).mean() / (5 * 2**2), np.mean(-p * np.log(q)))


@pytest.mark.parametrize("classes", [8, 100])
def test_a_class_that_one_side_masks_contributes_nothing(classes):
    """Over few and over many classes: what is written from log-probabilities, with the class's term left out."""
    q, p = 2 * np.random.default_rng(3).normal(size=(2, classes))
    q[1], p[2] = -np.inf, -np.inf
    q, p = (z - np.logaddexp.reduce(z) for z in (q, p))
    both = np.setdiff1d(np.arange(classes), [1, 2])
    value = jax.jit(lambda q, p: [f(q, p) for f in (losses.forward_kl, losses.reverse_kl, losses.soft_cross_entropy)])(q, p)
    q, p = q[both], p[both]
    equal(value, [np.sum(np.exp(p) * (p - q)), np.sum(np.exp(q) * (q - p)), -np.sum(np.exp(p) * q)])


def test_adaptive_kl_lies_between_its_two_divergences(pair):
    bounds = jnp.stack([losses.forward_kl(*pair), losses.reverse_kl(*pair)])
    value = losses.adaptive_kl(*pair)
    assert jnp.all((bounds.min(0) <= value + 1e-12) & (value <= bounds.max(0) + 1e-12))


def test_adaptive_kl_does_not_differentiate_its_weights(pair):
    student, teacher = pair
    forward, reverse = losses.forward_kl(*pair), losses.reverse_kl(*pair)
    share = (losses.adaptive_kl(*pair) - reverse) / (forward - reverse)

    def fixed(s):
        return jnp.sum(share * losses.forward_kl(s, teacher) + (1 - share) * losses.reverse_kl(s, teacher))

    equal(grad(lambda s: losses.adaptive_kl(s, teacher).sum())(student), grad(fixed)(student), rtol=1e-7)


def test_cross_entropy_of_integers_and_one_hots_agree(pair, labels):
    one_hot = jax.nn.one_hot(labels, 10, dtype=float)
    for eps in (0.0, 0.1):
        equal(
            losses.cross_entropy(pair[0], labels, label_smoothing=eps),
            losses.cross_entropy(pair[0], one_hot, label_smoothing=eps),
        )


def test_cross_entropy_with_a_label_out_of_range_under_jit(pair):
    value = losses.cross_entropy(pair[0], jnp.array([-1, 10, 3, 0, 9, 100]))
    assert jnp.all(jnp.isfinite(value))


def test_wsld_is_a_weighted_cross_entropy(pair, labels):
    student, teacher = pair
    ratio = losses.cross_entropy(student, labels) / (losses.cross_entropy(teacher, labels) + 1e-7)
    weight = 1 - jnp.exp(-ratio)
    loss = lambda s: losses.soft_cross_entropy(s, teacher, temperature=4.0)  # noqa: E731
    equal(losses.wsld(student, teacher, labels), weight * loss(student))
    expected = grad(lambda s: jnp.sum(weight * loss(s)))(student)
    equal(grad(lambda s: losses.wsld(s, teacher, labels).sum())(student), expected)


def test_nkd_rest_does_not_see_the_label(pair, labels):
    """Its gradient on the other logits vanishes once their shares agree, whatever the label's probability."""
    student, teacher = pair
    other = student.at[jnp.arange(6), labels].add(3.0)
    gradient = grad(lambda s: (losses.nkd(s, student, labels, gamma=1.0) - losses.nkd(s, student, labels, gamma=0.0)).sum())
    np.testing.assert_allclose(gradient(other), np.zeros_like(other), atol=1e-12)


def test_pld_of_a_certain_teacher_is_cross_entropy(pair, labels):
    certain = 1e4 * jax.nn.one_hot(labels, 10, dtype=float)
    equal(losses.pld(pair[0], certain, labels), losses.cross_entropy(pair[0], labels))


def test_pld_is_convex(pair, labels):
    hessian = jax.jit(jax.hessian(lambda s: losses.pld(s, pair[1][0], labels[0])))(pair[0][0])
    assert jnp.linalg.eigvalsh(hessian).min() > -1e-12


def test_decoupled_softmax_keeps_positives_apart():
    """The positives' own scores do not enter each other's terms: a better second positive does not change the first's gradient."""
    positives = jnp.array([True, True, False, False])

    gradient = grad(lambda scores: losses.decoupled_softmax(scores, positives))
    first, second = (gradient(jnp.array([0.1, other, 0.2, 0.0]))[0] for other in (0.0, 5.0))
    equal(first, second)


def test_soft_top_k_selects_k():
    from jkd.losses.ranking import _threshold

    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 100)))
    t = _threshold(scores, 5.0)
    equal(jax.nn.sigmoid(scores + t[:, None]).sum(-1), np.full(4, 5.0))


# --- sparse teachers ----------------------------------------------------------------------------------------------------


def kept(teacher, k):
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
    return ids, log_p, 1 - jnp.exp(log_p).sum(-1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_ghost_is_at_most_the_full_divergence(pair, name, k):
    full = getattr(losses, name)(*pair)
    ghost = getattr(losses, f"topk_{name}")(pair[0], *kept(pair[1], k))
    assert jnp.all(ghost <= full + 1e-12)
    assert jnp.all(ghost >= 0)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", ["ghost", "zero", "renormalise"])
def test_everything_kept_is_the_full_divergence(pair, name, tail):
    ids, log_p, _ = kept(pair[1], 10)
    function = getattr(losses, f"topk_{name}")
    if (name, tail) == ("reverse_kl", "zero"):
        with pytest.raises(ValueError, match="infinite"):
            function(pair[0], ids, log_p, tail=tail)
        return
    value = function(pair[0], ids, log_p, jnp.zeros(6), tail=tail, temperature=2.0)
    equal(value, getattr(losses, name)(*pair, temperature=2.0))


def test_ghost_is_zero_only_where_the_kept_probabilities_agree(pair):
    _, teacher = pair
    ids, log_p, rest = kept(teacher, 3)
    elsewhere = teacher.at[jnp.arange(6)[:, None], ids].set(-jnp.inf)
    # Another order among the classes that were not kept, with the same total.
    shuffled = jnp.where(jnp.isfinite(elsewhere), -elsewhere, -jnp.inf)
    shuffled += jax.nn.logsumexp(elsewhere, -1, keepdims=True) - jax.nn.logsumexp(shuffled, -1, keepdims=True)
    student = jnp.where(jnp.isfinite(elsewhere), shuffled, teacher)
    assert jnp.all(losses.forward_kl(student, teacher) > 1e-3)
    np.testing.assert_allclose(losses.topk_forward_kl(student, ids, log_p, rest), np.zeros(6), atol=1e-12)
    assert jnp.all(losses.topk_forward_kl(student.at[jnp.arange(6), ids[:, 0]].add(1.0), ids, log_p, rest) > 1e-3)


def test_zero_policy_makes_the_student_more_certain(pair):
    """At its minimum the student puts p / sum(p) on the kept classes: the gradient there vanishes."""
    ids, log_p, _ = kept(pair[1], 3)
    student = jnp.full((6, 10), -60.0).at[jnp.arange(6)[:, None], ids].set(log_p)
    gradient = grad(lambda s: losses.topk_forward_kl(s, ids, log_p, tail="zero").sum())(student)
    np.testing.assert_allclose(gradient, np.zeros((6, 10)), atol=1e-12)


def test_a_leftover_that_rounding_took_costs_the_student_outside(pair):
    """A float32 1 - sum(p) of 0 or less counts as 1e-8 in the reverse KL, which else falls as the student's mass moves outside."""
    ids, log_p, _ = kept(10 * pair[1], 3)
    rest = jnp.array([0.0, -6e-8, 0.0, -1e-7, -0.0, -6e-8])

    @jax.jit
    def run(student, leftover):
        return jax.value_and_grad(lambda s: losses.topk_reverse_kl(s, ids, log_p, leftover).sum())(student)

    value, gradient = run(pair[0], rest)
    expected, expected_gradient = run(pair[0], jnp.full(6, 1e-8))
    equal(value, expected)
    equal(gradient, expected_gradient)
    outside = pair[0].at[jnp.arange(6)[:, None], ids].set(-30.0)
    assert jnp.all(losses.topk_reverse_kl(outside, ids, log_p, rest) > 18)  # log 1e8 = 18.4


def test_ghost_needs_the_leftover(pair):
    ids, log_p, _ = kept(pair[1], 3)
    with pytest.raises(ValueError, match="teacher_leftover .* is needed by tail='ghost'"):
        losses.topk_forward_kl(pair[0], ids, log_p)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_kl_is_unbiased(pair, temperature):
    """Over every possible draw of two classes, weighted by its probability, the estimates and their gradients average to the KL."""
    student, teacher = pair[0][0], pair[1][0]
    p, log_p = jax.nn.softmax(teacher / temperature), jax.nn.log_softmax(teacher / temperature)
    draws = jnp.stack(jnp.meshgrid(jnp.arange(10), jnp.arange(10), indexing="ij"), -1).reshape(-1, 2)
    chance = p[draws].prod(-1)

    def expectation(student):
        weights = jnp.full(2, 0.5)
        one = lambda ids: losses.sampled_forward_kl(student, ids, weights, log_p[ids], temperature=temperature)  # noqa: E731
        return jnp.sum(chance * jax.vmap(one)(draws))

    value, gradient = value_and_grad(expectation)(student)
    expected, expected_gradient = value_and_grad(lambda s: losses.forward_kl(s, teacher, temperature=temperature))(student)
    equal(value, expected)
    equal(gradient, expected_gradient)


@pytest.mark.parametrize(("temperature", "of_proposal"), [(1.0, 2.0), (2.0, 1.0)])
def test_sampled_kl_with_another_proposal_is_unbiased(pair, temperature, of_proposal):
    student, teacher = pair[0][0], pair[1][0]
    p, proposal = jax.nn.softmax(teacher / temperature), jax.nn.softmax(teacher / of_proposal)
    ratio = p / proposal
    one = lambda i: losses.sampled_forward_kl(student, i[None], ratio[i][None], temperature=temperature)  # noqa: E731
    expected = losses.soft_cross_entropy(student, teacher, temperature=temperature)
    equal(jnp.sum(proposal * jax.vmap(one)(jnp.arange(10))), expected)


def test_standardised_kl_ignores_scale_and_shift(pair):
    student, teacher = pair
    value = losses.forward_kl(targets.standardize(student, eps=0.0), targets.standardize(teacher, eps=0.0), temperature=2.0)
    other = losses.forward_kl(
        targets.standardize(3 * student + 1, eps=0.0), targets.standardize(0.1 * teacher - 2, eps=0.0), temperature=2.0
    )
    equal(value, other, rtol=1e-9)
