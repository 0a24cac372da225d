"""Attention of tokens to tokens: one function for every network, and the kernel that fits the hardware.

On an NVIDIA GPU cuDNN's flash kernel, on a TPU the Pallas splash kernel, elsewhere (and for what these do not cover) XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

Array = jax.Array

_ROWS, _HEADS = ("data", "fsdp"), ("tensor",)


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    window: int | None = None,
    segment: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """``softmax(cap(scale * query . key)) value`` of tokens that all stand in the same row.

    Args:
        query: ``[batch, time, heads, head_dim]``.
        key: ``[batch, time, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``, and each serves as many query heads in a row.
        value: likewise.
        causal: a token sees itself and those before it.
        window: it sees those fewer than this many places away, itself among them (https://arxiv.org/abs/2004.05150).
        segment: int ``[batch, time]``; tokens see each other only where these are equal.
        scale: default ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        ``[batch, time, heads, head_dim]`` in the dtype of ``query``; the softmax is computed in float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    platform = _platform()
    if platform == "tpu" and _splash_fits(query):
        return _splash(query, key, value, segment, causal=causal, window=window, scale=scale, softcap=softcap)
    same = None if segment is None else segment[:, None, :, None] == segment[:, None, None, :]
    if softcap is None:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same,
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
            implementation="cudnn" if platform == "gpu" and _cudnn_fits(query, causal, window, segment) else "xla",
        )
    return attend_where(query, key, value, _band(query.shape[1], causal, window, same), scale=scale, softcap=softcap)


def attend_where(
    query: Array, key: Array, value: Array, where: Array | None, *, scale: float | None = None, softcap: float | None = None
) -> Array:
    """The same with any mask ``where``, bool ``[batch or 1, 1, queries, keys]``; XLA on all hardware.

    For a few new tokens against a cache, and for scores that are capped. A query that sees nothing gets the plain mean.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if softcap is None:
        return jax.nn.dot_product_attention(query, key, value, mask=where, scale=scale, implementation="xla")
    batch, queries, heads, dim = query.shape
    grouped = query.reshape(batch, queries, key.shape[2], -1, dim)
    scores = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / softcap)
    if where is not None:
        scores = jnp.where(where[:, :, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def _band(time: int, causal: bool, window: int | None, same: Array | None) -> Array | None:
    """The mask of `attend`'s arguments; None where everything is seen."""
    ahead = np.arange(time)[None, :] - np.arange(time)[:, None]
    reach = time if window is None else window
    band = (ahead > -reach) & (ahead <= 0 if causal else ahead < reach)
    if band.all():
        return same
    return jnp.asarray(band)[None, None] if same is None else same & jnp.asarray(band)[None, None]


def _platform() -> str:
    """What the program will run on: the mesh's devices where there is a mesh (it may be compiled elsewhere), else ours."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "gpu") else platform


def _cudnn_fits(query: Array, causal: bool, window: int | None, segment: Array | None) -> bool:
    """bfloat16 or float16, head_dim a multiple of 8 up to 128, an even length; windows look back only, and not beside documents."""
    time, dim = query.shape[1], query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and dim % 8 == 0 and dim <= 128 and time % 2 == 0 and (window is None or (causal and segment is None))


_BLOCK = 128


def _splash_fits(query: Array) -> bool:
    return query.shape[1] % _BLOCK == 0 and query.shape[-1] % 64 == 0


def _splash(query, key, value, segment, *, causal, window, scale, softcap, interpret=False) -> Array:
    """The Pallas kernel, on each device's own rows and heads: XLA cannot split a kernel by itself."""
    run = functools.partial(_splash_local, causal=causal, window=window, softcap=softcap, interpret=interpret)
    args = [query * jnp.asarray(scale, query.dtype), key, value, *(() if segment is None else (segment,))]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*args)
    rows = tuple(name for name in _ROWS if name in mesh.axis_names)
    heads = tuple(name for name in _HEADS if name in mesh.axis_names and key.shape[2] % mesh.shape[name] == 0)
    split = P(rows or None, None, heads or None, None)
    specs = (split, split, split, P(rows or None, None))[: len(args)]
    return jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)(*args)


def _splash_local(query, key, value, segment=None, *, causal, window, softcap, interpret) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads = query.shape[1], query.shape[2]
    if window is not None:
        mask: masks.Mask = masks.LocalMask((time, time), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask((time, time)) if causal else masks.FullMask((time, time))
    # The largest blocks that divide the row and, forward and backward, still fit a core's fast memory.
    block = next(size for size in (512, 256, _BLOCK) if time % size == 0)
    sizes: Any = dict.fromkeys(_BLOCKS, block)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    ids = None if segment is None else kernel.SegmentIds(segment, segment)
    # The kernel knows one row, heads first.
    rows = (array.swapaxes(1, 2) for array in (query, key, value))
    return jax.vmap(attention)(*rows, segment_ids=ids).swapaxes(1, 2)


_BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
