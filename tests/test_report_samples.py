"""Reports of language models: bits per byte, and what was said to the same text, on the page, in the terminal and as JSON."""

import html
import json
import re

import pytest
from left import leave, run

from jkd import report
from jkd.cli import main
from jkd.report import curves
from jkd.report.samples import sampled

PUBLISHED = {"class": "jkd.models.pretrained:Pretrained", "path": "mine/Qwen3"}
PROMPT = 'def f(x):\n    """<b>x & y</b>"""\n'


def spoken(text, bits, *, teacher=None, prompt=PROMPT):
    metrics = {"accuracy": 0.5, "nll": 0.7 * bits, "bits_per_byte": bits, "teacher_bits_per_byte": 0.9}
    return {
        "summary": {"accuracy": 0.5, "bits_per_byte": bits, "steps": 20},
        "metrics": metrics,
        "sample": {"prompt": prompt, "text": text, "teacher": teacher},
    }


@pytest.fixture
def folder(tmp_path):
    """A control and two methods, all trained beside a teacher that is no run."""
    results = {
        "kd": spoken("    return <x>\n", 1.2345, teacher="    return x\x00\n"),
        "control": spoken("    pass", 1.5, teacher="    return x\x00\n"),
        "late": spoken("", 1.75, teacher=None),
    }
    lines = {
        "kd": [{"step": step, "eval/bits_per_byte": 2 - step / 20, "eval/teacher_bits_per_byte": 0.9} for step in (10, 20)]
    }
    config = {"control": run(PUBLISHED), "kd": run(PUBLISHED), "late": run(PUBLISHED)}
    return leave(tmp_path / "lm", config, results, lines)


def read(folder):
    (group,) = report.compare(report.read([folder]))
    return group


def words(group):
    return [(one.prompt, [(voice.role, voice.label, voice.text) for voice in one.voices]) for one in sampled(group)]


def test_teacher_then_control_then_methods_and_one_teacher_is_heard_once(folder):
    voices = [
        ("teacher", "teacher", "    return x\x00\n"),
        ("control", "control", "    pass"),
        ("method", "kd", "    return <x>\n"),
        ("method", "late", ""),
    ]
    assert words(read(folder)) == [(PROMPT, voices)]


def test_a_teacher_that_is_a_run_speaks_for_itself_and_other_prompts_stand_apart(tmp_path):
    results = {
        "big": spoken("big", 1.0),
        "kd": spoken("small", 1.1, teacher="big, in bfloat16"),
        "other": spoken("else", 1.2, teacher="its own", prompt="Once"),
    }
    config = {"kd": run("big"), "big": run(), "other": run("big")}
    assert words(read(leave(tmp_path / "lm", config, results))) == [
        (PROMPT, [("teacher", "big", "big"), ("method", "kd", "small")]),
        ("Once", [("teacher", "teacher", "its own"), ("method", "other", "else")]),
    ]


def test_two_teachers_are_told_apart(tmp_path):
    results = {"a": spoken("1", 1.0, teacher="x"), "b": spoken("2", 1.1, teacher="y")}
    ((_, voices),) = words(read(leave(tmp_path / "lm", {"a": run(PUBLISHED), "b": run({**PUBLISHED, "path": "z"})}, results)))
    assert voices[:2] == [("teacher", "teacher of a", "x"), ("teacher", "teacher of b", "y")]


def test_the_page_shows_them_escaped_side_by_side(folder):
    text = report.page([read(folder)])
    section = text[text.index('<div class="samples">') : text.index("</section>")]
    prompt, *said = re.findall(r"<pre>(.*?)</pre>", section, re.S)
    assert html.unescape(prompt) == PROMPT
    assert "<b>" not in section.replace("<b>kd</b>", "").replace("<b>control</b>", "").replace("<b>late</b>", "")
    assert [html.unescape(one) for one in said] == ["    return x\ufffd\n", "    pass", "    return <x>\n"]
    assert '<h4>late</h4><p class="note">no words</p>' in section
    assert re.findall(r'<div class="(\w+)"><h4>(\w+)</h4>', section) == [
        ("teacher", "teacher"),
        ("control", "control"),
        ("student", "kd"),
        ("student", "late"),
    ]
    assert "white-space: pre-wrap" in text
    # without a language model there is no such section
    for file in folder.glob("*/result.json"):
        file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "sample"}))
    assert '<div class="samples">' not in report.page([read(folder)])


def test_bits_per_byte_are_a_column_and_a_curve_beside_the_teachers(folder, capsys):
    group = read(folder)
    kd = {row.name: row for row in group.rows}["kd"]
    assert [column.title for column in report.columns.columns([group])][:2] == ["bits per byte", "accuracy, %"]
    assert report.columns.columns([group])[0].cell(kd) == "1.2345"
    figures = {figure.title: figure for figure in report.figures.figures(group, kd)}
    assert figures["Bits per byte"].legend == (("student", "kd"), ("teacher", "teacher"))
    assert "kd ends at 1; teacher ends at 0.9" in figures["Bits per byte"].drawing.replace(", ", "; ")
    assert [point.mean for point in curves.curve(kd.records.values(), "eval/bits_per_byte")] == [1.5, 1.0]
    # the least bits are on top: the drawing's list begins with the best
    (best,) = (figure for figure in report.figures.overview(group) if figure.title == "Bits per byte")
    assert re.search(r'aria-label="Bits per byte: kd 1\.23; control 1\.50; late 1\.75"', best.drawing)
    report.table([group])
    assert re.search(r"^ kd +1\.2345 +50\.00", capsys.readouterr().out, re.M)


def test_a_terminal_cuts_lines_and_leaves_many_voices_to_the_page(folder, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("COLUMNS", "34")
    group = read(folder)
    report.table([group])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    shown = out[out.index("after ") :].splitlines()[:5]
    assert shown == [
        'after …n    """<b>x & y</b>"""\\n\':',
        "  teacher  '    return x\\x00\\n'",
        "  control  '    pass'",
        "  kd       '    return <x>\\n'",
        "  late     ''",
    ]
    assert max(map(len, shown)) <= 34
    monkeypatch.setattr(report.text, "MOST_VOICES", 3)
    report.table([group])
    assert "what 4 runs say is in the page and in --json" in " ".join(
        re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split()
    )


def test_json_has_what_was_said_and_what_is_drawn(folder, capsys):
    assert main(["report", str(folder), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    kd = group["runs"]["kd"]
    assert kd["samples"] == [{"prompt": PROMPT, "text": "    return <x>\n", "teacher": "    return x\x00\n"}]
    assert kd["curves"]["eval/bits_per_byte"] == {"step": [10, 20], "mean": [1.5, 1.0], "low": [1.5, 1.0], "high": [1.5, 1.0]}
    assert kd["metrics"]["bits_per_byte"]["mean"] == 1.2345
    assert group["runs"]["control"]["curves"] == {}
