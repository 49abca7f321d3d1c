"""Front-ends, tokens against recorded outputs of the official code, lengths, checkpoints."""

import argparse
import hashlib
import json
import os
import pathlib
import re

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
FAMILIES = "amae", "asit", "beats", "dasheng", "eat"

def waves():
    """Two seconds each: loud, quiet, silent, and loud then silent."""
    torch.manual_seed(0)
    loud, late = official.waveform(2), torch.arange(32000) >= 8000
    return torch.stack([loud, 1e-4 * torch.randn(32000), 0 * loud, loud.masked_fill(late, 0)])

def small(family, depth=2, D=128):
    return None if family == "logmel" else official.state(family, depth=depth, D=D)

def encoder(model, content, seconds=2.0, file="w.pt"):
    (save_file if file.endswith(".safetensors") else torch.save)(content, file)
    return extract.Encoder(model, file if content else None, seconds)

@pytest.mark.parametrize("window", ["hanning", "povey"])
def test_kaldi_fbank_equals_torchaudio(window):
    scaled = waves() * (2 ** 15 if window == "povey" else 1)
    ours = extract.kaldi_fbank(scaled, extract.mel_filters("kaldi"), window == "povey")
    for wave, spec in zip(scaled, ours):
        theirs = torchaudio.compliance.kaldi.fbank(wave[None], num_mel_bins=128, window_type=window)
        torch.testing.assert_close(spec, theirs, rtol=0, atol=1e-3)
        assert (spec - theirs).abs().mean() < 1e-5

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

@pytest.mark.parametrize("name, model, seconds", [
    ("beats_10s", "beats", 10), ("beats_5s", "beats", 5), ("eat_10s", "eat", 10),
    ("eat_5s_T512", "eat", 5), ("dasheng_10s", "dasheng", 10), ("dasheng_5s", "dasheng", 5),
    ("audiomae_10s", "amae", 10), ("asit_1024", "asit", 10), ("asit_592", "asit", 10)])
def test_golden_outputs(name, model, seconds):
    """Recorded with the official implementations and the same synthetic weights."""
    want, state = GOLDEN[name], official.state(model, **{"rows": 297} if "592" in name else {})
    ours, seen = encoder(model, state, seconds), []
    spec = ours.spectrogram(official.waveform(seconds)[None])
    if "592" in name:  # the first 592 frames of 10 s, its training length
        ours.vit.pos.data, spec, ours.grid = state["pos_embed"][0], spec[:, :592], (37, 8)
    ours.spectrogram = lambda waves: spec
    ours.vit.blocks[0].register_forward_hook(lambda _, inputs, x: seen.extend([inputs[0], x]))
    tokens, cls = ours(spec)
    out = (tokens if cls is None else torch.cat([cls[:, None], tokens], 1))[0]
    assert list(out.shape) == want["out_shape"][1:]
    middle, places = len(out) // 2, [0, 1000, 30000 if spec.numel() <= 60000 else 50000]
    for key, found in {
            "spec_probe": spec.flatten()[places], "spec_mean": spec.mean(), "spec_std": spec.std(),
            "first": out[0, :4], "mid": out[middle, :4], "last": out[-1, :4],
            "out_mean": out.mean(), "out_std": out.std(),
            "embed_in_mid": seen[0][0, middle, :4], "block0_mid": seen[1][0, middle, :4]}.items():
        np.testing.assert_allclose(found, want[key], atol=5e-5, err_msg=key)

@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_of_the_readme(family):
    other = re.compile(r"encoder.layers.([1-9]|1.).self_attn.relative|init_bn.1.running")
    count = sum(np.prod(s) for key, s in official.shapes(family).items() if not other.match(key))
    assert re.search(f"\n\\| `{family}`.* {count:,} ", (ROOT / "README.md").read_text())

