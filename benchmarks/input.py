"""Small data in memory: batches as jkd makes them, beside grain's path through single records. Prints one JSON line.

python benchmarks/input.py
"""

from __future__ import annotations

import itertools
import json
import time

import grain
import numpy as np

from jkd import data, provenance

ROWS = 128


class Records:
    """Digits one by one, as grain's usual pipelines read them."""

    def __init__(self, columns):
        self._columns = columns

    def __len__(self):
        return len(self._columns["label"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self._columns.items()}


def rate(batches, count: int) -> float:
    """Examples a second, after a few batches."""
    for _ in itertools.islice(batches, 5):
        pass
    start = time.perf_counter()
    rows = sum(len(batch["label"]) for batch in itertools.islice(batches, count))
    return rows / (time.perf_counter() - start)


def main() -> None:
    digits = data.digits()
    ours, theirs = [], []
    for _ in range(5):  # in turn
        batches = digits.batches(ROWS, seed=0)
        ours.append(rate(batches, 500))
        batches.close()
        records = grain.MapDataset.source(Records(digits.train.columns())).seed(0).shuffle().repeat()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * ROWS)
        theirs.append(rate(iter(records.to_iter_dataset(options).batch(ROWS)), 20))
    found = {
        "jkd_examples_per_s": float(np.median(ours)),
        "grain_records_per_s": float(np.median(theirs)),
        "ratio": float(np.median(np.divide(ours, theirs))),
        "batch": ROWS,
        "revision": provenance.code_revision(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
