"""Turn audio into the patch tokens of a frozen encoder, once, on disk.

Paper: "Unmute the Patch Tokens" (ICLR 2026, arXiv 2509.24901), section 3: every clip goes through
the frozen encoder once, un-augmented, and its last-layer token map is kept.

Reads    datasets.txt and data/<data>/ (a folder of audio with a table of labels)
Writes   tokens/<data>/<model>/
         tokens.npy  float16 (clips, N, D), N = T*F patch tokens, time-major: n = t*F + f
         cls.npy     float16 (clips, D), where the encoder has a [cls] token
         labels.npy  uint8 (clips, C) multi-hot; clips.csv, classes.txt, events.csv, meta.json

    python extract.py                             # log-mel patches of the demo, no download
    python extract.py --model eat --data esc50    # any encoder x any line of datasets.txt
    torchrun --nproc_per_node=8 extract.py --model eat --data fsd50k

Stop it whenever you like: the same command goes on where it stopped.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

# ---------------------------------------------------------------------------------------------
# constants: what, unit, source

RATE = 16000             # Hz, mono [official code]; [?] ASiT's own code says 32000
BLOCK = {"cpu": 8, "cuda": 64}  # clips of 10 s in a batch, and in a resumable block of rows [ours]
RECORD_SECONDS = 5       # seconds of work at most that a kill can cost [ours]
MAX_BAD = 0.01           # share of missing + unreadable clips above which we stop [ours]
MAX_UNPACK = 50          # an archive may unpack to this many times its own size [ours]
AUDIO = ".wav", ".flac", ".ogg", ".mp3"  # tried in this order when a table names another [ours]
SPLITS = {"training": "train", "dev": "train", "val": "valid", "validate": "valid", "validation":
          "valid", "eval": "test", "evaluation": "test", "testing": "test", "train": "train",
          "valid": "valid", "test": "test"}  # one spelling per split, in lower case [ours]
UNEVEN = 2000            # odd source rates have resampling kernels this many times as large [ours]

FRAME, HOP, FFT = 400, 160, 512      # samples: 25 ms, 10 ms, next power of two [official code]
LOG_FLOOR = 1.1920928955078125e-07   # float32 epsilon, kaldi's floor before the log [official code]
CHUNK = 1008                         # frames Dasheng encodes at once, 252 tokens [official code]
STEP = 32      # frames an input length is rounded up to: gives the official 1024 (10 s),
               # 512 (5 s) and 128 (1 s); between those the choice is [ours]

HUB = "https://huggingface.co/"
BEATS_HUB = HUB + "lpepino/beats_ckpts/resolve/main/"  # a mirror; the official links need a browser

# name -> family (keys and front-end), url, sha256, (mean, std) of (x - mean) / (2 std), licence.
# A sha256 of "" is not published: the one found is recorded in meta.json. All [official code] but
# the choices of file marked [?] (which file the paper used is not stated in any source we found).
MODELS = {
    "logmel": ("logmel", "", "", (-4.2677393, 4.5689974), "no weights"),
    "random": ("eat", "", "", (-4.268, 4.569), "no weights"),
    "amae": ("amae", HUB + "gaunernst/vit_base_patch16_1024_128.audiomae_as2m/resolve/main/"
             "pytorch_model.bin", "", (-4.2677393, 4.5689974), "CC-BY-NC-4.0 (official repo)"),
    "amae+": ("amae", HUB + "gaunernst/vit_base_patch16_1024_128.audiomae_as2m_ft_as20k/resolve/"
              "main/pytorch_model.bin", "", (-4.2677393, 4.5689974),  # [?] AS-20k or AS-2M
              "CC-BY-NC-4.0 (official repo)"),
    "asit": ("asit", "", "", (-4.2677393, 4.5689974), "none stated"),  # [?] Google Drive only
    "asit+": ("asit", "", "", (-4.2677393, 4.5689974), "none stated"),  # [?] no public file found
    "beats": ("beats", BEATS_HUB + "BEATs_iter3_plus_AS2M.pt",  # [?] iter3 or iter3+ (both SSL)
              "d43cbfad4d7b56381c061d7a24774f908d4d94c72961f6eb1d9090ff18cd8d34",
              (15.41663, 6.55582), "MIT"),
    "beats+": ("beats", BEATS_HUB + "BEATs_iter3_finetuned_on_AS2M_cpt1.pt",  # [?] which of four
               "379369a41d0b3749f746cdcea8036de506cb3aedecce84de7db0a75fda2a4fe7",
               (15.41663, 6.55582), "MIT"),
    "dasheng": ("dasheng", HUB + "mispeech/dasheng-base/resolve/main/model.safetensors", "",
                None, "Apache-2.0"),
    "eat": ("eat", HUB + "worstchan/EAT-base_epoch30_pretrain/resolve/main/model.safetensors",
            "8623072d09aac4f3ad1168b4fed3a24e4f68fe1da25b9fe733375efb237e5f48",
            (-4.268, 4.569), "MIT"),
    "eat+": ("eat", HUB + "worstchan/EAT-base_epoch30_finetune_AS2M/resolve/main/model.safetensors",
             "", (-4.268, 4.569), "MIT"),
    "sslam": ("eat", HUB + "ta012/SSLAM_pretrain/resolve/main/model.safetensors",
              "8ec670adb241c710422ddd894ff1bade142ef0b25cf1ee68577aa45f89432298",
              (-4.268, 4.569), "MIT"),
    "sslam+": ("eat", HUB + "ta012/SSLAM_AS2M_Finetuned/resolve/main/model.safetensors", "",
               (-4.268, 4.569), "MIT"),
}

DEMO_CLASSES = ("beeps", "bell", "buzz", "clicks", "down", "hiss", "siren", "tremolo", "up",
                "warble")
DEMO_SPLITS = {"train": 700, "valid": 100, "test": 300}  # clips [ours]
DEMO_SECONDS, DEMO_SEED = 5, 2509  # [ours]


class Stop(Exception):
    """A mistake of the user's, told in one sentence; main() prints it and exits with 2."""


# ---------------------------------------------------------------------------------------------
# datasets.txt: "name task seconds classes key=value ..." -> clips

RULE = {"path": "{path}", "labels": "{labels}", "split": "{split}", "start": "{start}", "sep": ";"}
KEYS = {*RULE, "table", "files", "onset", "offset", "url", "md5", "shots", "map", "names",
        "prototypes"}
VALUES = {  # key -> what its value looks like, and in words
    "url": ("https?://.+", "begin with http:// or https://"),
    "md5": ("[0-9a-f]{32}", "be 32 digits 0-9a-f"),
    "shots": (r"[1-9]\d*", "be a positive whole number"),
    "prototypes": (r"[1-9]\d*", "be a positive whole number"),
    "map": ("[^:,]+:[^:,]+(,[^:,]+:[^:,]+)*", "be old:new,old:new")}


def read_datasets(file):
    """{name: dict(task, seconds, classes, lines, rules, urls)} from a datasets.txt.

    Lines of one name add up. Raises Stop with file:line at the first malformed line."""
    sets = {}
    try:
        lines = open(file, encoding="utf-8-sig", errors="replace").read().splitlines()
    except OSError as e:
        raise Stop(f"{file}: {e.strerror}; run from the folder that holds datasets.txt")
    for i, line in enumerate(lines, 1):
        where = f"{file}:{i}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as e:
            raise Stop(f"{where}: {e}; close the quotation")
        if not words:
            continue
        if len(words) < 4:
            raise Stop(f"{where}: expected 'name task seconds classes [key=value ...]', found "
                       f"{len(words)} words")
        name, task, seconds, classes, *pairs = words
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise Stop(f"{where}: the name {name!r} becomes a folder; use letters, digits, . _ -")
        if task not in ("single", "multi"):
            raise Stop(f"{where}: task is {task!r}; it must be 'single' or 'multi'")
        try:
            seconds, classes = float(seconds), int(classes)
        except ValueError:
            seconds = classes = 0
        if not 0 < seconds < math.inf or classes < 1:
            raise Stop(f"{where}: seconds and classes must be positive numbers")
        rule, urls, last = {}, [], []
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in KEYS or not value:
                raise Stop(f"{where}: unknown word {pair!r}; expected key=value, and the keys are "
                           f"{' '.join(sorted(KEYS))}")
            pattern, words = VALUES.get(key, (".+", ""))
            if not re.fullmatch(pattern, value):
                raise Stop(f"{where}: {key} is {value!r}; it must {words}")
            if key == "url":
                last = [[url, ""] for url in expand(value)]
                urls += last
            elif key == "md5":
                if len(last) != 1:
                    raise Stop(f"{where}: md5= must follow the url= of one file")
                last[0][1] = value
            else:
                rule[key] = value
        if ("onset" in rule) != ("offset" in rule):
            raise Stop(f"{where}: onset= and offset= come together; add the other one")
        data = sets.setdefault(name, dict(task=task, seconds=seconds, classes=classes, lines=[],
                                          rules=[], urls=[]))
        if (data["task"], data["seconds"], data["classes"]) != (task, seconds, classes):
            raise Stop(f"{where}: task, seconds and classes differ from the first line of {name}")
        data["urls"] += urls
        if rule or not urls:  # a line with nothing but url= and md5= adds no rule
            data["rules"].append(RULE | rule | {"where": where})
            data["lines"].append(line.split("#")[0].strip())
    for name, data in sets.items():
        if not data["rules"]:
            raise Stop(f"{file}: {name} has url= but no table; add table=manifest.csv, or the "
                       f"name of the table in its archive")
    return sets


