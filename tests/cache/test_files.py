"""Writers and readers: what a kill costs, several hosts, and every way in which a cache may be damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from jkd import cache
from jkd.errors import InputError

VOCAB, TIME = 1000, 5
CODEC = cache.TopK(k=4, vocab=VOCAB)
FACTS = dict(inputs=("tokens",), teacher="a teacher", tokenizer="a tokenizer")
SMALL = cache.Dense(classes=3, dtype="float32")


def key(row):
    return cache.key(tokens=[row])


def answer(row, time=TIME):
    """An answer that tells whose it is."""
    ids = (row + 7 * np.arange(4) + 31 * np.arange(time)[:, None]) % VOCAB
    return {"ids": ids, "log_probs": np.log([[0.4, 0.3, 0.2, 0.05]] * time)}


def fill(folder, rows, **options):
    with cache.Writer(folder, CODEC, **FACTS | {"shard_bytes": 2000} | options) as writer:
        for row in rows:
            writer.add(key(row), answer(row))
    return writer


def check(reader, rows):
    found = reader.answers(reader.rows([key(row) for row in rows]))
    np.testing.assert_array_equal(found["ids"], [answer(row)["ids"] for row in rows])


def shards(folder):
    return sorted(path.name for path in Path(folder).glob("*.array_record"))


def test_answers_come_back_in_any_order(tmp_path):
    fill(tmp_path, range(100))
    assert len(shards(tmp_path)) > 3
    reader = cache.Reader(tmp_path)
    assert len(reader) == 100
    rng = np.random.default_rng(0)
    for _ in range(3):
        check(reader, rng.permutation(100)[:17])
    check(reader, [5, 5, 99])
    assert list(reader.rows([key(3), key(100), key(-1)]) >= 0) == [True, False, False]
    assert reader.facts.teacher == "a teacher"
    assert cache.verify(tmp_path) == 100


def test_small_answers_share_records_and_are_mapped(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9000, 3)).astype(np.float32)
    with cache.Writer(tmp_path, SMALL, inputs=("image",), teacher="t") as writer:
        for row, one in enumerate(logits):
            writer.add(key(row), {"logits": one})
    (listed,) = (json.loads(path.read_text()) for path in tmp_path.glob("shard-*.json"))
    assert (listed["examples"], listed["records"]) == (9000, 4)  # 28 bytes with its key, 65536 a record
    reader = cache.Reader(tmp_path)
    wanted = rng.permutation(9000)[:500]
    found = reader.answers(reader.rows([key(row) for row in wanted]))
    np.testing.assert_array_equal(found["logits"], logits[wanted])
    assert isinstance(reader._table, np.memmap)


def test_each_large_answer_can_be_read_by_itself(tmp_path):
    """In groups of one: to read a record nothing else is read."""
    big = cache.Dense(taps={"x": (20_000,)})
    with cache.Writer(tmp_path, big, inputs=("image",), teacher="t") as writer:
        for row in range(6):
            writer.add(key(row), {"taps/x": np.full(20_000, row)})
    (name,) = shards(tmp_path)
    options = array_record_module.ArrayRecordReader(str(tmp_path / name)).writer_options_string()
    assert "group_size:1," in options
    index = np.load(next(tmp_path.glob("*.index.npy")))
    # 40 kB are less than a record: two share one
    assert list(index["record"]) == [0, 0, 1, 1, 2, 2]
    reader = cache.Reader(tmp_path)
    found = reader.answers(reader.rows([key(4), key(1)]))["taps/x"]
    assert list(found[:, -1]) == [4, 1]
    assert reader._table is None


def test_adding_again_changes_nothing_and_adding_more_adds(tmp_path):
    fill(tmp_path, range(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(fill(tmp_path, range(10))) == 10
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(fill(tmp_path, range(5, 30))) == 30
    check(cache.Reader(tmp_path), range(30))


KILLED = """
import sys, itertools
sys.path.insert(0, {here!r})
import test_files as t
from jkd import cache
with cache.Writer({folder!r}, t.CODEC, **t.FACTS, shard_bytes=2000) as writer:
    for row in itertools.count():
        writer.add(t.key(row), t.answer(row))
        print(row, flush=True)
