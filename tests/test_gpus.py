"""GPUs that are described to a compiler; compiled for only where JAX's CUDA plugin is installed."""

import importlib.util

import pytest

from jkd import chips, configfile, gpus, plan, plantext, topology, trees

PLUGIN = importlib.util.find_spec("jax_plugins") and any(
    importlib.util.find_spec(f"jax_plugins.{name}") for name in gpus.PLUGINS
)


@pytest.mark.parametrize("chip", [chip for chip in chips.CHIPS.values() if chip.platform == "gpu"], ids=lambda chip: chip.name)
def test_a_description_agrees_with_the_table_of_chips(chip):
    """Arithmetic outside the matrix units: two operations of every unit at every tick."""
    cores = gpus.CORES[chip.name]
    assert chip.fp32 == pytest.approx(2 * cores.count * cores.fp32 * cores.ghz * 1e9, rel=0.08)
    text = gpus.description(chip)
    assert f"device_memory_size: {int(chip.memory)}\n" in text
    assert f'device_description_str: "{chip.kinds[0]}"' in text


@pytest.mark.skipif(bool(PLUGIN), reason="JAX's CUDA plugin is installed")
def test_without_the_plugin_the_cpus_compiler_stands_in_and_the_plan_says_so():
    found = topology.of("gpu:h100x8")
    assert {device.platform for device in found.devices} == {"cpu"}
    assert (found.exact, found.instead) == (False, [])
    assert found.note == "compiled for as many CPU devices: what the compiler decides is an estimate"


def test_where_the_gpus_compiler_gives_up_the_cpus_stands_in_and_its_reason_is_told():
    cpus = topology.of("cpu:8").devices
    there = topology.Topology("gpu:h100x8", chips.find("h100"), ["a GPU"] * 8, False, "compiled for GPUs", gpus.OPTIONS, cpus)
    found = topology.by_cpu(there, "no tile fits")
    assert (found.devices, found.options, found.instead) == (cpus, {}, [])
    assert found.note.endswith("an estimate (the GPU's compiler says: no tile fits)")


@pytest.mark.slow
@pytest.mark.skipif(not PLUGIN, reason="JAX's CUDA plugin is not installed: pip install 'jkd[cuda13]'")
def test_a_config_compiles_for_gpus_that_are_not_here():
    run = plan.pick(configfile.resolve(configfile.load("digits"), ["student.batch_size=256"]))[1]
    made = plan.plan(run, topology.of("gpu:h100x8"))
    assert made.topology.devices[0].platform in ("cuda", "gpu")
    assert made.fits
    reduced = sum(each.bytes for each in made.traffic if each.kind in ("all-reduce", "reduce-scatter"))
    assert reduced == pytest.approx(trees.nbytes(made.ctx.params["student"]), rel=0.01)
    assert not [each for each in made.traffic if each.of == "teacher"]
    text = plantext.text("student", made)
    assert "compiled for GPUs that are not here" in text
    assert "temporaries (estimate)" in text
