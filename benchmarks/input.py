"""Small data in memory: batches as jkd makes them, beside grain's path through single records. Prints one JSON line.

python benchmarks/input.py                    # a minute
python benchmarks/input.py --write            # and kept in benchmarks/results/small.json, for docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import grain
from kept import keep, where

from jkd import data
from jkd.bench.pairs import Ratio, Times

RESULTS = Path(__file__).parent / "results" / "small.json"
ROWS = 128


class Records:
    """Digits one by one, as grain's usual pipelines read them."""

    def __init__(self, columns):
        self._columns = columns

    def __len__(self):
        return len(self._columns["label"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self._columns.items()}


def seconds(batches, count: int) -> float:
    """For an example, after a few batches."""
    for _ in itertools.islice(batches, 5):
        pass
    start = time.perf_counter()
    rows = sum(len(batch["label"]) for batch in itertools.islice(batches, count))
    return (time.perf_counter() - start) / rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few batches, once: does it run?")
    parser.add_argument("--write", action="store_true", help=f"keep it in {RESULTS.name}")
    arguments = parser.parse_args(argv)
    rounds, many, few = (1, 2, 2) if arguments.tiny else (5, 500, 20)
    digits = data.digits()
    ours, theirs = [], []
    for _ in range(rounds):  # in turn
        batches = digits.batches(ROWS, seed=0)
        ours.append(seconds(batches, many))
        batches.close()
        records = grain.MapDataset.source(Records(digits.train.columns())).seed(0).shuffle().repeat()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * ROWS)
        theirs.append(seconds(iter(records.to_iter_dataset(options).batch(ROWS)), few))
    found = {
        "jkd_examples_per_s": 1 / Times.of(ours).median,
        "grain_records_per_s": 1 / Times.of(theirs).median,
        "ratio": vars(Ratio.of(theirs, ours)),
        "batch": ROWS,
        **where(),
    }
    print(json.dumps(found))
    if arguments.write:
        keep(RESULTS, "input", found)


if __name__ == "__main__":
    main()
