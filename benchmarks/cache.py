"""Size, coding error and reading rate of a teacher cache, and its headroom over a training step. One JSON line for each measurement.

    python benchmarks/cache.py [--tiny] [--only size rate images headroom] [--folder DIR]

``size``: bytes for each token, and KL(teacher || what is read back) over the kept classes and the rest, in nats
a token, for distributions over 128k classes between peaked and flat. ``rate``: tokens a second that are read in random order and
decoded by two threads. ``images``: examples a second that are gathered in random order, by the reader alone and as whole batches of
`jkd.data`. ``headroom``: the first rate over that of a training step (a decoder's `TopKKD`) on this device. The rates depend on what
else the machine does; ``cpu_us`` (processor time a token or example) hardly does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jkd import cache

VOCAB, K = 131_072, 64
CODECS = {
    "top-64 uint8": cache.TopK(k=K, vocab=VOCAB, values="uint8"),
    "top-64 float16": cache.TopK(k=K, vocab=VOCAB, values="float16"),
    "50 draws": cache.Sampled(draws=50, vocab=VOCAB),
}


def text_like(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Logits ``[tokens, vocab]``: power laws over the rank, from 1 to 3, with noise; 2.5 nats of entropy at the mean."""
    falling = -rng.uniform(1, 3, (tokens, 1)) * np.log(np.arange(1, VOCAB + 1))
    return (falling + rng.normal(size=(tokens, VOCAB)))[:, rng.permutation(VOCAB)]


def size(folder: Path, tiny: bool):
    rng = np.random.default_rng(0)
    time_, rows = (16, 2) if tiny else (128, 8)
    logits = [text_like(rng, time_) for _ in range(rows)]
    for name, codec in CODECS.items():
        place = folder / name
        keys = [cache.key(tokens=[row]) for row in range(rows)]
        with cache.Writer(place, codec, inputs=("tokens",), teacher="power laws") as writer:
            for key, one in zip(keys, logits, strict=True):
                writer.add(key, codec.of(one, rng) if isinstance(codec, cache.Sampled) else codec.of(one))
        reader = cache.Reader(place)
        found = reader.answers(reader.rows(keys))
        # without what a file adds: it takes whole blocks of 64 KiB, of a cache of gigabytes nothing, of this one a tenth
        size = sum(int(np.load(path)["size"].sum()) for path in place.glob("*.index.npy"))
        line = {"what": "size", "codec": name, "bytes_per_token": round(size / (rows * time_), 2)}
        if isinstance(codec, cache.TopK):
            errors = np.concatenate([divergence(codec.of(one), row, found) for row, one in enumerate(logits)])
            line |= {"kl_mean": float(errors.mean()), "kl_max": float(errors.max())}
        else:
            different = np.diff(found["ids"], axis=-1, prepend=-1) > 0
            line |= {"different_ids": round(float(different.sum(-1).mean()), 2)}
        yield line


def divergence(true: dict, row: int, found: dict) -> np.ndarray:
    """KL over the kept classes and the rest, each token; normalised, as the losses do to both."""
    order = np.argsort(-true["log_probs"], axis=-1, kind="stable")
    assert (np.take_along_axis(true["ids"], order, -1) == found["ids"][row]).all()
    log_p = np.append(np.take_along_axis(true["log_probs"], order, -1), np.log(true["leftover"])[:, None], axis=-1)
    log_q = np.append(found["log_probs"][row], np.log(found["leftover"][row])[:, None], axis=-1).astype(np.float64)
    log_p, log_q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def filled(folder: Path, codec: cache.TopK, rows: int, length: int) -> list[bytes]:
    """A cache of made-up answers of the right kind."""
    rng = np.random.default_rng(0)
    keys = [cache.key(tokens=[row]) for row in range(rows)]
    with cache.Writer(folder, codec, inputs=("tokens",), teacher="made up", shard_bytes=64 << 20) as writer:
        for key in keys:
            ids = (rng.integers(0, VOCAB, (length, 1)) + 2003 * np.arange(K)) % VOCAB
            log_probs = -rng.uniform(0.8, 2, (length, 1)) * np.log(np.arange(1, K + 1)) - rng.random((length, K))
            log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True)) + 0.2
            writer.add(key, {"ids": ids, "log_probs": log_probs})
    return keys


def rate(folder: Path, tiny: bool):
    rows, length, batch = (16, 64, 4) if tiny else (512, 1024, 8)
    for name in ("top-64 uint8", "top-64 float16"):
        place = folder / f"rate {name}"
        keys = filled(place, CODECS[name], rows, length)
        reader = cache.Reader(place)

        def read(some: np.ndarray, reader=reader, keys=keys) -> None:
            reader.answers(reader.rows([keys[row] for row in some]))

        found = timed(lambda seed, read=read: two_threads(read, batches(seed, rows, batch)), 3)
        yield {"what": "rate", "codec": name, "tokens_per_s": round(rows * length / found[0]), **cpu(found[1], rows * length)}


