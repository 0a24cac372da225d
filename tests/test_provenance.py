"""The revision is the one of jkd's own checkout, never that of a repository it happens to lie in."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jkd
from jkd import provenance

PACKAGE = Path(jkd.__file__).parent


@pytest.fixture
def repository(tmp_path):
    """A repository with a copy of jkd in it that git does not know of."""
    (tmp_path / "jkd").mkdir()
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(PACKAGE / name, tmp_path / "jkd" / name)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "own.txt").write_text("theirs")
    git(tmp_path, "add", "own.txt")
    git(tmp_path, "commit", "--quiet", "--message", "theirs")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(("git", *who, *arguments), cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def revision(folder: Path, **environment: str) -> str:
    command = [sys.executable, "-c", "from jkd.provenance import code_revision; print(code_revision())"]
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_code_revision(repository):
    version = f"jkd {jkd.__version__}"
    assert revision(repository) == version
    git(repository, "add", "jkd")
    git(repository, "commit", "--quiet", "--message", "ours")
    commit = git(repository, "rev-parse", "HEAD")
    assert revision(repository) == commit
    (repository / "new.txt").write_text("not tracked")
    assert revision(repository) == commit
    (repository / "own.txt").write_text("changed")
    assert revision(repository) == f"{commit}-dirty"
    assert revision(repository, PATH="") == version  # no git


def test_code_revision_here():
    assert re.fullmatch(rf"[0-9a-f]{{40}}(-dirty)?|jkd {re.escape(jkd.__version__)}", provenance.code_revision())


def test_package_versions():
    versions = provenance.package_versions()
    assert versions["jax"] == importlib.metadata.version("jax")
    assert {"python", "jkd", "jaxlib", "numpy", "optax", "orbax-checkpoint"} <= set(versions)
