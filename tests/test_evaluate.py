"""evaluate.py: metrics against scikit-learn, intervals against theory and simulation, tables and
their formats, broken runs, localisation and pictures."""

import csv
import io
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import ROOT, refused, script, write_dump
from sklearn.metrics import (accuracy_score, average_precision_score, balanced_accuracy_score,
                             roc_auc_score)

import evaluate

CLIPS = "as many, md5 of the clips"


def dump(data, labels, task="multi", model="eat", paths=None, starts=None, grid=(1, 1), events=None,
         **meta):
    """A dump whose clips are all tested; paths and starts replace a<i>.wav and 0."""
    n = len(labels)
    folder = write_dump(f"tokens/{data}/{model}", np.zeros((n, grid[0] * grid[1], 1)), labels,
                        ["test"] * n, task=task, grid=list(grid), **{"clips": CLIPS} | meta)
    if paths or starts:
        with open(folder / "clips.csv", "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(("path", "start", "split", "labels"))
            for i in range(n):
                table.writerow((paths[i] if paths else f"a{i}.wav", starts[i] if starts else 0,
                                "test", ";".join(f"c{j}" for j in np.flatnonzero(labels[i]))))
    if events is not None:
        with open(folder / "events.csv", "w", newline="") as f:
            csv.writer(f).writerows([("path", "onset", "offset", "label"), *events])
    return folder


def run(data, pool, logits, seed=0, rows=None, model="eat", evidence=None, **info):
    folder = pathlib.Path(f"runs/{data}/{model}/{pool}/seed{seed}")
    folder.mkdir(parents=True)
    np.save(folder / "logits.npy", np.asarray(logits, np.float32))
    np.save(folder / "rows.npy", np.arange(len(logits)) if rows is None else np.asarray(rows))
    if evidence is not None:
        np.save(folder / "evidence.npy", np.asarray(evidence, np.float16))
    (folder / "run.json").write_text(json.dumps(
        {"pool": pool, "seed": seed, "dump": {"clips": CLIPS}, **info}))
    return folder


def multi(n=40, C=5, seed=0):
    """labels bool and logits float32 that know something; the last class is absent."""
    rng = np.random.RandomState(seed)
    labels = rng.rand(n, C) < 0.3
    labels[:, -1] = False
    labels[:C - 1] |= np.eye(C, dtype=bool)[:-1]
    return labels, (rng.randn(n, C) + 1.5 * labels).astype(np.float32)


def rows_of(*args):
    done = script("evaluate.py", *args, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------
# metrics

def one_class(kind, rng, n=60):
    """labels bool (n,) and scores float32 (n,) of one class."""
    labels, scores = rng.rand(n) < 0.3, rng.randn(n)
    labels[0], labels[1] = True, False
    if kind == "heavy ties":
        scores = np.round(scores)
    elif kind == "all tied":
        scores[:] = 0.25
    elif kind == "signed zeros":
        scores = rng.choice([0.0, -0.0, 1.0], n)
    elif kind == "one positive":
        labels[:] = False
        labels[rng.randint(n)] = True
    elif kind == "all positive":
        labels[:] = True
    elif kind == "perfect":
        scores = labels + 0.1 * rng.rand(n)
    elif kind == "inverted":
        scores = 0.1 * rng.rand(n) - labels
    elif kind == "huge and tiny":
        scores = scores * 10.0 ** rng.randint(-38, 38, n)
    return labels, scores.astype(np.float32)


KINDS = ["random", "heavy ties", "all tied", "signed zeros", "one positive", "all positive",
         "perfect", "inverted", "huge and tiny"]


@pytest.mark.parametrize("kind", KINDS)
def test_average_precision_is_scikit_learns(kind):
    rng = np.random.RandomState(1)
    for _ in range(20):
        labels, scores = one_class(kind, rng)
        np.testing.assert_allclose(evaluate.average_precision(labels, scores),
                                   [average_precision_score(labels, scores)], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetition(kind):
    """A column of weights = the clips repeated so often = scikit-learn's sample_weight."""
    rng = np.random.RandomState(2)
    labels, scores = one_class(kind, rng)
    weights = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), 30).T
    ours = evaluate.average_precision(labels, scores, weights.astype(np.float32))
    for r in range(30):
        again = np.repeat(np.arange(len(labels)), weights[:, r])
        if not labels[again].any():
            assert np.isnan(ours[r])
            continue
        assert abs(ours[r] - average_precision_score(labels[again], scores[again])) < 1e-9
        assert abs(ours[r] - average_precision_score(
            labels, scores, sample_weight=weights[:, r])) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_fractional_weights(kind):
    rng = np.random.RandomState(3)
    labels, scores = one_class(kind, rng)
    weights = rng.rand(len(labels), 5)
    np.testing.assert_allclose(evaluate.average_precision(labels, scores, weights), [
        average_precision_score(labels, scores, sample_weight=w) for w in weights.T], atol=1e-9)


def test_absent_class_has_no_average_precision():
    """scikit-learn says 0, which would pull the mean down; we leave the class out."""
    assert np.isnan(evaluate.average_precision(np.zeros(5, bool), np.arange(5.0))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_auroc_is_scikit_learns(kind):
    rng = np.random.RandomState(4)
    for _ in range(20):
        labels, scores = one_class(kind, rng)
        if labels.all():
            assert np.isnan(evaluate.auroc(labels, scores))
            assert np.isnan(evaluate.auroc(~labels, scores))
        else:
            assert abs(evaluate.auroc(labels, scores) - roc_auc_score(labels, scores)) < 1e-9


@pytest.mark.parametrize("decimals", [6, 0])
def test_multi_label_metrics(decimals):
    labels, logits = multi(200, 12)
    logits = np.round(logits, decimals)
    ours, present = evaluate.metrics("multi", labels, logits), labels.any(0)
    assert list(ours) == ["macro mAP", "micro mAP", "AUROC", "d'"] and not present.all()
    expected = [100 * average_precision_score(labels[:, present], logits[:, present]),
                100 * average_precision_score(labels, logits, average="micro"),
                100 * roc_auc_score(labels[:, present], logits[:, present])]
    np.testing.assert_allclose(list(ours.values())[:3], expected, atol=1e-9)
    d = math.sqrt(2) * statistics.NormalDist().inv_cdf(expected[2] / 100)
    assert abs(ours["d'"] - d) < 1e-9


def test_d_prime_is_the_distance_of_two_gaussians():
    rng = np.random.RandomState(5)
    labels = rng.rand(200_000, 1) < 0.3
    noise = rng.randn(200_000, 1)
    for distance in (-0.7, 0, 1.5):
        logits = noise + distance * labels
        assert abs(evaluate.metrics("multi", labels, logits)["d'"] - distance) < 0.03
    assert 8 < evaluate.metrics("multi", labels, 1.0 * labels)["d'"] < 9  # perfect, yet finite


def test_single_label_metrics():
    rng = np.random.RandomState(6)
    truth = rng.choice([0, 1, 3], 150, p=[0.7, 0.2, 0.1])  # class 2 never occurs
    logits = rng.randn(150, 4)
    logits[np.arange(150), truth] += 0.8
    labels, guess = np.eye(4, dtype=bool)[truth], logits.argmax(1)
    ours = evaluate.metrics("single", labels, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that class 2 is guessed and never occurs
        balanced = balanced_accuracy_score(truth, guess)
    assert list(ours) == ["accuracy", "macro accuracy"]
    np.testing.assert_allclose(list(ours.values()), [100 * accuracy_score(truth, guess),
                                                     100 * balanced], atol=1e-9)


@pytest.mark.parametrize("task", ["multi", "single"])
def test_main_metric_is_that_of_the_clips_drawn(task):
    labels, logits = multi(80, 6)
    if task == "single":
        labels = np.eye(6, dtype=bool)[np.random.RandomState(0).randint(0, 5, 80)]
    weights = evaluate.resamples(np.arange(80), 12)
    ours = evaluate.main_metric(task, labels, logits, weights)
    for r in range(12):
        drawn = weights[:, r] > 0
        theirs = next(iter(evaluate.metrics(task, labels[drawn], logits[drawn]).values()))
        assert abs(ours[r] - theirs) < 1e-4  # accuracy is summed in float32
    every = evaluate.main_metric(task, labels, logits, np.ones((80, 1), np.float32))
    assert abs(every[0] - next(iter(evaluate.metrics(task, labels, logits).values()))) < 1e-4


def test_many_classes_and_resamples():
    """The vectorised path beside the plain one, at AudioSet's prevalences."""
    rng = np.random.RandomState(7)
    prevalence = np.exp(rng.uniform(np.log(0.001), np.log(0.05), 60))
    labels = rng.rand(3000, 60) < prevalence
    logits = (rng.randn(3000, 60) + 2 * labels).astype(np.float32)
    weights = evaluate.resamples(np.arange(3000), 20)
    ours = evaluate.main_metric("multi", labels, logits, weights)
    for r in range(3):
        plain = [average_precision_score(labels[:, j], logits[:, j], sample_weight=weights[:, r])
                 for j in range(60) if labels[weights[:, r] > 0, j].any()]
        assert abs(ours[r] - 100 * np.mean(plain)) < 1e-7


# ---------------------------------------------------------------------------------------------
# intervals

def test_resamples_are_halves():
    weights = evaluate.resamples(np.arange(100), 400)
    assert weights.dtype == np.float32 and set(np.unique(weights)) == {0, 1}
    assert (weights.sum(0) == 50).all()
    assert np.abs(weights.mean(1) - 0.5).max() < 0.12       # each clip about as often
    assert len(np.unique(weights, axis=1).T) == 400         # all different
    assert np.abs(np.corrcoef(weights)[np.triu_indices(100, 1)].mean() + 1 / 99) < 0.005


def test_resamples_draw_whole_recordings():
    paths = np.array(["a", "b", "a", "c", "d", "c", "c", "a"])
    weights = evaluate.resamples(paths, 50)
    for path in "abcd":
        assert (weights[paths == path] == weights[paths == path][0]).all()
    drawn = np.array([weights[paths == path][0] for path in "abcd"])
    assert (drawn.sum(0) == 2).all()
    shuffled = np.random.RandomState(0).permutation(8)
    assert (evaluate.resamples(paths[shuffled], 50) == weights[shuffled]).all()


def test_one_recording_has_no_interval():
    labels, logits = multi(6)
    dump("hsn", labels, paths=["one.wav"] * 6, starts=[5 * i for i in range(6)])
    run("hsn", "mean", logits)
    row = rows_of()[1]
    assert row["low"] is None and row["high"] is None and row["score"] > 0
    assert "95 %" not in script("evaluate.py").stdout


def test_recordings_widen_the_interval():
    """Ten copies of a clip are one clip: the interval is that of the recordings."""
    labels, logits = multi(40)
    again = np.repeat(np.arange(40), 10)
    dump("once", labels)
    dump("ten", labels[again], paths=[f"a{i}.wav" for i in again])
    dump("apart", labels[again])
    run("once", "mean", logits)
    for data in ("ten", "apart"):
        run(data, "mean", logits[again])
    width = {r["data"]: r["high"] - r["low"] for r in rows_of() if r["head"] == "mean"}
    assert 0.8 < width["ten"] / width["once"] < 1.25 and width["apart"] < 0.5 * width["once"]


def test_interval_formula():
    draws = np.array([50.0, 52.0, 54.0, np.nan])
    deviation = math.sqrt(8 / 3)
    low, high = evaluate.interval(51.0, draws)  # halves lie 1 above: so does the score, probably
    assert abs(low - (50 - 2.15 * deviation)) < 1e-12
    assert abs(high - (50 + 2.15 * deviation)) < 1e-12
    assert np.isnan(evaluate.interval(51.0, draws[2:])).all()


def test_interval_of_accuracy_is_the_textbooks():
    """For a mean, halves must give back sqrt(p (1 - p) / n)."""
    n = 400
    truth = np.zeros(n, int)
    logits = np.eye(2)[(np.arange(n) < 80).astype(int)]     # 80 % right
    low, high = evaluate.interval(80.0, evaluate.main_metric(
        "single", np.eye(2, dtype=bool)[truth], logits, evaluate.resamples(np.arange(n), 4000)))
    assert abs((low + high) / 2 - 80) < 0.2
    assert abs((high - low) / 4.3 / (100 * math.sqrt(0.8 * 0.2 / (n - 1))) - 1) < 0.04


@pytest.mark.parametrize("right", [40, 39, 1, 0])
def test_intervals_stay_within_0_and_100(right):
    dump("demo", np.eye(2, dtype=bool)[np.zeros(40, int)], task="single")
    run("demo", "mean", np.eye(2)[(np.arange(40) >= right).astype(int)])
    row = rows_of()[1]
    assert row["score"] == 100 * right / 40
    assert row["low"] == 0 if right <= 1 else 80 < row["low"]
    assert row["high"] == 100 if right >= 39 else row["high"] < 20


def test_fewer_resamples_where_it_would_take_long(monkeypatch):
    big = {"labels": np.empty((20_000, 527), bool), "paths": np.arange(20_000)}
    monkeypatch.setattr(evaluate, "resamples", lambda paths, number: number)
    assert evaluate.halves({"labels": np.empty((300, 10), bool), "paths": None}, 5, 1000) == 1000
    assert 200 <= evaluate.halves(big, 5, 1000) < 400
    assert evaluate.halves(big, 100, 1000) == 100
    assert evaluate.halves(big, 100, 20) == 20


def population(prevalence, distance):
    """Macro mAP in percent of Gaussian scores, N(distance, 1) where the class is, N(0, 1) where
    not, with endlessly many clips: the integral of precision over recall."""
    t = np.linspace(-8, 12, 4001)
    tail = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in t])
    total = 0
    for p, d in zip(prevalence, distance):
        above = np.array([math.erfc((x - d) / math.sqrt(2)) / 2 for x in t])
        precision = p * above / np.maximum(p * above + (1 - p) * tail, 1e-300)
        total += np.sum((precision[1:] + precision[:-1]) / 2 * -np.diff(above))
    return 100 * total / len(prevalence)


def simulate(rng, n, prevalence, distance):
    labels = rng.random((n, len(prevalence))) < prevalence
    return labels, (rng.standard_normal(labels.shape) + distance * labels).astype(np.float32)


def test_population_is_what_many_clips_give():
    args = np.array([0.05, 0.3]), np.array([2.0, 1.0])
    labels, logits = simulate(np.random.default_rng(0), 400_000, *args)
    assert abs(evaluate.metrics("multi", labels, logits)["macro mAP"] - population(*args)) < 0.3


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="SLOW=1 runs it (3 minutes)")
@pytest.mark.parametrize("n, repetitions", [(300, 2000), (1000, 1000)])
def test_coverage(n, repetitions):
    """The 95 % interval holds the population's macro mAP in 93-97 % of all test sets; with 300
    clips the rarest class has six positives. The usual bootstrap does not."""
    prevalence = np.geomspace(0.02, 0.30, 10)
    distance = np.random.default_rng(5).permutation(np.linspace(0.5, 2.5, 10))
    true, rng = population(prevalence, distance), np.random.default_rng(n)
    halves = evaluate.resamples(np.arange(n), 400)
    repeated = rng.multinomial(n, np.full(n, 1 / n), 400).T.astype(np.float32)
    weights = np.hstack([np.ones((n, 1), np.float32), halves, repeated])
    inside, width = np.zeros(3), np.zeros(3)
    for _ in range(repetitions):
        labels, logits = simulate(rng, n, prevalence, distance)
        score, *draws = evaluate.main_metric("multi", labels, logits, weights)
        a, b = np.quantile(draws[400:], [0.025, 0.975])
        for i, (low, high) in enumerate((evaluate.interval(score, np.array(draws[:400])),
                                         (2 * score - b, 2 * score - a), (a, b))):
            inside[i] += low <= true <= high
            width[i] += high - low
    (ours, basic, percentile), width = inside / repetitions, width / repetitions
    print(f"\n{n} clips, macro mAP {true:.2f}, {repetitions} test sets: halves {ours:.1%} (width "
          f"{width[0]:.1f}), bootstrap: basic {basic:.1%} ({width[1]:.1f}), percentile "
          f"{percentile:.1%} ({width[2]:.1f})")
    assert 0.93 <= ours <= 0.97
    assert percentile < basic < ours


