"""evaluate.py: metrics against scikit-learn, intervals against theory and simulation, tables,
broken runs and dumps, localization against an oracle, and what a picture shows."""

import csv
import io
import json
import math
import os
import pathlib
import re
import statistics
import sys

import numpy as np
import pytest
from conftest import refused, script, write_dump
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

import evaluate


def dump(data, labels, task="multi", paths=None, starts=None, grid=(1, 1), events=None, **meta):
    """A dump whose clips are all tested; paths and starts replace a<i>.wav and 0."""
    n = len(labels)
    folder = write_dump(f"tokens/{data}/eat", np.zeros((n, grid[0] * grid[1], 1)), labels,
                        ["test"] * n, task=task, grid=list(grid), **{"clips": "md5"} | meta)
    write_csv(folder / "clips.csv", "path,start,split,labels", zip(
        paths or [f"a{i}.wav" for i in range(n)], starts or [0] * n, ["test"] * n, [""] * n))
    if events is not None:
        write_csv(folder / "events.csv", "path,onset,offset,label", events)
    return folder


def write_csv(file, header, rows):
    file.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def run(data, pool, logits, seed=0, rows=None, root="runs", arrays=None, **info):
    """A run as probe.py writes it; arrays: {"evidence" or "frames": array}."""
    folder = pathlib.Path(f"{root}/{data}/eat/{pool}/seed{seed}")
    folder.mkdir(parents=True)
    np.save(folder / "logits.npy", np.asarray(logits, np.float32))
    np.save(folder / "rows.npy", np.arange(len(logits)) if rows is None else np.asarray(rows))
    for name, array in (arrays or {}).items():
        np.save(folder / f"{name}.npy", np.asarray(array, np.float16))
    meta = evaluate.read_dump(data, "eat").meta
    (folder / "run.json").write_text(json.dumps({
        "dump": {"clips": "md5"}, "parameters": 12345, "seconds_per_epoch": 0.25, "split": "test",
        "labels_md5": meta["labels_md5"], "tokens_md5": meta["tokens_md5"], **info}))
    return folder


