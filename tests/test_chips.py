"""The table of accelerators: looked up by name and by what JAX calls the device, and plausible throughout."""

import dataclasses

import pytest

from jkd import chips
from jkd.errors import InputError


def test_a_chip_is_found_by_its_name_and_by_what_jax_calls_it():
    for name, chip in chips.CHIPS.items():
        assert chips.find(name) is chip
        assert all(chips.of_kind(kind) is chip for kind in chip.kinds)
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_what_is_not_in_the_table_is_no_chip():
    with pytest.raises(InputError, match=r"no chip 'h1000' is known; did you mean 'h100'"):
        chips.find("h1000")
    assert chips.of_kind("cpu") is None
    assert chips.of_kind("NVIDIA H100 PCIe") is None  # slower than the H100 of the table: nothing is claimed of it


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_rates_are_in_flops_and_bytes_a_second(chip):
    """A wrong unit (bits, GiB, both directions) leaves these ranges."""
    assert 1e14 < chip.bf16 < 1e16
    assert 16e9 <= chip.memory < 300e9
    assert 100 < chip.bf16 / chip.memory_bandwidth < 600  # FLOPs a byte at the roofline's corner
    assert 2 <= chip.memory_bandwidth / chip.link_bandwidth < 12
    assert (chip.tf32 is None) == (chip.fp32 is None) == (chip.platform == "tpu")
    assert "http" in chip.source


def test_float32_products_run_at_the_rate_of_their_rounded_operands():
    assert chips.find("v5e").peak("float32") == chips.find("v5e").bf16
    assert chips.find("h100").peak("float32") == chips.find("h100").bf16 / 2
    assert chips.find("h100").peak("bfloat16") == 989.4e12


def test_the_table_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        chips.find("v5e").bf16 = 1.0