# ---------------------------------------------------------------------------------------------
# the paper's numbers

def test_paper_cells():
    paper = evaluate.cells(evaluate.PAPER)
    models, data = "amae asit dasheng beats eat sslam".split(), "as20k fsd50k desed spass urban"

    def mean(head, *sets):
        return np.mean([paper[d, m, head] for d in sets for m in models])
    everywhere = data.split()
    assert round(mean("protobin", *everywhere) - mean("linear", *everywhere), 2) == 14.41
    assert round(mean("protobin", *everywhere) - mean("mhca", *everywhere), 2) == 3.31
    columns = {"as20k": (17.79, 22.62, 27.89), "fsd50k": (36.12, 48.57, 54.10),
               "desed": (70.83, 84.33, 86.64), "spass": (67.18, 81.18, 82.16),
               "urban": (73.67, 84.35, 86.84)}
    for d, means in columns.items():
        for head, value in zip(("linear", "mhca", "protobin"), means):
            assert abs(mean(head, d) - value) < 0.006, (d, head)
    linear, ours, tuned = (paper["as20k", "eat", h] for h in ("linear", "protobin", "fine-tune"))
    assert round(100 * (ours - linear) / (tuned - linear), 1) == 62.8
    assert len(paper) == 144
    assert paper["esc50", "eat", "mhca"] == 89.83 and paper["sc2", "sslam", "protobin"] == 91.9
    assert paper["urban", "eat", "protofloat"] == 89.14
    assert paper["desed", "beats", "proto"] == 89.04


