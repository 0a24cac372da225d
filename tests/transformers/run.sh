#!/usr/bin/env bash
# `transformers` loads what jkd writes: every family of the fixtures, and what `jkd export` made of three small trainings, whose logits
# must be those of the exported program too. Installs PyTorch and transformers into an environment of its own, so .ci/run calls it, not
# pytest. PYTHON=… names the tests' python, default .venv/bin/python; PEER=… an environment to use and keep.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PEER=${PEER:-$work/peer}

"$PYTHON" -m pytest -q -p no:cacheprovider --basetemp="$work/real" tests/test_real_world.py
"$PYTHON" tests/make_pretrained.py --save "$work/fixtures" >/dev/null
for config in "$work"/real/*0/out/config.json; do folders+=("$(dirname "$config")"); done
"$PYTHON" tests/transformers/exported.py program "${folders[@]}"

[[ -x $PEER/bin/python ]] || { python3 -m venv "$PEER" && "$PEER/bin/pip" install -q torch==2.13.0 transformers==5.23.0 pillow; }
"$PEER/bin/python" tests/make_pretrained.py --load "$work/fixtures"
"$PEER/bin/python" tests/transformers/exported.py transformers "${folders[@]}"
