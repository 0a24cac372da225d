"""Methods that read logits alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from jkd import losses, schedules
from jkd.recipe import Recipe, label_weight
from jkd.schedules import Schedule
from jkd.types import Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Recipe):
    """Labels alone: cross-entropy of the labelled examples. The control of every comparison.

    Args:
        label_smoothing: mass spread over all classes.
    """

    label_smoothing: float = 0.0

    citation: ClassVar[str] = "cross-entropy on labels (the control)"
    family: ClassVar[str] = "baseline"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"task": task(student, batch, label_smoothing=self.label_smoothing)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KD(Recipe):
    """Soft targets: ``task_weight * CE + weight * T² * KL(teacher_T || student_T)``.

    The two-weight form, the temperature and the weights are those of the CIFAR-100 benchmark (Tian et al., ICLR 2020, appendix):
    T 4, 0.1 of the labels, 0.9 of the teacher. On ImageNet T 1 and 0.5 each.

    Args:
        temperature: T of both softmaxes; number or schedule.
        weight: of the teacher's term; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    temperature: float | Schedule = 4.0
    weight: float | Schedule = 0.9
    task_weight: float = 0.1

    citation: ClassVar[str] = "Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        temperature = schedules.at(self.temperature, clock)
        kd = losses.forward_kl(student.logits, teacher.logits, temperature=temperature)
        return with_task(self.task_weight, student, batch) | {"kd": Term(kd, batch["weight"], schedules.at(self.weight, clock))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunMatch(Recipe):
    """Patient and consistent function matching: ``T² * KL(teacher_T || student_T)`` and no label, on views that both sides share.

    The consistency is the run's: one crop and one mixup for both (``augment=(data.augment.Mixup(…),)``), many epochs.

    Args:
        temperature: T of both softmaxes; the authors' configs use 1.
    """

    temperature: float = 1.0

    citation: ClassVar[str] = "Beyer et al., Knowledge distillation: a good teacher is patient and consistent, CVPR 2022"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        kd = losses.forward_kl(student.logits, teacher.logits, temperature=self.temperature)
        return {"kd": Term(kd, batch["weight"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKD(Recipe):
    """Decoupled KD: ``CE + warm-up * T² (alpha * TCKD + beta * NCKD)``.

    TCKD compares the two masses target / not target, NCKD the distributions among the other classes. It needs the label, so both
    terms are of the labelled examples.

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD; 8 for ResNet32x4 -> ResNet8x4, else 0.5 to 6 (by pair of networks).
        temperature: T; 4 on CIFAR-100, 1 on ImageNet.
        warmup_epochs: epochs over which the distillation term grows to full weight; 20 on CIFAR-100, 1 on ImageNet.
        task_weight: of the labels' term; 0 leaves it out.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup_epochs: float = 20.0
    task_weight: float = 1.0

    citation: ClassVar[str] = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        decoupled = losses.dkd(
            student.logits,
            teacher.logits,
            hard_labels(batch),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
        warm = schedules.Epochs(1.0, self.warmup_epochs)(clock) if self.warmup_epochs else 1.0
        return with_task(self.task_weight, student, batch) | {"dkd": Term(decoupled, label_weight(batch), warm)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NKD(Recipe):
    """Normalised KD: ``CE + weight * (- p_y log q_y - gamma T² sum over other classes of p^ log q^)``.

    p^ and q^ are renormalised without the label, so that the teacher's certainty does not scale them. It needs the label, so both
    terms are of the labelled examples.

    Args:
        gamma: weight of the other classes; 3.5 on CIFAR-100 (T = 3), 1.5 on ImageNet (T = 1).
        temperature: T, of the other classes alone.
        weight: of the whole term; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    gamma: float = 3.5
    temperature: float = 3.0
    weight: float | Schedule = 1.0
    task_weight: float = 1.0

    citation: ClassVar[str] = (
        "Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv:2303.13005"
    )
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        hyper = dict(gamma=self.gamma, temperature=self.temperature)
        values = losses.nkd(student.logits, teacher.logits, hard_labels(batch), **hyper)
        nkd = Term(values, label_weight(batch), schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"nkd": nkd}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSLD(Recipe):
    """Weighted soft labels: ``CE + weight * w T² CE(teacher_T, student_T)``, ``w = 1 - exp(- CE_s / CE_t)``.

    Less distillation of the examples that the student already knows better than the teacher. It needs the label, so both terms are
    of the labelled examples.

    Args:
        temperature: T; 4 on CIFAR-100, 2 on ImageNet.
        weight: of the teacher's term; 2.25 on CIFAR-100, 2.5 on ImageNet. Number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    temperature: float = 4.0
    weight: float | Schedule = 2.25
    task_weight: float = 1.0

    citation: ClassVar[str] = "Zhou et al., Rethinking Soft Labels for Knowledge Distillation, ICLR 2021, arXiv:2102.00650"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        values = losses.wsld(student.logits, teacher.logits, hard_labels(batch), temperature=self.temperature)
        wsld = Term(values, label_weight(batch), schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"wsld": wsld}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIST(Recipe):
    """Correlations of a stronger teacher: ``CE + weight * T² (beta * (1 - r of rows) + gamma * (1 - r of columns))``.

    Pearson's r between the two probability matrices, over the classes of each example and over the examples of each class.

    Args:
        temperature: T; 4 on CIFAR-100, 1 on ImageNet.
        beta: weight of the rows.
        gamma: weight of the columns, which compare examples.
        weight: of both; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    temperature: float = 4.0
    beta: float = 1.0
    gamma: float = 1.0
    weight: float | Schedule = 2.0
    task_weight: float = 1.0

    citation: ClassVar[str] = "Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    @property
    def couples_batch(self):
        return self.gamma != 0

    def terms(self, vars, student, teacher, batch, *, clock, key):
        hyper = dict(beta=self.beta, gamma=self.gamma, temperature=self.temperature)
        values = losses.dist(student.logits, teacher.logits, where=batch["weight"] > 0, **hyper)
        dist = Term(values, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"dist": dist}


def task(student, batch, *, coef: float = 1.0, label_smoothing: float = 0.0) -> Term:
    """The labels' term: cross-entropy of the labelled examples.

    Of labels by position (pixels) it is the mean over all of them in the batch; there a number that is no class is no label.
    """
    label, weight = batch["label"], label_weight(batch)
    if label.ndim > weight.ndim and jnp.issubdtype(label.dtype, jnp.integer):
        known = (label >= 0) & (label < student.logits_shape[-1])
        weight = weight.reshape(weight.shape + (1,) * (label.ndim - weight.ndim)) * known
        label = jnp.where(known, label, 0)
    return Term(losses.cross_entropy(student.logits, label, label_smoothing=label_smoothing), weight, coef)


def with_task(weight: float, student, batch) -> dict[str, Term]:
    """``{"task": …}``, or nothing where its weight is 0 (the batch then needs no label)."""
    return {"task": task(student, batch, coef=weight)} if weight else {}


def hard_labels(batch):
    """The batch's labels as integers; a mixed label's largest class."""
    label = batch["label"]
    return label if label.ndim == batch["weight"].ndim else label.argmax(-1)
