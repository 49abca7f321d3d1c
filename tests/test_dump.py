"""extract.py from audio to dump: what is read, what is written, and that kills, unreadable files,
several ranks and a full disk change nothing in it."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import demo
import numpy as np
import official
import pytest
import soundfile
import torch
from conftest import ROOT, refused, script

import extract

DUMP, EXTRACT = pathlib.Path("tokens/mine/logmel"), ROOT / "extract.py"
AUDIO = pathlib.Path("data/mine/audio")


def write_clips(clips):
    """data/mine/ with clips of 3 s of noise, of which 1 s is used; a block has 8 clips."""
    AUDIO.mkdir(parents=True)
    rng, table, labels = np.random.default_rng(0), "path,split,labels\n", ("a", "b;c", "", "b", "c")
    for i in range(clips):
        soundfile.write(AUDIO / f"{i}.wav", 0.1 * rng.standard_normal(48000), 16000)
        table += f"audio/{i}.wav,{'train' if i % 4 else 'test'},{labels[i % 5]}\n"
    pathlib.Path("data/mine/manifest.csv").write_text(table)
    pathlib.Path("datasets.txt").write_text("mine multi 1 3\nabsent multi 1 3\ndemo multi 1 3\n")


def extract_mine(*args, rank=0, world=1):
    env = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return script("extract.py", "--data", "mine", *args, env=env)


def content():
    return {file.name: file.read_bytes() for file in DUMP.iterdir()}


def state():
    return np.load(DUMP / "state.npy")


@pytest.fixture
def whole():
    """The content of a dump that was never stopped: 100 clips, one unreadable. It is removed."""
    write_clips(100)
    (AUDIO / "33.wav").write_bytes(b"no audio")
    assert extract_mine().returncode == 0
    want = content()
    os.rename("tokens", "whole")
    return want


@pytest.mark.parametrize("name, rate, channels", [
    ("a.wav", 44100, 1), ("b.flac", 48000, 2), ("c.wav", 22050, 6), ("d.wav", 16000, 2),
    ("e.wav", 8000, 1), ("f.ogg", 44100, 1), ("g.mp3", 32000, 1)])
def test_formats_rates_and_channels(name, rate, channels):
    """A tone of 1 kHz, louder from channel to channel: the mean over channels counts."""
    level = [1] if channels == 1 else np.linspace(0, 2, channels)
    tone, want = (0.4 * np.sin(2 * np.pi * 1000 * np.arange(2 * x) / x) for x in (rate, 16000))
    soundfile.write(name, np.outer(tone, level), rate)
    wave = extract.read_wave(name, 0, 2)
    assert wave.shape == (32000,) and wave.dtype == torch.float32
    assert abs(np.abs(np.fft.rfft(wave[8000:24000].numpy())).argmax() - 1000) <= 1
    assert name[0] in "fg" or np.abs(wave.numpy() - want)[100:-100].max() < 2e-3  # lossy


@pytest.mark.parametrize("start, seconds, first, last", [
    (0, 0.5, 0, 8000), (0.25, 0.5, 4000, 12000), (0.75, 0.5, 12000, 16000), (0, 2, 0, 16000)])
def test_start_crop_and_padding(start, seconds, first, last):
    ramp = np.float32(np.arange(1, 16001) / 20000)
    soundfile.write("r.wav", ramp, 16000, subtype="FLOAT")
    clip = extract.Clip("r.wav", start, "train", set())
    waves, failed = extract.read_block(".", [clip], seconds, False, range(1))
    assert waves.shape == (1, 16000 * seconds) and not failed
    assert np.array_equal(waves[0, :last - first], ramp[first:last])
    assert not waves[0, last - first:].any()


@pytest.mark.parametrize("wave, rate, keyword", [
    (np.zeros(0), 16000, "before the clip starts"), (np.ones(800), 16000, "before its start"),
    (np.full(9000, np.nan), 16000, "NaN"), (np.full(9000, np.inf), 16000, "not numbers"),
    (np.ones(50000), 22254, "22254"), (np.sin(np.arange(110250) ** 1.5), 22050, "")])
def test_unreadable_clips_become_silence(wave, rate, keyword):
    """22254 Hz would need a resampling kernel of gigabytes. The last file has a hole of zeros."""
    soundfile.write("x", wave, rate, format="WAV" if keyword else "OGG",
                    subtype="FLOAT" if keyword else "VORBIS")
    data, size = pathlib.Path("x").read_bytes(), os.path.getsize("x") // 4
    if not keyword:
        pathlib.Path("x").write_bytes(data[:2 * size] + bytes(size) + data[3 * size:])
    soundfile.write("good.wav", np.full(80000, 0.5), 16000)
    clips = [extract.Clip(path, 0.1, "train", set()) for path in ("good.wav", "x", "absent.wav")]
    waves, failed = extract.read_block(".", clips, 4, False, range(3))
    assert list(failed) == [1, 2] and keyword in failed[1] and failed[1].strip()
    assert waves[0].all() and not waves[1:].any()


@pytest.mark.parametrize("model, D, cls", [
    ("logmel", 256, "mean"), ("beats", 128, "mean"), ("eat", 128, "cls")])
def test_files(model, D, cls):
    """cls.npy is [cls], or the mean token where there is none; meta.json says which."""
    write_clips(20)
    weights = None if model == "logmel" else "w.pt"
    if weights:
        torch.save(official.state(model, depth=2, D=128), weights)
    done = extract_mine("--model", model, *["--checkpoint", weights] * bool(weights))
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    folder = DUMP.with_name(model)
    arrays = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    meta = json.loads((folder / "meta.json").read_text())
    names = {"classes.txt", "clips.csv", "meta.json", *(f"{name}.npy" for name in arrays)}
    assert set(os.listdir(folder)) == names
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "tokens": ("float16", (20, meta["grid"][0] * 8, D)), "cls": ("float16", (20, D)),
        "labels": ("uint8", (20, 3)), "state": ("uint8", (20,))}
    assert set(meta) == set("data model task grid seconds token_seconds sample_rate dim cls "
                            "precision checkpoint clips versions".split())
    assert (meta["cls"], meta["dim"], meta["seconds"], meta["grid"][1]) == (cls, D, 1, 8)
    assert (folder / "classes.txt").read_text() == "a\nb\nc\n" and (arrays["state"] == 1).all()
    rows = list(csv.DictReader(open(folder / "clips.csv")))
    assert list(rows[0]) == ["path", "start", "split", "labels"]
    for hot, row in zip(arrays["labels"], rows):
        assert ";".join(np.array(["a", "b", "c"])[hot > 0]) == row["labels"]
    waves = torch.stack([extract.read_wave(f"data/mine/{row['path']}", 0, 1) for row in rows])
    tokens, token = extract.Encoder(model, weights, 1)(waves)  # another batch size rounds otherwise
    np.testing.assert_allclose(arrays["tokens"], tokens, atol=3e-3)
    np.testing.assert_allclose(arrays["cls"], tokens.mean(1) if cls == "mean" else token, atol=3e-3)


def test_starts_keep_their_digits():
    clips = [extract.Clip("a.wav", start, "train", {"b", "a"}) for start in (0.123456789, 1.000001)]
    assert extract.clip_rows(clips) == [("a.wav", "0.123456789", "train", "a;b"),
                                        ("a.wav", "1.000001", "train", "a;b")]


def test_overflow_of_float16_is_refused():
    write_clips(10)
    weights = official.state("eat", depth=2, D=128)
    weights["model.blocks.1.norm2.weight"] *= 1e6
    torch.save(weights, "w.pt")
    refused(extract_mine("--model", "eat", "--checkpoint", "w.pt"), "rows", "float16", "clips.csv")
    assert not np.load("tokens/mine/eat/state.npy").any()


def test_unreadable_clips_are_named_kept_and_tried_again():
    write_clips(40)
    assert extract_mine().returncode == 0
    want, good = content(), (AUDIO / "9.wav").read_bytes()
    shutil.rmtree("tokens")
    (AUDIO / "9.wav").write_bytes(b"no audio")
    for _ in range(2):
        done = extract_mine("--allow-bad")
        assert done.returncode == 0 and "unreadable: audio/9.wav" in done.stderr, done.stderr
        assert state().tolist() == [1] * 9 + [2] + [1] * 30
        assert not np.load(DUMP / "tokens.npy")[9].any() and not np.load(DUMP / "cls.npy")[9].any()
        assert content()["clips.csv"] == want["clips.csv"]  # every row stays
    refused(extract_mine(), "unreadable", "--allow-bad")
    (AUDIO / "9.wav").write_bytes(good)
    assert extract_mine().returncode == 0 and content() == want


@pytest.mark.parametrize("missing, unreadable", [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)])
def test_one_percent_may_be_bad(missing, unreadable):
    write_clips(100)
    for i in range(50, 50 + missing + unreadable):
        os.remove(AUDIO / f"{i}.wav")
    for i in range(50, 50 + unreadable):
        (AUDIO / f"{i}.wav").touch()
    more = missing + unreadable > 1
    if more:
        refused(extract_mine(), "--allow-bad")
    done = extract_mine(*["--allow-bad"] * more)
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    assert len(np.load(DUMP / "tokens.npy")) == len(state()) == 100 - missing
    assert np.count_nonzero(state() == 2) == unreadable


# A process that dies in the middle of one of its writes.
KILLED = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import extract
write, moments = extract.write_rows, iter(range(int(sys.argv.pop(1))))
def killed(file, first, rows):
    if next(moments, None) is None:
        write(file, first, rows[:len(rows) // 2]), os.kill(os.getpid(), 9)
    write(file, first, rows)
extract.write_rows = killed
extract.main()"""


