"""Every Python block of the README and of docs/ runs, in order, in one namespace per file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page):
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


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_results_are_those_that_were_measured():
    import importlib.util
    import json
    import statistics

    spec = importlib.util.spec_from_file_location("benchmark_digits", ROOT / "benchmarks" / "digits.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads(benchmark.RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert benchmark.written(readme, benchmark.render(results)) == readme
    # what the main job promises
    accuracy = {name: statistics.mean(s[name]["accuracy"] for s in results["seeds"]) for name in benchmark.ROWS}
    assert len(results["seeds"]) >= 5
    assert accuracy["student"] - accuracy["control"] >= 0.05
    assert accuracy["teacher"] - accuracy["student"] <= 0.02
    assert results["seeds"][0]["student"]["parameters"] * 20 <= results["seeds"][0]["teacher"]["parameters"]
