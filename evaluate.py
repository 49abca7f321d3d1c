"""Score every run, say which metric it is, and how sure one can be.

Reads    runs/<data>/<model>/<pool>/seed<k>/  logits.npy, rows.npy, run.json (evidence.npy)
         tokens/<data>/<model>/               labels.npy, clips.csv, classes.txt, meta.json
Writes   a table on stdout; with --show one PNG. Needs numpy alone (--show: matplotlib, soundfile).

    python evaluate.py                               # every run, one table
    python evaluate.py --compare protobin linear     # paired difference with its interval
    python evaluate.py --classes                     # per class, most frequent first
    python evaluate.py --localise                    # evidence over time against known onsets
    python evaluate.py --show 802                    # where the head looked, as a picture

Macro mAP: mean average precision over the classes with a positive among the tested clips; how many
those are is printed as scored/C. +- is the standard deviation over seeds. The 95 % interval is
about the clips, for the seeds' mean: from random halves of them (of the recordings, where clips
share a file). It may lie below the score: AP of few positives comes out too high.
"""

import argparse
import collections
import concurrent.futures
import csv
import glob
import hashlib
import json
import math
import os
import re
import statistics
import sys

import numpy as np

# ---------------------------------------------------------------------------------------------
# constants: what, unit, source

RESAMPLES = 1000    # halves of the clips, fewer where that would take long [ours]
WORK = 1.5e10       # clips x classes x seeds x resamples, at most about a minute [ours]
REACH = 2.15        # standard deviations to each side for 95 %: 1.96, and a little because they
                    # are estimates from few positives; by simulation, see interval() [ours]
BIRDSET = "hsn nbp nes per pow sne uhh".split()  # there macro mAP is called cmAP [official code]
SETTINGS = "lr weight_decay loss epochs batch chunk prototypes tokens_md5".split()  # same for seeds
PANELS = 5          # classes in a picture, at most [ours]
COLUMNS = ["data", "model", "head", "metric", "scored", "score", "seeds", "sd", "low", "high",
           "resamples", "micro mAP", "AUROC", "d'", "macro accuracy", "parameters", "s/epoch",
           "peak GB", "paper", "difference", "re-run"]
NOTE = """
paper: from third-party digests of it, not read in the paper itself
re-run: by a co-author, with another loss and other features (arXiv 2602.16305, table 5)"""

# The paper's results, mAP or accuracy in percent. "data: head of each column | model cells | ...".
PAPER = """
as20k:  linear mhca protobin | amae 8.36 17.09 22.32 | asit 18.35 18.72 20.96
        | dasheng 20.98 27.49 29.94 | beats 24.71 21.86 31.54 | eat 17.29 26.11 31.67
        | sslam 17.04 24.45 30.94
fsd50k: linear mhca protobin | amae 19.71 45.17 49.69 | asit 39.57 42.28 46.70
        | dasheng 38.08 52.95 57.31 | beats 46.89 48.51 58.27 | eat 36.39 51.06 55.64
        | sslam 36.06 51.48 56.99
desed:  linear mhca protobin | amae 57.46 83.57 85.57 | asit 72.92 79.50 81.74
        | dasheng 68.39 84.53 86.14 | beats 77.56 86.91 89.22 | eat 76.15 86.06 88.82
        | sslam 72.49 85.44 88.33
spass:  linear mhca protobin | amae 58.94 79.24 79.95 | asit 68.80 75.76 74.69
        | dasheng 66.89 80.71 80.93 | beats 74.22 83.98 85.77 | eat 65.96 83.95 85.64
        | sslam 68.28 83.45 86.01
urban:  linear mhca protobin | amae 58.72 82.49 85.17 | asit 77.53 79.93 82.28
        | dasheng 69.61 84.59 86.55 | beats 82.54 86.23 88.74 | eat 77.76 86.43 89.24
        | sslam 75.86 86.45 89.05
as20k:  mlp linearc conv linpre ep simpool abmilp proto fine-tune
        | eat 20.59 21.94 19.50 26.49 26.83 25.15 19.91 31.06 40.2
fsd50k: mlp linearc conv linpre ep simpool abmilp proto
        | eat 44.82 38.36 46.64 48.21 51.29 49.38 45.93 56.07
urban:  mlp linearc conv linpre ep simpool abmilp proto protofloat
        | eat 81.58 78.45 86.35 84.04 85.40 83.58 79.93 89.11 89.14
as20k:  proto | sslam 30.84
as20k:  protofloat | eat 31.19
as20k:  fine-tune | amae 37.1 | beats 38.9 | sslam 40.9
fsd50k: mlp linpre proto | beats 49.58 39.93 57.17
fsd50k: proto | dasheng 55.23
desed:  proto | beats 89.04
sc2:    linear mhca protobin | sslam 64.8 93.8 91.9
sc2:    linear mhca protobin fine-tune | eat 69.1 93.2 90.4 98.3
esc50:  linear mhca protobin | sslam 74.2 89.0 84.7
esc50:  linear mhca protobin fine-tune | eat 75.33 89.83 86.83 95.9 | beats 78.92 83.17 84.08 95.6
"""
# A co-author's independent re-run (BAT, arXiv 2602.16305, table 5).
RERUN = """
as2m:  linear protobin | bat 31.19 42.94 | sslam 26.96 38.53 | eat 27.30 39.08 | beats 31.40 37.73
as20k: linear protobin | bat 26.15 35.98 | sslam 21.14 32.01 | eat 21.60 32.87 | beats 26.26 31.62
esc50: linear protobin | bat 95.25 98.95 | sslam 94.10 96.38 | eat 91.07 96.83 | beats 93.07 95.31
sc2:   linear protobin | bat 75.74 99.76 | sslam 56.28 98.04 | eat 74.31 98.52 | beats 92.60 99.27
hsn:   linear protobin | bat 9.21 36.14 | sslam 8.52 28.20 | eat 10.77 26.47 | beats 5.33 17.32
"""


