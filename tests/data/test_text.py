"""Rows of text hold every token once, know their documents, and are the same after any restart; layouts, prompts and mistakes."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_tokenizer import trained

from jkd import data
from jkd import tokens as token
from jkd.data import corpus
from jkd.data.rows import Text, View
from jkd.data.texts import Listed, TfdsText, standard_library
from jkd.data.tokenizer import Bytes
from jkd.errors import InputError

TEXTS = ["first document", "", "zwei: größer", "a third one that is longer than any single row", "end"]


def rows(made):
    return made.train.records(range(made.train_size))


@pytest.mark.parametrize("layout", ["stream", "fit", "pad"])
def test_rows_hold_the_documents(layout):
    made = data.documents(TEXTS, length=16, layout=layout)
    found = []
    for record in rows(made):
        own = record["segment"]
        np.testing.assert_array_equal(record["mask"] > 0, own > 0)
        for number in range(1, own.max() + 1):
            found.append((record["tokens"][own == number]).tolist())
    numbers = [Bytes().encode(text, special=True).tolist() for text in TEXTS]
    if layout == "stream":
        # the last token of a row is the first of the next, so what a row adds is the rest of it
        whole = [token for text in numbers for token in text]
        flat = [record["tokens"][record["mask"] > 0].tolist() for record in rows(made)]
        assert flat[0] + [token for row in flat[1:] for token in row[1:]] == whole
        assert all(len(row) == 16 for row in flat[:-1])
    else:
        assert sorted(found) == sorted(text[:16] for text in numbers)
        assert (layout == "pad") == (made.train_size == len(TEXTS))


def test_every_token_but_the_first_of_a_document_is_predicted_once():
    made = data.documents(TEXTS, length=16)
    batch = {name: np.stack([record[name] for record in rows(made)]) for name in rows(made)[0]}
    batch["weight"] = np.ones(made.train_size, np.float32)
    labels, weight = token.next_tokens(batch)
    predicted = np.sort(np.asarray(labels)[np.asarray(weight) > 0])
    wanted = np.sort(np.concatenate([Bytes().encode(text, special=True)[1:] for text in TEXTS]))
    np.testing.assert_array_equal(predicted, wanted)


def test_best_fit_wastes_little_and_never_overfills():
    sizes = np.random.default_rng(0).integers(1, 65, 2000)
    packed = corpus.fit(sizes, 64)
    filled = np.array([sizes[items].sum() for items in packed])
    assert filled.max() <= 64
    np.testing.assert_array_equal(np.sort(np.concatenate(packed)), np.arange(2000))
    # best fit decreasing needs at most 11/9 of the fewest rows possible and one more (Johnson 1974)
    assert len(packed) <= np.ceil(sizes.sum() / 64) * 11 / 9 + 1
    assert corpus.fit(np.array([5, 0, 3]), 8)[0].tolist() == [0, 2]


def test_of_conversations_the_responses_are_counted():
    made = data.documents([("2+2=", "4"), ("a", "b", "c", "d")], length=12, layout="pad")
    one, two = rows(made)
    assert one["loss_mask"].tolist() == [0] * 4 + [1, 1] + [0] * 6  # the response, and the end
    assert two["loss_mask"].tolist() == [0, 1, 0, 1, 1] + [0] * 7
    assert made.spec(4)["loss_mask"].shape == (4, 12)
    assert "loss_mask" not in data.documents(TEXTS, length=12).spec(4)


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_position_is_a_number(hosts):
    made = data.documents(TEXTS * 5, length=8)

    def read(start, count, host):
        batches = made.batches(4, seed=1, start=start, process=(host, hosts))
        found = [next(batches) for _ in range(count)]
        batches.close()
        return found

    def whole(start, count):
        cut = [read(start, count, host) for host in range(hosts)]
        return [np.concatenate([part[place]["tokens"] for part in cut]) for place in range(count)]

    straight = read(0, 9, 0) if hosts == 1 else None
    for place, batch in enumerate(whole(6, 3)):
        one = next(iter(data.documents(TEXTS * 5, length=8).batches(4, seed=1, start=6 + place)))
        np.testing.assert_array_equal(batch, one["tokens"])
        if straight is not None:
            np.testing.assert_array_equal(batch, straight[6 + place]["tokens"])


def test_bytes_of_the_evaluation_are_those_of_the_text():
    made = data.documents(TEXTS, eval=TEXTS, length=16, layout="fit")
    batch = next(made.eval_batches(8))
    # only the one document that is longer than a row is cut
    numbers = [len(text.encode()) for text in TEXTS]
    longest = max(numbers)
    assert batch["bytes"].sum() == pytest.approx(sum(numbers) - longest + longest * 16 / (longest + 1), rel=1e-6)
    assert data.documents(TEXTS, eval=TEXTS, length=4, eval_rows=3).eval_size == 3


def test_kept_on_disk_is_the_same(tmp_path):
    held, kept = (data.documents(TEXTS, length=16, folder=folder) for folder in (None, tmp_path))
    for one, two in zip(rows(held), rows(kept), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.keys() == {"tokens.bin", "counted.bin", "lengths.bin", "bytes.bin", "corpus.json"}
    rows(data.documents(TEXTS, length=8, folder=tmp_path))  # another length is other rows of the same numbers
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    rows(data.documents(TEXTS[:1], length=8, folder=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_kept_of_another_text_is_not_read(tmp_path):
    """Files of the same names and sizes, written anew; the same numbers between other tokens."""
    said = tmp_path / "a.txt"
    said.write_text("one", encoding="utf-8")

    def first(tokenizer=None):
        made = data.text_files(str(said), length=8, tokenizer=tokenizer, folder=tmp_path / "kept")
        return rows(made)[0]["tokens"].tolist()

    assert first()[:3] == list(b"one")
    said.write_text("two", encoding="utf-8")
    os.utime(said, ns=(1, 1))
    assert first()[:3] == list(b"two")
    lines = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        lines.write_text(json.dumps({"text": text}), encoding="utf-8")
        os.utime(lines, ns=(1, ord(text[0])))
        made = data.jsonl(str(lines), length=8, folder=tmp_path / "kept")
        assert rows(made)[0]["tokens"][:3].tolist() == list(text.encode())
    plain, ended = (trained(tmp_path / name, config=config) for name, config in (("p", {}), ("e", {"eos_token": "</s>"})))
    assert plain.fingerprint == ended.fingerprint
    assert first(ended) != first(plain)


def test_of_those_who_share_a_folder_one_reads_the_text(tmp_path, monkeypatch):
    """Eight at once; then beside a maker that was killed, whose sign of life does not change."""
    monkeypatch.setattr(corpus, "_LOOK_S", 0.01)
    monkeypatch.setattr(corpus, "_STALE_S", 0.2)
    asked = []

    class Slow(Listed):
        def __getitem__(self, index):
            asked.append(index)
            time.sleep(0.01)
            return super().__getitem__(index)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: corpus.read(Slow(TEXTS), Bytes(), tmp_path), range(8)))
    assert asked == list(range(len(TEXTS)))
    assert {one.tokens.tobytes() for one in found} == {corpus.read(Listed(TEXTS), Bytes(), None).tokens.tobytes()}
    assert all(one.counted is None for one in found)
    talks = Slow([("2+2=", "4")])
    (folder,) = tmp_path.iterdir()
    (kept,) = {path.name for path in _made(tmp_path, talks)} - {folder.name}
    shutil.rmtree(tmp_path / kept)
    (tmp_path / f".{kept}.making").touch()
    read = corpus.read(talks, Bytes(), tmp_path)
    assert read.counted.tolist() == [False] * 4 + [True] * 2
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, kept}


def _made(folder, texts):
    corpus.read(texts, Bytes(), folder)
    return folder.iterdir()


def test_files_are_found_in_order_and_know_their_contents(tmp_path):
    for name in ("b.txt", "a/c.txt", "a/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    made = data.text_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/b.*"], length=64, layout="pad")
    said = [made.tokenizer.decode(record["tokens"][record["mask"] > 0]) for record in rows(made)]
    assert said == ["text of a/c.txt", "text of b.txt"]
    before = repr(made.train)
    (tmp_path / "b.txt").write_text("text of b.txt, longer", encoding="utf-8")
    assert repr(data.text_files([f"{tmp_path}/**/*.txt"], length=64, layout="pad").train) != before
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="b.txt: no UTF-8"):
        rows(data.text_files(f"{tmp_path}/b.txt", length=64))


def test_the_standard_library_is_split_by_file():
    train, held_out = standard_library("train"), standard_library("eval")
    names = [{path.name for path in files._files[1]} for files in (train, held_out)]
    paths = [set(files._files[1]) for files in (train, held_out)]
    assert not paths[0] & paths[1]
    assert {"ast.py", "argparse.py", "decimal.py"} <= names[0] | names[1]
    assert not any({"site-packages", "test"} & set(path.parts) for path in paths[0] | paths[1])
    assert 0.02 < len(paths[1]) / len(paths[0]) < 0.1
    assert "dataclass" in "".join(train[number] for number in range(40)) or len(train) > 400


def test_documents_say_what_they_are():
    assert repr(Listed(["a", "b"])) != repr(Listed(["ab", ""]))
    assert repr(Listed([("a", "b")])) != repr(Listed(["a", "b"]))
    one = Text(View(Listed(["a"]), Bytes(), 8), "fit")
    assert repr(one) == repr(Text(View(Listed(["a"]), Bytes(), 8), "fit"))
    assert repr(one) != repr(Text(View(Listed(["a"]), Bytes(), 9), "fit"))
    assert repr(one) != repr(Text(View(Listed(["a"]), Bytes(), 8), "fit", teacher=View(Listed(["a"]), Bytes(), 8)))


@pytest.mark.parametrize("layout", ["fit", "pad"])
def test_a_teacher_of_another_vocabulary_has_the_same_documents(layout, tmp_path):
    words = trained(tmp_path)
    talks = [("the quick", " brown fox"), ("the lazy dog", "a"), ("the lazy dog" * 3, " barks")]
    made = data.documents(talks, length=24, layout=layout, teacher_tokenizer=words, teacher_length=9)
    found = set()
    for record in rows(made):
        theirs = {name.removeprefix("teacher_"): column for name, column in record.items() if name.startswith("teacher_")}
        assert {len(column) for column in theirs.values()} == {9}
        np.testing.assert_array_equal(theirs["mask"], theirs["segment"] > 0)
        for number in range(1, record["segment"].max() + 1):
            views = [(Bytes(), record, record["segment"] == number), (words, theirs, theirs["segment"] == number)]
            mine, other = (tokenizer.decode(row["tokens"][where]) for tokenizer, row, where in views)
            assert mine.startswith(other) or other.startswith(mine)  # what does not fit a row is cut, on each side for itself
            if mine == other:
                answers = {codec.decode(row["tokens"][where & (row["loss_mask"] > 0)]) for codec, row, where in views}
                assert len(answers) == 1
                found.add(mine)
    assert found >= {"the quick brown fox"}
    assert made.train.example().keys() == rows(made)[0].keys()


MISTAKES = {
    "length=1": lambda: data.documents(["a"], length=1),
    "eval_rows=0": lambda: data.documents(["a"], eval=["b"], length=4, eval_rows=0),
    "teacher_length=1": lambda: data.documents(["a"], length=4, teacher_length=1),
    "with a teacher_tokenizer give 'fit' or 'pad'": lambda: data.documents(["a"], length=4, teacher_tokenizer=Bytes()),
    "layout='rows'": lambda: rows(data.documents(["a"], length=4, layout="rows")),
    "no documents": lambda: rows(data.documents([], length=4)),
    "is empty": lambda: rows(data.documents(["", ""], length=4)),
    "document 1 is int": lambda: data.documents(["a", 3], length=4),
    "no such file": lambda: rows(data.text_files("/nowhere/*.txt", length=4)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(InputError, match=message):
        MISTAKES[message]()


def test_a_tfds_text_set(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    from test_published import write

    features = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
    said = [{"question": f"{n} and {n}?", "answer": f"{2 * n}"} for n in range(6)]
    write(tmp_path, "sums", "1.0.0", features, {"train": said, "test": said[:2]})
    made = data.tfds_text("sums", data_dir=tmp_path, feature=("question", "answer"), length=24, layout="pad")
    assert (made.train_size, made.eval_size) == (6, 2)
    row = rows(made)[3]
    assert made.tokenizer.decode(row["tokens"][row["mask"] > 0]) == "3 and 3?6"
    assert made.tokenizer.decode(row["tokens"][row["loss_mask"] > 0]) == "6"
    with pytest.raises(InputError, match="no feature 'text'"):
        rows(data.tfds_text("sums", data_dir=tmp_path, length=24))
    one, two = (TfdsText("sums", "train", str(place), ("answer",)) for place in (tmp_path, tmp_path / "other"))
    assert repr(one) != repr(two)
    assert "/sums/1.0.0 " in one.revision
