"""What the pages say beside their Python, which tests/test_readme.py runs: commands, extras, names, keys."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import jkd
from jkd import configfile
from jkd.cli import main, parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


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


def fences(text):
    """``(label, content)`` of every block."""
    return re.findall(r"^```(.*?)\n(.*?)^```$", text, re.S | re.M)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_says_what_it_is_and_is_that(path):
    for label, content in fences(path.read_text(encoding="utf-8")):
        assert label in ("python", "bash", "console", "yaml"), content
        if label == "console":
            for line in re.findall(r"^\$ jkd (.*)", content, re.M):
                parser().parse_args(shlex.split(line))
        if label == "yaml":
            yaml = pytest.importorskip("yaml")
            assert all(isinstance(part, dict) for part in yaml.safe_load_all(content))


def namespace():
    """What the pages' short names mean."""
    from jkd.losses import chunked
    from jkd.models import generate
    from jkd.recipes import projectors

    return {name: getattr(jkd, name) for name in jkd.__all__} | dict(
        jkd=jkd, chunked=chunked, generate=generate, projectors=projectors
    )


def found(node, names):
    """What a dotted name means; KeyError where it begins with none of jkd's, Attribute- or ImportError where jkd has none."""
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Attribute):
        owner = found(node.value, names)
        if hasattr(owner, "__path__") and not hasattr(owner, node.attr):
            return importlib.import_module(f"{owner.__name__}.{node.attr}")
        return getattr(owner, node.attr)
    raise KeyError(ast.dump(node))


def check(code, names):
    """A bit of Python on a page: its names are jkd's, and its calls are ones that they take. False: nothing in it is jkd's."""
    known = False
    for node in ast.walk(ast.parse(code.replace("…", "..."))):
        try:
            if isinstance(node, ast.Attribute):
                found(node, names)
            elif isinstance(node, ast.Call):
                arguments = {keyword.arg: ... for keyword in node.keywords}
                given = [each for each in node.args if getattr(each, "value", None) is not ...]  # … is whatever stands there
                inspect.signature(found(node.func, names)).bind_partial(*given, **arguments)
            else:
                continue
            known = True
        except KeyError:
            continue
    return known


def snippets(text):
    """Inline code that is Python, outside the blocks; a path is none."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    for code in re.findall(r"`([^`\n]+)`", outside):
        if re.search(r"[(.]", code) and not re.search(r"[\w*…]/[\w*…]|\.(py|md|json|jinja|txt|toml)\b", code):
            try:
                ast.parse(code.replace("…", "..."))
            except SyntaxError:
                continue
            yield code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_says_in_passing_is_there_keyword_arguments_included(path):
    names = namespace()
    if path.stem == "engine":  # there `models` is what a recipe's hooks are given, too
        del names["models"]
    for code in snippets(path.read_text(encoding="utf-8")):
        try:
            check(code, names)
        except (AttributeError, ImportError, TypeError) as error:
            raise AssertionError(f"{path.name}: {code}: {error}") from error


def test_a_name_that_jkd_has_not_is_found_out():
    names = namespace()
    for wrong in ("recipes.KD(temprature=4.0)", "chunked.Js(0.5)", "recipes.KDD", "chunked.JS(0.5, 0.5)", "Run(stepz=…)"):
        with pytest.raises((AttributeError, ImportError, TypeError)):
            check(wrong, names)
    assert not check("teacher.answers(…)", names)


def test_every_row_of_coming_from_leads_to_something():
    names, fields = namespace(), {"student_taps", "teacher_taps", "coef"}
    rows = [row.split(" | ")[1] for row in re.findall(r"^\| (.*?) \|$", page("coming-from"), re.M)]
    assert len(rows) > 30
    for code in (code for row in rows for code in re.findall(r"`([^`]+)`", row)):
        if not code.startswith(("--", "jkd ", "messages", "transformers")):
            assert check(code, names) or re.match(r"\w+", code)[0] in fields | names.keys(), code


@pytest.mark.slow
def test_the_commands_of_the_quickstart_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = [content for label, content in fences(page("quickstart")) if label == "bash" and "jkd train" in content]
    config = (ROOT / "configs" / "digits.py").read_text(encoding="utf-8")
    quick = re.sub(r"models\.resnet\.Config\(.*\)", "models.mlp.Config(features=64, hidden=(64,), classes=10)", config)
    assert quick != config
    Path("digits.py").write_text(quick, encoding="utf-8")
    said, folders = [], []
    for line in block.splitlines():
        words = shlex.split(line.replace("digits-1a2b3c4d", folders[0].name if folders else ""), comments=True)[1:]
        words, into = (words[:-2], words[-1]) if ">" in words else (words, None)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/result.json")}
        if words[0] in ("train", "describe", "data"):
            words = [words[0], "digits.py", *words[2:], "--set", "steps=6"]
        assert main(words) == 0, line
        said.append(capsys.readouterr().out)
        if into:
            Path(into).write_text(said[-1], encoding="utf-8")
        assert all(path.stat().st_mtime_ns == before[path] for path in before), line  # what is finished stays
        folders += sorted(set(tmp_path.glob("runs/*")) - set(folders))
    assert len(folders) == 2
    assert said[0] == said[1] != said[2]  # the same table again; another with another temperature
    assert all("student" in text for text in said[:4])
    assert Path("digits-data.png").exists()
    assert "<svg" in (folders[0] / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in Path("out").iterdir()} == {"card.json", "model.safetensors", "model.stablehlo"}
    assert list(configfile.resolve(configfile.load("mine.py")).nodes) == ["teacher", "control", "student"]
    # the keys of metrics that the page of symptoms names
    lines = (folders[0] / "student" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    named = re.findall(r"`(\w+/[\w/]+|\w+/[\w/]*…)`", page("troubleshooting"))
    assert len(named) >= 6
    for name in named:
        assert any(key == name or (name.endswith("…") and key.startswith(name[:-1])) for key in keys), name