"""


def test_what_a_kill_leaves_counts(tmp_path):
    program = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    last = max(int(line) for line, _ in zip(process.stdout, range(100), strict=False))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(InputError, match="is not finished"):
        cache.Reader(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("shard-*.json")}
    writer = cache.Writer(tmp_path, CODEC, **FACTS, shard_bytes=2000)
    assert last - 40 < len(writer) <= last + 200  # all but the shard under way
    assert key(0) in writer
    assert key(10**6) not in writer
    for row in range(last + 200):
        writer.add(key(row), answer(row))
    writer.close()
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())
    reader = cache.Reader(tmp_path)
    check(reader, range(last + 200))
    cache.verify(tmp_path)


def test_an_error_of_the_producer_keeps_what_it_made(tmp_path):
    def produce():
        with cache.Writer(tmp_path, CODEC, **FACTS) as writer:
            writer.add(key(1), answer(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        produce()
    with pytest.raises(InputError, match="is not finished"):
        cache.Reader(tmp_path)
    assert key(1) in cache.Writer(tmp_path, CODEC, **FACTS)


def test_every_host_writes_its_own_shards(tmp_path):
    for host in range(3):
        fill(tmp_path, range(10 * host, 10 * host + 12), host=(host, 3))  # two rows of each are the next one's too
    with pytest.raises(InputError, match="is not finished"):
        cache.Reader(tmp_path)
    assert cache.seal(tmp_path)["examples"] == 36 - 4  # a later writer knows what the earlier ones finished
    assert {name[:11] for name in shards(tmp_path)} == {"shard-00000", "shard-00001", "shard-00002"}
    check(cache.Reader(tmp_path), range(32))


def test_two_hosts_may_write_the_same_example(tmp_path):
    writers = [cache.Writer(tmp_path, CODEC, **FACTS, host=(host, 2)) for host in range(2)]
    for writer in writers:
        writer.add(key(7), answer(7))
        writer.add(key(8 + (writer is writers[0])), answer(8 + (writer is writers[0])))
        writer.close()
    cache.seal(tmp_path)
    check(cache.Reader(tmp_path), [7, 8, 9])


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path, range(30))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher="another"), 'has teacher "a teacher", not "another"'),
        (dict(tokenizer=None), 'has tokenizer "a tokenizer", not null'),
        (dict(inputs=("image",)), r'has inputs \["tokens"\], not \["image"\]'),
    ],
)
def test_a_writer_of_another_kind_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        cache.Writer(folder, CODEC, **FACTS | changes)
    with pytest.raises(InputError, match='"k": 4, .*, not .*"k": 5'):
        cache.Writer(folder, cache.TopK(k=5, vocab=VOCAB), **FACTS)
    with pytest.raises(InputError, match="the key must be what jkd.cache.key gives"):
        cache.Writer(folder, CODEC, **FACTS).add(b"7", answer(7))
    with pytest.raises(InputError, match="give the names of the arrays"):
        cache.Writer(folder, CODEC, **FACTS | {"inputs": "tokens"})


@pytest.mark.parametrize("suffix", [".array_record", ".index.npy"])
def test_a_shard_that_is_missing_or_cut_is_named(folder, suffix):
    path = sorted(folder.glob(f"*{suffix}"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(InputError, match=f"{path.name} has {len(whole) - 7} bytes, its manifest says {len(whole)}"):
        cache.Reader(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} is missing"):
        cache.Reader(folder)
    with pytest.raises(InputError, match=f"{path.name} is missing"):
        cache.seal(folder)


def test_no_flipped_bit_gives_another_answer(folder):
    """A bit anywhere in a shard's files: found when it is opened, or when the record is read, or it changed nothing."""
    rng = np.random.default_rng(0)
    told, harmless = 0, 0
    for suffix in (".array_record", ".index.npy"):
        path = folder / f"shard-00000-00001{suffix}"
        whole = path.read_bytes()
        used = len(whole) if suffix == ".index.npy" else 3000  # what comes after is padding, mostly
        for _ in range(60):
            place = int(rng.integers(used))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :])
            try:
                check(cache.Reader(folder), range(30))
                harmless += 1
            except InputError as error:
                assert "shard-00000-00001" in str(error)  # noqa: PT017
                told += 1
            with pytest.raises(InputError, match=f"{path.name} does not match its checksum"):
                cache.verify(folder)
        path.write_bytes(whole)
    assert told > 75
    check(cache.Reader(folder), range(30))