def expand(text):
    """'a{08..11}b' -> ['a08b', 'a09b', 'a10b', 'a11b']; text without braces is itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [text]
    first, last = found.groups()
    return [text[:found.start()] + str(i).zfill(len(first)) + text[found.end():]
            for i in range(int(first), int(last) + 1)]


def read_rows(root, rule):
    """Yield one dict per row of the rule's tables (or per audio file of its files= glob).

    Keys: the header's columns, or c0, c1, ... when the rule uses them; `stem` and `folder` of the
    table file; `where` = file:line for messages."""
    pattern = rule.get("files") or rule.get("table", "manifest.csv")
    found = sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True))
    if not found:
        raise Stop(f"{rule['where']}: no file matches {os.path.join(root, pattern)}; put the "
                   f"dataset there as it unpacks, or correct the line")
    headless = re.search(r"\{c\d", " ".join(rule.values()))
    for file in found:
        names = {"stem": os.path.splitext(os.path.basename(file))[0],
                 "folder": os.path.basename(os.path.dirname(file))}
        if "files" in rule:
            rows = [{"path": os.path.relpath(file, root), "where": file}]
        elif file.endswith(".parquet"):
            rows = read_parquet(file, rule["sep"])
        else:
            rows = read_table(file, headless)
        for row in rows:
            yield names | row


def read_table(file, headless=False):
    """Rows of a comma (.csv) or tab (other) separated table; lines that begin with # are out."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        kept = [(number, line) for number, line in enumerate(lines, 1)
                if line.strip() and not line.startswith("#")]
    reader = csv.reader((line for _, line in kept), skipinitialspace=True,
                        delimiter="," if file.endswith(".csv") else "\t")
    csv.field_size_limit(1 << 30)  # quotes that never close end as a row of the wrong length
    header = None
    for values in reader:
        where = f"{file}:{kept[reader.line_num - 1][0]}"
        if header is None:
            header = [f"c{i}" if headless else v.strip() for i, v in enumerate(values)]
            if not headless:
                continue
        if len(values) != len(header):
            raise Stop(f"{where}: {len(values)} values for {len(header)} columns; put a value that "
                       f"has a comma in it in double quotes (and close them)")
        yield dict(zip(header, values)) | {"where": where}


def read_parquet(file, sep):
    """Rows of a parquet file; lists of labels are joined with sep, embedded audio
    ({bytes, path}) is left in the file and named folder/file#row (it is decoded from memory)."""
    table = open_parquet(file)
    audio = [f.name for f in table.schema_arrow if str(f.type).startswith("struct<bytes")]
    columns = [f.name for f in table.schema_arrow if f.name not in audio]
    number = 0
    for group in range(table.num_row_groups):
        n = table.metadata.row_group(group).num_rows
        rows = table.read_row_group(group, columns=columns).to_pylist() if columns else [{}] * n
        for i, row in enumerate(rows):
            for key, value in row.items():
                if isinstance(value, list) and all(isinstance(v, (str, int)) for v in value):
                    row[key] = sep.join(map(str, value))
                elif value is None:
                    row[key] = ""
            embedded = "/".join(file.split(os.sep)[-2:]) + f"#{number}"
            yield ({"path": embedded} | row | dict.fromkeys(audio, embedded)
                   | {"embedded": (file, group, i, audio[0]) if audio else None,
                      "where": f"{file}: row {number}"})
            number += 1


def open_parquet(file):
    try:
        import pyarrow.parquet
        return pyarrow.parquet.ParquetFile(file)
    except ImportError:
        raise Stop(f"{file}: reading parquet needs one more package: pip install pyarrow")
    except (ValueError, OSError) as e:
        raise Stop(f"{file}: not a whole parquet file ({e}); download it again")


def few_shot(rows, shots, seconds, seed):
    """Bird-MAE's lenient k-shot rule for BirdSet's train table, without fill-up.

    Keep recordings of at most 20 s without secondary species; of each, the events of the most
    frequent cluster (the first of equals; -1, noise, only if it is the one event there is), those
    inside another dropped; one at random is primary, the rest left over; k primaries a species,
    else all of them and left-overs up to k [official code]. The length is the table's, not the
    file's, the clip is centred on the event, where BirdSet takes a random 5 s of it, and equal
    clips of a recording count once, so that a seed gives the same clips everywhere [ours]."""
    rng = random.Random(seed)
    numbers = re.compile(r"-?[\d.]+(?:e-?\d+)?").findall  # of lists, or of lists as text
    species = collections.defaultdict(lambda: ([], []))
    for row in sorted(rows, key=lambda row: str(row.get("filepath"))):
        absent = {"filepath", "length", "ebird_code", "ebird_code_secondary", "detected_events",
                  "event_cluster"} - set(row)
        if absent:
            raise Stop(f"{row['where']}: no column {' '.join(sorted(absent))} here; shots= reads "
                       f"BirdSet's train table only")
        length = float(row["length"] or 0)
        if length > 20 or row["ebird_code_secondary"]:
            continue
        times = [float(x) for x in numbers(str(row["detected_events"]))]
        events = list(zip(times[::2], times[1::2], map(float, numbers(str(row["event_cluster"])))))
        if len(events) > 1:
            events = [e for e in events if e[2] != -1]
        count = collections.Counter(cluster for _, _, cluster in events)
        first = min(count, key=lambda c: (-count[c], c), default=None)
        events = [e for e in events if e[2] == first] or [(0, seconds, None)]
        last = length - seconds if length else math.inf  # a length of 0 is not known
        starts = sorted({round(max(0, min((a + b - seconds) / 2, last)), 3) for a, b, _ in events
                         if not any(c < a and b < d for c, d, _ in events)})
        primary = rng.choice(starts)
        for start in starts:
            species[row["ebird_code"]][start != primary].append(row | {"start": start})
    for name in sorted(species):
        primary, left = species[name]
        taken = rng.sample(primary, min(shots, len(primary)))
        taken += rng.sample(left, min(shots - len(taken), len(left)))
        yield from taken


def read_clips(root, data, seed=0):
    """Read the tables of one dataset.

    Returns clips, a list of dicts with path (relative to root), start (s), split, labels (set),
    source (a path, or where an embedded recording lies); missing, {split: [paths]}; classes,
    sorted, over all rows of all splits, so that a missing file never drops or moves a class; and
    events, rows of (path, onset, offset, label) where the lines name onset and offset."""
    clips, missing, classes, events = {}, collections.defaultdict(dict), set(), []
    for rule in data["rules"]:
        rows = read_rows(root, rule)
        if "shots" in rule:
            rows = list(rows)
            classes |= set().union(*(read_labels(rule, row) for row in rows))
            rows = few_shot(rows, int(rule["shots"]), data["seconds"], seed)
        for row in rows:
            row = {"start": 0} | row
            wanted = fill(rule, "path", row)
            path, source = find_audio(root, wanted, row.get("embedded"))
            row |= {"dir": os.path.basename(os.path.dirname(path or wanted)),
                    "parts": re.split("[_-]", os.path.splitext(os.path.basename(wanted))[0])}
            split = fill(rule, "split", row).strip()
            if not split or not wanted:
                raise Stop(f"{row['where']}: an empty {'path' if split else 'split'}; every row "
                           f"needs a path, and train, valid, test or a fold name")
            times = [fill(rule, key, row) for key in ("start", "onset", "offset") if key in rule]
            try:
                start, *strong = [float(time or 0) for time in times]
                if not all(0 <= time < math.inf for time in (start, *strong)):
                    raise ValueError
            except ValueError:
                raise Stop(f"{row['where']}: {' '.join(times)}: start, onset and offset must be "
                           f"numbers of seconds, 0 or later")
            labels = read_labels(rule, row)
            classes |= labels
            if ratio := re.fullmatch(r"(\d+)/(\d+)", split):
                a, b = map(int, ratio.groups())  # by hash of the name, the same on every machine
                point = int(hashlib.md5(wanted.encode()).hexdigest()[:8], 16) / 2**32
                split = "train" if point * (a + b) < a else "test"
            written, split = split, SPLITS.get(split.lower(), split)
            if path is None:
                missing[split][wanted, start] = None
                continue
            clip = clips.setdefault((path, start), {
                "path": path, "start": start, "split": split, "labels": set(), "source": source,
                "where": row["where"], "written": set(), "others": set()})
            clip["labels"] |= labels
            if split == clip["split"]:
                clip["written"].add(written)
            else:  # a clip met again keeps its first split
                clip["others"].add(split)
            if strong and times[1]:
                events += [(path, *strong, label) for label in sorted(labels)]
    clips = list(clips.values())
    if not clips and not missing:
        raise Stop(f"{root}: the tables of this dataset hold no row")
    for clip in clips:
        if data["task"] == "single" and len(clip["labels"]) != 1:
            raise Stop(f"{clip['where']}: {clip['path']} has {len(clip['labels'])} labels "
                       f"({'; '.join(sorted(clip['labels']))}); a 'single' dataset needs exactly "
                       f"one a clip: correct the table, or call the task 'multi'")
    named = {clip["split"] for clip in clips} & set(SPLITS.values())
    for clip in clips:
        if named and clip["split"] not in named:
            raise Stop(f"{clip['where']}: the split {clip['split']!r}, where others are "
                       f"{' '.join(sorted(named))}; splits are train, valid and test, or all folds")
    if len(classes) != data["classes"]:
        shown = ", ".join(sorted(classes)[:12]) + (" ..." if len(classes) > 12 else "")
        raise Stop(f"{data['rules'][0]['where']}: {data['classes']} classes declared, "
                   f"{len(classes)} found ({shown}); correct the count or the table")
    return clips, {k: [w for w, _ in v] for k, v in missing.items()}, sorted(classes), events


def read_events(root):
    """Rows (path, onset, offset, label) of root/events.csv, none where there is none."""
    file = os.path.join(root, "events.csv")
    if not os.path.exists(file):
        return []
    try:
        return [(os.path.normpath(row["path"]), float(row["onset"]), float(row["offset"]),
                 row["label"]) for row in read_table(file)]
    except (KeyError, ValueError) as e:
        raise Stop(f"{file}: {e}; its header is path,onset,offset,label, in seconds")


