"""Targets with more classes than the labels have: each class split along the directions in which the teacher's features vary."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jkd import losses, schedules, sharding, targets
from jkd.errors import InputError
from jkd.recipe import Recipe, Vars, label_weight
from jkd.recipes.heads import pooled
from jkd.recipes.logits import with_task
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Model, Term, Tree, subtree

if TYPE_CHECKING:
    from jkd.data import Data


def with_subclasses(
    teacher: Model,
    data: Data,
    *,
    features: str,
    head: str = "head",
    subclasses: int = 10,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Model:
    """The teacher with a further answer: into which part of each class an example falls (``heads["subclasses"]``, logits).

    For a function node of an `Experiment`: ``subclasses=lambda teacher: recipes.with_subclasses(teacher, data, features="pool")``,
    and a run with ``teacher="subclasses"``. It reads the labelled training examples once, through ``data.eval_maps``, and takes the
    principal components of each class's features, in the null space of the teacher's last layer (what that layer sees is in the
    logits already): ``a_c = ((h - mean_c) V_c / sqrt(variance_c)) R / temperature``, of ``subclasses / 2`` components, turned by a
    random rotation R. The logits of class c's parts are a_c and -a_c. The paper's temperature and its count of components could not
    be checked.

    Args:
        teacher: a Model with weights.
        data: what is read.
        features: tap of what the last layer reads, ``[batch, features]`` or a map that is averaged over its positions.
        head: path of the last layer, whose ``kernel`` is ``[features, classes]``.
        subclasses: S for each class, even; the paper tries 5 to 10.
        temperature: of the parts.
        seed: of R.
        batch_size: examples read at a time, on all devices together.

    Returns:
        A Model with the teacher's weights under ``network`` and the projections under ``subclasses``.

    Raises:
        InputError: no weights or no such layer; ``subclasses`` that is odd, or needs more components than the features have
            outside the last layer's span; a class with fewer labelled examples than components.
    """
    kernel = subtree(teacher.params, head).get("kernel")
    if not teacher.initialised or kernel is None or kernel.ndim != 2:
        raise InputError(
            f"with_subclasses: {teacher.name} has no weights {head}/kernel [features, classes]; name its last layer"
        )
    width, classes = kernel.shape
    count = subclasses // 2
    if subclasses < 2 or subclasses % 2 or count > width - classes:
        raise InputError(
            f"with_subclasses(subclasses={subclasses}): give an even number from 2 to {2 * (width - classes)} (two for each component; "
            f"{width} features less {classes} classes)"
        )
    kernel = np.asarray(jax.device_get(kernel), np.float64)
    null = np.linalg.svd(kernel.T, full_matrices=True)[2][classes:].T
    counts, means, moments = _statistics(teacher, data, features, width, classes, batch_size)
    short = np.flatnonzero(counts <= count)
    if len(short):
        raise InputError(
            f"with_subclasses: class {short[0]} has {counts[short[0]]:g} labelled examples; {count} components need more"
        )
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, count)))[0]
    directions = np.empty((classes, width, count))
    for c in range(classes):
        variance, axes = np.linalg.eigh(null.T @ moments[c] @ null)
        variance, axes = np.maximum(variance[::-1][:count], 1e-12), axes[:, ::-1][:, :count]
        directions[c] = (null @ axes / np.sqrt(variance)) @ rotation / temperature
    projections = {"mean": means.astype(np.float32), "directions": directions.astype(np.float32)}
    return splitting(teacher, features, projections)


def _statistics(teacher: Model, data: Data, features: str, width: int, classes: int, batch_size: int):
    """Of each class's features: how many there are, their mean ``[classes, width]`` and covariance, float64."""
    mesh = sharding.MeshShape().build()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    process = (jax.process_index(), jax.process_count())
    places = sharding.shardings(sharding.parameter_specs(teacher.params, mesh), mesh)
    everywhere = sharding.shardings(jax.tree.map(lambda _: PartitionSpec(), teacher.buffers), mesh)
    weights = sharding.put(teacher.params, places), sharding.put(teacher.buffers, everywhere)

    @jax.jit
    def look(params: Tree, buffers: Tree, batch: Batch, centre: Array) -> Tree:
        taps = teacher.apply(params, buffers, batch, taps=(features,))[0].taps
        own = jax.nn.one_hot(batch["label"], classes) * label_weight(batch)[:, None]
        x = jnp.where(label_weight(batch)[:, None] > 0, pooled(taps[features]).astype(jnp.float32) - centre, 0)
        sums = functools.partial(jnp.einsum, precision="highest")
        return own.sum(0), sums("bc,bi->ci", own, x), sums("bc,bi,bj->cij", own, x, x)

    centre, total = np.zeros((1, width), np.float32), None
    for rows in dataclasses.replace(data, eval=data.train, streams=()).eval_batches(batch_size, process=process):
        batch = sharding.put_batch(rows, mesh)
        if total is None:  # near the mean, so that squares of what is left lose no digits
            count, first, _ = jax.device_get(look(*weights, batch, centre))
            centre = (first.sum(0) / max(count.sum(), 1))[None].astype(np.float32)
        found = [np.float64(one) for one in jax.device_get(look(*weights, batch, centre))]
        total = found if total is None else [before + more for before, more in zip(total, found, strict=True)]
    assert total is not None  # a training set is not empty
    counts, first, second = total
    divisor = np.maximum(counts, 1)[:, None]
    means = first / divisor
    covariance = second / divisor[..., None] - means[:, :, None] * means[:, None, :]
    return counts, means + centre, covariance


