"""What every loss needs: float32 at least, checks at trace time, and logs, norms and means that stay finite.

A quantity that is undefined at one point (0 log 0, the gradient of a norm at zero) is guarded with *two* ``where``: the inner
one keeps the undefined operand out of the expression, the outer one picks the limit. One ``where`` is not enough, because the
gradient of the branch not taken is still computed, and 0 * nan is nan.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._typing import Array, Bool, Float, PerPosition, Real

# --- dtypes -----------------------------------------------------------------------------------------------------------


def promote(*arrays: Any) -> tuple[jax.Array, ...]:
    """All arrays in one float dtype: float64 where one of them is float64, else float32 (bfloat16, float16, ints too)."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


# --- checks (shapes and dtypes only, so they run while tracing) ---------------------------------------------------------


def describe(array: Any) -> str:
    """``float32[4,10]``."""
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, np.shape(array)))}]"


def check_numeric(**arrays: Any) -> None:
    """Every array holds real numbers."""
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
        if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
            raise TypeError(f"{name} must hold real numbers, got {describe(array)}")


def check_rank(minimum: int, meaning: str, **arrays: Any) -> None:
    """Every array holds real numbers and has at least ``minimum`` axes; ``meaning`` names them (``[..., classes]``)."""
    check_numeric(**arrays)
    for name, array in arrays.items():
        if np.ndim(array) < minimum:
            raise ValueError(f"{name} must be {meaning}, with at least {minimum} axes, got {describe(array)}")


def check_exact_rank(rank: int, meaning: str, **arrays: Any) -> None:
    """Every array holds real numbers and has exactly ``rank`` axes; ``meaning`` names them."""
    check_numeric(**arrays)
    for name, array in arrays.items():
        if np.ndim(array) != rank:
            raise ValueError(f"{name} must be {meaning}, with {rank} axes, got {describe(array)}")


def check_nonempty(axis: int, meaning: str, **arrays: Any) -> None:
    """No array is empty along ``axis``."""
    for name, array in arrays.items():
        if np.shape(array)[axis] == 0:
            raise ValueError(f"{name} must have a non-empty {meaning} axis (axis {axis}), got {describe(array)}")


def check_same_shape(**arrays: Any) -> None:
    """All arrays have the first one's shape."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if np.shape(array) != np.shape(reference):
            raise ValueError(f"{name} must have the shape of {first} {describe(reference)}, got {describe(array)}")


def check_classes(
    student_logits: Any,
    teacher_logits: Any,
    *,
    student: str = "student_logits",
    teacher: str = "teacher_logits",
    axis: str = "classes",
) -> None:
    """Two equally shaped ``[..., classes]`` with at least one class; ``student`` and ``teacher`` are the arguments' names."""
    arrays = {student: student_logits, teacher: teacher_logits}
    check_rank(1, f"[..., {axis}]", **arrays)
    check_nonempty(-1, axis, **arrays)
    if np.shape(student_logits)[-1] != np.shape(teacher_logits)[-1]:
        raise ValueError(
            f"{student} and {teacher} must have the same number of {axis} (last axis), "
            f"got {describe(student_logits)} and {describe(teacher_logits)}"
        )
    check_same_shape(**arrays)


def check_labels(labels: Any, logits: Any, *, name: str = "labels", logits_name: str = "student_logits") -> None:
    """Integer labels with the shape of ``logits`` less the class axis. Their range is data, so it is not checked."""
    if not hasattr(labels, "dtype"):
        raise TypeError(f"{name} must be an integer array, got {type(labels).__name__}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, one class index for each position, got {describe(labels)}")
    if np.shape(labels) != np.shape(logits)[:-1]:
        raise ValueError(
            f"{name} must have the shape of {logits_name} {describe(logits)} without its last axis, got {describe(labels)}"
        )


