"""Images in folders: classes, what is held out, and files that are broken."""

import io
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from jkd import data
from jkd.data.folders import _held_out
from jkd.errors import InputError


def put(root, **files):
    """``put(root, **{"cat/1.png": 3})`` writes a gray image of this brightness."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), value, np.uint8)).save(path)
    return root


@pytest.fixture
def photos(tmp_path):
    return put(
        tmp_path / "photos",
        **{f"{name}/{part}{n}.png": n for name in ("dog", "cat") for part in ("", "more/") for n in range(5)},
    )


def test_a_class_for_each_folder_and_the_same_files_always_held_out(photos):
    (photos / "cat" / "notes.txt").write_text("no image")
    (photos / ".hidden").mkdir()
    made = data.image_folder(photos, eval=0.2, channels=1)
    assert (made.classes, made.train.names, made.name) == (2, ("cat", "dog"), "photos")
    assert (made.train_size, made.eval_size) == (16, 4)
    batch = next(made.eval_batches(4))
    assert batch["image"].shape == (4, 6, 5, 1)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    paths = [set(map(str, source._files[0])) for source in (made.train, made.eval)]
    assert not paths[0] & paths[1]
    again = data.image_folder(photos, eval=0.2, channels=1, seed=7)
    assert set(map(str, again.eval._files[0])) == paths[1]
    before = repr(made.train)
    assert repr(again.train) == before != repr(made.eval)
    assert "20 files" in before
    put(photos, **{"cat/new.png": 9})
    assert repr(again.train) == before.replace("20 files", "21 files").replace(sha(before), sha(repr(again.train))) != before
    assert next(data.image_folder(photos, eval=None).batches(4, seed=0))["image"].shape == (4, 6, 5, 3)


def sha(said):
    return re.search("sha256=([0-9a-f]{16})", said)[1]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_file_that_is_added_moves_at_most_one_other(share):
    held = set()
    for count in range(1, 80):
        names = [f"cat/{number * 37 % 101}.png" for number in range(count)]
        now = {name for name, out in zip(names, _held_out(names, share), strict=True) if out}
        assert abs(len(now) - share * count) <= 0.5
        assert len((now ^ held) - {names[-1]}) <= 1
        held = now
    assert _held_out(names[::-1], share)[::-1] == _held_out(names, share)  # nor does the order matter


def test_other_classes_do_not_move_what_is_held_out(photos):
    before = [path for path in data.image_folder(photos, eval=0.25).eval._files[0] if "dog" in path.parts]
    put(photos, **{f"cat/new{number}.png": number for number in range(7)}, **{"ant/1.png": 1})
    assert [path for path in data.image_folder(photos, eval=0.25).eval._files[0] if "dog" in path.parts] == before
    assert len(before) == 3


def test_another_folder_to_evaluate_on_keeps_the_classes(photos, tmp_path):
    held_out = put(tmp_path / "valid", **{"dog/1.png": 1})
    made = data.image_folder(photos, eval=held_out)
    assert next(made.eval_batches(1))["label"].tolist() == [1]
    put(tmp_path / "valid", **{"bird/1.png": 1})
    with pytest.raises(InputError, match="class 'bird' is not one of .*photos"):
        len(data.image_folder(photos, eval=held_out).eval)


def test_broken_files_are_named_counted_and_left_out(photos):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(content, "JPEG")
    (photos / "cat" / "cut.jpg").write_bytes(content.getvalue()[:-700])
    (photos / "cat" / "whole.jpg").write_bytes(content.getvalue())
    (photos / "dog" / "text.png").write_text("no image")
    made = data.image_folder(photos, eval=None)
    with pytest.warns(
        UserWarning, match=r"2 of 23 files are broken and left out: cat/cut.jpg \(.*truncated.*\); dog/text.png \("
    ):
        assert made.train_size == 21
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert len(made.train) == 21
    # unchecked, the file is named when its turn comes
    unchecked = data.image_folder(photos, eval=None, check=False)
    with pytest.raises(InputError, match=r"cat/cut.jpg: an image of \d+ bytes cannot be decoded"):
        unchecked.train.records(range(23))


def test_folders_that_are_none(tmp_path, photos):
    for make, message in (
        (lambda: data.image_folder(photos, eval=1.5), "eval=1.5.*give a share from 0 to 1"),
        (lambda: len(data.image_folder(tmp_path / "nowhere").train), "nowhere is no folder"),
        (lambda: len(data.image_folder(photos / "cat" / "more").train), "holds no folders"),
        (lambda: ((photos / "empty").mkdir(), len(data.image_folder(photos).train)), "empty: no images"),
    ):
        with pytest.raises(InputError, match=message):
            make()
