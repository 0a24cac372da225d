"""What accelerators can do at most, as their makers publish it: the constants of every roofline in jkd.

Dense peaks (no structured sparsity), decimal units for rates. Nothing here was measured: a real step reaches a part of a peak,
which `jkd bench` measures and `jkd plan` leaves out.
"""

from __future__ import annotations

import dataclasses

from jkd.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip: what JAX calls a device.

    Args:
        name: how it is written in a topology.
        platform: ``tpu`` or ``gpu``.
        kinds: what `jax.Device.device_kind` says on it.
        bf16: FLOP/s of matrix products of bfloat16, summed in float32.
        tf32: of float32 operands rounded to 10 bits of mantissa, JAX's default for float32 on such GPUs; None where there is none.
        fp32: of float32 outside the matrix units; None where it is not published.
        memory: bytes.
        memory_bandwidth: bytes/s between memory and chip.
        link: what joins chips.
        link_bandwidth: bytes/s that a chip sends over all its links of this kind while it receives as many.
        source: where these numbers stand.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    bf16: float
    tf32: float | None = None
    fp32: float | None = None
    memory: float
    memory_bandwidth: float
    link: str
    link_bandwidth: float
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products at JAX's default precision: float32 operands are rounded to bfloat16 on TPU, TF32 on GPU."""
        return self.bf16 if dtype == "bfloat16" or self.tf32 is None else self.tf32


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (SXM), https://www.nvidia.com/en-us/data-center/a100/"
# Published interconnect rates count both directions; half of them is what a chip sends.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            kinds=("TPU v5 lite", "TPU v5e"),
            bf16=197e12,
            memory=16 * 2**30,
            memory_bandwidth=819e9,
            link="ICI, 2D torus, 4 links",
            link_bandwidth=200e9,
            source=_TPU + "v5e (197 TFLOPs bf16, 16 GB, 819 GBps, ICI 400 GBps bidirectional per chip)",
        ),
        Chip(
            name="v5p",
            platform="tpu",
            kinds=("TPU v5", "TPU v5p"),
            bf16=459e12,
            memory=95 * 2**30,
            memory_bandwidth=2765e9,
            link="ICI, 3D torus, 6 links",
            link_bandwidth=600e9,
            source=_TPU + "v5p (459 TFLOPs bf16, 95 GiB, 2765 GBps, ICI 1200 GBps bidirectional per chip)",
        ),
        Chip(
            name="v6e",
            platform="tpu",
            kinds=("TPU v6 lite", "TPU v6e"),
            bf16=918e12,
            memory=32 * 2**30,
            memory_bandwidth=1638e9,
            link="ICI, 2D torus, 4 links",
            link_bandwidth=400e9,
            source=_TPU + "v6e (918 TFLOPs bf16, 32 GB, 1638 GBps, ICI 800 GBps bidirectional per chip)",
        ),
        Chip(
            name="a100",
            platform="gpu",
            kinds=("NVIDIA A100-SXM4-80GB",),
            bf16=312e12,
            tf32=156e12,
            fp32=19.5e12,
            memory=80e9,
            memory_bandwidth=2039e9,
            link="NVLink 3",
            link_bandwidth=300e9,
            source=_A100,
        ),
        Chip(
            name="a100-40gb",
            platform="gpu",
            kinds=("NVIDIA A100-SXM4-40GB",),
            bf16=312e12,
            tf32=156e12,
            fp32=19.5e12,
            memory=40e9,
            memory_bandwidth=1555e9,
            link="NVLink 3",
            link_bandwidth=300e9,
            source=_A100,
        ),
        Chip(
            name="h100",
            platform="gpu",
            kinds=("NVIDIA H100 80GB HBM3",),
            bf16=989.4e12,
            tf32=494.7e12,
            fp32=66.9e12,
            memory=80e9,
            memory_bandwidth=3350e9,
            link="NVLink 4",
            link_bandwidth=450e9,
            source="NVIDIA H100 Tensor Core GPU datasheet (SXM5), https://www.nvidia.com/en-us/data-center/h100/",
        ),
        Chip(
            name="h200",
            platform="gpu",
            kinds=("NVIDIA H200",),
            bf16=989.4e12,
            tf32=494.7e12,
            fp32=66.9e12,
            memory=141e9,
            memory_bandwidth=4800e9,
            link="NVLink 4",
            link_bandwidth=450e9,
            source="NVIDIA H200 Tensor Core GPU datasheet (SXM), https://www.nvidia.com/en-us/data-center/h200/",
        ),
        Chip(
            name="b200",
            platform="gpu",
            kinds=("NVIDIA B200",),
            bf16=2250e12,
            tf32=1100e12,
            fp32=80e12,
            memory=180e9,
            memory_bandwidth=8000e9,
            link="NVLink 5",
            link_bandwidth=900e9,
            source="NVIDIA Blackwell architecture technical brief (HGX B200); memory: DGX B200 datasheet (1,440 GB for 8 GPUs), "
            "https://www.nvidia.com/en-us/data-center/dgx-b200/",
        ),
    )
}


def find(name: str) -> Chip:
    """The chip of this name.

    Raises:
        InputError: there is none; the message has the nearest names.
    """
    if name not in CHIPS:
        raise InputError(f"no chip {name!r} is known{nearest(name, CHIPS)}")
    return CHIPS[name]


def of_kind(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one that is not in the table, of which nothing is then claimed."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
