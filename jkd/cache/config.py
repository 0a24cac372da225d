"""`Cache`: what a config writes where a teacher is expected."""

from __future__ import annotations

import dataclasses
from typing import Any

from jkd.cache.codec import Codec
from jkd.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """As a run's teacher: the answers that a teacher gave once, on disk.

        answers = cache.Cache(path="caches/qwen3-4b", codec=cache.TopK(k=64, vocab=151_669), teacher="teacher")
        student = Run(student=…, teacher=answers, recipe=recipes.TopKKD(k=64), …)

    ``jkd cache CONFIG`` fills it with the answers to the run's own data; ``jkd train`` does so first where it is not finished. An
    example is found by a hash of its contents after the data's maps: by all of its arrays but labels and weights. What is on disk
    therefore serves any order, batch size, mesh and epoch; random ``train_maps`` give other contents each time, unless
    `jkd.data.fixed_views` draws them once for all. `Run.augment` comes after: the answers are those to the images before it.

    Answers come as ``batch["teacher"]``: ``heads["topk"]`` and ``heads["sampled"]`` of sparse codecs (`recipes.TopKKD`,
    `recipes.RandomSamplingKD`), ``logits``, ``taps`` and ``heads`` of `Dense`.

    Args:
        path: its folder, local or mounted; all hosts see it.
        codec: what is kept of an answer.
        teacher: whose answers: a Model with weights, the name of an earlier node of the experiment, or an `Ensemble`. None where
            another program fills the cache.
        fingerprint: what the cache must say its teacher is (``jkd cache`` prints it): a finished cache is then read without the
            teacher at hand. None for that of ``teacher``, whose weights are looked at; and where there is none either, for any.
    """

    path: str
    codec: Codec
    teacher: Any = None
    fingerprint: str | None = None

    def __post_init__(self):
        if not self.path or not isinstance(self.path, str):
            raise InputError(f"Cache.path = {self.path!r}: give the name of a folder")
        if not hasattr(self.codec, "shapes"):
            raise InputError(f"Cache.codec = {self.codec!r}: give a TopK, Sampled or Dense")
