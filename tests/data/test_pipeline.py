"""Batches: the same rows whatever the hosts, threads, workers and restarts; the keys that every batch has; the errors."""

import dataclasses
import itertools
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jkd import data
from jkd.data import check_batch, vision
from jkd.errors import InputError

SIZE, EVAL_SIZE = 37, 11


def columns(size, offset=0):
    rng = np.random.default_rng(size)
    return {
        "image": rng.integers(0, 256, (size, 6, 6, 3), dtype=np.uint8),
        "label": (np.arange(size) + offset) % 5,
    }


class Rows:
    """A record source like a user's own."""

    def __init__(self, size):
        self.columns = columns(size)

    def __len__(self):
        return len(self.columns["label"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()} | {"path": f"{index}.png"}


class Read(Rows):
    """Remembers which of its records were read."""

    def __init__(self, size):
        super().__init__(size)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(int(index))
        return super().__getitem__(index)


MAPS = (vision.random_crop(2), vision.flip())
MADE = {
    "arrays": lambda **options: data.arrays(**columns(SIZE), eval=columns(EVAL_SIZE)),
    "mapped arrays": lambda **options: data.arrays(**columns(SIZE), eval=columns(EVAL_SIZE), train_maps=MAPS),
    "records": lambda **options: data.source(Rows(SIZE), eval=Rows(EVAL_SIZE), classes=5, train_maps=MAPS, **options),
    "joined": lambda **options: data.join(
        data.source(Rows(SIZE), eval=Rows(EVAL_SIZE), classes=5, train_maps=MAPS, **options),
        unlabelled=(data.arrays(**columns(19)), 2),
    ),
}


def take(batches, count):
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def glue(shards):
    return jax.tree.map(lambda *rows: np.concatenate(rows), *shards)


@pytest.fixture(params=MADE)
def made(request):
    return MADE[request.param]


def test_hosts_together_hold_the_global_batch(made):
    whole = take(made().batches(8, seed=1), 12)
    for hosts in (2, 4):
        shards = [take(made().batches(8, seed=1, process=(host, hosts)), 12) for host in range(hosts)]
        for step in range(12):
            same(glue([shard[step] for shard in shards]), whole[step])


def test_a_host_reads_the_records_of_its_own_rows_alone():
    """Not only what comes out: what the source was asked for, a few records ahead of it included. Five batches of 8 from 400."""
    read, read_eval = [], []
    for host in range(2):
        train, held_out = Read(400), Read(16)
        made = data.source(train, eval=held_out, classes=5, threads=1)
        asked = len(train.seen), len(held_out.seen)  # by then, for their shapes
        index = np.concatenate([batch["index"] for batch in take(made.batches(8, seed=1, process=(host, 2)), 5)])
        assert len(index) == 20
        list(made.eval_batches(8, process=(host, 2)))
        read.append(train.seen[asked[0] :])
        read_eval.append(held_out.seen[asked[1] :])
        assert set(index) <= set(read[host])
        assert len(read[host]) <= 20 + 40
    assert not set(read[0]) & set(read[1])
    assert sorted(read_eval[0] + read_eval[1]) == list(range(16))


def test_hosts_together_hold_the_weighted_batch(made):
    weights = np.arange(SIZE, dtype=float)
    whole = take(made().batches(8, seed=1, weights=weights), 5)
    shards = [take(made().batches(8, seed=1, weights=weights, process=(host, 2)), 5) for host in range(2)]
    for step in range(5):
        same(glue([shard[step] for shard in shards]), whole[step])


@pytest.mark.parametrize("weights", [None, np.linspace(0, 1, SIZE)])
def test_start_is_the_same_as_skipping(made, weights):
    whole = take(made().batches(8, seed=1, weights=weights), 12)
    for start in (1, 5, 11):
        same(take(made().batches(8, seed=1, weights=weights, start=start), 12 - start), whole[start:])


def test_threads_change_nothing():
    runs = [take(MADE["joined"](threads=threads).batches(8, seed=1), 12) for threads in (1, 3, 16)]
    same(runs[0], runs[1])
    same(runs[0], runs[2])


def test_small_batches_that_lie_in_memory_come_without_threads_and_are_the_same():
    plain, threaded = MADE["arrays"](), dataclasses.replace(MADE["arrays"](), threads=1)
    alive = threading.active_count()
    rows = plain.batches(8, seed=1)
    first = list(itertools.islice(rows, 12))
    assert threading.active_count() <= alive  # those of tests before may end meanwhile
    rows.close()
    same(first, take(threaded.batches(8, seed=1), 12))
    same(list(plain.eval_batches(8)), list(threaded.eval_batches(8)))


def test_workers_change_nothing_and_their_errors_arrive():
    whole = take(MADE["records"]().batches(8, seed=1, start=3), 6)
    same(take(MADE["records"](workers=2).batches(8, seed=1, start=3), 6), whole)
    bad = data.source([{"image": np.zeros((4, 4, 1), np.uint8), "label": 7}] * 4, classes=5, workers=1)
    with pytest.raises(InputError, match=r"label 7 of example \d is outside 0\.\.4"):
        take(bad.batches(4, seed=0), 1)


def test_epochs_are_exact_across_batches(made):
    # 37 batches of 8 are 8 epochs of 37: the ends of epochs fall inside batches.
    batches = take(made().batches(8, seed=2), SIZE)
    index = np.concatenate([batch["index"] for batch in batches]).reshape(8, SIZE)
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in index)
    source = columns(SIZE)
    label = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(label, source["label"][index.ravel()])