def change(file, **values):
    file = pathlib.Path(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def multi(n=40, C=5, seed=0):
    """labels bool, and logits float32 that know something; the last class is absent."""
    rng = np.random.RandomState(seed)
    labels = rng.rand(n, C) < 0.3
    labels[:, -1] = False
    labels[:C - 1] |= np.eye(C, dtype=bool)[:-1]
    return labels, (rng.randn(n, C) + 1.5 * labels).astype(np.float32)


def table(*args):
    """The rows that evaluate.py prints as csv: numbers as floats, None for empty cells."""
    done = script("evaluate.py", *args, "--format", "csv")
    assert done.returncode == 0, done.stderr
    return [{key: float(text) if re.fullmatch(r"-?[\d.]+(e-\d+)?", text) else text or None
             for key, text in row.items()} for row in csv.DictReader(io.StringIO(done.stdout))]


def macro_mAP(labels, logits):
    present = labels.any(0)
    return 100 * average_precision_score(labels[:, present], logits[:, present])


# ---- metrics and intervals ------------------------------------------------------------------

RNG = np.random.RandomState(1)
LABELS, NOISE = RNG.rand(60) < 0.3, RNG.randn(60)
KINDS = {  # labels and scores of one class
    "random": (LABELS, NOISE),
    "heavy ties": (LABELS, np.round(NOISE)),
    "all tied": (LABELS, 0 * NOISE + 0.25),
    "signed zeros": (LABELS, RNG.choice([0.0, -0.0, 1.0], 60)),
    "one positive": (np.arange(60) == 17, NOISE),
    "all positive": (NOISE > -9, NOISE),
    "perfect": (LABELS, LABELS + 0.1 * RNG.rand(60)),
    "inverted": (LABELS, 0.1 * RNG.rand(60) - LABELS),
    "huge and tiny": (LABELS, NOISE * 10.0 ** RNG.randint(-38, 38, 60))}


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetition_and_sample_weights(kind):
    labels, scores = KINDS[kind][0], KINDS[kind][1].astype(np.float32)
    repeats = np.random.RandomState(2).multinomial(60, np.full(60, 1 / 60), 30).T
    weights = np.hstack([repeats, RNG.rand(60, 5), np.ones((60, 1))])
    ours = evaluate.average_precision(labels, scores, weights)
    for r, weight in enumerate(weights.T):
        again = np.repeat(np.arange(60), repeats[:, r]) if r < 30 else np.arange(60)
        if not labels[again].any():
            assert np.isnan(ours[r])
            continue
        assert abs(ours[r] - average_precision_score(labels, scores, sample_weight=weight)) < 1e-9
        if r < 30 or r == 35:
            assert abs(ours[r] - average_precision_score(labels[again], scores[again])) < 1e-9


@pytest.mark.parametrize("decimals, C", [(6, 12), (0, 12), (6, 2)])
def test_multi_label_metrics_are_scikit_learns(decimals, C):
    labels, logits = multi(200, C)
    logits = np.round(logits, decimals)
    ours, present = evaluate.metrics("multi", labels, logits), np.flatnonzero(labels.any(0))
    area = 100 * np.mean([roc_auc_score(labels[:, j], logits[:, j]) for j in present])
    assert len(present) < C and ours == pytest.approx({
        "macro mAP": macro_mAP(labels, logits),
        "micro mAP": 100 * average_precision_score(labels, logits, average="micro"),
        "AUROC": area, "d'": math.sqrt(2) * statistics.NormalDist().inv_cdf(area / 100)})


@pytest.mark.filterwarnings("ignore")
def test_nothing_to_score_is_nan_and_perfect_is_finite():
    none, every, logits = np.zeros((6, 2), bool), np.ones((6, 2), bool), np.eye(6)[:, :2]
    assert np.isnan(list(evaluate.metrics("multi", none, logits).values())).all()
    assert np.isnan(evaluate.average_precision(none[:, 0], logits[:, 0], np.ones((6, 1)))).all()
    values = evaluate.metrics("multi", every, logits)
    assert values["macro mAP"] == 100 and np.isnan(values["AUROC"]) and np.isnan(values["d'"])
    assert 8 < evaluate.metrics("multi", logits > 0, logits)["d'"] < 9


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_single_label_metrics_are_scikit_learns():
    truth = RNG.choice([0, 1, 3], 150, p=[0.7, 0.2, 0.1])  # class 2 never occurs
    logits = RNG.randn(150, 4) + 0.8 * np.eye(4)[truth]
    guess = logits.argmax(1)
    assert evaluate.metrics("single", np.eye(4, dtype=bool)[truth], logits) == pytest.approx({
        "accuracy": 100 * np.mean(guess == truth),
        "macro accuracy": 100 * balanced_accuracy_score(truth, guess)})


@pytest.mark.parametrize("task", ["multi", "single"])
def test_resampled_metric_is_that_of_the_drawn_clips(task):
    labels, logits = multi(80, 6)
    if task == "single":
        labels = np.eye(6, dtype=bool)[RNG.randint(0, 5, 80)]
    weights = np.hstack([np.ones((80, 1)), evaluate.resamples(np.arange(80), 12)])
    seeds = [logits, logits[:, ::-1]]
    ours = evaluate.main_metric(task, labels, seeds, weights.astype(np.float32))
    for r, drawn in enumerate(weights.T > 0):
        theirs = [next(iter(evaluate.metrics(task, labels[drawn], each[drawn]).values()))
                  for each in seeds]
        assert abs(ours[r] - np.mean(theirs)) < 1e-4  # accuracy is summed in float32


def test_resamples_are_halves():
    weights = evaluate.resamples(np.arange(100), 400)
    assert set(np.unique(weights)) == {0, 1} and (weights.sum(0) == 50).all()
    assert np.abs(weights.mean(1) - 0.5).max() < 0.12       # each clip about as often
    assert len(np.unique(weights, axis=1).T) == 400         # all different
    assert np.abs(np.corrcoef(weights)[np.triu_indices(100, 1)].mean() + 1 / 99) < 0.005


def test_resamples_draw_whole_recordings():
    paths = np.array(["a", "b", "a", "c", "d", "c", "c", "a"])
    weights = evaluate.resamples(paths, 50)
    drawn = np.array([weights[paths == path][0] for path in "abcd"])
    assert (weights == drawn[[ord(path) - ord("a") for path in paths]]).all()
    assert (drawn.sum(0) == 2).all()
    shuffled = RNG.permutation(8)
    assert (evaluate.resamples(paths[shuffled], 50) == weights[shuffled]).all()


def test_recordings_widen_the_interval():
    """Ten copies of a clip are one clip."""
    labels, logits = multi(40)
    again = np.repeat(np.arange(40), 10)
    for data, paths in (("ten", [f"a{i}.wav" for i in again]), ("apart", None)):
        dump(data, labels[again], paths=paths)
        run(data, "mean", logits[again])
    dump("once", labels)
    run("once", "mean", logits)
    width = {r["data"]: r["high"] - r["low"] for r in table() if r["head"] == "mean"}
    assert 0.8 < width["ten"] / width["once"] < 1.25 and width["apart"] < 0.5 * width["once"]


def test_birdset_is_scored_by_soundscape_and_calls_it_cmap():
    labels, logits = multi(12)
    paths = [f"HSN_{i // 4:03d}_20150712_085105_{i % 4 * 5}_{i % 4 * 5 + 5}.ogg" for i in range(12)]
    for data, recordings, metric in (("hsn", 3, "cmAP (= macro mAP)"), ("other", 12, "macro mAP")):
        dump(data, labels, paths=paths)
        run(data, "mean", logits)
        assert len(set(evaluate.read_dump(data, "eat").recordings)) == recordings
        assert table("--data", data)[1]["metric"] == metric


@pytest.mark.filterwarnings("ignore")
def test_interval_formula():
    draws = np.array([50.0, 52.0, 54.0, np.nan])
    low, high = evaluate.interval(51.0, draws)  # halves lie 1 above: so does the score, probably
    np.testing.assert_allclose((low, high), 50 + 2.15 * math.sqrt(8 / 3) * np.array([-1, 1]))
    labels, logits = multi(6)
    draws = evaluate.main_metric("multi", labels, [logits], evaluate.resamples(["a"] * 6))
    assert np.isnan(evaluate.interval(51.0, draws)).all()  # one recording has no halves


def test_interval_of_accuracy_is_the_textbooks():
    """For a mean, halves must give back sqrt(p (1 - p) / n)."""
    logits = np.eye(2)[(np.arange(400) < 80).astype(int)]   # 80 % right
    low, high = evaluate.interval(80.0, evaluate.main_metric(
        "single", np.eye(2, dtype=bool)[np.zeros(400, int)], [logits],
        evaluate.resamples(np.arange(400), 4000)))
    assert abs((low + high) / 2 - 80) < 0.2
    assert abs((high - low) / 4.3 / (100 * math.sqrt(0.8 * 0.2 / 399)) - 1) < 0.04


@pytest.mark.parametrize("right", [40, 39, 1, 0])
def test_intervals_stay_within_0_and_100(right):
    dump("demo", np.eye(2, dtype=bool)[np.zeros(40, int)], task="single")
    run("demo", "mean", np.eye(2)[(np.arange(40) >= right).astype(int)])
    row = table()[1]
    assert row["score"] == 100 * right / 40
    assert row["low"] == 0 if right <= 1 else 80 < row["low"]
    assert row["high"] == 100 if right >= 39 else row["high"] < 20


def population(prevalence, distance):
    """Macro mAP in percent of Gaussian scores, N(distance, 1) where the class is, N(0, 1) where
    not, with infinitely many clips: the integral of precision over recall."""
    t, total = np.linspace(-8, 12, 4001), 0
    tail = np.vectorize(lambda x: math.erfc(x / math.sqrt(2)) / 2)
    for p, d in zip(prevalence, distance):
        above = tail(t - d)
        precision = p * above / np.maximum(p * above + (1 - p) * tail(t), 1e-300)
        total += np.sum((precision[1:] + precision[:-1]) / 2 * -np.diff(above))
    return 100 * total / len(prevalence)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="SLOW=1 runs it (3 minutes)")
