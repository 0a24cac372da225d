"""The generalised JSD between two heads by Liger-Kernel's chunks or TRL on whole logits: workers of benchmarks/pair.py.

    pip install -r benchmarks/peers/torch.txt     # in an environment of its own
    python benchmarks/pair.py "python benchmarks/jsd_step.py" "othervenv/bin/python benchmarks/peers/torch_jsd.py trl"

Shapes are those of benchmarks/jsd_step.py, beta 0.5, T 1. Liger always computes its cross-entropy too, here with weight 0: its chunks
go through both.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch


def liger(compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    return lambda mine, theirs, labels: loss(*mine, *theirs, labels)


def trl(compiled: bool):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    def loss(mine, theirs, labels):
        student, teacher = (hidden @ head.T for hidden, head in (mine, theirs))
        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=0.5, temperature=1.0)

    return torch.compile(loss) if compiled else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("liger", "trl"))
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which wants a C++ compiler on CPUs")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokens, student, teacher, vocab = (8, 8, 16, 64) if arguments.tiny else (512, 512, 1024, 32768)
    torch.manual_seed(0)

    def side(dim: int):
        return torch.randn(tokens, dim), torch.randn(vocab, dim) * 2 / dim**0.5

    mine, theirs, labels = side(student), side(teacher), torch.randint(0, vocab, (tokens,))
    for leaf in mine:
        leaf.requires_grad_()
    loss = {"liger": liger, "trl": trl}[arguments.peer](arguments.compile)

    def step() -> float:
        start = time.perf_counter()
        for leaf in mine:
            leaf.grad = None
        loss(mine, theirs, labels).backward()
        return time.perf_counter() - start

    step()
    print("READY", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main()