def test_random_maps_differ_between_epochs_and_seeds():
    batches = take(MADE["records"]().batches(SIZE, seed=0), 2) + take(MADE["records"]().batches(SIZE, seed=1), 1)
    sorted_by_id = [batch["image"][np.argsort(batch["index"])] for batch in batches]
    assert (sorted_by_id[0] != sorted_by_id[1]).any(axis=(1, 2, 3)).mean() > 0.8
    assert (sorted_by_id[0] != sorted_by_id[2]).any(axis=(1, 2, 3)).mean() > 0.8


def test_a_batch_larger_than_the_data():
    batch = take(data.arrays(**columns(5)).batches(12, seed=0), 1)[0]
    assert sorted(np.bincount(batch["index"])) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_is_in_order_and_padded(made, hosts):
    shards = [list(made().eval_batches(8, process=(host, hosts))) for host in range(hosts)]
    assert {len(shard) for shard in shards} == {2}
    batches = [glue(parts) for parts in zip(*shards, strict=True)]
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(weight, np.arange(16) < EVAL_SIZE)
    source = columns(EVAL_SIZE)
    for name in ("image", "label"):
        joined = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(joined[:EVAL_SIZE], source[name])
        assert not joined[EVAL_SIZE:].any()
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches])[:EVAL_SIZE], np.arange(EVAL_SIZE))
    assert not np.concatenate([batch["labelled"] for batch in batches])[EVAL_SIZE:].any()


def test_spec_is_what_batches_hold(made):
    batch = take(made().batches(8, seed=0), 1)[0]
    spec = made().spec(8)
    assert jax.tree.map(lambda array: (array.shape, array.dtype), batch) == jax.tree.map(lambda s: (s.shape, s.dtype), spec)


@pytest.mark.parametrize(
    ("given", "image", "label"),
    [
        ({"image": np.zeros((4, 2, 2, 1), np.uint8), "label": np.zeros(4, np.int64)}, np.uint8, np.int32),
        ({"image": np.zeros((4, 2, 2, 1), np.float64), "label": np.zeros(4, np.uint8)}, np.float32, np.int32),
        ({"image": np.zeros((4, 2, 2, 1), np.float16), "label": np.zeros((4, 3))}, np.float16, np.float32),
        ({"image": np.zeros((4, 2, 2, 1), np.float32)}, np.float32, np.int32),
    ],
)
@pytest.mark.parametrize("road", ["arrays", "records"])
def test_dtypes(given, image, label, road):
    if road == "arrays":
        made = data.arrays(**given)
    else:
        made = data.source([{name: column[row] for name, column in given.items()} for row in range(4)])
    batch = take(made.batches(4, seed=0), 1)[0]
    wanted = {"image": image, "label": label, "weight": np.float32, "index": np.int32, "labelled": np.float32}
    assert {name: array.dtype for name, array in batch.items()} == wanted
    assert (batch["labelled"] == ("label" in given)).all()
    assert (batch["weight"] == 1).all()


def test_joined_streams_have_an_order_of_their_own():
    one = data.arrays(**columns(64))
    joined = data.join(one, unlabelled=(one, 2), extra=one)
    batch = take(joined.batches(16, seed=0), 1)[0]
    assert batch["unlabelled"]["index"].shape == (32,)
    assert batch["extra"]["index"].shape == (16,)
    assert not np.array_equal(batch["extra"]["index"], batch["index"])
    assert joined.train_size == 64


def test_labels_that_may_not_be_used_are_not_there():
    labels = np.array([3, -1, 255, 1])
    made = data.arrays(image=np.zeros((4, 2, 2, 1), np.uint8), label=labels, labelled=np.array([1, 0, 0, 1]), classes=4)
    batch = take(made.batches(4, seed=0), 1)[0]
    np.testing.assert_array_equal(batch["label"][np.argsort(batch["index"])], [3, 0, 0, 1])


