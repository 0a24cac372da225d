"""Features, relations, attention and contrast: what the table's common checks don't reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiled, grad

import jkd.losses

losses = Compiled(jkd.losses)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- resolutions --------------------------------------------------------------------------------------------------------


def test_larger_map_is_averaged_as_pytorch_does():
    """adaptive_avg_pool2d from 5 to 3 has the cells 0..1, 1..3 and 3..4: they overlap."""
    column = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 5, 1, 1)
    for student, teacher in ((column, jnp.zeros((1, 3, 1, 1))), (jnp.zeros((1, 3, 1, 1)), column)):
        root = jnp.sqrt(losses.mse(student, teacher))
        np.testing.assert_allclose(root.reshape(3), [1.5, (2 + 4 + 8) / 3, 12.0], rtol=1e-6)


def test_each_axis_takes_the_smaller_size():
    wide, tall = normal(2, 4, 8, 3), normal(2, 8, 4, 3, seed=1)
    expected = losses.mse(wide.reshape(2, 4, 4, 2, 3).mean(3), tall.reshape(2, 4, 2, 4, 3).mean(2))
    np.testing.assert_allclose(losses.mse(wide, tall), expected, rtol=1e-6)


def test_context_has_the_levels_below_the_height():
    """Also over a narrower map, as in the authors' code: 3 x 2 is pooled to 2 x 2 and to 1 x 1."""
    rows = np.array([[1.0, 2.0], [3.0, 5.0], [0.0, -4.0]], np.float32)
    pooled = np.stack([(rows[0] + rows[1]) / 2, (rows[1] + rows[2]) / 2])
    expected = (np.mean(rows**2) + np.mean(pooled**2) / 2 + np.mean(rows) ** 2 / 4) / 1.75
    value = losses.hierarchical_context(rows[..., None], np.zeros((3, 2, 1), np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


# --- memory -------------------------------------------------------------------------------------------------------------


def temporary_bytes(function, *inputs):
    program = jax.jit(jax.value_and_grad(lambda *arrays: jnp.mean(function(*arrays))))
    return program.lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def test_angles_take_memory_of_pairs_not_triples():
    small, large = (temporary_bytes(losses.rkd_angle, normal(n, 16), normal(n, 16, seed=1)) for n in (64, 256))
    assert large < 30 * 256**2 * 4  # 256³ floats are 256 of these
    assert large < 20 * small  # 4² = 16; triples would give 4³ = 64


@pytest.mark.parametrize("name", ["rkd_angle", "rkd_distance", "similarity_preserving", "linear_cka_distance"])
def test_eight_devices_share_the_work(name):
    """Each computes its own anchors (an eighth of the operations), and not every device all of them."""

    def operations(*inputs):
        program = jax.jit(jax.value_and_grad(lambda s, t: jnp.mean(getattr(losses, name)(s, t))))
        return program.lower(*inputs).compile().cost_analysis()["flops"]

    inputs = (normal(64, 32), normal(64, 32, seed=1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(inputs, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert operations(*split) < 0.2 * operations(*inputs)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (losses.neuron_selectivity, (4, 4, 4, 512)),
        (losses.inter_channel, (4, 4, 4, 512)),
        (lambda s, t: losses.self_relation_kl(s, t, heads=48), (4, 64, 768)),
        (losses.linear_cka_distance, (1024, 32)),
        (losses.linear_cka_distance, (32, 1024)),
    ],
    ids=["neuron_selectivity", "inter_channel", "self_relation_kl", "cka tall", "cka wide"],
)
def test_memory_is_a_small_multiple_of_the_inputs(function, shape):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    assert temporary_bytes(function, student, teacher) < 4 * (student.nbytes + teacher.nbytes)


def test_contrast_never_holds_every_negative():
    batch, dim, size, negatives = 16, 32, 512, 1024
    inputs = crd_inputs(batch, dim, size, negatives)
    used = temporary_bytes(lambda s, *rest: losses.crd(s, *rest)[0], *inputs)
    assert used < batch * negatives * dim * 4 / 2


# --- masks --------------------------------------------------------------------------------------------------------------

POSITIONS = ("attention_transfer", "factor_transfer", "neuron_selectivity", "channel_wise")
EXAMPLES = (
    "pearson_distance",
    "similarity_preserving",
    "pkt",
    "rkd_distance",
    "rkd_angle",
    "correlation_congruence",
    "linear_cka_distance",
    "info_nce",
    "dist",
    "class_correlation",
    "batch_correlation",
)


def masked(name):
    """Student, teacher, and a mask that drops something."""
    if name in POSITIONS:
        keep = jnp.asarray(np.random.default_rng(2).integers(0, 2, size=(3, 4, 4)), bool)
        return normal(3, 4, 4, 5), normal(3, 4, 4, 5, seed=1), keep
    return normal(6, 5), normal(6, 5, seed=1), jnp.array([True, False, True, True, False, True])


@pytest.mark.parametrize("name", POSITIONS + EXAMPLES)
def test_masks(name):
    """What is masked may be nan; nothing kept is finite and without gradient; a mask of ones changes nothing."""
    student, teacher, keep = masked(name)
    function = getattr(losses, name)

    @jax.jit
    def run(student, teacher, where):
        def total(student):
            value = function(student, teacher, where=where)
            return jnp.sum(value), value

        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(student)
        return value, gradient

    spoiled = [jnp.where(keep[..., None], x, jnp.nan) for x in (student, teacher)]
    expected, expected_gradient = run(student, teacher, keep)
    value, gradient = run(*spoiled, keep)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert not np.any(np.asarray(gradient)[~np.asarray(keep)])

    value, gradient = run(student, teacher, jnp.zeros_like(keep))
    assert np.all(np.isfinite(value))
    assert not np.any(gradient)
    if name not in ("linear_cka_distance", "dist"):  # two sides without a direction are at distance 1
        assert not np.any(value)

    value, _ = run(student, teacher, jnp.ones_like(keep))
    np.testing.assert_allclose(value, function(student, teacher), rtol=1e-5, atol=1e-7)


def attention_inputs(name):
    if name == "self_relation_kl":
        return normal(3, 4, 6), normal(3, 4, 12, seed=1), {"heads": 2}
    if name == "value_relation_kl":
        return normal(3, 2, 4, 5), normal(3, 2, 4, 6, seed=1), {}
    return normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), {}


@pytest.mark.parametrize("name", ["attention_scores_mse", "attention_kl", "value_relation_kl", "self_relation_kl"])
def test_padding_changes_no_example(name):
    """Examples of 4, 2 and 0 real tokens: each has the value that it has alone, without its padding."""
    student, teacher, more = attention_inputs(name)
    function = getattr(losses, name)
    lengths = (4, 2, 0)
    mask = jnp.arange(4)[None, :] < jnp.array(lengths)[:, None]

    def cut(x, length):
        if name == "self_relation_kl":
            return x[:length]
        return x[:, :length] if name == "value_relation_kl" else x[:, :length, :length]

    def spoil(x):
        """What padded tokens hold does not matter."""
        if name == "self_relation_kl":
            return jnp.where(mask[..., None], x, jnp.nan)
        real = mask[:, None, :, None]
        return jnp.where(real if name == "value_relation_kl" else real & mask[:, None, None, :], x, jnp.nan)

    @jax.jit
    def run(student, teacher):
        def total(student):
            value = function(student, teacher, mask=mask, **more)
            return jnp.sum(value), value

        return jax.value_and_grad(total, has_aux=True)(student)

    (_, value), gradient = run(student, teacher)
    (_, spoiled), spoiled_gradient = run(spoil(student), spoil(teacher))
    np.testing.assert_allclose(spoiled, value, rtol=1e-6)
    np.testing.assert_allclose(spoiled_gradient, gradient, rtol=1e-5, atol=1e-7)
    for i, length in enumerate(lengths[:2]):
        np.testing.assert_allclose(value[i], function(cut(student[i], length), cut(teacher[i], length), **more), rtol=1e-5)
    assert value[2] == 0
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[2])


@pytest.mark.parametrize("name", ["attention_scores_mse", "attention_kl", "value_relation_kl", "self_relation_kl"])
def test_a_packed_row_is_its_documents(name):
    """Rows of documents of 1 and 3, of 2 and 1 tokens with padding, and of 4: the mean over tokens (of scores: pairs) of what each
    document gives in a row of its own, and no slope between them."""
    student, teacher, more = attention_inputs(name)
    function = getattr(losses, name)
    segment = jnp.array([[1, 2, 2, 2], [7, 7, 3, 0], [1, 1, 1, 1]])

    def own(x, places):
        if name == "self_relation_kl":
            return x[places]
        return x[:, places] if name == "value_relation_kl" else x[:, places, places]

    def packed(student, **among):
        value = function(student, teacher, **among, **more)
        return jnp.sum(value), value

    run = jax.jit(jax.value_and_grad(packed, has_aux=True))
    (_, value), gradient = run(student, mask=segment > 0, segment=segment)
    documents = [[slice(0, 1), slice(1, 4)], [slice(0, 2), slice(2, 3)], [slice(0, 4)]]
    for row, places in enumerate(documents):
        each = [function(own(student[row], place), own(teacher[row], place), **more) for place in places]
        sizes = np.array([place.stop - place.start for place in places])
        expected = np.average(each, weights=sizes**2 if name == "attention_scores_mse" else sizes)
        np.testing.assert_allclose(value[row], expected, rtol=1e-5, err_msg=str(row))
    if student.shape[-1] == student.shape[-2]:
        same = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
        assert not np.any(np.where(same[:, None], 0, gradient))
    assert np.all(np.isfinite(gradient))
    (_, unpacked), _ = run(student, segment=jnp.ones_like(segment))
    np.testing.assert_allclose(unpacked, function(student, teacher, **more), rtol=1e-6)
    assert (np.abs(unpacked - value)[:2] > 1e-3).all()


# --- contrast -----------------------------------------------------------------------------------------------------------


def crd_inputs(batch=4, dim=8, size=20, negatives=6, scale=30.0):
    rng = np.random.default_rng(3)
    bank = rng.normal(size=(2, size, dim)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=-1, keepdims=True)
    memory = {"student": jnp.asarray(bank[0]), "teacher": jnp.asarray(bank[1])}
    memory |= {"student_scale": jnp.float32(scale), "teacher_scale": jnp.float32(scale)}
    index = jnp.asarray(rng.permutation(size)[:batch], jnp.int32)
    others = jnp.asarray(rng.integers(0, size, size=(batch, negatives)), jnp.int32)
    return normal(batch, dim), normal(batch, dim, seed=1), index, others, memory


def test_one_hot_targets_are_info_nce():
    student, teacher = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (normal(5, 8), normal(5, 8, seed=1)))
    similarities = jnp.einsum("id,jd->ij", student, teacher)
    np.testing.assert_allclose(
        losses.soft_contrastive(similarities, jnp.eye(5), temperature=0.1),
        losses.info_nce(student, teacher, temperature=0.1),
        rtol=1e-5,
    )


