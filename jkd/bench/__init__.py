"""How fast a run goes, what binds it, and how far it is from what the hardware allows; docs/benchmarks.md defines each number.

`jkd.bench.workload` makes a run step, `jkd.bench.measure` says what that costs, `jkd.bench.pairs` compares two of anything.
"""
