"""What the commands of ``jkd`` do. Each takes the parsed arguments and the command as it was typed, and returns an exit code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jkd import configfile
from jkd.errors import STOPPED, InputError, MissingExtra

if TYPE_CHECKING:
    from etils import epath

    from jkd.config import Experiment
    from jkd.console import Watch
    from jkd.context import Context

_PACKAGES = {
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "grain": "grain",
    "etils": "etils",
    "rich": "rich",
    "tensorboardX": "tensorboardX",
}
"""What training imports, and the distribution that brings it."""


def train(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd train``."""
    _require(_PACKAGES)
    from jkd import devices, programcache

    devices.start(arguments.device)
    programcache.start()
    function = configfile.load(arguments.config)
    seeds = _seeds(arguments, function)
    experiment = configfile.resolve(function, arguments.sets)
    devices.check(arguments.device)
    from jkd import workdir as workdirs

    workdir = workdirs.at(arguments.workdir or _default(arguments.config, experiment, seeds))
    if seeds is None:
        return _train(experiment, workdir, arguments, typed)[0]
    summaries = []
    for seed in seeds:
        sets = [*arguments.sets, f"seed={seed}"]
        one = argparse.Namespace(**vars(arguments) | {"sets": sets})
        code, summary = _train(configfile.resolve(function, sets), workdir / f"seed{seed}", one, typed, f"seed {seed}")
        if code:
            return code
        summaries.append(summary)
    _over_seeds(summaries, list(seeds), workdir)
    return 0


def _train(
    experiment: Experiment,
    workdir: epath.Path,
    arguments: argparse.Namespace,
    typed: str,
    title: str = "",
    *,
    caches_only: bool = False,
) -> tuple[int, dict[str, Any]]:
    import jax

    from jkd import console, devices
    from jkd.loop import Failed, Listener, Stopped
    from jkd.loop import train as train_experiment
    from jkd.workdir import claim

    lead = jax.process_index() == 0
    claim(workdir, experiment)  # first of all: a folder that holds another config keeps its record
    if lead:
        _record(workdir, arguments)
    watch = console.Watch()
    try:
        result = train_experiment(experiment, workdir, listener=watch if lead else Listener(), caches_only=caches_only)
    except Stopped as stopped:
        watch.close()
        if lead:
            print(f"jkd: {stopped}, saved in {workdir}; to go on: {typed}", file=sys.stderr)
        return STOPPED, {}
    except Exception as error:
        if not devices.out_of_memory(error):
            raise
        raise Failed(_out_of_memory(error, watch)) from error
    finally:
        watch.close()
    if lead and result.summary:
        console.table(result.summary, title=title)
    return 0, result.summary


