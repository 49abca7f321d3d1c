"""What the README promises: its commands, flags, names and snippets, and the shape of the scripts."""

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script

import evaluate
import extract
import probe

README = (ROOT / "README.md").read_text()
SCRIPTS = {"extract.py": extract, "probe.py": probe, "evaluate.py": evaluate}
LINES = {"extract.py": 1650, "probe.py": 1040, "evaluate.py": 690}  # growth is a decision


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def commands():
    """Every command line of the README's bash blocks, one by one."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split(" #")[0].strip()
            for part in re.split(r"&&|;|\bdo\b", line):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_exists_and_is_documented(name):
    flags = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / name).read_text()))
    used = {w for c in commands() if name in c for w in c if w.startswith("--")}
    assert used and used <= flags | {"--nproc_per_node=8"}, used - flags
    section = README[README.index("## Flags"):]
    for flag in flags:
        assert f"`{flag}" in section, f"{flag} of {name} is not in the README"
    help_text = script(name, "--help").stdout
    assert all(flag in help_text for flag in flags)


def test_names_in_commands_exist():
    datasets = set(extract.read_datasets(ROOT / "datasets.txt")) | {"mine"}
    seen = 0
    for words in commands():
        pairs = dict(zip(words, words[1:]))
        if not set(SCRIPTS) & set(words):
            continue
        seen += 1
        for flag, known in (("--model", set(extract.MODELS) | {"mine", "$model"}),
                            ("--data", datasets | {"$data"}),
                            ("--pool", set(probe.HEADS) | {"all"})):
            if flag in pairs:
                assert set(pairs[flag].split(",")) <= known, words
    assert seen > 10


def test_tables_name_everything():
    for name in [*extract.MODELS, *probe.HEADS, *extract.read_datasets(ROOT / "datasets.txt")]:
        assert f"`{name}`" in README, f"{name} is in no table of the README"


def test_first_commands_show_the_papers_point(tmp_path):
    """The README's first command line after the install, in an empty folder, as processes."""
    first = next(line for block in blocks("bash") for line in block.splitlines()
                 if line.startswith("pip install"))
    install, *parts = [shlex.split(p) for p in first.split("&&")]
    assert install == ["pip", "install", "-r", "requirements.txt"]
    assert [p[1] for p in parts] == ["extract.py", "probe.py", "probe.py", "evaluate.py"]
    for file in (*SCRIPTS, "datasets.txt"):
        shutil.copy(ROOT / file, tmp_path)
    for words in parts:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True,
                              timeout=280)
        assert done.returncode == 0, done.stderr
    assert re.search(r"demo +logmel +protobin", done.stdout)
    rows = {r["head"]: r for r in json.loads(script("evaluate.py", "--format", "json").stdout)}
    assert rows["protobin"]["seeds"] >= 3
    assert rows["protobin"]["score"] > rows["linear"]["score"] + 20
    assert rows["linear"]["score"] > rows["prevalence"]["score"]
    compare = json.loads(script("evaluate.py", "--compare", "protobin", "linear", "--format",
                                "json").stdout)[0]
    assert compare["low"] > 20


def test_method_in_twenty_lines_is_probes():
    """The README's plain protobin and the one in probe.py: same logits, same gradients."""
    source = next(b for b in blocks("python") if "class ProtoBin" in b)
    assert len([x for x in source.splitlines() if x.strip()]) <= 22
    space = {}
    exec(source, space)
    torch.manual_seed(0)
    plain, ours = space["ProtoBin"](64, 5, 4), probe.Prototypes(64, 5, 4)
    ours.load_state_dict(plain.state_dict() | {"score_mean": torch.zeros(20)})
    tokens = torch.randn(3, 30, 64)
    for head in (plain, ours):
        head(tokens).square().sum().backward()
    torch.testing.assert_close(plain(tokens), ours(tokens))
    for a, b in zip(plain.parameters(), ours.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_scoring_snippet(monkeypatch):
    """Load a trained head and score a WAV, as the README shows."""
    for file in (*SCRIPTS, "datasets.txt"):
        shutil.copy(ROOT / file, ".")
    monkeypatch.setattr(extract, "DEMO_SPLITS", {"train": 16, "test": 4})
    extract.make_demo("data/demo")
    assert script("extract.py").returncode == 0
    assert script("probe.py", "--seeds", 1).returncode == 0
    source = next(b for b in blocks("python") if "load_head" in b)
    assert len([x for x in source.splitlines() if x.strip()]) <= 14
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert sorted(names) == sorted(extract.DEMO_CLASSES)


def test_own_tokens_snippet():
    """A dump written with np.save from any encoder goes through probe.py and evaluate.py."""
    source = next(b for b in blocks("python") if "np.save" in b)
    exec(source, {})
    assert script("probe.py", "--seeds", 1).returncode == 0
    assert "protobin" in script("evaluate.py").stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_of_the_script(name):
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for a in node.names} | {node.module.split(".")[0] for node in ast.walk(tree)
                                        if isinstance(node, ast.ImportFrom)}
    assert not imported & {"extract", "probe", "evaluate"} - {name[:-3]}
    assert ("torchaudio" in imported) == (name == "extract.py")
    assert ("torch" in imported) == (name != "evaluate.py")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= LINES[name], f"{name} has {len(lines)} lines"
    assert len(ast.get_docstring(tree).splitlines()) <= 22
    for node in tree.body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef)
                                              and len(node.body) > 12 and node.name != "main"):
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_helpers_that_stand_twice_are_the_same():
    assert len({inspect.getsource(module.Stop) for module in SCRIPTS.values()}) == 1
    assert len({inspect.getsource(module.alone) for module in (extract, probe)}) == 1


def test_constants_say_where_they_come_from():
    """Every number of the first block, and every table of them, carries its source: on its lines, or
    in the comment before or after them."""
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        block = text.split("# constants")[1].split("\nclass ")[0].split("# ------")[0]
        block = "#" + block
        lines, seen = block.splitlines(), 0
        for node in ast.parse(block).body:
            if not isinstance(node, ast.Assign) or not any(
                    isinstance(n, ast.Constant) and isinstance(n.value, (int, float))
                    for n in ast.walk(node.value)):
                continue
            first, last = node.lineno - 1, node.end_lineno
            while lines[first - 1].startswith("#"):
                first -= 1
            while last < len(lines) and re.match(" +#", lines[last]):
                last += 1
            said = "\n".join(lines[first:last])
            assert re.search(r"\[(paper|official code|ours)", said), said
            seen += 1
        assert seen >= 4, (name, seen)
