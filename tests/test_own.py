"""Own recordings: a folder as dataset, what the dump says of its input, a trained head's scores."""

import csv
import json
import os
import pathlib
import re
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import damage, planted, refused, script, write_dump, write_table

import probe

RATE = 16000
STEP, SECONDS, T, F = 0.16, 1.0, 7, 2  # 7 steps are 1.12 s: the last one is cut at the clip's end
FIELD = pathlib.Path("tokens/field/m")

def sound(seed, seconds=1.0, rate=RATE):
    """Noise whose level changes every 50 ms."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-2, -0.5, round(20 * seconds)), rate // 20)
    return level * rng.uniform(-1, 1, len(level))

def extracted(data="mine"):
    done = script("extract.py", "--data", data)
    assert done.returncode == 0, done.stderr
    return done.stdout

def found(report):
    """The first word of each line of a report that asks to be looked at."""
    return re.findall(r"^ *\S+ (\w+).*look at this", report, re.M)

@pytest.fixture
def folder():
    """data/mine, empty: clips of 1 s, no labels."""
    pathlib.Path("datasets.txt").write_text("mine multi 1 0\ncut multi 1 0\n")
    pathlib.Path("data/mine/site b").mkdir(parents=True)
    return pathlib.Path("data/mine")

# ---- a folder of recordings
def test_windows_cover_every_recording(folder):
    whole = sound(0, 3.25)
    soundfile.write(folder / "long.WAV", whole, RATE, "FLOAT")
    soundfile.write(folder / "site b/short.flac", sound(1, 0.4), RATE)
    soundfile.write(folder / "exact.ogg", sound(2, 2, 24000), 24000)
    for name in ("broken.wav", "._hidden.wav", "notes.txt"):
        (folder / name).write_bytes(b"RIFF")
    extracted()
    with open("tokens/mine/logmel/clips.csv", newline="") as f:
        assert [(row["path"], float(row["start"])) for row in csv.DictReader(f)] == [
            ("broken.wav", 0), ("exact.ogg", 0), ("exact.ogg", 1), ("long.WAV", 0),
            ("long.WAV", 1), ("long.WAV", 2), ("long.WAV", 3), ("site b/short.flac", 0)]
    assert np.load("tokens/mine/logmel/state.npy").tolist() == [2] + [1] * 7
    pathlib.Path("data/cut").mkdir()
    for i, part in enumerate(np.pad(whole, (0, 12000)).reshape(4, RATE)):
        soundfile.write(f"data/cut/{i}.wav", part, RATE, "FLOAT")
    extracted("cut")
    windows, parts = (np.load(f"tokens/{data}/logmel/tokens.npy") for data in ("mine", "cut"))
    assert np.array_equal(windows[3:7], parts)

def test_folders_that_are_refused(folder):
    refused(script("extract.py", "--data", "mine"), "data/mine", "0 clips", ".mp3")
    (folder / "a.wav").write_bytes(b"RIFF")
    refused(script("extract.py", "--data", "mine"), "tokens/mine/logmel", "no clip")
    soundfile.write(folder / "a.wav", sound(0), RATE)
    extracted()
    with mock.patch.object(soundfile, "info", return_value=mock.Mock(duration=2.0 ** 63 / RATE)):
        refused(script("extract.py", "--data", "mine"), "a.wav", "how long")
    refused(script("probe.py", "--data", "mine"), "--apply")
    pathlib.Path("datasets.txt").write_text("mine multi 1 3\n")
    refused(script("extract.py", "--data", "mine"), "data/mine", "says 3")
    (folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"RIFF")
    refused(script("extract.py", "--data", "mine"), "caf", "utf-8")

# ---- what the dump says of its input
def resampled_from_8_khz(x):
    spectrum = np.fft.rfft(x)
    return np.fft.irfft(np.where(np.arange(len(spectrum)) < 4000, spectrum, 0))

@pytest.mark.parametrize("rows, change, words", [
    ([], None, []),
    (range(40), lambda x: x / 1000, ["clips", "zeros"]),
    (range(40), lambda x: np.clip(30 * x, -1, 1), ["clipped"]),
    (range(40), lambda x: 0 * x + 0.3, ["clips", "constant", "tokens"]),
    (range(40), resampled_from_8_khz, ["dull"]),
    (range(40), lambda x: x * (np.arange(RATE) < 11000), ["zeros"]),
    (range(40), lambda x: x[:11000], ["padded"]),
    ([3, 4], lambda x: 0 * x, ["silent", "zeros", "tokens"]),
    ([7, 9], lambda x: 0 * x + 0.1, ["constant", "tokens"]),
    ([1, 2], lambda x: sound(0), ["tokens", "audio"]),            # three times in train
    ([39], lambda x: sound(0), ["tokens", "audio", "audio"])])    # in train and test
def test_faults_of_the_input_are_named(rows, change, words, folder):
    for i in range(40):
        soundfile.write(folder / f"{i}.wav", change(sound(i)) if i in rows else sound(i), RATE)
    table = [(f"{i}.wav", "train" if i < 30 else "test", "") for i in range(40)]
    write_table(folder / "manifest.csv", "path,split,labels", table)
    report = extracted()
    assert found(report) == words
    meta = json.loads(pathlib.Path("tokens/mine/logmel/meta.json").read_text())
    assert sum(n > 0 for n in list(meta["examined"].values())[1:]) == len(words) - (
        "clips" in words)
    assert ("0.wav (0 s, train), 39.wav (0 s, test)" in report) == (list(rows) == [39])

def test_recordings_and_padded_clips_are_named(folder):
    soundfile.write(folder / "a.wav", sound(0, 2.05), RATE)
    write_table(folder / "manifest.csv", "path,start,split,labels",
                [("a.wav", 0, "train", ""), ("a.wav", 1, "test ", ""), ("a.wav", 2, "test", "")])
    report = extracted()
    assert found(report) == ["recording"] and "a.wav (1 s, test)" in report
    assert re.search("^ *1 padded", report, re.M)

def test_long_recordings_of_a_low_rate_are_usual(folder):
    soundfile.write(folder / "a.wav", np.sin(np.arange(40000) / 3) / 2, 8000)
    report = extracted()
    assert found(report) == [] and re.search("^ *5 dull", report, re.M)

@pytest.mark.parametrize("rate, low, words", [
    (8000, 12, []), (8000, 3, ["dull"]), (16000, 0, [])])
def test_short_files_and_low_rates_are_usual(rate, low, words, folder):
    """12 short files of all lengths, as in Free Spoken Digit Dataset; `low` of them at 8 kHz."""
    for i in range(12):
        at = rate if i < low else RATE
        rng, n = np.random.default_rng(i), round((0.3 + i / 20) * at)
        faded = np.convolve(rng.uniform(-1, 1, n), np.hanning(7) / 4, "same") * np.hanning(n)
        soundfile.write(folder / f"{i:02}.wav", faded, at)
    report = extracted()
    assert found(report) == words
    assert re.search(f"^ *{low * (rate < RATE)} dull", report, re.M)
    assert re.search("^ *9 padded", report, re.M)
    if words:  # a file is damaged after the extraction
        (folder / "00.wav").write_bytes(b"RIFF")
        refused(script("extract.py", "--data", "mine"), "00.wav")

def test_examination_survives_a_stop(folder):
    for i in range(20):
        soundfile.write(folder / f"{i:02}.wav", sound(i % 19), RATE)
    whole = extracted()
    assert found(whole) == ["tokens", "audio"]
    file = "tokens/mine/logmel/state.npy"
    np.save(file, np.uint8(np.arange(20) < 8))
    assert extracted() == whole and np.load(file).all()

# ---- a trained head on other recordings
def trained(pool="protobin", task="multi", folds=False, cls=None):
    """Train on data `d`; `field` has the same tokens, unlabeled, as 30 recordings of three clips.
    Clip i of d is clip i // 30 of recording i % 30."""
    tokens, labels = planted(90, N=T * F)
    labels = np.eye(4)[np.argmax(labels, 1)] if task == "single" else labels
    meta = {"grid": [T, F], "model": "m", "token_seconds": STEP, "seconds": SECONDS}
    splits = ["a", "b", "c"] * 30 if folds else ["train"] * 60 + ["test"] * 30
    write_dump("tokens/d/m", tokens, labels, splits, cls, task=task, **meta)
    with mock.patch.object(probe, "EPOCHS", 2):
        done = script("probe.py", "--data", "d", "--pool", pool, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    write_dump(FIELD, tokens, np.zeros((90, 0)), ["test"] * 90, cls, **meta)
    table = [(f"s/{i % 30}.wav", i // 30, "test", "") for i in range(90)]
    write_table(FIELD / "clips.csv", "path,start,split,labels", table)
    return f"runs/d/m/{pool}/seed0/head.pt"

def applied(file, *args):
    """(90, 4) scores in the order of data `d`, and {recording: [(onset, offset, label)]}."""
    done = script("probe.py", "--data", "field", "--apply", file, *args)
    assert done.returncode == 0, done.stderr
    out = pathlib.Path("applied/field/m", file.split("/")[3])
    with open(out / "scores.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["path", "start", "end", "c0", "c1", "c2", "c3"] and len(rows) == 90
    assert all(float(end) == float(start) + SECONDS for _, start, end, *_ in rows)
    rows = {(path, float(start)): scores for path, start, _, *scores in rows}
    tracks = {}
    for i in range(30):
        lines = [line.split("\t") for line in (out / f"audacity/s/{i}.wav.txt").open()]
        tracks[i] = [(onset, offset, label.split()[0]) for onset, offset, label in lines]
        header, *raven = [line.split("\t") for line in (out / f"raven/s/{i}.wav.txt").open()]
        assert header[3:5] == ["Begin Time (s)", "End Time (s)"]
        assert [(*row[3:5], row[7]) for row in raven] == tracks[i]
    return np.array([rows[f"s/{i % 30}.wav", i // 30] for i in range(90)], float), tracks

def events(active, edges):
    """Runs of active (steps, C) with steps from edges[k] to edges[k + 1]."""
    runs = [(j, run) for j in range(4) for run in np.flatnonzero(
        np.diff(np.pad(active[:, j].astype(int), 1))).reshape(-1, 2)]
    return {(f"{edges[a]:.3f}", f"{edges[b]:.3f}", f"c{j}") for j, (a, b) in runs}

@pytest.mark.parametrize("pool, task", [("protobin", "multi"), ("mhca", "single"),
                                        ("linear", "multi")])
def test_scores_are_those_of_the_run(pool, task):
    file = trained(pool, task, cls=planted(90)[0][:, 0])
    rows, logits = (np.load(pathlib.Path(file).with_name(f"{name}.npy"))
                    for name in ("rows", "logits"))
    logits = torch.from_numpy(logits)
    want = logits.sigmoid() if task == "multi" else logits.softmax(1)
    assert np.allclose(applied(file)[0][rows], want, atol=1e-5)
    refused(script("probe.py", "--data", "field", "--apply", file), "field/m", "--overwrite")
    assert np.allclose(applied(file, "--overwrite")[0][rows], want, atol=1e-5)

def test_folds_are_averaged():
    file, tokens = trained(folds=True), torch.from_numpy(np.load(FIELD / "tokens.npy")).float()
    with torch.no_grad():
        logits = [probe.load_head(file, fold)(tokens) for fold in "abc"]
    assert np.allclose(applied(file)[0], torch.stack(logits).mean(0).sigmoid(), atol=1e-5)

def test_events_are_runs_of_steps_across_clips():
    file, meta = trained(), json.loads((FIELD / "meta.json").read_text())
    tokens = torch.from_numpy(np.load(FIELD / "tokens.npy")).float()
    with torch.no_grad():
        steps = probe.frames(probe.load_head(file), meta, tokens).sigmoid().numpy()  # (90, T, 4)
    edges, (_, tracks) = np.arange(T) * STEP, applied(file, "--threshold", 0.55)
    edges = np.concatenate([edges, edges + 1, edges + 2, [3]])
    for i, track in tracks.items():
        assert set(track) == events(np.concatenate(steps[i::30]) > 0.55, edges)
        assert len(track) == len(set(track)) and track == sorted(track, key=lambda e: float(e[0]))
    assert sum(float(onset) % 1 + float(offset) - float(onset) > 1.001
               for track in tracks.values() for onset, offset, _ in track) > 3, "none is across"

def test_tracks_of_overlapping_clips():
    steps = [("a", 0, 1, 0.6), ("a", 4, 5, 0.7), ("a", 2.5, 3.5, 0.9), ("b", 3, 4, 0.5),
             ("a", 3, 3.25, 0.8), ("b", 3.5, 4, 0.9)]
    probe.write_tracks("out", "../x.wav", steps)
    assert pathlib.Path("out/audacity/_/x.wav.txt").read_text() == (
        "0.000\t1.000\ta 0.60\n2.500\t3.500\ta 0.90\n3.000\t4.000\tb 0.90\n4.000\t5.000\ta 0.70\n")

def test_head_that_reads_cls_has_events_of_whole_clips():
    scores, tracks = applied(trained("linear", cls=planted(90)[0][:, 0]))
    assert all(set(tracks[i]) == events(scores[i::30] > 0.5, range(4)) for i in range(30))

@pytest.mark.parametrize("file, content", [
    ("meta.json", {"model": "other"}), ("meta.json", {"checkpoint": {"sha256": "other"}}),
    ("meta.json", {"grid": [2, 7]}), ("meta.json", {"seconds": None}),
    ("meta.json", {"token_seconds": 0}), ("cls.npy", np.zeros((90, 32), np.float16)),
    ("tokens.npy", np.zeros((90, T * F, 16), np.float16)),
    ("head.pt", None), ("head.pt", b""), ("run.json", None), ("run.json", b"{}"),
    ("run.json", {"classes": None}), ("run.json", {"classes": ["a"]})])
def test_what_cannot_be_applied(file, content):
    head = trained()
    run = pathlib.Path(head).parent
    damage((run if file in ("head.pt", "run.json") else FIELD) / file, content)
    words = ["seconds"] if "seconds" in str(content) else ["cannot be applied"]
    refused(script("probe.py", "--data", "field", "--apply", head), *words)
    assert not pathlib.Path("applied").exists()