@pytest.mark.parametrize("road", ["arrays", "records"])
@pytest.mark.parametrize("value", [-1, 5])
def test_label_outside_the_classes(road, value):
    given = columns(6)
    given["label"][4] = value
    if road == "arrays":
        made = data.arrays(**given, classes=5)
    else:
        made = data.source([{name: column[row] for name, column in given.items()} for row in range(6)], classes=5)
    with pytest.raises(InputError, match=rf"^label {value} of example 4 is outside 0\.\.4"):
        take(made.batches(6, seed=0), 1)


def test_check_batch():
    batch = {"label": np.array([9, 0]), "weight": np.array([0.0, 1.0])}
    check_batch(batch, 5)
    check_batch({"label": np.array([9, 0])}, None)
    with pytest.raises(InputError, match=r"label 9 of row 0 is outside 0\.\.4"):
        check_batch({"label": np.array([9, 0])}, 5)
    with pytest.raises(InputError, match=r"coarse 9 of example 7"):
        check_batch({"coarse": np.array([0, 9]), "index": np.array([3, 7])}, 5, field="coarse")


ERRORS = {
    "no multiple of the hosts": (lambda: MADE["arrays"]().batches(9, seed=0, process=(0, 2)), "batch_size=9.*hosts \\(2\\)"),
    "no batch": (lambda: MADE["arrays"]().batches(0, seed=0), "batch_size=0"),
    "host": (lambda: MADE["arrays"]().batches(8, seed=0, process=(2, 2)), "process=\\(2, 2\\)"),
    "start": (lambda: MADE["arrays"]().batches(8, seed=0, start=-1), "start=-1"),
    "seed": (lambda: MADE["arrays"]().batches(8, seed=-1), "seed=-1"),
    "float seed": (lambda: MADE["arrays"]().batches(8, seed=0.5), "seed=0.5"),
    "weights": (lambda: MADE["arrays"]().batches(8, seed=0, weights=np.ones(3)), "shape \\[3\\]"),
    "no evaluation": (lambda: data.arrays(**columns(4)).eval_batches(4), "no evaluation source"),
    "map": (lambda: data.source(Rows(4), train_maps=("flip",)), "'flip' is not callable"),
    "threads": (lambda: data.source(Rows(4), threads=0), "threads=0"),
    "workers": (lambda: data.source(Rows(4), workers=-1), "workers=-1"),
    "taken key": (lambda: data.join(MADE["arrays"](), label=MADE["arrays"]()), "'label'"),
    "ratio": (lambda: data.join(MADE["arrays"](), unlabelled=(MADE["arrays"](), 0)), "ratio"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_the_first_batch(case):
    call, message = ERRORS[case]
    with pytest.raises(InputError, match=message):
        call()


RECORDS = {
    "sizes": (
        [{"image": np.zeros((4 + row, 4, 3), np.uint8)} for row in range(3)],
        r"image of record \d has shape \[\d, 4, 3\]",
    ),
    "bytes": ([{"image": b"PNG"}] * 3, r"image of record \d is bytes: put vision\.decode\(\) first"),
    "no channels": ([{"image": np.zeros((4, 4), np.uint8)}] * 3, r"\[4, 4\], not \[height, width, channels\]"),
    "int64": ([{"image": np.zeros((4, 4, 1), np.int64)}] * 3, "image is int"),
    "no dict": ([(1, 2)] * 3, r"record \d is a tuple, not a dict"),
    "missing": (
        [{"image": np.zeros((4, 4, 1), np.uint8)} | ({"label": 1} if row else {}) for row in range(3)],
        "record 0 has no 'label'",
    ),
    "float label": ([{"image": np.zeros((4, 4, 1), np.uint8), "label": 0.5}] * 3, "label of example . is the float 0.5"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_records_are_named(case):
    records, message = RECORDS[case]
    with pytest.raises(InputError, match=message):
        take(data.source(records).batches(3, seed=0), 1)


def test_an_iterator_left_open_does_not_hold_up_the_exit():
    code = (
        "import numpy as np; from jkd import data\n"
        "d = data.arrays(image=np.zeros((64, 8, 8, 1), np.uint8), label=np.zeros(64, int))\n"
        "import dataclasses\n"
        "d = dataclasses.replace(d, threads=1)\n"
        "if __name__ == '__main__':\n"
        "    b = d.batches(16, seed=0); next(b); e = d.batches(16, seed=1); next(e); e.close()\n"
        "    w = dataclasses.replace(d, workers=1).batches(16, seed=0); next(w)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 60


def test_heavy_modules_load_on_use():
    code = (
        "import sys; from jkd import data; print({'grain', 'sklearn', 'tensorflow_datasets', 'PIL', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_small_batches_cost_less_than_a_millisecond():
    batches = data.digits().batches(128, seed=0)
    next(batches)
    best = np.inf
    for _ in range(5):  # the best of several: other processes share the cores
        began = time.perf_counter()
        for _ in range(50):
            next(batches)
        best = min(best, (time.perf_counter() - began) / 50)
    batches.close()
    assert best < 1e-3
