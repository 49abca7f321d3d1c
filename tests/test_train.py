"""How probe.py trains and tests, the files of a run, and what is refused."""

import copy
import json
import os
import pathlib
import time

import numpy as np
import pytest
import torch
from conftest import damage, planted, refused, script, start, write_dump
from sklearn.metrics import average_precision_score
import probe

TOKENS, LABELS = planted(D=36)                                               # (120, 12, 36)
HALF, SPLITS = TOKENS.astype(np.float16), ["train"] * 60 + ["valid"] * 30 + ["test"] * 30
FILES = {"head.pt", "logits.npy", "rows.npy", "run.json"}
CLS, PLAIN = HALF[:, 0], (TOKENS, LABELS, SPLITS)

def folder(pool="mean", seed=0, root="runs", data="d"):
    return pathlib.Path(root, data, "m", pool, f"seed{seed}")

def info(pool="mean", seed=0):
    return json.loads((folder(pool, seed) / "run.json").read_text())

def made(*args, pool="mean", root="runs", data="d"):
    done = script("probe.py", "--pool", pool, "--data", data, "--seeds", 1, *args)
    assert done.returncode == 0, done.stderr
    return np.load(folder(pool, root=root, data=data) / "logits.npy")

@pytest.mark.parametrize("pool,decayed", [
    *((pool, ["linear.weight"]) for pool in ("linear", "simpool", "protobin")),
    ("proto", ["weight"]), ("mhca", ["linear.weight", "key.weight", "value.weight"])])
def test_training_equals_plain_adamw_with_a_cosine(pool, decayed):
    torch.manual_seed(3)
    tokens, labels = map(torch.tensor, planted(400))
    tokens, cls, rows = tokens.float(), torch.randn(400, 32), torch.arange(0, 400, 2)
    head = probe.HEADS[pool](32, 4, (4, 3), 2)
    plain = copy.deepcopy(head)
    losses, _ = probe.train(head, tokens, cls, labels.float(), rows,
                            {"lr": 0.01, "weight_decay": 0.1, "loss": "asl", "seed": 7})
    params = dict(plain.named_parameters())
    groups = [{"params": [p for key, p in params.items() if (key in decayed) == yes],
               "weight_decay": 0.1 * yes} for yes in (True, False)]
    adamw = torch.optim.AdamW(groups, 0.01, (0.9, 0.95) if pool == "proto" else (0.9, 0.999))
    cosine = torch.optim.lr_scheduler.LambdaLR(adamw, lambda i: (1 + np.cos(np.pi * i / 60)) / 2)
    shuffle, expected = torch.Generator().manual_seed(7), [0] * 30
    for epoch in range(30):
        for part in rows[torch.randperm(200, generator=shuffle)].split(128):
            loss = probe.asymmetric_loss(plain(tokens[part], cls[part]), labels[part])
            expected[epoch] += loss.item() * len(part) / 200
            adamw.zero_grad()
            (loss + (plain.penalty() if pool == "proto" else 0)).backward()
            adamw.step()
            cosine.step()
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for key, p in head.named_parameters():
        torch.testing.assert_close(p, params[key], rtol=0, atol=1e-5)

@pytest.mark.parametrize("given", ("no cls.npy", "mean", "cls"))
@pytest.mark.parametrize("pool", ("linear", "mlp", "mean", "linearc", "linpre"))
def test_training_on_means_equals_training_on_all_tokens(pool, given):
    array = None if given == "no cls.npy" else CLS
    damage(write_dump("tokens/d/m", *PLAIN, array, grid=[4, 3], token_seconds=1) / "meta.json",
           {"cls": given})
    flags = [] if given == "cls" else ["--frames"]  # allowed where a head reads no [cls]
    made("--seeds", 2, *flags, pool=pool)
    logits, x = np.load(folder(pool, 1) / "logits.npy"), torch.from_numpy(HALF).float()
    torch.manual_seed(1)
    head = probe.HEADS[pool](36, 4, (4, 3), 20)
    cls = torch.from_numpy(CLS).float() if given == "cls" else x.mean(1)
    probe.train(head, x, cls, torch.tensor(LABELS).float(), torch.arange(90), info(pool, 1))
    np.testing.assert_allclose(logits, head(x, cls)[90:].detach(), atol=1e-4)

@pytest.mark.parametrize("root,trained", [("runs", "train valid"), ("runs_valid", "train")])
@pytest.mark.parametrize("split", ("train", "valid", "test"))
def test_labels_matter_for_training_clips_only(root, trained, split):
    write_dump("tokens/d/m", *PLAIN)
    write_dump("tokens/e/m", TOKENS, LABELS ^ (np.array(SPLITS) == split)[:, None], SPLITS)
    flags = ["--valid"] * (root == "runs_valid")
    logits, other = (made(*flags, root=root, data=data) for data in "de")
    assert np.array_equal(logits, other) == (split not in trained)
    assert np.load(folder(root=root) / "rows.npy")[0] == (60 if flags else 90)