@pytest.mark.parametrize("n, repetitions", [(300, 2000), (1000, 1000)])
def test_coverage(n, repetitions):
    """The 95 % interval holds the population's macro mAP in 93-97 % of all test sets; with 300
    clips the rarest class has six positives. The usual bootstrap does not."""
    prevalence = np.geomspace(0.02, 0.30, 10)
    distance = np.random.default_rng(5).permutation(np.linspace(0.5, 2.5, 10))
    true, rng, inside = population(prevalence, distance), np.random.default_rng(n), np.zeros(3)
    repeated = rng.multinomial(n, np.full(n, 1 / n), 400).T
    weights = np.hstack([np.ones((n, 1)), evaluate.resamples(np.arange(n)), repeated])
    for _ in range(repetitions):
        labels = rng.random((n, 10)) < prevalence
        logits = (rng.standard_normal(labels.shape) + distance * labels).astype(np.float32)
        score, *draws = evaluate.main_metric("multi", labels, [logits], np.float32(weights))
        a, b = np.quantile(draws[-400:], [0.025, 0.975])
        inside += [low <= true <= high for low, high in (
            evaluate.interval(score, np.array(draws[:-400])), (2 * score - b, 2 * score - a),
            (a, b))]
    ours, basic, percentile = inside / repetitions
    print(f"\n{n} clips: halves {ours:.1%}, basic {basic:.1%}, percentile {percentile:.1%}")
    assert 0.93 <= ours <= 0.97 and percentile < basic < ours


# ---- tables ---------------------------------------------------------------------------------