def check_where(where: Any, shape: tuple[int, ...], *, meaning: str, name: str = "where") -> None:
    """A mask of that shape (True or 1 = counted)."""
    if not hasattr(where, "dtype"):
        raise TypeError(f"{name} must be a boolean or 0/1 array {meaning}, got {type(where).__name__}")
    if not any(jnp.issubdtype(where.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise TypeError(f"{name} must be a boolean or 0/1 array {meaning}, got {describe(where)}")
    if np.shape(where) != tuple(shape):
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, got {describe(where)}")


# --- softmax and divergences between log-probabilities ------------------------------------------------------------------


def per_class(value: PerPosition) -> Any:
    """A scalar stays, one value for each position gains the class axis."""
    return value if np.ndim(value) == 0 else jnp.asarray(value)[..., None]


def squared(temperature: PerPosition) -> Any:
    """T², in float32 at least: in float16 the square of 300 is inf."""
    if isinstance(temperature, (int, float)):
        return temperature * temperature
    (temperature,) = promote(temperature)
    return temperature * temperature


def check_temperature(temperature: PerPosition, logits: Any) -> None:
    """A scalar, or the axes of ``logits`` but the last (each may be 1). ``[batch, 1]`` beside ``[batch, classes]`` would broadcast
    to ``[batch, batch]``."""
    shape, positions = np.shape(temperature), np.shape(logits)[:-1]
    if shape and (len(shape) != len(positions) or any(a not in (1, b) for a, b in zip(shape, positions, strict=True))):
        raise ValueError(
            f"temperature must be a scalar, or one value for each position = {list(positions)} (the logits {describe(logits)} "
            f"without their last axis), got {describe(temperature)}"
        )


def tempered(logits: Any, temperature: PerPosition) -> Any:
    """``logits / temperature``; -inf stays, also in the gradient of a temperature that is learned (-inf / T² times 0 is nan)."""
    if isinstance(temperature, (int, float)):
        return logits if temperature == 1 else logits / temperature
    check_temperature(temperature, logits)
    kept = logits != -jnp.inf
    return jnp.where(kept, jnp.where(kept, logits, 0) / per_class(temperature), -jnp.inf)


def log_softmax(logits: Real[Array, "*batch classes"], temperature: PerPosition = 1.0) -> Float[Array, "*batch classes"]:
    """Log-probabilities of ``logits / temperature``; classes at -inf stay at -inf and receive no gradient."""
    scores = tempered(logits, temperature)
    limits = jnp.finfo(scores.dtype)
    # The guards of a row of -inf only, in the form that XLA fuses as well as the bare formula: where some class is real, the
    # largest is above the lowest float and the sum is at least 1.
    shifted = scores - jnp.maximum(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), limits.min)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True) + limits.tiny)


def softmax(logits: Real[Array, "*batch classes"], temperature: PerPosition = 1.0) -> Float[Array, "*batch classes"]:
    """Probabilities of ``logits / temperature``."""
    _, exponentials, total = shifted_exp(tempered(logits, temperature))
    return exponentials / total