def test_folds_and_single_labels():
    """Each fold is tested by a head that did not see it, and head.pt holds all heads."""
    fold = np.arange(120) // 5 % 3                                           # of each clip
    for data, kinds in (("d", LABELS.argmax(1)), ("e", (LABELS.argmax(1) + (fold == 2)) % 4)):
        write_dump(f"tokens/{data}/m", TOKENS, np.eye(4)[kinds] > 0, fold, task="single")
    logits, other = (made(pool="protobin", data=data) for data in "de")
    rows = np.load(folder("protobin") / "rows.npy")
    assert np.array_equal((logits == other).all(1), fold[rows] == 2) and len(set(rows)) == 120
    assert info("protobin")["loss"] == "ce" and set(info("protobin")["losses"]) == {*"012"}
    for i in range(3):
        mine = torch.from_numpy(HALF[rows[fold[rows] == i]]).float()
        head = probe.load_head(folder("protobin") / "head.pt", str(i)).requires_grad_(False)
        np.testing.assert_allclose(logits[fold[rows] == i], head(mine), rtol=1e-4, atol=1e-5)

def test_unreadable_clips_are_left_out():
    bad = np.arange(120) % 7 == 3
    write_dump("tokens/d/m", TOKENS[~bad], LABELS[~bad], np.array(SPLITS)[~bad])
    dump = write_dump("tokens/e/m", np.where(bad[:, None, None], np.nan, TOKENS), LABELS, SPLITS)
    np.save(dump / "state.npy", np.where(bad, 2, 1).astype(np.uint8))
    assert np.array_equal(made(pool="protobin"), made(pool="protobin", data="e"))
    assert not bad[np.load(folder("protobin", data="e") / "rows.npy")].any()

