"""A distillation step of google-tunix's `DistillationTrainer`: a worker of benchmarks/pair.py.

    pip install -e '.[train]' -r benchmarks/peers/tunix.txt     # in an environment of its own
    python benchmarks/pair.py "python benchmarks/lm_step.py" "othervenv/bin/python benchmarks/peers/tunix_step.py"

Networks, text and optimizer are those of benchmarks/lm_step.py, the networks wrapped as the NNX modules that tunix wants; its
`LogitStrategy` with temperature 1 and alpha 0.9 mixes the same KL and cross-entropy. The teacher's forward pass is jitted, and the
step's graph is cached.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import chunked
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pair import blocked, serve
from tunix.distillation import strategies
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput


class Decoder(nnx.Module):
    """One of jkd's networks: weights that tunix trains, logits that it wants."""

    def __init__(self, model, key):
        self.model = nnx.static(model)
        self.weights = nnx.data(jax.tree.map(nnx.Param, model.init(key)[0]))

    def __call__(self, tokens):
        weights = jax.tree.map(lambda leaf: leaf[...], self.weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
        return self.model.apply(weights, {}, {"tokens": tokens})[0].logits


def forward(model, input_tokens, input_mask):
    return model(input_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    shape = chunked.TINY if parser.parse_args().tiny else chunked.Shape()
    student, teacher = (
        Decoder(chunked.network(dim, shape), jax.random.key(seed)) for seed, dim in enumerate((shape.student, shape.teacher))
    )
    tokens = jnp.asarray(chunked.text(shape))

    def next_tokens(input_tokens, input_mask):
        return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), shape.vocab)

    trainer = DistillationTrainer(
        student,
        teacher,
        strategies.LogitStrategy(forward, nnx.jit(forward), next_tokens, temperature=1.0, alpha=0.9),
        optax.adamw(1e-4, weight_decay=0.0),
        TrainingConfig(eval_every_n_steps=1000, max_steps=1000),
    )
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    batch = TrainingInput(input_tokens=tokens, input_mask=jnp.asarray(np.ones(tokens.shape, bool)))

    serve(blocked(lambda: (train_step(trainer._prepare_inputs(batch)), nnx.state(trainer.model))))


if __name__ == "__main__":
    main()
