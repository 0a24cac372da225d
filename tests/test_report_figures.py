"""What charts and tables of a report say, read back from the drawings and cells themselves, against the numbers in the folder."""

import html
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from left import leave, run

from jkd import report
from jkd.report.columns import columns

STEPS = (10, 20, 30)
AGREEMENT, KL, COSINE, SHARE = (0.5, 0.7, 0.85), (0.9, 0.4, 0.25), (0.2, -0.35, 0.6), (0.25, 0.4, 0.75)
CLASSES = ("ant", "bee", "a much longer name")
BINS = {"weight": [0.0, 100.0, 1.0, 199.0], "confidence": [0.0, 40.0, 0.6, 179.1], "correct": [0.0, 30.0, 0.0, 159.2]}


def line(step, place):
    return {
        "step": step,
        "train/loss": 3.0 - step / 20,
        "train/share/task": SHARE[place],
        "train/share/kd": 1 - SHARE[place],
        "eval/accuracy": step / 100,
        "eval/agreement": AGREEMENT[place],
        "eval/kl": KL[place],
        "eval/teacher_accuracy": 0.8,
        "gradient/cosine/kd": COSINE[place],
        "gradient/norm/kd": 2.0,
        "gradient/norm/task": 3.0,
    }


def result(accuracy, correct, **summary):
    own = {"accuracy": accuracy, "ece": 0.1, "kl": 0.25, "agreement": 0.85}
    details = {"bins": BINS, "classes": {"weight": [100.0, 100.0, 100.0], "correct": correct}}
    return {"summary": own | summary, "metrics": own, "details": details, "classes": CLASSES}


def experiment(folder, *, temperature=4.0, batch_size=64, accuracy=0.8):
    config = {
        "teacher": run(batch_size=batch_size),
        "control": run("teacher", batch_size=batch_size),
        "kd": run("teacher", batch_size=batch_size, recipe={"class": "x:KD", "temperature": temperature}),
    }
    cost = {"parameters": 1234567, "examples_per_s": 4321.4, "student_flops": 1.25e12, "teacher_flops": 6e12}
    results = {
        "teacher": result(
            0.9, [90.0, 90.0, 90.0], parameters=9876543, examples_per_s=100.0, student_flops=2e13, teacher_flops=0.0
        ),
        "control": result(0.7, [50.0, 60.0, 70.0], **cost),
        "kd": result(accuracy, [75.0, 50.0, 70.0], extra_parameters=4096, **cost),
    }
    return leave(folder, config, results, {"kd": [line(step, place) for place, step in enumerate(STEPS)]})


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    (found,) = report.compare(report.read([experiment(tmp_path_factory.mktemp("figures") / "one")]))
    return found


@pytest.fixture(scope="module")
def drawn(group):
    return {figure.title: figure for figure in report.figures.figures(group, group.rows[2])}


def value(text):
    return float(text.replace("−", "-"))


class Drawing:
    """A chart's elements in the values of its axes, which its own ticks tell."""

    def __init__(self, figure):
        self.root = ET.fromstring(figure.drawing)
        texts = [(float(each.get("x")), float(each.get("y")), each) for each in self.root.iter("text")]
        across = [(y, value(each.text)) for x, y, each in texts if each.get("text-anchor") == "end" and each.get("dy")]
        base = max(y for y, _ in across) + 14
        along = [(x, value(each.text)) for x, y, each in texts if abs(y - base) < 1 and re.fullmatch(r"[\d.−]+", each.text)]
        self.x, self.y = (np.polyfit(*np.array(ticks).T, 1) for ticks in (along, across))

    def at(self, x, y):
        return float(np.polyval(self.x, x)), float(np.polyval(self.y, y))

    def path(self, style):
        (found,) = (each for each in self.root.iter("path") if each.get("class") == style)
        return [self.at(*map(float, place.split())) for place in re.findall(r"[\d.]+ [\d.]+", found.get("d"))]

    def dots(self, style):
        found = [each for each in self.root.iter("circle") if each.get("class") == style]
        return [(*self.at(float(each.get("cx")), float(each.get("cy"))), float(each.get("r"))) for each in found]


def near(found, wanted, across):
    """A tenth of a pixel, of charts about 300 wide and 160 high."""
    found, wanted = np.array(found), np.array(wanted)
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], atol=0.001 * wanted[:, 0].max())
    np.testing.assert_allclose(found[:, 1], wanted[:, 1], atol=0.002 * across)


@pytest.mark.parametrize(
    ("title", "values", "scale", "style"),
    [
        ("Agreement with the teacher, %", AGREEMENT, 100, "line student"),
        ("KL(teacher || student), nats", KL, 1, "line student"),
        ("Accuracy, %", (0.1, 0.2, 0.3), 100, "line student"),
        ("Cosine of each term's gradient to the task's", COSINE, 1, "line term1"),
    ],
)
def test_curves_go_through_their_numbers(drawn, title, values, scale, style):
    found = Drawing(drawn[title]).path(style)
    near(found, [(step, scale * each) for step, each in zip(STEPS, values, strict=True)], 2 * scale)


