"""``jkd``: reads arguments, maps what happens to exit codes. What the commands do is in `jkd.commands`, which loads when it runs.

Exit codes: 0 finished, 2 bad input (one line), 75 stopped and resumable by the same command, 1 failed (one line; the whole
traceback with ``--traceback`` or ``JKD_TRACEBACK=1``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from jkd import __version__
from jkd.errors import BAD_INPUT, FAILED, FINISHED, STOPPED, InputError

_OVERVIEW = """
examples:
  jkd train digits                       the packaged config: about a minute on a CPU
  jkd configs digits > mine.py           copy it, edit it, then
  jkd train mine.py --set steps=200      run it with another value of a parameter of config()
  jkd describe mine.py                   shapes, terms and memory, without compiling
  jkd plan mine.py --topology v5e:16x16  what it would need and take on a pod that is not here
  jkd bench mine.py                      how fast it goes, and what binds it
  jkd report runs/mine-1a2b3c4d          tables and curves of what was trained
  jkd recipes                            every method with its citation
  jkd train --help                       more on training

exit codes: 0 finished, 1 failed, 2 bad input, 75 stopped and resumable by the same command
"""
_TRAIN = """
examples:
  jkd train configs/digits.py
  jkd train digits --set seed=3 --set temperature=2      parameters of the config's config()
  jkd train digits --set student.steps=50                a field of one run
  jkd train digits --set '*.batch_size=64'               a field of every run
  jkd train digits --set student.recipe.temperature=2    a field of a field
  jkd train digits --seeds 5                             five seeds in turn, then mean ± standard deviation
  jkd train digits --workdir gs://bucket/run1

