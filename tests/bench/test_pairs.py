"""Paired timing: its arithmetic, and two workers whose ratio is known."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from jkd.bench.pairs import Ratio, Times, alternate

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair.py"
# Seconds as the worker tells them: three times the other's, in a machine that gets slower and slower.
WORKER = """
import sys
print('warming up')
print('READY', flush=True)
for turn, _ in enumerate(sys.stdin):
    print({} * (1 + turn), flush=True)
"""


def test_times_are_the_smallest_the_middle_and_what_nine_of_ten_stay_below():
    assert Times.of([float(n) for n in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)]) == Times(1.0, 5.5, 9.0, 10)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1)


def test_a_ratio_is_of_rounds_so_what_changes_both_does_not_change_it():
    assert Ratio.of([3.0, 30.0, 300.0], [1.0, 10.0, 100.0]) == Ratio(3.0, 3.0, 3.0, 3)
    assert Ratio.of([1.0, 6.0, 2.0], [1.0, 2.0, 1.0]) == Ratio(2.0, 1.0, 3.0, 3)


def test_rounds_run_forwards_and_backwards_in_turn_and_the_first_are_dropped():
    order = []
    steps = [lambda name=name: order.append(name) or float(len(order)) for name in "ab"]
    assert alternate(steps, 2, drop=1) == [[4.0, 5.0], [3.0, 6.0]]
    assert "".join(order) == "abbaab"


def test_two_workers_with_a_known_ratio(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("pair", PAIR)
    pair = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pair)
    commands = []
    for name, seconds in (("slow", 0.75), ("quick", 0.25)):
        (tmp_path / name).write_text(WORKER.format(seconds))
        commands.append(f"{sys.executable} {tmp_path / name}")
    pair.main([*commands, "--rounds", "5"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0, "rounds": 5}
    assert (found["first"]["min"], found["first"]["steps"]) == (0.75 * 3, 5)  # the first two rounds are dropped
    assert err.count("warming up") == 2
    with pytest.raises(SystemExit, match="ended with exit code 3"):
        pair.main([f'{sys.executable} -c "raise SystemExit(3)"', commands[0]])