def small_set():
    """as20k: three seeds of protobin, one of linear; esc50, single: two seeds of mean."""
    labels, _ = multi(40, 5)
    truth = np.eye(4, dtype=bool)[np.random.RandomState(3).randint(0, 3, 30)]
    dump("as20k", labels)
    dump("esc50", truth, task="single")
    for seed, noise in enumerate(np.random.RandomState(0).randn(3, 40, 5)):
        run("as20k", "protobin", noise + 2.5 * labels, seed)
    run("as20k", "linear", np.random.RandomState(9).randn(40, 5) + 1.0 * labels)
    for seed, noise in enumerate(np.random.RandomState(1).randn(2, 30, 4)):
        run("esc50", "mean", noise + 2 * truth, seed)
    return labels, truth


GOLDEN = """\
data   model  clips        head            metric     scored  score  seeds    sd   95 % interval  micro mAP  AUROC    d'  macro accuracy  parameters  s/epoch
as20k  eat    40 (107beb)  prevalence      macro mAP  4/5     30.62
as20k  eat    40 (107beb)  linear          macro mAP  4/5     62.63      1        [48.75, 72.87]      50.97  71.53  0.80                      12,345     0.25
as20k  eat    40 (107beb)  protobin        macro mAP  4/5     95.14      3  2.02  [91.59, 98.63]      93.00  97.25  2.76                      12,345     0.25
esc50  eat    30 (720cd5)  majority class  accuracy   3/4     36.67
esc50  eat    30 (720cd5)  mean            accuracy   3/4     75.00      2  7.07  [63.59, 85.75]                                   74.65      12,345     0.25
"""


def test_golden_table():
    small_set()
    assert script("evaluate.py").stdout == GOLDEN
    lines = script("evaluate.py", "--format", "md").stdout.splitlines()
    del lines[1]  # the rule
    assert [re.sub(r" *\| ?", " ", line).split() for line in lines] == [
        line.split() for line in GOLDEN.splitlines()]
    assert [list(row) for row in table()] == [evaluate.COLUMNS] * 5


def test_numbers_of_the_table():
    labels, truth = small_set()
    rows = {(r["data"], r["head"]): r for r in table()}
    scores = [macro_mAP(labels, np.load(f"runs/as20k/eat/protobin/seed{k}/logits.npy"))
              for k in range(3)]
    row = rows["as20k", "protobin"]
    assert (row["scored"], row["seeds"], row["s/epoch"]) == ("4/5", 3, 0.25)
    assert (row["score"], row["sd"]) == pytest.approx((np.mean(scores), statistics.stdev(scores)))
    assert rows["as20k", "linear"]["sd"] is None
    constant = macro_mAP(labels, np.zeros((40, 5)))
    assert rows["as20k", "prevalence"]["score"] == pytest.approx(constant)
    assert rows["esc50", "majority class"]["score"] == pytest.approx(100 * truth.mean(0).max())


def test_only_tested_rows_are_scored_in_any_order():
    labels, logits = multi(60)
    dump("demo", labels)
    rows = 20 + RNG.permutation(40)
    run("demo", "a", logits[20:], rows=range(20, 60))
    run("demo", "b", logits[rows], rows=rows)
    a, b = ({k: v for k, v in row.items() if k != "head"} for row in table()[1:])
    assert a == b and a["score"] == pytest.approx(macro_mAP(labels[20:], logits[20:]))
    row, = table("--compare", "a", "b")
    assert row["difference"] == row["low"] == row["high"] == 0


def test_fingerprint_tells_which_clips_were_tested():
    """Heads on the same clips share one fingerprint and one row for prevalence."""
    labels, logits = multi(60)
    for data, starts in (("demo", None), ("late", [0.5] * 60)):
        dump(data, labels, starts=starts)
        for pool, rows in (("a", range(40)), ("b", range(20, 60)), ("c", range(40))):
            run(data, pool, logits[rows], rows=rows)
    rows = table()
    assert [r["head"] for r in rows].count("prevalence") == 4
    clips = {(r["data"], r["head"]): r["clips"] for r in rows if r["head"] in "abc"}
    assert all(text.startswith("40 (") for text in clips.values())
    assert clips["demo", "a"] == clips["demo", "c"] and len(set(clips.values())) == 4


@pytest.mark.parametrize("task", ["multi", "single"])
def test_class_table(task):
    labels, logits = multi()
    if task == "single":
        labels = np.eye(5, dtype=bool)[RNG.choice(4, 40, p=[.1, .2, .3, .4])]
    dump("demo", labels, task=task)
    for seed, sign in enumerate((1, -1)):
        run("demo", "mean", sign * logits, seed)
    rows = table("--classes")
    counts = [row["positives"] for row in rows]
    assert counts == sorted(labels.sum(0), reverse=True) and counts[-1] == 0
    for row in rows:
        j = int(row["class"][1:])
        both = [average_precision_score(labels[:, j], x[:, j]) if task == "multi" else
                np.mean(x[labels[:, j]].argmax(1) == j) for x in (logits, -logits)
                if labels[:, j].any()]
        assert row["mean"] == (pytest.approx(100 * np.mean(both)) if both else None)


