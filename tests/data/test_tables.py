"""Texts and chats in tables: which columns, what counts, and every way in which a file is wrong."""

import importlib.util
import json

import numpy as np
import pytest

from jkd import data
from jkd.data import chat
from jkd.data.tokenizer import Bytes, File
from jkd.errors import InputError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# like Qwen3's: thoughts stay in the last turn alone
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "A:{% generation %}{{ m.content }}!{% endgeneration %}{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
needs_jinja = pytest.mark.skipif(importlib.util.find_spec("jinja2") is None, reason="chat templates need jinja2")


def lines(path, *records):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return str(path)


def counted(made, row=0):
    """The texts of a row that are counted, and the whole row's."""
    record = made.train.records([row])[0]
    real = record["mask"] > 0
    tokens, said = record["tokens"][real], record.get("loss_mask", record["mask"])[real] > 0
    return Bytes().decode(tokens[said]), Bytes().decode(tokens)


def pad(records, **options):
    return data.documents(records, length=200, layout="pad", **options)


def test_lines_with_text_or_a_prompt_or_columns_of_any_name(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"id": 1, "text": "one"}, "", {"id": 2, "text": "zwei ü"})
    made = data.jsonl(file, length=16, layout="pad")
    assert made.train_size == 2  # an empty line is no record
    assert counted(made, 1) == ("zwei ü", "zwei ü")
    assert "loss_mask" not in made.train.records([0])[0]
    said = repr(made.train)
    assert "sha256=" in said
    assert str(tmp_path) in said or "a.jsonl" in said

    file = lines(tmp_path / "b.jsonl", {"prompt": "2+2=", "completion": "4", "why": "so"})
    made = data.jsonl(file, eval=file, length=16, layout="pad")
    assert counted(made) == ("4", "2+2=4")
    assert counted(data.jsonl(file, columns=("why", "prompt"), length=16, layout="pad")) == ("2+2=", "so2+2=")
    assert counted(data.jsonl(file, columns="why", length=16, layout="pad")) == ("so", "so")
    batch = next(made.eval_batches(1))
    assert batch["bytes"].sum() == pytest.approx(5)


def test_parquet_and_lists_of_dicts_are_the_same_as_lines(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow")
    from pyarrow import Table

    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(5)]
    for part, some in enumerate((rows[:2], rows[2:])):
        parquet.write_table(Table.from_pylist(some), tmp_path / f"{part}.parquet")
    lines(tmp_path / "all.jsonl", *rows)
    options = dict(length=16, layout="fit")
    ways = (
        data.parquet(str(tmp_path / "*.parquet"), **options),
        data.jsonl(str(tmp_path / "all.jsonl"), **options),
        data.documents(rows, **options),
    )
    first, *others = (way.train.records(range(len(way.train))) for way in ways)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                np.testing.assert_array_equal(value, two[name])
    assert repr(data.documents(rows, **options).train) == repr(ways[2].train)
    assert repr(data.documents(rows[1:], **options).train) != repr(ways[2].train)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(InputError, match="bad.parquet: no Parquet file"):
        len(data.parquet(str(tmp_path / "bad.parquet"), **options).train)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"id": 1, "body": "x"}], {}, "none of the columns messages, prompt and completion, or text.*there are: 'id', 'body'"),
        ([{"id": 1, "body": "x"}], {"columns": "bod"}, r"no column 'bod'; did you mean 'body'\? \(columns: 'id', 'body'\)"),
        ([{"text": "x"}, {"txt": "y"}], {}, "row 1: no column 'text'; there are: 'txt'"),
        ([{"text": "x"}, {"text": 3}], {}, "row 1: text is int, not text"),
        ([{"text": "x"}, "{"], {}, r"a.jsonl, line 2: no JSON"),
        ([{"text": "x"}, "3"], {}, r"a.jsonl, line 2: a int, not an object"),
        ([{"messages": TALK}], {}, "row 0: messages need a chat template"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(records, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        len(data.jsonl(lines(tmp_path / "a.jsonl", *records), length=16, **options).train)


@needs_jinja
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, "hello<|end|>so long<|end|>"),
        (THINKING, "hello<|end|><think></think>\nso long<|end|>"),
        (MARKED, "hello!so long!"),
    ],
    ids=["prefix", "rewrites earlier turns", "marked"],
)
def test_what_assistants_say_is_counted_and_nothing_else(template, said):
    text = chat.Template(template, (("bos_token", "<s>"),))
    pieces = text(TALK)
    assert "".join(pieces[1::2]) == said
    whole = chat._compiled(template).render(messages=TALK, bos_token="<s>").replace("\ufdd0", "").replace("\ufdd1", "")
    assert "".join(pieces) == whole
    made = pad([{"messages": TALK}], template=template)
    if template != MARKED:  # no tokenizer says here what its bos_token is
        assert counted(made) == (said, whole)
        assert Bytes.end not in made.train.records([0])[0]["tokens"]  # the template ends turns by itself


@needs_jinja
def test_the_template_is_the_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = {"<s>": 0, "hi": 1, "yes": 2, "[U]": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[U]")).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": MARKED}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = chat.Template.of(File(tmp_path))
    assert found([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]) == ("<s>U:hi;A:", "yes!", "")
    (tmp_path / "chat_template.jinja").write_text(CHATML)  # comes first
    assert chat.Template.of(File(tmp_path)).text == CHATML


@needs_jinja
@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, TALK[:2], "no message has the role 'assistant'"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "refuses the messages: roles must alternate"),
        ("{% for %}", TALK, "is no template"),
        ("{{ messages[0].content.__class__.__mro__ }}", TALK, "refuses the messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", TALK, "refuses the messages: "),
        ("{% for m in messages|reverse %}{{ m.content }}{% endfor %}", TALK, "cannot be told from the rest"),
    ],
    ids=["silent", "refused", "broken", "sandboxed", "immutable", "backwards"],
)
def test_templates_that_do_not_fit_are_refused(template, messages, message):
    with pytest.raises(InputError, match=message):
        chat.Template(template)(messages)


def test_a_hugging_face_data_set():
    datasets = pytest.importorskip("datasets", reason="the datasets library is an optional extra")
    image = [np.full((4, 4, 3), n, np.uint8) for n in range(6)]
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b", "c"]), "name": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict({"img": image, "fine": [0, 1, 2] * 2, "name": list("uvwxyz")}, features=features)
    made = data.source(table, columns={"image": "img", "label": "fine"})
    assert made.classes == 3
    assert table._fingerprint in repr(made.train)
    batch = next(made.batches(6, seed=0))
    assert batch["image"].shape == (6, 4, 4, 3)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    with pytest.raises(InputError, match="record 0 has no column 'image'; there are: 'img', 'fine', 'name'"):
        data.source(table, columns={"picture": "image"}).train.example()
    texts = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert counted(pad(texts)) == ("b", "ab")
    if importlib.util.find_spec("jinja2") is not None:
        assert (
            counted(pad(datasets.Dataset.from_list([{"messages": TALK}]), template=CHATML))[0] == "hello<|end|>so long<|end|>"
        )