def run_ranks(world, *script):
    """Return codes of ranks that run at the same time."""
    command, jobs = [sys.executable, *map(str, script), "--data", "mine"], []
    for rank in reversed(range(world)):  # rank 0 creates the folder, the others wait for it
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)}
        jobs.append(subprocess.Popen(command, env=env))
    return [job.wait(timeout=3600) for job in jobs]


def test_killed_again_and_again(whole):
    found, want = [], np.load("whole/mine/logmel/tokens.npy")
    for kill_at in (0, 3, 6, 12):  # a block has 7 writes, the last one marks it
        assert run_ranks(1, "-c", KILLED, kill_at) == [-9]
        marked = state() > 0
        assert np.array_equal(np.load(DUMP / "tokens.npy")[marked], want[marked])
        found.append(np.count_nonzero(marked))
    assert found[0] == 0 < found[-1] < 100 and found == sorted(found)
    assert extract_mine().returncode == 0 and content() == whole


@pytest.mark.parametrize("killed, ranks, torchrun", [
    (0, 2, []), (2, 1, []), (2, 3, []),
    (0, 1, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])])
def test_ranks_write_the_same_bytes_as_one(killed, ranks, torchrun, whole):
    if killed:
        assert run_ranks(killed, "-c", KILLED, 10) == [-9] * killed
        assert 0 < np.count_nonzero(state()) < 100
    assert run_ranks(ranks, *torchrun, EXTRACT) == [0] * ranks and content() == whole


