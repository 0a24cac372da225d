"""The commands and manifests of docs/pods.md: they parse, and say the same of exit codes, chips and Python as the code does."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # flax and orbax bring it

from jkd.cli import parser

PAGE = (Path(__file__).parent.parent / "docs" / "pods.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(bash|yaml)\n(.*?)^```$", PAGE, re.S | re.M)
SCRIPTS = [content for label, content in FENCES if label == "bash"]
(MANIFEST,) = [yaml.safe_load(content) for label, content in FENCES if label == "yaml"]
STOPPED, BAD_INPUT, FAILED = 75, 2, 1
HOST = 4
"""Chips of a v5e host in a slice of several."""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.split()[0])
def test_every_script_is_one_to_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_jkd_command_is_one_to_the_parser():
    text = "\n".join(SCRIPTS).replace("\\\n", " ")
    found = re.findall(r"\bjkd (train [^\"'\n]*)", text)
    assert len(found) == 4  # one host, SLURM, TPU VMs, XPK
    found.append(
        shlex.join(
            MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][1:]
        )
    )
    for line in found:
        arguments = parser().parse_args(shlex.split(line))
        assert arguments.config.endswith(".py")


def test_the_jobset_restarts_what_can_go_on_and_fails_on_bad_input():
    (workers,) = MANIFEST["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rules = {}
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule["onExitCodes"]
        assert (codes["containerName"], codes["operator"]) == (container["name"], "In")
        rules[rule["action"]] = codes["values"]
    assert rules == {"Ignore": [STOPPED], "FailJob": [BAD_INPUT]}
    # what remains, hosts that died and those that ended with 1 for it, fails the job; then all of them start again
    assert job["backoffLimit"] == 0
    policy = MANIFEST["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy asks for
    assert job["completionMode"] == "Indexed"


def test_the_jobsets_hosts_hold_the_chips_of_its_topology():
    job = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert chips == HOST
    assert job["parallelism"] == job["completions"] == rows * columns // chips


def test_scripts_name_as_many_hosts_as_their_slice_has():
    (script,) = [one for one in SCRIPTS if "gcloud" in one]
    (chips,) = {int(size) for size in re.findall(r"accelerator-type=v5litepod-(\d+)", script)}
    assert int(re.search(r"WORKERS=(\d+)", script)[1]) == chips // HOST


def test_xpk_is_told_the_codes_of_a_run_that_stopped_and_of_hosts_that_survived():
    """It restarts on 42 and on 127 to 255 by itself, and gives up for good on whatever else it is not told."""
    (script,) = [one for one in SCRIPTS if "xpk" in one]
    told = {int(code) for code in re.search(r"--restart-on-exit-codes=([\d,]+)", script)[1].split(",")}
    assert told == {FAILED, STOPPED}
    assert int(re.search(r"--max-restarts=(\d+)", script)[1]) > 0


def test_the_slurm_script_asks_for_what_it_needs():
    (script,) = [one for one in SCRIPTS if "#SBATCH" in one]
    options = " ".join(re.findall(r"^#SBATCH (.*)$", script, re.M)).split()
    asked = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a process on each GPU
    assert "requeue" in asked  # which `scontrol requeue` wants
    assert asked["signal"].startswith("TERM@")
    assert f"== {STOPPED} ]]" in script
