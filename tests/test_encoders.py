"""extract.py's encoders: front-ends against torchaudio, tokens against recorded outputs of the
official code, checkpoints in every official layout, the ones that are refused, and lengths."""

import argparse
import hashlib
import json
import os
import pathlib
import re
from collections import OrderedDict

import numpy as np
import official
import pytest
import torch
import torchaudio
from conftest import ROOT
from safetensors.torch import save_file

import extract

SHA256 = hashlib.sha256(b"weights").hexdigest()
GOLDEN = json.loads((ROOT / "tests/assets/encoders_golden.json").read_text())


def waves():
    """Two seconds each: loud, quiet, silent, and loud then silent."""
    torch.manual_seed(0)
    loud, late = official.waveform(2), torch.arange(32000) >= 8000
    return torch.stack([loud, 1e-4 * torch.randn(32000), 0 * loud, loud.masked_fill(late, 0)])


def small(family, depth=2, D=128):
    return None if family == "logmel" else official.state(family, depth=depth, D=D)


def encoder(model, content, seconds=2.0, file="w.pt"):
    if file.endswith(".safetensors"):
        save_file({key: value.clone().contiguous() for key, value in content.items()}, file)
    else:
        torch.save(content, file)
    return extract.Encoder(model, file if content else None, seconds)