def test_ranks_agree_on_clips_and_count_bad_ones_together():
    """2 % unreadable, 1 % on each rank: neither stops by itself, but the dump does."""
    write_clips(100)
    for i in (1, 9):
        (AUDIO / f"{i}.wav").write_bytes(b"no audio")
    assert extract_mine(rank=0, world=2).returncode == 0
    os.rename(AUDIO / "3.wav", "3.wav")
    refused(extract_mine("--allow-bad", rank=1, world=2), "clips", "other settings")
    assert np.count_nonzero(state()) == 52  # rank 0 has 7 of 13 blocks, one of them of 4 clips
    os.rename("3.wav", AUDIO / "3.wav")
    refused(extract_mine(rank=1, world=2), "--allow-bad")


def test_other_settings_are_refused_by_name():
    write_clips(20)
    assert extract_mine().returncode == 0
    before, weights = content(), official.state("eat", depth=2, D=128)
    pathlib.Path("datasets.txt").write_text("mine multi 0.5 3\n")
    refused(extract_mine(), "seconds: 1.0, now 0.5", "--overwrite")
    pathlib.Path("datasets.txt").write_text("mine multi 1 3\n")
    refused(extract_mine("--precision", "fp16"), "precision", "--overwrite")
    os.remove(AUDIO / "7.wav")
    refused(extract_mine("--allow-bad"), "clips", "--overwrite")
    assert content() == before
    os.remove(DUMP / "meta.json")
    refused(extract_mine("--allow-bad"), "meta.json")
    assert extract_mine("--allow-bad", "--overwrite").returncode == 0 and len(state()) == 19
    for weights["model.extra_tokens"] in (torch.zeros(1, 1, 128), torch.ones(1, 1, 128)):
        torch.save(weights, "w.pt")
        done = extract_mine("--allow-bad", "--model", "eat", "--checkpoint", "w.pt")
    refused(done, "checkpoint", "sha256", "--overwrite")


