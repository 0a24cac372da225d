"""Which launcher started a process, which accelerator a machine has, and what is said when jax cannot use it."""

import pytest

from jkd import devices
from jkd.errors import InputError


@pytest.mark.parametrize(
    ("marks", "launcher"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # in a batch script or salloc, outside srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, "srun"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, "JAX_COORDINATOR_ADDRESS"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_launchers_are_known_by_their_marks(marks, launcher):
    assert devices.launched_by(marks) == launcher


VENDOR, CLASS = ("sys/bus/pci/devices/0000:00:05.0/" + name for name in ("vendor", "class"))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"dev/nvidiactl": "", "dev/nvidia-uvm": ""}, None),
        ({"dev/nvidiactl": "", "dev/nvidia0": ""}, ("gpu", "/dev/nvidia0")),
        ({"dev/accel0": "", "dev/accel1": ""}, ("tpu", "/dev/accel0")),
        ({"dev/accel/accel0": ""}, None),  # another kind of accelerator
        ({"dev/vfio/vfio": "", "dev/vfio/7": ""}, None),
        ({"dev/vfio/7": "", VENDOR: "0x1ae0\n", CLASS: "0x120000\n"}, ("tpu", "/dev/vfio/7")),
        ({"dev/vfio/7": "", VENDOR: "0x1ae0\n", CLASS: "0x020000\n"}, None),  # Google's network card
        ({"dev/vfio/7": "", VENDOR: "0x8086\n", CLASS: "0x120000\n"}, None),
    ],
)
def test_accelerators_are_known_by_their_files(files, found, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.visible(tmp_path) == found


def test_the_cpu_beside_an_accelerator_must_be_meant(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    with pytest.raises(
        InputError, match=r"jax runs on the CPU, though /dev/nvidia0 says that a GPU is here: pip install 'jkd\[cuda13\]'"
    ):
        devices.check(None, {}, tmp_path)
    devices.check("cpu", {}, tmp_path)
    devices.check(None, {"JAX_PLATFORMS": "cpu"}, tmp_path)
    devices.check(None, {}, tmp_path / "dev")