def test_random_is_seeded_eat():
    a, b = (extract.Encoder("random").vit.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a) and a["cls"].std() > 0.01
    assert sum(value.numel() for value in a.values()) == 89972736 + 768  # [cls] has a position
    assert np.allclose(a["pos"][1:], official.sincos(768, 8), atol=1e-3)  # float32 angles

@pytest.mark.parametrize("model", [*FAMILIES, "logmel"])
def test_tokens_do_not_depend_on_the_batch_and_little_on_precision(model):
    ours = encoder(model, small(model))
    exact, single = ours(waves())[0], [ours(wave[None])[0] for wave in waves()]
    torch.testing.assert_close(exact, torch.cat(single), rtol=1e-4, atol=2e-5)
    if model != "logmel":
        half, _ = extract.Encoder(model, "w.pt", 2.0, "cpu", "fp16")(waves())
        assert 0 < (half - exact).abs().max() < 0.03 < exact.abs().max()

@pytest.mark.parametrize("family, D", [("dasheng", 1280), ("eat", 1024)])
def test_larger_siblings(family, D):
    ours = encoder(family, small(family, 1, D))
    assert (ours.vit.blocks[0].heads, len(ours.vit.blocks), ours.dim) == (16, 1, D)

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
    assert torch.equal(cut, torch.cat([pos[:1], old[13:23].reshape(80, 16)]))
    wide = extract.resize_rows(pos, 74)[1:].view(74, 8, 16)  # half a step apart: 3/4 and 1/4
    torch.testing.assert_close(wide[9], 0.75 * old[4] + 0.25 * old[5], rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("model, seconds, frames, grid", [
    ("eat", 1, 128, (7, 8)), ("eat", 5, 512, (32, 8)), ("eat", 10, 1024, (64, 8)),
    ("eat", 12, 1216, (75, 8)), ("amae", 5, 1024, (32, 8)), ("asit", 3, 320, (19, 8)),
    ("beats", 5, 498, (31, 8)), ("dasheng", 11, 1098, (275, 1)), ("dasheng", 0.04, 2, (1, 1)),
    ("amae", 11, 0, 0), ("eat", 130, 0, 0), ("logmel", 0.1, 0, 0), ("dasheng", 0.03, 0, 0)])
def test_lengths_and_grids(model, seconds, frames, grid):
    if not frames:  # too long for the positions, too short for a token
        with pytest.raises(extract.Stop, match=f"{seconds} s"):
            encoder(model, small(model), seconds)
        return
    ours = encoder(model, small(model), seconds)
    tokens = ours(torch.randn(1, round(seconds * 16000)))[0]
    assert (ours.frames, ours.grid, tokens.shape) == (frames, grid, (1, grid[0] * grid[1], 128))

IMAGE = "modality_encoders.IMAGE."
FAIRSEQ = {name: IMAGE + name for name in ("local_enc", "extra_tok", "fixed_pos")} | {
    "pre_norm": IMAGE + "context_encoder.norm"}
UNUSED = {"amae": "mask_token decoder_embed.weight head.weight fc_norm.weight", "asit":
          "head_cls.mlp.0.weight head_recons.0.weight", "beats": "predictor.weight", "dasheng":
          "front_end.0.spectrogram.window outputlayer.0.weight", "eat": "head.weight fc_norm.bias "
          f"recon_proj.weight shared_decoder.x {IMAGE}decoder.blocks.0.0.weight"}

@pytest.mark.parametrize("model, inside, prefix, renamed", [
    ("amae", "model", "", {}), ("amae", "", "encoder.", {}), ("amae+", "", "", {}),
    ("asit", "teacher", "backbone.", {}), ("asit", "", "module.backbone.", {}),
    ("beats+", "model", "", {}), ("dasheng", "model", "", {}), ("dasheng", "", "encoder.", {}),
    ("dasheng", "", "", {"bn.1.": "bn."}), ("eat+", "", "model.", {}),
    ("sslam", "model", "", FAIRSEQ), ("sslam+", "model", "model.", FAIRSEQ)])
def test_checkpoint_layouts(model, inside, prefix, renamed):
    """A state dict in .safetensors, or inside a training checkpoint, with keys we do not need."""
    family = extract.MODELS[model].family
    plain = {key: x for key, x in small(family).items() if model != "amae+" or key[:5] != "norm."}
    content = {prefix + key: torch.ones(1) for key in UNUSED[family].split()}
    for key, value in plain.items():
        key = key.removeprefix("model.")
        for old, new in renamed.items():
            key = key.replace(old, new)
        content[prefix + key] = value
    if inside:
        content = {inside: content | {"_ema": {}}, "student": {}, "label_dict": {0: "/m/09x0r"},
                   "epoch": 3, "args": argparse.Namespace(lr=1, out=pathlib.PosixPath("x"))}
    tokens, cls = encoder(model, content, file="w.pt" if inside else "w.safetensors")(waves())
    want, want_cls = encoder(model, plain)(waves())
    assert torch.isfinite(tokens).all() and torch.equal(tokens, want)
    assert cls is want_cls is None or torch.equal(cls, want_cls)

@pytest.mark.parametrize("model, family, change, keyword", [
    ("eat", "beats", {}, "checkpoint of eat"), ("beats", "eat", {}, "checkpoint of beats"),
    ("eat", "amae", {}, "extra_tokens"), ("amae", "eat", {}, "extra_tokens"),
    ("amae", "amae", {"norm.bias": None}, "norm.bias"), ("amae+", "amae", {}, "norm.bias"),
    ("eat", "eat", {"odd": torch.ones(3)}, "odd"), ("eat", "eat", {"odd": os.mkdir}, "be read"),
    ("eat", "eat", {"model.pre_norm.weight": torch.ones(3)}, "norm.weight"),
    ("eat", "eat", {"model.fixed_positional_encoder.positions": torch.ones(())}, "dim")])
def test_wrong_checkpoints_are_refused(model, family, change, keyword):
    content = {key: x for key, x in (small(family) | change).items() if x is not None}
    with pytest.raises(extract.Stop, match=f"w.pt.*{keyword}"):
        encoder(model, content)

@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_truncated_checkpoints_are_refused(file):
    encoder("eat", small("eat"), file=file)
    for size in (os.path.getsize(file) - 1000, 5000, 0):
        os.truncate(file, size)
        with pytest.raises(extract.Stop, match=f"{file}.*cannot be read"):
            extract.Encoder("eat", file, 2.0)

def test_find_checkpoint_downloads_once(monkeypatch):
    """From HF_ENDPOINT. Only the sha256 tells EAT's and SSLAM's files apart."""
    hub = pathlib.Path("hub/a/b/resolve/main/c.pt")
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"weights")
    monkeypatch.setenv("HF_ENDPOINT", pathlib.Path("hub").resolve().as_uri() + "/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    monkeypatch.setitem(extract.MODELS, "eat", extract.Model("eat", "a/b/c.pt", "0" * 64))
    with pytest.raises(extract.Stop, match="by hand"):
        extract.find_checkpoint("eat", None)
    assert not os.listdir("cache/checkpoints")
    monkeypatch.setitem(extract.MODELS, "eat", extract.Model("eat", "a/b/c.pt", SHA256))
    file, source = extract.find_checkpoint("eat", None)
    hub.unlink()
    assert extract.find_checkpoint("eat", None) == (file, source) and os.path.isfile(file)
    assert source == {"source": "https://huggingface.co/a/b/resolve/main/c.pt", "sha256": SHA256}
    with pytest.raises(extract.Stop, match="--model eat"):
        extract.find_checkpoint("sslam", file)
    with pytest.raises(extract.Stop, match="eat-c.pt cannot be read"):
        extract.Encoder("eat")  # without a file, the official one, not random weights
