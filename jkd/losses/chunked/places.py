"""Blocks on a mesh: no device reads another's tokens or columns, and sums over devices are taken once, after the last block.

The mesh is the one that the arrays are placed on, which they say while a program is traced; without one everything is on one device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

VOCAB = "tensor"
"""The mesh axis that may split the vocabulary; all others split tokens."""


def mesh_of(*arrays: Any) -> AbstractMesh:
    """The mesh that one of these arrays, or the context, is on; one without axes where there is none."""
    found = [jax.typeof(array).sharding.mesh for array in arrays] + [jax.sharding.get_abstract_mesh()]
    return next((mesh for mesh in found if not mesh.empty), found[-1])


def token_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that split tokens and are XLA's to place."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in mesh.axis_names if name != VOCAB and kinds[name] == AxisType.Auto and mesh.shape[name] > 1)


def token_shards(mesh: AbstractMesh, rows: Any) -> int:
    """Over how many devices the tokens are split; 1 where that does not divide the rows of the batch.

    ``rows`` is an int, or what stands for any number of them while a program is exported: of one shard it is asked nothing.
    """
    shards = math.prod(mesh.shape[name] for name in token_axes(mesh))
    return shards if shards > 1 and rows % shards == 0 else 1


def vocab_shards(mesh: AbstractMesh, columns: int) -> int:
    """Over how many devices the vocabulary may be split; 1 where that does not divide it."""
    shards = mesh.shape.get(VOCAB, 1)
    return shards if columns % shards == 0 else 1


def split(x: Any, mesh: AbstractMesh, axes: tuple[str, ...]) -> Any:
    """``[shards, …]`` with each device's sums on that device."""
    if x.shape[0] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes, *(P.UNCONSTRAINED,) * (x.ndim - 1))))