def test_shards_that_changed_places_are_found(folder):
    """The sizes and checksums of the container are right then; the keys in the records are not."""
    first, second = (folder / f"shard-00000-0000{number}.array_record" for number in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(InputError, match=r"record 0 of shard-00000-0000\d.array_record holds another example"):
        check(cache.Reader(folder), range(30))


def test_answers_of_other_lengths_are_told_apart(tmp_path):
    with cache.Writer(tmp_path, CODEC, **FACTS) as writer:
        for row in range(4):
            writer.add(key(row), answer(row, time=3 + row % 2))
    reader = cache.Reader(tmp_path)
    reader.answers(reader.rows([key(0), key(2)]))
    with pytest.raises(InputError, match="differ in length"):
        reader.answers(reader.rows([key(0), key(1)]))


def test_what_is_no_cache_is_told(folder, tmp_path_factory):
    with pytest.raises(InputError, match="there is no cache in"):
        cache.Reader(tmp_path_factory.mktemp("empty"))
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"examples": 30', '"examples": 31'))
    with pytest.raises(InputError, match="manifest.json does not match its checksum"):
        cache.Reader(folder)
    manifest.write_text(text[:100])
    with pytest.raises(InputError, match="manifest.json is damaged"):
        cache.Reader(folder)
    facts = folder / "cache.json"
    text = facts.read_text()
    facts.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="has format 2; this version of jkd reads 1"):
        cache.Reader(folder)
    facts.write_text(text.replace("TopK", "TopQ"))
    with pytest.raises(InputError, match="cache.json is damaged"):
        cache.Reader(folder)


ALONE = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED or name.partition(".")[0] in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"only NumPy is installed here, not {{name}}", name=name)

ALLOWED = {{"jkd", "numpy"}}
sys.meta_path.insert(0, Only())
from jkd import cache
import numpy as np

codec = cache.TopK(k=3, vocab=50)
key = cache.key(tokens=[1, 2])
payload = codec.encode(codec.of(np.arange(100.0).reshape(2, 50) % 7))
others = {{name.partition(".")[0] for name in sys.modules}} - ALLOWED - set(sys.stdlib_module_names) - {{"__main__"}}
assert not {{name for name in others if not name.startswith(("_", "sitecustomize", "usercustomize"))}}, others
ALLOWED.add("array_record")
with cache.Writer({folder!r}, codec, inputs=("tokens",), teacher="a loop in another framework") as writer:
    writer.add(key, codec.of(np.arange(100.0).reshape(2, 50) % 7))
assert "jax" not in sys.modules
"""


def test_any_program_may_fill_a_cache(tmp_path):
    """Keys, codecs and the writer import NumPy alone; writing a file imports array_record, and nothing else at all."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", ALONE.format(folder=str(tmp_path))], check=True, capture_output=True, text=True)
    assert time.monotonic() - start < 60
    reader = cache.Reader(tmp_path)
    found = reader.answers(reader.rows([cache.key(tokens=np.array([1, 2], np.int32))]))
    assert (found["ids"][0, 0] % 7 == 6).all()