@pytest.mark.parametrize("first", [0, 10])
def test_compare_is_paired_on_the_shared_clips(first):
    labels, one = multi(60)
    two = (one + RNG.randn(*one.shape)).astype(np.float32)
    dump("demo", labels)
    dump("other", labels)  # has only one of the two heads: not in the table
    run("demo", "one", one[:50], rows=range(50))
    run("other", "one", one)
    run("demo", "two", two[first:], rows=range(first, 60))
    run("demo", "two", (two + one)[first:], 1, rows=range(first, 60))
    row, = table("--compare", "one", "two")
    labels, one, two = labels[first:50], one[first:50], two[first:50]
    halves = evaluate.resamples([f"a{i}.wav" for i in range(first, 50)])
    draws = [macro_mAP(labels[drawn], one[drawn]) - np.mean([
        macro_mAP(labels[drawn], each[drawn]) for each in (two, two + one)])
        for drawn in (halves.T > 0)]
    difference = row["first"] - row["second"]
    assert row["difference"] == pytest.approx(difference) and row["seeds"] == "1, 2"
    assert row["first"] == pytest.approx(macro_mAP(labels, one))
    bounds = evaluate.interval(difference, np.array(draws))
    assert (row["low"], row["high"]) == pytest.approx(bounds)
    assert row["clips"].startswith(f"{50 - first} (")
    assert row["clips"].endswith(f" of 50 and {60 - first}")
    back, = table("--compare", "two", "one")
    assert (back["difference"], back["low"]) == pytest.approx((-difference, -row["high"]))


def test_valid_runs_never_mix_with_test_runs():
    labels, logits = multi()
    dump("d", labels)
    run("d", "linear", logits, split="valid")
    run("d", "linear", logits, 1)
    assert [(r["data"], r["head"], r["seeds"]) for r in table()] == [
        ("d", "prevalence", None), ("d", "linear", 1),
        ("d (valid)", "prevalence", None), ("d (valid)", "linear", 1)]


@pytest.mark.parametrize("flags, heads", [
    ("--pool linear,protobin", {"linear", "protobin"}), ("--pool mean", {"mean"}),
    ("--data as20k", {"linear", "protobin"}), ("--model eat", {"linear", "protobin", "mean"})])
def test_which_runs(flags, heads):
    small_set()
    assert {r["head"] for r in table(*flags.split())} - {"prevalence", "majority class"} == heads


# ---- what can be wrong ----------------------------------------------------------------------

def cut(file):
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * 0.6)])


def set_rows(run, rows):
    np.save(run / "rows.npy", rows)
    np.save(run / "logits.npy", np.zeros((len(rows), 5)))