class Stop(Exception):
    """A mistake of the user's, told in one sentence; main() prints it and exits with 2."""


def cells(text):
    """{(data, model, head): percent} of a table as above."""
    found = {}
    for line in text.strip().replace("\n  ", " ").split("\n"):
        data, rest = line.split(":")
        heads, *models = rest.split("|")
        for model in models:
            name, *values = model.split()
            assert len(values) == len(heads.split()), (data, name, values, heads)
            found |= {(data, name, head): float(v) for head, v in zip(heads.split(), values)}
    return found


# ---------------------------------------------------------------------------------------------
# metrics

def average_precision(labels, scores, weights=None):
    """AP of one class as scikit-learn defines it (no interpolation, tied scores are one
    threshold), for every column of weights at once: sum over thresholds of precision x gain in
    recall.

    labels bool (n,), scores (n,), weights (n, R) or None for ones -> (R,); nan where a column has
    no positive."""
    weights = np.ones((len(labels), 1)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    hit = np.flatnonzero(labels[order])
    if not len(hit):
        return np.full(weights.shape[1], np.nan)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # last of each tie
    tie, first = np.unique(np.searchsorted(ends, hit), return_index=True)
    # only ties with a positive count; sum the stretches down to each, then the sums
    starts = np.append(0, ends[tie][:-1] + 1)
    stretches = np.add.reduceat(weights[order[:ends[tie[-1]] + 1]], starts, axis=0)
    seen = stretches.cumsum(0, dtype=np.float64)                             # (ties, R)
    gain = np.add.reduceat(weights[order[hit]], first, axis=0).astype(np.float64)
    found = gain.cumsum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (gain * np.where(seen > 0, found / seen, 0)).sum(0) / found[-1]


def auroc(labels, scores):
    """Area under the ROC curve of one class, a tie counts half: the rank-sum formula; nan without
    a positive or without a negative."""
    _, tie, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[tie]
    P, N = labels.sum(), (~labels).sum()
    return (rank[labels].sum() - P * (P + 1) / 2) / (P * N) if P and N else np.nan


def per_class(function, labels, scores, *more):
    """function(labels[:, j], scores[:, j], *more) for every class j, stacked."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # numpy lets go of the interpreter
        return np.stack(list(pool.map(lambda j: function(labels[:, j], scores[:, j], *more),
                                      range(labels.shape[1]))))


def nanmean(values):
    """Mean over axis 0 of what is not nan; nan, without a warning, where all is."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)


def recalls(labels, logits):
    """Share of each class's clips that are put into it (C,); nan for a class without a clip."""
    right = logits.argmax(1) == labels.argmax(1)
    return nanmean(np.where(labels, right[:, None], np.nan))


def metrics(task, labels, logits):
    """{name: value}, the first is the one a table quotes; percent, but for d'.

    multi: macro mAP, micro mAP (all cells as one class), AUROC (macro), d' = sqrt(2) z(AUROC).
    single: accuracy, macro accuracy (mean recall over the classes that occur)."""
    if task == "single":
        return {"accuracy": 100 * (logits.argmax(1) == labels.argmax(1)).mean(),
                "macro accuracy": 100 * nanmean(recalls(labels, logits))}
    area = nanmean(per_class(auroc, labels, logits))
    inside = np.clip(area, 1e-9, 1 - 1e-9)  # d' of a perfect ranking is infinite: it ends at 8.5
    return {"macro mAP": 100 * nanmean(per_class(average_precision, labels, logits))[0],
            "micro mAP": 100 * average_precision(labels.ravel(), logits.ravel())[0],
            "AUROC": 100 * area,
            "d'": np.nan if np.isnan(area) else 2**0.5 * statistics.NormalDist().inv_cdf(inside)}


def main_metric(task, labels, logits, weights):
    """Macro mAP or accuracy, percent, for every column of weights (n, R): (R,)."""
    if task == "multi":
        return 100 * nanmean(per_class(average_precision, labels, logits, weights))
    right = (logits.argmax(1) == labels.argmax(1)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return 100 * (right @ weights) / weights.sum(0)


def resamples(recordings, number):
    """(clips, number) float32: each column 1 for a random half of the recordings, 0 for the rest;
    the same columns for the same recordings, so that any two heads can be paired.

    Whole recordings, since clips of one file are not independent. Halves (delete-half jackknife:
    Shao & Tu 1995, ch. 2) and no bootstrap: a positive drawn twice lifts its own precision."""
    group = np.unique(recordings, return_inverse=True)[1]
    key = np.random.default_rng(0).random((group.max() + 1, number))
    return (key < np.median(key, 0)).astype(np.float32)[group]


def interval(score, draws):
    """(low, high) of 95 %, around the score less its bias; nan if nothing could be drawn.

    A half differs from all the clips as all the clips differ from the population: by the same
    variance and nearly the same bias. With 10 classes of 2 to 30 % it holds the population's macro
    mAP in 95 % of test sets of 300 or of 1,000 clips; the bootstrap's basic interval in 89 and
    92 %, its percentile interval in 75 and 84 % (test_coverage)."""
    draws = draws[~np.isnan(draws)]
    if len(draws) < 2:
        return np.nan, np.nan
    middle, reach = 2 * score - draws.mean(), REACH * draws.std()
    return middle - reach, middle + reach


# ---------------------------------------------------------------------------------------------
# runs

def split_of(folder):
    """What a run was tested on: `valid` where settings are chosen, else `test`."""
    try:
        info = json.load(open(os.path.join(folder, "run.json"), encoding="utf-8"))
        valid = info["split"] == "valid"
    except (OSError, ValueError, KeyError, TypeError):
        valid = False  # read_run says what is wrong
    return "valid" if valid else "test"


def read_dump(folder, split="test"):
    """A dump as a dict, of its tokens a hash alone (None if they are gone); raises ValueError with
    the reason if it is of no use."""
    try:
        meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
        labels = np.load(os.path.join(folder, "labels.npy"))
        with open(os.path.join(folder, "clips.csv"), newline="", encoding="utf-8") as f:
            clips = list(csv.DictReader(f))
        classes = open(os.path.join(folder, "classes.txt"), encoding="utf-8").read().splitlines()
        task, paths = meta["task"], np.array([clip["path"] for clip in clips])
        splits = "\n".join(str(clip["split"]) for clip in clips).encode()
        # the clips that probe.py hashes too, enough to know the tokens again
        files = [os.path.join(folder, name) for name in ("tokens.npy", "cls.npy")]
        arrays = [np.load(file, mmap_mode="r") for file in files if os.path.exists(file)]
        some = b"".join(a[i].tobytes() for a in arrays for i in (0, len(a) // 2, -1))
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"its dump {folder} cannot be read ({e})")
    if labels.shape != (len(clips), len(classes)):
        raise ValueError(f"in its dump {folder} labels.npy {labels.shape}, clips.csv "
                         f"({len(clips)}) and classes.txt ({len(classes)}) do not agree")
    data, model = folder.split(os.sep)[-2:]
    if data in BIRDSET:  # HSN_093_20150712_085105_235_240.ogg: seconds 235 to 240 of a soundscape
        paths = np.array([re.sub(r"_\d+_\d+\.\w+$", "", path) for path in paths])
    metric = ("accuracy" if task == "single" else
              "cmAP (= macro mAP)" if data in BIRDSET else "macro mAP")
    name = {"data": data + (" (valid)" if split == "valid" else ""), "model": model}
    return {"folder": folder, "name": name, "audio": os.path.join("data", data), "task": task,
            "labels_md5": hashlib.md5(np.ascontiguousarray(labels).tobytes() + splits).hexdigest(),
            "tokens_md5": hashlib.md5(some).hexdigest() if os.path.exists(files[0]) else None,
            "meta": meta, "metric": metric, "labels": labels > 0, "clips": clips, "paths": paths,
            "classes": classes, "heads": collections.defaultdict(list)}


def read_run(folder, dump):
    """A run as a dict, logits (n, C) in the order of the dump's rows; raises ValueError with the
    reason why it cannot be scored."""
    try:
        info = json.load(open(os.path.join(folder, "run.json"), encoding="utf-8"))
        logits = np.load(os.path.join(folder, "logits.npy"))
        rows = np.load(os.path.join(folder, "rows.npy"))
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"cannot be read ({' '.join(str(e).split())})")
    clips, C = dump["labels"].shape
    if not isinstance(info, dict) or rows.dtype.kind not in "iu":
        raise ValueError(f"run.json or rows.npy ({rows.dtype}) is not what probe.py writes")
    if info.get("labels_md5", dump["labels_md5"]) != dump["labels_md5"]:
        raise ValueError("the dump's labels or splits are others now; probe again")
    if dump["tokens_md5"] and info.get("tokens_md5", dump["tokens_md5"]) != dump["tokens_md5"]:
        raise ValueError("the dump's tokens are others now; probe again")
    for key in ("clips", "checkpoint", "precision"):
        if info.get("dump", {}).get(key) != dump["meta"].get(key):
            raise ValueError(f"the dump has been made anew since, with other {key}; probe again")
    if logits.ndim != 2 or logits.shape[1] != C:
        raise ValueError(f"logits.npy is {logits.shape}, the dump has {C} classes")
    if not (0 < len(np.unique(rows)) == len(rows) == len(logits)
            and 0 <= rows.min() and rows.max() < clips):
        raise ValueError(f"rows.npy ({len(rows)}) and logits.npy ({len(logits)}) do not fit each "
                         f"other or the dump's {clips} clips")
    if not np.isfinite(logits).all():
        raise ValueError("logits.npy holds numbers that are not finite")
    order = np.argsort(rows)
    return {"folder": folder, "info": info, "order": order, "rows": rows[order],
            "logits": logits[order].astype(np.float32)}


def read_runs(root, *wanted):
    """[dumps], each with heads {pool: [runs]} and labels, clips, paths of the tested clips only;
    wanted: data, model, pools, each names with commas between, or None for all. What cannot be
    scored is named on stderr."""
    dumps = {}
    for folder in sorted(glob.glob(os.path.join(glob.escape(root), "*", "*", "*", "seed*"))):
        data, model, pool = names = folder.split(os.sep)[-4:-1]
        if any(some and name not in some.split(",") for name, some in zip(names, wanted)):
            continue
        try:
            key = data, model, split_of(folder)  # chosen settings and results never mix
            if key not in dumps:
                dumps[key] = read_dump(os.path.join("tokens", data, model), key[2])
            dump = dumps[key]
            run = read_run(folder, dump)
            if not np.array_equal(dump.setdefault("rows", run["rows"]), run["rows"]):
                raise ValueError("it was tested on other clips than the runs before it")
            first = (dump["heads"][pool] or [run])[0]
            differ = [k for k in SETTINGS if run["info"].get(k) != first["info"].get(k)]
            if differ:
                raise ValueError(f"its {' '.join(differ)} differ from those of {first['folder']}; "
                                 f"make all seeds anew with --overwrite")
            dump["heads"][pool].append(run)
        except ValueError as e:
            print(f"skipped {folder}: {e}", file=sys.stderr)
    dumps = [dump for dump in dumps.values() if dump["heads"]]
    for dump in dumps:
        dump["labels"], dump["paths"] = dump["labels"][dump["rows"]], dump["paths"][dump["rows"]]
        dump["clips"] = [dump["clips"][row] for row in dump["rows"]]
    return dumps


def draw(dump, runs, weights):
    """Main metric of each column of weights, mean over runs: (R,)."""
    return np.mean([main_metric(dump["task"], dump["labels"], run["logits"], weights)
                    for run in runs], 0)


def halves(dump, runs, number):
    """So many resamples of the tested clips, or fewer (100 at least) where that takes minutes."""
    most = max(100, int(WORK / (dump["labels"].size * runs)))
    return resamples(dump["paths"], min(number, most))


# ---------------------------------------------------------------------------------------------
# tables

def score_table(dumps, number):
    """One row per data x model x head; first a head that knows nothing, last fine-tuning."""
    paper, rerun, rows = cells(PAPER), cells(RERUN), []
    for dump in dumps:
        labels, key = dump["labels"], tuple(dump["name"].values())
        known = dict.fromkeys(COLUMNS) | dump["name"] | {
            "metric": dump["metric"], "scored": f"{labels.any(0).sum()}/{labels.shape[1]}"}
        share = labels.mean(0)  # a constant score has a class's prevalence as its AP
        rows.append(known | ({"head": "majority class", "score": 100 * share.max()}
                             if dump["task"] == "single" else
                             {"head": "prevalence", "score": 100 * nanmean(share[share > 0])}))
        for pool, runs in dump["heads"].items():
            values = [metrics(dump["task"], labels, run["logits"]) for run in runs]
            main, *others = values[0]
            score, told = np.mean([v[main] for v in values]), paper.get((*key, pool))
            draws = draw(dump, runs, halves(dump, len(runs), number))
            low, high = np.clip(interval(score, draws), 0, 100)
            costs = {name: np.mean([run["info"].get(k, np.nan) for run in runs]) / unit
                     for name, k, unit in (("s/epoch", "seconds_per_epoch", 1),
                                           ("peak GB", "peak_memory_bytes", 1e9))}
            rows.append(known | costs | {k: np.mean([v[k] for v in values]) for k in others} | {
                "head": pool, "score": score, "seeds": len(runs),
                "sd": np.std([v[main] for v in values], ddof=1) if len(runs) > 1 else None,
                "low": low, "high": high, "resamples": len(draws),
                "parameters": runs[0]["info"].get("parameters"), "paper": told,
                "difference": told and score - told, "re-run": rerun.get((*key, pool))})
        if (*key, "fine-tune") in paper:
            rows.append(known | {"head": "fine-tune", "paper": paper[(*key, "fine-tune")]})
    return rows


def compare_table(dumps, a, b, number):
    """score(a) - score(b) for each data x model that has both, on the same resamples."""
    rows = []
    for dump in dumps:
        if a in dump["heads"] and b in dump["heads"]:
            one, two = dump["heads"][a], dump["heads"][b]
            every = np.ones((len(dump["labels"]), 1), np.float32)
            first, second = draw(dump, one, every)[0], draw(dump, two, every)[0]
            weights = halves(dump, len(one + two), number)
            draws = draw(dump, one, weights) - draw(dump, two, weights)
            low, high = interval(first - second, draws)
            rows.append(dump["name"] | {
                "heads": f"{a} - {b}", "metric": dump["metric"], "seeds": f"{len(one)}, {len(two)}",
                "first": first, "second": second, "difference": first - second, "low": low,
                "high": high, "resamples": len(draws)})
    if not rows:
        there = sorted({pool for dump in dumps for pool in dump["heads"]})
        raise Stop(f"no data x model has runs of both {a} and {b} (there are {' '.join(there)}); "
                   f"train them with python probe.py --pool {a},{b}")
    return rows


def class_table(dumps):
    """AP (or recall, for single) of each class in percent, mean over seeds."""
    rows = []
    for dump in dumps:
        score = recalls if dump["task"] == "single" else (
            lambda labels, logits: per_class(average_precision, labels, logits)[:, 0])
        table = {pool: np.mean([100 * score(dump["labels"], run["logits"]) for run in runs], 0)
                 for pool, runs in dump["heads"].items()}                    # (C,) each
        counts = dump["labels"].sum(0)
        for j in np.argsort(-counts, kind="stable"):
            rows.append(dump["name"] | {"class": name_of(dump, dump["classes"][j]),
                                        "positives": counts[j]}
                        | {pool: values[j] for pool, values in table.items()})
    return rows


def name_of(dump, label):
    return dump["meta"].get("names", {}).get(label, label)


def localise_table(dumps):
    """Where, not only whether: evidence over time against known onsets, learned from clip labels.

    frame mAP: a frame is one token step; its score for a class is the evidence summed over
    frequency, its label whether an event of the class covers its centre. segment mAP: 1 s, mean
    score, label whether an event touches it. Macro over classes, pooled over all tested clips.
    To compare: random scores, and each clip's logit in all its frames."""
    rows = []
    for dump in dumps:
        heads = {pool: with_evidence(runs) for pool, runs in dump["heads"].items()}
        if not any(heads.values()) or not os.path.exists(f"{dump['folder']}/events.csv"):
            continue
        frames, segments, inside = truth(dump)
        maps = {"random": [np.random.default_rng(0).random(frames.shape)]}   # (n, T, C) each
        for pool, runs in heads.items():
            maps[pool] = [read_evidence(run, dump)[run["order"]].sum(3, dtype=np.float32)
                          .swapaxes(1, 2)[:, :frames.shape[1]] for run in runs]
            maps[f"{pool}, clip logit"] = [run["logits"][:, None].repeat(frames.shape[1], 1)
                                           for run in runs]
        for head, scores in maps.items():
            if scores:
                rows.append(dump["name"] | {
                    "head": head, "seeds": len(scores),
                    "scored": f"{frames.any((0, 1)).sum()}/{frames.shape[2]}",
                    "frame mAP": np.mean([pooled_mAP(frames, s) for s in scores]),
                    "segment mAP": np.mean([pooled_mAP(segments, inside @ s) for s in scores])})
    if not rows:
        raise Stop("no run has both evidence.npy and known onsets (events.csv in its dump); make "
                   "one of such a dataset: python probe.py --data demo --pool protobin --evidence")
    return rows


def pooled_mAP(labels, scores):
    """Macro mAP, percent, over all clips and times; both (n, time, C)."""
    C = labels.shape[2]
    return 100 * nanmean(per_class(average_precision, labels.reshape(-1, C),
                                   scores.reshape(-1, C)))[0]


def with_evidence(runs):
    return [run for run in runs if os.path.exists(os.path.join(run["folder"], "evidence.npy"))]


def read_evidence(run, dump):
    """(n, C, T, F) float16, left on disk, in the order of rows.npy: run["order"] sorts it."""
    file = os.path.join(run["folder"], "evidence.npy")
    try:
        evidence = np.load(file, mmap_mode="r")
        return evidence.reshape(*run["logits"].shape, *dump["meta"]["grid"])
    except (OSError, ValueError, EOFError, KeyError) as e:
        raise Stop(f"{file} does not fit its run and the grid of its dump ({e}); make it anew with "
                   f"python probe.py --pool {run['info'].get('pool')} --evidence --overwrite")


def times(dump):
    """(seconds of a token step, seconds of a clip)"""
    try:
        return dump["meta"]["token_seconds"], dump["meta"]["seconds"]
    except KeyError as e:
        raise Stop(f"{dump['folder']}/meta.json lacks {e}; without it tokens have no time")


def read_events(dump):
    """For each tested clip its [(onset, offset, label)], seconds from the start of the clip; empty
    lists where onsets are not known."""
    events, file = collections.defaultdict(list), os.path.join(dump["folder"], "events.csv")
    if os.path.exists(file):
        with open(file, newline="", encoding="utf-8") as f:
            try:
                for row in csv.DictReader(f):
                    when = float(row["onset"]), float(row["offset"])
                    events[row["path"]].append((*when, row["label"]))
            except (KeyError, TypeError, ValueError) as e:
                raise Stop(f"{file}: a row cannot be read ({e}); its header is "
                           f"path,onset,offset,label, the times are seconds")
    _, seconds = times(dump)
    starts = [float(clip["start"]) for clip in dump["clips"]]
    return [[(a - start, b - start, label) for a, b, label in events[clip["path"]]
             if b > start and a < start + seconds] for clip, start in zip(dump["clips"], starts)]


def truth(dump):
    """frames bool (n, T, C), segments bool (n, S, C), and the matrix (S, T) that averages the
    frames of a segment; frames centred behind the end of a clip, in padding, are left out."""
    step, seconds = times(dump)
    centre = (np.arange(dump["meta"]["grid"][0]) + 0.5) * step
    centre, edge = centre[centre < seconds], np.arange(math.ceil(seconds))
    n, C = dump["labels"].shape
    frames, segments = np.zeros((n, len(centre), C), bool), np.zeros((n, len(edge), C), bool)
    column = {label: j for j, label in enumerate(dump["classes"])}
    for i, events in enumerate(read_events(dump)):
        for onset, offset, label in events:
            if label in column:
                frames[i, (centre >= onset) & (centre < offset), column[label]] = True
                segments[i, (edge < offset) & (edge + 1 > onset), column[label]] = True
    inside = (centre.astype(int) == edge[:, None]).astype(np.float32)        # (S, T)
    return frames, segments, inside / np.maximum(inside.sum(1, keepdims=True), 1)


def show_table(rows, kind):
    """Print rows as aligned text, csv, md or json; text and md leave empty columns out."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    rows = [{k: plain(row.get(k)) for k in columns} for row in rows]
    if kind == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if kind == "csv":
        out = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
        return
    columns = [c for c in columns if c not in ("high", "resamples")
               and any(row[c] is not None for row in rows)]

    def text(row, c):
        v = row[c]
        if v is None or isinstance(v, str):
            return v or ""
        if c == "low":
            return f"[{v:.2f}, {row['high']:.2f}]"
        return f"{v:+.2f}" if c == "difference" else f"{v:,}" if isinstance(v, int) else f"{v:.2f}"
    head = [{"low": "95 % interval", "sd": "+- sd"}.get(c, c) for c in columns]
    lines = [[text(row, c) for c in columns] for row in rows]
    left = [all(isinstance(row[c], (str, type(None))) for row in rows) for c in columns]
    if kind == "md":
        lines = [head, ["---" if l else "--:" for l in left]] + lines
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        width = [max(map(len, column)) for column in zip(head, *lines)]
        for line in [head] + lines:
            print("  ".join(v.ljust(w) if l else v.rjust(w)
                            for v, w, l in zip(line, width, left)).rstrip())
    if {"paper", "re-run"} & set(columns):
        print(NOTE)


def plain(value):
    """Python's own number for json and csv, None for nan."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


# ---------------------------------------------------------------------------------------------
# one picture

def show_clip(dumps, clip, pool):
    """Write <data>-<model>-<pool>-<row>.png: the clip's spectrogram, and for each predicted class
    (logit > 0) and each true one what its tokens added to the logit, over seconds and Hz."""
    there = [(dump, run) for dump in dumps
             for run in with_evidence(dump["heads"].get(pool, []))[:1]]
    if not there:
        data, model = dumps[0]["folder"].split(os.sep)[-2:]
        raise Stop(f"no run of {pool} has evidence.npy; make it with python probe.py --data {data} "
                   f"--model {model} --pool {pool} --evidence (linear, mlp and linearc have none)")
    try:
        import matplotlib
        matplotlib.use("Agg")  # a file is all we want, there may be no screen
        import soundfile
        from matplotlib import mlab, pyplot as plt
    except ImportError as e:
        raise Stop(f"--show needs one more package: pip install {e.name}")
    found = [(dump, run, i) for dump, run in there for i, row in enumerate(dump["rows"])
             if clip in (str(row), dump["clips"][i]["path"])]
    if not found:
        rows = [f"{run['folder']} (rows {dump['rows'][0]} to {dump['rows'][-1]})"
                for dump, run in there]
        raise Stop(f"no tested clip {clip!r} in {', '.join(rows)}; name one of these")
    dump, run, i = max(found, key=lambda one: os.path.getmtime(one[1]["folder"]))
    (T, F), (step, seconds) = dump["meta"]["grid"], times(dump)
    clip, logits, labels = dump["clips"][i], run["logits"][i], dump["labels"][i]
    evidence = read_evidence(run, dump)[run["order"][i]].astype(np.float32)  # (C, T, F)
    events, names = read_events(dump)[i], [name_of(dump, label) for label in dump["classes"]]
    true = [j for j in np.argsort(-logits) if labels[j]]
    false = [j for j in np.argsort(-logits) if not labels[j] and logits[j] > 0]
    shown = sorted((true + false)[:PANELS] or [logits.argmax()], key=lambda j: -logits[j])
    file, start = os.path.join(dump["audio"], clip["path"]), float(clip["start"])
    try:
        with soundfile.SoundFile(file) as f:
            rate = f.samplerate
            f.seek(int(start * rate))
            wave = f.read(int(seconds * rate), always_2d=True).mean(1)
    except (OSError, RuntimeError) as e:
        raise Stop(f"{file}: the audio of this clip cannot be read ({e}); put it back there")
    size = 512 if rate <= 16000 else 1024
    power, hertz, moments = mlab.specgram(wave, size, rate, noverlap=size * 3 // 4)
    level = 10 * np.log10(power + 1e-12)                                     # (Hz, time)
    top = dump["meta"].get("sample_rate", 16000) / 2
    mel = (lambda f: np.log1p(np.maximum(f, 0) / 700), lambda m: 700 * np.expm1(m))  # and back
    bands = mel[1](np.linspace(mel[0](20), mel[0](top), F + 1))  # edges: equally wide in mel

    plt.rcParams["font.size"] = 8
    fig, axes = plt.subplots(1 + len(shown), 1, figsize=(8, 1.6 + len(shown)), sharex=True,
                             sharey=True, layout="constrained",
                             height_ratios=[1.7] + [1] * len(shown))
    axes[0].pcolormesh(moments, hertz, level, vmin=level.max() - 70, cmap="magma", rasterized=True)
    known = ([f"{name_of(dump, label)} {a:.1f}-{b:.1f} s" for a, b, label in events]
             or [names[j] for j in np.flatnonzero(labels)] or ["none of the classes"])
    axes[0].set_title(f"{clip['path']}     true: {', '.join(known)}", loc="left")
    span = np.abs(evidence[shown]).max() or 1
    for ax, j in zip(axes[1:], shown):
        mesh = ax.pcolormesh(np.arange(T + 1) * step, bands, evidence[j].T, cmap="RdBu_r",
                             vmin=-span, vmax=span)
        for onset, offset, label in events:
            if label == dump["classes"][j]:
                ax.axvspan(onset, offset, fill=False, edgecolor="green", linewidth=1.5)
        verdict = "false alarm" if not labels[j] else "found" if logits[j] > 0 else "missed"
        ax.set_title(f"{names[j]}: {verdict}, logit {logits[j]:+.2f}", loc="left")
    axes[0].set_yscale("function", functions=mel)
    axes[0].set(xlim=(0, seconds), ylim=(bands[0], top),
                yticks=[f for f in (250, 1000, 2000, 4000, 8000, 16000) if f <= top])
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[-1].set_xlabel("seconds" + "     (green: when the class truly sounds)" * bool(events))
    fig.supylabel("Hz")
    fig.colorbar(mesh, ax=list(axes[1:]), label=f"added to the logit by each token ({pool})",
                 aspect=40)
    out = "-".join([*dump["name"].values(), pool, f"{dump['rows'][i]}.png"])
    fig.savefig(out, dpi=150)
    print(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to print
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="difference of two heads")
    what.add_argument("--classes", action="store_true", help="a row per class")
    what.add_argument("--localise", action="store_true",
                      help="score evidence over time where onsets are known")
    what.add_argument("--show", metavar="CLIP", help="PNG of a row number or path of the dump")
    # of which runs
    parser.add_argument("--runs", default="runs", metavar="DIR", help="default runs")
    parser.add_argument("--data", metavar="NAME[,NAME...]", help="these datasets only")
    parser.add_argument("--model", metavar="NAME[,NAME...]", help="these encoders only")
    parser.add_argument("--pool", metavar="NAME[,NAME...]",
                        help="these heads only (--show: one, default protobin)")
    # how
    parser.add_argument("--format", choices=("text", "csv", "md", "json"), default="text",
                        help="of the table (default text)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N",
                        help=f"halves of the clips for an interval, at most (default {RESAMPLES})")
    args = parser.parse_args()
    if args.resamples < 2:
        raise Stop("--resamples must be 2 or more")
    dumps = read_runs(args.runs, args.data, args.model, args.pool)
    if not dumps:
        only = "".join(f" --{k} {v}" for k, v in vars(args).items()
                       if k in ("data", "model", "pool") and v)
        print(f"evaluate.py: no run below {args.runs}/ can be scored{only and ' with' + only}; "
              f"make one with python probe.py", file=sys.stderr)
        sys.exit(1)
    if args.show:
        return show_clip(dumps, args.show, args.pool or "protobin")
    rows = (compare_table(dumps, *args.compare, args.resamples) if args.compare else
            class_table(dumps) if args.classes else
            localise_table(dumps) if args.localise else
            score_table(dumps, args.resamples))
    show_table(rows, args.format)


if __name__ == "__main__":
    try:
        main()
    except Stop as e:
        sys.exit(print(f"evaluate.py: {e}", file=sys.stderr) or 2)
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        sys.exit(print(f"evaluate.py: {e.filename}: {e.strerror}; mend that", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