def fill(rule, key, row):
    """A template of a line with the row's columns put in. Raises Stop if one is not there."""
    try:
        return rule[key].format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
        ours = "where", "embedded", "dir", "parts", "stem", "folder"
        columns = [k for k in row if k not in ours and (k, row[k]) != ("start", 0)]
        raise Stop(f"{row['where']}: cannot fill in {key}={rule[key]} ({e}), the columns here are "
                   f"{' '.join(columns)}; correct the header of that table or {rule['where']}"
                   + ("; commas separate columns in a .csv, tabs elsewhere" * (len(columns) == 1)))


def read_labels(rule, row):
    new = dict(pair.split(":") for pair in rule["map"].split(",")) if "map" in rule else {}
    labels = {new.get(x, x) for x in map(str.strip, fill(rule, "labels", row).split(rule["sep"]))}
    if any(re.search("[;\n\r\ufffd]", x) for x in labels):
        raise Stop(f"{row['where']}: a class name has ';' or a line break in it, which separate "
                   f"names in clips.csv and classes.txt, or is not UTF-8; rename it, correct sep=, "
                   f"close quotes, or save the table as UTF-8")
    return labels - {""}


def find_audio(root, wanted, embedded):
    """(path relative to root, source to read), or (None, None) if there is no such file."""
    if embedded:
        return wanted, embedded
    stem, ending = os.path.splitext(wanted)
    if ending[1:].isdigit():  # "id_30.000_40.000" has no ending
        stem = wanted
    for name in [wanted] + [stem + e for e in AUDIO if e != ending]:
        if name.startswith("**/"):  # anywhere below the folder, by base name
            name, *others = files_by_name(root).get(os.path.basename(name), [""])
            if others:
                raise Stop(f"{root}: {name} and {others[0]} have the same name, and {wanted} could "
                           f"be both; remove one, or correct path= in datasets.txt")
        if name and os.path.isfile(os.path.join(root, name)):
            return os.path.normpath(name), os.path.join(root, name)
    return None, None


@functools.lru_cache(maxsize=1)
def files_by_name(root):
    found = collections.defaultdict(list)
    for file in sorted(glob.glob("**", root_dir=root, recursive=True)):
        found[os.path.basename(file)].append(file)
    return found


def print_report(data, clips, missing, unreadable, classes):
    """One row per split; `unreadable` holds row numbers. Prevalence = mean share of clips a class
    is in = macro mAP of a constant score."""
    print(f"{'split':>12} {'clips':>8} {'missing':>8} {'unreadable':>11} {'labels/clip':>12} "
          f"{'prevalence':>11}")
    splits = list(dict.fromkeys([c["split"] for c in clips] + list(missing)))
    tested = set()
    for split in splits:
        rows = [i for i, c in enumerate(clips) if c["split"] == split]
        good = [clips[i] for i in rows if i not in unreadable]
        written = set().union(*(c["written"] for c in good))
        labels = sum(len(c["labels"]) for c in good) / max(1, len(good))
        print(f"{split:>12} {len(good):8,} {len(missing.get(split, [])):8,} "
              f"{len(rows) - len(good):11,} {labels:12.2f} {labels / len(classes):11.1%}"
              + "".join(f"  ({name})" for name in sorted(written - {split})))
        if split == "test" or "test" not in splits:
            tested.update(*(c["labels"] for c in good))
    print(f"{len(classes)} classes found, {data['classes']} declared; {len(tested)} have a "
          f"positive among the tested clips")
    several = [c for c in clips if c["others"]]
    for first in several[:1]:
        print(f"clips listed in several splits, which count in the first alone: {len(several)}, as "
              f"{first['path']} in {first['split']} and not {' '.join(sorted(first['others']))}")
    absent = [path for paths in missing.values() for path in paths]
    if absent:
        print(f"missing: {', '.join(absent[:3])}" + ", ..." * (len(absent) > 3))


# ---------------------------------------------------------------------------------------------
# downloads

def download(url, file, digest, by_hand):
    """Fetch url into file: <file>.part first (resumed by a Range request), checked against the
    length the server states and an md5 or sha256 ("": none), renamed when whole. Raises Stop."""
    part = file + ".part"
    os.makedirs(os.path.dirname(file), exist_ok=True)
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # the server starts over, so do we
            total = have + int(reply.headers.get("Content-Length") or 0)
            room(os.path.dirname(file), total - have, f"the download of {os.path.basename(file)}")
            with open(part, "ab" if have else "wb") as f:
                bar = Progress(total / 1e6, "MB", have / 1e6)
                while block := reply.read(1 << 20):
                    f.write(block)
                    bar.show(f.tell() / 1e6)
                bar.close()
                size = f.tell()
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise Stop(f"{url} answered {e.code} {e.reason}; {by_hand}")
        if e.headers.get("Content-Range", "") != f"bytes */{have}":  # else the part is whole
            os.remove(part)
            raise Stop(f"{part} was not a part of {url} and is removed; run the same command again")
        size = total = have
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Stop(f"cannot reach {url} ({getattr(e, 'reason', e)}); {by_hand}; "
                   f"what has arrived is kept in {part}")
    if total and size != total:
        raise Stop(f"{url} broke off at {size:,} of {total:,} bytes; run the same command again")
    if digest and digest != file_digest(part, "md5" if len(digest) == 32 else "sha256"):
        os.remove(part)
        raise Stop(f"{url}: the bytes that came do not have the checksum {digest}; run again, and "
                   f"if it stays so the source has changed: {by_hand}")
    os.replace(part, file)


def file_digest(file, kind="sha256"):
    digest = hashlib.new(kind)
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def stated_size(url):
    """Bytes a download will have, 0 where the server does not say."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=60) as reply:
            return int(reply.headers.get("Content-Length") or 0)
    except (OSError, http.client.HTTPException):
        return 0


def fetch_dataset(root, data):
    """Download and unpack the url= archives of a dataset; root appears when everything is in it.

    One folder at the top of the archives is left out. Raises Stop for archives that are not whole,
    have a password or a compression that Python lacks, point outside their folder or declare more
    than MAX_UNPACK times their size."""
    parts, new = root + ".download", root + ".unpacking"
    by_hand = f"download it by hand and unpack it into {root}/"
    urls = [(url, md5, os.path.join(parts, os.path.basename(url.split("?")[0])))
            for url, md5 in data["urls"]]
    os.makedirs(parts, exist_ok=True)
    size = sum(stated_size(url) for url, _, _ in urls)
    have = sum(entry.stat().st_size for entry in os.scandir(parts))
    print(f"{root} is not there; fetching {len(urls)} files into {parts} "
          + (f"({size / 1e9:,.2f} GB stated)" if size else "(size not stated)"), file=sys.stderr)
    room(parts, 2 * size - have, f"{root} (its archives, and about as much unpacked)")
    for url, md5, file in urls:
        if not os.path.exists(file):
            download(url, file, md5, by_hand)
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    try:
        for url, md5, file in urls:
            print(f"unpacking {file}", file=sys.stderr)
            try:
                unpack(file, new)
            except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError,
                    IndexError) as e:
                if not md5:  # what was not checked may have come wrong
                    os.remove(file)
                reason = str(e).partition("\n")[0]
                raise Stop(f"{file}: not a whole archive ({reason}); run the same command again, "
                           f"or take {url}: {by_hand}")
            except RuntimeError as e:
                raise Stop(f"{file}: Python cannot unpack it ({e}); unpack it by hand into {root}/")
        inside = os.listdir(new)
        only = os.path.join(new, inside[0]) if len(inside) == 1 else ""
        os.rename(only if os.path.isdir(only) else new, root)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)


class Joined(io.RawIOBase):
    """The parts of a split archive, one after the other, as one file to read."""

    def __init__(self, files):
        self.files, self.at = files, 0
        self.starts = np.cumsum([0, *map(os.path.getsize, files)]).tolist()

    readable = seekable = lambda self: True  # noqa: E731

    def seek(self, to, whence=0):
        self.at = to + (0, self.at, self.starts[-1])[whence]
        if self.at < 0:
            raise EOFError("its beginning is missing")
        return self.at

    def readinto(self, buffer):
        i, n = sum(start <= self.at for start in self.starts) - 1, 0
        if i < len(self.files):
            with open(self.files[i], "rb") as f:
                f.seek(self.at - self.starts[i])
                n = f.readinto(buffer)
        self.at += n
        return n


def unpack(file, folder):
    """Unpack one zip or tar below folder (any other file is copied there). Every member is checked
    before the first is written: no absolute path, no '..', no link, no more bytes than allowed."""
    if re.search(r"\.z\d\d$", file):
        return  # read through its .zip
    parts, how = [*sorted(glob.glob(glob.escape(file[:-4]) + ".z[0-9][0-9]")), file], {}
    if file.endswith(".zip"):
        whole = Joined(parts)
        archive = zipfile.ZipFile(io.BufferedReader(whole, 1 << 20))
        if len(parts) > 1:  # zipfile takes all members to begin in the part of the directory
            archive.fp.seek(-22 - len(archive.comment), 2)
            directory = whole.starts[int.from_bytes(archive.fp.read(22)[6:8], "little")]
            for m in archive.infolist():
                m.header_offset += whole.starts[m.volume] - directory
                if hasattr(m, "_end_offset"):  # newer Pythons' guess from those places
                    m._end_offset = None
        members = [(m.filename, m.file_size, (m.external_attr >> 16) & 0o170000 == 0o120000)
                   for m in archive.infolist()]
    elif re.search(r"\.(tar|tar\.gz|tgz)$", file):
        archive = tarfile.open(file)
        members = [(m.name, m.size, not (m.isfile() or m.isdir())) for m in archive]
        if hasattr(tarfile, "data_filter"):  # from Python 3.10.12 and 3.11.4 on
            how = {"filter": "data"}
    else:
        shutil.copy(file, folder)
        return
    total, packed = sum(size for _, size, _ in members), sum(map(os.path.getsize, parts))
    for name, _, odd in members:
        if odd or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
            raise Stop(f"{file}: refused, its member {name!r} points outside the folder or is no "
                       f"plain file; get the archive from its official source")
    if total > MAX_UNPACK * packed:
        raise Stop(f"{file}: refused, it declares {total:,} bytes from {packed:,}; get the archive "
                   f"from its official source")
    room(folder, total, f"unpacking {os.path.basename(file)}")
    with archive:
        archive.extractall(folder, **how)


def room(folder, size, what):
    """Raise Stop if folder's disk has less than size bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise Stop(f"{what} needs {size / 1e9:,.2f} GB and {os.path.abspath(folder)} has "
                   f"{free / 1e9:,.2f} GB free; make room, or link that folder to a larger disk")


