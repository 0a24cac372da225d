#!/usr/bin/env bash
# Every script of benchmarks/, peers' apart, on smallest shapes: does it run, and print what it should? Nothing is kept, and no time
# means anything. The tests' XLA flags, which compile quickly, and one process for what can share it. PYTHON=… names the tests' python.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
export JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false
XLA_FLAGS=$("$PYTHON" -c 'import os, sys; sys.path.insert(0, "tests"); import conftest
print(*(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag))')
export XLA_FLAGS

cd benchmarks
"$PYTHON" - <<'SCRIPTS'
import importlib, sys
sys.path.insert(0, ".")
for name, *more in (
    ["input"], ["dispatch"], ["cache"], ["losses", "--only", "forward_kl"], ["chunked", "--only", "js", "JSD and CE"],
    ["accelerator"], ["engine"], ["digits"],
):
    print(f"== {name}", flush=True)
    importlib.import_module(name).main(["--tiny", *more])
SCRIPTS
JAX_ENABLE_COMPILATION_CACHE=true "$PYTHON" startup.py --tiny
"$PYTHON" digits_methods.py --tiny | tail -n 4
"$PYTHON" page.py --tiny --only engine
"$PYTHON" pair.py "'$PYTHON' lm_step.py --tiny" "'$PYTHON' jsd_step.py --tiny" --rounds 1