def splitting(teacher: Model, features: str, projections: Tree) -> Model:
    """The teacher with ``heads["subclasses"] = [(h - mean) V, -(h - mean) V]`` ``[batch, classes, subclasses]``, h its ``features``.

    Args:
        teacher: a Model.
        features: a tap, ``[batch, width]`` or a map that is averaged over its positions.
        projections: ``mean`` ``[classes, width]`` and ``directions`` V ``[classes, width, subclasses / 2]``.
    """

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        wanted = tuple(dict.fromkeys((features, *taps)))
        own, buffers = teacher.apply(params["network"], buffers, batch, taps=wanted, train=train, key=key)
        mean, directions = (params["subclasses"][name].astype(jnp.float32) for name in ("mean", "directions"))
        x = pooled(own.taps[features]).astype(jnp.float32)
        # (x - mean) V, without an array [batch, classes, features]
        along = jnp.einsum("bi,cik->bck", x, directions) - jnp.einsum("ci,cik->ck", mean, directions)[None]
        heads = {**own.heads, "subclasses": jnp.concatenate([along, -along], -1)}
        return own.replace(heads=heads, taps={path: own.taps[path] for path in taps}), buffers

    params = {"network": teacher.params, "subclasses": projections}
    return Model(
        init=lambda key: (params, teacher.buffers),
        apply=apply,
        params=params,
        buffers=teacher.buffers,
        paths=teacher.paths,
        preprocess=teacher.preprocess,
        couples_batch=teacher.couples_batch,
        name=f"{teacher.name} with subclasses",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LELP(Recipe):
    """Pseudo-subclasses: ``task_weight * CE(merged z) + weight * T² KL(q_T || student_T)``, ``q_cs = p_c softmax_s(a_c)``.

    The student has ``classes * subclasses`` outputs, which are compared with the teacher's answer p split as `with_subclasses` says;
    the labels' term and the product see them merged again, class by class (`jkd.targets.lelp_merge`), and these sums are the
    probabilities. Made for problems with few classes, where p alone says little of an example. Weights and T are those of `KD`: the
    paper's could not be checked.

    Args:
        subclasses: S, as given to `with_subclasses`.
        temperature: T of both softmaxes over all ``classes * subclasses``; number or schedule.
        weight: of the teacher's term; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    subclasses: int = 10
    temperature: float | Schedule = 4.0
    weight: float | Schedule = 0.9
    task_weight: float = 0.1

    citation: ClassVar[str] = (
        "Loo et al., Linear Projections of Teacher Embeddings for Few-Class Distillation, 2024, arXiv:2409.20449"
    )
    family: ClassVar[str] = "logits"
    requires: ClassVar[str] = "a teacher split by with_subclasses; a student of classes * subclasses logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"
    same_classes: ClassVar[bool] = False

    def init(self, key, ctx):
        split = ctx.teacher_outputs.heads.get("subclasses")
        if split is None or split.shape[-1] != self.subclasses:
            found = "does not split its classes" if split is None else f"splits each class in {split.shape[-1]}"
            raise InputError(
                f"LELP(subclasses={self.subclasses}): the teacher {found}; make it with recipes.with_subclasses(teacher, data, …)"
            )
        if ctx.classes != split.shape[-2] * split.shape[-1]:
            raise InputError(
                f"LELP: the student has {ctx.classes} outputs; give it {split.shape[-2]} x {split.shape[-1]}, one for each subclass"
            )
        return Vars()

    def terms(self, vars, student, teacher, batch, *, clock, key):
        temperature = schedules.at(self.temperature, clock)
        target = targets.lelp_split(teacher.logits, teacher.heads["subclasses"])
        kd = losses.forward_kl(student.logits, target, temperature=temperature)
        merged = student.replace(logits=self._merged(student.logits))
        kd_term = Term(kd, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, merged, batch) | {"kd": kd_term}

    def deploy(self, models):
        student = super().deploy(models)

        def apply(params, buffers, batch, **options):
            outputs, buffers = student.apply(params, buffers, batch, **options)
            return outputs.replace(logits=self._merged(outputs.logits)), buffers

        return dataclasses.replace(student, apply=apply)

    def _merged(self, logits: Array) -> Array:
        return jnp.asarray(targets.lelp_merge(logits, subclasses=self.subclasses))
