"""Score every run, say which metric it is, and how sure one can be.

Reads    runs/<data>/<model>/<pool>/seed<k>/  logits.npy, rows.npy, run.json (evidence.npy)
         tokens/<data>/<model>/               labels.npy, clips.csv, classes.txt, meta.json
Writes   a table on stdout; with --show one PNG. Needs numpy alone (and for --show matplotlib).

    python evaluate.py                               # every run, one table
    python evaluate.py --compare protobin linear     # paired difference with its interval
    python evaluate.py --classes                     # per class, most frequent first
    python evaluate.py --show 1042                   # where the head looked, as a picture

Macro mAP: mean average precision over the classes with a positive among the tested clips; how many
those are is printed as scored/C. +- is the standard deviation over seeds. The 95 % interval is a
basic bootstrap over test clips (over recordings, where clips share a file) of the seeds' mean.
"""

import argparse
import collections
import concurrent.futures
import csv
import functools
import glob
import json
import os
import statistics
import sys

import numpy as np

# ---------------------------------------------------------------------------------------------
# constants: what, unit, source

RESAMPLES = 1000    # bootstrap resamples, fewer where that would take long [ours]
WORK = 1.5e10       # clips x classes x seeds x resamples done in about a minute on 2 cores [ours]
LEVEL = 0.95        # of the interval [ours]
BIRDSET = "hsn nbp nes per pow sne uhh".split()  # there macro mAP is called cmAP [official code]
MAX_PANELS = 6      # classes in a picture at most [ours]

# Result cells of the paper, mAP or accuracy in percent, collected from third-party digests of it:
# not read in the paper itself. "data: head of every column | model: cells".
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
# A co-author's independent re-run (BAT, arXiv 2602.16305, table 5): other loss, augmentation, and
# layer norm before the linear probe.
RERUN = """
as20k: linear protobin | sslam 21.14 32.01 | eat 21.60 32.87 | beats 26.26 31.62
esc50: linear protobin | sslam 94.10 96.38 | eat 91.07 96.83 | beats 93.07 95.31
sc2:   linear protobin | sslam 56.28 98.04 | eat 74.31 98.52 | beats 92.60 99.27
hsn:   linear protobin | sslam 8.52 28.20 | eat 10.77 26.47 | beats 5.33 17.32
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


def per_class(function, labels, logits, *more):
    """function(labels[:, j], logits[:, j], *more) for every class j, stacked."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # numpy lets go of the interpreter
        return np.stack(list(pool.map(lambda j: function(labels[:, j], logits[:, j], *more),
                                      range(labels.shape[1]))))


def nanmean(values, axis=0):
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def metrics(task, labels, logits):
    """{name: value}; the first is the one a table quotes. Percent, but for d'.

    multi: macro mAP, micro mAP (all cells as one class), AUROC (macro), d' = sqrt(2) z(AUROC).
    single: accuracy, macro accuracy (mean recall over the classes that occur)."""
    if task == "single":
        right = logits.argmax(1) == labels.argmax(1)
        recall = [right[labels[:, j]].mean() for j in range(labels.shape[1]) if labels[:, j].any()]
        return {"accuracy": 100 * right.mean(), "macro accuracy": 100 * np.mean(recall)}
    area = nanmean(per_class(auroc, labels, logits))
    inside = min(max(area, 1e-9), 1 - 1e-9)  # d' of a perfect ranking is infinite: it ends at 8.5
    return {"macro mAP": 100 * nanmean(per_class(average_precision, labels, logits))[0],
            "micro mAP": 100 * average_precision(labels.ravel(), logits.ravel())[0],
            "AUROC": 100 * area,
            "d'": 2 ** 0.5 * statistics.NormalDist().inv_cdf(inside) if area == area else area}


def resamples(paths, number, seed=0):
    """(clips, number) float32: how often each clip is in each resample. Whole recordings are
    drawn, since clips of one file are not independent; the same draw for the same clips."""
    _, group = np.unique(paths, return_inverse=True)
    groups = group.max() + 1
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=number)
    return np.ascontiguousarray(counts.T[group], dtype=np.float32)


