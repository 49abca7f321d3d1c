"""The scripts are run, never installed: tests import them from the folder above, and each test
works in an empty folder of its own, since data/, tokens/ and runs/ are relative."""

import contextlib
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
import traceback

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is about the CPU

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def script(name, *args, env=None):
    """Run a script as `python name args` would, in this process, which spares the imports;
    returns returncode, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [str(ROOT / name), *map(str, args)])
        for key, value in (env or {}).items():
            patch.setenv(key, value)
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def start(name, *args, env=None, cwd=None):
    """The same in a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd,
                            env={**os.environ, **(env or {})}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def refused(process, *words):
    """A user's mistake: exit code 2, one sentence on stderr with these words, no traceback."""
    message = process.stderr.strip().splitlines()
    assert process.returncode == 2, (process.returncode, process.stdout, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    assert message[-1:] and message[-1].startswith(("extract.py: ", "probe.py: ", "evaluate.py: "))
    for word in words:
        assert word in message[-1], (word, message[-1])


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a simulation of minutes, run with SLOW=1")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_dump(folder, tokens, labels, splits, cls=None, task="multi", grid=None, **meta):
    """A dump as anybody can write it with np.save."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.asarray(tokens, np.float16))
    np.save(folder / "labels.npy", np.asarray(labels, np.uint8))
    if cls is not None:
        np.save(folder / "cls.npy", np.asarray(cls, np.float16))
    rows = ["path,start,split,labels"]
    for i, split in enumerate(splits):
        names = ";".join(f"c{j}" for j in np.flatnonzero(labels[i]))
        rows.append(f"a{i}.wav,0,{split},{names}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("".join(f"c{j}\n" for j in range(len(labels[0]))))
    (folder / "meta.json").write_text(json.dumps(
        {"task": task, "grid": grid or [np.shape(tokens)[1], 1], "complete": True, **meta}))
    return folder


def planted(clips=120, N=12, D=32, C=4, seed=0, strength=3.0, share=0.35):
    """Tokens of noise in which each present class puts its own direction into one random token:
    easy for a maximum over tokens, hard for their mean."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((C, D))
    tokens = rng.standard_normal((clips, N, D))
    labels = rng.random((clips, C)) < share
    for i, j in zip(*np.nonzero(labels)):
        tokens[i, rng.integers(N)] += strength * directions[j]
    return tokens, labels
