"""Score every run, with a 95 % confidence interval.

Paper: "Unmute the Patch Tokens" (ICLR 2026, arXiv 2509.24901).
Reads    runs/<data>/<model>/<pool>/seed<k>/  logits.npy float32 (tested clips, C), rows.npy int64
             (tested clips), run.json; --localize: frames.npy float16 (tested clips, T, C);
             --show: evidence.npy float16 (tested clips, C, N)
         tokens/<data>/<model>/  labels.npy uint8 (clips, C), clips.csv, classes.txt, meta.json;
             --localize, --show: events.csv; --show: the clip in data/<data>/
Writes   a table to stdout; --show: a PNG (needs matplotlib and soundfile)

    python evaluate.py                               # every run, one table
    python evaluate.py --compare protobin linear     # paired difference of two heads
    python evaluate.py --localize                    # frame scores against known onsets
    python evaluate.py --show 802                    # what each token of a clip contributed

Macro mAP is scikit-learn's, over the classes with a positive among the tested clips (scored/C).
The interval is for the mean over seeds. It may lie below the score: AP from few positives is
biased upwards. One head, 20,000 clips, 527 classes, 5 seeds: 62 s on 2 CPU cores.
"""

import argparse
import concurrent.futures
import csv
import glob
import hashlib
import json
import os
import re
import statistics
import sys
import warnings
from types import SimpleNamespace

import numpy as np
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

# ---- constants: what, unit, source

RESAMPLES = 200     # random halves for an interval [ours]
REACH = 2.15        # half-width of a 95 % interval in standard deviations, by simulation [ours]
THRESHOLDS = sorted(np.arange(-5, 5.5, 0.5), key=abs)  # logits of an event, 0 first [ours]
PANELS = 5          # classes in a picture, at most [ours]
BIRDSET = "hsn nbp nes per pow sne uhh".split()  # their macro mAP is called cmAP [official code]
SETTINGS = "lr weight_decay loss epochs batch prototypes tokens_md5".split()  # same for all seeds
COLUMNS = ["data", "model", "clips", "head", "metric", "scored", "score", "seeds", "sd", "low",
           "high", "micro mAP", "AUROC", "d'", "macro accuracy", "parameters", "s/epoch"]


class Stop(Exception):
    """A user error: its message is printed and the script exits with status 2."""


# ---- metrics: labels bool (n, C), logits float32 (n, C) -> percent, nan if nothing to score

def class_scores(task, labels, logits):
    """AP (multi) or recall (single) of each class (C,); nan for a class without a positive."""
    scores, present = np.full(labels.shape[1], np.nan), labels.any(0)
    if task == "single":
        scores = recall_score(labels.argmax(1), logits.argmax(1), labels=range(len(scores)),
                              average=None, zero_division=np.nan)
    elif present.any():  # scikit-learn's AP of an absent class is 0
        scores[present] = average_precision_score(  # compress copies in C order: 8 x faster
            labels.compress(present, 1), logits.compress(present, 1), average=None)
    return 100 * scores

def metrics(task, labels, logits):
    """{name: value}; the first is the main one, which tables quote.
    multi: macro mAP, micro mAP (all cells as one class), AUROC (macro), d' = sqrt(2) z(AUROC).
    single: accuracy, macro accuracy (mean recall over the classes that occur)."""
    macro = np.nanmean(class_scores(task, labels, logits))
    if task == "single":
        right = labels.argmax(1) == logits.argmax(1)
        return {"accuracy": 100 * right.mean(), "macro accuracy": macro}
    micro = average_precision_score(labels.ravel(), logits.ravel()) if labels.any() else np.nan
    mixed = labels.any(0) & ~labels.all(0)
    labels, logits = labels.compress(mixed, 1), logits.compress(mixed, 1)
    area = roc_auc_score(labels, logits) if mixed.any() else np.nan
    inside = np.clip(area, 1e-9, 1 - 1e-9)  # d' of a perfect ranking is infinite: stop at 8.5
    return {"macro mAP": macro, "micro mAP": 100 * micro, "AUROC": 100 * area,
            "d'": 2**0.5 * statistics.NormalDist().inv_cdf(inside)}