def main_metric(task, labels, logits, weights):
    """Macro mAP or accuracy, percent, of every column of weights: (R,)."""
    if task == "single":
        right = (logits.argmax(1) == labels.argmax(1)).astype(np.float32)
        return 100 * (right @ weights) / weights.sum(0)
    return 100 * nanmean(per_class(average_precision, labels, logits, weights))


def interval(point, draws):
    """Basic bootstrap interval: 2 point - quantiles. The percentile interval would inherit the
    upward bias that repeated positives give a resampled mAP."""
    low, high = np.nanquantile(draws, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return 2 * point - low, 2 * point - high


# ---------------------------------------------------------------------------------------------
# runs

@functools.lru_cache(maxsize=None)
def read_dump(folder):
    """(meta, labels bool (clips, C), rows of clips.csv, classes). Raises ValueError."""
    try:
        meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
        labels = np.load(os.path.join(folder, "labels.npy"))
        with open(os.path.join(folder, "clips.csv"), newline="", encoding="utf-8") as f:
            clips = list(csv.DictReader(f))
        classes = open(os.path.join(folder, "classes.txt"), encoding="utf-8").read().splitlines()
    except (OSError, ValueError) as e:
        raise ValueError(f"its dump {folder} cannot be read ({e})")
    if len(labels) != len(clips) or labels.shape[1] != len(classes):
        raise ValueError(f"in its dump {folder} labels.npy {labels.shape}, clips.csv ({len(clips)}) "
                         f"and classes.txt ({len(classes)}) do not agree")
    return meta, labels > 0, clips, classes


def read_run(folder, tokens="tokens"):
    """One run as a dict; raises ValueError with the reason why it cannot be scored."""
    data, model, pool, seed = folder.split(os.sep)[-4:]
    try:
        info = json.load(open(os.path.join(folder, "run.json"), encoding="utf-8"))
        logits = np.load(os.path.join(folder, "logits.npy"))
        rows = np.load(os.path.join(folder, "rows.npy"))
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"cannot be read ({' '.join(str(e).split())})")
    meta, labels, clips, classes = read_dump(os.path.join(tokens, data, model))
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise ValueError(f"logits.npy is {logits.shape}, the dump has {len(classes)} classes")
    if len(rows) != len(logits) or not len(rows) or rows.min() < 0 or rows.max() >= len(labels):
        raise ValueError(f"rows.npy ({len(rows)}) and logits.npy ({len(logits)}) do not fit the "
                         f"dump's {len(labels)} clips")
    if not np.isfinite(logits).all():
        raise ValueError("logits.npy holds numbers that are not finite")
    if info.get("dump", {}).get("clips") != meta.get("clips"):
        raise ValueError("the dump has been made anew since, with other clips; probe again")
    return {"data": data, "model": model, "pool": pool, "seed": seed, "info": info, "meta": meta,
            "logits": logits.astype(np.float32), "rows": rows, "labels": labels[rows],
            "paths": np.array([clips[r]["path"] for r in rows]), "classes": classes,
            "folder": folder, "clips": clips}


def read_runs(root, wanted):
    """{(data, model, pool): [runs, by seed]} of all that can be scored; the rest is named."""
    found = collections.defaultdict(list)
    pattern = os.path.join(glob.escape(root), "*", "*", "*", "seed*")
    for folder in sorted(glob.glob(pattern)):
        if folder.endswith(".part") or not all(w in (None, part) for w, part in zip(
                wanted, folder.split(os.sep)[-4:])):
            continue
        try:
            run = read_run(folder)
            group = found[run["data"], run["model"], run["pool"]]
            if group and not np.array_equal(np.sort(group[0]["rows"]), np.sort(run["rows"])):
                raise ValueError("it was tested on other clips than the seeds before it")
            group.append(run)
        except ValueError as e:
            print(f"skipped {folder}: {e}", file=sys.stderr)
    return {k: v for k, v in found.items() if v}


def aligned(run):
    """Labels and logits in the order of the dump's rows, so that any two runs can be paired."""
    order = np.argsort(run["rows"], kind="stable")
    return run["labels"][order], run["logits"][order], run["paths"][order]


def how_many(runs, number):
    size = runs[0]["logits"].size * len(runs)
    return max(1, min(number, max(100, int(WORK / size))))


