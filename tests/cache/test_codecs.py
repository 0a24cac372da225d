"""Answers to bytes and back: what is exact, how large the rest errs, how many bytes it takes, what is refused."""

import numpy as np
import pytest

from jkd import cache
from jkd.cache import bits
from jkd.errors import InputError

VOCAB, K, TIME = 128_256, 64, 24


def of_text(seed=0, tokens=TIME, vocab=VOCAB):
    """Logits like a language model's: power laws over the rank with noise, 2.5 nats of entropy at the mean."""
    rng = np.random.default_rng(seed)
    falling = -rng.uniform(1, 3, (tokens, 1)) * np.log(np.arange(1, vocab + 1))
    return (falling + rng.normal(size=(tokens, vocab)))[:, rng.permutation(vocab)]


LOGITS = of_text()
ANSWER = cache.TopK(k=K, vocab=VOCAB).of(LOGITS)


def sort(answer):
    """ids and log-probabilities in falling order, and what is left."""
    order = np.argsort(-answer["log_probs"], axis=-1, kind="stable")
    return *(np.take_along_axis(answer[name], order, -1) for name in ("ids", "log_probs")), answer["leftover"]


def divergence(answer, found):
    """KL(what went in || what came out) over the kept classes and the rest, nats; normalised, as the losses do to both."""
    ids, log_p, rest = sort(answer)
    np.testing.assert_array_equal(ids, found["ids"])
    log_p = np.append(log_p, np.log(rest)[:, None], axis=-1)
    log_q = np.append(found["log_probs"], np.log(found["leftover"])[:, None], axis=-1).astype(np.float64)
    log_p, log_q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("width", [1, 3, 6, 8, 15, 16, 17, 24])
def test_bits_come_back(width):
    rng = np.random.default_rng(width)
    for count in (1, 7, 64, 129):
        values = rng.integers(0, 1 << width, (5, count))
        rows = np.stack([np.frombuffer(bits.pack(row, width), np.uint8) for row in values])
        assert rows.shape[1] == bits.packed_size(count, width)
        assert 8 * rows.shape[1] < width * (count + 8)
        np.testing.assert_array_equal(bits.unpack(rows, width, count), values)
        # the layout, told in another way: the bits of each number, lowest first, one number behind the other
        told = np.unpackbits(rows[0], bitorder="little")[: count * width].reshape(count, width)
        np.testing.assert_array_equal((told.astype(np.int64) << np.arange(width)).sum(-1), values[0])


