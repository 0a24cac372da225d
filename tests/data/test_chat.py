"""Chats come out of templates as transformers writes them (tests/make_chats.py), from every kind of table."""

import json
from pathlib import Path

import make_chats
import pytest

from jkd import data
from jkd.data import chat, tables
from jkd.data.tokenizer import Bytes
from jkd.errors import InputError

pytest.importorskip("jinja2", reason="chat templates need jinja2")
CASES = json.loads((Path(__file__).parent.parent / "golden" / "chats.json").read_text(encoding="utf-8"))
TALKS, TOOLS = make_chats.TALKS, make_chats.TEMPLATES["tools"]


def template(name):
    return chat.Template(make_chats.TEMPLATES[name], (("bos_token", "<s>"),))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}, {case['talk']}{', tools' * case['tools']}")
def test_chats_are_written_as_transformers_writes_them(case):
    messages, tools = TALKS[case["talk"]], [make_chats.WEATHER] if case["tools"] else None
    pieces = template(case["template"])(messages, tools)
    assert "".join(pieces) == case["text"]
    assert pieces[0] == case["prompt"]
    turns = [message for message in messages if message["role"] == "assistant"]
    assert len(pieces[1::2]) == len(turns)
    if "said" in case:
        assert list(pieces[1::2]) == case["said"]
    for turn, said in zip(turns, pieces[1::2], strict=True):
        assert (turn["content"] or "<call>").strip() in said
        assert said.strip().endswith(("<|im_end|>", "<|eot_id|>", "<|end|>"))


def row(records, **options):
    made = data.documents(records, length=1000, layout="pad", template=TOOLS) if isinstance(records, list) else records
    record = made.train.records([0])[0]
    return Bytes().decode(record["tokens"][record["mask"] > 0])


def test_tools_of_a_record_are_shown_to_the_template_from_every_table(tmp_path):
    wanted = next(case["text"] for case in CASES if (case["template"], case["talk"], case["tools"]) == ("tools", "calls", True))
    record = {"messages": TALKS["calls"], "tools": [make_chats.WEATHER]}
    assert row([record]) == wanted
    assert row([record | {"tools": json.dumps(record["tools"])}]) == wanted  # as text: tables give all rows the same fields
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    options = dict(length=1000, layout="pad", template=TOOLS)
    assert row(data.jsonl(str(tmp_path / "a.jsonl"), **options)) == wanted
    assert "Tools:" not in row([{"messages": TALKS["calls"]}])
    assert "Tools:" not in row([record | {"tools": None}])
    # which template it is, and of what tokenizer, is in the corpus's name
    other = data.documents([record], length=1000, template=TOOLS + " ")
    assert repr(other.train) != repr(data.documents([record], length=1000, template=TOOLS).train)


def test_messages_in_parquet_are_those_of_json_lines(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow")
    from pyarrow import Table

    rows = [{"messages": TALKS[talk], "tools": json.dumps([make_chats.WEATHER]), "image": bytes(1000)} for talk in TALKS]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    made = data.parquet(str(tmp_path / "a.parquet"), length=1000, layout="pad", template=TOOLS)
    texts = {case["talk"]: case["text"] for case in CASES if case["template"] == "tools" and case["tools"]}
    found = [Bytes().decode(record["tokens"][record["mask"] > 0]) for record in made.train.records(range(len(rows)))]
    assert found == [texts[talk] for talk in TALKS]
    assert all(record["loss_mask"].any() for record in made.train.records(range(len(rows))))
    # the column that nobody looks at stays on the disk
    whole = tables.Parquet(str(tmp_path / "a.parquet"))
    assert whole.column_names == ["messages", "tools", "image"]
    read = tables.Columns(whole, None, Bytes(), TOOLS)._rows
    assert (list(read[0]), read.column_names, len(read)) == (["messages", "tools"], ["messages", "tools"], len(rows))
    parquet.write_table(Table.from_pylist([{"text": "other"}]), tmp_path / "b.parquet")
    both = data.parquet(str(tmp_path / "*.parquet"), length=1000, layout="pad", template=TOOLS)
    with pytest.raises(InputError, match="b.parquet|columns differ"):
        len(both.train)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["weather"], r"row 0: tools = \['weather'\]: give a list of JSON schemas"),
        ("{", r"row 0: tools: no JSON \("),
        ('{"a": 1}', "row 0: tools = .*: give a list of JSON schemas"),
    ],
)
def test_tools_that_are_none(tools, message):
    with pytest.raises(InputError, match=message):
        row([{"messages": TALKS["system"], "tools": tools}])


def test_a_template_of_its_own_for_tools(tmp_path):
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": TOOLS}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several, "add_bos_token": True}))
    found = chat.Template.of(data.tokenizer.File(tmp_path))
    assert found == chat.Template("plain", (), TOOLS)
    assert "Tools:" in found(TALKS["system"], [make_chats.WEATHER])[0]
    # one that is given is for both
    assert chat.Template.of(data.tokenizer.File(tmp_path), "mine") == chat.Template("mine")
