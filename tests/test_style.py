"""How the scripts are built: short, standalone, documented."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = "extract.py", "probe.py", "evaluate.py"
LINES = {"extract.py": 1013, "probe.py": 704, "evaluate.py": 500, "README.md": 246}  # never raised
PYTHON = [*SCRIPTS, *(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("*.py")))]
PROSE = ["README.md", "datasets.txt", *(f"tests/{p.name}" for p in ROOT.glob("tests/*.md"))]
TOP = {".ci", ".gitignore", "LICENSE", "requirements.txt", "tests", *SCRIPTS, *PROSE[:2]}
POSIX = {"fcntl", "resource", "pwd", "grp", "termios"}
HOUSE_WORDS = (r"\bmend(s|ed|ing)?\b|\banew\b|\bgoes on\b|\bothers now\b|\bbut for\b"
               r"|\bis there already\b|\bof its own\b|\bnoqa\b")

def read(name):
    return (ROOT / name).read_text(encoding="utf-8")

@pytest.mark.parametrize("name", [*PYTHON, "README.md"])
def test_length_and_width(name):
    lines = read(name).splitlines()
    assert name not in LINES or len(lines) <= LINES[name]
    assert name == "README.md" or max(map(len, lines)) <= 100

@pytest.mark.parametrize("name", [name for name in PYTHON + PROSE if "test_style" not in name])
def test_words(name):
    text = " ".join(re.sub(r"[\n#]", " ", read(name)).split())  # also across line breaks
    assert [match.group() for match in re.finditer(HOUSE_WORDS, text, re.I)] == []

@pytest.mark.parametrize("name", PYTHON)
def test_imports(name):
    nodes = [*ast.walk(ast.parse(read(name)))]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {name.split(".")[0] for name in names}
    assert not modules & POSIX
    if name in SCRIPTS:
        assert not modules & {script[:-3] for script in SCRIPTS}
        assert ("torchaudio" in modules) == (name == "extract.py")
        assert ("torch" in modules) == (name != "evaluate.py")

@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    tree = ast.parse(read(name))
    assert len(ast.get_docstring(tree).splitlines()) <= 20
    for node in ast.walk(tree):
        long = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 20
        if isinstance(node, ast.ClassDef) or long and node.name not in ("__init__", "main"):
            assert ast.get_docstring(node), node.name

def test_stop_is_the_same_in_all_scripts():
    assert len({re.search(r"^class Stop.*?\n\n\n", read(n), re.S | re.M)[0] for n in SCRIPTS}) == 1

@pytest.mark.parametrize("name", SCRIPTS)
def test_constants_name_their_source(name):
    """On the lines of each number or table of numbers, or in the comment around them."""
    lines = ("#" + read(name).split("# ---- constants")[1].split("\nclass Stop")[0]).splitlines()
    numbers = [node for node in ast.parse("\n".join(lines)).body if any(
        isinstance(getattr(part, "value", None), (int, float)) for part in ast.walk(node))]
    assert len(numbers) >= 3
    for node in numbers:
        first, last = node.lineno - 1, node.end_lineno
        while lines[first - 1].startswith("#"):
            first -= 1
        while last < len(lines) and re.match(" +#", lines[last]):
            last += 1
        assert re.search(r"\[(paper|official code|ours)", "\n".join(lines[first:last])), node.lineno

@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_top_level_holds_nothing_else():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {path.split("/")[0] for path in files.split()} == TOP