@pytest.mark.parametrize("name, after, error, code, keyword", [
    ("builtins.open", 1, OSError(28, "No space left on device"), 2, "No space left"),
    ("builtins.open", 9, OSError(28, "No space left on device"), 2, "No space left"),
    ("torch.fft.rfft", 3, torch.OutOfMemoryError("no memory"), 2, "no memory"),
    ("torch.fft.rfft", 3, KeyboardInterrupt(), 130, "stopped")])
def test_full_disk_full_memory_and_ctrl_c(name, after, error, code, keyword, whole, monkeypatch):
    real, calls = open if "open" in name else torch.fft.rfft, iter(range(after))

    def failing(*args, **more):
        if ("r+b" in args or real != open) and next(calls, None) is None:
            raise error
        return real(*args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(name, failing)
        done = extract_mine()
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert keyword in done.stderr and "same command" in done.stderr.splitlines()[-1]
    assert extract_mine().returncode == 0 and content() == whole


@pytest.mark.parametrize("args, keyword", [
    (["--model", "eet"], "eat"), (["--data", "mien"], "mine"), (["--device", "cuda"], "CUDA"),
    (["--model", "asit"], "--checkpoint"), (["--model", "eat", "--checkpoint", "no.pt"], "no.pt"),
    (["--data", "absent"], "data/absent"), (["--data", "demo"], "tests/demo.py"),
    (["--overwrite"], "one process"), ([], "datasets.txt")])
def test_mistakes_are_told_in_one_sentence(args, keyword):
    write_clips(4)
    if not args:
        os.remove("datasets.txt")
    refused(extract_mine(*args, world=2 if "--overwrite" in args else 1), keyword)
    assert not os.path.exists("tokens")


def test_demo_is_deterministic_and_polyphonic():
    a, b = pathlib.Path("a"), pathlib.Path("b")
    for root in (a, b):
        demo.make(str(root), {"train": 12, "test": 6})
    files = [file.relative_to(a) for file in a.rglob("*.*")]
    assert len(files) == 18 + 2
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    info = soundfile.info("a/audio/train0000.wav")
    assert (info.samplerate, info.frames, info.subtype) == (16000, 80000, "PCM_16")
    events, clips = (list(csv.DictReader(open(f"a/{name}.csv"))) for name in ("events", "manifest"))
    assert all(0 <= float(row["onset"]) < float(row["offset"]) <= 5 for row in events)
    labels = {(row["path"], label) for row in clips for label in row["labels"].split(";")}
    assert labels == {(row["path"], row["label"]) for row in events} and len(labels) > 2 * 18
    assert {label for _, label in labels} == set(demo.CLASSES)


def test_scripts_run_where_posix_only_things_are_absent(monkeypatch):
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("posix_fallocate", "sched_getaffinity", "preadv", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    write_clips(24)
    for name, *args in (["extract.py", "--data", "mine"],
                        ["probe.py", "--pool", "protobin,linear", "--seeds", "1"], ["evaluate.py"]):
        done = script(name, *args)
        assert done.returncode == 0, (name, done.stderr)
    assert "protobin" in done.stdout
