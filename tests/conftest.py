"""Helpers. Each test works in its own empty folder: data/, tokens/ and runs/ are relative."""

import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TESTS_CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts do, before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU's tests; test_cuda.py restores it in subprocesses

def script(name, *args, env={}):
    """`python name args` in this process, which spares the imports; returncode, stdout, stderr."""
    argv, out, err, code = [str(ROOT / name), *map(str, args)], io.StringIO(), io.StringIO(), 0
    with mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", argv), \
            redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

def start(name, *args, env={}, cwd=None):
    """The same in its own process, which can be killed."""
    argv, to = [sys.executable, str(ROOT / name), *map(str, args)], subprocess.PIPE
    return subprocess.Popen(argv, stdout=to, stderr=to, text=True, cwd=cwd, env=os.environ | env)

def refused(process, *words):
    """A user error: exit code 2, one sentence on stderr with these words, no traceback."""
    message = (process.stderr.strip().splitlines() or [""])[-1]
    assert process.returncode == 2 and "Traceback" not in process.stderr, process
    assert message.startswith(("extract.py: ", "probe.py: ", "evaluate.py: ")), message
    assert all(word in message for word in words), (words, message)

@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def write_table(file, header, rows):
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    pathlib.Path(file).write_text("\n".join(lines) + "\n")

def write_dump(folder, tokens, labels, splits, cls=None, paths=None, start=0, **meta):
    """A complete dump, as anybody can write it with np.save."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.asarray(tokens, np.float16))
    np.save(folder / "labels.npy", np.asarray(labels, np.uint8))
    if cls is not None:
        np.save(folder / "cls.npy", np.asarray(cls, np.float16))
    paths = paths or [f"a{i}.wav" for i in range(len(splits))]
    names = [";".join(f"c{j}" for j in np.flatnonzero(row)) for row in labels]
    rows = [(path, start, *row) for path, *row in zip(paths, splits, names)]
    write_table(folder / "clips.csv", "path,start,split,labels", rows)
    (folder / "classes.txt").write_text("".join(f"c{j}\n" for j in range(len(labels[0]))))
    meta = {"task": "multi", "grid": [np.shape(tokens)[1], 1], "seconds": 1, **meta}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder

def damage(file, what):
    """None removes it, a number is added to its size, a dict changes keys; else new content."""
    if what is None:
        file.unlink()
    elif isinstance(what, int):
        os.truncate(file, file.stat().st_size + what)
    elif isinstance(what, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | what))
    elif isinstance(what, np.ndarray):
        np.save(file, what)
    else:
        file.write_bytes(what)

def planted(clips=120, N=12, D=32, C=4, seed=0, strength=3.0, share=0.35):
    """Tokens of noise in which each present class puts its own direction into one random token:
    easy for a maximum over tokens, hard for their mean."""
    rng = np.random.default_rng(seed)
    tokens, labels = rng.standard_normal((clips, N, D)), rng.random((clips, C)) < share
    directions = np.random.default_rng(99).standard_normal((C, D))
    for i, j in zip(*np.nonzero(labels)):
        tokens[i, rng.integers(N)] += strength * directions[j]
    return tokens, labels
