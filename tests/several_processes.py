"""One of several processes that train together; started by test_processes.py: PROCESS COUNT ADDRESS OUT CASE…"""

from __future__ import annotations

import sys

import jax


def main(process: int, count: int, address: str, out: str, *wanted: str) -> None:
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, process)
    jax.config.update("jax_numpy_rank_promotion", "raise")

    import numpy as np
    import tiny
    from jax.experimental import multihost_utils

    from jkd import cache, optim, sharding, trees
    from jkd.cache import filling
    from jkd.config import Ema
    from jkd.data import arrays, augment
    from jkd.resolve import make_context
    from jkd.state import init_state
    from jkd.step import make_step

    assert jax.process_count() == count
    assert len(jax.devices()) == 4
    found = {}
    cases = {
        "data": dict(mesh=sharding.MeshShape(), microbatches=2),
        "fsdp": dict(mesh=sharding.MeshShape(data=2, fsdp=2), student=tiny.network()),
        "mixup and BatchNorm": dict(
            student=tiny.student(norm="batch"),
            teacher=tiny.teacher(norm="batch"),
            augment=(augment.Mixup(0.8, classes=tiny.CLASSES),),
        ),
    }
    for name in wanted:
        fields = cases[name]
        run = tiny.run(optimizer=optim.sgd(tiny.FIRST_STEP, momentum=0.9), ema=Ema(decay=0.5), **fields)
        ctx = make_context(run, tiny.batch())
        state, frozen = init_state(ctx, jax.random.key(0))
        step = make_step(ctx)
        found[f"{name}/start"] = whole(multihost_utils, state.params)
        for number, rows in enumerate(tiny.batches(5, ragged="BatchNorm" not in name)):
            share = tiny.ROWS // count  # host h reads rows [h * share, (h + 1) * share)
            own = {key: value[process * share : (process + 1) * share] for key, value in rows.items()}
            state, metrics = step(state, frozen, sharding.put_batch(own, ctx.mesh))
            if number == 0:
                found[f"{name}/first"] = whole(multihost_utils, state.params)
            found[f"{name}/loss{number}"] = {"loss": sharding.whole(metrics)["loss"]}
        found[f"{name}/end"] = whole(multihost_utils, {"params": state.params, "ema": state.ema, "buffers": state.buffers})
        assert step._cache_size() == 1
    answers = cache.Cache(path=f"{out}.cache", codec=cache.Dense(classes=tiny.CLASSES, dtype="float32"), teacher=tiny.teacher())
    rows = arrays(image=tiny.batch(44)["image"])
    run = tiny.run(teacher=answers, data=rows, batch_size=16, mesh=sharding.MeshShape(data=2, fsdp=2))
    filling.ready(answers, make_context(run), {}, print)
    if process == 0:
        np.savez(out, **trees.flatten(found))


def whole(multihost_utils, tree):
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