class Progress:
    """Done, rate and time left on stderr: one line in place, or one a minute into a log."""

    def __init__(self, total, unit, done=0):
        self.total, self.unit, self.first = total, unit, done
        self.begin = self.shown = time.time()
        self.every, self.end = (0.5, "\r") if sys.stderr.isatty() else (60, "\n")

    def show(self, done):
        now = time.time()
        if now - self.shown > self.every:
            rate = (done - self.first) / (now - self.begin)
            left = round(max(0, self.total - done) / max(rate, 1e-9))
            print(f"{done:,.0f} / {self.total:,.0f} {self.unit}  {rate:,.1f} {self.unit}/s  "
                  f"{datetime.timedelta(seconds=left)} left   ", end=self.end, file=sys.stderr)
            self.shown = now

    def close(self):
        if self.shown != self.begin and self.end == "\r":
            print(file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# the demo: synthetic soundscapes [ours]

def make_demo(root):
    """Write 1,100 soundscapes of 5 s (16 kHz, 16 bit), manifest.csv and events.csv below root.

    In the manner of URBAN-SED: coloured noise and 1-5 overlapping events with random class,
    onset, length, pitch and level. The classes differ in how they move, not in where they lie:
    'up' and 'down' have the same mean spectrum, every pitch is random. Same bytes every time."""
    new = root + ".making"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(os.path.join(new, "audio"))
    rng = np.random.default_rng(DEMO_SEED)
    manifest, strong = [("path", "split", "labels")], [("path", "onset", "offset", "label")]
    bar = Progress(sum(DEMO_SPLITS.values()), "demo clips")
    for split, clips in DEMO_SPLITS.items():
        for i in range(clips):
            path = f"audio/{split}{i:04d}.wav"
            wave, events = soundscape(rng)
            pcm = np.clip(np.round(wave * 32767), -32768, 32767).astype(np.int16)
            soundfile.write(os.path.join(new, path), pcm, RATE, subtype="PCM_16")
            manifest.append((path, split, ";".join(sorted({e[2] for e in events}))))
            strong += [(path, *e) for e in events]
            bar.show(len(manifest))
    bar.close()
    write_csv(os.path.join(new, "manifest.csv"), manifest)
    write_csv(os.path.join(new, "events.csv"), strong)
    os.rename(new, root)


def soundscape(rng):
    """(wave float64 (80000,), [(onset s, offset s, class)])"""
    size = DEMO_SECONDS * RATE
    tilt = np.arange(1, size // 2 + 2) ** -rng.uniform(0, 0.75)  # white to nearly pink
    wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * tilt, size)
    wave *= 0.01 / wave.std()
    events = []
    for _ in range(rng.integers(1, 6)):
        name = DEMO_CLASSES[rng.integers(len(DEMO_CLASSES))]
        seconds = rng.uniform(0.5, 2.0)
        onset = rng.uniform(0, DEMO_SECONDS - seconds)
        sound = event(name, np.arange(int(seconds * RATE)) / RATE, rng)
        fade = np.minimum(1, np.arange(len(sound)) / 160)      # 10 ms
        sound *= fade * fade[::-1]
        sound *= 0.01 * 10 ** (rng.uniform(6, 20) / 20) / sound.std()  # 6-20 dB over the noise
        wave[int(onset * RATE):][:len(sound)] += sound
        events.append((round(onset, 3), round(onset + seconds, 3), name))
    return wave * min(1, 0.95 / np.abs(wave).max()), sorted(events)


def event(name, t, rng):
    """One sound of class `name` at the times t (s)."""
    pitch = 300 * 2 ** rng.uniform(0, 3.5)                     # 300-3400 Hz
    tone = lambda hz: np.sin(2 * np.pi * np.cumsum(hz + 0 * t) / RATE)  # noqa: E731
    noise = rng.standard_normal(len(t))
    if name in ("up", "down"):      # two octaves in 0.3-0.6 s, again and again
        ramp = t / rng.uniform(0.3, 0.6) % 1
        return tone(pitch * 2 ** (2 * (ramp if name == "up" else 1 - ramp)) / 2)
    if name == "siren":             # slow swing over an octave
        return tone(pitch * 2 ** (0.5 * np.sin(2 * np.pi * t * rng.uniform(0.8, 1.6))))
    if name == "warble":            # fast swing over a third
        return tone(pitch * 2 ** (0.17 * np.sin(2 * np.pi * t * rng.uniform(8, 14))))
    if name == "beeps":             # a tone, on and off
        return tone(pitch) * (t * rng.uniform(4, 8) % 1 < 0.5)
    if name == "tremolo":           # a rough tone
        return tone(pitch) * (1 + np.sin(2 * np.pi * t * rng.uniform(25, 45)))
    if name == "bell":              # inharmonic partials that ring off
        ring = np.exp(-(t % 0.5) * rng.uniform(6, 12))
        return ring * sum(tone(pitch * p) for p in (1, 1.52, 2.13, 2.76))
    if name == "buzz":              # all harmonics of a low voice
        return 2 * (t * rng.uniform(90, 220) % 1) - 1
    if name == "clicks":            # short impulses, irregular
        return noise * np.exp(-(t * rng.uniform(9, 18) + rng.uniform(0, 1) % 1) % 1 * 25)
    low = rng.uniform(300, 4000)    # hiss: steady noise of a band
    spectrum = np.fft.rfft(noise)
    hz = np.fft.rfftfreq(len(t), 1 / RATE)
    return np.fft.irfft(spectrum * ((hz > low) & (hz < 2 * low)), len(t))


def write_csv(file, rows):
    with open(file + ".tmp", "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    os.replace(file + ".tmp", file)


# ---------------------------------------------------------------------------------------------
# audio -> waveform

@functools.lru_cache(maxsize=16)
def resampler(rate):
    """torchaudio's windowed-sinc resampler to RATE; its kernel is made once per source rate."""
    return torchaudio.transforms.Resample(rate, RATE)


@functools.lru_cache(maxsize=2)
def row_group(file, group, column):
    return open_parquet(file).read_row_group(group, columns=[column]).column(column)


def read_wave(source, start, seconds):
    """float32 (seconds * RATE,): read_audio, zero-padded at the end. The padding is of the wave
    [ours]; most encoders' own code pads the log-mel with 0 instead."""
    wave = read_audio(source, start, seconds)
    return F.pad(wave, (0, round(seconds * RATE) - len(wave)))


def read_audio(source, start, seconds):
    """float32 (seconds * RATE,) at most: mean of channels, resampled, cropped at the end.

    source: a path, or (parquet file, row group, row, column). Raises ValueError or soundfile's
    own errors for what cannot be used."""
    if isinstance(source, tuple):
        file, group, row, column = source
        source = io.BytesIO(row_group(file, group, column)[row].as_py()["bytes"])
    with soundfile.SoundFile(source) as f:
        rate, first = f.samplerate, round(start * f.samplerate)
        if f.frames <= first:
            raise ValueError(f"it ends at {f.frames / rate:.2f} s, before its start")
        f.seek(first)
        wave = f.read(math.ceil(seconds * rate), dtype="float32", always_2d=True)
    if len(wave) < min(f.frames - first, seconds * rate) - 0.1 * rate or not len(wave):
        raise ValueError(f"only {len(wave) / rate:.2f} s of it could be decoded")
    if rate // math.gcd(rate, RATE) > UNEVEN:
        raise ValueError(f"a sample rate of {rate} Hz; resample it to {RATE}")
    wave = torch.from_numpy(wave)                                            # (samples, channels)
    wave = wave @ torch.full(wave.shape[1:], 1 / wave.shape[1])  # mean(1) takes 7 times as long
    if not wave.sum().isfinite():
        raise ValueError("samples that are not numbers (NaN or infinite)")
    return (wave if rate == RATE else resampler(rate)(wave))[:round(seconds * RATE)]


class Blocks(torch.utils.data.Dataset):
    """Item k = (waves (B, samples), bad {row: reason}, lengths in samples) of rows k*B ... k*B+B-1.
    A clip that cannot be read is silence here, so that its neighbours see the same batch with or
    without it."""

    def __init__(self, clips, seconds, size):
        self.clips, self.seconds, self.size = clips, seconds, size

    def __getitem__(self, block):
        rows = range(block * self.size, min((block + 1) * self.size, len(self.clips)))
        waves, bad, lengths = torch.zeros(len(rows), round(self.seconds * RATE)), {}, []
        for i, row in enumerate(rows):
            try:
                wave = read_audio(self.clips[row]["source"], self.clips[row]["start"], self.seconds)
                waves[i, :len(wave)] = wave
                lengths.append(len(wave))
            except (ValueError, RuntimeError, OSError, EOFError, TypeError) as e:
                bad[row] = " ".join(str(e).split()) or type(e).__name__
        return waves, bad, lengths


# ---------------------------------------------------------------------------------------------
# waveform -> spectrogram (time-major), batched, on any device

@functools.lru_cache(maxsize=8)
def mel_filters(bins, low, kind, device):
    """(FFT // 2 + 1, bins) triangles from low Hz to RATE / 2. kaldi: slopes linear in mel,
    the Nyquist bin is left out; htk: slopes linear in Hz [official code: torchaudio]."""
    hz = torch.arange(FFT // 2 + 1, dtype=torch.float64) * RATE / FFT
    mel = lambda f: 1127 * torch.log1p(torch.as_tensor(f, dtype=torch.float64) / 700)  # noqa: E731
    edges = torch.linspace(mel(low), mel(RATE / 2), bins + 2, dtype=torch.float64)
    x = mel(hz)[:, None]
    if kind == "htk":
        edges, x = 700 * torch.expm1(edges / 1127), hz[:, None]
    left, mid, right = edges[:-2], edges[1:-1], edges[2:]
    weights = torch.minimum((x - left) / (mid - left), (right - x) / (right - mid)).clamp(min=0)
    if kind == "kaldi":
        weights[-1] = 0
    return weights.float().to(device)


def kaldi_fbank(waves, povey=False):
    """Log-mel as torchaudio.compliance.kaldi.fbank with 128 bins: (B, samples) -> (B, T, 128),
    T = 1 + (samples - 400) // 160. Window: symmetric Hann, to the power 0.85 for povey."""
    frames = waves.unfold(-1, FRAME, HOP)                                    # (B, T, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)              # x[-1] := x[0]
    window = torch.hann_window(FRAME, periodic=False, device=waves.device)
    frames = (frames - 0.97 * before) * (window ** 0.85 if povey else window)
    power = torch.view_as_real(torch.fft.rfft(frames, FFT)).square().sum(-1)  # (B, T, 257)
    return (power @ mel_filters(128, 20, "kaldi", waves.device)).clamp(LOG_FLOOR).log()


def decibel_mel(waves):
    """Dasheng's 64 mel bins in dB: (B, samples) -> (B, 1 + samples // 160, 64). The floor, 120 dB
    below the maximum, is taken per clip: the usual torchaudio op takes it over the batch, so that
    a quiet clip would depend on its neighbours."""
    window = torch.hann_window(FFT, device=waves.device)
    power = torch.stft(waves, FFT, HOP, window=window, center=True, pad_mode="reflect",
                       return_complex=True).abs().square().transpose(1, 2)   # (B, T, 257)
    mel = power @ mel_filters(64, 0, "htk", waves.device)
    mel = 10 * mel.clamp(1e-10).log10()
    return torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 120)


# ---------------------------------------------------------------------------------------------
# spectrogram -> tokens: one ViT for all the encoders

class Attention(torch.nn.Module):
    """Self-attention over (B, L, D); with a relative bias it has BEATs' gate per head and query."""

    def __init__(self, D, heads, relative):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D)
        if relative:
            self.grep = torch.nn.Linear(D // heads, 8)
            self.grep_a = torch.nn.Parameter(torch.ones(heads))

    def forward(self, x, bias):                                              # bias (H, L, L)
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, d)
        if bias is not None:
            a, b = self.grep(q).view(B, self.heads, L, 2, 4).sum(-1).sigmoid().unbind(-1)
            gate = a * (b * self.grep_a[:, None] - 1) + 2                    # (B, H, L)
            bias = (gate[..., None] * bias).to(q.dtype)                      # (B, H, L, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class Block(torch.nn.Module):
    """Transformer block: pre-norm, or post-norm with the residual weighted by alpha."""

    def __init__(self, D, heads, hidden, post, alpha, eps, relative):
        super().__init__()
        self.post, self.alpha = post, alpha
        self.norm1, self.norm2 = (torch.nn.LayerNorm(D, eps) for _ in range(2))
        self.attn = Attention(D, heads, relative)
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(D, hidden),
                                        "fc2": torch.nn.Linear(hidden, D)})

    def forward(self, x, bias):
        mlp = lambda x: self.mlp.fc2(F.gelu(self.mlp.fc1(x)))  # exact (erf) GELU  # noqa: E731
        if self.post:
            x = self.norm1(self.alpha * x + self.attn(x, bias))
            return self.norm2(self.alpha * x + mlp(x))
        x = x + self.attn(self.norm1(x), bias)
        return x + mlp(self.norm2(x))


