"""`jkd report`: numbers against the records, seeds and configs put together, pages that parse, and one line for what is no run."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jkd import configfile, report
from jkd.cli import main
from jkd.errors import InputError
from jkd.report import curves, svg
from jkd.report.records import published_in

CONFIG = '''"""Three tiny networks. jkd train mine.py"""

from jkd import Experiment, Run, data, models, optim, recipes
from jkd.recipes import projectors

PUBLISHED_ON = "nothing at all"
PUBLISHED = {"teacher": 79.42, "control": 72.5, "kd": 73.33, "other": (78.08, 73.09)}


def config(*, seed=0):
    mlp = models.mlp.Config(features=64, hidden=(4,), classes=10)
    shared = dict(student=mlp, data=data.digits(labelled=0.2), optimizer=optim.adamw(1e-2), steps=6, batch_size=64, seed=seed,
                  evaluate_every=0.5, checkpoint_every=0, log_every=2)
    hint = recipes.FitNet(student_taps=("layers/0",), teacher_taps=("layers/0",), projector=projectors.Linear())
    return Experiment(
        teacher=Run(recipe=recipes.Supervised(), **shared),
        control=Run(recipe=recipes.Supervised(), teacher="teacher", **shared),
        kd=Run(recipe=hint, teacher="teacher", **shared),
    )
'''
RUNS = ("teacher", "control", "kd")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `jkd train --seeds 2` leaves; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "mine.py").write_text(CONFIG)
    assert main(["train", str(folder / "mine.py"), "--seeds", "2", "--workdir", str(folder / "runs")]) == 0
    return folder / "runs"


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints", "events*")))


def result(folder, run):
    return json.loads((folder / run / "result.json").read_text())


def groups(*folders):
    return report.compare(report.read(folders))


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# --- numbers


def test_what_a_run_keeps_says_its_metrics_again(trained):
    for run in RUNS:
        found = result(trained / "seed0", run)
        details, metrics = found["details"], found["metrics"]
        for prefix in ("", "teacher_") if run != "teacher" else ("",):
            classes, bins = details[f"{prefix}classes"], details[f"{prefix}bins"]
            # 360 examples in batches of 64: the last one is padded
            assert sum(classes["weight"]) == sum(bins["weight"]) == 360
            assert sum(classes["correct"]) / 360 == sum(bins["correct"]) / 360 == metrics[f"{prefix}accuracy"]
            gap = np.abs(np.subtract(bins["confidence"], bins["correct"])).sum() / 360
            assert gap == pytest.approx(metrics[f"{prefix}ece"], rel=1e-12)
    assert result(trained / "seed0", "kd")["summary"]["extra_parameters"] == 4 * 4 + 4
    assert result(trained / "seed0", "control")["summary"]["extra_parameters"] == 0


def test_json_has_means_deviations_and_gains_paired_by_seed(trained, capsys):
    assert main(["report", str(trained), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert not (trained / "report.html").exists()
    assert group["folders"] == [str(trained / f"seed{seed}") for seed in range(2)]
    assert {name: run["role"] for name, run in group["runs"].items()} == dict(
        zip(RUNS, ("teacher", "control", "method"), strict=True)
    )
    accuracy = {run: np.array([result(trained / f"seed{s}", run)["summary"]["accuracy"] for s in range(2)]) for run in RUNS}
    for run in RUNS:
        found = group["runs"][run]["metrics"]
        assert found["accuracy"]["values"] == accuracy[run].tolist()
        assert found["accuracy"]["mean"] == pytest.approx(accuracy[run].mean(), rel=1e-12)
        assert found["accuracy"]["std"] == pytest.approx(accuracy[run].std(ddof=1), rel=1e-12)
    gains = accuracy["kd"] - accuracy["control"]
    assert group["runs"]["kd"]["metrics"]["gain"]["values"] == pytest.approx(gains, rel=1e-12)
    assert "gain" not in group["runs"]["control"]["metrics"]
    assert group["runs"]["kd"]["published"] == {"accuracy": 73.33, "control": 72.5}


def test_the_table_names_what_it_has_no_room_for(trained, monkeypatch, capsys):
    found = groups(trained)
    report.table(found)
    whole = capsys.readouterr().out
    kd = next(line for line in whole.splitlines() if line.startswith(" kd"))
    stat = {row.name: row for row in found[0].rows}["kd"].stats
    assert f"{100 * stat['accuracy'].mean:.2f} ± {100 * stat['accuracy'].std:.2f}" in kd
    assert "73.33 (+0.83)" in kd
    assert re.search(r"control .* 72\.50 +\d", whole)
    assert "published: accuracy, % (gain over the control beside it); nothing at all" in whole
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("COLUMNS", "60")
    report.table(found)
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "accuracy, %" in narrow
    assert re.search(r"not shown here, but by --json:.*parameters; extra", " ".join(narrow.split()))


# --- what belongs together


def test_folders_that_differ_in_seeds_alone_are_one_row_and_others_differ_in_columns(copied, capsys):
    seeds = [copied / "seed0", copied / "seed1"]
    (group,) = groups(*seeds)
    assert [row.name for row in group.rows] == list(RUNS)
    assert group.differences == {}
    assert group.label == ", ".join(map(str, seeds))

    def other(config):
        for run in config.values():
            run["batch_size"] = 32
        config["kd"]["recipe"]["weight"] = 7.0

    apart = shutil.copytree(copied / "seed1", copied / "apart")
    edit(apart / "config.json", other)
    first, second = groups(seeds[0], apart)
    before = json.loads((copied / "seed0/config.json").read_text())["kd"]["recipe"]["weight"]
    assert first.differences == {"*.batch_size": "64", "kd.recipe.weight": str(before)}
    assert second.differences == {"*.batch_size": "32", "kd.recipe.weight": "7.0"}
    assert second.rows[2].stats["accuracy"].std is None
    report.table([first, second])
    out = capsys.readouterr().out
    assert "*.batch_size" in out
    assert re.search(r"kd +32 +7\.0 ", out)
    # a folder of folders is all of them; another recipe is no list of its fields
    edit(apart / "config.json", lambda config: config["kd"]["recipe"].update({"class": "x:Other"}))
    assert [len(group.folders) for group in groups(copied)] == [1, 2]
    assert groups(copied)[0].differences == {"*.batch_size": "32", "kd.recipe": "Other"}


def test_numbered_runs_are_seeds_of_one_row_where_they_are_alike(tmp_path):
    def run(teacher=None, **more):
        return {"class": "jkd.config:Run", "teacher": teacher, "seed": 0, "steps": 5, "recipe": {"class": "x:R"}, **more}

    def second(name, **more):
        return {"class": "two_stages.<locals>.second", "closure": {"name": name, "run": run("teacher", **more)}}

    config = {
        "teacher": run(),
        "control_0": run("teacher", seed=0),
        "control_1": run("teacher", seed=1),
        "ab_0_initial": run("teacher", seed=0),
        "ab_0": second("ab_0", seed=0),
        "ab_1_initial": run("teacher", seed=1),
        "ab_1": second("ab_1", seed=1),
        "born_0": run(),
        "born_1": run("born_0"),
        "born_2": run("born_1"),
        "layers_2": run(steps=6),
        "layers_3": run(steps=7),
        "size": {"class": "mine:<lambda>"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place, (name, accuracy) in enumerate({"control_0": 0.5, "control_1": 0.6, "ab_0": 0.7, "ab_1": 0.65}.items()):
        (tmp_path / name).mkdir()
        found = {"summary": {"accuracy": accuracy, "examples_per_s": 10.0 * place}, "metrics": {"accuracy": accuracy}}
        (tmp_path / name / "result.json").write_text(json.dumps(found))
    (group,) = groups(tmp_path)
    rows = {row.name: row for row in group.rows}
    assert list(rows) == ["teacher", "control", "ab_initial", "ab", "born_0", "born_1", "born_2", "layers_2", "layers_3"]
    roles = dict(zip(rows, ("teacher", "control", "stage", "method", "teacher", "teacher", *3 * ["method"]), strict=True))
    assert {name: row.role for name, row in rows.items()} == roles
    assert rows["ab"].stats["gain"].values == pytest.approx((0.2, 0.05))
    assert rows["teacher"].status == "not begun"
    assert {row.first.run["steps"] for row in rows.values()} == {5, 6, 7}


# --- what is not there


def test_unfinished_runs_are_shown_as_such_and_a_torn_line_is_passed_over(copied, capsys):
    (copied / "seed1/kd/result.json").unlink()
    assert {row.name: len(row.finished) for row in groups(copied)[0].rows} == dict(teacher=2, control=2, kd=1)
    (copied / "seed0/kd/result.json").unlink()
    for seed in range(2):
        file = copied / f"seed{seed}/kd/metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= 4) + '{"step": 5, "train/lo')
    shutil.rmtree(copied / "seed0/teacher")
    report.table(groups(copied))
    out = capsys.readouterr().out
    assert re.search(r"kd \(at step 4 of 6\) +0 of 2 +– ", out)
    assert re.search(r"teacher +1 of 2 +\d", out)
    drawn = {figure.title for figure in report.figures.figures(*[(g, g.rows[2]) for g in groups(copied)][0])}
    assert "Accuracy, %" in drawn
    assert not drawn & {"Reliability", "Accuracy of each class, above the control's, points"}


def test_sections_without_numbers_are_left_out(copied):
    for file in copied.glob("seed*/*/result.json"):
        edit(file, lambda found: found.pop("details"))
    for file in copied.glob("seed*/*/metrics.jsonl"):
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{name: value for name, value in line.items() if "gradient/" not in name} for line in kept]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (group,) = groups(copied)
    titles = [figure.title for figure in report.figures.figures(group, group.rows[2])]
    assert titles == [
        "Training loss",
        "Accuracy, %",
        "NLL, nats",
        "Expected calibration error, %",
        "Agreement with the teacher, %",
        "KL(teacher || student), nats",
        "Shares of the terms in the loss, %",
    ]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["seed"], "seed: no such folder; did you mean 'seed1' or 'seed0'?"),
        (["seed0/kd"], "seed0/kd is one run of an experiment; give seed0"),
        (["empty"], "empty holds nothing that jkd train left"),
        (["seed0", "foreign"], "foreign holds nothing that jkd train left"),
        (["damaged"], "damaged/config.json cannot be read: "),
        (["unpublished"], "unpublished/config.py: PUBLISHED is no literal {run: accuracy in %}"),
        (
            ["seed0", "--html", "nowhere/page.html"],
            "nowhere/page.html cannot be written (No such file or directory); --html FILE",
        ),
        ([], "the following arguments are required: RUN_DIR (jkd report --help shows examples)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_folders_are_one_line(argv, line, copied, monkeypatch, capsys):
    monkeypatch.chdir(copied)
    (copied / "empty").mkdir()
    (copied / "foreign").mkdir()
    (copied / "foreign/config.json").write_text('{"architectures": ["Bert"]}')  # a Hugging Face directory
    (copied / "damaged").mkdir()
    (copied / "damaged/config.json").write_text('{"teacher": ')
    shutil.copytree(copied / "seed0", copied / "unpublished")
    (copied / "unpublished/config.py").write_text("PUBLISHED = {'kd': 70 + gain}")
    assert main(["report", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"jkd: {line}")
    assert err.count("\n") == 1


def test_published_numbers_are_read_without_running_the_config():
    text = "import nothing_there\nPUBLISHED = {'control': 70, 'kd': 71.5, 'b': (80, 75.5)}\nPUBLISHED_ON = 'x'"
    assert published_in(text, "c.py") == ({"control": (70.0, 70.0), "kd": (71.5, 70.0), "b": (80.0, 75.5)}, "x")
    assert published_in("PUBLISHED = {'kd': 71.5}", "c.py") == ({"kd": (71.5, None)}, "")
    assert published_in("", "c.py") == ({}, "")
    for bad in ("PUBLISHED = 3", "PUBLISHED = {'kd': 'high'}", "PUBLISHED = {'kd': (1, 2, 3)}", "PUBLISHED = {'kd': None}"):
        with pytest.raises(InputError, match=r"c\.py: PUBLISHED is no literal"):
            published_in(bad, "c.py")


def test_the_published_numbers_of_the_two_tables_agree_and_name_runs():
    table, digits = (configfile.load(name).__globals__ for name in ("cifar100_table", "digits_methods"))
    rows = {"teacher", "control", *table["METHODS"]}  # MLLD's view by AutoAugment, and with it its row, is not in the table
    assert {name: number for name, number in digits["PUBLISHED"].items() if name in rows}.items() <= table["PUBLISHED"].items()
    for made in (table, digits):
        assert set(made["PUBLISHED"]) <= {"teacher", "control", *made["METHODS"]}


# --- pictures


class Page(HTMLParser):
    """Notes what is open, so that a tag that is never closed shows, and every address."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.metas, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag == "meta":
            self.metas.append(dict(attributes))
        else:
            self.open += [] if tag == "br" else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_parses_and_needs_nothing_else(copied, capsys):
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().err == f"wrote {copied}/report.html\n"
    text = (copied / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses == []
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|nan|inf\b", text.replace("information", ""))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.metas
    assert "prefers-color-scheme: dark" in text
    assert "--seeds 2" in text
    assert "73.33 (+0.83)" in text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    for title in (
        "Reliability",
        "Shares of the terms in the loss, %",
        "Cosine of each term&#x27;s gradient to the task&#x27;s",
    ):
        assert titles.count(title) == 1
    drawings = [ET.fromstring(each) for each in re.findall(r"<svg viewBox=\"0 0 360.*?</svg>", text)]
    assert len(drawings) == len(titles)
    for drawing in drawings:
        width, height = map(float, drawing.attrib["viewBox"].split()[2:])
        assert drawing.attrib["aria-label"]
        for element in drawing.iter():
            for name, end in (("cx", width), ("cy", height), ("x", width), ("y", height)):
                assert 0 <= float(element.attrib.get(name, 0)) <= end
            if "d" in element.attrib:
                places = np.array(re.findall(r"[\d.]+ [\d.]+", element.attrib["d"]))
                assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in map(str.split, places))