@pytest.mark.parametrize(("values", "size", "worst"), [("uint8", 210, 2e-4), ("float16", 264, 1e-7)])
def test_top_k_is_small_and_close(values, size, worst):
    codec = cache.TopK(k=K, vocab=VOCAB, values=values)
    payload = codec.encode(ANSWER)
    assert len(payload) <= size * TIME
    assert bits.packed_size(K, 17) * TIME < len(payload)  # 17 bits an id: fewer cannot tell 128,256 apart
    found = codec.decode([payload, payload])
    for name, (shape, dtype) in codec.shapes(TIME).items():
        assert found[name].shape == (2, *shape)
        assert found[name].dtype == dtype
    one = {name: array[1] for name, array in found.items()}
    errors = divergence(ANSWER, one)
    assert 0 < errors.mean() <= worst
    assert errors.max() <= 10 * worst
    np.testing.assert_allclose(one["leftover"], ANSWER["leftover"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(one["log_probs"]).sum(-1, dtype=np.float64) + one["leftover"], 1, atol=1e-6)


def test_of_logits_is_what_it_says():
    p = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    ids, log_probs, leftover = sort(ANSWER)
    np.testing.assert_array_equal(ids, order[:, :K])
    np.testing.assert_allclose(np.exp(log_probs), np.take_along_axis(p, order, -1)[:, :K])
    np.testing.assert_allclose(leftover, np.take_along_axis(p, order, -1)[:, K:].sum(-1))


@pytest.mark.parametrize("values", ["uint8", "float16"])
@pytest.mark.parametrize("leftover", [0.0, 1e-30, 1e-9, 0.5, 0.999, 1 - 1e-9])
def test_what_is_left_is_exact_from_nothing_to_nearly_all(values, leftover):
    shares = np.array([0.7, 0.2, 0.1]) * (1 - leftover)
    codec = cache.TopK(k=3, vocab=10, values=values, per="example")
    found = codec.decode([codec.encode({"ids": [2, 0, 9], "log_probs": np.log(shares), "leftover": leftover})])
    np.testing.assert_array_equal(found["ids"], [[2, 0, 9]])
    np.testing.assert_allclose(found["leftover"], [leftover], rtol=1e-7)
    np.testing.assert_allclose(np.exp(found["log_probs"])[0] / shares, 1, rtol=5e-3 if values == "uint8" else 1e-3)
    np.testing.assert_allclose(np.exp(found["log_probs"]).sum(dtype=np.float64) / (1 - leftover), 1, rtol=3e-6)


@pytest.mark.parametrize("values", ["uint8", "float16"])
def test_impossible_classes_stay_impossible(values):
    codec = cache.TopK(k=4, vocab=9, values=values, per="example")
    log_probs = np.array([np.log(0.25), -np.inf, np.log(0.75), -np.inf])
    found = codec.decode([codec.encode({"ids": [5, 1, 3, 8], "log_probs": log_probs})])
    assert list(found["ids"][0]) == [3, 5, 1, 8]
    assert (np.exp(found["log_probs"][0, 2:]) < 1e-17).all()
    np.testing.assert_allclose(np.exp(found["log_probs"][0, :2]), [0.75, 0.25], rtol=0.1 if values == "uint8" else 1e-3)
    flat = codec.decode([codec.encode({"ids": [5, 1, 3, 8], "log_probs": np.full(4, np.log(0.25))})])
    np.testing.assert_allclose(flat["log_probs"], np.log(0.25), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ids=np.full((1, 3), 10)), "id 10 is outside 0..9"),
        (dict(ids=np.array([[1, 1, 2]])), "an id appears twice"),
        (dict(ids=np.array([[1.0, 3, 2]])), r"ids are float64\[1, 3\] where int \[time, 3\]"),
        (dict(ids=np.array([1, 3, 2])), r"ids are int64\[3\] where int \[time, 3\]"),
        (dict(log_probs=np.array([[2.0, 1, 0]])), "do not add up to 1"),
        (dict(log_probs=np.array([[-1.0, np.nan, -1]])), "do not add up to 1"),
        (dict(log_probs=np.zeros((1, 2))), r"log_probs are \[1, 2\], ids \[1, 3\]"),
        (dict(leftover=np.array([0.3])), "do not add up to 1"),
        (dict(leftover=0.1), r"leftover is \[\]"),
    ],
)
def test_top_k_refuses(changes, message):
    codec = cache.TopK(k=3, vocab=10)
    good = {"ids": np.array([[4, 1, 2]]), "log_probs": np.log([[0.5, 0.3, 0.1]]), "leftover": np.array([0.1])}
    codec.encode(good)
    with pytest.raises(InputError, match=message):
        codec.encode(good | changes)
    with pytest.raises(InputError, match="no 'log_probs' but"):
        codec.encode({"ids": good["ids"]})


def test_sampled_is_exact_and_small():
    codec = cache.Sampled(draws=50, vocab=VOCAB)
    drawn = codec.of(LOGITS, np.random.default_rng(0))
    payload = codec.encode(drawn)
    different = (np.diff(np.sort(drawn["ids"], axis=-1), axis=-1, prepend=-1) > 0).sum(-1).mean()
    assert different > 12  # as in the paper, or more
    assert len(payload) <= (50 + 17 * different) / 8 * TIME + 24
    (found,) = codec.decode([payload])["ids"]
    np.testing.assert_array_equal(found, np.sort(drawn["ids"], axis=-1))
    for kinds, most in ((12, 33), (15, 40)):  # bytes a token; of text fifty draws are about twelve different ids
        some = {"ids": np.repeat(np.arange(kinds) * 1000, [51 - kinds, *[1] * (kinds - 1)])[None].repeat(64, 0)}
        assert len(codec.encode(some)) <= most * 64
    alike = codec.decode([codec.encode({"ids": np.full((2, 50), 7)}), codec.encode({"ids": np.full((2, 50), 3)})])
    np.testing.assert_array_equal(alike["ids"][:, 1, 0], [7, 3])