def draw(runs, weights):
    """Main metric of the seeds' mean on each resample: (R,)."""
    return np.mean([main_metric(r["meta"]["task"], *aligned(r)[:2], weights) for r in runs], 0)


# ---------------------------------------------------------------------------------------------
# tables

def score_table(groups, number):
    """One row per data x model x head, a baseline row first of each data x model."""
    paper, rerun, rows = cells(PAPER), cells(RERUN), []
    for (data, model), keys in by_dump(groups).items():
        first = groups[keys[0]][0]
        task, labels = first["meta"]["task"], first["labels"]
        scored, C = int(labels.any(0).sum()), labels.shape[1]
        name = ("accuracy" if task == "single" else
                "cmAP (= macro mAP)" if data in BIRDSET else "macro mAP")
        base = labels.mean(0)
        rows.append({"data": data, "model": model, "head": "majority class" if task == "single"
                     else "prevalence", "metric": name, "scored": f"{scored}/{C}",
                     "score": 100 * (base.max() if task == "single" else base[base > 0].mean())})
        for key in keys:
            runs = groups[key]
            values = [metrics(task, r["labels"], r["logits"]) for r in runs]
            mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
            main, *others = mean
            R = how_many(runs, number)
            low, high = interval(mean[main], draw(runs, resamples(aligned(runs[0])[2], R)))
            info = [r["info"] for r in runs]
            cost = lambda k: np.mean([i[k] for i in info]) if all(k in i for i in info) else None
            memory = cost("peak_memory_bytes")
            row = {"data": data, "model": model, "head": key[2], "metric": name,
                   "scored": f"{scored}/{C}", "score": mean[main], "seeds": len(runs),
                   "sd": float(np.std([v[main] for v in values], ddof=1)) if len(runs) > 1 else None,
                   "low": float(low), "high": float(high), "resamples": R}
            row |= {k: mean[k] for k in others}
            row |= {"parameters": info[0].get("parameters"), "s/epoch": cost("seconds_per_epoch"),
                    "GB": memory and memory / 1e9, "paper": paper.get(key)}
            row |= {"difference": row["score"] - row["paper"] if row["paper"] else None,
                    "re-run": rerun.get(key)}
            rows.append(row)
        tuned = paper.get((data, model, "fine-tune"))
        if tuned:
            rows.append({"data": data, "model": model, "head": "fine-tune", "metric": name,
                         "scored": f"{scored}/{C}", "paper": tuned})
    return rows


def by_dump(groups):
    dumps = collections.defaultdict(list)
    for key in groups:
        dumps[key[:2]].append(key)
    return dumps


def compare_table(groups, a, b, number):
    """score(a) - score(b) for each data x model that has both, on the same resamples."""
    rows = []
    for data, model in by_dump(groups):
        if not {(data, model, a), (data, model, b)} <= set(groups):
            continue
        one, two = groups[data, model, a], groups[data, model, b]
        if not np.array_equal(np.sort(one[0]["rows"]), np.sort(two[0]["rows"])):
            print(f"skipped {data} {model}: {a} and {b} were tested on different clips",
                  file=sys.stderr)
            continue
        task = one[0]["meta"]["task"]
        R = how_many(one + two, number)
        weights = resamples(aligned(one[0])[2], R)
        ones = np.ones((len(one[0]["rows"]), 1), np.float32)
        points = [float(draw(runs, ones)[0]) for runs in (one, two)]
        low, high = interval(points[0] - points[1], draw(one, weights) - draw(two, weights))
        rows.append({"data": data, "model": model, "metric": "accuracy" if task == "single"
                     else "macro mAP", a: points[0], b: points[1],
                     "difference": points[0] - points[1], "low": float(low), "high": float(high),
                     "seeds": f"{len(one)}, {len(two)}", "resamples": R})
    if not rows:
        raise Stop(f"no data x model has runs of both {a} and {b}; train them with "
                   f"python probe.py --pool {a},{b}")
    return rows


