"""What XLA allocates for losses in blocks, against whole logits: programs of benchmarks/chunked.py, compiled and not run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chunked():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("chunked")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("chunked", "losses"):  # what tests call so is another thing
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js"])
def test_a_head_takes_a_twentieth(chunked, name):
    """2,048 tokens of 32,768 classes, widths 256 and 512: value and gradient."""
    shape = chunked.Shape()
    assert (shape.tokens, shape.vocab, shape.student, shape.teacher) == (2048, 32768, 256, 512)
    found = chunked.memory(*chunked.heads(name, shape, "float32")[1])
    assert found["whole_logits_temp_bytes"] < 8 * shape.tokens * shape.vocab * 4  # no strawman: at most eight arrays of logits
    assert found["temp_ratio"] <= 1 / 20


def test_a_step_takes_a_sixth(chunked):
    """A whole training step of two decoders, with AdamW and one layer, which is quick to compile; the benchmark has four."""
    programs, _ = chunked.steps("forward KL and CE", chunked.Shape(depth=1), "float32")
    assert chunked.memory(*programs)["temp_ratio"] <= 1 / 6