def test_sampled_is_unbiased():
    """Means over 40,000 draws lie within 5 standard errors of what they estimate, all of 9 classes."""
    codec = cache.Sampled(draws=20, vocab=9, per="example")
    logits = of_text(1, tokens=1, vocab=9)[0]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    rng = np.random.default_rng(0)
    payloads = [codec.encode(codec.of(logits, rng)) for _ in range(2000)]
    share = np.bincount(codec.decode(payloads)["ids"].ravel(), minlength=9) / 40_000
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_dense_holds_what_it_names():
    codec = cache.Dense(classes=3, taps={"block": (2, 2)}, heads={"box": (4,)})
    rng = np.random.default_rng(0)
    answer = {"logits": rng.normal(size=3), "taps/block": rng.normal(size=(2, 2)), "heads/box": 100 * rng.normal(size=4)}
    payload = codec.encode(answer)
    assert len(payload) == codec.size == 22
    found = codec.decode(np.stack([np.frombuffer(payload, np.uint8)] * 2))
    for name, array in answer.items():
        np.testing.assert_array_equal(found[name][1], array.astype(np.float16).astype(np.float32))
    whole = cache.Dense(classes=3, dtype="float32")
    np.testing.assert_array_equal(whole.decode([whole.encode(answer)])["logits"][0], answer["logits"].astype(np.float32))
    for changes, message in (
        (dict(logits=np.zeros(4)), r"logits is \[4\]; the codec says \[3\]"),
        (dict(logits=[0, np.nan, 0]), "logits is not finite"),
        (dict(logits=[0, 7e4, 0]), "passes 65504"),
    ):
        with pytest.raises(InputError, match=message):
            codec.encode(answer | changes)


@pytest.mark.parametrize(
    "codec",
    [
        cache.TopK(k=3, vocab=10),
        cache.Sampled(draws=4, vocab=10),
        cache.Dense(classes=2),
        cache.TopK(k=3, vocab=10, values="uint8"),
    ],
)
def test_bytes_that_are_no_answer_are_refused(codec):
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    answer = {"logits": np.zeros(2), "ids": ids[:, :3], "log_probs": np.log(np.full((2, 3), 1 / 3))}
    payload = codec.encode(answer | ({"ids": ids} if isinstance(codec, cache.Sampled) else {}))
    for wrong in (payload[:-1], payload + b"\0", payload[:3], b""):
        with pytest.raises(ValueError, match="an answer of|fewer than 4"):
            codec.decode([wrong])
    if isinstance(codec, cache.Dense):
        return
    once = {name: array[:1] for name, array in answer.items()} | ({"ids": ids[:1]} if isinstance(codec, cache.Sampled) else {})
    with pytest.raises(ValueError, match="differ in length"):
        codec.decode([payload, codec.encode(once)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cache.TopK(k=0, vocab=10), "TopK.k = 0"),
        (lambda: cache.TopK(k=11, vocab=10), "TopK.k = 11: give 1 to vocab = 10"),
        (lambda: cache.TopK(k=1, vocab=1 << 25), "TopK.vocab"),
        (lambda: cache.TopK(k=1, vocab=10, values="int4"), "TopK.values = 'int4'"),
        (lambda: cache.TopK(k=1, vocab=10, per="batch"), "TopK.per = 'batch'"),
        (lambda: cache.Sampled(draws=0, vocab=10), "Sampled.draws = 0"),
        (lambda: cache.Dense(), "Dense keeps nothing"),
        (lambda: cache.Dense(classes=2, dtype="uint8"), "Dense.dtype = 'uint8'"),
        (lambda: cache.TopK(k=1, vocab=10).shapes(None), "the batch has no tokens"),
        (lambda: cache.Cache(path="", codec=cache.Dense(classes=2)), "Cache.path = ''"),
        (lambda: cache.Cache(path="x", codec="topk"), "Cache.codec = 'topk'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
