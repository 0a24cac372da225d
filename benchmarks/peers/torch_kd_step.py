"""The same step in PyTorch, eager: a worker of benchmarks/pair.py, in an environment of its own (torch.txt).

    python benchmarks/pair.py "python benchmarks/kd_step.py vision jkd" "othervenv/bin/python benchmarks/peers/torch_kd_step.py"

ResNet32x4 to ResNet8x4 with the shapes, the loss and the optimizer of benchmarks/kd_step.py. Threads: as many as the
process's affinity allows, as for XLA (OMP_NUM_THREADS does not count). Images become float and are normalised within the step there,
so here too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        changes = stride != 1 or inputs != width
        shortcut = (nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if changes else ()
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet(depth: int, widths=(32, 64, 128, 256), classes: int = 100) -> nn.Module:
    layers = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    inputs = widths[0]
    for number, width in enumerate(widths[1:]):
        for position in range((depth - 2) // 6):
            layers.append(Block(inputs, width, 2 if number and not position else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels-last", action="store_true", help="NHWC in memory, which some CPUs prefer")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch, size, widths, depths = (4, 8, (4, 4, 8, 8), (8, 8)) if arguments.tiny else (64, 32, (32, 64, 128, 256), (32, 8))
    order = torch.channels_last if arguments.channels_last else torch.contiguous_format
    teacher, student = (resnet(depth, widths).to(memory_format=order) for depth in depths)
    teacher.eval()
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).contiguous(memory_format=order)
    label = torch.randint(0, 100, (batch,))
    mean = torch.tensor((0.5071, 0.4867, 0.4408)).view(1, 3, 1, 1)
    std = torch.tensor((0.2675, 0.2565, 0.2761)).view(1, 3, 1, 1)

    def step() -> float:
        start = time.perf_counter()
        x = (image.float() / 255 - mean) / std
        with torch.no_grad():
            target = F.log_softmax(teacher(x) / 4, 1)
        logits = student(x)
        soft = 16 * F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean", log_target=True)
        loss = 0.9 * soft + 0.1 * F.cross_entropy(logits, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - start

    step()
    print("READY", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main()
