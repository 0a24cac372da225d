"""A table that is embedding and head at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import hlo
from jkd.losses import chunked
from jkd.models.layers import Embed

ROWS, TIME, VOCAB, DIM = 8, 6, 256, 16


def tied(table, tokens, schedule):
    """The loss of a network that is its embedding alone."""
    embed = Embed(VOCAB, DIM, nnx.Rngs(0))
    embed.embedding.set_value(table)
    collects = embed.collects(ROWS)
    hidden = jnp.tanh(embed(tokens, collects))
    head = chunked.Head(table.T, collects=None if collects is None else collects.swapaxes(1, 2))
    weights, labels = jnp.linspace(0.1, 1, ROWS * TIME).reshape(ROWS, TIME), jnp.flip(tokens)
    return chunked.weighted_sum(chunked.CrossEntropy(), hidden, head, labels=labels, weights=weights, schedule=schedule)


@pytest.mark.parametrize("schedule", [chunked.Tokens(3), chunked.Vocabulary(64)], ids=["tokens", "vocabulary"])
def test_its_gradients_are_summed_over_devices_once(schedule):
    """Rows over four devices, the vocabulary over two: what both uses give is what travels, as one array."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, DIM)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    places = NamedSharding(mesh, P("tensor")), NamedSharding(mesh, P(("data", "fsdp")))
    placed = [jax.device_put(*each) for each in zip((table, tokens), places, strict=True)]

    def gradient(table, tokens):
        return jax.grad(tied)(table, tokens, schedule)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(gradient, out_shardings=places[0]).lower(*placed).compile()
    large = [one for one in hlo.collectives(program.as_text()) if one.total >= table.nbytes // 8]
    assert [(one.kind, one.count) for one in large] == [("all-reduce", 1)]
    wanted = np.asarray(jax.jit(gradient)(table, tokens))
    assert np.linalg.norm(np.asarray(program(*placed)) - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_a_loss_of_whole_logits_gives_its_gradient_to_the_head():
    """And one of rows that are not split as the tokens were."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    table = np.random.default_rng(1).normal(size=(VOCAB, DIM)).astype(np.float32)
    tokens = np.arange(ROWS * TIME, dtype=np.int32).reshape(ROWS, TIME)

    def gradient(split, some):
        def loss(table):
            embed = Embed(VOCAB, DIM, nnx.Rngs(0))
            embed.embedding.set_value(table)
            collects = embed.collects(ROWS) if split else None
            hidden = embed(jnp.asarray(tokens), collects)
            if some:  # three rows, of which eight devices hold no equal shares
                head = chunked.Head(table.T, collects=None if collects is None else collects.swapaxes(1, 2))
                return chunked.reverse_kl(hidden[:3], head, jnp.zeros((3, TIME, DIM)), jnp.ones((DIM, VOCAB))).sum()
            return jnp.square(hidden @ table.T).mean()

        return jax.grad(loss)(jnp.asarray(table))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.jit(lambda: [(gradient(True, some), gradient(False, some)) for some in (False, True)])()
    for collected, plain in found:
        np.testing.assert_allclose(collected, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
