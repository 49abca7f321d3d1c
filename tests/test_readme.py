"""What the README promises: its commands, flags, names and snippets."""

import ast
import csv
import re
import shlex
import shutil

import demo
import pytest
import torch
from conftest import ROOT, script
import extract
import probe

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = "extract.py", "probe.py", "evaluate.py"
DATASETS = list(extract.read_datasets(ROOT / "datasets.txt"))

def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)

def commands():
    """Every command of the README, in bash blocks and inline, as a list of words."""
    inline = re.findall(r"`([^`\n]*(?:python|pip|torchrun|pytest) [^`\n]*)`", README)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parts = [part for line in lines + inline for part in re.split(r"&&|;|\bdo\b", line)]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]

def snippet(word, most):
    """The one Python block of the README with this word, at most so many lines of code."""
    block, = [block for block in blocks("python") if word in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= most
    return block

@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_exist(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    known = set(re.findall(r'\b(?:flag|add_argument)\("(--[\w-]+)"', source))
    used = {word for words in commands() if name in words
            for word in words[words.index(name):] if word.startswith("--")}
    assert used and used <= known
    shown = script(name, "--help").stdout
    assert all(flag in shown for flag in known)

def test_names_in_commands_exist():
    known = {"--model": set(extract.MODELS), "--data": {"mine", "field", "own", "$data", *DATASETS},
             "--pool": {"all", *probe.HEADS}, "--compare": set(probe.HEADS)}
    seen = []
    for words in commands():
        seen += [name for name in SCRIPTS if name in words]
        for flag, value in zip(words, words[1:]):
            assert flag not in known or set(value.split(",")) <= known[flag], words
    assert len(seen) > 10 and set(seen) == set(SCRIPTS)

@pytest.mark.parametrize("table,names", (
    ("Encoders", extract.MODELS), ("Heads", probe.HEADS), ("Datasets", DATASETS)))
def test_table_names_all_and_no_other(table, names):
    section = README.split(f"\n## {table}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    assert sorted(re.findall(r"`([\w+]+)`", " ".join(rows))) == sorted(names)

@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)(.*?)\)", README))
def test_linked_file_exists(link):
    assert (ROOT / link).is_file()

def test_first_commands_show_the_papers_point(tmp_path):
    shutil.copy(ROOT / "datasets.txt", tmp_path)
    install, *rest = [shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines()]
    assert install == "pip install -r requirements.txt".split()
    assert [words[1] for words in rest] == ["tests/demo.py", *SCRIPTS]
    for _, name, *flags in rest:
        done = script(name, *flags, *["--seeds", 2] * (name == "probe.py"))  # of five: saves time
        assert done.returncode == 0, done.stderr
    printed = README.split("\n```\n```\n")[1].split("\n```")[0]
    assert done.stdout.split()[:27] == printed.split()[:27]  # up to the score of `prevalence`
    table = csv.DictReader(script("evaluate.py", "--format", "csv").stdout.splitlines())
    scores = {row["head"]: float(row["score"]) for row in table}
    assert scores["protobin"] >= scores["linear"] + 20
    assert scores["linear"] > scores["prevalence"]

def test_method_in_twenty_lines_is_probes():
    space = {}
    exec(snippet("class ProtoBin", 20), space)
    torch.manual_seed(0)
    plain, ours = space["ProtoBin"](64, 5, 4), probe.ProtoBin(64, 5, M=4)
    ours.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randn(3, 30, 64)
    for head in (plain, ours):
        head(tokens).square().sum().backward()
    torch.testing.assert_close(plain(tokens), ours(tokens))
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)

def test_trained_head_snippet(tmp_path, capsys):
    shutil.copy(ROOT / "datasets.txt", tmp_path)
    demo.make(splits={"train": 16, "test": 4})
    assert script("extract.py").returncode == script("probe.py", "--seeds", 1).returncode == 0
    exec(snippet("load_head", 12), {})
    scores = ast.literal_eval(capsys.readouterr().out)
    assert len(scores) == 10 and all(0 < score < 1 for score in scores.values())

def test_own_tokens_snippet():
    exec(snippet("np.save", 16), {})
    assert script("probe.py", "--data", "own", "--seeds", 1).returncode == 0
    assert "protobin" in script("evaluate.py", "--data", "own").stdout