# ---- intervals: the main metric on many random halves at once

def average_precision(labels, scores, weights):
    """scikit-learn's average_precision_score with sample_weight, for all columns of weights at
    once: the sum over thresholds of precision x gain in recall; tied scores are one threshold.
    labels bool (n,), scores (n,), weights (n, R) -> (R,); nan where a column has no positive."""
    order = np.argsort(-scores, kind="stable")
    hit = np.flatnonzero(labels[order])
    if not len(hit):
        return np.full(weights.shape[1], np.nan)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # last of each tie
    tie, first = np.unique(np.searchsorted(ends, hit), return_index=True)
    # Only ties with a positive matter: sum the stretch down to each of them, then the sums.
    starts = np.append(0, ends[tie][:-1] + 1)
    stretches = np.add.reduceat(weights[order[:ends[tie[-1]] + 1]], starts, axis=0)
    seen = stretches.cumsum(0, dtype=np.float64)                             # (ties, R)
    gain = np.add.reduceat(weights[order[hit]], first, axis=0).astype(np.float64)
    found = gain.cumsum(0)
    return (gain * found / np.maximum(seen, 1e-300)).sum(0) / found[-1]

def main_metric(task, labels, seeds, weights):
    """Percent for each column of weights (n, R), mean over seeds, a list of logits: (R,)."""
    if task == "single":
        right = [logits.argmax(1) == labels.argmax(1) for logits in seeds]
        return 100 * (np.mean(right, 0, np.float32) @ weights) / weights.sum(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # numpy releases the interpreter lock
        values = [list(pool.map(average_precision, labels.T, logits.T, [weights] * len(labels.T)))
                  for logits in seeds]                                       # (seeds, C, R)
    return 100 * np.nanmean(values, (0, 1))

def resamples(recordings, number=RESAMPLES):
    """(clips, number) float32: each column is 1 for a random half of the recordings, else 0. The
    same recordings give the same columns, so that any two heads can be paired.
    Whole recordings, since clips of one file are not independent. Halves (delete-half jackknife:
    Shao & Tu 1995, ch. 2), not a bootstrap: a positive drawn twice raises its own precision."""
    group = np.unique(recordings, return_inverse=True)[1]
    key = np.random.default_rng(0).random((group.max() + 1, number))
    return (key < np.median(key, 0)).astype(np.float32)[group]

def interval(score, draws):
    """(low, high) of 95 %, around the score minus its bias; nan with fewer than two draws.
    A half differs from all clips as all clips differ from the population: by the same variance
    and nearly the same bias. With 10 classes of 2 to 30 % it covers the population's macro mAP in
    95 % of test sets of 300 or of 1,000 clips; the bootstrap's basic interval in 89 and 92 %, its
    percentile interval in 75 and 84 % (test_coverage)."""
    draws = draws[~np.isnan(draws)]
    if len(draws) < 2:
        return np.nan, np.nan
    middle, reach = 2 * score - draws.mean(), REACH * draws.std()
    return middle - reach, middle + reach


# ---- reading runs

def read(file, kinds="", shape=(), columns=None, mmap_mode=None):
    """.npy: an array of these dtype kinds, finite, whose shape begins with shape; .csv: a list of
    rows of columns {name: type}; .json: a dict; else a list of lines. Raises Stop."""
    try:
        if file.endswith(".npy"):
            array = np.load(file, mmap_mode=mmap_mode)
            if array.dtype.kind not in kinds or array.shape[:len(shape)] != shape or not (
                    mmap_mode or np.isfinite(array).all()):
                raise ValueError(f"{array.dtype} {array.shape}, expected finite {shape}")
            return array
        with open(file, newline="", encoding="utf-8") as f:
            if columns:
                return [[kind(row[k]) for k, kind in columns.items()] for row in csv.DictReader(f)]
            return dict(json.load(f)) if file.endswith(".json") else f.read().splitlines()
    except Exception as e:  # a damaged file can raise any exception: numpy parses headers
        raise Stop(f"{file} cannot be read ({getattr(e, 'strerror', None) or repr(e)[:200]})")

def read_dump(data, model):
    """What tokens/<data>/<model>/ says: labels bool (clips, C), paths, starts (s) and recordings
    (clips,), classes, task, metric, meta (with md5s of labels and tokens). Raises Stop."""
    folder, md5 = f"tokens/{data}/{model}", hashlib.md5()
    meta, classes = read(f"{folder}/meta.json"), read(f"{folder}/classes.txt")
    clips = read(f"{folder}/clips.csv", columns={"path": str, "start": float, "split": str})
    labels = read(f"{folder}/labels.npy", "bui", (len(clips), len(classes)))
    if meta.get("task") not in ("single", "multi") or not clips:
        raise Stop(f"{folder}: meta.json needs the task, single or multi, and clips.csv some rows")
    paths, starts, splits = map(np.array, zip(*clips))
    for file in filter(os.path.exists, (f"{folder}/tokens.npy", f"{folder}/cls.npy")):
        array = read(file, "f", (len(clips),), mmap_mode="r")  # the same rows as in probe.py
        md5.update(b"".join(array[i].tobytes() for i in (0, len(array) // 2, -1)))
    meta |= {
        "labels_md5": hashlib.md5(labels.tobytes() + "\n".join(splits).encode()).hexdigest(),
        "tokens_md5": md5.hexdigest() if os.path.exists(f"{folder}/tokens.npy") else None}
    recordings, metric = paths, "accuracy" if meta["task"] == "single" else "macro mAP"
    if data in BIRDSET:  # HSN_093_20150712_085105_235_240.ogg: seconds 235 to 240 of a soundscape
        recordings = np.array([re.sub(r"_\d+_\d+\.\w+$", "", path) for path in paths])
        metric = "cmAP (= macro mAP)"
    return SimpleNamespace(folder=folder, data=data, model=model, meta=meta, task=meta["task"],
                           metric=metric, classes=classes, labels=labels > 0, paths=paths,
                           starts=starts, recordings=recordings)

def read_run(folder, dump):
    """A run of one seed: folder, info (run.json), rows (n,) ascending, logits (n, C), and order,
    which sorts its other files the same way. Raises Stop with the reason if it cannot be scored."""
    clips, C = dump.labels.shape
    info, rows = read(f"{folder}/run.json"), read(f"{folder}/rows.npy", "iu").ravel()
    logits, order = read(f"{folder}/logits.npy", "f", (len(rows), C)), np.argsort(rows)
    if not (isinstance(info.get("dump"), dict) and isinstance(info.get("parameters"), int)
            and isinstance(info.get("seconds_per_epoch"), (int, float))):
        raise Stop("run.json is not what probe.py writes")
    before = info | info["dump"] | ({} if dump.meta["tokens_md5"] else {"tokens_md5": None})
    for key in ("labels_md5", "tokens_md5", "clips", "checkpoint", "precision"):
        if before.get(key) != dump.meta.get(key):
            raise Stop(f"the dump has changed since ({key}); run probe.py again")
    if not (0 < len(np.unique(rows)) == len(rows) and 0 <= rows.min() <= rows.max() < clips):
        raise Stop(f"rows.npy must name some of the dump's {clips} clips, each of them once")
    return SimpleNamespace(folder=folder, info=info, order=order, rows=rows[order],
                           logits=logits[order].astype(np.float32))

def read_heads(root, *wanted):
    """[head]: dump, pool, name (columns of a table), rows, labels, and runs, its seeds, all tested
    on the same clips. wanted: data, model, pool, each NAME[,NAME...] or None. Skips bad runs."""
    dumps, heads = {}, {}
    for path in sorted(glob.glob("*/*/*/seed*", root_dir=root)):
        data, model, pool = names = re.split(r"[\\/]", path)[:3]
        if any(some and name not in some.split(",") for name, some in zip(names, wanted)):
            continue
        try:
            if (data, model) not in dumps:
                dumps[data, model] = read_dump(data, model)
            dump = dumps[data, model]
            run = read_run(f"{root}/{path}", dump)
            if run.info.get("split") == "valid":  # where settings are chosen: never with results
                data += " (valid)"
            head = heads.setdefault((data, model, pool), SimpleNamespace(
                dump=dump, pool=pool, rows=run.rows, runs=[], labels=dump.labels[run.rows],
                name={"data": data, "model": model, "clips": fingerprint(dump, run.rows)}))
            first = (head.runs or [run])[0]
            differ = [key for key in SETTINGS if run.info.get(key) != first.info.get(key)]
            if differ or not np.array_equal(run.rows, first.rows):
                raise Stop(f"its {' '.join(differ) or 'clips'} differ from those of {first.folder}")
            head.runs.append(run)
        except Stop as e:
            print(f"skipped {root}/{path}: {e}", file=sys.stderr)
    return sorted(heads.values(), key=lambda head: (*head.name.values(), head.pool))

def fingerprint(dump, rows):
    """The number of clips, and 6 digits of an md5 that tells whether they are the same clips."""
    clips = "".join(f"{dump.paths[row]} {dump.starts[row]}\n" for row in rows)
    return f"{len(rows)} ({hashlib.md5(clips.encode()).hexdigest()[:6]})"


# ---- tables: lists of rows {column: value}

def score_table(heads):
    """A row per head, mean over seeds; above the heads of a dump, one for a constant score."""
    table = []
    for before, head in zip([None, *heads], heads):
        task, labels, runs = head.dump.task, head.labels, head.runs
        share = 100 * labels.mean(0)
        known = dict.fromkeys(COLUMNS) | head.name | {
            "metric": head.dump.metric, "scored": f"{(share > 0).sum()}/{len(share)}"}
        if not before or before.name != head.name:
            table.append(known | (  # a constant score has a class's prevalence as its AP
                {"head": "majority class", "score": share.max()} if task == "single" else
                {"head": "prevalence", "score": np.mean(share[share > 0])}))
        values = [metrics(task, labels, run.logits) for run in runs]
        values = {name: [seed[name] for seed in values] for name in values[0]}
        scores = values.pop(next(iter(values)))
        weights = resamples(head.dump.recordings[head.rows])
        draws = main_metric(task, labels, [run.logits for run in runs], weights)
        low, high = np.clip(interval(np.mean(scores), draws), 0, 100)
        table.append(known | {name: np.mean(seeds) for name, seeds in values.items()} | {
            "head": head.pool, "score": np.mean(scores), "seeds": len(runs),
            "sd": np.std(scores, ddof=1) if len(runs) > 1 else None, "low": low, "high": high,
            "parameters": runs[0].info["parameters"],
            "s/epoch": np.mean([run.info["seconds_per_epoch"] for run in runs])})
    return table

def compare_table(heads, a, b):
    """score(a) - score(b) for each data x model that has both, on the clips that both tested."""
    table = []
    for one, two in [(one, two) for one in heads if one.pool == a for two in heads
                     if two.pool == b and two.dump is one.dump]:
        rows, i, j = np.intersect1d(one.rows, two.rows, return_indices=True)
        if not len(rows):  # such as test and valid
            continue
        task, labels = one.dump.task, one.labels[i]
        pair = [run.logits[i] for run in one.runs], [run.logits[j] for run in two.runs]
        first, second = [np.mean([next(iter(metrics(task, labels, logits).values()))
                                  for logits in seeds]) for seeds in pair]
        weights = resamples(one.dump.recordings[rows])
        draws = np.subtract(*[main_metric(task, labels, seeds, weights) for seeds in pair])
        low, high = interval(first - second, draws)
        tested = f" of {len(one.rows)} and {len(two.rows)}" if one.name != two.name else ""
        table.append(one.name | {
            "clips": fingerprint(one.dump, rows) + tested, "heads": f"{a} - {b}",
            "metric": one.dump.metric, "seeds": f"{len(pair[0])}, {len(pair[1])}", "first": first,
            "second": second, "difference": first - second, "low": low, "high": high})
    if not table:
        raise Stop(f"no data x model has runs of both {a} and {b} on the same clips; train them "
                   f"with python probe.py --pool {a},{b}")
    return table

def class_table(heads):
    """AP (multi) or recall (single) of each class in percent, mean over seeds."""
    table = {}
    for head in heads:
        count, scores = head.labels.sum(0), np.mean([
            class_scores(head.dump.task, head.labels, run.logits) for run in head.runs], 0)
        for j in np.argsort(-count, kind="stable"):
            row = table.setdefault((*head.name.values(), j), head.name | {
                "class": head.dump.classes[j], "positives": count[j]})
            row[head.pool] = scores[j]
    return list(table.values())

def print_table(table, style):
    """Print rows as text, csv or md. Text and md leave out empty columns."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = [columns] + [[cell(row, column, style) for column in columns] for row in table]
    if style == "csv":
        return csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    padded = []
    for name, *cells in zip(*lines):
        if any(cells) and name != "high":
            rule = ["---"] if style == "md" else []
            texts = ["95 % interval" if name == "low" else name, *rule, *cells]
            pad = str.ljust if isinstance(table[-1].get(name), str) else str.rjust
            padded.append([pad(text, max(map(len, texts))) for text in texts])
    for line in zip(*padded):
        print(f"| {' | '.join(line)} |" if style == "md" else "  ".join(line).rstrip())

def cell(row, column, style):
    value = row.get(column)
    if value is None or value != value:
        return ""
    if style == "csv" or isinstance(value, str):
        return str(value)
    if column == "low":
        return f"[{value:.2f}, {row['high']:.2f}]"
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:.2f}"


# ---- localization: when, by heads that learned from clip labels

def read_events(dump, rows):
    """T, F, seconds per time step, seconds per clip, and for each of these rows of the dump
    [(onset, offset, label)] in seconds from the start of the clip, [] if unknown."""
    grid, *times = [dump.meta.get(key) for key in ("grid", "token_seconds", "seconds")]
    if not (isinstance(grid, list) and list(map(type, grid)) == [int, int] and all(
            isinstance(number, (int, float)) and 0 < number < 1e6 for number in grid + times)):
        raise Stop(f"{dump.folder}/meta.json needs grid, token_seconds and seconds")
    events, file = {path: [] for path in dump.paths[rows]}, f"{dump.folder}/events.csv"
    columns = {"path": str, "onset": float, "offset": float, "label": str}
    for path, *event in read(file, columns=columns) if os.path.exists(file) else []:
        events.setdefault(path, []).append(event)
    return *grid, *times, [[(onset - start, offset - start, label)
                            for onset, offset, label in events[path]
                            if onset < start + times[1] and offset > start]
                           for path, start in zip(dump.paths[rows], dump.starts[rows])]

def read_truth(head):
    """frames bool (n, T, C): an event covers the center of the step; segments bool (n, S, C): an
    event touches the second; average float32 (S, T): the mean of each second's steps. Steps
    centered past the end of the clip are padding and left out."""
    T, _, step, seconds, known = read_events(head.dump, head.rows)
    center, second = (np.arange(T) + 0.5) * step, np.arange(np.ceil(seconds))
    center, column = center[center < seconds], {c: j for j, c in enumerate(head.dump.classes)}
    frames, segments = [np.zeros((len(known), len(t), len(column)), bool) for t in (center, second)]
    for i, onset, offset, label in [(i, *event) for i in range(len(known)) for event in known[i]]:
        if label in column:
            frames[i, (center >= onset) & (center < offset), column[label]] = True
            segments[i, (second < offset) & (second + 1 > onset), column[label]] = True
    average = (center.astype(int) == second[:, None]).astype(np.float32)
    return frames, segments, average / np.maximum(average.sum(1, keepdims=True), 1)

def event_f1(true, scores):
    """F1 of events in percent at each of THRESHOLDS (thresholds, C), nan for a class without
    events; true bool (n, T, C), scores (n, T, C).
    An event is a run of consecutive steps, predicted where scores exceed the threshold. It is a
    hit if intersection over union with a true one is at least 0.5 [ours]. Events of a class have
    gaps between them, so each is in one such pair at most, and a hit covers the true middle."""
    values = np.where(true.any((0, 1)), np.zeros((len(THRESHOLDS), 1)), np.nan)
    for t, j in np.argwhere(values == 0):
        steps = np.stack([true[..., j], scores[..., j] > THRESHOLDS[t]])
        edges = np.diff(np.pad(steps, ((0, 0), (0, 0), (1, 1))).reshape(2, -1))  # clips in a row
        (onset, offset), (begin, end) = [np.flatnonzero(e).reshape(-1, 2).T for e in edges]
        if len(begin):
            k = np.searchsorted(begin, (onset + offset) / 2, side="right") - 1
            both = np.minimum(offset, end[k]) - np.maximum(onset, begin[k])
            either = np.maximum(offset, end[k]) - np.minimum(onset, begin[k])
            values[t, j] = 200 * (2 * both >= either).sum() / (len(onset) + len(begin))
    return values

def localize_table(heads, valid_heads):
    """Score frames.npy against known onsets, macro over classes, next to random scores and the
    clip's own logit at each step. frame mAP: a frame is one step, its label is whether an event
    covers its center. segment mAP: mean score of each second, whether an event touches it. event
    F1: see event_f1; the threshold of a class is logit 0, or, where <runs>_valid has frames.npy of
    the same head, the one with the best F1 there."""
    table, best = {}, {}  # best: {(dump, row): (C,) indices into THRESHOLDS}
    for head, tuning in [(head, True) for head in valid_heads] + [(head, False) for head in heads]:
        runs = [run for run in head.runs if os.path.exists(f"{run.folder}/frames.npy")
                and (run.info.get("split") == "valid" or not tuning)]
        if not runs or not os.path.exists(f"{head.dump.folder}/events.csv"):
            continue
        frames, segments, average = read_truth(head)
        (n, steps, C), T = frames.shape, head.dump.meta["grid"][0]
        scores_of = {
            "random": [np.random.default_rng(0).standard_normal(frames.shape)],
            head.pool: [read(f"{run.folder}/frames.npy", "f", (n, T, C))[run.order, :steps]
                        .astype(np.float32) for run in runs],
            f"{head.pool}, clip logit": [run.logits[:, None].repeat(steps, 1) for run in runs]}
        for name, seeds in scores_of.items():
            f1 = np.mean([event_f1(frames, scores) for scores in seeds], 0)  # (thresholds, C)
            if tuning:
                best[head.dump.folder, name] = np.nan_to_num(f1).argmax(0)
                continue
            chosen = best.get((head.dump.folder, name)) if name != "random" else None
            mAP = [[np.nanmean(class_scores("multi", np.concatenate(true), np.concatenate(found)))
                    for true, found in ((frames, scores), (segments, average @ scores))]
                   for scores in seeds]
            table[(*head.name.values(), name)] = head.name | {
                "head": name, "seeds": len(seeds), "scored": f"{frames.any((0, 1)).sum()}/{C}",
                **dict(zip(("frame mAP", "segment mAP"), np.mean(mAP, 0))),
                "event F1": np.nanmean(f1[0 if chosen is None else chosen, range(C)]),
                "threshold": "0" if chosen is None else "from valid"}
    if not table:
        raise Stop("no run has both frames.npy and known onsets (events.csv in its dump); make one "
                   "with python probe.py --data demo --pool protobin --frames")
    return list(table.values())

def show_clip(heads, clip, pool):
    """Write <data>-<model>-<pool>-<row>.png: the clip's spectrogram, and for each predicted (logit
    > 0) and each true class what its tokens added to the logit."""
    import soundfile
    found = [(head, i) for head in heads for i, row in enumerate(head.rows)
             if head.pool == pool and clip in (str(row), head.dump.paths[row])
             and os.path.exists(f"{head.runs[0].folder}/evidence.npy")]
    if not found:
        raise Stop(f"no run of {pool} has evidence.npy for a tested clip {clip!r} (a row of the "
                   f"dump or a path); python probe.py --pool {pool} --evidence writes it")
    head, i = max(found, key=lambda one: os.path.getmtime(one[0].runs[0].folder))
    dump, run, row = head.dump, head.runs[0], head.rows[i]
    T, F, step, seconds, (events,) = read_events(dump, [row])
    evidence = read(f"{run.folder}/evidence.npy", "f", (*run.logits.shape, T * F), mmap_mode="r")
    evidence = evidence[run.order[i]].reshape(-1, T, F).astype(np.float32)   # (C, T, F)
    with soundfile.SoundFile(f"data/{dump.data}/{dump.paths[row]}") as f:
        f.seek(int(dump.starts[row] * f.samplerate))
        wave, rate = f.read(int(seconds * f.samplerate), always_2d=True).mean(1), f.samplerate
    file = f"{dump.data}-{dump.model}-{pool}-{row}.png"
    draw_clip(dump, row, run.logits[i], evidence, events, wave, rate).savefig(file, dpi=150)
    print(file)

def draw_clip(dump, row, logits, evidence, events, wave, rate):
    """The figure: logits (C,), evidence (C, T, F), events as of read_events, wave (samples,)."""
    from matplotlib import pyplot
    labels, order, (C, T, F) = dump.labels[row], np.argsort(-logits), evidence.shape
    shown = [j for j in order if labels[j] or logits[j] > 0][:PANELS] or order[:1]
    figure, axes = pyplot.subplots(1 + len(shown), 1, figsize=(8, 1.6 + len(shown)), sharex=True,
                                   layout="constrained", height_ratios=[1.7] + [1] * len(shown))
    axes[0].specgram(wave, 512, rate, noverlap=384, cmap="magma")
    known = ([f"{label} {onset:.1f}-{offset:.1f} s" for onset, offset, label in events]
             or [dump.classes[j] for j in np.flatnonzero(labels)] or ["none of the classes"])
    axes[0].set_title(f"{dump.paths[row]}     true: {', '.join(known)}", loc="left")
    axes[0].set(ylabel="Hz", xlim=(0, dump.meta["seconds"]))
    span = np.abs(evidence[shown]).max() or 1
    for ax, j in zip(axes[1:], shown):
        image = ax.imshow(evidence[j].T, extent=(0, T * dump.meta["token_seconds"], 0, F),
                          origin="lower", aspect="auto", cmap="RdBu_r", vmin=-span, vmax=span)
        for onset, offset, label in events:
            if label == dump.classes[j]:
                ax.axvspan(onset, offset, fill=False, edgecolor="green", linewidth=1.5)
        verdict = "false alarm" if not labels[j] else "found" if logits[j] > 0 else "missed"
        ax.set_title(f"{dump.classes[j]}: {verdict}, logit {logits[j]:+.2f}", loc="left")
    axes[-1].set_xlabel("seconds" + "     (green: true events)" * bool(events))
    figure.colorbar(image, ax=list(axes[1:]), label="added to the logit by each token", aspect=40)
    return figure

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="difference of two heads")
    what.add_argument("--classes", action="store_true", help="one row per class")
    what.add_argument("--localize", action="store_true", help="score frames against known onsets")
    what.add_argument("--show", metavar="CLIP", help="PNG of a clip: a row of the dump or a path")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="default runs")
    parser.add_argument("--data", metavar="NAME[,NAME...]", help="only these datasets")
    parser.add_argument("--model", metavar="NAME[,NAME...]", help="only these encoders")
    parser.add_argument("--pool", metavar="NAME[,NAME...]", help="only these heads (--show: one)")
    parser.add_argument("--format", choices=("text", "csv", "md"), default="text")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the mean of nothing is nan, which becomes an empty cell
    wanted = args.data, args.model, args.pool
    heads = read_heads(args.runs, *wanted)
    if not heads:
        raise Stop(f"no run below {args.runs}/ can be scored (with these --data, --model, --pool); "
                   f"make one with python probe.py")
    if args.show:
        return show_clip(heads, args.show, args.pool or "protobin")
    print_table(compare_table(heads, *args.compare) if args.compare else
                class_table(heads) if args.classes else
                localize_table(heads, read_heads(f"{args.runs.rstrip('/')}_valid", *wanted))
                if args.localize else score_table(heads), args.format)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as e:
        print(f"evaluate.py: {e}; run pip install {e.name}", file=sys.stderr)
    except (Stop, OSError, MemoryError, RuntimeError) as e:  # RuntimeError: soundfile's
        print(f"evaluate.py: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)
