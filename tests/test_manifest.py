"""Whatever is damaged on disk is found, named, and not used."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from stored import Kept, assert_same, damage, flip, saved, shapes, state

from jkd import manifest
from jkd.checkpoint import Checkpoints
from jkd.errors import InputError


@pytest.fixture
def checkpoints(tmp_path):
    with Kept(tmp_path / "checkpoints", keep=3) as kept:
        yield kept


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "deleted"])
def test_damage_is_named_and_the_checkpoint_before_is_used(checkpoints, how):
    saved(checkpoints, 1, 2)
    data = max(
        (path for path in Path(checkpoints.directory, "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    size = data.stat().st_size
    damage(data, how)
    found, meta, step = checkpoints.restore(shapes(state()))
    assert (step, meta) == (1, {"position": 1})
    assert_same(found, state(seed=1))
    said = {
        "flipped": "does not match its checksum",
        "truncated": f"has {size - 1} bytes, its manifest says {size}",
        "longer": f"has {size + 1} bytes, its manifest says {size}",
        "deleted": "is missing",
    }[how]
    name = data.relative_to(Path(checkpoints.directory, "2"))
    assert checkpoints.lines == [f"checkpoint 2: {name} {said}; using checkpoint 1"]
    assert checkpoints.steps() == [1]
    with pytest.raises(InputError, match=re.escape(f"checkpoint 2: {name} {said}")):
        Checkpoints(checkpoints.directory).restore(shapes(state()), 2)

    checkpoints.save(2, state(seed=22), {"position": 2})  # trained again, from checkpoint 1
    found, _, step = checkpoints.restore(shapes(state()))
    assert step == 2
    assert_same(found, state(seed=22))
    assert len(list(Path(checkpoints.directory).iterdir())) == 2


def test_a_flipped_bit_in_any_file_is_found(checkpoints):
    saved(checkpoints, 7)
    place = Path(checkpoints.directory, "7")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    assert {"leaves.json", "meta-0.json", "manifest-0-of-1.json", "manifest.ocdbt", "_METADATA"} <= {
        path.name for path in files
    }
    rng = random.Random(0)
    for path in files:
        for _ in range(5):
            before = flip(path, rng)
            assert path.name in manifest.problem(checkpoints.directory / "7"), path
            path.write_bytes(before)
    assert manifest.problem(checkpoints.directory / "7") == ""


def test_where_none_is_whole_that_is_an_error(checkpoints):
    assert checkpoints.restore(shapes(state())) is None
    saved(checkpoints, 1, 2)
    for step in (1, 2):
        damage(Path(checkpoints.directory, str(step), "arrays", "_METADATA"), "flipped")
    with pytest.raises(
        InputError, match="checkpoint 1: arrays/_METADATA does not match its checksum; no checkpoint in .* is whole"
    ):
        checkpoints.restore(shapes(state()))
    assert checkpoints.lines == ["checkpoint 2: arrays/_METADATA does not match its checksum; using checkpoint 1"]
    with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*; there are \[1, 2\]"):
        Checkpoints(checkpoints.directory).restore(shapes(state()), 5)


def test_an_unfinished_save_is_skipped_and_removed_by_the_next(checkpoints):
    saved(checkpoints, 1, 2)
    Path(checkpoints.directory, "2", "manifest-0-of-1.json").unlink()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(shapes(state()))[2] == 1
    assert checkpoints.lines == ["checkpoint 2 has no manifest: its save was not finished; using checkpoint 1"]
    saved(checkpoints, 3)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "3"]
    for step in ("1", "3"):
        Path(checkpoints.directory, step, "manifest-0-of-1.json").unlink()
    assert checkpoints.restore(shapes(state())) is None