def class_table(groups):
    """Average precision (or recall, for single) of each class, mean over seeds."""
    rows = []
    for (data, model), keys in by_dump(groups).items():
        first = groups[keys[0]][0]
        names, counts = first["meta"].get("names", {}), first["labels"].sum(0)
        table = {}
        for key in keys:
            if first["meta"]["task"] == "single":
                table[key[2]] = np.mean([[
                    (r["logits"].argmax(1) == j)[r["labels"][:, j]].mean() if counts[j] else np.nan
                    for j in range(len(counts))] for r in groups[key]], 0)
            else:
                table[key[2]] = np.mean([per_class(
                    average_precision, r["labels"], r["logits"])[:, 0] for r in groups[key]], 0)
        for j in np.argsort(-counts, kind="stable"):
            label = first["classes"][j]
            rows.append({"data": data, "model": model, "class": names.get(label, label),
                         "positives": int(counts[j])}
                        | {h: None if np.isnan(v[j]) else float(100 * v[j])
                           for h, v in table.items()})
    return rows


def localise_table(groups, tokens="tokens"):
    """Where, not only whether: evidence over time against known onsets, the probe having seen
    clip labels alone.

    frame mAP: a frame is one token step; its score for a class is the evidence summed over
    frequency, its label whether an event of the class covers its centre. segment mAP: 1 s, scores
    summed, label whether an event touches it. Macro over classes, pooled over all tested clips.
    'random' scores frames at random; 'clip logit' gives every frame of a clip its logit."""
    rows = []
    for (data, model), keys in by_dump(groups).items():
        file = os.path.join(tokens, data, model, "events.csv")
        keys = [k for k in keys if os.path.exists(
            os.path.join(groups[k][0]["folder"], "evidence.npy"))]
        if not os.path.exists(file) or not keys:
            continue
        first = groups[keys[0]][0]
        frames, segments = truth(first, read_events(file))
        per_second = segments.shape[1]
        rng = np.random.default_rng(0)
        chance = rng.random(frames.shape)
        entries = [("random", [chance])]
        for key in keys:
            maps = []
            for run in groups[key]:
                path = os.path.join(run["folder"], "evidence.npy")
                if os.path.exists(path):
                    order = np.argsort(run["rows"], kind="stable")
                    evidence = np.load(path, mmap_mode="r")[order].astype(np.float32)
                    grid = run["meta"]["grid"]
                    maps.append(evidence.reshape(*evidence.shape[:2], *grid).sum(3)
                                .transpose(0, 2, 1))                         # (n, T, C)
            entries.append((key[2], maps))
        logits = aligned(first)[1][:, None].repeat(frames.shape[1], 1)
        entries.insert(1, (f"clip logit ({keys[0][2]})", [logits]))
        step = first["meta"]["token_seconds"]
        second = np.minimum(((np.arange(frames.shape[1]) + 0.5) * step).astype(int), per_second - 1)
        for name, maps in entries:
            scores = []
            for m in maps:
                summed = np.stack([m[:, second == s].sum(1) for s in range(per_second)], 1)
                scores.append([100 * nanmean(per_class(average_precision, t.reshape(-1, t.shape[2]),
                                                       x.reshape(-1, x.shape[2])))[0]
                               for t, x in ((frames, m), (segments, summed))])
            f, s = np.mean(scores, 0)
            rows.append({"data": data, "model": model, "head": name, "frame mAP": float(f),
                         "segment mAP": float(s), "seeds": len(maps), "scored": f"{int(frames.any((0, 1)).sum())}/{frames.shape[2]}"})
    if not rows:
        raise Stop("no run has both evidence.npy and known onsets (events.csv in its dump); make "
                   "one with python probe.py --pool protobin,mean --evidence")
    return rows