def test_rerun_cells():
    rerun = evaluate.cells(evaluate.RERUN)
    assert len(rerun) == 40
    assert rerun["as20k", "eat", "protobin"] == 32.87 and rerun["hsn", "beats", "linear"] == 5.33


def test_a_run_of_a_known_cell_shows_it():
    labels, logits = multi()
    for data in ("as20k", "other"):
        dump(data, labels)
        run(data, "protobin", logits)
    rows = {(r["data"], r["head"]): r for r in rows_of()}
    row = rows["as20k", "protobin"]
    assert row["paper"] == 31.67 and row["re-run"] == 32.87
    assert abs(row["difference"] - (row["score"] - 31.67)) < 1e-9
    assert rows["as20k", "fine-tune"]["paper"] == 40.2
    assert rows["other", "protobin"]["paper"] is None and ("other", "fine-tune") not in rows
    assert "digest" in script("evaluate.py").stdout
    assert "digest" not in script("evaluate.py", "--data", "other").stdout


# ---------------------------------------------------------------------------------------------
# tables

def small_set():
    """as20k: three seeds of protobin, one of linear; esc50, single: two seeds of mean."""
    labels, _ = multi(40, 5)
    dump("as20k", labels)
    cost = {"parameters": 12345, "seconds_per_epoch": 0.25, "peak_memory_bytes": 2.5e9}
    for seed in range(3):
        noise = np.random.RandomState(seed).randn(40, 5)
        run("as20k", "protobin", noise + 2.5 * labels, seed, **cost)
    run("as20k", "linear", np.random.RandomState(9).randn(40, 5) + 1.0 * labels, **cost)
    truth = np.eye(4, dtype=bool)[np.random.RandomState(3).randint(0, 3, 30)]
    dump("esc50", truth, task="single", model="beats")
    for seed in range(2):
        run("esc50", "mean", np.random.RandomState(seed).randn(30, 4) + 2 * truth, seed,
            model="beats", **cost | {"parameters": 77})


