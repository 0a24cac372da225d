"""Which code made a result: the revision of jkd and the versions of what it ran on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jkd

_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)


@functools.cache
def code_revision() -> str:
    """The git commit of the checkout that jkd was imported from, ``-dirty`` where tracked files differ from it.

    Where jkd is not imported from its own checkout (it was installed), or git is not there to ask: ``"jkd <version>"``.
    """
    package = Path(jkd.__file__).resolve().parent
    try:
        # An installed package may lie in somebody's repository by chance (a virtual environment in it): it is not tracked there.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        return _git(package, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"jkd {jkd.__version__}"


def package_versions() -> dict[str, str]:
    """``{name: version}`` of Python, jkd and those of its dependencies that are installed."""
    versions = {"python": platform.python_version(), "jkd": jkd.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed has no version to record
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str:
    command = ("git", "-C", str(folder), *arguments)
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout.strip()
