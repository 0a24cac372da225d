"""A step of two decoders over a large vocabulary by jkd's blocks: a worker of benchmarks/pair.py beside peers/tunix_step.py.

    python benchmarks/pair.py "python benchmarks/lm_step.py" "othervenv/bin/python benchmarks/peers/tunix_step.py"

Shapes are those of benchmarks/chunked.py (8 texts of 256 tokens, 32768 classes, widths 256 and 512, 4 layers), forward KL and
cross-entropy, float32, AdamW; the teacher runs in the step. `--tiny` tries whether it runs.
"""

from __future__ import annotations

import argparse

import chunked
from pair import blocked, serve

from jkd import recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    shape = chunked.TINY if parser.parse_args().tiny else chunked.Shape()
    _, call = chunked.stepping(recipes.TokenKD(weight=0.9, task_weight=0.1), shape, "float32")

    serve(blocked(call))


if __name__ == "__main__":
    main()
