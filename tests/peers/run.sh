#!/usr/bin/env bash
# The pairs of docs/benchmarks.md on smallest shapes, peers' side included: does each script still fit its library? An optional job,
# called neither by pytest nor by .ci/run: it installs PyTorch, TRL, Liger-Kernel and tunix (5 GB) into environments of their own.
# PYTHON=… names the tests' python, default .venv/bin/python; TORCH=… and TUNIX=… environments to use and keep.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
TORCH=${TORCH:-$work/torch} TUNIX=${TUNIX:-$work/tunix}

[[ -x $TORCH/bin/python ]] || { python3 -m venv "$TORCH" && "$TORCH/bin/pip" install -q -r benchmarks/peers/torch.txt; }
[[ -x $TUNIX/bin/python ]] || { python3 -m venv "$TUNIX" && "$TUNIX/bin/pip" install -q -e '.[train]' -r benchmarks/peers/tunix.txt; }
JAX_PLATFORMS=cpu "$PYTHON" benchmarks/page.py --tiny --torch "$TORCH/bin/python" --tunix "$TUNIX/bin/python"
