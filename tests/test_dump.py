"""extract.py from audio to dump: what is read and written, and what must not change it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import demo
import numpy as np
import official
import pytest
import soundfile
import torch
from conftest import ROOT, refused, script, write_table
import extract

DUMP, AUDIO = pathlib.Path("tokens/mine/logmel"), pathlib.Path("data/mine/audio")
STATE = DUMP / "state.npy"

def write_clips(clips, bad=()):
    """data/mine/ with clips of 3 s of noise, of which 1 s is used; a block has 8 clips."""
    AUDIO.mkdir(parents=True)
    for i, wave in enumerate(0.1 * np.random.default_rng(0).standard_normal((clips, 48000))):
        soundfile.write(AUDIO / f"{i}.wav", wave, 16000)
    for i in bad:
        (AUDIO / f"{i}.wav").write_bytes(b"no audio")
    write_table("data/mine/manifest.csv", "path,split,start,labels", [
        (f"audio/{i}.wav", "train" if i % 4 else "test", 0.123456789, ("a", "b;c", "")[i % 3])
        for i in range(clips)])
    pathlib.Path("datasets.txt").write_text("mine multi 1 3\nabsent multi 1 3\ndemo multi 1 3\n")

def extract_mine(*args, rank="0", world="1"):
    return script("extract.py", "--data", "mine", *args, env={"RANK": rank, "WORLD_SIZE": world})

def content():
    return {file.name: file.read_bytes() for file in DUMP.iterdir()}

@pytest.fixture
def whole():
    """The content of a dump that was never stopped: 100 clips, one unreadable. It is removed."""
    write_clips(100, bad=[33])
    assert extract_mine().returncode == 0
    want = content()
    os.rename("tokens", "whole")
    return want

@pytest.mark.parametrize("name, rate, channels", [
    ("a.wav", 44100, 1), ("b.flac", 48000, 2), ("c.wav", 22050, 6), ("d.wav", 16000, 2),
    ("e.wav", 8000, 1), ("f.ogg", 44100, 1), ("g.mp3", 32000, 1)])
def test_formats_rates_and_channels(name, rate, channels):
    level = [1] if channels == 1 else np.linspace(0, 2, channels)  # their mean is 1
    tone, want = (0.4 * np.sin(2 * np.pi * 1000 * np.arange(2 * x) / x) for x in (rate, 16000))
    soundfile.write(name, np.outer(tone, level), rate)
    wave = extract.read_wave(name, 0, 2).numpy()
    assert np.abs(wave - want)[100:-100].max() < (0.05 if name[-1] in "g3" else 2e-3)  # 0.05: lossy

def test_start_crop_and_padding():
    ramp = np.float32(np.arange(1, 16001) / 20000)
    soundfile.write("r.wav", ramp, 16000, subtype="FLOAT")
    clips = [extract.Clip("r.wav", start, "train", set()) for start in (0, 0.25, 0.75)]
    waves, _ = extract.read_block(".", clips, 0.5, False, range(3))
    assert np.array_equal(waves, [np.pad(ramp, (0, 4000))[i:i + 8000] for i in (0, 4000, 12000)])

@pytest.mark.parametrize("wave, rate, keyword", [
    (np.zeros(0), 16000, "before the clip"), (np.ones(800), 16000, "before the clip"),
    (np.full(9000, np.nan), 16000, "NaN"), (np.full(9000, np.inf), 16000, "NaN"),
    (np.ones(50000), 22254, "22254"), (np.sin(np.arange(110250) ** 1.5), 22050, "")])
def test_unreadable_clips_become_silence(wave, rate, keyword):
    """22254 Hz would need a resampling kernel of gigabytes. The last file has a hole of zeros."""
    kind, subtype = ("WAV", "FLOAT") if keyword else ("OGG", "VORBIS")
    soundfile.write("x", wave, rate, format=kind, subtype=subtype)
    if not keyword:
        with open("x", "r+b") as f:
            f.seek(os.path.getsize("x") // 2)
            f.write(bytes(os.path.getsize("x") // 4))
    soundfile.write("good.wav", np.full(80000, 0.5), 16000)
    clips = [extract.Clip(path, 0.1, "train", set()) for path in ("good.wav", "x", "absent.wav")]
    waves, failed = extract.read_block(".", clips, 4, False, range(3))
    assert list(failed) == [1, 2] and keyword in failed[1] and failed[1].strip()
    assert waves[0].all() and not waves[1:].any()

@pytest.mark.parametrize("model, cls", [("beats", "mean"), ("eat", "cls")])
def test_files(model, cls):
    """cls.npy is [cls], or the mean token where there is none; meta.json says which."""
    write_clips(20)
    torch.save(official.state(model, depth=2, D=128), "w.pt")
    done, folder = extract_mine("--model", model, "--checkpoint", "w.pt"), DUMP.with_name(model)
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    found = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    meta = json.loads((folder / "meta.json").read_text())
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "tokens": ("float16", (20, meta["grid"][0] * 8, 128)), "cls": ("float16", (20, 128)),
        "labels": ("uint8", (20, 3)), "state": ("uint8", (20,)), "checks": ("float64", (20, 9))}
    assert set(meta) == set("data model task grid seconds token_seconds sample_rate dim cls "
                            "precision checkpoint clips versions examined".split())
    assert (meta["cls"], meta["dim"], meta["seconds"], meta["grid"][1]) == (cls, 128, 1, 8)
    assert (folder / "classes.txt").read_text() == "a\nb\nc\n" and (found["state"] == 1).all()
    clips, hot = (folder / "clips.csv").read_text().splitlines(), found["labels"].tolist()
    assert clips[:3:2] == ["path,start,split,labels", "audio/1.wav,0.123456789,train,b;c"]
    assert hot == [[i % 3 == 0, i % 3 == 1, i % 3 == 1] for i in range(20)]
    waves = torch.stack([extract.read_wave(AUDIO / f"{i}.wav", 0.123456789, 1) for i in range(20)])
    tokens, token = extract.Encoder(model, "w.pt", 1)(waves)  # another batch size rounds otherwise
    np.testing.assert_allclose(found["tokens"], tokens, atol=3e-3)
    np.testing.assert_allclose(found["cls"], tokens.mean(1) if cls == "mean" else token, atol=3e-3)

def test_other_weights_are_refused_and_so_is_overflow_of_float16():
    write_clips(4)
    weights, eat = official.state("eat", depth=2, D=128), ("--model", "eat", "--checkpoint")
    torch.save(weights, "w.pt")
    shutil.copy("w.pt", "copy.pt")
    assert [extract_mine(*eat, file).returncode for file in ("w.pt", "copy.pt")] == [0, 0]
    weights["model.blocks.1.norm2.weight"] *= 1e6
    torch.save(weights, "w.pt")
    refused(extract_mine(*eat, "w.pt"), "sha256", "--overwrite")
    refused(extract_mine(*eat, "w.pt", "--overwrite"), "rows", "float16", "clips.csv")
    assert not np.load("tokens/mine/eat/state.npy").any()

def test_unreadable_clips_are_named_kept_and_tried_again():
    write_clips(40)
    assert extract_mine().returncode == 0
    want, good = content(), {i: (AUDIO / f"{i}.wav").read_bytes() for i in (9, 10)}
    shutil.rmtree("tokens")
    for bad, other in ((9, 10), (9, 10), (10, 9)):  # both in one block
        (AUDIO / f"{bad}.wav").write_bytes(b"no audio")
        (AUDIO / f"{other}.wav").write_bytes(good[other])
        done = extract_mine("--allow-bad")
        assert done.returncode == 0 and f"unreadable: audio/{bad}.wav" in done.stderr, done.stderr
        assert np.load(STATE).tolist() == [2 if i == bad else 1 for i in range(40)]
        for name in ("tokens", "cls"):
            assert [i for i, x in enumerate(np.load(DUMP / f"{name}.npy")) if not x.any()] == [bad]
    refused(extract_mine(), "unreadable", "--allow-bad")
    (AUDIO / "10.wav").write_bytes(good[10])
    assert extract_mine().returncode == 0 and content() == want

@pytest.mark.parametrize("missing, unreadable", [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)])
def test_one_percent_may_be_bad(missing, unreadable):
    write_clips(100, bad=range(missing, missing + unreadable))
    for i in range(missing):
        os.remove(AUDIO / f"{i}.wav")
    done = extract_mine()
    if missing + unreadable > 1:
        refused(done, "--allow-bad")
        done = extract_mine("--allow-bad")
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    assert sorted(np.load(STATE)) == [1] * (100 - missing - unreadable) + [2] * unreadable

# A process that dies in the middle of one of its writes.
KILLED = """import os, sys, extract
write, moments = extract.write_rows, iter(range(int(sys.argv.pop(1))))
def killed(file, first, rows):
    if next(moments, None) is None:
        write(file, first, rows[:len(rows) // 2]), os.kill(os.getpid(), 9)
    write(file, first, rows)
extract.write_rows = killed
extract.main()"""

def run_ranks(world, *command):
    """Return codes of ranks that run at the same time."""
    command, jobs = [sys.executable, *map(str, command), "--data", "mine"], []
    for rank in reversed(range(world)):  # rank 0 creates the folder, the others wait for it
        env = {"PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(world)}
        jobs.append(subprocess.Popen(command, env=os.environ | env))
    return [job.wait(timeout=3600) for job in jobs]

@pytest.mark.parametrize("killed, ranks, torchrun", [
    (1, 1, []), (2, 1, []), (2, 3, []), (0, 2, []),
    (0, 1, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])])
def test_kills_and_ranks_change_no_byte(killed, ranks, torchrun, whole):
    want = np.load("whole/mine/logmel/tokens.npy")
    for kill_at in (0, 3, 6, 12) if killed else ():  # a block has 4 writes, the last one marks it
        assert run_ranks(killed, "-c", KILLED, kill_at) == [-9] * killed
        marked = np.load(STATE) > 0
        assert np.array_equal(np.load(DUMP / "tokens.npy")[marked], want[marked])
    assert not killed or 0 < np.count_nonzero(marked) < 100
    assert run_ranks(ranks, *torchrun, ROOT / "extract.py") == [0] * ranks
    assert content() == whole

def test_ranks_agree_on_clips_and_count_bad_ones_together():
    """2 % unreadable, 1 % on each rank: neither stops by itself, but the dump does."""
    write_clips(100, bad=[1, 9])
    assert extract_mine(rank="0", world="2").returncode == 0
    os.rename(AUDIO / "3.wav", "3.wav")
    refused(extract_mine("--allow-bad", rank="1", world="2"), "clips", "other settings")
    assert np.count_nonzero(np.load(STATE)) == 52  # rank 0 has 7 of 13 blocks, one of 4 clips
    os.rename("3.wav", AUDIO / "3.wav")
    refused(extract_mine(rank="1", world="2"), "--allow-bad")

def test_tokens_do_not_depend_on_the_order_of_the_table():
    write_clips(11)
    manifest, dumps = pathlib.Path("data/mine/manifest.csv"), []
    header, *rows = manifest.read_text().splitlines()
    for order in rows, rows[::2] + rows[1::2]:
        manifest.write_text("\n".join([header, *order]))
        assert extract_mine("--overwrite").returncode == 0
        paths = [line.split(",")[0] for line in (DUMP / "clips.csv").read_text().splitlines()[1:]]
        assert paths == [row.split(",")[0] for row in order]
        dumps.append(dict(zip(paths, map(bytes, np.load(DUMP / "tokens.npy")), strict=True)))
    assert dumps[0] == dumps[1] and len(set(dumps[0].values())) == 11

def test_other_settings_are_refused_by_name():
    write_clips(10)
    assert extract_mine().returncode == 0
    before = content()
    refused(extract_mine("--precision", "fp16"), "precision", "--overwrite")
    pathlib.Path("datasets.txt").write_text("mine multi 0.5 3\n")
    refused(extract_mine(), "seconds: 1.0, now 0.5", "--overwrite")
    assert content() == before
    for file in ("meta.json", "tokens.npy", "cls.npy", "checks.npy", "state.npy"):
        whole = (DUMP / file).read_bytes()
        (DUMP / file).write_bytes(whole[:90])
        refused(extract_mine(), file, "--overwrite")
        (DUMP / file).write_bytes(whole)
    assert extract_mine("--overwrite").returncode == 0 and content() != before

def test_events_are_checked_and_their_paths_normalized():
    write_clips(4)
    header, events = "path,onset,offset,label\n", pathlib.Path("data/mine/events.csv")
    events.write_text(header + "./audio/1.flac,0.5,1e0,b\nelse.wav,0,1,a\n")
    assert extract_mine().returncode == 0
    written = (DUMP / "events.csv").read_text()
    assert written == header + "audio/1.wav,0.5,1.0,b\n"  # of clips that exist
    events.write_text(header + "audio/1.wav,half,1,b\n")
    refused(extract_mine("--overwrite"), "half")
    assert (DUMP / "events.csv").read_text() == written

@pytest.mark.parametrize("module, name, after, error, code", [
    (np, "save", 1, OSError(28, "No space left on device"), 2),
    (np, "ascontiguousarray", 9, OSError(28, "No space left on device"), 2),
    (torch.fft, "rfft", 3, torch.OutOfMemoryError("no memory"), 2),
    (torch.fft, "rfft", 3, KeyboardInterrupt("stopped"), 130)])
def test_full_disk_full_memory_and_ctrl_c(module, name, after, error, code, whole):
    results = [mock.DEFAULT] * after + [error] * 1000  # of the function that writes, or computes
    with mock.patch.object(module, name, wraps=getattr(module, name), side_effect=results):
        done = extract_mine()
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert error.args[-1] in done.stderr and "same command" in done.stderr.splitlines()[-1]
    assert extract_mine().returncode == 0 and content() == whole

@pytest.mark.parametrize("args, keyword", [
    (["--model", "eet"], "eat"), (["--data", "mien"], "mine"), (["--device", "cuda"], "cuda"),
    (["--model", "asit"], "--checkpoint"), (["--model", "eat", "--checkpoint", "no.pt"], "no.pt"),
    (["--data", "absent"], "absent"), (["--data", "demo"], "demo.py"), (["--overwrite"], "one")])
def test_mistakes_are_told_in_one_sentence(args, keyword):
    write_clips(4)
    refused(extract_mine(*args, world="2"), keyword)
    assert not os.path.exists("tokens")

def test_demo_is_deterministic():
    for root in ("a", "b"):
        demo.make(root, {"train": 12, "test": 6})
    a, b = ([x.read_bytes() for x in sorted(pathlib.Path(root).rglob("*.*"))] for root in "ab")
    assert a == b and len(a) == 18 + 2

def test_scripts_run_where_posix_only_things_are_absent(monkeypatch):
    for name in ("posix_fallocate", "sched_getaffinity", "preadv", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    write_clips(24)
    done = [script(*args) for args in (
        ["extract.py", "--data", "mine"], ["probe.py", "--pool", "linear"], ["evaluate.py"])]
    assert [process.returncode for process in done] == [0, 0, 0], done