def images(folder: Path, tiny: bool):
    from jkd import data
    from jkd.cache.training import Answers

    rows, classes = (256, 100) if tiny else (50_000, 100)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    keys = [cache.key(image=image) for image in pixels]
    codec = cache.Dense(classes=classes)
    with cache.Writer(folder / "images", codec, inputs=("image",), teacher="made up") as writer:
        for key, logits in zip(keys, rng.normal(size=(rows, classes)), strict=True):
            writer.add(key, {"logits": logits})
    reader = cache.Reader(folder / "images")
    where = reader.rows(keys)
    reader.answers(where[:1])  # lays the table out
    found = timed(lambda seed: two_threads(lambda some: reader.answers(where[some]), batches(seed, rows, 128)), 3)
    yield {"what": "images", "how": "gather", "examples_per_s": round(rows / found[0]), **cpu(found[1], rows)}
    plain = data.arrays(image=pixels, label=np.zeros(rows, int), classes=classes)
    config = cache.Cache(path=str(folder / "images"), codec=codec)
    answered = dataclasses.replace(plain, answers=Answers(config, plain))
    answered.answers.open()
    many = rows // (batch := min(rows, 512))
    for name, each in (("batches with answers", answered), ("batches without", plain)):
        found = timed(lambda seed, each=each: take(each.batches(batch, seed=seed), many), 3)
        yield {"what": "images", "how": name, "examples_per_s": round(many * batch / found[0]), **cpu(found[1], many * batch)}


def headroom(folder: Path, tiny: bool):
    import jax

    import jkd
    from jkd import models, optim, recipes

    rows, length = (2, 64) if tiny else (8, 512)
    config = models.decoder.Config(vocab=512 if tiny else 32_768, dim=64 if tiny else 256, depth=2, heads=4, hidden=256)
    codec = cache.TopK(k=K, vocab=config.vocab)
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(config.vocab), (length, 1)), axis=-1)[:, :K]
    answer = codec.decode([codec.encode({"ids": ids, "log_probs": np.full((length, K), -np.log(K + 1.0))})] * rows)
    batch = {
        "tokens": rng.integers(0, config.vocab, (rows, length)).astype(np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
        "teacher": jkd.Outputs(heads={"topk": answer}),
    }
    run = jkd.Run(
        student=config,
        teacher=models.prepared(),
        recipe=recipes.TopKKD(k=K),
        optimizer=optim.adamw(1e-3),
        steps=10,
        batch_size=rows,
    )
    ctx = jkd.make_context(run, batch)
    state, frozen = jkd.init_state(ctx, jax.random.key(0))
    step, placed = jkd.make_step(ctx), jkd.put_batch(batch, ctx.mesh)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        state, metrics = step(state, frozen, placed)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    steps = rows * length / min(times[1:])
    (read,) = [line for line in rate(folder / "again", tiny) if line["codec"] == "top-64 float16"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    told = {"what": "headroom", "parameters": parameters, "step_tokens_per_s": round(steps)}
    yield told | {"read_tokens_per_s": read["tokens_per_s"], "headroom": round(read["tokens_per_s"] / steps, 1)}


def batches(seed: int, rows: int, batch: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(rows), max(1, rows // batch))


def two_threads(function, pieces) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(function, pieces))


def take(iterator, count: int) -> None:
    for _ in range(count):
        next(iterator)
    iterator.close()


def timed(function, times: int) -> tuple[float, float]:
    """Wall and processor seconds, the best of several after one to warm up."""
    found = []
    for seed in range(times + 1):
        wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        function(seed)
        now = resource.getrusage(resource.RUSAGE_SELF)
        spent = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        found.append((time.perf_counter() - wall, spent))
    return min(wall for wall, _ in found[1:]), min(spent for _, spent in found[1:])


def cpu(seconds: float, many: int) -> dict:
    return {"cpu_us": round(seconds / many * 1e6, 3)}


def revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="smallest shapes: does it run?")
    parser.add_argument("--only", nargs="*", choices=("size", "rate", "images", "headroom"))
    parser.add_argument("--folder", help="where caches are made for a while; default: a temporary folder")
    options = parser.parse_args(arguments)
    where = {"device": f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)", "revision": revision()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for measure in (size, rate, images, headroom):
            if not options.only or measure.__name__ in options.only:
                for line in measure(Path(folder), options.tiny):
                    print(json.dumps(line | where), flush=True)


if __name__ == "__main__":
    main()
