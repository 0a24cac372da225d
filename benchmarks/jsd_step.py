"""The generalised JSD between two heads and its gradient, by jkd's blocks: a worker of benchmarks/pair.py beside peers/torch_jsd.py.

    python benchmarks/pair.py "python benchmarks/jsd_step.py" "othervenv/bin/python benchmarks/peers/torch_jsd.py liger"

512 tokens, a student of width 512 and a teacher of width 1024 over 32768 classes, float32; the mean over tokens and its gradient with
respect to the student's hidden states and head. `--tiny` tries whether it runs.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from pair import blocked, serve

from jkd.losses import chunked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tokens, student, teacher, vocab = (8, 8, 16, 64) if parser.parse_args().tiny else (512, 512, 1024, 32768)
    rng = np.random.default_rng(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=(rows, columns)), jnp.float32)

    mine = draw(tokens, student), draw(student, vocab, 2 / np.sqrt(student))
    theirs = draw(tokens, teacher), draw(teacher, vocab, 2 / np.sqrt(teacher))
    weights = jnp.full(tokens, 1 / tokens)

    @jax.jit
    def gradient(mine, theirs):
        return jax.value_and_grad(lambda mine: chunked.weighted_sum(chunked.JS(0.5), *mine, *theirs, weights=weights))(mine)

    serve(blocked(lambda: gradient(mine, theirs)))


if __name__ == "__main__":
    main()
