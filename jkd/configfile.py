"""Config files: from a path or a name to ``config()``, and from ``config()`` and ``--set`` to an `Experiment`.

A config file is Python and defines ``config(*, seed=0, …) -> Run | Experiment``. What it does wrong becomes one line that names
the file and the line.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jkd import override
from jkd.codehash import MODULE
from jkd.errors import InputError, MissingExtra, nearest

if TYPE_CHECKING:
    from jkd.config import Experiment


def folder() -> Path:
    """Where the packaged configs lie: inside the wheel, or in the clone that jkd is imported from."""
    here = Path(__file__).parent
    packaged = here / "_configs"
    return packaged if packaged.is_dir() else here.parent / "configs"


def names() -> dict[str, Path]:
    """The packaged configs by name."""
    return {path.stem: path for path in sorted(folder().glob("*.py")) if not path.stem.startswith("_")}


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """The config file that is meant: a path that exists, else the name of a packaged config.

    Raises:
        InputError: there is none; the message holds the nearest.
    """
    given = os.fspath(path_or_name)
    path = Path(given)
    if path.is_file():
        return path
    packaged = names()
    if given in packaged:
        return packaged[given]
    if path.is_dir():
        raise InputError(f"config {given}: is a folder; give one of its files{nearest(path.name, _beside(path / 'x'))}")
    if path.suffix == ".py" or len(path.parts) > 1:
        close = nearest(path.name, _beside(path))
        hint = f" (jkd has a config of that name: {path.stem})" if path.stem in packaged else ""
        raise InputError(f"config {given}: no such file{close}{hint}")
    raise InputError(f"config {given!r}: no such file, and jkd has no config of that name{nearest(given, packaged)}")


def _beside(path: Path) -> list[str]:
    return [each.name for each in path.parent.glob("*.py")]


def summary(path: Path) -> str:
    """The first line of a config's docstring, without running it."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except SyntaxError as error:
        return f"(does not parse: line {error.lineno})"
    return text.partition("\n")[0]


