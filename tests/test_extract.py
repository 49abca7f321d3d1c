"""extract.py: front-ends, encoders against recorded outputs of the official code, checkpoints in
every official layout, and a dump that survives kills and bad files."""

import argparse
import collections
import csv
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import official
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, refused, script, start

import extract

GOLDEN = json.load(open(ROOT / "tests" / "encoders_golden.json"))


# ---------------------------------------------------------------------------------------------
# front-ends

def waves():
    torch.manual_seed(0)
    loud, quiet = official.waveform(2), 1e-4 * torch.randn(32000)
    return torch.stack([loud, quiet, torch.zeros(32000), torch.cat([loud[:8000], torch.zeros(24000)])])


@pytest.mark.parametrize("window", ("hanning", "povey"))
def test_kaldi_fbank_equals_torchaudio(window):
    scale = 2 ** 15 if window == "povey" else 1
    ours = extract.kaldi_fbank(waves() * scale, povey=window == "povey")
    assert ours.shape == (4, 1 + (32000 - 400) // 160, 128)
    for wave, spec in zip(waves(), ours):
        theirs = torchaudio.compliance.kaldi.fbank(
            wave[None] * scale, num_mel_bins=128, sample_frequency=16000, window_type=window)
        assert (spec - theirs).abs().max() < 1e-3 and (spec - theirs).abs().mean() < 1e-5
    assert torch.all((ours[2] - -15.9424).abs() < 1e-4)  # digital silence


def test_decibel_mel_equals_torchaudio_per_clip():
    op = torch.nn.Sequential(
        torchaudio.transforms.MelSpectrogram(16000, 512, 512, 160, 0, 8000, n_mels=64, center=True),
        torchaudio.transforms.AmplitudeToDB("power", 120))
    ours = extract.decibel_mel(waves())
    assert ours.shape == (4, 201, 64)
    for wave, spec in zip(waves(), ours):
        torch.testing.assert_close(spec, op(wave[None])[0].T, rtol=0, atol=2e-3)
    # one at a time is the same as in a batch: the 120 dB floor does not look at neighbours
    torch.testing.assert_close(extract.decibel_mel(waves()[1:2])[0], ours[1], rtol=0, atol=1e-4)


def test_logmel_tokens_are_patches():
    wave = official.waveform(5)[None]
    encoder = extract.Encoder("logmel", None, 5)
    tokens, cls = encoder(wave)
    spec = (extract.kaldi_fbank(wave - wave.mean())[0] + 4.2677393) / (2 * 4.5689974)
    assert cls is None and encoder.grid == (31, 8) and tokens.shape == (1, 248, 256)
    patch = spec[16 * 7:16 * 8, 16 * 3:16 * 4]  # t = 7, f = 3
    torch.testing.assert_close(tokens[0, 7 * 8 + 3], patch.reshape(-1), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# encoders

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Path of a synthetic checkpoint in the layout of its official file; the last one is kept."""
    folder, kept = tmp_path_factory.mktemp("weights"), {}

    def make(family, **sizes):
        key = (family, *sizes.items())
        if key not in kept:
            for old in kept.values():
                old.unlink()
            kept.clear()
            file, state = folder / f"{family}.bin", official.state(family, **sizes)
            if family in ("eat", "dasheng"):
                official.save_safetensors(state, file)
            else:
                torch.save({"model": state, "cfg": {"encoder_layers": 12}}
                           if family == "beats" else state, file)
            kept[key] = file
        return kept[key]
    return make


CASES = {"beats_10s": ("beats", 10, (62, 8)), "beats_5s": ("beats", 5, (31, 8)),
         "eat_10s": ("eat", 10, (64, 8)), "eat_5s_T512": ("eat", 5, (32, 8)),
         "eat_5s_T1024": ("eat", 5, (64, 8)), "dasheng_10s": ("dasheng", 10, (250, 1)),
         "dasheng_5s": ("dasheng", 5, (125, 1)), "audiomae_10s": ("amae", 10, (64, 8)),
         "asit_1024": ("asit", 10, (64, 8)), "asit_592": ("asit", 5.935, (37, 8))}


@pytest.mark.parametrize("name", CASES)
def test_golden_outputs(name, checkpoint):
    """Recorded with the official implementations and the same synthetic weights."""
    model, seconds, grid = CASES[name]
    want = GOLDEN[name]
    file = checkpoint(model, **({"rows": 297} if name == "asit_592" else {}))
    if name == "asit_592":  # recorded on the first 592 frames of 10 s, its training length
        encoder = extract.Encoder("asit", file, 10)
        encoder.vit.pos = torch.nn.Parameter(official.state("asit", rows=297)["pos_embed"][0])
        encoder.frames, encoder.grid = 592, grid
    else:
        encoder = extract.Encoder(model, file, seconds)
        if name == "eat_5s_T1024":  # 5 s padded to 10: possible, not what we do
            encoder.frames, encoder.grid = 1024, grid
    wave = official.waveform(round(seconds) if name != "asit_592" else 10)[None]
    if name == "asit_592":
        wave = wave[:, :400 + 591 * 160]
    spec = encoder.spectrogram(wave)
    if name == "asit_592":
        full = extract.Encoder("asit", file, 10).spectrogram(official.waveform(10)[None])
        spec = full[:, :592]  # the clip mean is that of 10 s
    probe = [0, 1000, 30000 if spec.numel() <= 60000 else 50000]
    assert list(spec.shape) == want["spec_shape"][:1] + want["spec_shape"][2:]
    np.testing.assert_allclose(spec.flatten()[probe], want["spec_probe"], atol=1e-3)
    np.testing.assert_allclose([spec.mean(), spec.std()], [want["spec_mean"], want["spec_std"]],
                               atol=1e-3)
    assert encoder.grid == grid
    tokens, cls = encoder(wave)
    assert tokens.shape == (1, grid[0] * grid[1], 768)
    out = (tokens if cls is None else torch.cat([cls[:, None], tokens], 1))[0]
    L = len(out)
    assert list(out.shape) == want["out_shape"][1:]
    for row, key in ((0, "first"), (L // 2, "mid"), (L - 1, "last")):
        np.testing.assert_allclose(out[row, :4], want[key], atol=1e-3)
    np.testing.assert_allclose([out.mean(), out.std()], [want["out_mean"], want["out_std"]],
                               atol=1e-3)
    with torch.inference_mode():
        x = encoder.vit.embed(spec)
        np.testing.assert_allclose(x[0, L // 2, :4], want["embed_in_mid"], atol=1e-3)
        bias = encoder.vit.bias(L)
        np.testing.assert_allclose(encoder.vit.blocks[0](x, bias)[0, L // 2, :4],
                                   want["block0_mid"], atol=1e-3)


def test_golden_generator():
    """The test's own weights are those of the written rules."""
    assert np.allclose(official.noise("model.extra_tokens", (4,)),
                       [2.319456, 0.926356, -0.109964, -0.733708], atol=1e-5)
    x = official.waveform(10)
    assert np.allclose(x[[0, 1, 100, 16000, 159999]],
                       [0.035281, 0.079092, -0.186616, -0.039253, -0.083278], atol=1e-5)
    row = official.sincos(768, 8)[9, [0, 1, 191, 192, 384, 385, 576]]
    assert np.allclose(row, GOLDEN["eat_positions"]["row_9_cols_0_1_191_192_384_385_576"], atol=1e-5)


PARAMETERS = {"amae": 85648128, "asit": 85648128, "beats": 90311792, "dasheng": 85447808,
              "eat": 89972736}


@pytest.mark.parametrize("family", PARAMETERS)
def test_parameter_counts(family):
    """All of the official file's numbers arrive in our model; what differs is known by name."""
    shapes = official.shapes(family)
    count = sum(int(np.prod(s)) for k, s in shapes.items()
                if "running" not in k and not (k.endswith("relative_attention_bias.weight")
                                               and ".0." not in k))  # one table, in every layer
    assert count == PARAMETERS[family]
    state = {k: torch.empty(s) for k, s in shapes.items()}
    common = extract.to_common(state, family)
    vit = extract.load_vit({k: v for k, v in common.items() if not k.startswith("bn.")}, family,
                           True, "test")
    ours = sum(p.numel() for p in vit.parameters())
    extra = {"eat": 768,                            # a position row of zeros for [cls]
             "beats": -128,                         # weight norm's g is folded into v
             "dasheng": -2 * 64 + 252 * 768 - 253 * 768}.get(family, 0)  # BN apart, sum of two
    assert ours == PARAMETERS[family] + extra
    if family == "asit":
        assert sum(int(np.prod(s)) for s in official.shapes("asit", rows=297).values()) == 85482240


def small(family, **more):
    return official.state(family, depth=2, D=128, **more)


def tokens_of(model, state, file, seconds=2.0):
    if file.suffix == ".safetensors":
        official.save_safetensors(state, file)
    else:
        torch.save(state, file)
    return extract.Encoder(model, str(file), seconds)(official.waveform(2)[None])


def fairseq(state, prefix=""):
    """EAT's own training layout from the published one."""
    names = {"local_encoder.": "modality_encoders.IMAGE.local_encoder.",
             "extra_tokens": "modality_encoders.IMAGE.extra_tokens",
             "fixed_positional_encoder.": "modality_encoders.IMAGE.fixed_positional_encoder.",
             "pre_norm.": "modality_encoders.IMAGE.context_encoder.norm."}
    out = {}
    for key, value in state.items():
        key = key.removeprefix("model.")
        old = next((n for n in names if key.startswith(n)), "")
        out[prefix + names.get(old, "") + key[len(old):]] = value
    return out


def layouts():
    """(name, model, file content as the official script saves it, the plain one it must equal)."""
    args = argparse.Namespace(lr=1e-3, output=pathlib.PosixPath("/x"))
    amae, asit, beats, dasheng, eat = map(small, ("amae", "asit", "beats", "dasheng", "eat"))
    head = {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5),
            "fc_norm.weight": torch.ones(128), "fc_norm.bias": torch.ones(128)}
    decoder = {"mask_token": torch.ones(1, 1, 4), "decoder_embed.weight": torch.ones(4, 4),
               "decoder_blocks.0.norm1.weight": torch.ones(4)}
    raw = {k: v for k, v in amae.items() if not k.startswith("norm.")}
    yield "flat", "amae", collections.OrderedDict(amae), amae
    yield "official", "amae", {"model": amae | decoder, "optimizer": {"state": {}}, "epoch": 3,
                               "scaler": {}, "args": args}, amae
    yield "encoder.", "amae", {f"encoder.{k}": v for k, v in amae.items()}, amae
    yield "fine-tuned", "amae+", raw | head, raw
    teacher = {f"backbone.{k}": v for k, v in asit.items()}
    teacher |= {"head_cls.mlp.0.weight": torch.ones(2, 2), "head_recons.0.weight": torch.ones(2)}
    student = {f"module.{k}": v + 1 for k, v in teacher.items()}
    yield "teacher", "asit", {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 1,
                              "args": args, "loss_cls": {}, "fp16_scaler": {}}, asit
    yield "student only", "asit", {f"module.backbone.{k}": v for k, v in asit.items()}, asit
    cfg = {"encoder_layers": 2, "max_distance": 800}
    yield "official", "beats", {"cfg": cfg, "model": collections.OrderedDict(beats)}, beats
    yield "fine-tuned", "beats+", {"cfg": cfg, "label_dict": {0: "/m/09x0r"}, "model": beats | {
        "predictor.weight": torch.ones(5, 128), "predictor.bias": torch.ones(5)}}, beats
    buffers = {"front_end.0.spectrogram.window": torch.ones(512),
               "front_end.0.mel_scale.fb": torch.ones(257, 64)}
    yield "zenodo", "dasheng", {"model": dasheng | buffers, "config": {"embed_dim": 128}}, dasheng
    yield "hub", "dasheng", {f"encoder.{k}": v for k, v in dasheng.items()}, dasheng
    yield "fine-tuned", "dasheng", dasheng | {"outputlayer.0.weight": torch.ones(128)}, dasheng
    yield "init_bn.", "dasheng", {k.replace("init_bn.1.", "init_bn."): v
                                  for k, v in dasheng.items()}, dasheng
    yield "hub", "eat", eat, eat
    yield "hub fine-tuned", "eat+", eat | {f"model.{k}": v for k, v in head.items()}, eat
    extra = {"modality_encoders.IMAGE.decoder.blocks.0.0.weight": torch.ones(2),
             "recon_proj.weight": torch.ones(2), "shared_decoder.x": torch.ones(2)}
    yield "fairseq", "sslam", {
        "args": None, "cfg": {"task": {"_name": "mae"}}, "criterion": {}, "optimizer_history": [],
        "model": fairseq(eat) | extra | {"_ema": {"blocks.0.norm1.weight": torch.ones(128)}},
        "task_state": {}, "extra_state": {}, "last_optimizer_state": {}}, eat
    yield "fairseq fine-tuned", "sslam+", {"cfg": {}, "model": fairseq(eat, "model.") | {
        f"model.{k}": v for k, v in head.items()}}, eat


@pytest.mark.parametrize("kind", ("pickle", "safetensors"))
@pytest.mark.parametrize("name,model,content,plain", [pytest.param(*x, id=f"{x[1]} {x[0]}")
                                                      for x in layouts()])
def test_checkpoint_layouts(name, model, content, plain, kind, tmp_path):
    if kind == "safetensors":
        if not all(isinstance(v, torch.Tensor) for v in content.values()):
            pytest.skip("safetensors holds tensors only")
        file = tmp_path / "a.safetensors"
    else:
        file = tmp_path / "a.pt"
    tokens, cls = tokens_of(model, content, file)
    family, _, _, stats, _ = extract.MODELS[model]
    reference = tokens_of(model, plain, tmp_path / "b.pt")
    assert torch.equal(tokens, reference[0]) and torch.isfinite(tokens).all()
    assert (cls is None) == (family in ("beats", "dasheng"))
    assert cls is None or torch.equal(cls, reference[1])


def test_safetensors_types(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.randn(2).bfloat16(),
               "d": torch.tensor(7)}
    official.save_safetensors(tensors, tmp_path / "x.safetensors")
    read = extract.read_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_checkpoint_mistakes(tmp_path):
    eat, beats = small("eat"), small("beats")

    def stop(model, content, *words, cut=None):
        file = tmp_path / "c.pt"
        if content is not None:
            torch.save(content, file)
        if cut:
            file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(extract.Stop) as e:
            extract.Encoder(model, str(file), 2.0)
        for word in ("c.pt", *words):
            assert word in str(e.value), (word, str(e.value))
    stop("eat", beats, "not the checkpoint of this encoder", "--checkpoint")
    stop("beats", eat, "not the checkpoint of this encoder")
    stop("dasheng", eat, "not the checkpoint of this encoder")
    stop("eat", {k: v for k, v in eat.items() if "blocks.1.attn.proj" not in k},
         "2 missing (blocks.1.attn.proj.bias, blocks.1.attn.proj.weight)")
    stop("eat", eat | {"model.surprise": torch.ones(3)}, "1 unexpected (surprise)")
    stop("eat", eat | {"model.pre_norm.weight": torch.ones(3)}, "misshapen", "norm.weight (3,)")
    key = next(k for k in eat if k.endswith("pos_embed") or "positional" in k)
    stop("eat", eat | {key: torch.ones(())}, "another shape")
    stop("amae", {k: v for k, v in small("amae").items() if not k.startswith("norm.")}, "norm.bias")
    stop("amae+", small("amae"), "unexpected (norm.bias, norm.weight)")
    stop("eat", eat, "not a whole checkpoint", cut=5000)
    stop("eat", {"model": eat, "hook": Evil()}, "plain tensors")
    assert not os.path.exists("evil")
    stop("eat", [1, 2], "holds a list")
    file = tmp_path / "c.pt"
    official.save_safetensors(eat, file)
    stop("eat", None, "ends before", cut=file.stat().st_size - 1000)
    with pytest.raises(extract.Stop, match="no such file"):
        extract.find_checkpoint("eat", "nowhere.pt")
    with pytest.raises(extract.Stop, match="--checkpoint"):
        extract.find_checkpoint("asit", None)


def test_checkpoint_of_another_model_is_told_by_its_hash(tmp_path, monkeypatch):
    file = tmp_path / "x.pt"
    torch.save(small("eat"), file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(extract.MODELS, "sslam", ("eat", "", sha, (0, 1), "MIT"))
    with pytest.raises(extract.Stop, match="official checkpoint of sslam"):
        extract.find_checkpoint("eat", str(file))
    assert extract.find_checkpoint("sslam", str(file)) == (str(file), {"source": str(file),
                                                                      "sha256": sha})


def test_hub_that_cannot_be_reached_or_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    row = ("eat", "http://127.0.0.1:9/w.safetensors", "0" * 64, (0, 1), "MIT")
    monkeypatch.setitem(extract.MODELS, "eat", row)
    with pytest.raises(extract.Stop) as e:
        extract.find_checkpoint("eat", None)
    assert "http://127.0.0.1:9/w.safetensors" in str(e.value) and "by hand" in str(e.value)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "eat-w.safetensors").write_bytes(b"x")
    with pytest.raises(extract.Stop, match="sha256 .* is not the official"):
        extract.find_checkpoint("eat", None)


def test_lengths():
    """Input frames and grids; clips longer than the position table are refused."""
    def grid(model, seconds, **more):
        torch.save(small("asit" if model == "asit" else extract.MODELS[model][0], **more), "w.pt")
        e = extract.Encoder(model, "w.pt", seconds)
        n = e(torch.randn(1, round(seconds * 16000)))[0].shape[1]
        assert n == e.grid[0] * e.grid[1]
        return e.frames, e.grid
    assert grid("eat", 1) == (128, (7, 8)) and grid("eat", 5) == (512, (32, 8))
    assert grid("eat", 12) == (1216, (75, 8)) and grid("eat", 10)[1] == (64, 8)
    assert grid("amae", 5) == (1024, (32, 8)) and grid("amae", 10) == (1024, (64, 8))
    assert grid("asit", 10, rows=297) == (1024, (64, 8)) and grid("asit", 3)[1] == (19, 8)
    assert grid("beats", 5) == (498, (31, 8))
    assert grid("dasheng", 10)[1] == (250, 1) and grid("dasheng", 11)[1] == (275, 1)
    with pytest.raises(extract.Stop, match=r"positions for 1024 \(10.24 s\)"):
        grid("amae", 11)
    with pytest.raises(extract.Stop, match="12288"):
        grid("eat", 130)


def test_too_short_for_a_token():
    with pytest.raises(extract.Stop, match="fewer than the 16"):
        extract.Encoder("logmel", None, 0.1)
    torch.save(small("dasheng"), "w.pt")
    with pytest.raises(extract.Stop, match="4 of Dasheng"):
        extract.Encoder("dasheng", "w.pt", 0.028)
    assert extract.Encoder("dasheng", "w.pt", 0.03)(torch.zeros(1, 480))[0].shape == (1, 1, 128)


def test_dasheng_chunks_are_encoded_apart():
    """11 s = one full chunk and the rest: the first chunk's tokens are those of 10.07 s."""
    torch.save(small("dasheng"), "w.pt")
    wave = torch.cat([official.waveform(10), torch.randn(16000)])[None]
    long = extract.Encoder("dasheng", "w.pt", 11)(wave)[0]
    spec = extract.Encoder("dasheng", "w.pt", 11).spectrogram(wave)
    vit = extract.Encoder("dasheng", "w.pt", 11).vit
    first = vit(spec[:, :1008])[0]
    rest = torch.nn.functional.pad(spec[:, 1008:], (0, 0, 0, 1008 - (1101 - 1008)))
    torch.testing.assert_close(long, torch.cat([first, vit(rest)[0][:, :93 // 4]], 1))


def test_asit_positions():
    pos = torch.randn(1 + 37 * 8, 16)
    cut = extract.resize_rows(pos, 10)
    assert torch.equal(cut[0], pos[0])
    assert torch.equal(cut[1:], pos[1:].view(37, 8, 16)[18 - 5:18 + 5].reshape(80, 16))
    wide = extract.resize_rows(pos, 74).double()
    assert wide.shape == (1 + 74 * 8, 16)
    old = pos[1:].view(37, 8, 16).double()  # bilinear, half a step apart: 3/4 and 1/4
    torch.testing.assert_close(wide[1:].view(74, 8, 16)[9], 0.75 * old[4] + 0.25 * old[5],
                               rtol=1e-5, atol=1e-5)


def test_random_is_seeded_eat():
    a, b = extract.Encoder("random", None, 1), extract.Encoder("random", None, 1)
    wave = official.waveform(1)[None]
    assert torch.equal(a(wave)[0], b(wave)[0])
    assert sum(p.numel() for p in a.vit.parameters()) == PARAMETERS["eat"] + 768
    assert np.allclose(a.vit.pos[1:], official.sincos(768, 8), atol=1e-3)  # float32 angles


def test_batch_does_not_matter():
    """A clip's tokens do not depend on the clips beside it."""
    torch.save(small("beats"), "w.pt")
    encoder = extract.Encoder("beats", "w.pt", 2.0)
    torch.testing.assert_close(encoder(waves())[0][1], encoder(waves()[1:2])[0][0], rtol=1e-4,
                               atol=1e-5)


# ---------------------------------------------------------------------------------------------
# audio

def test_read_wave(tmp_path):
    t = np.arange(44100 * 2) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * t)
    for name, channels in (("a.wav", 1), ("b.flac", 2), ("c.ogg", 1), ("d.wav", 6), ("e.mp3", 1)):
        soundfile.write(name, np.stack([tone] * channels, 1), 44100)
        wave = extract.read_wave(name, 0, 2)
        assert wave.shape == (32000,) and wave.dtype == torch.float32
        power = np.abs(np.fft.rfft(wave[8000:24000].numpy()))
        assert abs(power.argmax() - 1000) <= 1, name
        want = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
        if name.endswith((".wav", ".flac")):
            assert np.abs(wave.numpy() - want)[100:-100].max() < 2e-3
    stereo = np.stack([np.full(1600, 0.25), np.full(1600, -0.75)], 1)
    soundfile.write("s.wav", stereo, 16000)
    assert torch.allclose(extract.read_wave("s.wav", 0, 0.1), torch.tensor(-0.25), atol=1e-4)
    ramp = np.arange(16000) / 20000
    soundfile.write("r.wav", ramp, 16000, subtype="FLOAT")
    cut = extract.read_wave("r.wav", 0.25, 0.5)
    assert np.allclose(cut, ramp[4000:12000], atol=1e-6)
    short = extract.read_wave("r.wav", 0.75, 0.5)
    assert np.allclose(short[:4000], ramp[12000:], atol=1e-6) and not short[4000:].any()
    with pytest.raises(ValueError, match="before its start"):
        extract.read_wave("r.wav", 1.5, 0.5)
    soundfile.write("n.wav", np.array([0, np.nan, 0] * 500), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="not numbers"):
        extract.read_wave("n.wav", 0, 0.05)


# ---------------------------------------------------------------------------------------------
# the dump

LINES = "mine multi 1 3\n"


def folder_of_clips(clips=40, line=LINES):
    os.makedirs("data/mine/audio", exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [("path", "split", "labels")]
    for i in range(clips):
        soundfile.write(f"data/mine/audio/{i}.wav", 0.1 * rng.standard_normal(16000), 16000)
        rows.append((f"audio/{i}.wav", "test" if i % 4 == 0 else "train",
                     ";".join(x for x in "abc" if rng.random() < 0.4)))
    rows[1] = rows[1][:2] + ("a;b;c",)
    with open("data/mine/manifest.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    pathlib.Path("datasets.txt").write_text(line)


def content(folder="tokens/mine/logmel"):
    """Bytes of every file of a dump but the versions in meta.json."""
    return {f.name: f.read_bytes() for f in sorted(pathlib.Path(folder).iterdir())}


def run(*args, **more):
    return script("extract.py", "--data", "mine", *args, **more)


def test_dump_files():
    folder_of_clips()
    done = run()
    assert done.returncode == 0, done.stderr
    folder = pathlib.Path("tokens/mine/logmel")
    assert sorted(f.name for f in folder.iterdir()) == ["classes.txt", "clips.csv", "labels.npy",
                                                        "meta.json", "tokens.npy"]
    tokens, labels = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    assert tokens.dtype == np.float16 and tokens.shape == (40, 6 * 8, 256)
    assert labels.dtype == np.uint8 and labels.shape == (40, 3)
    rows = list(csv.DictReader(open(folder / "clips.csv")))
    assert list(rows[0]) == ["path", "start", "split", "labels"]
    for row, hot, t in zip(rows, labels, tokens):
        assert ";".join(np.array(["a", "b", "c"])[hot > 0]) == row["labels"]
        wave = extract.read_wave(os.path.join("data/mine", row["path"]), 0, 1)
        want = extract.Encoder("logmel", None, 1)(wave[None])[0][0].half()
        assert np.abs(t - want.numpy()).max() < 2e-3  # other batch size, other rounding
    meta = json.load(open(folder / "meta.json"))
    assert set("data model task grid seconds token_seconds sample_rate dim precision checkpoint "
               "dataset_lines versions done complete".split()) <= set(meta)
    assert (meta["grid"], meta["done"], meta["complete"]) == ([6, 8], 40, True)
    assert meta["dataset_lines"] == ["mine multi 1 3"] and meta["checkpoint"] is None
    again = run()
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_other_settings_are_refused_and_named():
    folder_of_clips()
    assert run().returncode == 0
    before = content()
    pathlib.Path("datasets.txt").write_text("mine multi 0.5 3\n")
    refused(run(), "seconds was 1.0 and would be 0.5", "--overwrite")
    pathlib.Path("datasets.txt").write_text(LINES)
    os.remove("data/mine/audio/7.wav")
    refused(run("--allow-bad"), "clips", "--overwrite")
    assert content() == before
    assert run("--allow-bad", "--overwrite").returncode == 0
    torch.save(small("eat"), "w.pt")
    torch.save(small("eat") | {"model.extra_tokens": torch.ones(1, 1, 128)}, "v.pt")
    shutil.copy("w.pt", "u.pt")
    for file in ("w.pt", "w.pt", "u.pt"):  # the same weights elsewhere are the same weights
        assert run("--allow-bad", "--model", "eat", "--checkpoint", file).returncode == 0
    refused(run("--allow-bad", "--model", "eat", "--checkpoint", "v.pt"), "checkpoint", "v.pt")
    cls = np.load("tokens/mine/eat/cls.npy")
    assert cls.shape == (39, 128) and cls.dtype == np.float16 and cls.any(1).all()


# extract.py with every block recorded at once, so that a kill finds some done and some not
EAGER = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import extract
extract.RECORD_SECONDS = 0
extract.Encoder.__call__ = lambda self, waves, call=extract.Encoder.__call__: (
    time.sleep(0.02), call(self, waves))[1]
sys.argv = ["extract.py", "--data", "mine"]
extract.main()"""


def eager(rank=0, world=1, port=0):
    env = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "WORLD_SIZE": world,
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
    return subprocess.Popen([sys.executable, "-c", EAGER], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **{k: str(v) for k, v in env.items()}})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def recorded():
    return len(extract.read_progress("tokens/mine/logmel"))


def test_kill_at_random_moments_then_same_bytes():
    folder_of_clips(clips=400)  # 50 blocks
    soundfile.write("data/mine/audio/333.wav", np.zeros(0), 16000)  # an empty one among them
    whole = start("extract.py", "--data", "mine")
    assert whole.wait() == 0, whole.stderr.read()
    want = content()
    assert b"333.wav" in want["meta.json"] and b"333.wav" not in want["clips.csv"]
    os.rename("tokens", "whole")
    rng, seen = random.Random(0), 0
    for _ in range(4):
        job, enough = eager(), seen + rng.randint(2, 12)
        while recorded() < enough:
            assert job.poll() is None, job.stderr.read()
        job.send_signal(signal.SIGKILL)
        job.wait()
        meta = json.load(open("tokens/mine/logmel/meta.json"))
        assert enough <= (seen := recorded()) < 50 and not meta["complete"]
        got = np.load("tokens/mine/logmel/tokens.npy", mmap_mode="r")[:meta["done"]]
        assert meta["done"] and np.array_equal(got, np.load("whole/mine/logmel/tokens.npy")
                                               [:meta["done"]])
    assert eager().wait() == 0
    assert content() == want


def test_two_ranks_equal_one_and_survive_a_kill():
    folder_of_clips(clips=400)
    soundfile.write("data/mine/audio/17.wav", np.zeros(0), 16000)
    assert run().returncode == 0
    want = content()
    for resume in (0, 1, 3):  # not killed at all, gone on with by one, by three
        shutil.rmtree("tokens")
        port = free_port()
        jobs = [eager(rank, 2, port) for rank in range(2)]
        if resume:
            while recorded() < 15:
                assert jobs[0].poll() is None, jobs[0].stderr.read()
            jobs[1].send_signal(signal.SIGKILL)
            jobs[0].send_signal(signal.SIGTERM)  # as torchrun does when a rank is gone
            jobs[0].wait(timeout=120)
            assert 15 <= recorded() < 50
            assert all(os.path.getsize(f"tokens/mine/logmel/progress.{r}") > 1 for r in (0, 1))
            port = free_port()
            jobs = [eager(rank, resume, port) for rank in range(resume)]
        for job in jobs:
            assert job.wait(timeout=120) == 0, job.stderr.read()
        assert content() == want


def test_torchrun_itself():
    folder_of_clips(clips=60)
    assert run().returncode == 0
    want = content()
    shutil.rmtree("tokens")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           f"--master-port={free_port()}", ROOT / "extract.py", "--data", "mine"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content() == want


def test_a_rank_that_sees_other_clips_stops():
    """Two machines, one of whose data folders lacks a file: no row may hold another clip."""
    folder_of_clips(clips=40)
    shutil.copytree("data", "other/data")
    shutil.copy("datasets.txt", "other")
    os.remove("other/data/mine/audio/3.wav")
    os.makedirs("tokens")
    os.symlink(os.path.abspath("tokens"), "other/tokens")
    port = str(free_port())
    jobs = [start("extract.py", "--data", "mine", "--allow-bad", cwd=folder, env={
        "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for r, folder in enumerate((".", "other"))]
    messages = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], messages
    assert "another rank stopped" in messages[0] and "other settings" in messages[1], messages
    assert not json.load(open("tokens/mine/logmel/meta.json"))["complete"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done,mended", ((False, False), (True, False), (False, True)))
def test_kill_at_every_rename(done, mended, monkeypatch):
    """Above all while unreadable clips are taken out: the dump that is gone on with is the dump that
    was never stopped, or, if the file is mended meanwhile, one whose parts still agree."""
    folder_of_clips(clips=24)
    torch.save(small("eat"), "w.pt")
    args = "--model", "eat", "--checkpoint", "w.pt", "--allow-bad"
    good = pathlib.Path("data/mine/audio/10.wav").read_bytes()
    soundfile.write("data/mine/audio/10.wav", np.zeros(0), 16000)
    assert run(*args).returncode == 0
    want, lengths = content("tokens/mine/eat"), set()
    replace = os.replace
    for moment in range(30):
        shutil.rmtree("tokens")
        calls = iter(range(100))

        def killing(a, b):
            now = next(calls) == moment
            if not now or done:
                replace(a, b)
            if now:
                raise Killed
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing)
            first = run(*args)
        if first.returncode == 0:
            break
        assert "Killed" in first.stderr, first.stderr
        if mended:
            pathlib.Path("data/mine/audio/10.wav").write_bytes(good)
        again = run(*args)
        soundfile.write("data/mine/audio/10.wav", np.zeros(0), 16000)
        assert again.returncode == 0, (moment, again.stderr)
        if not mended:
            assert content("tokens/mine/eat") == want, moment
        rows = [r["path"] for r in csv.DictReader(open("tokens/mine/eat/clips.csv"))]
        sizes = {len(np.load(f"tokens/mine/eat/{name}.npy")) for name in ("tokens", "cls", "labels")}
        assert sizes == {len(rows)} and len(rows) == 23 + ("audio/10.wav" in rows), moment
        lengths.add(len(rows))
    assert moment > 8 and lengths == ({23, 24} if mended else {23})


def test_bad_files_are_skipped_counted_and_named():
    folder_of_clips(clips=300)
    soundfile.write("data/mine/audio/5.wav", np.zeros(0), 16000)
    pathlib.Path("data/mine/audio/8.wav").write_bytes(b"this is no audio")
    done = run()
    assert done.returncode == 0, done.stderr
    assert "unreadable: audio/5.wav" in done.stdout and "unreadable: audio/8.wav" in done.stdout
    clips = [r["path"] for r in csv.DictReader(open("tokens/mine/logmel/clips.csv"))]
    assert len(clips) == 298 and "audio/5.wav" not in clips
    tokens = np.load("tokens/mine/logmel/tokens.npy")
    assert len(tokens) == 298 == len(np.load("tokens/mine/logmel/labels.npy"))
    wave = extract.read_wave("data/mine/audio/9.wav", 0, 1)
    want = extract.Encoder("logmel", None, 1)(wave[None])[0][0].half().numpy()
    assert np.abs(tokens[clips.index("audio/9.wav")] - want).max() < 2e-3
    assert "2 unreadable clips are left out" in run().stdout
    # more than 1 %: stop, nothing lost, --allow-bad goes on
    soundfile.write("data/mine/audio/11.wav", np.array([np.nan] * 16000), 16000, subtype="FLOAT")
    os.remove("data/mine/audio/12.wav")
    refused(run("--overwrite"), "unreadable", "--allow-bad")
    done = run("--allow-bad")
    assert done.returncode == 0 and "missing: audio/12.wav\n" in done.stdout, done.stdout
    assert len(np.load("tokens/mine/logmel/tokens.npy")) == 296
    for i in range(20, 30):
        os.remove(f"data/mine/audio/{i}.wav")
    refused(run("--overwrite"), "missing", "--allow-bad")


def test_padding_and_clips_of_several_splits_are_told():
    folder_of_clips(clips=40)
    for i in (3, 4):
        soundfile.write(f"data/mine/audio/{i}.wav", np.full(16000 // 4, 0.1), 16000)
    with open("data/mine/manifest.csv", "a") as f:
        f.write("audio/0.wav,train,b\naudio/1.wav,train,b\n")  # clip 0 is in test
    done = run()
    assert done.returncode == 0, done.stderr
    assert "2 of 40 clips read are shorter than 1 s: 4% of what was encoded" in done.stdout
    assert "clips listed in several splits, which count in the first alone: 1" in done.stdout
    assert "audio/0.wav in test and not train" in done.stdout


def test_mended_files_are_tried_again_and_a_line_cut_short_is_no_harm():
    folder_of_clips(clips=40)
    assert run().returncode == 0
    want = content()
    good = pathlib.Path("data/mine/audio/9.wav").read_bytes()
    pathlib.Path("data/mine/audio/9.wav").write_bytes(b"this is no audio")
    refused(run("--overwrite"), "audio/9.wav", "mend")
    folder = pathlib.Path("tokens/mine/logmel")
    with open(folder / "progress.0", "a") as f:  # as if recorded before the refusal, then killed
        f.write('[1, {"9": "no audio"}]\n[2, {')
    (folder / "progress.1").write_text('[3, {}]\n[4, {"33": "no audio"}]\n')
    extract.forget_bad_blocks(folder)
    assert extract.read_progress(folder) == {3: {}} and not (folder / "progress.1").exists()
    os.remove(folder / "progress.0")
    (folder / "progress.0").write_text('[1, {"9": "no audio"}]\n')
    pathlib.Path("data/mine/audio/9.wav").write_bytes(good)
    done = run()
    assert done.returncode == 0, done.stderr
    assert content() == want
    # one mended, its neighbour spoilt: the neighbour is left out
    pathlib.Path("data/mine/audio/9.wav").write_bytes(b"this is no audio")
    refused(run("--overwrite"), "audio/9.wav", "mend")
    (folder / "progress.0").write_text('[1, {"9": "no audio"}]\n')
    pathlib.Path("data/mine/audio/9.wav").write_bytes(good)
    pathlib.Path("data/mine/audio/10.wav").write_bytes(b"this is no audio")
    assert run("--allow-bad").returncode == 0
    rows = [r["path"] for r in csv.DictReader(open(folder / "clips.csv"))]
    assert "audio/9.wav" in rows and "audio/10.wav" not in rows and len(rows) == 39


def test_one_dump_is_made_by_one_process():
    folder_of_clips(clips=40)
    with extract.alone("tokens/mine/.logmel.lock"):
        job = start("extract.py", "--data", "mine")
        assert "tokens/mine/logmel is being made by another" in job.communicate()[1]
        assert job.returncode == 2
    assert run().returncode == 0
    os.remove("tokens/mine/logmel/meta.json")
    pathlib.Path("tokens/mine/logmel/notes.txt").write_text("mine")
    refused(run(), "meta.json", "--overwrite")
    assert os.path.exists("tokens/mine/logmel/notes.txt")
    assert run("--overwrite").returncode == 0


def test_small_shared_memory_does_without_workers(monkeypatch, capsys):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**6)
                        if path == "/dev/shm" else usage(path))
    monkeypatch.setattr("sys.argv", ["extract.py", "--data", "mine"])
    folder_of_clips(clips=40)
    extract.main()
    assert os.path.exists("/dev/shm") == ("/dev/shm is too small" in capsys.readouterr().out)
    assert json.load(open("tokens/mine/logmel/meta.json"))["complete"]


def test_audio_that_would_be_taken_for_something_else_is_refused(tmp_path):
    wave = 0.1 * np.random.default_rng(0).standard_normal(5 * 22254)
    soundfile.write(tmp_path / "odd.wav", wave, 22254)
    with pytest.raises(ValueError, match="22254 Hz"):  # a kernel of gigabytes
        extract.read_wave(tmp_path / "odd.wav", 0, 5)
    soundfile.write(tmp_path / "a.ogg", wave, 22050)
    data = bytearray((tmp_path / "a.ogg").read_bytes())
    data[len(data) // 2:len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    (tmp_path / "a.ogg").write_bytes(data)
    with pytest.raises((ValueError, soundfile.LibsndfileError)):
        extract.read_wave(tmp_path / "a.ogg", 0, 5)


def test_bad_files_of_several_ranks_are_counted_together():
    """2 % unreadable, 1 % for each of two ranks: neither stops by itself, the dump does."""
    folder_of_clips(clips=100)
    clips = [{"path": f"audio/{i}.wav", "start": 0, "split": "train", "labels": set()}
             for i in range(100)]
    os.makedirs("tokens/x/y")
    for rank, row in ((0, 1), (1, 9)):
        lines = [[b, {row: "bad"} if b == rank else {}] for b in range(rank, 13, 2)]
        pathlib.Path(f"tokens/x/y/progress.{rank}").write_text(
            "".join(json.dumps(x) + "\n" for x in lines))
    with pytest.raises(extract.Stop, match="2 of 100 clips are unreadable"):
        extract.finish_dump("tokens/x/y", clips, [], {"block": 8}, 1)


def test_starts_keep_their_digits_and_missing_ones_count_each():
    folder_of_clips(clips=4)
    soundfile.write("data/mine/long.wav", np.zeros(16000 * 3) + 0.1, 16000)
    rows = ["path,split,labels,start"]
    rows += [f"long.wav,{s},a;b;c,{x}" for s, x in (("train", 0.123456789), ("test", 1.000001))]
    pathlib.Path("data/mine/manifest.csv").write_text("\n".join(rows) + "\n")
    assert run().returncode == 0
    starts = [r["start"] for r in csv.DictReader(open("tokens/mine/logmel/clips.csv"))]
    assert starts == ["0.123456789", "1.000001"]
    rows += [f"gone.wav,train,a,{i}" for i in range(50)]
    pathlib.Path("data/mine/manifest.csv").write_text("\n".join(rows) + "\n")
    refused(run("--overwrite"), "50 of 52 clips are missing")


def test_events_are_checked():
    folder_of_clips(clips=4)
    pathlib.Path("data/mine/events.csv").write_text("label,path,onset,offset\na,./audio/1.wav,0,1\n")
    assert run().returncode == 0
    assert open("tokens/mine/logmel/events.csv").read().splitlines()[1] == "audio/1.wav,0.0,1.0,a"
    pathlib.Path("data/mine/events.csv").write_text("path,onset,label\naudio/1.wav,0,a\n")
    refused(run("--overwrite"), "events.csv", "path,onset,offset,label")


def test_overflow_names_the_clip(monkeypatch):
    folder_of_clips(clips=10)
    state = small("eat")
    state["model.blocks.1.norm2.weight"][:] = 1e6
    torch.save(state, "w.pt")
    refused(run("--model", "eat", "--checkpoint", "w.pt"), "audio/", "overflow float16")


def test_no_space(monkeypatch):
    folder_of_clips(clips=10)
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
        refused(run(), "GB free", "make room")
    assert not os.path.exists("tokens/mine/logmel/meta.json")

    def full(*args):
        raise OSError(28, "No space left on device", "tokens.npy")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        refused(run(), "no space left", "nothing finished is lost")
    assert run().returncode == 0


def test_mistakes_get_one_sentence():
    refused(script("extract.py"), "datasets.txt", "No such file")
    folder_of_clips(clips=4)
    refused(run("--model", "eet"), "eet", "eat", "logmel")
    refused(script("extract.py", "--data", "mien"), "mien", "mine")
    refused(run("--model", "logmel", "--checkpoint", "x.pt"), "no weights")
    refused(run("--precision", "fp16"), "CPU")
    refused(run("--device", "cuda"), "no CUDA device")
    refused(run("--model", "asit"), "--checkpoint")
    os.rename("data/mine", "data/elsewhere")
    refused(run(), "data/mine is not there")


def test_demo_is_deterministic_and_polyphonic(monkeypatch):
    monkeypatch.setattr(extract, "DEMO_SPLITS", {"train": 12, "test": 6})
    extract.make_demo("a")
    extract.make_demo("b")
    files = sorted(p.relative_to("a") for p in pathlib.Path("a").rglob("*") if p.is_file())
    assert len(files) == 18 + 2
    for file in files:
        assert (pathlib.Path("a") / file).read_bytes() == (pathlib.Path("b") / file).read_bytes()
    info = soundfile.info("a/audio/train0000.wav")
    assert (info.samplerate, info.frames, info.subtype) == (16000, 80000, "PCM_16")
    labels = {r["path"]: set(filter(None, r["labels"].split(";")))
              for r in csv.DictReader(open("a/manifest.csv"))}
    events = collections.defaultdict(set)
    for r in csv.DictReader(open("a/events.csv")):
        assert 0 <= float(r["onset"]) < float(r["offset"]) <= 5
        events[r["path"]].add(r["label"])
    assert events == labels and len(set().union(*labels.values())) > 5