def cache(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd cache``."""
    _require(_PACKAGES | {"array_record": "array-record"})
    from jkd import devices, programcache
    from jkd.cache import Cache
    from jkd.config import Run

    devices.start(arguments.device)
    programcache.start()
    experiment = configfile.resolve(configfile.load(arguments.config), arguments.sets)
    devices.check(arguments.device)
    from jkd import workdir as workdirs

    if not any(isinstance(node, Run) and isinstance(node.teacher, Cache) for node in experiment.nodes.values()):
        raise InputError(
            f"{arguments.config}: no run of it has a cache for its teacher (Run.teacher = cache.Cache(path=…, codec=…))"
        )
    workdir = workdirs.at(arguments.workdir or _default(arguments.config, experiment, None))
    return _train(experiment, workdir, arguments, typed, caches_only=True)[0]


def _out_of_memory(error: Exception, watch: Watch) -> str:
    """One line: what was wanted, what is large, what to try."""
    from jkd import describe, devices

    wanted = devices.asked_for(error)
    line = f"out of device memory{f' in {watch.name}' if watch.name else ''}{f' ({wanted} more were wanted)' if wanted else ''}"
    if watch.ctx is None:
        return f"{line}; try a smaller batch_size"
    run = watch.ctx.run
    rows = sorted(describe.memory(watch.ctx), key=lambda row: -row.per_device)
    state = ", ".join(f"{row.name} {_size(row.per_device)}" for row in rows[:3])
    tries = [f"batch_size below {run.batch_size}", f"microbatches above {run.microbatches}"]
    tries += [] if run.remat else ["remat"]
    tries += [] if watch.ctx.mesh.shape["fsdp"] > 1 else ["mesh=MeshShape(fsdp=…)"]
    tries += [] if run.teacher_dtype != "float32" or run.teacher is None else ["teacher_dtype='bfloat16'"]
    return (
        f"{line}; largest parts of the state on each device: {state}; largest buffers of a step: {_largest(watch.ctx)}; "
        f"try {', '.join(tries)}"
    )


def _largest(ctx: Context) -> str:
    """The largest arrays that a step holds beside what it is called with; compiled again, which takes no memory there."""
    from jkd import hlo
    from jkd.state import step_shapes
    from jkd.step import make_step

    try:
        step: Any = make_step(ctx)
        found = hlo.buffers(step.lower(*step_shapes(ctx)).compile().as_text() or "")
    except Exception:  # the compiler itself may have been what wanted the memory
        return "not known"
    made = hlo.distinct(buffer for buffer in found if buffer.op != "parameter")
    return ", ".join(f"{one.array} {_size(one.bytes)} of {one.of or one.op}" for one in made[:3])


def _size(bytes: float) -> str:
    return f"{bytes / 2**20:,.1f} MiB"


def _seeds(arguments: argparse.Namespace, function: Any) -> range | None:
    if arguments.seeds is None:
        return None
    if arguments.seeds < 1:
        raise InputError(f"--seeds {arguments.seeds}: give at least 1")
    if "seed" not in configfile.parameters(function):
        raise InputError(f"--seeds {arguments.seeds}: config() of {arguments.config} has no parameter 'seed'")
    if any(text.partition("=")[0].strip() == "seed" for text in arguments.sets):
        raise InputError(f"--seeds {arguments.seeds} gives the seeds; leave out --set seed=…")
    return range(arguments.seeds)


def _default(config: str, experiment: Experiment, seeds: range | None) -> str:
    from jkd import fingerprint

    return f"runs/{Path(config).stem}-{fingerprint.digest(experiment)}{'' if seeds is None else '-seeds'}"


def _record(workdir: epath.Path, arguments: argparse.Namespace) -> None:
    """Keeps the config file and what was set, so that ``jkd eval`` needs the folder alone."""
    from jkd.workdir import write_json

    file = configfile.find(arguments.config)
    (workdir / "config.py").write_text(file.read_text(encoding="utf-8"))
    folder = str(file.parent.resolve())  # whose files it may import
    write_json(workdir / "command.json", {"config": arguments.config, "folder": folder, "set": arguments.sets})


def _over_seeds(summaries: list[dict[str, Any]], seeds: list[int], workdir: epath.Path) -> None:
    import jax

    from jkd import console

    if jax.process_index():
        return
    found = console.statistics(summaries)
    (workdir / "summary.json").write_text(json.dumps({"seeds": seeds, "runs": found}, indent=1) + "\n")
    pairs = {run: {name: (one["mean"], one["std"]) for name, one in metrics.items()} for run, metrics in found.items()}
    console.table(pairs, title=f"mean ± standard deviation over {len(seeds)} seeds")


def evaluate(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd eval``."""
    _require(_PACKAGES)
    import jax

    from jkd import devices, programcache

    devices.start(arguments.device)
    programcache.start()
    from jkd import console, replay
    from jkd.workdir import at

    workdir = at(arguments.config)
    if workdir.is_dir():
        if arguments.sets:
            raise InputError(f"--set changes a config; {arguments.config} is a folder with a config of its own")
        experiment = replay.experiment_of(workdir)
    else:
        experiment = configfile.resolve(configfile.load(arguments.config), arguments.sets)
        workdir = at(_default(arguments.config, experiment, None))
        if not workdir.is_dir():
            raise InputError(f"{workdir} is not there: nothing was trained with this config; jkd train makes it")
    devices.check(arguments.device)
    lead = jax.process_index() == 0
    report = console.Watch().message if lead else lambda line: None
    summary = replay.evaluate(experiment, workdir, report)
    if lead:
        console.table(summary)
    return 0


def report(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd report``."""
    _require({name: _PACKAGES[name] for name in ("etils", "rich")})
    from jkd import report as reports

    groups = reports.compare(reports.read(arguments.folders))
    if arguments.json:
        print(reports.as_json(groups))
    else:
        reports.table(groups)
    if arguments.png:
        _write(arguments.png, reports.png(groups), "--png")
    if arguments.html or not arguments.json:
        _write(arguments.html or f"{arguments.folders[0]}/report.html", reports.page(groups).encode(), "--html")
    return 0


def _write(file: str, content: bytes, option: str) -> None:
    from etils import epath

    try:
        epath.Path(file).write_bytes(content)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror or error}); {option} FILE says where else") from None
    print(f"wrote {file}", file=sys.stderr)


def export(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd export``."""
    _require(_PACKAGES)
    from jkd import console, devices, replay

    devices.start(None)
    from jkd.export import export as write
    from jkd.workdir import at

    workdir, tell = at(arguments.folder), console.Watch().message
    stand = replay.stand(replay.experiment_of(workdir), workdir, arguments.run, tell)
    write(stand, arguments.directory, ema=arguments.ema or None, dtype=arguments.dtype, said=tell)
    return 0


def debug(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd debug``."""
    _require(_PACKAGES)
    from jkd import console, devices, replay

    devices.start(None)
    from jkd.debug import find
    from jkd.workdir import at

    workdir = at(arguments.folder)
    for line in find(replay.experiment_of(workdir), workdir, arguments.run, console.Watch().message):
        print(line)
    return 0


def data(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd data``."""
    _require(_PACKAGES)
    from jkd import devices

    devices.start(arguments.device)
    from jkd.examples import show

    if arguments.rows < 1:
        raise InputError(f"--rows {arguments.rows}: give at least 1")
    experiment = configfile.resolve(configfile.load(arguments.config), arguments.sets)
    text, sheet = show(experiment, arguments.rows)
    print(text)
    if sheet is not None:
        _write(arguments.png or f"{Path(arguments.config).stem}-data.png", sheet, "--png")
    return 0


def describe(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd describe``."""
    _require(_PACKAGES)
    # It looks at the devices and uses none of their memory: a training may be running there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jkd import devices
    from jkd.describe import describe as text

    devices.start(arguments.device, {})
    print(text(configfile.resolve(configfile.load(arguments.config), arguments.sets)))
    return 0


def plan(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd plan``."""
    _require(_PACKAGES)
    from jkd import topology

    devices = topology.of(arguments.topology)  # first of all: jax begins with these
    from jkd import plan as plans
    from jkd import plantext

    name, run = plans.pick(configfile.resolve(configfile.load(arguments.config), arguments.sets), arguments.run)
    made = plans.plan(run, devices)
    print(plantext.text(name, made, price=arguments.price), end="")
    if arguments.json:
        _write(arguments.json, (json.dumps(made.as_json(), indent=1) + "\n").encode(), "--json")
    return 0


def bench(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd bench``."""
    _require(_PACKAGES)
    from jkd import devices, programcache
    from jkd.bench import command

    devices.start(arguments.device)
    programcache.start()
    devices.check(arguments.device)
    command.run(arguments)
    return 0


def recipes(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd recipes``."""
    from jkd import catalogue

    print(catalogue.as_json() if arguments.json else catalogue.as_text())
    return 0


def configs(arguments: argparse.Namespace, typed: str) -> int:
    """``jkd configs``."""
    if arguments.name is not None:
        sys.stdout.write(configfile.find(arguments.name).read_text(encoding="utf-8"))
        return 0
    packaged = configfile.names()
    width = max(map(len, packaged), default=0)
    for name, path in packaged.items():
        print(f"{name:<{width}}  {configfile.summary(path)}")
    return 0


def _require(packages: dict[str, str]) -> None:
    """Raises MissingExtra: a package of ``jkd[train]`` is not installed."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"training needs {', '.join(missing)}: pip install 'jkd[train]'")