The same command resumes what was stopped (Ctrl-C and SIGTERM save first and exit with 75), and does not train finished runs
again. Without --workdir, runs/<config>-<8 hex digits of the resolved config> is used: another setting is another folder.
Started by srun, mpirun or on the hosts of a TPU pod, the processes find each other; by hand, set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""
_CACHE = """
examples:
  jkd cache configs/digits_cached.py     then: jkd train configs/digits_cached.py
  jkd cache digits_cached --set seed=3

Fills the caches that the config's runs read (Run.teacher = cache.Cache(…)) with their teachers' answers to the runs' own data.
Teachers that are runs of the config are trained first, in the workdir that jkd train would use. What is there is kept: after
Ctrl-C or SIGTERM (exit code 75), a kill, or when data was added, the same command adds what is missing.
"""
_EVAL = """
examples:
  jkd eval runs/digits-1a2b3c4d          what that folder holds
  jkd eval digits --set seed=3           what `jkd train digits --set seed=3` left in its default folder
"""
_REPORT = """
examples:
  jkd report runs/digits-1a2b3c4d                        a table, and report.html in that folder
  jkd report runs/digits-1a2b3c4d-seeds                  the same over seeds: mean ± standard deviation
  jkd report runs/a runs/b --html both.html              what their configs differ in as columns
  jkd report runs/digits-1a2b3c4d --png methods.png      a picture of every run against control and teacher
  jkd report runs/digits-1a2b3c4d --json | jq '.[].runs.student.metrics.accuracy.mean'

Folders whose configs differ in seeds alone are one row for each run; so are the runs kd_0, kd_1, … of one config if they
differ in seeds alone. The run called control is what the others' gain is counted from. A config may name published numbers,
which then stand beside the measured ones: PUBLISHED = {"kd": 73.33, "simkd": (78.08, 73.09)} (accuracy in %; a pair names the
control beside it) and PUBLISHED_ON = "CIFAR-100, …". The page is one file that needs nothing else. Nothing is trained or
evaluated.
"""
_DESCRIBE = """
examples:
  jkd describe configs/digits.py
  jkd describe digits --set student.recipe.temperature=2

Nothing is compiled or trained; weights are not made. Printed for each run: the resolved config, every module path of both
networks with its shape (what is tapped is marked), the recipe's own parameters, its terms, and the memory of the state.
"""
_EXPORT = """
examples:
  jkd export runs/digits-1a2b3c4d out                    the last run of the config
  jkd export runs/digits-1a2b3c4d out --run teacher      another one
  jkd export runs/qwen3-1a2b3c4d out --ema --dtype bfloat16

Written: model.safetensors, model.stablehlo (the network as a program for CPUs, GPUs and TPUs, which jax.export.deserialize
loads without jkd) and card.json. Networks of a published family become a directory that transformers loads, with the tokenizer,
chat template and generation config of where they came from. What was written is read back, and its answers are compared.
"""
_PLAN = """
examples:
  jkd plan digits --topology v5e:16x16 --set '*.batch_size=1024'
  jkd plan mine.py --topology v5p:4x4x8 --set student.mesh.data=1 --set student.mesh.fsdp=128
  jkd plan mine.py --topology gpu:h100x8 --json plan.json --price-per-chip-hour 2.5

Compiles the run's train step for devices that are not here: does it fit, what do the devices tell each other, what bounds it,
how long and how dear is the run. TPUs (v5e, v5p, v6e) need their compiler, no TPU: pip install 'jkd[tpu]'. For GPUs (a100,
h100, h200, b200) the CPU's compiler stands in: bytes of parameters, optimizer and teacher are exact, the rest is estimated.
--json FILE keeps {chips, mesh, fits, bytes_per_chip, flops_per_step, collectives, predicted_step_s, bound_by, compile_s}.
"""
_BENCH = """
examples:
  jkd bench digits                                       every run of the config, one after the other
  jkd bench digits --run student --json bench.jsonl      one run; its numbers as a line of JSON
  jkd bench digits --run student --set student.batch_size=512
  jkd bench --ab digits 'digits --set student.recipe.temperature=1'    two runs in turn, and the ratio of their times
  jkd bench mine.py --run student --sweep                microbatches and rematerialisation: time against memory
  jkd bench mine.py --run student --profile trace        then: tensorboard --logdir trace (with xprof)

Nothing is trained: teachers that an earlier run would train have random weights, and data that is not on this machine is made
up in its shapes (the output says so). docs/benchmarks.md defines every number. --json appends one line for each measurement.
"""
_DEBUG = """
examples:
  jkd debug runs/digits-1a2b3c4d                         after a training said that a step is not finite
  jkd debug runs/digits-1a2b3c4d --run teacher

Trains again from the last good checkpoint (or the start) to the step whose loss or gradient was not finite, with the batch and
key that were kept of it, and names the first tap, the first term and the first gradient that are not finite, and the rows of
the batch. Nothing in the folder changes.
"""
_DATA = """
examples:
  jkd data configs/digits.py                             what each run trains on; images: digits-data.png
  jkd data mine.py --rows 8 --png sheet.png

Of texts a few rows are printed, decoded: what is counted in the loss stands in «…». Of images a contact sheet is written: each
row is an example as the data give it, after the run's augmentations, and as the student and the teacher see it. Nothing is
trained.
"""
_RECIPES = """
examples:
  jkd recipes
  jkd recipes --json | jq '.[].name'
"""
_CONFIGS = """
examples:
  jkd configs                            what there is
  jkd configs digits > mine.py           a copy to edit
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows examples)")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="jkd",
        description="Knowledge distillation for JAX.",
        epilog=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"jkd {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, help: str, epilog: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--traceback", action="store_true", help="show the whole traceback of an error (or JKD_TRACEBACK=1)")
        return made

    def config(made: argparse.ArgumentParser, what: str, name: str, *, optional: bool = False) -> None:
        made.add_argument("config", metavar=name, help=what, nargs="?" if optional else None)
        made.add_argument(
            "--set", dest="sets", metavar="NAME=VALUE", action="append", default=[], help="change a value of the config"
        )
        made.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="run there or not at all; default: the best there is")

    file = "a config file, or the name of a packaged config (see jkd configs)"
    train = command("train", "Train every run of a config.", _TRAIN)
    config(train, file, "CONFIG")
    train.add_argument("--workdir", metavar="DIR", help="folder for checkpoints and metrics, local, gs:// or s3://")
    train.add_argument("--seeds", metavar="N", type=int, help="train with seed 0 to N-1 in turn")
    cache = command("cache", "Fill the caches of teacher answers that a config's runs read.", _CACHE)
    config(cache, file, "CONFIG")
    cache.add_argument("--workdir", metavar="DIR", help="folder of the runs, as for jkd train")
    evaluate = command("eval", "Evaluate what was trained.", _EVAL)
    config(evaluate, "a folder that jkd train made, or a config", "RUN_DIR|CONFIG")
    report = command("report", "Show what trainings left: a table, a page with curves, a picture.", _REPORT)
    report.add_argument("folders", metavar="RUN_DIR", nargs="+", help="folders that jkd train made; also of --seeds")
    report.add_argument("--json", action="store_true", help="JSON in place of the table; no page unless --html says where")
    report.add_argument("--html", metavar="FILE", help="where the page goes; default: report.html in the first folder")
    report.add_argument("--png", metavar="FILE", help="write a picture too")
    config(command("describe", "Show what a config means: shapes, terms, memory.", _DESCRIBE), file, "CONFIG")
    export = command("export", "Write what was trained as files that others load.", _EXPORT)
    export.add_argument("folder", metavar="RUN_DIR", help="a folder that jkd train made")
    export.add_argument("directory", metavar="DIR", help="where to; made if need be, must be empty")
    export.add_argument("--run", metavar="NAME", help="which run of the config; default: the last")
    export.add_argument("--ema", action="store_true", help="the average's weights in place of the last step's")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as they are")
    plan = command("plan", "Compile a run for devices that are not here: memory, collectives, time, cost.", _PLAN)
    plan.add_argument("config", metavar="CONFIG", help=file)
    plan.add_argument("--topology", metavar="NAME", required=True, help="v5e:16x16, v5p:4x4x8, v6e:8x8, gpu:h100x8, cpu:8, …")
    plan.add_argument(
        "--set", dest="sets", metavar="NAME=VALUE", action="append", default=[], help="change a value of the config"
    )
    plan.add_argument("--run", metavar="NAME", help="which run; default: student, else the last that has a teacher")
    plan.add_argument("--json", metavar="FILE", help="write the figures there")
    plan.add_argument("--price-per-chip-hour", metavar="PRICE", type=float, dest="price", help="for the cost of the whole run")
    bench = command("bench", "Measure how fast a run goes, and what binds it.", _BENCH)
    config(bench, file, "CONFIG", optional=True)
    bench.add_argument("--run", metavar="NAME", help="this run alone; default: every run, with --ab the last")
    bench.add_argument(
        "--ab", metavar=("A", "B"), nargs=2, help="two configs, each may have --set and --run of its own, in quotes"
    )
    bench.add_argument("--steps", metavar="N", type=int, default=20, help="calls that are timed, after two that are not")
    bench.add_argument("--sweep", action="store_true", help="time and memory of microbatches and rematerialisation")
    bench.add_argument("--json", metavar="FILE", help="append each measurement to it, one line of JSON each")
    bench.add_argument("--profile", metavar="DIR", help="write a trace of five steps there")
    debug = command("debug", "Find where a step that was not finite goes wrong.", _DEBUG)
    debug.add_argument("folder", metavar="RUN_DIR", help="a folder that jkd train made")
    debug.add_argument("--run", metavar="NAME", help="which run of the config; default: the one with such a step")
    data = command("data", "Show examples as they are trained on, and what of them counts.", _DATA)
    config(data, file, "CONFIG")
    data.add_argument("--rows", metavar="N", type=int, default=4, help="examples of each run's data; default: 4")
    data.add_argument("--png", metavar="FILE", help="where a contact sheet goes; default: <config>-data.png")
    recipes = command("recipes", "List every method with its citation and what it needs.", _RECIPES)
    recipes.add_argument("--json", action="store_true", help="as JSON")
    configs = command("configs", "List the packaged configs, or print one.", _CONFIGS)
    configs.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    show = "--traceback" in argv or os.environ.get("JKD_TRACEBACK", "") not in ("", "0")
    try:
        with _told_to_stop(argv[:1] in (["train"], ["cache"])):
            code = _run(argv)
    except InputError as error:
        code = _say(str(error), BAD_INPUT, show)
    except _NothingToSave:
        typed = shlex.join(["jkd", *argv])
        code = _say(f"stopped where nothing was to be saved; to go on: {typed}", STOPPED, show)
    except KeyboardInterrupt:
        lost = "; what came after the last checkpoint is lost" if argv[:1] == ["train"] else ""
        code = _say(f"interrupted{lost}", FAILED, show)
    except BrokenPipeError:  # whoever read our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FINISHED
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        hint = "" if show else "; JKD_TRACEBACK=1 shows where"
        # what jkd itself calls a failure says all in its line
        kind = [] if type(error).__module__.startswith("jkd.") else [type(error).__name__]
        code = _say(f"failed: {': '.join([*kind, *([text] if text else [])])}{hint}", FAILED, show)
    return _left_alone(code)


class _NothingToSave(KeyboardInterrupt):
    """SIGINT or SIGTERM came before a run began, or between runs: the same command goes on, and nothing is lost."""


@contextlib.contextmanager
def _told_to_stop(resumable: bool) -> Iterator[None]:
    """SIGTERM and SIGINT end a command that the same command resumes as they do one that is saved; a run has handlers of its own."""

    def told(number: int, frame: object) -> None:
        if _process()[1] == 1:
            raise _NothingToSave
        os.kill(os.getpid(), signal.SIGTERM)  # jax.distributed has it, and tells the others

    numbers = (signal.SIGINT, signal.SIGTERM)
    owned = resumable and threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, told) for number in numbers if owned}
    try:
        yield
    finally:
        for number, handler in before.items():
            if number == signal.SIGINT or _process()[1] == 1:
                signal.signal(number, handler)


def _run(argv: list[str]) -> int:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as left:  # --help and --version
        return int(left.code or 0)
    from jkd import commands

    run = getattr(commands, {"eval": "evaluate"}.get(arguments.command, arguments.command))
    return run(arguments, shlex.join(["jkd", *argv]))


def _say(line: str, code: int, show: bool) -> int:
    if show:
        traceback.print_exc()
    index = _process()[0]
    print(f"jkd{f'[{index}]' if index else ''}: {' '.join(line.split())}", file=sys.stderr)
    return code


def _process() -> tuple[int, int]:
    """(index, count) of this process; asks jax only where it has been loaded and told that there are several."""
    distributed = sys.modules.get("jax") and sys.modules["jax"].distributed
    if not distributed or not distributed.is_initialized() or _joining():
        return 0, 1
    jax = sys.modules["jax"]
    return jax.process_index(), jax.process_count()


def _joining() -> bool:
    """Whether this process has not found the others yet: jax then knows of several, and must not be asked for them."""
    return getattr(sys.modules.get("jkd.devices"), "joining", False)


def _left_alone(code: int) -> int:
    """Of several processes, one that ends early must not wait in its exit for peers that wait for it, or that never came."""
    if _joining() or (code in (FAILED, BAD_INPUT) and _process()[1] > 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