GOLDEN = """\
data   model  head            metric     scored  score  seeds  +- sd   95 % interval  micro mAP  AUROC    d'  macro accuracy  parameters  s/epoch  peak GB  paper  difference  re-run
as20k  eat    prevalence      macro mAP  4/5     30.63
as20k  eat    linear          macro mAP  4/5     62.63      1         [47.61, 74.26]      50.97  71.53  0.80                      12,345     0.25     2.50  17.29      +45.34   21.60
as20k  eat    protobin        macro mAP  4/5     94.06      3   3.22  [89.83, 97.77]      91.30  97.09  2.74                      12,345     0.25     2.50  31.67      +62.39   32.87
as20k  eat    fine-tune       macro mAP  4/5                                                                                                                40.20
esc50  beats  majority class  accuracy   3/4     36.67
esc50  beats  mean            accuracy   3/4     78.33      2   2.36  [65.63, 90.86]                                   78.20          77     0.25     2.50
esc50  beats  fine-tune       accuracy   3/4                                                                                                                95.60

paper: from third-party digests of it, not read in the paper itself
re-run: by a co-author, with another loss and other features (arXiv 2602.16305, table 5)
"""


def test_golden_table():
    small_set()
    assert script("evaluate.py").stdout == GOLDEN


def test_formats_hold_the_same_numbers():
    small_set()
    rows = rows_of()
    assert [list(row) for row in rows] == [evaluate.COLUMNS] * len(rows)
    table = list(csv.DictReader(io.StringIO(script("evaluate.py", "--format", "csv").stdout)))
    assert list(table[0]) == evaluate.COLUMNS
    for row, texts in zip(rows, table, strict=True):
        for name, value in row.items():
            if value is None or isinstance(value, str):
                assert texts[name] == (value or "")
            else:
                assert float(texts[name]) == value
    lines = script("evaluate.py", "--format", "md").stdout.split("\n\n")[0].splitlines()
    head, rule, *body = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    assert len(head) == len(rule) == len(set(head)) and set("".join(rule)) == {"-", ":"}
    for row, cells in zip(rows, body, strict=True):
        cells = dict(zip(head, cells, strict=True))
        for name in ("score", "paper", "AUROC", "accuracy"):
            if row.get(name) is not None:
                assert cells[name] == f"{row[name]:.2f}"
        if row["low"] is not None:
            assert cells["95 % interval"] == f"[{row['low']:.2f}, {row['high']:.2f}]"


@pytest.mark.parametrize("data", ["as20k", "esc50"])
def test_columns_do_not_depend_on_the_runs(data):
    small_set()
    out = script("evaluate.py", "--format", "csv", "--data", data).stdout
    assert out.splitlines()[0].split(",") == evaluate.COLUMNS


def test_numbers_of_the_table():
    small_set()
    rows = {(r["data"], r["head"]): r for r in rows_of()}
    labels, _ = multi(40, 5)
    scores = [100 * average_precision_score(labels[:, :4], np.load(
        f"runs/as20k/eat/protobin/seed{k}/logits.npy")[:, :4]) for k in range(3)]
    row = rows["as20k", "protobin"]
    assert abs(row["score"] - np.mean(scores)) < 1e-9
    assert abs(row["sd"] - statistics.stdev(scores)) < 1e-9
    assert row["scored"] == "4/5" and row["seeds"] == 3 and row["resamples"] == 1000
    assert (row["parameters"], row["s/epoch"], row["peak GB"]) == (12345, 0.25, 2.5)
    assert rows["as20k", "linear"]["sd"] is None
    constant = 100 * average_precision_score(labels[:, :4], np.zeros((40, 4)))
    assert abs(rows["as20k", "prevalence"]["score"] - constant) < 1e-9
    truth = np.load("tokens/esc50/beats/labels.npy").argmax(1)
    majority = 100 * np.mean(truth == np.bincount(truth).argmax())
    assert abs(rows["esc50", "majority class"]["score"] - majority) < 1e-9


def test_order_of_rows_does_not_matter():
    labels, logits = multi()
    dump("demo", labels)
    shuffled = np.random.RandomState(0).permutation(len(labels))
    run("demo", "a", logits)
    run("demo", "b", logits[shuffled], rows=shuffled)
    a, b = ({k: v for k, v in row.items() if k != "head"} for row in rows_of()[1:])
    assert a == b
    row, = rows_of("--compare", "a", "b")
    assert row["difference"] == row["low"] == row["high"] == 0


def test_only_tested_rows_are_scored():
    labels, logits = multi(60)
    dump("demo", labels)
    run("demo", "mean", logits[40:], rows=range(40, 60))
    present = labels[40:].any(0)
    expected = 100 * average_precision_score(labels[40:, present], logits[40:, present])
    row = rows_of()[1]
    assert abs(row["score"] - expected) < 1e-9 and row["scored"] == f"{present.sum()}/5"


