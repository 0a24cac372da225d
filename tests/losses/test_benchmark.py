"""The benchmark runs, says the same as the losses, and prints one JSON line for each measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks/losses.py"


def test_tiny_benchmark():
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", "forward_kl", "dkd", "pld"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line["loss"] for line in lines} == {"forward_kl", "dkd", "pld"}
    for line in lines:
        assert {"us", "plain_us", "ratio", "temp_bytes", "plain_temp_bytes", "shape", "device", "backend", "revision"} <= set(
            line
        )
        assert line["us"] > 0
        assert line["ratio"] > 0