class ViT(torch.nn.Module):
    """The six encoders in one: sizes come from the checkpoint's shapes (after `to_common`), the
    rest from its family. forward: (B, T, mels) -> tokens (B, N, D), cls (B, D) or None."""

    def __init__(self, shapes, family, norm=True):
        super().__init__()
        stem, _, *patch = shapes["patch.weight"]
        D, hidden = shapes["blocks.0.norm1.weight"][0], shapes["blocks.0.mlp.fc1.weight"][0]
        depth = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("blocks."))
        heads = D // (80 if D == 1280 else 64)  # 1280: Dasheng 0.6B [official code]
        relative, post = family == "beats", family in ("beats", "eat")
        eps = 1e-5 if relative else 1e-6
        alpha = (2 * depth) ** 0.25 if relative else 1                       # DeepNorm
        self.patch = torch.nn.Conv2d(1, stem, patch, patch, bias=not relative)
        if relative:
            self.stem_norm, self.stem = torch.nn.LayerNorm(stem, eps), torch.nn.Linear(stem, D)
            _, width, taps = shapes["conv_pos.weight"]
            self.conv_pos = torch.nn.Conv1d(D, D, taps, padding=taps // 2, groups=D // width)
            self.rel_bias = torch.nn.Parameter(torch.empty(shapes["rel_bias"]))
        else:
            self.pos = torch.nn.Parameter(torch.empty(shapes["pos"]))
        if family not in ("beats", "dasheng"):
            self.cls = torch.nn.Parameter(torch.empty(D))
        if norm:  # before block 0 (post) or after the last (pre)
            self.norm = torch.nn.LayerNorm(D, eps)
        self.blocks = torch.nn.ModuleList(Block(D, heads, hidden, post, alpha, eps, relative)
                                          for _ in range(depth))
        self.post = post

    def embed(self, spec):
        """What enters block 0: (B, L, D)."""
        x = self.patch(spec[:, None]).flatten(2).transpose(1, 2)       # (B, N, D), n = t*F+f
        if hasattr(self, "stem"):
            x = self.stem(self.stem_norm(x))
            x = x + F.gelu(self.conv_pos(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
        if hasattr(self, "cls"):
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)            # (B, 1+N, D)
        if hasattr(self, "pos"):
            x = x + self.pos[:x.shape[1]]
        return self.norm(x) if self.post else x

    def bias(self, L):
        """BEATs' relative position bias (H, L, L), shared by all blocks; None for the others."""
        if hasattr(self, "rel_bias"):
            return self.rel_bias[rel_bucket(L, self.rel_bias.device)].permute(2, 0, 1)

    def forward(self, spec):
        x = self.embed(spec)
        bias = self.bias(x.shape[1])
        for block in self.blocks:
            x = block(x, bias)
        if not self.post and hasattr(self, "norm"):
            x = self.norm(x)
        return (x[:, 1:], x[:, 0]) if hasattr(self, "cls") else (x, None)


@functools.lru_cache(maxsize=2)
def rel_bucket(L, device):
    """(L, L) bucket of j - i: exact below 80, logarithmic up to 800 [official code: BEATs cfg]."""
    r = torch.arange(L)[None, :] - torch.arange(L)[:, None]
    a = r.abs()
    log = 80 + (a.clamp(1) / 80).log().div(math.log(800 / 80)).mul(80).long()
    return (torch.where(a < 80, a, log.clamp(max=159)) + 160 * (r > 0)).to(device)  # 160 a sign


# ---------------------------------------------------------------------------------------------
# checkpoint -> ViT

PREFIXES = {"amae": ("encoder.",), "asit": ("module.", "backbone.", "v."), "beats": (),
            "dasheng": ("encoder.",), "eat": ("model.", "modality_encoders.IMAGE.")}
IGNORED = {  # heads, decoders and buffers that the tokens do not need
    "amae": r"mask_token|decoder_|fc_norm\.|head\.", "asit": r"head_cls\.|head_recons\.|mlp_head\.",
    "beats": r"predictor\.", "dasheng": r"front_end\.|outputlayer\.|.*num_batches_tracked",
    "eat": r"decoder\.|recon_proj\.|shared_decoder\.|_ema|fc_norm\.|head\."}
RENAMES = [  # official key -> ours, first match
    (r"(patch_embed\.proj|local_encoder\.proj|patch_embedding)\.", "patch."),
    (r"(cls_token|extra_tokens)$", "cls"),
    (r"(pos_embed|fixed_positional_encoder\.positions)$", "pos"),
    (r"(pre_norm|context_encoder\.norm|encoder\.layer_norm)\.", "norm."),
    (r"layer_norm\.", "stem_norm."), (r"post_extract_proj\.", "stem."),
    (r"encoder\.pos_conv\.0\.", "conv_pos."), (r"init_bn\.(1\.)?", "bn."),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"blocks.\1.norm1."),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"blocks.\1.norm2."),
    (r"encoder\.layers\.(\d+)\.fc", r"blocks.\1.mlp.fc"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"blocks.\1.attn.proj"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear", r"blocks.\1.attn.grep"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attn.")]


def read_checkpoint(file):
    """{key: tensor} of a safetensors file or a torch pickle (weights only: tensors, plain
    containers, argparse.Namespace and paths, nothing that runs code). Raises Stop."""
    try:
        with open(file, "rb") as f:
            head = f.read(9)
            if head[8:] == b"{":                                             # safetensors
                size = int.from_bytes(head[:8], "little")
                f.seek(8)
                layout = json.loads(f.read(size))
                raw = bytearray(f.read())
                kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                         "I64": torch.int64}
                layout.pop("__metadata__", None)
                tensors = {}
                for key, entry in layout.items():
                    begin, end = entry["data_offsets"]
                    if end > len(raw):
                        raise ValueError(f"it ends before {key}")
                    tensors[key] = torch.frombuffer(
                        raw[begin:end], dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
                return tensors
        paths = [(kind, f"pathlib.{kind.__name__}") for kind in
                 (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.Path)]
        with torch.serialization.safe_globals([argparse.Namespace, *paths]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # every reader has its own errors for the same two causes
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}".split(". ")[0][:160]
        raise Stop(f"{file}: not a whole checkpoint of plain tensors ({reason}); fetch it again")
    if not isinstance(state, dict):
        raise Stop(f"{file}: holds a {type(state).__name__}, not a dict of tensors")
    inner = [state[k] for k in ("model", "teacher", "state_dict") if isinstance(state.get(k), dict)]
    state = inner[0] if inner else state
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}   # drops e.g. _ema