def read_events(file):
    events = collections.defaultdict(list)
    with open(file, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            events[row["path"]].append((float(row["onset"]), float(row["offset"]), row["label"]))
    return events


def truth(run, events):
    """Frame labels (n, T, C) and 1-s segment labels (n, S, C), in the order of the dump's rows."""
    meta, column = run["meta"], {c: j for j, c in enumerate(run["classes"])}
    T, step = meta["grid"][0], meta["token_seconds"]
    S = max(1, int(round(meta["seconds"])))
    rows = np.sort(run["rows"])
    frames = np.zeros((len(rows), T, len(column)), bool)
    segments = np.zeros((len(rows), S, len(column)), bool)
    centre, edge = (np.arange(T) + 0.5) * step, np.arange(S)
    for i, row in enumerate(rows):
        clip = run["clips"][row]
        for onset, offset, label in events.get(clip["path"], []):
            onset, offset = onset - float(clip["start"]), offset - float(clip["start"])
            frames[i, (centre >= onset) & (centre < offset), column[label]] = True
            segments[i, (edge < offset) & (edge + 1 > onset), column[label]] = True
    return frames, segments


def show_table(rows, kind):
    """Print rows as aligned text, csv, md or json; text and md leave empty columns out."""
    if kind == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    columns = list(dict.fromkeys(k for row in rows for k in row))
    if kind == "csv":
        out = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
        return
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)
               and c not in ("high", "resamples")]

    def text(row, c):
        v = row.get(c)
        if c == "low" and v is not None:
            return f"[{v:.2f}, {row['high']:.2f}]"
        if v is None or isinstance(v, str):
            return v or ""
        if c == "difference":
            return f"{v:+.2f}"
        return f"{v:,}" if isinstance(v, int) else f"{v:.2f}"
    table = [[{"low": "95 % interval", "sd": "+- sd"}.get(c, c) for c in columns]]
    table += [[text(row, c) for c in columns] for row in rows]
    if kind == "md":
        table.insert(1, ["---" if isinstance(rows[-1].get(c), str) else "--:" for c in columns])
        print("\n".join("| " + " | ".join(line) + " |" for line in table))
        return
    left = [all(isinstance(row.get(c), (str, type(None))) for row in rows) for c in columns]
    width = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(v.ljust(w) if l else v.rjust(w)
                        for v, w, l in zip(line, width, left)).rstrip())


# ---------------------------------------------------------------------------------------------
# one picture