def test_birdset_calls_it_cmap():
    labels, logits = multi()
    for data in ("hsn", "desed"):
        dump(data, labels)
        run(data, "mean", logits)
    assert {r["data"]: r["metric"] for r in rows_of()} == {"hsn": "cmAP (= macro mAP)",
                                                           "desed": "macro mAP"}


@pytest.mark.parametrize("task", ["multi", "single"])
def test_class_table(task):
    labels, logits = multi()
    if task == "single":
        labels = np.eye(5, dtype=bool)[np.random.RandomState(0).choice(4, 40, p=[.1, .2, .3, .4])]
    dump("demo", labels, task=task, names={"c1": "Bark, dog"})
    for seed, sign in enumerate((1, -1)):
        run("demo", "mean", sign * logits, seed)
    rows = rows_of("--classes")
    assert list(rows[0]) == ["data", "model", "class", "positives", "mean"]
    counts = [r["positives"] for r in rows]
    assert counts == sorted(labels.sum(0), reverse=True) and counts[-1] == 0
    for row in rows:
        j = 1 if row["class"] == "Bark, dog" else int(row["class"][1:])
        assert row["positives"] == labels[:, j].sum()
        if not labels[:, j].any():
            assert row["mean"] is None
        elif task == "multi":
            both = [average_precision_score(labels[:, j], x[:, j]) for x in (logits, -logits)]
            assert abs(row["mean"] - 100 * np.mean(both)) < 1e-9
        else:
            both = [np.mean(x[labels[:, j]].argmax(1) == j) for x in (logits, -logits)]
            assert abs(row["mean"] - 100 * np.mean(both)) < 1e-9


def test_compare():
    """The difference, and its interval from the same halves for both heads."""
    labels, one = multi()
    two = (one + np.random.RandomState(8).randn(*one.shape)).astype(np.float32)
    dump("demo", labels)
    dump("other", labels)  # has one of the two heads: not in the table
    run("demo", "one", one)
    run("other", "one", one)
    for seed in range(2):
        run("demo", "two", two + seed * one, seed)
    row, = rows_of("--compare", "one", "two", "--resamples", "40")
    weights = evaluate.resamples(np.sort([f"a{i}.wav" for i in range(40)]), 40)
    order = np.argsort([f"a{i}.wav" for i in range(40)])

    def macro(logits, drawn):
        there = labels[drawn].any(0)
        return 100 * average_precision_score(labels[drawn][:, there], logits[drawn][:, there])
    draws = []
    for column in [np.ones(40), *weights.T]:
        drawn = order[column > 0]
        draws.append(macro(one, drawn) - np.mean([macro(two + k * one, drawn) for k in (0, 1)]))
    low, high = evaluate.interval(draws[0], np.array(draws[1:]))
    assert abs(row["difference"] - draws[0]) < 1e-9 and row["seeds"] == "1, 2"
    assert abs(row["first"] - row["second"] - row["difference"]) < 1e-9
    assert abs(row["low"] - low) < 1e-6 and abs(row["high"] - high) < 1e-6
    back, = rows_of("--compare", "two", "one", "--resamples", "40")
    assert abs(back["difference"] + row["difference"]) < 1e-9
    assert abs(back["low"] + row["high"]) < 1e-9


def test_a_head_does_not_differ_from_itself():
    labels, logits = multi()
    dump("demo", labels)
    run("demo", "one", logits)
    row, = rows_of("--compare", "one", "one")
    assert row["difference"] == row["low"] == row["high"] == 0
    assert "[0.00, 0.00]" in script("evaluate.py", "--compare", "one", "one").stdout


# ---------------------------------------------------------------------------------------------
# what can be wrong

def cut(file, share=0.6):
    data = pathlib.Path(file).read_bytes()
    pathlib.Path(file).write_bytes(data[:int(len(data) * share)])