def to_common(state, family):
    """Official keys and layouts -> the ViT's: one fused qkv, cls as (D,), positions as rows whose
    first is [cls]'s, time-major patch kernels, weight norm folded in."""
    out = {}
    for key, value in state.items():
        while prefix := next((p for p in PREFIXES[family] if key.startswith(p)), ""):
            key = key[len(prefix):]
        if not re.match(IGNORED[family], key):
            for old, new in RENAMES:
                key, matched = re.subn("^" + old, new, key, count=1)
                if matched:
                    break
            out[key] = value.float()
    if "cls" in out:
        out["cls"] = out["cls"].flatten()
    if "pos" in out:
        out["pos"] = out["pos"][0]                                           # (rows, D)
        if family == "eat":  # official EAT adds no position to [cls]
            out["pos"] = F.pad(out["pos"], (0, 0, 1, 0))
    if family == "dasheng" and {"time_pos_embed", "freq_pos_embed", "patch.weight"} <= set(out):
        out["pos"] = (out.pop("time_pos_embed") + out.pop("freq_pos_embed"))[0, :, 0].T
        out["patch.weight"] = out["patch.weight"].transpose(2, 3)            # (D, 1, 4, 64)
    if family == "beats":
        for key in [k for k in out if k.endswith("relative_attention_bias.weight")]:
            out["rel_bias"] = out.pop(key)                                   # same in every layer
        if {"conv_pos.weight_g", "conv_pos.weight_v"} <= set(out):
            v = out.pop("conv_pos.weight_v")
            out["conv_pos.weight"] = out.pop("conv_pos.weight_g") * v / v.norm(dim=(0, 1),
                                                                               keepdim=True)
        for key in [k for k in out if ".attn.q_proj." in k]:
            parts = [key.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj")]
            if all(p in out for p in parts):
                out[key.replace("q_proj", "qkv")] = torch.cat([out.pop(p) for p in parts])
        out |= {k: v.flatten() for k, v in out.items() if k.endswith("grep_a")}
    return out


def load_vit(state, family, norm, where):
    """A ViT in eval mode from common keys; Stop lists what is missing, unexpected or misshapen."""
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    try:
        with torch.device("meta"):
            vit = ViT(shapes, family, norm)
        wanted = {k: tuple(v.shape) for k, v in vit.state_dict().items()}
        missing = sorted(set(wanted) - set(shapes))
    except (KeyError, ValueError) as e:
        wanted, missing = {}, [str(e).strip("'")]
    odd = sorted(set(shapes) - set(wanted)) if wanted else []
    bent = [f"{k} {shapes[k]} for {wanted[k]}" for k in wanted
            if shapes.get(k, wanted[k]) != wanted[k]]
    if missing or odd or bent:
        kinds = (missing, "missing"), (odd, "unexpected"), (bent, "misshapen")
        lists = [f"{len(x)} {word} ({', '.join(x[:4])}{', ...' if len(x) > 4 else ''})"
                 for x, word in kinds if x]
        raise Stop(f"{where}: not the checkpoint of this encoder, keys {', '.join(lists)}; check "
                   f"--model and --checkpoint")
    vit.load_state_dict(state, assign=True)
    return vit.eval().requires_grad_(False)


def random_state():
    """EAT-base with seeded random weights, in common keys: what is left without pretraining [ours].
    Positions are EAT's fixed sin-cos rows (t * 8 + f), the first half of the columns for f."""
    D, g = 768, torch.Generator().manual_seed(0)
    rand = lambda *shape: 0.02 * torch.randn(shape, generator=g)  # noqa: E731
    wave = lambda p: torch.cat([torch.sin(p), torch.cos(p)], -1)  # noqa: E731
    omega = 10000 ** -(torch.arange(D // 4) / (D // 4))
    t, f = torch.arange(768.0), torch.arange(8.0)
    rows = torch.cat([wave(f[:, None] * omega).repeat(768, 1),
                      wave(t[:, None] * omega).repeat_interleave(8, 0)], 1)  # (6144, D)
    out = {"patch.weight": rand(D, 1, 16, 16), "patch.bias": torch.zeros(D), "cls": rand(D),
           "pos": F.pad(rows, (0, 0, 1, 0)), "norm.weight": torch.ones(D),
           "norm.bias": torch.zeros(D)}
    for i in range(12):
        for name, shape in {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D),
                            "mlp.fc2": (D, 4 * D), "norm1": (D,), "norm2": (D,)}.items():
            out[f"blocks.{i}.{name}.weight"] = rand(*shape) if len(shape) == 2 else torch.ones(D)
            out[f"blocks.{i}.{name}.bias"] = torch.zeros(shape[0])
    return out


def find_checkpoint(model, given):
    """(path or None, {source, sha256} or None): the given file, or the official one, fetched once
    into torch.hub's folder. Raises Stop."""
    _, url, known, _, _ = MODELS[model]
    if model in ("logmel", "random"):
        if given:
            raise Stop(f"--model {model} has no weights; leave --checkpoint out")
        return None, None
    file, by_hand = given, "download it by hand and name it with --checkpoint FILE"
    if not given:
        if not url:
            raise Stop(f"the weights of {model} have no address a script can fetch (the official "
                       f"repository links to a cloud drive); {by_hand}")
        file = os.path.join(torch.hub.get_dir(), "checkpoints", f"{model}-{os.path.basename(url)}")
        with alone(file + ".lock"):
            if not os.path.exists(file):
                print(f"fetching {url}", file=sys.stderr)
                download(url, file, known, by_hand)
    elif not os.path.isfile(file):
        raise Stop(f"{file}: no such file; give --checkpoint the file you downloaded")
    sha256 = file_digest(file)
    for other, (_, _, digest, _, _) in MODELS.items():
        if digest == sha256 and other != model:
            raise Stop(f"{file}: this is the official checkpoint of {other}; use --model {other}")
    if known and sha256 != known:
        if not given:
            raise Stop(f"{file}: sha256 {sha256} is not the official {known}; delete it and run "
                       f"again")
        print(f"note: {file} is not the official file of {model} byte for byte", file=sys.stderr)
    return file, {"source": given or url, "sha256": sha256}


class Encoder:
    """Frozen encoder for clips of one length: encoder(waves (B, samples)) -> tokens (B, N, D),
    cls (B, D) or None, N = T*F, tokens time-major.

    Input length [official code]: A-MAE always 1024 frames; EAT, SSLAM, ASiT the clip's frames
    rounded up to STEP; BEATs, logmel as they are; Dasheng in chunks of 1008. Padding is 0 in
    log-mel before normalising, as upstream. Token columns that see nothing else are dropped, but
    for the last one of 10 s, which belongs to the paper's 64 x 8."""

    def __init__(self, model, file=None, seconds=10.0, device="cpu", precision="fp32"):
        self.family, _, _, self.stats, _ = MODELS[model]
        self.device, self.half = device, precision == "fp16"
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in convolutions too
        samples = round(seconds * RATE)
        if samples < FRAME:
            raise Stop(f"clips of {seconds} s are shorter than one frame (0.025 s)")
        frames = 1 + (samples - FRAME) // HOP
        padded = -(-frames // STEP) * STEP
        self.frames = {"amae": 1024, "eat": padded, "asit": padded}.get(self.family, frames)
        T = 64 if padded == 1024 else -(-frames // 16)
        self.grid, self.token_seconds = (min(T, self.frames // 16), 8), 0.16  # (T, F), s
        if self.family == "dasheng":
            self.grid, self.token_seconds = ((1 + samples // HOP) // 4, 1), 0.04
        if self.grid[0] < 1:
            raise Stop(f"clips of {seconds:g} s are {frames} frames, fewer than the 16 of one "
                       f"token (4 of Dasheng's); raise the seconds in datasets.txt")
        self.dim, self.cls, self.vit = 256, False, None
        if self.family == "logmel":
            return
        where = file or model
        try:
            state = to_common(read_checkpoint(file), self.family) if file else random_state()
            if self.family == "asit" and "pos" in state:
                state["pos"] = resize_rows(state["pos"], self.frames // 16)
        except (RuntimeError, IndexError) as e:  # of reshaping
            raise Stop(f"{where}: not the checkpoint of this encoder, a tensor has another shape "
                       f"({' '.join(str(e).split())[:80]}); check --model and --checkpoint")
        if self.family == "dasheng":
            names = "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"
            if not set(names) <= set(state):
                raise Stop(f"{where}: not the checkpoint of this encoder, no init_bn in it; check "
                           f"--model and --checkpoint")
            weight, bias, mean, var = (state.pop(name) for name in names)            # (64,) each
            scale = weight / (var + 1e-5).sqrt()
            self.scale, self.shift = scale.to(device), (bias - mean * scale).to(device)
        norm = (self.family, model[-1]) != ("amae", "+")  # A-MAE+ ends in raw tokens
        self.vit = load_vit(state, self.family, norm, where).to(device)
        self.dim, self.cls = self.vit.blocks[0].norm1.weight.numel(), hasattr(self.vit, "cls")
        limit = (len(state["pos"]) - self.cls) // 8 * 16 if self.cls else math.inf
        if max(frames, self.frames) > limit:
            raise Stop(f"clips of {seconds:g} s are {frames} frames; {model} has positions for "
                       f"{limit} ({limit * HOP / RATE:.2f} s): lower the seconds in datasets.txt")

    def spectrogram(self, waves):
        """(B, samples) -> the network's input, normalised (B, frames, mels), fp32."""
        if self.family == "dasheng":
            return decibel_mel(waves) * self.scale + self.shift
        if self.family == "beats":
            spec = kaldi_fbank(waves * 2 ** 15, povey=True)
        else:
            spec = kaldi_fbank(waves - waves.mean(-1, keepdim=True))
        spec = F.pad(spec, (0, 0, 0, self.frames - spec.shape[1]))
        return (spec - self.stats[0]) / (2 * self.stats[1])

    @torch.inference_mode()
    def __call__(self, waves):
        spec = self.spectrogram(waves.to(self.device, non_blocking=True))
        if self.family == "logmel":  # a token is a 16 x 16 patch, flattened
            T = self.grid[0]
            patches = spec[:, :16 * T].unflatten(1, (T, 16)).unflatten(3, (8, 16))
            return patches.transpose(2, 3).flatten(3).flatten(1, 2), None    # (B, T*8, 256)
        with torch.autocast(self.device, torch.float16, enabled=self.half):
            if self.family == "dasheng" and spec.shape[1] > CHUNK:
                parts = [F.pad(x, (0, 0, 0, CHUNK - x.shape[1])) for x in spec.split(CHUNK, 1)]
                tokens, cls = torch.cat([self.vit(x)[0] for x in parts], 1), None
            else:
                tokens, cls = self.vit(spec)
        return tokens[:, :self.grid[0] * self.grid[1]], cls


def resize_rows(pos, T):
    """ASiT's learned positions for T time columns: the middle of the table, or bilinear between
    its rows where the clip is longer [AST's recipe, second hand]; row 0 is [cls]'s."""
    table = pos[1:].T.reshape(1, pos.shape[1], -1, 8)                        # (1, D, T0, 8)
    T0 = table.shape[2]
    if T <= T0:
        first = T0 // 2 - T // 2
        table = table[:, :, first:first + T]
    else:
        table = F.interpolate(table, (T, 8), mode="bilinear", align_corners=False)
    return torch.cat([pos[:1], table[0].flatten(1).T])


# ---------------------------------------------------------------------------------------------
# the dump

def open_dump(folder, meta, clips, classes, events, encoder):
    """Create tokens/<data>/<model>/ (at once, by rename) or check the one that is there; returns
    its meta. Raises Stop, naming what differs, for a dump made with other settings."""
    file, new = os.path.join(folder, "meta.json"), folder + ".new"
    if os.path.exists(folder):
        try:
            old = json.load(open(file, encoding="utf-8"))
        except (OSError, ValueError):
            raise Stop(f"{file} is not there or not whole; --overwrite discards the folder")
        free = ["versions", "done", "complete", "block"]
        if old.get("checkpoint") and meta["checkpoint"] \
                and old["checkpoint"]["sha256"] == meta["checkpoint"]["sha256"]:
            free.append("checkpoint")  # the same weights, wherever they lie
        differ = [f"{key} was {json.dumps(old.get(key))} and would be {json.dumps(meta[key])}"
                  for key in meta if key not in free and old.get(key) != meta[key]]
        if differ:
            raise Stop(f"{folder} was made with other settings, --overwrite starts anew: "
                       + "; ".join(differ))
        return old
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    shapes = {"tokens.npy": (len(clips), encoder.grid[0] * encoder.grid[1], encoder.dim)}
    if encoder.cls:
        shapes["cls.npy"] = len(clips), encoder.dim
    for name, shape in shapes.items():
        path = os.path.join(new, name)
        np.lib.format.open_memmap(path, "w+", np.float16, shape)
        if hasattr(os, "posix_fallocate"):  # claim the room now, not in the middle of the night
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    write_clips(new, clips, classes)
    with open(os.path.join(new, "classes.txt"), "w", encoding="utf-8") as f:
        f.writelines(c + "\n" for c in classes)
    if events:
        write_csv(os.path.join(new, "events.csv"),
                  [("path", "onset", "offset", "label"), *events])
    write_json(os.path.join(new, "meta.json"), meta)
    os.rename(new, folder)
    return meta


def clip_rows(clips):
    return [(c["path"], f"{c['start']:.12g}", c["split"], ";".join(sorted(c["labels"])))
            for c in clips]


def write_clips(folder, clips, classes):
    labels = np.array([[c in clip["labels"] for c in classes] for clip in clips], np.uint8)
    np.save(os.path.join(folder, "labels.npy"), labels.reshape(len(clips), len(classes)))
    write_csv(os.path.join(folder, "clips.csv"),
              [("path", "start", "split", "labels"), *clip_rows(clips)])


def write_json(file, content):
    with open(file + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1, ensure_ascii=False)
    os.replace(file + ".tmp", file)


def read_progress(folder):
    """{finished block: {unreadable row: reason}} from progress.<rank>, one JSON line per block. A
    line that was cut short does not count."""
    blocks = {}
    for file in glob.glob(os.path.join(glob.escape(folder), "progress.*")):
        for line in open(file, encoding="utf-8"):
            with contextlib.suppress(ValueError):
                block, reasons = json.loads(line)
                blocks[block] = {int(row): reason for row, reason in reasons.items()}
    return blocks


def forget_bad_blocks(folder):
    """Before going on: one record of the blocks whose clips could all be read. The others are tried
    again, as their files may have been mended."""
    done = read_progress(folder)
    old = glob.glob(os.path.join(glob.escape(folder), "progress.*"))
    file, new = (os.path.join(folder, name) for name in ("progress.0", "record.tmp"))
    with open(new, "w", encoding="utf-8") as f:
        f.writelines(json.dumps([block, {}]) + "\n" for block in done if not done[block])
    os.replace(new, file)
    for other in set(old) - {file}:
        os.remove(other)


def fill_dump(folder, encoder, clips, meta, rank, world, most_bad):
    """Encode this rank's unfinished blocks (every world-th) into the arrays, in order.

    A block is recorded once its rows are on disk. Raises Stop for a clip whose tokens overflow
    float16, and when more than most_bad clips are unreadable."""
    size = meta["block"]
    done, bad, filled = read_progress(folder), {}, []
    if done and rank == 0:
        print(f"going on: {len(done):,} blocks of {size} clips are done")
    todo = [b for b in range(rank, -(-len(clips) // size), world) if b not in done]
    arrays = {}
    for name in ("tokens.npy", "cls.npy") if encoder.cls else ("tokens.npy",):
        view = np.load(os.path.join(folder, name), mmap_mode="r")
        arrays[name] = open(view.filename, "r+b", buffering=0), view.offset, view[0].nbytes
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")  # a job's, on Linux
             else os.cpu_count())
    workers = max(1, min(16, cores // ranks))
    if os.path.exists("/dev/shm"):  # batches pass through it, two a worker; 64 MB in a container
        batch = 4 * size * round(meta["seconds"] * RATE)
        workers = min(workers, int(shutil.disk_usage("/dev/shm").free / (3 * batch * ranks)))
        if not workers and rank == 0:
            print("/dev/shm is too small for worker processes (docker run --shm-size=2g): audio is "
                  "read in between")
    loader = torch.utils.data.DataLoader(
        Blocks(clips, meta["seconds"], size), batch_size=None, sampler=todo,
        num_workers=workers if todo else 0, pin_memory=encoder.device == "cuda")
    bar = Progress(sum(min(size, len(clips) - b * size) for b in todo), "clips")
    count, pending, synced = 0, [], time.time()

    def save(block, halves, odd, ready, reasons):
        nonlocal pending, synced
        if ready:
            ready.synchronize()
        for (name, (file, offset, stride)), half, wrong in zip(arrays.items(), halves, odd):
            if wrong.any():
                row = block * size + wrong.nonzero()[0].item()
                raise Stop(f"{clips[row]['path']}: its {name[:-4]} overflow float16; check the "
                           f"file and the checkpoint")
            file.seek(offset + block * size * stride)
            if file.write(half.numpy()) < half.nbytes:
                raise OSError(errno.ENOSPC, "", file.name)
        pending.append(json.dumps([block, reasons]) + "\n")
        if time.time() - synced > RECORD_SECONDS or block == todo[-1]:
            for file, _, _ in arrays.values():
                os.fsync(file.fileno())
            record.writelines(pending)
            record.flush()
            pending, synced = [], time.time()
            if rank == 0:
                record_done(folder, meta, len(clips))

    with open(os.path.join(folder, f"progress.{rank}"), "a", encoding="utf-8") as record, \
            concurrent.futures.ThreadPoolExecutor(1) as writer:
        record.write("\n")  # ends a line that was cut short
        job = None  # the block before is written while this one is encoded
        for block, (waves, reasons, lengths) in zip(todo, loader):
            bad |= reasons
            filled += [n / waves.shape[1] for n in lengths]
            refuse_bad(bad, clips, most_bad)
            halves = [x.half() for x in encoder(waves) if x is not None]
            # from CUDA these go into pinned memory and are under way until `ready`
            odd = [(~x.isfinite().flatten(1).all(1)).to("cpu", non_blocking=True) for x in halves]
            halves = [x.to("cpu", non_blocking=True) for x in halves]
            ready = torch.cuda.current_stream().record_event() if encoder.device == "cuda" else None
            if job:
                job.result()
            job = writer.submit(save, block, halves, odd, ready, reasons)
            count += len(waves)
            bar.show(count)
        if job:
            job.result()
    bar.close()
    short = sum(share < 0.99 for share in filled)
    if short and rank == 0:
        print(f"{short:,} of {len(filled):,} clips read are shorter than {meta['seconds']:g} s: "
              f"{1 - sum(filled) / len(filled):.0%} of what was encoded is silence behind them; "
              f"heads can see where it begins, so choose the seconds in datasets.txt to fit")


def refuse_bad(bad, clips, most_bad):
    if len(bad) > most_bad:
        row, reason = next(iter(bad.items()))
        raise Stop(f"{len(bad)} of {len(clips)} clips are unreadable, more than {MAX_BAD:.0%} with "
                   f"the missing ones (the first is {clips[row]['path']}: {reason}); mend them, or "
                   f"--allow-bad goes on")


def record_done(folder, meta, clips):
    """meta.json's `done`: all rows before it are final and on disk."""
    finished, first = read_progress(folder), 0
    while finished.get(first) == {}:  # one with unreadable clips may be tried again
        first += 1
    write_json(os.path.join(folder, "meta.json"),
               meta | {"done": min(first * meta["block"], clips)})


def finish_dump(folder, clips, classes, meta, most_bad):
    """Take unreadable clips out of the arrays and mark the dump complete; returns
    {unreadable row: reason}. Killed at any moment, it can be done again."""
    size, file = meta["block"], os.path.join(folder, "meta.json")
    if "removing" in meta:
        bad = {int(row): reason for row, reason in meta.pop("removing").items()}
    else:
        done = read_progress(folder)
        left = -(-len(clips) // size) - len(done)
        if left:
            raise Stop(f"{folder}: {left} blocks of {size} clips are not done; run the same "
                       f"command again")
        bad = {row: reason for reasons in done.values() for row, reason in reasons.items()}
        refuse_bad(bad, clips, most_bad)  # each rank has seen its own alone
        # from here on rows may have other places: fill_dump must not write again
        write_json(file, meta | {"removing": bad})
    good = [row for row in range(len(clips)) if row not in bad]
    for name in ("tokens.npy", "cls.npy"):
        path = os.path.join(folder, name)
        if os.path.exists(path) and len(np.load(path, mmap_mode="r")) > len(good):
            old = np.load(path, mmap_mode="r")
            room(folder, len(good) * old[0].nbytes, f"{path} without its unreadable clips")
            new = np.lib.format.open_memmap(path + ".tmp", "w+", np.float16,
                                            (len(good), *old.shape[1:]))
            for i in range(0, len(good), size):
                new[i:i + size] = old[good[i:i + size]]
            new.flush()
            os.replace(path + ".tmp", path)
    if bad:
        write_clips(folder, [clips[row] for row in good], classes)
    for progress in glob.glob(os.path.join(glob.escape(folder), "progress.*")):
        os.remove(progress)
    write_json(file, meta | {
        "done": len(good), "complete": True,
        "unreadable": [[clips[row]["path"], clips[row]["start"], bad[row]] for row in sorted(bad)]})
    return bad


def alone(file, otherwise=None):
    """An open file with a lock that ends when it is closed or the process ends. Where another
    process has it: wait, or raise Stop(otherwise)."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    f = open(file, "w")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
    except (BlockingIOError, PermissionError):
        raise Stop(otherwise)
    return f


def barrier(world):
    """Wait for the other ranks of a torchrun; nothing to do alone. Raises Stop if one is gone."""
    if world > 1:
        try:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            torch.distributed.barrier()
        except RuntimeError as e:
            raise Stop(f"another rank stopped ({str(e)[:80]}); run the same command again")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    parser.add_argument("--model", default="logmel", help=f"{' '.join(MODELS)} (default logmel)")
    parser.add_argument("--data", default="demo", help="a name in datasets.txt (default demo)")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="weights you have (default: the official ones, downloaded once)")
    parser.add_argument("--shots-seed", type=int, default=1, metavar="N",
                        help="which few-shot subset, for lines with shots= (default 1)")
    # how
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one")
    parser.add_argument("--precision", choices=("fp32", "fp16"),
                        help="of the encoder's matmuls (default: fp16 on cuda, fp32 on cpu)")
    # what to do about trouble
    parser.add_argument("--allow-bad", action="store_true",
                        help=f"go on with more than {100 * MAX_BAD:g} %% of the clips missing "
                             "or unreadable")
    parser.add_argument("--overwrite", action="store_true", help="discard the dump that is there "
                        "(to go on after a stop, leave it out)")
    args = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.model not in MODELS:
        raise Stop(f"unknown model {args.model!r}; there are {' '.join(MODELS)}")
    sets = read_datasets("datasets.txt")
    if args.data not in sets:
        raise Stop(f"unknown dataset {args.data!r}; datasets.txt has {' '.join(sets)}")
    data, root = sets[args.data], os.path.join("data", args.data)
    if args.device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise Stop("torch finds no CUDA device here; leave --device out")
        if local >= gpus:
            raise Stop(f"there are {gpus} GPUs here; give torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
    elif args.precision == "fp16":
        raise Stop("fp16 is slower than fp32 on a CPU; leave --precision out")
    precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    if rank > 0:
        barrier(world)  # rank 0 fetches and lays out what there is to fetch and lay out
    if not os.path.isdir(root):
        if args.data != "demo" and not data["urls"]:
            raise Stop(f"{root} is not there; put the audio of {args.data} into it as the line in "
                       f"datasets.txt and the comments above it describe")
        with alone(os.path.join("data", f".{args.data}.lock")):
            if not os.path.isdir(root):  # nobody fetched it while we waited
                make_demo(root) if args.data == "demo" else fetch_dataset(root, data)
    clips, missing, classes, events = read_clips(root, data, args.shots_seed)
    events = read_events(root) or events
    absent = sum(map(len, missing.values()))
    most_bad = math.inf if args.allow_bad else MAX_BAD * (len(clips) + absent) - absent
    if most_bad < 0 or not clips:
        print_report(data, clips, missing, {}, classes)
        first = next(iter(missing.values()))[0]
        raise Stop(f"{root}: {absent} of {len(clips) + absent} clips are missing, the first is "
                   f"{first}; put them there, or --allow-bad goes on with the others")

    file, checkpoint = find_checkpoint(args.model, args.checkpoint)
    encoder = Encoder(args.model, file, data["seconds"], args.device, precision)
    (T, bands), folder = encoder.grid, os.path.join("tokens", args.data, args.model)
    meta = {"data": args.data, "model": args.model, "task": data["task"], "grid": [T, bands],
            "seconds": data["seconds"], "token_seconds": encoder.token_seconds,
            "sample_rate": RATE, "dim": encoder.dim, "precision": precision,
            "checkpoint": checkpoint, "dataset_lines": data["lines"],
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "torchaudio": torchaudio.__version__, "numpy": np.__version__,
                         "soundfile": soundfile.__version__},
            "clips": f"{len(clips)}, md5 "
                     + hashlib.md5(repr(clip_rows(clips)).encode()).hexdigest()[:12],
            "block": max(1, int(BLOCK[args.device] * min(1, 10 / data["seconds"]))),
            "done": 0, "complete": False}
    for rule in data["rules"]:
        if "prototypes" in rule:
            meta["prototypes"] = int(rule["prototypes"])
        if "names" in rule:
            table = os.path.join(root, rule["names"])
            try:
                meta["names"] = {row["mid"]: row["display_name"] for row in read_table(table)}
            except KeyError as e:
                raise Stop(f"{table}: no column {e}; the header of names= is mid,display_name")
        if "shots" in rule:
            meta["shots_seed"] = args.shots_seed
    if rank == 0:
        held = alone(os.path.join("tokens", args.data, f".{args.model}.lock"),  # noqa: F841
                     f"{folder} is being made by another process; wait for it, or stop it")
        if args.overwrite and os.path.exists(folder):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, "meta.json"))  # first: no dump from here on
            shutil.rmtree(folder)
        size = len(clips) * (T * bands + encoder.cls) * encoder.dim * 2
        print(f"{args.model} on {args.data}: {len(clips):,} clips of {data['seconds']:g} s -> "
              f"{T} x {bands} tokens of {encoder.dim}, {size / 1e9:,.2f} GB in {folder} "
              f"({shutil.disk_usage('tokens').free / 1e9:,.0f} GB free)")
        print(f"{args.device}, {precision}, torch {torch.__version__}"
              + (f", weights {checkpoint['source']}" if checkpoint else ""))
        if not os.path.exists(folder):
            room("tokens", size, f"the dump {folder}")
        meta = open_dump(folder, meta, clips, classes, events, encoder)
        if not meta["complete"]:
            forget_bad_blocks(folder)
        barrier(world)
    else:  # what this rank sees (clips, weights, precision) is what rank 0 saw, or it stops
        meta = open_dump(folder, meta, clips, classes, events, encoder)
    if meta["complete"]:
        left_out = len(meta.get("unreadable", []))
        print(f"{folder} is complete, nothing to do"
              + f" ({left_out} unreadable clips are left out; --overwrite tries them again)"
              * (left_out > 0))
        return
    if "removing" not in meta:
        fill_dump(folder, encoder, clips, meta, rank, world, most_bad)
    barrier(world)
    if rank == 0:
        bad = finish_dump(folder, clips, classes, meta, most_bad)
        print_report(data, clips, missing, bad, classes)
        for row in sorted(bad):
            print(f"unreadable: {clips[row]['path']}: {bad[row]}")
        print(f"complete: {folder}")


if __name__ == "__main__":
    again = "run the same command again"
    try:
        main()
        sys.exit()
    except Stop as e:
        message = str(e)
    except torch.OutOfMemoryError as e:
        message = f"{str(e).split('. ')[0]}; end what else runs on the GPU and {again}"
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        message = (f"a process that reads audio was killed (is the memory full?); {again}, "
                   f"nothing finished is lost")
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "no space left; make room" if full else f"{e.strerror or e}; mend that"
        message = f"{e.filename or 'the dump'}: {mend} and {again}, nothing finished is lost"
    except KeyboardInterrupt:
        sys.exit(print("\nextract.py: stopped; the same command goes on", file=sys.stderr) or 130)
    print(f"extract.py: {message}", file=sys.stderr)
    sys.exit(2)