def show_clip(groups, clip, pool):
    """Write <data>-<model>-<pool>-<row>.png: the clip's spectrogram, and for each predicted class
    (p > 0.5, at least one) what its tokens added to the logit, over seconds and Hz."""
    groups = {k: v for k, v in groups.items() if k[2] == pool
              and os.path.exists(os.path.join(v[0]["folder"], "evidence.npy"))}
    if not groups:
        raise Stop(f"no run of {pool} has evidence.npy; make it with python probe.py --pool {pool} "
                   f"--evidence")
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import soundfile
    except ImportError as e:
        raise Stop(f"--show needs one more package: pip install {e.name}")
    key = max(groups, key=lambda k: os.path.getmtime(groups[k][0]["folder"]))
    run = groups[key][0]
    found = [i for i, r in enumerate(run["rows"])
             if clip in (str(r), run["clips"][r]["path"])]
    if not found:
        raise Stop(f"{run['folder']} has no tested clip {clip!r}; rows run from "
                   f"{run['rows'].min()} to {run['rows'].max()}")
    i, row, meta = found[0], run["rows"][found[0]], run["meta"]
    clip, (T, bands) = run["clips"][row], meta["grid"]
    file = os.path.join("data", key[0], clip["path"])
    start, seconds = float(clip["start"]), float(meta["seconds"])
    try:
        with soundfile.SoundFile(file) as f:
            rate = f.samplerate
            f.seek(int(start * rate))
            wave = f.read(int(seconds * rate), always_2d=True).mean(1)
    except (OSError, RuntimeError) as e:
        raise Stop(f"{file}: the audio of this clip cannot be read ({e}); put it back there")
    evidence = np.load(os.path.join(run["folder"], "evidence.npy"), mmap_mode="r")[i]
    logits, classes = run["logits"][i], run["classes"]
    shown = [j for j in np.argsort(-logits) if logits[j] > 0][:MAX_PANELS] or [logits.argmax()]

    size = 512 if rate <= 16000 else 1024
    hop = size // 4
    steps = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (0, size)), size)[::hop]
    power = np.abs(np.fft.rfft(steps * np.hanning(size))) ** 2
    level = 10 * np.log10(np.maximum(power, 1e-10)).T                        # (Hz, s)
    mel, hz = (lambda f: 1127 * np.log1p(np.maximum(f, 0) / 700),
               lambda m: 700 * np.expm1(m / 1127))
    top = meta.get("sample_rate", 16000) / 2
    edges = hz(np.linspace(mel(20), mel(top), bands + 1))                    # of the token bands
    times = np.arange(T + 1) * meta["token_seconds"]
    plt.rcParams["font.size"] = 8
    fig, axes = plt.subplots(1 + len(shown), 1, figsize=(8, 1.6 * (1 + len(shown)) + 0.6),
                             sharex=True, sharey=True, layout="constrained")
    axes = np.atleast_1d(axes)
    axes[0].pcolormesh(np.arange(level.shape[1]) * hop / rate, np.arange(level.shape[0]) * rate
                       / size, level, vmin=level.max() - 70, cmap="magma", rasterized=True)
    names = meta.get("names", {})
    events = os.path.join("tokens", *key[:2], "events.csv")
    known = read_events(events).get(clip["path"], []) if os.path.exists(events) else []
    truths = [f"{names.get(l, l)} {a - start:.1f}-{b - start:.1f} s" for a, b, l in known] \
        or [names.get(x, x) for x in clip["labels"].split(";") if x]
    axes[0].set_title(f"{clip['path']}   true: {', '.join(truths) or 'none of the classes'}",
                      loc="left")
    axes[0].set_ylabel("Hz")
    span = max(1e-9, np.abs(evidence[shown].astype(np.float32)).max())
    for ax, j in zip(axes[1:], shown):
        mesh = ax.pcolormesh(times, edges, evidence[j].astype(np.float32).reshape(T, bands).T,
                             cmap="RdBu_r", vmin=-span, vmax=span)
        for a, b, label in known:
            if label == classes[j]:
                ax.axvspan(a - start, b - start, fill=False, edgecolor="black", lw=0.8)
        mark = "true" if classes[j] in clip["labels"].split(";") else "false alarm"
        ax.set_title(f"{names.get(classes[j], classes[j])}   logit {logits[j]:+.2f}   {mark}",
                     loc="left")
        ax.set_ylabel("Hz")
    axes[0].set_yscale("function", functions=(mel, hz))
    axes[0].set(xlim=(0, seconds), ylim=(edges[0], top), yticks=[200, 500, 1000, 2000, 4000, top])
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[-1].set_xlabel("seconds")
    fig.colorbar(mesh, ax=list(axes[1:]), label="added to the logit")
    out = f"{key[0]}-{key[1]}-{pool}-{row}.png"
    fig.savefig(out, dpi=150)
    print(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to print, one of
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="difference of two heads")
    parser.add_argument("--classes", action="store_true", help="a row per class")
    parser.add_argument("--localise", action="store_true",
                        help="score evidence over time where onsets are known")
    parser.add_argument("--show", metavar="CLIP", help="PNG of a row number or path of the dump")
    # of which runs
    parser.add_argument("--runs", default="runs", metavar="DIR", help="default runs")
    parser.add_argument("--data", help="this dataset only")
    parser.add_argument("--model", help="this encoder only")
    parser.add_argument("--pool", help="this head only (--show: default protobin)")
    # how
    parser.add_argument("--format", choices=("text", "csv", "md", "json"), default="text")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N",
                        help=f"of the bootstrap, at most (default {RESAMPLES})")
    args = parser.parse_args()
    if args.resamples < 1:
        raise Stop("--resamples must be 1 or more")
    groups = read_runs(args.runs, (args.data, args.model, args.pool))
    if not groups:
        print(f"evaluate.py: no run below {args.runs}/ can be scored; make one with "
              f"python probe.py", file=sys.stderr)
        sys.exit(1)
    if args.show:
        show_clip(groups, args.show, args.pool or "protobin")
    elif args.compare:
        show_table(compare_table(groups, *args.compare, args.resamples), args.format)
    elif args.classes:
        show_table(class_table(groups), args.format)
    elif args.localise:
        show_table(localise_table(groups), args.format)
    else:
        show_table(score_table(groups, args.resamples), args.format)


if __name__ == "__main__":
    try:
        main()
    except Stop as e:
        sys.exit(print(f"evaluate.py: {e}", file=sys.stderr) or 2)