def test_names_that_look_like_html_stay_words(copied):
    for seed in range(2):
        edit(copied / f"seed{seed}/config.json", lambda config: config.update({"<i>&": config.pop("kd")}))
        (copied / f"seed{seed}/kd").rename(copied / f"seed{seed}/<i>&")
    text = report.page(groups(copied))
    assert Page(text).open == []
    assert "<i>&" not in text
    assert "&lt;i&gt;&amp;" in text


def test_bars_are_the_differences_of_the_classes(copied):
    (group,) = groups(copied)
    (figure,) = (each for each in report.figures.figures(group, group.rows[2]) if "each class" in each.title)
    told = dict(re.findall(r"class (\d): ([+-]\d+\.\d) points", figure.drawing))
    pooled = {}
    for run in ("kd", "control"):
        sums = [result(copied / f"seed{seed}", run)["details"]["classes"] for seed in range(2)]
        pooled[run] = [np.sum([each[what] for each in sums], 0) for what in ("correct", "weight")]
    wanted = 100 * (pooled["kd"][0] / pooled["kd"][1] - pooled["control"][0] / pooled["control"][1])
    assert [float(told[str(name)]) for name in range(10)] == pytest.approx(wanted, abs=0.0501)
    assert np.any(wanted)


def test_the_picture_is_a_png(trained, tmp_path, capsys):
    assert main(["report", str(trained), "--json", "--png", str(tmp_path / "x.png")]) == 0
    content = (tmp_path / "x.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[place : place + 4]) for place in (16, 20))
    assert width == 1200
    assert height > 200


def test_a_missing_matplotlib_is_named(trained, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["report", str(trained), "--json", "--png", "x.png"]) == 2
    assert capsys.readouterr().err == "jkd: a picture needs matplotlib: pip install 'jkd[train]'\n"


def test_there_is_nothing_to_draw_without_a_finished_run(copied):
    for file in copied.glob("seed*/*/result.json"):
        file.unlink()
    with pytest.raises(InputError, match="no finished run with an accuracy"):
        report.png(groups(copied))


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (0.37, 0.92), (-3.2, 41.0), (1234.0, 1250.0), (5.0, 5.0), (0.0, 0.0), (-1e-7, 2e-7)]
)
def test_axes_hold_their_values_and_have_a_few_round_ticks(values):
    axis = svg.axis(values)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 3 <= len(axis.ticks) <= 7
    for value, _ in axis.ticks:
        digits = f"{abs(value):.6e}".partition("e")[0].rstrip("0").replace(".", "")
        assert len(digits) <= 4
        assert 0 <= axis.at(value) <= 1
    assert [axis.at(axis.low), axis.at(axis.high)] == [0, 1]


def test_a_logarithmic_axis_is_even_in_powers_of_ten():
    axis = svg.axis([0.002, 40.0], log=True)
    assert (axis.low, axis.high) == (0.001, 100.0)
    assert axis.at(0.1) - axis.at(0.01) == pytest.approx(axis.at(100) - axis.at(10), rel=1e-9)
    assert [text for _, text in axis.ticks] == ["0.001", "0.01", "0.1", "1", "10", "100"]


def test_long_curves_keep_their_extremes():
    lines = tuple({"step": step, "x": float(step == 777)} for step in range(2000))
    record = report.Record("a", {}, None, {}, {}, lines)
    found = curves.curve([record], "x")
    assert len(found) <= curves.MOST
    assert max(point.high for point in found) == 1
    assert sum(point.mean for point in found) == pytest.approx(1 / np.ceil(2000 / curves.MOST))
    assert curves.curve([record], "y") == ()
