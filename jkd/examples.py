"""Examples as they are trained on: texts decoded, with what is counted; images on a contact sheet, as both sides see them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import codehash, tokens, trees
from jkd.config import Experiment, Run
from jkd.context import augment
from jkd.data import Data
from jkd.resolve import build
from jkd.types import Batch, Preprocess

LONGEST = 1200
"""Characters of a text that are shown."""
SIDE, GAP, HEAD, TITLE = 144, 12, 30, 34
"""Pixels of a contact sheet: an image's longer side, what is left between two, a run's heading, an image's two lines."""

Lines = list[list[tuple[str, np.ndarray]]]
"""Of each example: its images and their titles."""
Sides = dict[str, Preprocess | None]


def show(experiment: Experiment, rows: int = 4) -> tuple[str, bytes | None]:
    """The data of an experiment's runs: text for a terminal, and a PNG where there are images. Nothing is trained.

    Of texts each shown row has what is counted in the loss in ``«…»`` (`jkd.tokens.next_tokens` says what that is); of images the
    sheet has a line for each example: as the data give it, after `Run.augment`, and resized as student and teacher want it.

    Args:
        experiment: whose runs; those that share data, batch size, seed, augmentations and views are shown once.
        rows: examples of each.
    """
    parts, sheets, shown = [], dict[str, Lines](), dict[Any, str]()
    for name, run in experiment.nodes.items():
        if not isinstance(run, Run):
            parts.append(f"{name}: a function, {codehash.name(run)}; a run that it makes is known when it has run, not now")
            continue
        if run.data is None:
            parts.append(f"{name}: no data")
            continue
        sides = _sides(run, experiment) if "image" in run.data.spec(run.batch_size) else {}
        key = (id(run.data), run.batch_size, run.seed, tuple(map(id, run.augment)), repr(sides))
        if key in shown:
            parts.append(f"{name}: as {shown[key]}")
            continue
        shown[key] = name
        text, sheet = _run(name, run, run.data, rows, sides)
        parts.append(text)
        sheets |= {name: sheet} if sheet else {}
    return "\n\n".join(parts), _png(sheets) if sheets else None


def _run(name: str, run: Run, data: Data, rows: int, sides: Sides) -> tuple[str, Lines]:
    batches: Any = data.batches(run.batch_size, seed=run.seed)
    first = next(batches)
    batches.close()
    sizes = f"{data.train_size:,} to train on, {data.eval_size:,} to evaluate on"
    lines = [f"{name}: {data.name}, {sizes}{'' if data.classes is None else f', {data.classes} classes'}"]
    for path, leaf in trees.flatten({key: leaf for key, leaf in first.items() if key != "teacher"}).items():
        lines.append(f"  {path:<12} {leaf.dtype}{list(leaf.shape)}{_range(leaf)}")
    # on the device the whole batch is augmented: what mixes examples must find the others
    seen = jax.device_get(augment(run, jax.tree.map(jnp.asarray, first), jax.random.key(run.seed)))
    rows = min(rows, len(first["weight"]))
    if "tokens" in seen:
        lines += _texts(data, seen, rows)
    return "\n".join(lines), _images(run, first, seen, rows, sides) if "image" in seen else []


def _range(leaf: np.ndarray) -> str:
    if leaf.ndim == 1 and len(leaf) and leaf.dtype.kind in "iuf":
        shown = ", ".join(f"{value:g}" for value in leaf[:6])
        return f"  {shown}{', …' if len(leaf) > 6 else ''}"
    return f"  {leaf.min():g} to {leaf.max():g}" if leaf.size and leaf.dtype.kind in "iuf" else ""


def _texts(data: Data, batch: Batch, rows: int) -> Iterator[str]:
    weight = np.asarray(tokens.next_tokens({name: jnp.asarray(value) for name, value in batch.items() if name != "teacher"})[1])
    real = np.asarray(batch["mask"] > 0) if "mask" in batch else np.ones(batch["tokens"].shape, bool)
    counts = np.roll(weight > 0, 1, axis=1)  # the token that is predicted, not the one that predicts it
    yield f"  of {real.sum():,} real tokens in this batch {counts.sum():,} are counted ({counts.sum() / max(real.sum(), 1):.0%})"
    for row in range(rows):
        yield f"  row {row} (example {batch['index'][row]}, {real[row].sum()} tokens, {counts[row].sum()} counted):"
        segment = batch["segment"][row] if "segment" in batch else np.ones_like(batch["tokens"][row])
        yield from _marked(data, batch["tokens"][row], real[row], counts[row], segment)


