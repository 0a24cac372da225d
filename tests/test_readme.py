"""Every Python block of the README and of docs/ runs, in order, in one namespace per file; tests/test_pages.py has the rest."""

import importlib.util
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from jkd import configfile
from jkd.cli import main, parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page):
    if page.stem == "equinox":
        pytest.importorskip("equinox")
    namespace: dict = {"__name__": "__readme__"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
        exec(compile(block, f"{page.name} block {number}", "exec"), namespace)
    if page.name == "README.md":
        _check_readme(namespace)


def _check_readme(names: dict) -> None:
    assert names["per_example"].shape == (8,)
    assert names["result"].summary["student"]["accuracy"] > 0.5
    assert int(names["state"].step) == 20
    # the reader's own recipe and own model make a run
    import jax

    import jkd
    from jkd import data, optim

    run = jkd.Run(
        student=names["student"], teacher=names["teacher"], recipe=names["SymmetricKD"](), optimizer=optim.adamw(3e-3),
        data=data.digits(), steps=30,
    )  # fmt: skip
    losses = []

    class Watch(jkd.Listener):
        def stepped(self, name, step, steps, values, examples_per_s):
            losses.append(values["loss"])

    result = jkd.train(run, listener=Watch())
    assert losses[-1] < losses[0]
    assert jax.tree.all(jax.tree.map(lambda leaf: not leaf.is_deleted(), names["teacher"].params))
    assert result.summary["student"]["parameters"] == 64 * 32 + 32 + 32 * 10 + 10


def test_the_first_two_commands_are_the_main_job_and_all_tests():
    commands = re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)[:2]
    assert [command.count("\n") for command in commands] == [0, 0]
    assert commands[0].endswith("jkd train configs/digits.py")
    assert "pytest" in commands[1]


def commands(text: str) -> list[list[str]]:
    """Every ``jkd …`` line of the bash blocks, as arguments; what a shell does behind it is left to the shell."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    split = [shlex.split(re.split(r" [>|] ", line)[0], comments=True) for line in lines if line.startswith("jkd ")]
    return [words[1:] for words in split]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_ones_that_jkd_takes(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text()):
        arguments = parser().parse_args(words)
        if arguments.command in ("recipes", "configs"):
            assert main(words) == 0
            assert capsys.readouterr().out
        elif hasattr(arguments, "sets") and arguments.config in configfile.names():
            configfile.resolve(configfile.load(arguments.config), arguments.sets)  # an unknown name or value raises


def test_the_names_of_a_page_are_there():
    import importlib

    for page in PAGES:
        for module, name in re.findall(r"`(recipes|losses|data|optim|schedules)\.(?!py|md)(\w+)", page.read_text()):
            assert hasattr(importlib.import_module(f"jkd.{module}"), name), f"{page.name}: {module}.{name}"


def test_the_page_of_recipes_is_what_the_catalogue_says():
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_recipes_page", ROOT / "docs" / "recipes.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert (ROOT / "docs" / "recipes.md").read_text() == make.page(), "run: python docs/recipes.py > docs/recipes.md"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_results_are_those_that_were_measured():
    digits = benchmark("digits")
    results = json.loads(digits.RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert digits.written(readme, digits.render(results)) == readme
    # what the main job promises
    accuracy = {name: statistics.mean(s[name]["accuracy"] for s in results["seeds"]) for name in digits.ROWS}
    assert len(results["seeds"]) >= 5
    assert accuracy["student"] - accuracy["control"] >= 0.05
    assert accuracy["teacher"] - accuracy["student"] <= 0.02
    assert results["seeds"][0]["student"]["parameters"] * 20 <= results["seeds"][0]["teacher"]["parameters"]
    runs = configfile.resolve(configfile.load("digits")).nodes
    labelled = {name: run.data.train.columns()["labelled"].mean() for name, run in runs.items()}
    assert labelled["teacher"] == 1
    assert labelled["control"] == labelled["student"] <= 0.1


def test_the_tables_of_benchmarks_are_those_that_were_measured():
    made = benchmark("page")
    page = made.PAGE.read_text()
    assert made.written(page) == page, "run: python benchmarks/page.py --render"


def test_the_page_of_methods_shows_what_was_measured_and_who_loses():
    methods = benchmark("digits_methods")
    results = json.loads(methods.RESULTS.read_text())
    page = methods.PAGE.read_text()
    assert methods.written(page, methods.render(results)) == page
    runs = results["runs"]
    known = set(configfile.resolve(configfile.load("digits_methods")).nodes)
    assert set(runs) == known
    assert {run["seeds"] for run in runs.values()} == {3}
    lost = re.search(r"by more than a deviation: (.*?)\. ", page)[1].split(", ")
    for name in lost:
        gain = runs[name]["metrics"]["gain"]["values"]
        assert statistics.mean(gain) + statistics.stdev(gain) < 0


def test_the_table_of_methods_is_that_of_the_catalogue():
    spec = importlib.util.spec_from_file_location("docs_readme", ROOT / "docs" / "readme.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    readme = (ROOT / "README.md").read_text()
    assert made.written(readme) == readme