def test_shares_are_stacked_to_a_hundred(drawn):
    figure = drawn["Shares of the terms in the loss, %"]
    assert figure.legend == (("term0", "task"), ("term1", "kd"))
    chart, shares = Drawing(figure), [100 * share for share in SHARE]
    floor, top = [(step, 0) for step in STEPS], [(step, 100) for step in STEPS]
    middle = list(zip(STEPS, shares, strict=True))
    near(chart.path("band area term0"), middle + floor[::-1], 100)
    near(chart.path("band area term1"), top + middle[::-1], 100)


def test_reliability_is_accuracy_over_confidence_in_each_bin(drawn):
    figure = drawn["Reliability"]
    chart = Drawing(figure)
    near(chart.dots("student"), [(0.4, 0.3), (0.6, 0.0), (0.9, 0.8)], 1)
    # the area of a dot beyond its least radius is its share of the examples; one in 300 is no part of the line
    np.testing.assert_allclose(
        [r for *_, r in chart.dots("student")], 1.5 + 6 * np.sqrt(np.array([100, 1, 199]) / 300), atol=0.06
    )
    near(chart.path("line student"), [(0.4, 0.3), (0.9, 0.8)], 1)
    near(chart.path("line ideal"), [(0, 0), (1, 1)], 1)
    assert [text for _, text in figure.legend] == ["kd, ECE 10.0 %", "control, ECE 10.0 %", "teacher, ECE 10.0 %"]


def test_gains_of_classes_go_by_their_names(drawn):
    figure = drawn["Accuracy of each class, above the control's, points"]
    root = ET.fromstring(figure.drawing)
    titles = [each.find("title").text for each in root.iter("rect")]
    assert titles == ["class ant: +25.0 points", "class bee: -10.0 points", "class a much longer name: +0.0 points"]
    assert [each.get("class") for each in root.iter("rect")] == ["gain", "loss", "gain"]
    assert figure.note == "1 classes better, 1 worse; most: class ant (+25.0), least: class bee (−10.0)"
    # on end where they have no room beside each other, within the drawing
    words = [each for each in root.iter("text") if each.get("transform")]
    assert [each.text for each in words] == list(CLASSES)
    height = float(root.get("viewBox").split()[3])
    assert all(float(each.get("y")) + 6 * len(each.text) < height for each in words)


def table(text):
    """The page's table as lists of words."""
    body = text[text.index("<table>") : text.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [[html.unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_cells_say_what_a_run_costs(group):
    title, *rows = table(report.page([group]))
    cells = {row[0]: dict(zip(title, row, strict=True)) for row in rows}
    assert cells["kd"] == cells["kd"] | {
        "accuracy, %": "80.00",
        "gain": "+10.00",
        "examples/s": "4,321",
        "parameters": "1,234,567",
        "extra": "4,096",
        "FLOPs": "1.25e+12",
        "teacher FLOPs": "6.00e+12",
    }
    assert cells["teacher"]["parameters"] == "9,876,543"
    assert cells["teacher"]["teacher FLOPs"] == ""
    assert [column.title for column in columns([group])] == title[1:]


def test_groups_stand_in_one_table_with_what_they_differ_in(tmp_path):
    folders = [
        experiment(tmp_path / "warm"),
        experiment(tmp_path / "hot", temperature=8.0, accuracy=0.75),
        experiment(tmp_path / "large", batch_size=128, accuracy=0.825),
    ]
    groups = report.compare(report.read(folders))
    text = report.page(groups)
    title, *rows = table(text)
    assert title[:3] == ["run", "*.batch_size", "kd.recipe.temperature"]
    labels = [row[0] for row in rows if len(row) == 1]
    assert labels == list(map(str, folders))
    kd = [row[1 : 3 + 1] for row in rows if row[0] == "kd"]
    assert kd == [["64", "4.0", "80.00"], ["64", "8.0", "75.00"], ["128", "4.0", "82.50"]]
    assert {len(row) for row in rows} == {1, len(title)}
    sections = re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", text, re.S)
    assert [label for label, _ in sections] == labels
    # every group's own charts, its control's and teacher's beside them
    assert [section.count("<figcaption>Reliability</figcaption>") for _, section in sections] == [1, 1, 1]
    accuracy = [
        re.search(r'aria-label="Accuracy, %: teacher 90\.00; kd ([\d.]+); control 70\.00"', each)[1] for _, each in sections
    ]
    assert accuracy == ["80.00", "75.00", "82.50"]