def _marked(data: Data, numbers: np.ndarray, real: np.ndarray, counted: np.ndarray, segment: np.ndarray) -> Iterator[str]:
    """The documents of a row, each on lines of its own."""
    room = LONGEST
    for document in dict.fromkeys(segment[real].tolist()):
        own = np.flatnonzero(real & (segment == document))
        runs = np.split(own, np.flatnonzero(np.diff(counted[own].astype(int))) + 1)
        text = "".join(f"«{said}»" if counted[run[0]] else said for run in runs if (said := _decoded(data, numbers[run])))
        text, room = text[:room] + ("…" if len(text) > room else ""), room - len(text)
        yield "\n".join(f"    {line}" for line in text.splitlines() or [""])
        if room <= 0:
            return


def _decoded(data: Data, numbers: np.ndarray) -> str:
    if data.tokenizer is None:
        return " ".join(map(str, numbers)) + " "
    # special tokens are shown: whether the end of a turn is counted is half of what is looked for
    return data.tokenizer.decode(numbers, special=True)


def _sides(run: Run, experiment: Experiment) -> Sides:
    """How the networks of a run want their images."""
    sides = {"student": build(run.student).preprocess}
    teacher = experiment.nodes.get(run.teacher) if isinstance(run.teacher, str) else run.teacher
    if isinstance(teacher, Run):
        sides["teacher"] = build(teacher.student).preprocess
    elif teacher is not None and (hasattr(teacher, "build") or hasattr(teacher, "preprocess")):
        sides["teacher"] = build(teacher).preprocess
    return sides


def _images(run: Run, first: Batch, seen: Batch, rows: int, sides: Sides) -> Lines:
    sheet = []
    for row in range(rows):
        known = "label" in seen and np.ndim(seen["label"]) == 1 and seen["labelled"][row]
        label = f"label {seen['label'][row]}" if known else "no label"
        line = [(f"example {first['index'][row]}, {label}", first["image"][row])]
        if run.augment:
            line.append(("augmented", seen["image"][row]))
        for side, preprocess in sides.items():
            # its size and crop; mean and deviation would only shift what the eye sees
            plain = dataclasses.replace(preprocess or Preprocess(), mean=(0.0,), std=(1.0,))
            line.append((f"as the {side} sees it", np.asarray(plain(jnp.asarray(seen["image"][row])))))
        sheet.append(line)
    return sheet


def _png(sheets: dict[str, Lines]) -> bytes:
    """The runs below each other, every image with its title and size."""
    from PIL import Image, ImageDraw

    across = max(len(line) for lines in sheets.values() for line in lines)
    down = sum(HEAD + len(lines) * (TITLE + SIDE + GAP) for lines in sheets.values())
    page = Image.new("RGB", (across * (SIDE + GAP) + GAP, down + GAP), "white")
    draw, top = ImageDraw.Draw(page), GAP
    for name, lines in sheets.items():
        draw.text((GAP, top), name, fill="black", font_size=18)
        top += HEAD
        for line in lines:
            for place, (text, image) in enumerate(line):
                left, (height, width) = GAP + place * (SIDE + GAP), image.shape[:2]
                draw.text((left, top), f"{text}\n{width} x {height}", fill="#444", font_size=12, spacing=2)
                scale = SIDE / max(height, width)
                size = (max(1, round(width * scale)), max(1, round(height * scale)))
                # small ones in whole pixels, large ones without the noise of left-out ones
                how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                page.paste(Image.fromarray(_rgb(image)).resize(size, how), (left, top + TITLE))
            top += TITLE + SIDE + GAP
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8 ``[height, width, 3]``; of other numbers of channels the first three, or the first."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = np.round(np.clip(np.asarray(pixels, np.float32), 0, 1) * 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