def load(path_or_name: str | os.PathLike[str], *, beside: str | None = None) -> Callable[..., Any]:
    """The ``config`` function of a config file.

    Args:
        path_or_name: a ``.py`` file, or the name of a packaged config (``digits``).
        beside: the folder whose files it may import; its own by default.

    Raises:
        InputError: no such file, a file that raises, or one without ``config()``.
        MissingExtra: it imports a package that ``jkd[train]`` would bring.
    """
    path = find(path_or_name)
    module = types.ModuleType(f"{MODULE}{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    if importlib.util.find_spec("cloudpickle") is not None:  # grain brings it
        import cloudpickle

        # the worker processes of `jkd.data.Data.workers` cannot import a config file
        cloudpickle.register_pickle_by_value(module)
    beside = beside or str(path.parent.resolve())
    if beside not in sys.path and Path(beside) != folder().resolve():
        sys.path.append(beside)  # a config may import what lies beside it; last, so that it hides nothing
    try:
        # no cached bytecode: its time stamps are too coarse for a file that was just edited
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise _explained(error, str(path)) from error
    function = module.__dict__.get("config")
    if not inspect.isfunction(function):
        found = [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
        close = nearest("config", found) if found else ""
        raise InputError(f"{path}: defines no function config(){close}; write: def config(*, seed=0): return Run(…)")
    return function


def resolve(function: Callable[..., Any], sets: Sequence[str] = ()) -> Experiment:
    """Calls a config function and applies ``--set`` arguments; a bare `Run` becomes the experiment's node ``student``.

    Args:
        function: what `load` gives, or any function of keyword arguments that returns a Run or an Experiment.
        sets: ``name=value`` for a parameter of the function, ``node.field=value`` for a field of one run (``node.a.b=value`` for
            a field of its field), ``*.field=value`` for that of every run. Values are Python literals, or bare words for
            strings; they are applied from left to right, parameters first.

    Raises:
        InputError: no such parameter, node or field (the nearest is named), a value of the wrong type, a function that raises
            or returns something else.
    """
    from jkd.config import Experiment, Run

    given = [override.Set.parse(text) for text in sets]
    arguments = override.arguments(function, [each for each in given if not each.path])
    where = function.__code__.co_filename if inspect.isfunction(function) else ""
    try:
        made = function(**arguments)
    except (Exception, SystemExit) as error:  # a config that ends the process must not look like a finished run
        raise _explained(error, where) from error
    if isinstance(made, Run):
        made = Experiment(student=made)
    if not isinstance(made, Experiment):
        raise InputError(f"{_name(function)} returned {type(made).__name__}; return a jkd.Run or a jkd.Experiment")
    for each in given:
        if each.path:
            made = override.field(made, each)
    return made


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that ``--set name=value`` may set."""
    return tuple(inspect.signature(function).parameters)


def _name(function: Callable[..., Any]) -> str:
    return f"{inspect.getsourcefile(function) or 'config'}: {getattr(function, '__name__', 'config')}()"


def _explained(error: BaseException, file: str) -> InputError:
    """What a config raised, as one line that says where in the config it was."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return InputError(f"{file}, line {error.lineno}: {error.msg}")
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"{file}, line {line}" if line is not None else file or "config()"
    if isinstance(error, MissingExtra):
        return MissingExtra(f"{where}: {error}")
    if isinstance(error, InputError):
        return InputError(f"{where}: {error}")
    text = (str(error).strip().splitlines() or [""])[0]
    return InputError(f"{where}: {type(error).__name__}{': ' if text else ''}{text}{_meant(error)}")


def _meant(error: BaseException) -> str:
    """The nearest name after a misspelt field of one of jkd's dataclasses or a misspelt attribute of its modules."""
    if isinstance(error, AttributeError) and error.name and inspect.ismodule(error.obj):
        return nearest(error.name, [name for name in dir(error.obj) if not name.startswith("_")])
    unknown = re.match(r"(?:\w+\.)*?(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown:
        for called in _called(error, unknown[1]):
            return nearest(unknown[2], inspect.signature(called).parameters)
    return ""


def _called(error: BaseException, name: str) -> list[Any]:
    """What the frame that raised calls by this name: in its variables, or in a module among them."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return []
    names = {**trace.tb_frame.f_globals, **trace.tb_frame.f_locals}
    modules = [value for value in names.values() if inspect.ismodule(value)]
    modules += [value for module in modules for value in vars(module).values() if inspect.ismodule(value) and _ours(value)]
    found = [names.get(name), *(getattr(module, name, None) for module in modules if _ours(module))]
    return [value for value in found if callable(value)]


def _ours(module: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] == "jkd"


def shrink(experiment: Experiment, *, steps: int = 2, batch_size: int = 8, examples: int = 32) -> Experiment:
    """The same experiment, small enough to run in a test: networks, recipes, optimizers, dtypes and augmentations stay.

    What changes in every run: at most ``steps`` updates; ``batch_size`` rows for each microbatch, of which at most 2 stay; noise
    of the data's own shapes in its place (so that the data need not be there); all devices on the mesh's ``data`` axis; counts
    of steps (``log_every``, …) no larger than ``steps``; no ``require_teacher_accuracy``, which noise would not meet. Functions
    between runs stay.

    Args:
        steps: most updates of a run.
        batch_size: rows of a microbatch; give a multiple of the number of devices.
        examples: training examples; a quarter as many, at least 8, for evaluation.
    """
    from jkd.config import Experiment, Run
    from jkd.data import fake
    from jkd.sharding import MeshShape

    noise: dict[int, Any] = {}

    def small(run: Run) -> Run:
        if run.data is not None and id(run.data) not in noise:
            noise[id(run.data)] = fake(run.data, train_size=examples, eval_size=max(8, examples // 4))
        updates, microbatches = min(run.steps, steps), min(run.microbatches, 2)
        whole: dict[str, Any] = {
            name: min(value, updates)
            for name in ("evaluate_every", "checkpoint_every", "log_every", "sample_every")
            if isinstance(value := getattr(run, name), int)  # a fraction follows the steps by itself
        }
        return dataclasses.replace(
            run,
            steps=updates,
            batch_size=batch_size * microbatches,
            microbatches=microbatches,
            data=None if run.data is None else noise[id(run.data)],
            mesh=MeshShape(),
            require_teacher_accuracy=None,
            **whole,
        )

    return Experiment(**{name: small(node) if isinstance(node, Run) else node for name, node in experiment.nodes.items()})
