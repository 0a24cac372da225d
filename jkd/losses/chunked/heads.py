"""The last linear map of a model, and how its vocabulary is cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a padded class has for a logit: its probability is exactly 0, and no difference of two such is an inf.
FLOOR = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """``logits = cap(hidden @ kernel + bias)``; wherever a plain array stands for a head, it is the kernel.

    Args:
        kernel: ``[dim, vocab]``; the transposed embedding where the two are tied.
        bias: ``[vocab]``, finite, or None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; a Python number, or None.
        classes: how many of the first columns are classes; the others pad the shape and are in no softmax. None: all.
        collects: ``[shards, dim, vocab]``, made of the same parameter as ``kernel``: where there are as many shards of tokens, each
            shard's gradient by the kernel goes here instead, so that what other uses of the parameter give can be added before all
            are summed over devices; its values are not read. None: the sum goes to ``kernel``.
    """

    kernel: Any
    bias: Any = None
    softcap: Any = dataclasses.field(default=None, metadata=dict(static=True))
    classes: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    collects: Any = None

    @classmethod
    def of(cls, head: Any) -> Head:
        return head if isinstance(head, Head) else cls(head)

    @property
    def vocab(self) -> int:
        """Columns that are classes."""
        columns = self.kernel.shape[-1]
        return columns if self.classes is None else min(columns, self.classes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """A model before its last map: ``hidden`` ``[tokens, dim]`` and the parts of its `Head`, all of the common width."""

    hidden: Any = None
    kernel: Any = None
    bias: Any = None
    softcap: Any = dataclasses.field(default=None, metadata=dict(static=True))
    collects: Any = None

    @property
    def any(self) -> bool:
        """Of a Side of truth values: whether one is true."""
        return any((self.hidden, self.kernel, self.bias, self.collects))

    @property
    def dtype(self) -> Any:
        """What logits, and sums over blocks, are held in."""
        return jnp.promote_types(jnp.result_type(self.hidden, self.kernel), jnp.float32)

    def logits(self, bias: Any = None, kernel: Any = None) -> Any:
        """``[tokens, columns]`` in `dtype`: of these columns, or of all."""
        kernel, bias = (self.kernel, self.bias) if kernel is None else (kernel, bias)
        logits = jnp.einsum("nd,dv->nv", self.hidden, kernel, preferred_element_type=self.dtype)
        if bias is not None:
            logits = logits + bias.astype(self.dtype)[None]
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def by_hidden(self, gradient: Any, kernel: Any, *, lanes: int) -> Any:
        """``[lanes, tokens, dim]`` from the gradient by these columns of the logits; every lane's share by itself."""
        gradient = gradient.astype(kernel.dtype)
        if lanes == 1:  # XLA's CPU compiler would transpose the kernel for a product of three axes
            return jnp.einsum("nv,dv->nd", gradient, kernel, preferred_element_type=self.dtype)[None]
        gradient = gradient.reshape(gradient.shape[0], lanes, -1)
        kernel = kernel.reshape(kernel.shape[0], lanes, -1)
        return jnp.einsum("nlv,dlv->lnd", gradient, kernel, preferred_element_type=self.dtype)

    def by_head(self, gradient: Any, shards: int) -> dict[str, Any]:
        """``kernel`` ``[shards, dim, columns]`` and ``bias`` ``[shards, columns]``, summed over each shard's tokens alone.

        What a head `collects` is the former, under that name.
        """
        hidden = self.hidden.reshape(shards, -1, self.hidden.shape[-1])
        gradient = gradient.reshape(shards, -1, gradient.shape[-1])
        low = gradient.astype(hidden.dtype)
        kernel = jnp.einsum("snd,snv->sdv", hidden, low, preferred_element_type=self.dtype)
        return {"kernel": kernel, "collects": kernel, "bias": gradient.sum(1)}

    def uncapped(self, gradient: Any, logits: Any) -> Any:
        """The gradient by the logits as they were before the cap."""
        return gradient if self.softcap is None else gradient * (1 - jnp.square(logits / self.softcap))


@dataclasses.dataclass(frozen=True)
class Windows:
    """The vocabulary in windows: each has ``width`` columns of every one of ``lanes`` equal runs of columns.

    With a lane for each device that holds some of the head, every window is read without moving any of it. The last window overlaps
    the one before it where the width does not divide a run; what was seen already is masked, like padding.

    Args:
        classes: how many of the first columns are no padding.
        columns: of the head.
        lanes: runs.
        width: columns of a window in one lane.
    """

    classes: int
    columns: int
    lanes: int
    width: int

    @classmethod
    def of(cls, classes: int, columns: int, wanted: int, *, lanes: int) -> Windows:
        """Windows of about ``wanted`` columns, in all lanes together."""
        return cls(classes, columns, lanes, max(1, min(columns, wanted) // lanes))

    @property
    def run(self) -> int:
        return self.columns // self.lanes

    @property
    def count(self) -> int:
        return -(-self.run // self.width)

    @property
    def masks(self) -> bool:
        return self.classes < self.columns or self.run % self.width != 0

    def start(self, j: Any) -> Any:
        return jnp.minimum(j * self.width, self.run - self.width)

    def lay(self, x: Any) -> Any:
        """``[…, columns]`` as ``[…, lanes, run]``; as it is where there is one lane."""
        return x if self.lanes == 1 else x.reshape(*x.shape[:-1], self.lanes, self.run)

    def flat(self, x: Any) -> Any:
        """`lay` undone, of all columns or of a window."""
        return x if self.lanes == 1 else x.reshape(*x.shape[:-2], -1)

    def read(self, x: Any, j: Any) -> Any:
        """Window j of what is laid, flat: ``[…, lanes * width]``."""
        return self.flat(x if self.count == 1 else jax.lax.dynamic_slice_in_dim(x, self.start(j), self.width, axis=-1))

    def write(self, x: Any, window: Any, j: Any, *, add: bool = False) -> Any:
        """What is laid, with window j replaced or added to."""
        if self.lanes > 1:
            window = window.reshape(*x.shape[:-1], -1)
        if self.count == 1:
            return (x + window if add else window).astype(x.dtype)
        if add:
            window = window + jax.lax.dynamic_slice_in_dim(x, self.start(j), self.width, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(x, window.astype(x.dtype), self.start(j), axis=-1)

    def fresh(self, window: Any, old: Any, j: Any) -> Any:
        """Window j where no earlier one has been, ``old`` elsewhere."""
        if self.run % self.width == 0:
            return window
        within = self.start(j) + jnp.arange(self.width, dtype=jnp.int32)
        return jnp.where(jnp.tile(within >= j * self.width, self.lanes)[None], window, old)

    def ids(self, j: Any) -> Any:
        """The class of every column of window j, ``[lanes * width]``; -1 for padding and for what an earlier window had."""
        first = jnp.asarray(np.arange(self.lanes) * self.run, jnp.int32)
        within = self.start(j) + jnp.arange(self.width, dtype=jnp.int32)
        ids = first[:, None] + within[None]
        if self.masks:
            ids = jnp.where((ids < self.classes) & (within >= j * self.width)[None], ids, -1)
        return ids.reshape(-1)


def loop(count: Any, body: Any, carry: Any) -> Any:
    """`jax.lax.fori_loop`, and no loop at all for a single turn."""
    return body(0, carry) if isinstance(count, int) and count == 1 else jax.lax.fori_loop(0, count, body, carry)