def change(file, **values):
    file = pathlib.Path(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def nan_logits(folder):
    logits = np.load(folder / "logits.npy")
    logits[3, 1] = np.nan
    np.save(folder / "logits.npy", logits)


BROKEN = {  # what happens to the run's folder -> words of the message
    "no run.json": (lambda f: os.remove(f / "run.json"), ["cannot be read", "run.json"]),
    "empty run.json": (lambda f: (f / "run.json").write_text(""), ["cannot be read"]),
    "no logits": (lambda f: os.remove(f / "logits.npy"), ["cannot be read", "logits.npy"]),
    "truncated logits": (lambda f: cut(f / "logits.npy"), ["cannot be read"]),
    "truncated header": (lambda f: cut(f / "logits.npy", 0.02), ["cannot be read"]),
    "empty rows": (lambda f: (f / "rows.npy").write_bytes(b""), ["cannot be read"]),
    "rows beyond": (lambda f: np.save(f / "rows.npy", np.arange(40) + 7), ["rows.npy", "40 clips"]),
    "negative rows": (lambda f: np.save(f / "rows.npy", np.arange(40) - 1), ["rows.npy"]),
    "rows twice": (lambda f: np.save(f / "rows.npy", np.arange(40) // 2), ["rows.npy"]),
    "fewer rows": (lambda f: np.save(f / "rows.npy", np.arange(39)), ["rows.npy (39)"]),
    "no clips": (lambda f: [np.save(f / "rows.npy", np.arange(0)),
                            np.save(f / "logits.npy", np.zeros((0, 5)))], ["rows.npy (0)"]),
    "nan": (nan_logits, ["not finite"]),
    "other classes": (lambda f: np.save(f / "logits.npy", np.zeros((40, 6))), ["6", "5 classes"]),
    "one axis": (lambda f: np.save(f / "logits.npy", np.zeros(40)), ["(40,)", "5 classes"]),
    "dump made anew": (lambda f: change(f / "run.json", dump={"clips": "others"}),
                       ["made anew", "other clips"]),
    "other clips": (lambda f: [np.save(f / "rows.npy", np.arange(30)),
                               np.save(f / "logits.npy", np.zeros((30, 5)))],
                    ["tested on other clips"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_runs_are_named_and_skipped(kind):
    labels, logits = multi()
    dump("demo", labels)
    run("demo", "good", logits)
    alone = script("evaluate.py").stdout
    folder = run("demo", "later", logits)
    spoil, words = BROKEN[kind]
    spoil(folder)
    done = script("evaluate.py")
    assert done.returncode == 0 and done.stdout == alone
    message, = done.stderr.splitlines()
    assert message.startswith(f"skipped {folder}: ")
    for word in words:
        assert word in message, message


BROKEN_DUMPS = {
    "absent": (lambda f: f.rename("elsewhere"), "tokens/bad/eat"),
    "no meta": (lambda f: os.remove(f / "meta.json"), "meta.json"),
    "no task": (lambda f: (f / "meta.json").write_text("{}"), "task"),
    "truncated labels": (lambda f: cut(f / "labels.npy"), "tokens/bad/eat"),
    "no paths": (lambda f: (f / "clips.csv").write_text("a,b\n1,2\n"), "path"),
    "one class more": (lambda f: (f / "classes.txt").write_text("a\n" * 6), "classes.txt (6)"),
    "one clip less": (lambda f: cut(f / "clips.csv"), "do not agree"),
}


@pytest.mark.parametrize("kind", BROKEN_DUMPS)
def test_broken_dumps_are_named_and_skipped(kind):
    labels, logits = multi()
    spoil, word = BROKEN_DUMPS[kind]
    spoil(dump("bad", labels))
    folder = run("bad", "mean", logits)
    done = script("evaluate.py")
    assert done.returncode == 1 and done.stdout == ""
    first, last = done.stderr.splitlines()
    assert first.startswith(f"skipped {folder}: ") and word in first
    assert last.startswith("evaluate.py: no run")
    dump("good", labels)
    run("good", "mean", logits)
    done = script("evaluate.py")
    assert done.returncode == 0 and "good" in done.stdout and "bad" not in done.stdout
    assert str(folder) in done.stderr


def test_unfinished_runs_are_not_looked_at():
    labels, logits = multi()
    dump("demo", labels)
    os.rename(run("demo", "mean", logits), "runs/demo/eat/mean/.seed0-box-12")
    done = script("evaluate.py")
    assert done.returncode == 1 and "seed0" not in done.stderr
    run("demo", "mean", logits)
    done = script("evaluate.py")
    assert done.returncode == 0 and done.stderr == "" and rows_of()[1]["seeds"] == 1


def test_nothing_to_score():
    done = script("evaluate.py")
    assert done.returncode == 1 and done.stdout == ""
    assert "runs/" in done.stderr and "python probe.py" in done.stderr


def test_runs_of_other_settings_or_weights_do_not_mix():
    labels, logits = multi()
    dump("demo", labels)
    run("demo", "mean", logits)
    other = run("demo", "mean", logits, seed=1)
    change(other / "run.json", lr=5)
    done = script("evaluate.py")
    assert f"skipped {other}: its lr differ" in done.stderr and rows_of()[1]["seeds"] == 1
    shutil.rmtree(other)
    change("tokens/demo/eat/meta.json", checkpoint={"sha256": "another"})
    done = script("evaluate.py")
    assert done.returncode == 1 and "other checkpoint" in done.stderr


def test_own_dumps_need_no_more_keys():
    """task, grid and complete are all that a dump of somebody else's needs."""
    labels, logits = multi()
    write_dump("tokens/mine/own", np.zeros((40, 3, 2)), labels, ["test"] * 40)
    folder = run("mine", "mean", logits, model="own")
    change(folder / "run.json", dump={"task": "multi"})
    assert rows_of()[1]["head"] == "mean"


def test_mistakes_end_in_one_sentence():
    labels, logits = multi()
    dump("demo", labels)
    run("demo", "mean", logits)
    run("demo", "linear", logits)
    refused(script("evaluate.py", "--compare", "protobin", "mean"), "protobin", "linear mean",
            "python probe.py --pool protobin,mean")
    refused(script("evaluate.py", "--show", "3"), "protobin", "--evidence")
    refused(script("evaluate.py", "--show", "3", "--pool", "mean"), "mean", "--evidence")
    refused(script("evaluate.py", "--localise"), "evidence.npy", "events.csv")
    refused(script("evaluate.py", "--resamples", "1"), "--resamples")
    assert script("evaluate.py", "--format", "xml").returncode == 2
    assert script("evaluate.py", "--classes", "--localise").returncode == 2


def test_numpy_is_enough():
    """For tables neither torch nor matplotlib nor soundfile is imported."""
    code = ("import sys, evaluate; names = {'torch', 'matplotlib', 'soundfile', 'sklearn', "
            "'scipy'}; assert not names & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------------------------------------
# localisation

STEP, T, F = 0.25, 20, 2  # 20 tokens of 0.25 s and 2 bands: clips of 5 s
MEANT = dict(grid=(T, F), token_seconds=STEP, seconds=5.0, sample_rate=16000)


def scene(n=30, C=3, seed=0):
    """labels (n, C), events in seconds of the recording, evidence (n, C, T*F) that is 1 in one of
    the two bands exactly where the centre of a token lies within an event."""
    rng = np.random.RandomState(seed)
    labels, events = np.zeros((n, C), bool), []
    evidence = np.zeros((n, C, T, F))
    for i in range(n):
        for j in range(C):
            if rng.rand() < 0.5:
                first = rng.randint(0, T - 4)                # whole seconds would hide mistakes
                last = first + rng.randint(2, 5)
                labels[i, j] = True
                events.append((f"a{i}.wav", first * STEP, last * STEP, f"c{j}"))
                evidence[i, j, first:last, rng.randint(F)] = 1
    return labels, events, evidence.reshape(n, C, T * F)


def located():
    return {r["head"]: r for r in rows_of("--localise")}


def test_oracle_evidence_is_found_everywhere():
    labels, events, evidence = scene()
    dump("demo", labels, events=events, **MEANT)
    run("demo", "oracle", labels, evidence=evidence)
    run("demo", "against", labels, evidence=-evidence)
    run("demo", "mean", labels)  # has none: left out
    rows = located()
    assert list(rows) == ["random", "against", "against, clip logit", "oracle",
                          "oracle, clip logit"]
    assert rows["oracle"]["frame mAP"] == rows["oracle"]["segment mAP"] == 100
    assert rows["oracle"]["scored"] == "3/3" and rows["oracle"]["seeds"] == 1
    share = 100 * evidence.reshape(30, 3, T, F).any(3).mean()
    assert abs(rows["random"]["frame mAP"] - share) < 3
    # a constant within a clip knows which clip, not when: the share of the positive clips' frames
    within = np.mean([evidence[labels[:, j], j].reshape(-1, T, F).any(2).mean() for j in range(3)])
    assert abs(rows["oracle, clip logit"]["frame mAP"] - 100 * within) < 1e-9
    assert abs(rows["against"]["frame mAP"] - share) < 1e-9 and share < 100 * within < 100


def test_seeds_are_averaged_and_rows_sorted():
    labels, events, evidence = scene()
    dump("demo", labels, events=events, **MEANT)
    shuffled = np.random.RandomState(0).permutation(30)
    run("demo", "head", labels[shuffled], rows=shuffled, evidence=evidence[shuffled])
    assert located()["head"]["frame mAP"] == 100
    run("demo", "head", labels, 1, evidence=-evidence)
    both = located()["head"]
    assert both["seeds"] == 2 and 50 < both["frame mAP"] < 70


def test_events_of_the_tested_rows_alone():
    labels, events, evidence = scene()
    dump("demo", labels, events=events, **MEANT)
    run("demo", "oracle", labels[12:], rows=range(12, 30), evidence=evidence[12:])
    row = located()["oracle"]
    assert row["frame mAP"] == row["segment mAP"] == 100


def test_seconds_with_more_frames_weigh_no_more():
    """Tokens of 0.4 s: two or three to a second; equal scores must stay equal."""
    labels, events, evidence = scene()
    dump("demo", labels, events=events, **MEANT | {"token_seconds": 0.4, "seconds": 8.0})
    run("demo", "head", np.ones((30, 3)), evidence=evidence)
    touched = np.zeros((30, 8, 3), bool)
    for path, onset, offset, label in events:
        for second in range(8):
            if onset < second + 1 and offset > second:
                touched[int(path[1:-4]), second, int(label[1:])] = True
    assert abs(located()["head, clip logit"]["segment mAP"] - 100 * touched.mean()) < 1e-9


def test_starts_of_clips_are_honoured():
    """Two clips of one recording: events are in the recording's seconds."""
    labels, events, evidence = scene()
    paths, starts = [f"r{i // 2}.wav" for i in range(30)], [2.5 + 5 * (i % 2) for i in range(30)]
    moved = []
    for path, onset, offset, label in events:
        i = int(path[1:-4])
        moved.append((paths[i], onset + starts[i], offset + starts[i], label))
    dump("moved", labels, paths=paths, starts=starts, events=moved, **MEANT)
    run("moved", "oracle", labels, evidence=evidence)
    row = located()["oracle"]
    assert row["frame mAP"] == row["segment mAP"] == 100
    dump("not", labels, paths=paths, starts=[0] * 30, events=moved, **MEANT)
    run("not", "oracle", labels, evidence=evidence)
    assert [r for r in rows_of("--localise", "--data", "not") if r["head"] == "oracle"][0][
        "frame mAP"] < 60


def test_padding_and_unknown_labels_do_not_count():
    """A clip of 4 s in a map of 5 s: what lies behind its end is no frame."""
    labels, events, evidence = scene()
    inside = evidence.reshape(30, 3, T, F).copy()
    inside[:, :, 16:] = 99  # loud, and wrong, in the padding
    dump("demo", labels, events=[*events, ("a0.wav", 0, 5, "thunder")], **MEANT | {"seconds": 4.0})
    run("demo", "oracle", labels, evidence=inside.reshape(30, 3, T * F))
    row = located()["oracle"]
    assert row["frame mAP"] == row["segment mAP"] == 100


def test_localise_says_what_is_missing():
    labels, events, evidence = scene()
    folder = dump("demo", labels, **MEANT)
    there = run("demo", "head", labels, evidence=evidence)
    refused(script("evaluate.py", "--localise"), "events.csv")
    dump("own", labels, events=events, grid=(T, F))
    run("own", "head", labels, evidence=evidence)
    refused(script("evaluate.py", "--localise"), "tokens/own/eat/meta.json", "token_seconds")
    refused(script("evaluate.py", "--localise", "--data", "demo"), "events.csv")
    (folder / "events.csv").write_text("path,onset,offset,label\na0.wav,0,1,c0\n")
    assert script("evaluate.py", "--localise", "--data", "demo").returncode == 0
    change(folder / "meta.json", grid=[T, F + 1])
    refused(script("evaluate.py", "--localise", "--data", "demo"), str(there), "grid",
            "--overwrite")
    cut(there / "evidence.npy")
    refused(script("evaluate.py", "--localise", "--data", "demo"), "evidence.npy")


# ---------------------------------------------------------------------------------------------
# pictures

@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to look into."""
    figure = pytest.importorskip("matplotlib.figure")
    pytest.importorskip("soundfile")
    kept, save = [], figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)
    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    yield kept
    from matplotlib import pyplot
    pyplot.close("all")


def sounding_scene(bands=F, start=0.0, seconds=5.0):
    """One run on three clips: c0 at 1-2 s and c1 at 3-3.5 s in clip 0, c1 in 1, nothing in 2."""
    import soundfile
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    events = [("a0.wav", 1 + start, 2 + start, "c0"), ("a0.wav", 3 + start, 3.5 + start, "c1"),
              ("a1.wav", 0.5 + start, 1 + start, "c1")]
    dump("demo", labels, starts=[start] * 3, events=events, names={"c0": "Bark, dog"},
         **MEANT | {"grid": (T, bands)})
    os.makedirs("data/demo")
    for i in range(3):
        t = np.arange(int(16000 * (start + seconds))) / 16000
        wave = 0.3 * np.sin(2 * np.pi * 1000 * t) * (t > 1 + start)
        wave += 0.01 * np.random.RandomState(i).randn(len(t))
        soundfile.write(f"data/demo/a{i}.wav", wave, 16000, subtype="PCM_16")
    evidence = np.random.RandomState(0).randn(3, 3, T * bands)
    logits, rows = np.array([[2.0, -1, 0.5], [0.3, 0.2, -1], [-3, -2, -1]]), [2, 0, 1]
    run("demo", "protobin", logits[rows], rows=rows, evidence=evidence[rows])
    return evidence


def is_png(name):
    return pathlib.Path(name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("bands", [1, 2, 8])
def test_picture(figures, bands):
    evidence = sounding_scene(bands, start=1.5)
    done = script("evaluate.py", "--show", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "demo-eat-protobin-0.png\n" and is_png("demo-eat-protobin-0.png")
    axes = figures[0].axes[:4]
    titles = [ax.get_title(loc="left") for ax in axes]
    assert "a0.wav" in titles[0] and "Bark, dog 1.0-2.0 s, c1 3.0-3.5 s" in titles[0]
    assert titles[1:] == ["Bark, dog: found, logit +2.00", "c2: false alarm, logit +0.50",
                          "c1: missed, logit -1.00"]
    assert axes[0].get_xlim() == (0, 5) and axes[0].get_ylim() == pytest.approx((20, 8000))
    for ax, j in zip(axes[1:], (0, 2, 1)):
        mesh = ax.collections[0]
        shown = np.asarray(mesh.get_array()).reshape(bands, T)                # (F, T)
        for t in range(T):
            for f in range(bands):  # token n = t * F + f
                assert shown[f, t] == np.float16(evidence[0, j, t * bands + f])
        corners = mesh.get_coordinates()
        np.testing.assert_allclose(corners[0, :, 0], STEP * np.arange(T + 1))
        assert corners[0, 0, 1] == pytest.approx(20) and corners[-1, 0, 1] == pytest.approx(8000)
    boxes = [[(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] for ax in axes]
    assert boxes == [[], [(1, 2)], [], [(3, 3.5)]]


def test_picture_of_a_clip_without_label(figures):
    sounding_scene()
    assert script("evaluate.py", "--show", "a2.wav").returncode == 0
    assert is_png("demo-eat-protobin-2.png")
    axes = figures[0].axes
    assert "none of the classes" in axes[0].get_title(loc="left")
    assert axes[1].get_title(loc="left") == "c2: false alarm, logit -1.00"  # the likeliest of all


def test_picture_without_onsets(figures):
    sounding_scene()
    os.remove("tokens/demo/eat/events.csv")
    assert script("evaluate.py", "--show", "1").returncode == 0
    assert "true: c1" in figures[0].axes[0].get_title(loc="left")
    assert not any(ax.patches for ax in figures[0].axes)


def test_tone_lies_where_it_sounds(figures):
    """1 kHz from 1 s on: the loudest cell of the spectrogram is there, in s and Hz."""
    sounding_scene(start=0.5)
    script("evaluate.py", "--show", "0")
    mesh = figures[0].axes[0].collections[0]
    times, hertz = mesh.get_coordinates()[0, :, 0], mesh.get_coordinates()[:, 0, 1]
    level = np.asarray(mesh.get_array()).reshape(len(hertz) - 1, len(times) - 1)
    loud = level.mean(1).argmax()
    assert hertz[loud] < 1000 < hertz[loud + 1] or abs(hertz[loud] - 1000) < 32
    begin = times[np.flatnonzero(level[loud] > level.max() - 10)[0]]
    assert abs(begin - 1) < 0.05


def test_mistakes_of_show(monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("soundfile")
    sounding_scene()
    refused(script("evaluate.py", "--show", "7"), "'7'", "(rows 0 to 2)")
    refused(script("evaluate.py", "--show", "b.wav"), "'b.wav'")
    os.rename("data/demo/a1.wav", "elsewhere.wav")
    refused(script("evaluate.py", "--show", "1"), "data/demo/a1.wav")
    for name in ("matplotlib", "soundfile"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            refused(script("evaluate.py", "--show", "0"), f"pip install {name}")
    meta = json.loads(pathlib.Path("tokens/demo/eat/meta.json").read_text())
    del meta["token_seconds"]
    pathlib.Path("tokens/demo/eat/meta.json").write_text(json.dumps(meta))
    refused(script("evaluate.py", "--show", "0"), "token_seconds")
    assert not list(pathlib.Path().glob("*.png"))


def test_birdset_segments_are_drawn_by_soundscape(tmp_path):
    """test_5s has one file a segment; those of one soundscape belong together."""
    from conftest import write_dump
    labels = np.eye(2, dtype=bool)[np.arange(12) % 2]
    folder = write_dump("tokens/hsn/m", np.zeros((12, 2, 4)), labels, ["test"] * 12)
    names = [f"HSN_{i // 4:03d}_20150712_085105_{i % 4 * 5}_{i % 4 * 5 + 5}.ogg" for i in range(12)]
    rows = ["path,start,split,labels"] + [f"a/{n},0,test,c0" for n in names]
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    assert len(set(evaluate.read_dump("tokens/hsn/m")["paths"])) == 3
    os.rename("tokens/hsn", "tokens/other")
    assert len(set(evaluate.read_dump("tokens/other/m")["paths"])) == 12


def test_valid_runs_never_mix_with_test_runs():
    from conftest import planted, write_dump
    tokens, labels = planted(clips=60)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["valid"] * 10 + ["test"] * 20)
    assert script("probe.py", "--pool", "linear", "--seeds", 1, "--valid", "--runs",
                  "runs").returncode == 0
    assert script("probe.py", "--pool", "mean", "--seeds", 1).returncode == 0
    rows = json.loads(script("evaluate.py", "--format", "json").stdout)
    assert {(r["data"], r["head"]) for r in rows} == {
        ("d", "prevalence"), ("d", "mean"), ("d (valid)", "prevalence"), ("d (valid)", "linear")}


def test_which_runs():
    small_set()
    for pools, there in (("linear,protobin", {"linear", "protobin"}), ("mean", {"mean"})):
        rows = json.loads(script("evaluate.py", "--pool", pools, "--format", "json").stdout)
        assert {r["head"] for r in rows} & {"linear", "protobin", "mean"} == there
    rows = json.loads(script("evaluate.py", "--data", "as20k", "--format", "json").stdout)
    assert {r["data"] for r in rows} == {"as20k"}