def test_memory_is_moved_by_momentum_and_only_where_written():
    student, teacher, index, negatives, memory = crd_inputs()
    where = jnp.array([True, True, False, True])
    _, after = losses.crd(student, teacher, index, negatives, memory, momentum=0.25, where=where)
    for side, own in (("student", student), ("teacher", teacher)):
        expected = np.array(memory[side])
        for b in (0, 1, 3):
            row = 0.25 * expected[index[b]] + 0.75 * own[b] / np.linalg.norm(own[b])
            expected[index[b]] = row / np.linalg.norm(row)
        np.testing.assert_allclose(after[side], expected, rtol=1e-5, atol=1e-7)
        assert after[f"{side}_scale"] == memory[f"{side}_scale"]


def test_first_batch_sets_the_scale_once_and_passes_no_gradient():
    student, teacher, index, negatives, memory = crd_inputs(scale=-1.0)
    candidates = np.concatenate([np.asarray(index)[:, None], negatives], 1)
    unit = np.asarray(student) / np.linalg.norm(student, axis=1, keepdims=True)
    scores = np.einsum("bd,bkd->bk", unit, np.asarray(memory["teacher"])[candidates])
    value, after = losses.crd(student, teacher, index, negatives, memory)
    np.testing.assert_allclose(after["student_scale"], np.exp(scores / 0.07).mean() * 20, rtol=1e-4)

    fixed = memory | {name: after[name] for name in ("student_scale", "teacher_scale")}
    again, later = losses.crd(student, teacher, index, negatives, fixed)
    assert later["student_scale"] == after["student_scale"]
    np.testing.assert_allclose(value, again, rtol=1e-6)
    slope = grad(lambda s, m: jnp.sum(losses.crd(s, teacher, index, negatives, m)[0]))
    gradients = [slope(student, m) for m in (memory, fixed)]
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5)


def test_memory_has_more_rows_than_the_index_has_numbers():
    """Rows in uint8, a memory of 300: what is dropped writes no row, and negatives beyond 255 are read."""
    student, teacher, _, _, memory = crd_inputs(size=300)
    index, negatives = np.array([0, 255, 3, 7], np.uint8), np.full((4, 2), 299, np.int32)
    where = jnp.array([True, True, False, True])
    value, after = losses.crd(student, teacher, index, negatives, memory, where=where)
    expected, expected_after = losses.crd(student, teacher, index.astype(np.int32), negatives, memory, where=where)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(after["student"], expected_after["student"])