@pytest.mark.parametrize("window", ["hanning", "povey"])
def test_kaldi_fbank_equals_torchaudio(window):
    scale = 2 ** 15 if window == "povey" else 1
    ours = extract.kaldi_fbank(waves() * scale, extract.mel_filters("kaldi"), window == "povey")
    assert ours.shape == (4, 1 + (32000 - 400) // 160, 128)
    for wave, spec in zip(waves() * scale, ours):
        theirs = torchaudio.compliance.kaldi.fbank(wave[None], num_mel_bins=128, window_type=window)
        assert (spec - theirs).abs().max() < 1e-3 and (spec - theirs).abs().mean() < 1e-5
    assert torch.all((ours[2] - -15.9424).abs() < 1e-4)  # digital silence


def test_decibel_mel_equals_torchaudio_per_clip():
    mel = torchaudio.transforms.MelSpectrogram(16000, 512, 512, 160, 0, 8000, n_mels=64)
    decibel = torchaudio.transforms.AmplitudeToDB("power", 120)
    ours = extract.decibel_mel(waves(), extract.mel_filters("htk"))
    for wave, spec in zip(waves(), ours):  # one at a time: the floor ignores the other clips
        torch.testing.assert_close(spec, decibel(mel(wave[None]))[0].T, rtol=0, atol=2e-3)


def test_logmel_tokens_are_patches():
    wave, logmel = official.waveform(5)[None], encoder("logmel", None, 5)
    tokens, cls = logmel(wave)
    spec = extract.kaldi_fbank(wave - wave.mean(), extract.mel_filters("kaldi"))[0]
    patch = (spec[16 * 7:16 * 8, 16 * 3:16 * 4] + 4.2677393) / (2 * 4.5689974)  # t = 7, f = 3
    assert cls is None and logmel.grid == (31, 8) and tokens.shape == (1, 248, 256)
    torch.testing.assert_close(tokens[0, 7 * 8 + 3], patch.reshape(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, model, seconds, grid", [
    ("beats_10s", "beats", 10, (62, 8)), ("beats_5s", "beats", 5, (31, 8)),
    ("eat_10s", "eat", 10, (64, 8)), ("eat_5s_T512", "eat", 5, (32, 8)),
    ("eat_5s_T1024", "eat", 5, (64, 8)), ("dasheng_10s", "dasheng", 10, (250, 1)),
    ("dasheng_5s", "dasheng", 5, (125, 1)), ("audiomae_10s", "amae", 10, (64, 8)),
    ("asit_1024", "asit", 10, (64, 8)), ("asit_592", "asit", 10, (37, 8))])
def test_golden_outputs(name, model, seconds, grid):
    """Recorded with the official implementations and the same synthetic weights."""
    want, state = GOLDEN[name], official.state(model, **{"rows": 297} if "592" in name else {})
    ours, wave, seen = encoder(model, state, seconds), official.waveform(seconds)[None], []
    ours.grid, ours.frames = grid, 1024 if "T1024" in name else ours.frames  # possible, not ours
    spec = ours.spectrogram(wave)
    if "592" in name:  # the first 592 frames of 10 s, its training length
        ours.vit.pos, spec = torch.nn.Parameter(state["pos_embed"][0]), spec[:, :592]
    ours.spectrogram = lambda _: spec
    ours.vit.blocks[0].register_forward_hook(lambda _, inputs, x: seen.extend([inputs[0], x]))
    tokens, cls = ours(wave)
    out = (tokens if cls is None else torch.cat([cls[:, None], tokens], 1))[0]
    assert tokens.shape[1] == grid[0] * grid[1] and list(out.shape) == want["out_shape"][1:]
    assert list(spec.shape) == want["spec_shape"][:1] + want["spec_shape"][2:]
    middle, places = len(out) // 2, [0, 1000, 30000 if spec.numel() <= 60000 else 50000]
    for key, found in {
            "spec_probe": spec.flatten()[places], "spec_mean": spec.mean(), "spec_std": spec.std(),
            "first": out[0, :4], "mid": out[middle, :4], "last": out[-1, :4],
            "out_mean": out.mean(), "out_std": out.std(),
            "embed_in_mid": seen[0][0, middle, :4], "block0_mid": seen[1][0, middle, :4]}.items():
        np.testing.assert_allclose(found, want[key], atol=1e-3, err_msg=key)


def test_synthetic_weights_follow_the_written_rules():
    assert np.allclose(official.noise("model.extra_tokens", (4,)),
                       [2.319456, 0.926356, -0.109964, -0.733708], atol=1e-5)
    assert np.allclose(official.waveform(10)[[0, 1, 100, 16000, 159999]],
                       [0.035281, 0.079092, -0.186616, -0.039253, -0.083278], atol=1e-5)
    row = official.sincos(768, 8)[9, [0, 1, 191, 192, 384, 385, 576]]
    want = GOLDEN["eat_positions"]["row_9_cols_0_1_191_192_384_385_576"]
    assert np.allclose(row, want, atol=1e-5)


@pytest.mark.parametrize("family, count, extra", [
    ("amae", 85648128, 0), ("asit", 85648128, 0),
    ("eat", 89972736, 768),                              # a position row of zeros for [cls]
    ("beats", 90311792, -128),                           # weight norm's g is folded into v
    ("dasheng", 85447808, -2 * 64 + 252 * 768 - 253 * 768)])  # batch norm apart, sum of two tables
def test_parameter_counts(family, count, extra):
    """All numbers of the official file arrive in our model; the differences are known."""
    shapes = official.shapes(family)
    copies = [key for key in shapes if key.endswith("relative_attention_bias.weight")][1:]
    assert count == sum(int(np.prod(shape)) for key, shape in shapes.items()
                        if key not in copies and "running" not in key)
    vit = encoder(family, {key: torch.zeros(shape) for key, shape in shapes.items()}, 10).vit
    assert sum(p.numel() for p in vit.parameters()) == count + extra


def test_random_is_seeded_eat():
    a, b = (extract.Encoder("random").vit.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a) and a["cls"].std() > 0.01
    assert sum(value.numel() for value in a.values()) == 89972736 + 768
    assert np.allclose(a["pos"][1:], official.sincos(768, 8), atol=1e-3)  # float32 angles


@pytest.mark.parametrize("model", ["amae", "asit", "beats", "dasheng", "eat", "logmel"])
def test_tokens_do_not_depend_on_the_batch(model):
    ours = encoder(model, small(model))
    single = [ours(wave[None])[0] for wave in waves()]
    torch.testing.assert_close(ours(waves())[0], torch.cat(single), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("model", ["amae", "asit", "beats", "dasheng", "eat"])
def test_half_precision_is_close(model):
    exact, _ = encoder(model, small(model))(waves())
    half, _ = extract.Encoder(model, "w.pt", 2.0, "cpu", "fp16")(waves())
    assert 0 < (half - exact).abs().max() < 0.03 < exact.abs().max()


@pytest.mark.parametrize("family, D, heads", [("dasheng", 1280, 16), ("eat", 1024, 16)])
def test_larger_siblings(family, D, heads):
    """Width, depth and heads come from the checkpoint."""
    ours = encoder(family, small(family, 1, D))
    assert ours.vit.blocks[0].attn.heads == heads and len(ours.vit.blocks) == 1
    assert ours(waves())[0].shape == (4, ours.grid[0] * ours.grid[1], D)


def test_dasheng_chunks_are_encoded_separately():
    """11 s are one full chunk of 1008 frames and 93 more, padded with 0 after the batch norm."""
    wave = torch.cat([official.waveform(10), 0.1 * torch.randn(16000)])[None]
    ours = encoder("dasheng", small("dasheng"), 11)
    spec = ours.spectrogram(wave)
    rest = torch.nn.functional.pad(spec[:, 1008:], (0, 0, 0, 1008 - 93))
    want = torch.cat([ours.vit(spec[:, :1008])[0], ours.vit(rest)[0][:, :93 // 4]], 1)
    torch.testing.assert_close(ours(wave)[0], want)


def test_asit_positions_are_cut_or_stretched():
    pos = torch.randn(1 + 37 * 8, 16)
    cut, old = extract.resize_rows(pos, 10), pos[1:].view(37, 8, 16)
    assert torch.equal(cut[0], pos[0]) and torch.equal(cut[1:], old[13:23].reshape(80, 16))
    wide = extract.resize_rows(pos, 74)[1:].view(74, 8, 16)  # half a step apart: 3/4 and 1/4
    torch.testing.assert_close(wide[9], 0.75 * old[4] + 0.25 * old[5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model, seconds, frames, grid", [
    ("eat", 1, 128, (7, 8)), ("eat", 5, 512, (32, 8)), ("eat", 10, 1024, (64, 8)),
    ("eat", 12, 1216, (75, 8)), ("amae", 5, 1024, (32, 8)), ("amae", 10, 1024, (64, 8)),
    ("asit", 3, 320, (19, 8)), ("asit", 10, 1024, (64, 8)), ("beats", 5, 498, (31, 8)),
    ("dasheng", 10, 998, (250, 1)), ("dasheng", 11, 1098, (275, 1)), ("dasheng", 0.03, 1, (1, 1)),
    ("amae", 11, 0, 0), ("eat", 130, 0, 0), ("logmel", 0.1, 0, 0), ("dasheng", 0.028, 0, 0)])
def test_lengths_and_grids(model, seconds, frames, grid):
    if not frames:  # too long for the positions, too short for a token
        with pytest.raises(extract.Stop, match=f"{seconds} s"):
            encoder(model, small(model), seconds)
        return
    ours = encoder(model, small(model), seconds)
    tokens = ours(torch.randn(1, round(seconds * 16000)))[0]
    assert (ours.frames, ours.grid, tokens.shape) == (frames, grid, (1, grid[0] * grid[1], 128))


def ones(*keys):
    return dict.fromkeys(keys, torch.ones(1))


def prefix(text, state):
    return {text + key: value for key, value in state.items()}


def layouts():
    """(name, model, the file's content as the official script saves it, its plain equivalent)"""
    args, image = argparse.Namespace(lr=1, out=pathlib.PosixPath("x")), "modality_encoders.IMAGE."
    amae, asit, beats, dasheng, eat = map(small, ("amae", "asit", "beats", "dasheng", "eat"))
    train = {}
    for key, value in eat.items():
        key = re.sub(r"^model\.(?=local|extra|fixed)", image, key).removeprefix("model.")
        train[key.replace("pre_norm", image + "context_encoder.norm")] = value
    head = ones("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")
    unnormed = {key: value for key, value in amae.items() if not key.startswith("norm.")}
    teacher = prefix("backbone.", asit) | ones("head_cls.mlp.0.weight", "head_recons.0.weight")
    unused = ones(image + "decoder.blocks.0.0.weight", "recon_proj.weight", "shared_decoder.x")
    yield "flat", "amae", OrderedDict(amae), amae
    yield "model", "amae", {"model": amae | ones("mask_token", "decoder_embed.weight"), "epoch": 3,
                            "optimizer": {"state": {}}, "scaler": {}, "args": args}, amae
    yield "encoder", "amae", prefix("encoder.", amae), amae
    yield "fine-tuned", "amae+", unnormed | head, unnormed
    yield "teacher", "asit", {"student": {f"module.{k}": v + 1 for k, v in teacher.items()},
                              "teacher": teacher, "optimizer": {}, "epoch": 1, "args": args}, asit
    yield "student", "asit", prefix("module.", teacher), asit
    yield "model", "beats", {"cfg": {"encoder_layers": 2}, "model": OrderedDict(beats)}, beats
    yield "fine-tuned", "beats+", {"cfg": {}, "label_dict": {0: "/m/09x0r"}, "model": beats | ones(
        "predictor.weight", "predictor.bias")}, beats
    yield "model", "dasheng", {"config": {"embed_dim": 128}, "model": dasheng | ones(
        "front_end.0.spectrogram.window", "front_end.0.mel_scale.fb")}, dasheng
    yield "encoder", "dasheng", prefix("encoder.", dasheng), dasheng
    yield "fine-tuned", "dasheng", dasheng | ones("outputlayer.0.weight"), dasheng
    yield "bn", "dasheng", {k.replace("bn.1.", "bn."): v for k, v in dasheng.items()}, dasheng
    yield "flat", "eat", eat, eat
    yield "fine-tuned", "eat+", eat | prefix("model.", head), eat
    yield "fairseq", "sslam", {"args": None, "cfg": {"task": {}}, "model": train | unused | {
        "_ema": ones("blocks.0.norm1.weight")}}, eat
    yield "fairseq-tuned", "sslam+", {"cfg": {}, "model": prefix("model.", train | head)}, eat


@pytest.mark.parametrize("model, content, plain, file", [
    pytest.param(model, content, plain, "a" + ending, id=f"{model}-{name}{ending}")
    for name, model, content, plain in layouts() for ending in (".pt", ".safetensors")
    if ending == ".pt" or all(isinstance(x, torch.Tensor) for x in content.values())])
def test_checkpoint_layouts(model, content, plain, file):
    tokens, cls = encoder(model, content, file=file)(waves())
    want, want_cls = encoder(model, plain)(waves())
    assert torch.isfinite(tokens).all() and torch.equal(tokens, want)
    assert (cls is None) == (extract.MODELS[model].family in ("beats", "dasheng"))
    assert cls is None or torch.equal(cls, want_cls)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("model, family, change, keyword", [
    ("eat", "beats", {}, "checkpoint of eat"), ("beats", "eat", {}, "checkpoint of beats"),
    ("dasheng", "eat", {}, "checkpoint of dasheng"), ("amae", "eat", {}, "checkpoint of amae"),
    ("eat", "eat", {"model.blocks.1.attn.proj.bias": None}, "blocks.1.attn.proj.bias"),
    ("amae", "amae", {"norm.weight": None, "norm.bias": None}, "norm.bias"),
    ("amae+", "amae", {}, "norm.bias"), ("eat", "eat", {"surprise": torch.ones(3)}, "surprise"),
    ("eat", "eat", {"model.pre_norm.weight": torch.ones(3)}, "norm.weight"),
    ("eat", "eat", {"model.fixed_positional_encoder.positions": torch.ones(())}, "dim"),
    ("eat", "eat", {"hook": Evil()}, "cannot be read as a checkpoint")])
def test_wrong_checkpoints_are_refused(model, family, change, keyword):
    content = {k: v for k, v in (small(family) | change).items() if v is not None}
    with pytest.raises(extract.Stop, match=f"w.pt.*{keyword}"):
        encoder(model, content)
    assert not os.path.exists("evil")


@pytest.mark.parametrize("size", [0, 5000, -1000])
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_truncated_checkpoints_are_refused(file, size):
    encoder("eat", small("eat"), file=file)
    pathlib.Path(file).write_bytes(pathlib.Path(file).read_bytes()[:size])
    with pytest.raises(extract.Stop, match=f"{file}.*cannot be read"):
        extract.Encoder("eat", file, 2.0)


@pytest.mark.parametrize("known", ["", SHA256, "0" * 64])
def test_find_checkpoint_downloads_once(known, monkeypatch, tmp_path):
    """HF_ENDPOINT replaces the hub's address; a checksum mismatch leaves no file. EAT's and SSLAM's
    files have the same keys and shapes: only the sha256 tells them apart."""
    hub = tmp_path / "hub/a/b/resolve/main/c.pt"
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"weights")
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "hub").as_uri() + "/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    row = extract.MODELS["eat"]._replace(file="a/b/c.pt", sha256=known)
    monkeypatch.setitem(extract.MODELS, "eat", row)
    if known.startswith("000"):
        with pytest.raises(extract.Stop, match="by hand"):
            extract.find_checkpoint("eat", None)
        assert not os.listdir(tmp_path / "cache/checkpoints")
        return
    file, source = extract.find_checkpoint("eat", None)
    hub.unlink()
    assert extract.find_checkpoint("eat", None) == (file, source) and os.path.isfile(file)
    assert source == {"source": "https://huggingface.co/a/b/resolve/main/c.pt", "sha256": SHA256}
    if known:
        with pytest.raises(extract.Stop, match="--model eat"):
            extract.find_checkpoint("sslam", file)
