"""What the pages say beside their Python, which tests/test_readme.py runs: commands, extras, names, keys."""

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_page_of_commands_is_what_the_parser_says():
    made = script("commands")
    assert page("commands") == made.page(), "run: python docs/commands.py > docs/commands.md"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in made.commands() if f"jkd {name} " not in readme.replace("\n", " ")] == []


def test_the_extras_of_the_quickstart_are_those_that_there_are():
    table = re.search(r"\| extra \|.*?\n\n", page("quickstart"), re.S)[0]
    named = [name for row in table.strip().splitlines()[3:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert sorted(named) == sorted(extras)
    assert all(any(one.startswith("jkd[train]") for one in extras[name]) for name in named if name not in ("train", "docs"))