def test_every_head_scores_chance_on_permuted_labels():
    tokens, labels = planted(clips=2200, N=6, D=64, C=30, share=0.15, strength=0.8)
    mixed, tested = np.random.default_rng(1).permutation(labels[:800]), labels[800:]
    write_dump("tokens/d/m", tokens, np.r_[mixed, tested], ["train"] * 800 + ["test"] * 1400)
    for pool in probe.HEADS:
        logits = made("--prototypes", 4, pool=pool)
        assert abs(average_precision_score(tested, logits) - tested.mean()) < 0.03, pool
        head = probe.load_head(folder(pool) / "head.pt").requires_grad_(False)
        x = torch.from_numpy(tokens[800:].astype(np.float16)).float()
        np.testing.assert_allclose(logits, head(x), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("pool", ("protobin", "linpre", "simpool"))
def test_files_of_a_run(pool):
    write_dump("tokens/d/m", *PLAIN, cls=CLS, grid=[4, 3], token_seconds=0.3)
    made("--evidence", pool=pool)
    made("--frames", pool=pool)  # and keeps evidence
    found = {path.stem: np.load(path) for path in folder(pool).glob("*.npy")}
    assert {name: (str(a.dtype), a.shape) for name, a in found.items()} == {
        "logits": ("float32", (30, 4)), "rows": ("int64", (30,)),
        "evidence": ("float16", (30, 4, 12)), "frames": ("float16", (30, 4, 4))}
    head = probe.load_head(folder(pool) / "head.pt").requires_grad_(False)
    x = torch.from_numpy(HALF).float()
    assert set(info(pool)) >= set(
        "pool lr weight_decay loss epochs batch prototypes split seed dump tokens_md5 labels_md5 "
        "parameters losses seconds_per_epoch device versions".split())
    assert info(pool)["parameters"] == sum(p.numel() for p in head.parameters())
    np.testing.assert_allclose(found["logits"], head(x[90:]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["evidence"], head.evidence(x[90:]), rtol=1e-3, atol=1e-3)
    for t in range(4):  # the tokens of step t are 3t, 3t + 1 and 3t + 2; a window is 3 steps
        window = x[90:, max(0, 3 * t - 3):3 * t + 6]
        np.testing.assert_allclose(found["frames"][:, t], head(window), rtol=1e-3, atol=1e-3)
    if pool == "protobin":  # its evidence is counted from about the mean score of training
        scores = head.similarity(x[:90])[0]
        assert ((head.score_mean - scores.mean(0)).abs() < 0.3 * scores.std(0)).all()

def test_existing_runs_are_kept_and_other_settings_refused():
    dump = write_dump("tokens/d/m", *PLAIN)
    first, before = made("--seeds", 2), os.stat(folder() / "run.json").st_mtime_ns
    assert np.array_equal(made(), first)
    assert os.stat(folder() / "run.json").st_mtime_ns == before
    refused(script("probe.py", "--pool", "mean", "--lr", 0.5), "lr", "--overwrite")
    assert not np.array_equal(made("--lr", 0.5, "--overwrite"), first) and info()["lr"] == 0.5
    assert np.array_equal(made("--overwrite"), first)  # the same seed, the same bits
    assert not np.array_equal(np.load(folder(seed=1) / "logits.npy"), first)
    for file, array in (("tokens", HALF), ("labels", LABELS.astype(np.uint8))):
        np.save(dump / f"{file}.npy", array[::-1])
        refused(script("probe.py", "--pool", "mean"), f"{file}_md5")
        np.save(dump / f"{file}.npy", array)

def test_killed_run_leaves_nothing_that_looks_like_one():
    write_dump("tokens/as20k/m", *PLAIN)
    job, run = start("probe.py", "--prototypes", 5000), folder("protobin", data="as20k")
    while not list(run.parent.glob(".seed0*")):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.02)
    job.kill()
    job.communicate()
    assert not run.exists()
    os.rename(run.with_name(f".seed0.{job.pid}"), run.with_name(f".seed0.{os.getpid()}"))
    made(pool="protobin", data="as20k")  # as if the next process had the same number
    assert set(os.listdir(run)) == FILES and os.listdir(run.parent) == ["seed0"]
    assert probe.load_head(run / "head.pt").prototypes.shape == (10 * 4, 36)  # 10 a class for as20k

def test_two_processes_make_the_same_run():
    write_dump("tokens/d/m", *PLAIN)
    jobs = [start("probe.py", "--seeds", 1) for _ in range(2)]
    assert 0 in [job.wait() for job in jobs]
    assert set(os.listdir(folder("protobin"))) == FILES

@pytest.mark.parametrize("args,rows,word", [
    (["--pool", "protobni"], [], "protobni"), (["--data", "x"], [], "tokens/x"),
    (["--runs", "tokens/d/m/meta.json"], [], "meta.json"), (["--device", "cuda"], [], "--device"),
    (["--pool", "mlp", "--lr", 1e30], [], "loss"), ([], [3], "loss"), ([], [95], "row 95"),
    *(([flag, -1], [], flag) for flag in ("--seeds", "--lr", "--prototypes", "--decay")),
    (["--seeds", 0], [], "--seeds"), (["--pool", "ep,mean"], [], "ep seed 0"),  # mean still runs
    *((["--pool", pool, flag], [], "[cls]") for pool in ("linear", "mlp", "linearc")
      for flag in ("--evidence", "--frames"))])
def test_wrong_arguments_and_tokens_that_are_not_finite(args, rows, word):
    tokens = TOKENS.copy()
    tokens[rows, 0, 0] = np.nan
    write_dump("tokens/d/m", tokens, LABELS, SPLITS, cls=CLS)
    refused(script("probe.py", "--seeds", 1, *args), word)
    assert [*pathlib.Path().rglob("*seed*")] == [folder()] * ("ep,mean" in args)

@pytest.mark.parametrize("file,content,word", [
    ("meta.json", {"grid": [5, 2]}, "tokens.npy"), ("meta.json", {"grid": [12.0, 1]}, "int"),
    ("meta.json", {"grid": [-12, -1]}, "grid"), ("cls.npy", CLS.astype(str), "cls"),
    ("meta.json", {"task": "single"}, "task"),
    ("meta.json", b'{"grid": [12, 1]}', "task"), ("meta.json", b'{"task": "multi"}', "grid"),
    ("meta.json", b"{", "d/m"), ("meta.json", None, "no dump"), ("tokens.npy", TOKENS, "float16"),
    ("tokens.npy", HALF[1:], "tokens"), ("tokens.npy", None, "tokens"), ("tokens.npy", -2, "d/m"),
    ("labels.npy", LABELS[1:], "labels"), ("labels.npy", 0.7 * LABELS, "labels"),
    ("cls.npy", CLS[1:], "cls"),
    ("state.npy", np.arange(120), "extract.py"), ("state.npy", np.ones(3), "extract.py"),
    ("state.npy", np.repeat([1, 2], [90, 30]), "train valid;"),  # no clip to test is readable
    ("classes.txt", b"c0\nc1\nc2\n", "labels.npy"), ("classes.txt", None, "classes.txt"),
    ("clips.csv", b"path,start\n" + 120 * b"a,0\n", "split"),
    ("clips.csv", b"path,start,split\n" + 60 * b"a,0,Train\n" + 60 * b"b,0,Test\n", "Train")])
def test_damaged_dump(file, content, word):
    damage(write_dump("tokens/d/m", *PLAIN, cls=CLS) / file, content)
    refused(script("probe.py"), word)