BROKEN = {  # what happens to a run or its dump -> a word of the message
    "no run.json": (lambda run, dump: os.remove(run / "run.json"), "run.json"),
    "empty run.json": (lambda run, dump: (run / "run.json").write_text(""), "run.json"),
    "list in run.json": (lambda run, dump: (run / "run.json").write_text("[1, 2]"), "run.json"),
    "text for a number": (lambda run, dump: change(run / "run.json", parameters="x"), "run.json"),
    "truncated logits": (lambda run, dump: cut(run / "logits.npy"), "logits.npy"),
    "no rows.npy": (lambda run, dump: os.remove(run / "rows.npy"), "rows.npy"),
    "rows beyond": (lambda run, dump: set_rows(run, np.arange(40) + 7), "40 clips"),
    "negative rows": (lambda run, dump: set_rows(run, np.arange(40) - 1), "rows.npy"),
    "rows twice": (lambda run, dump: set_rows(run, np.arange(40) // 2), "once"),
    "no rows": (lambda run, dump: set_rows(run, np.arange(0)), "rows.npy"),
    "other clips": (lambda run, dump: set_rows(run, np.arange(30)), "clips"),
    "fewer rows": (lambda run, dump: np.save(run / "rows.npy", np.arange(39)), "39"),
    "nan": (lambda run, dump: np.save(run / "logits.npy", np.full((40, 5), np.nan)), "finite"),
    "other classes": (lambda run, dump: np.save(run / "logits.npy", np.zeros((40, 6))), "6"),
    "other table": (lambda run, dump: change(run / "run.json", dump={"clips": "x"}), "clips"),
    "other labels": (lambda run, dump: change(run / "run.json", labels_md5="0"), "labels"),
    "other tokens": (lambda run, dump: change(run / "run.json", tokens_md5="0"), "tokens"),
    "other settings": (lambda run, dump: change(run / "run.json", lr=5), "lr"),
    "no dump": (lambda run, dump: dump.rename("elsewhere"), "tokens/bad/eat"),
    "no task": (lambda run, dump: (dump / "meta.json").write_text("{}"), "task"),
    "truncated labels": (lambda run, dump: cut(dump / "labels.npy"), "labels.npy"),
    "truncated tokens": (lambda run, dump: cut(dump / "tokens.npy"), "tokens.npy"),
    "no paths": (lambda run, dump: (dump / "clips.csv").write_text("a,b\n1,2\n"), "path"),
    "one class more": (lambda run, dump: (dump / "classes.txt").write_text("a\n" * 6), "6"),
    "one clip less": (lambda run, dump: cut(dump / "clips.csv"), "labels.npy"),
    "other checkpoint": (lambda run, dump: change(dump / "meta.json", checkpoint=1), "checkpoint")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_runs_and_dumps_are_named_and_skipped(kind):
    labels, logits = multi()
    folders = [dump(data, labels) for data in ("good", "bad")]
    run("good", "mean", logits)
    run("bad", "mean", logits)
    second, (spoil, word) = run("bad", "mean", logits, 1), BROKEN[kind]
    spoil(second, folders[1])
    done = script("evaluate.py", "--format", "csv")
    *_, message = done.stderr.splitlines()
    assert message.startswith(f"skipped {second}: ") and word in message, message
    assert len(done.stderr.splitlines()) == (1 if "bad" in done.stdout else 2)
    assert done.returncode == 0 and "good" in done.stdout
    assert script("evaluate.py", "--data", "bad").returncode == ("bad" not in done.stdout)


@pytest.mark.parametrize("name", ["labels", "tokens", "logits", "rows", "frames"])
def test_flipped_bit_in_a_header_is_no_traceback(name):
    labels, events, frames = scene()
    folder = dump("demo", labels, events=events, **MEANT)
    runs = run("demo", "head", labels, arrays={"frames": frames})
    file = (folder if name in ("labels", "tokens") else runs) / f"{name}.npy"
    intact = file.read_bytes()
    for place in [*range(0, 12), *range(20, 80, 3)]:
        for bit in (0, 3, 6):
            damaged = bytearray(intact)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            done = script("evaluate.py", "--localize")
            assert "Traceback" not in done.stderr and done.returncode in (0, 1, 2)
            assert bool(done.stderr) == (done.returncode > 0), (place, bit, done.stderr)


def test_tokens_may_be_gone_and_unfinished_runs_are_not_looked_at():
    labels, logits = multi()
    os.remove(dump("demo", labels) / "tokens.npy")
    folder = run("demo", "mean", logits)
    assert len(table()) == 2
    os.rename(folder, "runs/demo/eat/mean/.seed0-box-12")
    done = script("evaluate.py")
    assert done.returncode == 1 and "seed0" not in done.stderr and "probe.py" in done.stderr


@pytest.mark.parametrize("args, word", [
    ("--compare protobin mean", "--pool protobin,mean"), ("--show 3", "--evidence"),
    ("--localize", "--frames")])
def test_user_errors_end_in_one_sentence(args, word):
    labels, logits = multi()
    dump("demo", labels)
    run("demo", "mean", logits)
    refused(script("evaluate.py", *args.split()), word)


# ---- localization ---------------------------------------------------------------------------

STEP, T, F = 0.25, 20, 2  # 20 steps of 0.25 s and 2 bands: clips of 5 s
MEANT = dict(grid=(T, F), token_seconds=STEP, seconds=5.0, sample_rate=16000)


def scene(n=30, C=3, late=0):
    """labels (n, C), events in seconds of the recording, and frames (n, T, C): 1 where the center
    of a step lies in an event, else -1."""
    rng = np.random.RandomState(0)
    labels, events, frames = np.zeros((n, C), bool), [], -np.ones((n, T, C))
    for i, j in np.argwhere(rng.rand(n, C) < 0.5):
        first = rng.randint(0, T - 4)                        # whole seconds would hide mistakes
        last = first + rng.randint(2, 5)
        labels[i, j], frames[i, first:last, j] = True, 1
        events.append((f"a{i}.wav", first * STEP + late, last * STEP + late, f"c{j}"))
    return labels, events, frames


def located(*args):
    return {row["head"]: row for row in table("--localize", *args)}


NUMBERS = ("frame mAP", "segment mAP", "event F1")


def test_oracle_is_found_everywhere():
    labels, events, frames = scene()
    dump("demo", labels, events=[*events, ("a0.wav", 0, 5, "unknown")], **MEANT)
    run("demo", "oracle", 2.0 * labels - 1, arrays={"frames": frames})
    run("demo", "against", labels, arrays={"frames": -frames})
    run("demo", "mean", labels)  # has no frames: left out
    rows = located()
    assert list(rows) == ["random", "against", "against, clip logit", "oracle",
                          "oracle, clip logit"]
    assert [rows["oracle"][name] for name in NUMBERS] == [100, 100, 100]
    assert rows["oracle"]["scored"] == "3/3" and rows["oracle"]["threshold"] == 0
    share = 100 * (frames > 0).mean()
    assert abs(rows["random"]["frame mAP"] - share) < 3 and rows["random"]["event F1"] < 20
    assert rows["against"]["frame mAP"] == pytest.approx(share) and not rows["against"]["event F1"]
    # a constant within a clip knows which clip, not when: the share of the positive clips' frames
    within = np.mean([(frames[labels[:, j], :, j] > 0).mean() for j in range(3)])
    assert rows["oracle, clip logit"]["frame mAP"] == pytest.approx(100 * within)
    assert rows["oracle, clip logit"]["event F1"] == 0


def test_seeds_are_averaged_and_rows_sorted():
    labels, events, frames = scene()
    dump("demo", labels, events=events, **MEANT)
    rows = 5 + RNG.permutation(25)
    run("demo", "head", labels[rows], rows=rows, arrays={"frames": frames[rows]})
    assert [located()["head"][name] for name in NUMBERS] == [100, 100, 100]
    run("demo", "head", labels[5:], 1, rows=range(5, 30), arrays={"frames": -frames[5:]})
    both = located()["head"]
    assert both["seeds"] == 2 and both["event F1"] == 50 and 50 < both["frame mAP"] < 70


@pytest.mark.parametrize("starts, seconds, found", [
    ([2.5] * 30, 5.0, True), ([0] * 30, 5.0, False), ([2.5] * 30, 4.0, True)])
def test_starts_count_and_padding_does_not(starts, seconds, found):
    """Events are in seconds of the recording; clips of 4 s in a map of 5 s end in padding."""
    labels, events, frames = scene(late=2.5)
    frames[:, int(seconds / STEP):] = 99  # high, and wrong
    dump("demo", labels, starts=starts, events=events, **MEANT | {"seconds": seconds})
    run("demo", "oracle", labels, arrays={"frames": frames})
    assert all((located()["oracle"][name] == 100) == found for name in NUMBERS)


def test_seconds_with_more_steps_weigh_no_more():
    """Steps of 0.4 s: two or three per second; equal scores must stay equal."""
    labels, events, frames = scene()
    dump("demo", labels, events=events, **MEANT | {"token_seconds": 0.4, "seconds": 8.0})
    run("demo", "head", np.ones((30, 3)), arrays={"frames": frames})
    touched = [(path, label, second) for path, onset, offset, label in events
               for second in range(8) if onset < second + 1 and offset > second]
    assert located()["head, clip logit"]["segment mAP"] == pytest.approx(
        100 * len(set(touched)) / (30 * 8 * 3))


@pytest.mark.parametrize("true, found, f1", [
    ("_####____", "_####____", 100), ("_####____", "__####___", 100), ("_####____", "___####__", 0),
    ("_####____", "_##______", 100), ("_####____", "_#_______", 0), ("_##______", "_#####___", 0),
    ("##_##____", "#####____", 0), ("##_####__", "#######__", 200 / 3),
    ("__######_", "__###_##_", 200 / 3), ("_##______", "_##__##__", 200 / 3),
    ("##__|__##", "##__|__##", 100), ("####|____", "__##|##__", 200 / 3), ("_##_", "____", 0)])
def test_event_f1(true, found, f1):
    """'#' is an active step, '|' ends a clip: intersection over union of 1/2 is a hit."""
    true, found = (np.array([[[step == "#"] for step in clip] for clip in text.split("|")])
                   for text in (true, found))
    f1s = evaluate.event_f1(np.concatenate([true, false := 0 * true > 0], 2),
                            np.concatenate([2.0 * found - 1, false], 2))
    assert f1s[0, 0] == pytest.approx(f1) and np.isnan(f1s[:, 1]).all()


def test_threshold_is_chosen_on_valid():
    labels, events, frames = scene()
    dump("demo", labels, events=events, **MEANT)
    for root, split, rows in (("runs", "test", range(20)), ("runs_valid", "valid", range(20, 30))):
        run("demo", "head", labels[rows] + 1.8, rows=rows, root=root, split=split,
            arrays={"frames": frames[rows] + 1.8})
    rows = located()
    assert rows["head"]["event F1"] == 100 and rows["head"]["threshold"] == "from valid"
    assert rows["random"]["threshold"] == 0
    os.remove("runs_valid/demo/eat/head/seed0/frames.npy")
    assert located()["head"]["event F1"] == 0


@pytest.mark.parametrize("spoil, word", [
    (lambda run, dump: os.remove(dump / "events.csv"), "events.csv"),
    (lambda run, dump: (dump / "events.csv").write_text("path\na.wav\n"), "events.csv"),
    (lambda run, dump: cut(run / "frames.npy"), "frames.npy"),
    (lambda run, dump: np.save(run / "frames.npy", np.zeros((30, T - 1, 3))), "frames.npy"),
    (lambda run, dump: change(dump / "meta.json", seconds=None, clips="md5"), "seconds")])
def test_localize_says_what_is_missing(spoil, word):
    labels, events, frames = scene()
    folder = dump("demo", labels, events=events, **MEANT)
    spoil(run("demo", "head", labels, arrays={"frames": frames}), folder)
    refused(script("evaluate.py", "--localize"), word)


# ---- pictures -------------------------------------------------------------------------------

@pytest.fixture
def picture(monkeypatch):
    """A run on three clips, c0 at 1-2 s and c1 at 3-3.5 s in clip 0, c1 in clip 1, nothing in 2;
    picture(clip) is the figure that --show saves, and picture.evidence what it should show."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    soundfile, start = pytest.importorskip("soundfile"), 1.5
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    dump("demo", labels, starts=[start] * 3, **MEANT, events=[
        ("a0.wav", 1 + start, 2 + start, "c0"), ("a0.wav", 3 + start, 3.5 + start, "c1")])
    os.makedirs("data/demo")
    t = np.arange(int(16000 * (start + 5))) / 16000
    for i in range(3):
        tone = 0.3 * np.sin(2 * np.pi * 1000 * t) * (t > 1 + start)
        soundfile.write(f"data/demo/a{i}.wav", tone + 0.01 * RNG.randn(len(t)), 16000)
    evidence = RNG.randn(3, 3, T * F)
    logits, rows = np.array([[2.0, -1, 0.5], [0.3, 0.2, -1], [-3, -2, -1]]), [2, 0, 1]
    run("demo", "protobin", logits[rows], rows=rows, arrays={"evidence": evidence[rows]})
    saved, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **kwargs: (
        saved.append(self), save(self, *args, **kwargs)))

    def show(clip):
        done = script("evaluate.py", "--show", clip)
        assert done.returncode == 0, done.stderr
        assert pathlib.Path(done.stdout.strip()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return saved[-1].axes[:-1]
    show.evidence = evidence.astype(np.float16).reshape(3, 3, T, F)
    return show


def test_picture_shows_evidence_and_events(picture):
    axes = picture("0")
    titles = [ax.get_title(loc="left") for ax in axes]
    assert "a0.wav" in titles[0] and "c0 1.0-2.0 s, c1 3.0-3.5 s" in titles[0]
    assert titles[1:] == ["c0: found, logit +2.00", "c2: false alarm, logit +0.50",
                          "c1: missed, logit -1.00"]
    for ax, j in zip(axes[1:], (0, 2, 1)):
        assert (ax.images[0].get_array() == picture.evidence[0, j].T).all()   # (F, T)
        assert ax.images[0].get_extent() == [0, 5, 0, F] and ax.get_xlim() == (0, 5)
    boxes = [[(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] for ax in axes]
    assert boxes == [[], [(1, 2)], [], [(3, 3.5)]]
    # 1 kHz from 1 s on: the loudest cell of the spectrogram is there
    image = axes[0].images[0]
    level, (left, right, bottom, top) = np.asarray(image.get_array())[::-1], image.get_extent()
    loud = level.mean(1).argmax()
    assert abs(bottom + (loud + 0.5) / len(level) * (top - bottom) - 1000) < 40
    begin = np.flatnonzero(level[loud] > level.max() - 10)[0]
    assert abs(left + begin / level.shape[1] * (right - left) - 1) < 0.05


def test_picture_without_onsets_or_label(picture):
    os.remove("tokens/demo/eat/events.csv")
    axes = picture("1")
    assert "true: c1" in axes[0].get_title(loc="left") and not any(ax.patches for ax in axes)
    axes = picture("2")
    assert "none of the classes" in axes[0].get_title(loc="left")
    assert axes[1].get_title(loc="left") == "c2: false alarm, logit -1.00"  # the likeliest


def test_user_errors_of_show(picture, monkeypatch):
    refused(script("evaluate.py", "--show", "7"), "'7'")
    os.rename("data/demo/a1.wav", "elsewhere.wav")
    refused(script("evaluate.py", "--show", "1"), "data/demo/a1.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    refused(script("evaluate.py", "--show", "0"), "soundfile")