def kl(log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """``sum_c p (log p - log q)`` in nats. A class that either side masks with -inf contributes nothing."""
    return jnp.sum(jnp.exp(log_p) * log_ratio(log_p, log_q), axis=-1)


def log_ratio(log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """``log p - log q``, and 0 for a class that either side masks with -inf.

    One ``where`` is enough: subtraction is linear, so no gradient of the branch not taken multiplies an inf.
    """
    difference = log_p - log_q
    return jnp.where(jnp.abs(difference) < jnp.inf, difference, 0)


# From about as many classes on, one more sum for each row costs less than one more pass over them.
WIDE = 64


def shifted_exp(scores: Float[Array, "*batch classes"], temperature: PerPosition = 1.0) -> tuple[Any, Any, Any]:
    """Scores less the row's largest, over T; their exponentials, and the sum of these ``[..., 1]`` (1 in a row of -inf only).

    Softmax does not see a shift, so no gradient is lost by stopping the one of the largest.
    """
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shifted = tempered(scores - jnp.where(top > -jnp.inf, top, 0), temperature)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return shifted, exponentials, jnp.where(total == 0, 1, total)


def kl_of_logits(p_logits: Float[Array, "*batch classes"], q_logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """`kl` between the softmaxes of two logit vectors (already divided by T).

    Sums of exponentials are divided by once for each row, after the sum over the classes: that holds fewer arrays of the inputs'
    size than two log-softmaxes do, and takes as little as a third of their time over a large vocabulary.
    """
    if p_logits.shape[-1] < WIDE:
        return kl(log_softmax(p_logits), log_softmax(q_logits))
    (p, exp_p, total_p), (q, _, total_q) = shifted_exp(p_logits), shifted_exp(q_logits)
    difference = p - q
    kept = jnp.abs(difference) < jnp.inf
    mass = jnp.sum(jnp.where(kept, exp_p, 0), axis=-1)
    value = jnp.sum(exp_p * jnp.where(kept, difference, 0), axis=-1)
    return (value + mass * (jnp.log(total_q) - jnp.log(total_p))[..., 0]) / total_p[..., 0]


def cross_entropy_of_logits(
    p_logits: Float[Array, "*batch classes"], q_logits: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """`cross_entropy_of` the softmaxes of two logit vectors (already divided by T), as `kl_of_logits` is written."""
    if p_logits.shape[-1] < WIDE:
        return cross_entropy_of(softmax(p_logits), log_softmax(q_logits))
    _, exp_p, total_p = shifted_exp(p_logits)
    return cross_entropy_with(exp_p, q_logits) / total_p[..., 0]


def cross_entropy_with(
    p: Float[Array, "*batch classes"], q_logits: Float[Array, "*batch classes"], temperature: PerPosition = 1.0
) -> Float[Array, "*batch"]:
    """`cross_entropy_of` p and the softmax of logits / T. The mask is read off the logits: no log-softmax is kept for it."""
    q, _, total = shifted_exp(q_logits, temperature)
    kept = q_logits > -jnp.inf
    # The normaliser is the same for all classes of a row, so it is taken off once.
    mass = jnp.sum(jnp.where(kept, p, 0), axis=-1)
    return mass * jnp.log(total)[..., 0] - jnp.sum(p * jnp.where(kept, q, 0), axis=-1)


def kl_to_mixture(
    log_p: Float[Array, "*batch classes"], weight_p: PerPosition, log_q: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """``KL(p || w p + (1 - w) q)`` in nats, w a scalar.

    The mixture is summed as probabilities. For w > 0 it only underflows where p does, and there the class contributes nothing;
    w = 0 is the plain divergence, asked for by name where w is a number and chosen at run time where it is traced.
    """
    if isinstance(weight_p, (int, float)) and weight_p == 0:
        return kl(log_p, log_q)
    p = jnp.exp(log_p)
    mixture = weight_p * p + (1 - weight_p) * jnp.exp(log_q)
    # Of the ways to write this guard, the one that XLA fuses as well as the bare formula (`benchmarks/losses.py`).
    ratio = jnp.where(p > 0, log_p - jnp.log(mixture + jnp.finfo(mixture.dtype).tiny), 0)
    value = jnp.sum(p * ratio, axis=-1)
    return value if isinstance(weight_p, (int, float)) else jnp.where(weight_p == 0, kl(log_p, log_q), value)


def cross_entropy_of(p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """``- sum_c p log q`` in nats. A class that the student masks with -inf contributes nothing."""
    return -jnp.sum(p * jnp.where(log_q > -jnp.inf, log_q, 0), axis=-1)


def log_mix(
    weight_p: PerPosition, log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """``log(w p + (1 - w) q)``, exact where p or q underflow, and -inf only where both are."""
    kept = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    weight = per_class(weight_p)
    top = jax.lax.stop_gradient(jnp.where(kept, jnp.maximum(log_p, log_q), 0))
    total = weight * jnp.exp(log_p - top) + (1 - weight) * jnp.exp(log_q - top)
    # A weight of exactly 0 or 1 leaves total = 0 where the side that counts has underflowed; it has no mass there.
    kept &= total > 0
    return jnp.where(kept, jnp.log(jnp.where(kept, total, 1)) + top, -jnp.inf)


def masked_logsumexp(x: Float[Array, "*batch classes"], keep: Any) -> Float[Array, "*batch"]:
    """``log sum exp`` over the classes that ``keep`` holds; -inf, with no gradient, where it holds none."""
    keep = keep & (x > -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(keep, x, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)
    total = jnp.sum(jnp.where(keep, jnp.exp(jnp.where(keep, x - top, 0)), 0), axis=-1)
    some = total > 0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top[..., 0], -jnp.inf)


def indices(labels: Any) -> jax.Array:
    """int32: in the labels' own uint8 or int8 the number of classes, and so every bound, may wrap around."""
    return jnp.asarray(labels, jnp.int32)


def at_label(values: Real[Array, "*batch classes"], labels: Any) -> Real[Array, "*batch"]:
    """``values[..., labels]``. A label out of range is not an error under jit: it reads the last or first class."""
    return jnp.take_along_axis(values, indices(labels)[..., None], axis=-1, mode="clip")[..., 0]


def log_softmax_of(logits: Float[Array, "*batch classes"], ids: Any) -> Float[Array, "*batch k"]:
    """The log-softmax's entries of the classes ``ids`` ``[..., k]``. No others are computed: half the time, and no memory of the
    logits' size."""
    shifted, _, total = shifted_exp(logits)
    return jnp.take_along_axis(shifted, indices(ids), axis=-1, mode="clip") - jnp.log(total)


def log_softmax_at(logits: Float[Array, "*batch classes"], labels: Any) -> Float[Array, "*batch"]:
    """`at_label` of the log-softmax."""
    return log_softmax_of(logits, labels[..., None])[..., 0]


def is_label(labels: Any, classes: int) -> jax.Array:
    """``[..., classes]`` boolean, True at the label."""
    every = jnp.arange(classes, dtype=jnp.int32).reshape((1,) * np.ndim(labels) + (classes,))
    return indices(labels)[..., None] == every


# --- norms, correlations, means -----------------------------------------------------------------------------------------


@jax.custom_jvp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log(1 + exp x)``; `jax.nn.softplus` with less work (no handling of infinities) and nothing but x kept for its gradient."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


softplus.defjvps(lambda tangent, answer, x: jax.nn.sigmoid(x) * tangent)


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root with gradient 0 (instead of inf) at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def norm(x: Float[Array, "..."], axis: int | tuple[int, ...] = -1, *, keepdims: bool = False) -> Float[Array, "..."]:
    """Euclidean norm with gradient 0 at 0."""
    return safe_sqrt(jnp.sum(x * x, axis=axis, keepdims=keepdims))


def normalize(x: Float[Array, "..."], axis: int | tuple[int, ...] = -1, *, eps: float = 1e-12) -> Float[Array, "..."]:
    """``x / |x|``. PyTorch divides a vector shorter than ``eps`` by ``eps``; here it stays itself, so that the gradient at
    zero is of order 1 rather than 1/eps."""
    length = norm(x, axis, keepdims=True)
    return x / jnp.where(length > eps, length, 1)


def where_like(where: Bool[Array, "..."] | Real[Array, "..."], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The mask as floats of ``values``' dtype, with trailing axes of size 1 up to its rank."""
    return jnp.asarray(where).astype(values.dtype).reshape(np.shape(where) + (1,) * (values.ndim - np.ndim(where)))


def masked_mean(
    values: Float[Array, "..."],
    where: Any = None,
    axis: int | tuple[int, ...] | None = None,
    *,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Mean over ``axis`` of what ``where`` keeps (0 where it keeps nothing).

    ``where`` broadcasts against ``values`` and has its rank. What is masked out may be nan.
    """
    if where is None:
        return jnp.mean(values, axis=axis, keepdims=keepdims)
    weight = jnp.broadcast_to(jnp.asarray(where).astype(values.dtype), values.shape)
    count = jnp.sum(weight, axis=axis, keepdims=keepdims)
    total = jnp.sum(jnp.where(weight != 0, values, 0) * weight, axis=axis, keepdims=keepdims)
    return total / jnp.where(count != 0, count, 1)
