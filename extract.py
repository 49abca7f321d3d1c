"""Encode a dataset with a frozen audio encoder and store its patch tokens on disk.

Paper: "Unmute the Patch Tokens" (ICLR 2026, arXiv 2509.24901), section 3: every clip passes through
the frozen encoder once, without augmentation, and its last-layer token map is kept.

Reads    datasets.txt and data/<data>/ (audio and tables as unpacked, or your manifest.csv)
Writes   tokens/<data>/<model>/: clips.csv, classes.txt, meta.json, checks.npy, events.csv if known,
         tokens.npy  float16 (clips, N, D), N = T*F patch tokens, time-major: n = t*F + f
         cls.npy     float16 (clips, D), [cls], or the mean token where the encoder has none
         labels.npy  uint8 (clips, C) multi-hot;  state.npy  uint8: 0 to do, 1 done, 2 unreadable

    python tests/demo.py && python extract.py     # log-mel patches of the demo, no download
    python extract.py --model eat --data esc50    # any encoder, any line of datasets.txt
    torchrun --nproc_per_node=8 extract.py --model eat --data fsd50k

Kill it at any time; the same command resumes. Given the same random weights, tokens match those of
the official code to 1e-5. Constants are marked [official code], [ours], or [?], a guess.
"""

import argparse
import collections
import concurrent.futures
import csv
import functools
import glob
import hashlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

# Otherwise idle OpenMP threads spin: on a busy machine, extraction takes 3 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

# ---- constants: what, unit, source

RATE = 16000                         # Hz, mono [official code]; [?] ASiT's own code says 32000
FRAME, HOP, FFT = 400, 160, 512      # samples: 25 ms, 10 ms, next power of two [official code]
LOG_FLOOR = 1.1920928955078125e-07   # float32 epsilon, kaldi's floor before the log [official code]
CHUNK = 1008                         # frames Dasheng encodes at once, 252 tokens [official code]
STEP = 32                            # EAT, ASiT: frames are rounded up to a multiple of it [ours]
BLOCK = {"cpu": 8, "cuda": 64}       # 10 s clips in a batch, also the unit of resuming [ours]
WRITERS = 3                          # threads that write, each a part of a block [ours]
MAX_BAD = 0.01                       # accepted share of missing or unreadable clips [ours]
UNEVEN = 2000                        # largest rate / gcd(rate, RATE): kernels grow with it [ours]
AUDIO = ".wav", ".flac", ".ogg", ".mp3"  # also tried in place of a missing file [ours]
SPLITS = {"training": "train", "dev": "train", "val": "valid", "validate": "valid",
          "validation": "valid", "eval": "test", "evaluation": "test", "testing": "test",
          "train": "train", "valid": "valid", "test": "test"}  # one spelling per split [ours]
HUB = "https://huggingface.co"       # HF_ENDPOINT overrides it, as in Hugging Face's own tools
AMAE = "gaunernst/vit_base_patch16_1024_128.audiomae_as2m"
BEATS, EAT = "lpepino/beats_ckpts/BEATs_iter3", "worstchan/EAT-base_epoch30"
Model = collections.namedtuple("Model", "family file sha256")

# file: repository and name on HUB [official code]; sha256: of the file, its first 16 digits, "" if
# none is published. [?] which BEATs, A-MAE+ (AS-20k or AS-2M) and EAT (epoch 30 or 10) the paper
# used. beats_iter3 is in a co-author's code; BEATs comes from a mirror, as its official links need
# a browser. A new family also needs NORM, IGNORED, RENAMES, to_common and its switches in ViT and
# Encoder; for anything but a ViT, bring its tokens instead (README, Your own encoder).
MODELS = {
    "logmel": Model("logmel", "", ""),  # 16 x 16 patches of the log-mel, no network [ours]
    "random": Model("eat", "", ""),     # EAT without pretraining [ours]
    "amae": Model("amae", AMAE + "/pytorch_model.bin", ""),
    "amae+": Model("amae", AMAE + "_ft_as20k/pytorch_model.bin", ""),
    "asit": Model("asit", "", ""),   # [?] a cloud drive only
    "asit+": Model("asit", "", ""),  # [?] no public file found
    "beats": Model("beats", BEATS + "_plus_AS2M.pt", "d43cbfad4d7b5638"),
    "beats_iter3": Model("beats", BEATS + ".pt", "8d1b234032a9ccff"),
    "beats+": Model("beats", BEATS + "_finetuned_on_AS2M_cpt1.pt", "379369a41d0b3749"),
    "dasheng": Model("dasheng", "mispeech/dasheng-base/model.safetensors", ""),
    "eat": Model("eat", EAT + "_pretrain/model.safetensors", "8623072d09aac4f3"),
    "eat+": Model("eat", EAT + "_finetune_AS2M/model.safetensors", ""),
    "sslam": Model("eat", "ta012/SSLAM_pretrain/model.safetensors", "8ec670adb241c710"),
    "sslam+": Model("eat", "ta012/SSLAM_AS2M_Finetuned/model.safetensors", "")}
# (mean, std) of the normalization (x - mean) / (2 std); Dasheng has a batch norm [official code]
NORM = {"beats": (15.41663, 6.55582), "eat": (-4.268, 4.569),
        **dict.fromkeys(("amae", "asit", "logmel"), (-4.2677393, 4.5689974))}


class Stop(Exception):
    """A user error: its message is printed and the script exits with status 2."""


# ---- waveform -> spectrogram (time-major), batched, on any device
#
# Shapes: B clips, T time steps, F frequency bands, N = T*F tokens, D token width, L = N plus [cls].

def mel_filters(kind):
    """torchaudio's filters (257, mels): "kaldi", 128 mels above 20 Hz, or "htk", 64 above 0 Hz."""
    torch.set_default_dtype(torch.float64)  # float32 would be off by 1e-5
    bins, _ = torchaudio.compliance.kaldi.get_mel_banks(128, FFT, RATE, 20, 0, 100, -500, 1)
    htk = torchaudio.functional.melscale_fbanks(257, 0.0, 8000.0, 64, RATE)
    torch.set_default_dtype(torch.float32)
    return (htk if kind == "htk" else F.pad(bins, (0, 1)).T).float()         # bins (128, 256)

def kaldi_fbank(waves, filters, povey=False):
    """Log-mel as torchaudio.compliance.kaldi.fbank with 128 bins: (B, samples) -> (B, T, 128),
    T = 1 + (samples - 400) // 160. Window: symmetric Hann, to the power 0.85 for povey."""
    frames = waves.unfold(-1, FRAME, HOP)                                    # (B, T, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)              # x[-1] := x[0]
    window = torch.hann_window(FRAME, periodic=False, device=waves.device)
    frames = (frames - 0.97 * before) * (window ** 0.85 if povey else window)
    power = torch.view_as_real(torch.fft.rfft(frames, FFT)).square().sum(-1)  # (B, T, 257)
    return (power @ filters).clamp(LOG_FLOOR).log()

def decibel_mel(waves, filters):
    """Dasheng's 64 mel bins in dB: (B, samples) -> (B, 1 + samples // 160, 64). The floor, 120 dB
    below the peak, is per clip: AmplitudeToDB's is per batch, so clips would affect each other."""
    window = torch.hann_window(FFT, device=waves.device)
    spec = torch.stft(waves, FFT, HOP, window=window, pad_mode="reflect", return_complex=True)
    power = torch.view_as_real(spec).square().sum(-1).transpose(1, 2)        # (B, T, 257)
    mel = 10 * (power @ filters).clamp(1e-10).log10()
    return torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 120)


# ---- spectrogram -> tokens: one ViT for all the encoders

class Block(torch.nn.Module):
    """Transformer block over (B, L, D): pre-norm, or post-norm with the residual weighted by alpha.
    With a relative bias, attention has BEATs' gate per head and query."""

    def __init__(self, D, heads, hidden, post, alpha, eps, relative):
        super().__init__()
        self.heads, self.post, self.alpha = heads, post, alpha
        self.norm1, self.norm2 = torch.nn.LayerNorm(D, eps), torch.nn.LayerNorm(D, eps)
        self.qkv, self.proj = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D)
        self.fc1, self.fc2 = torch.nn.Linear(D, hidden), torch.nn.Linear(hidden, D)
        if relative:
            self.grep = torch.nn.Linear(D // heads, 8)
            self.grep_a = torch.nn.Parameter(torch.ones(1, heads, 1, 1))

    def attention(self, x, bias):                                            # bias (H, L, L)
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, d)
        if bias is not None:
            a, b = self.grep(q).view(B, self.heads, L, 2, 4).sum(-1).sigmoid().unbind(-1)
            gate = a * (b * self.grep_a[..., 0] - 1) + 2                     # (B, H, L)
            bias = gate.to(q.dtype)[..., None] * bias.to(q.dtype)            # (B, H, L, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))

    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact GELU (erf)

    def forward(self, x, bias):
        if self.post:  # without a product where alpha is 1: it would only copy x
            x = self.norm1((x if self.alpha == 1 else self.alpha * x) + self.attention(x, bias))
            return self.norm2((x if self.alpha == 1 else self.alpha * x) + self.mlp(x))
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))

class ViT(torch.nn.Module):
    """All encoders: (B, T, mels) -> tokens (B, N, D), cls (B, D) or None. Sizes come from a state
    of `to_common` (KeyError if it lacks one), the rest from family. norm=False: no final norm."""

    def __init__(self, state, family, norm=True):
        super().__init__()
        width, _, *patch = state["patch.weight"].shape
        hidden, D = state["blocks.0.fc1.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        heads = D // (80 if D == 1280 else 64)  # 1280: Dasheng 0.6B [official code]
        self.beats, self.post = family == "beats", family in ("beats", "eat")
        eps, alpha = (1e-5, (2 * depth) ** 0.25) if self.beats else (1e-6, 1)  # alpha: DeepNorm
        self.patch = torch.nn.Conv2d(1, width, patch, patch, bias=not self.beats)
        if self.beats:
            self.stem = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, D))
            _, group, taps = state["conv_pos.weight"].shape
            self.conv_pos = torch.nn.Conv1d(D, D, taps, padding=taps // 2, groups=D // group)
            self.rel_bias = torch.nn.Parameter(torch.empty(320, heads))  # see rel_bucket
        else:
            self.pos = torch.nn.Parameter(torch.empty(len(state["pos"]), D))
        self.cls = torch.nn.Parameter(torch.empty(D)) if "cls" in state else None
        self.norm = torch.nn.LayerNorm(D, eps) if norm else torch.nn.Identity()
        self.blocks = torch.nn.ModuleList(
            Block(D, heads, hidden, self.post, alpha, eps, self.beats) for _ in range(depth))

    def forward(self, spec):
        x, bias = self.patch(spec[:, None]).flatten(2).transpose(1, 2), None  # (B, N, D), n = t*F+f
        if self.beats:  # one relative position bias for all blocks
            x = self.stem(x)
            conv = self.conv_pos(x.transpose(1, 2))[..., :-1]  # an even kernel adds one step
            x = x + F.gelu(conv).transpose(1, 2)
            bias = self.rel_bias[rel_bucket(x.shape[1], x.device)].permute(2, 0, 1).contiguous()
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)            # (B, 1+N, D)
        if not self.beats:
            x = x + self.pos[:x.shape[1]]
        x = self.norm(x) if self.post else x  # before block 0 (post) or after the last one (pre)
        for block in self.blocks:
            x = block(x, bias)
        x = x if self.post else self.norm(x)
        return (x, None) if self.cls is None else (x[:, 1:], x[:, 0])

@functools.lru_cache(maxsize=2)
def rel_bucket(L, device):
    """(L, L) bucket of j - i: exact below 80, logarithmic up to 800 [official code: BEATs cfg]."""
    r = torch.arange(L)[None, :] - torch.arange(L)[:, None]
    a = r.abs()
    log = 80 + (a.clamp(1) / 80).log().div(math.log(800 / 80)).mul(80).long()
    return (torch.where(a < 80, a, log.clamp(max=159)) + 160 * (r > 0)).to(device)  # r > 0: 160-319


# ---- checkpoint -> ViT

IGNORED = {  # heads, decoders and buffers that the tokens do not need
    "amae": r"mask_token|decoder_|fc_norm\.|head\.", "asit": r"head_cls\.|head_recons\.|mlp_head\.",
    "beats": r"predictor\.", "dasheng": r"front_end\.|outputlayer\.|.*num_batches_tracked",
    "eat": r"decoder\.|recon_proj\.|shared_decoder\.|_ema|fc_norm\.|head\."}
RENAMES = [  # official key -> ours, in this order. The first removes wrappers, which may nest, but
    # not BEATs' own "encoder."; rel_bias is the same in all blocks
    (r"^((module|backbone|v|model|modality_encoders\.IMAGE|encoder(?!\.layer|\.pos_conv))\.)*", ""),
    (r"^(patch_embed\.proj|local_encoder\.proj|patch_embedding)\.", "patch."),
    (r"^(cls_token|extra_tokens)$", "cls"),
    (r"^(pos_embed|fixed_positional_encoder\.positions)$", "pos"),
    (r"^(pre_norm|context_encoder\.norm|encoder\.layer_norm)\.", "norm."),
    (r"^layer_norm\.", "stem.0."), (r"^post_extract_proj\.", "stem.1."),
    (r"^encoder\.pos_conv\.0\.", "conv_pos."), (r"^init_bn\.(1\.)?", "bn."),
    (r"^encoder\.layers\.", "blocks."), (r"\.(attn|self_attn|mlp)\.", "."),
    ("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2"), ("out_proj", "proj"),
    ("grep_linear", "grep"), (r".*\.relative_attention_bias\..*", "rel_bias")]

def read_checkpoint(file):
    """{key: tensor} of a .safetensors file or a torch pickle (weights only: tensors, plain
    containers, argparse.Namespace and PosixPath; nothing that runs code)."""
    if file.endswith(".safetensors"):
        return safetensors.torch.load_file(file)
    kinds = [argparse.Namespace, (pathlib.PosixPath, "pathlib.PosixPath")]
    with torch.serialization.safe_globals(kinds):
        state = torch.load(file, map_location="cpu", weights_only=True)
    state = next((state[key] for key in ("model", "teacher", "state_dict")
                  if isinstance(state.get(key), dict)), state)
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}  # drops EAT's _ema

def to_common(state, family):
    """Official keys and layouts -> the ViT's: fused qkv, cls (D,), pos (rows, D), [cls] first,
    time-major patch kernels, weight norm folded in. KeyError or ValueError: another family's."""
    if (family == "eat") != any("extra_tokens" in key for key in state):
        raise ValueError("EAT and SSLAM have extra_tokens, the others do not")
    out = {}
    for key, value in state.items():
        for old, new in RENAMES:
            key = re.sub(old, new, key)
        if not re.match(IGNORED[family], key):
            out[key] = value.float()
    if family in ("amae", "asit", "eat"):
        out["cls"], out["pos"] = out["cls"].flatten(), out["pos"][0]         # (D,), (rows, D)
    if family == "eat":  # official EAT adds no position to [cls]
        out["pos"] = F.pad(out["pos"], (0, 0, 1, 0))
    if family == "dasheng":
        out["pos"] = (out.pop("time_pos_embed") + out.pop("freq_pos_embed"))[0, :, 0].T
        out["patch.weight"] = out["patch.weight"].transpose(2, 3)            # (D, 1, 4, 64)
    if family == "beats":
        g, v = out.pop("conv_pos.weight_g"), out.pop("conv_pos.weight_v")
        out["conv_pos.weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)    # weight norm
        for key in [k for k in out if ".q_proj." in k]:
            qkv = [out.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            out[key.replace("q_proj", "qkv")] = torch.cat(qkv)
    return out

def random_state():
    """EAT-base with seeded random weights, in common keys: the baseline without pretraining [ours].
    Positions are EAT's fixed sin-cos rows (t * 8 + f), the first half of the columns for f."""
    D, g, out = 768, torch.Generator().manual_seed(0), {}
    n = torch.arange(6144)
    angle = torch.stack([n % 8, n // 8], 1)[..., None] * 10000 ** -(torch.arange(D // 4) / (D // 4))
    rows = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)               # (6144, D)
    block = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D),
             "norm1": (D,), "norm2": (D,)}
    blocks = {f"blocks.{i}.{k}.weight": shape for i in range(12) for k, shape in block.items()}
    shapes = {"patch.weight": (D, 1, 16, 16), "cls": (D,), **blocks, "norm.weight": (D,)}
    for key, shape in shapes.items():
        out[key.replace("weight", "bias")] = torch.zeros(shape[0])           # [cls] has none
        out[key] = torch.ones(D) if "norm" in key else 0.02 * torch.randn(shape, generator=g)
    return out | {"pos": F.pad(rows, (0, 0, 1, 0))}

def resize_rows(pos, T):
    """ASiT's learned positions for T time steps: the middle of the table, or bilinear between
    its rows where the clip is longer [as in AST, from a description]; row 0 is [cls]'s."""
    rows = pos[1:].T.reshape(1, pos.shape[1], -1, 8)                         # (1, D, T0, 8)
    if T > rows.shape[2]:
        rows = F.interpolate(rows, (T, 8), mode="bilinear")
    first = rows.shape[2] // 2 - T // 2
    return torch.cat([pos[:1], rows[0, :, first:first + T].flatten(1).T])


# ---- the encoder

class Encoder:
    """Frozen encoder for clips of one length: encoder(waves (B, samples)) -> tokens (B, N, D),
    cls (B, D) or None, N = T*F, tokens time-major. Attributes: grid (T, F), dim, has_cls,
    token_seconds, device. Without a file, it downloads the official one. Raises Stop for a wrong
    checkpoint and for clips too short or too long. Input length [official code]: A-MAE always 1024
    frames; EAT, SSLAM and ASiT the clip's frames rounded up to a multiple of STEP (1024 for 10 s,
    512 for 5 s, 128 for 1 s); BEATs and logmel the clip's frames; Dasheng chunks of CHUNK. Padding
    is 0 in log-mel before normalizing, as upstream. Time steps that cover only padding are dropped,
    except the 64th of a 10 s clip, part of the paper's 64 x 8 map."""

    def __init__(self, model, file=None, seconds=10.0, device="cpu", precision="fp32"):
        self.family, self.device, self.half = MODELS[model].family, device, precision == "fp16"
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in convolutions too
        samples = round(seconds * RATE)
        frames = 1 + (samples - FRAME) // HOP
        padded = -(-frames // STEP) * STEP
        self.frames = {"amae": 1024, "eat": padded, "asit": padded}.get(self.family, frames)
        T = 64 if padded == 1024 else -(-frames // 16)
        self.grid, self.token_seconds = (min(T, self.frames // 16), 8), 0.16
        if self.family == "dasheng":
            self.grid, self.token_seconds = ((1 + samples // HOP) // 4, 1), 0.04
        self.filters = mel_filters("htk" if self.family == "dasheng" else "kaldi").to(device)
        self.dim, self.has_cls, self.vit, limit = 256, False, None, math.inf
        if self.family != "logmel":
            self.load(model, file or find_checkpoint(model, None)[0])
            self.dim, self.has_cls = len(self.vit.blocks[0].norm1.weight), self.vit.cls is not None
            limit = (len(self.vit.pos) - 1) // 8 * 16 if self.has_cls else math.inf
        if self.grid[0] < 1 or samples < FFT or max(frames, self.frames) > limit:
            bound = "too short" if frames < 16 else f"longer than {limit / 100:g} s, too long"
            raise Stop(f"clips of {seconds:g} s are {bound} for {model}; see datasets.txt")

    def load(self, model, file):
        """Set vit, and Dasheng's scale and shift (64,). file: None for random. Raises Stop."""
        try:
            state = to_common(read_checkpoint(file), self.family) if file else random_state()
            if self.family == "asit":
                state["pos"] = resize_rows(state["pos"], self.frames // 16)
            if self.family == "dasheng":  # its batch norm, in eval mode, (64,) each
                scale = state.pop("bn.weight") / (state.pop("bn.running_var") + 1e-5).sqrt()
                shift = state.pop("bn.bias") - state.pop("bn.running_mean") * scale
                self.scale, self.shift = scale.to(self.device), shift.to(self.device)
            with torch.device("meta"):  # A-MAE+ was fine-tuned without the last norm
                self.vit = ViT(state, self.family, norm=model != "amae+")
            self.vit.load_state_dict(state, assign=True)
        except Exception as e:  # damaged files and those of other models raise different errors
            raise Stop(f"{file} cannot be read as a checkpoint of {model} ({type(e).__name__}: "
                       f"{' '.join(str(e).split('. ')[0].split())[:200]}); check --model and "
                       f"--checkpoint, or download it again")
        self.vit.eval().requires_grad_(False).to(self.device)
        if self.half:  # once, or autocast would do it in every batch
            for module in self.vit.modules():
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
                    module.half()

    def spectrogram(self, waves):
        """(B, samples) -> the network's input, normalized (B, frames, mels), fp32."""
        if self.family == "dasheng":
            return decibel_mel(waves, self.filters) * self.scale + self.shift
        if self.family == "beats":
            spec = kaldi_fbank(waves * 2 ** 15, self.filters, povey=True)
        else:
            spec = kaldi_fbank(waves - waves.mean(-1, keepdim=True), self.filters)
        spec = F.pad(spec, (0, 0, 0, self.frames - spec.shape[1]))
        mean, std = NORM[self.family]
        return (spec - mean) / (2 * std)

    def __call__(self, waves):
        return self.encode(self.spectrogram(waves.to(self.device)))

    @torch.inference_mode()
    def encode(self, spec):
        """What spectrogram returns -> tokens, cls."""
        if self.vit is None:  # logmel: a token is a 16 x 16 patch, flattened
            patches = F.unfold(spec[:, None], 16, stride=16).transpose(1, 2)
            return patches[:, :math.prod(self.grid)].contiguous(), None      # (B, T*8, 256)
        with torch.autocast(self.device, torch.float16, enabled=self.half):
            if self.family == "dasheng" and spec.shape[1] > CHUNK:
                parts = [F.pad(x, (0, 0, 0, CHUNK - x.shape[1])) for x in spec.split(CHUNK, 1)]
                tokens, cls = torch.cat([self.vit(x)[0] for x in parts], 1), None
            else:
                tokens, cls = self.vit(spec)
        return tokens[:, :self.grid[0] * self.grid[1]], cls

def find_checkpoint(model, file):
    """-> (path, {source, sha256}), or (None, None) for a model without weights. Downloads the
    official file into torch.hub's folder. Raises Stop."""
    source, official = file, MODELS[model]
    if model in ("logmel", "random"):
        if file:
            raise Stop(f"{model} has no weights; leave --checkpoint out")
        return None, None
    if not file and not official.file:
        raise Stop(f"{model} cannot be downloaded (README, Encoders); give --checkpoint its file")
    if not file:
        repository, name = official.file.rsplit("/", 1)
        source = f"{HUB}/{repository}/resolve/main/{name}"
        file = os.path.join(torch.hub.get_dir(), "checkpoints", f"{model}-{name}")
        if not os.path.exists(file):
            download(f"{source}#{official.sha256}", file)
    sha256 = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    for other, (_, _, known) in MODELS.items():  # EAT's and SSLAM's have the same keys and shapes
        if known and sha256.startswith(known) and other != model:
            raise Stop(f"{file}: this is the official checkpoint of {other}; use --model {other}")
    return file, {"source": source, "sha256": sha256}


# ---- audio -> waveform

resampler = functools.lru_cache(16)(torchaudio.transforms.Resample)  # each kernel is made only once

def read_wave(file, start, seconds):
    """float32 (seconds * RATE,) at most: mean of channels, resampled, cropped at the end. Raises
    ValueError, or soundfile's own errors, for what cannot be used."""
    with soundfile.SoundFile(file) as f:
        rate, first = f.samplerate, round(start * f.samplerate)
        if f.frames <= first:
            raise ValueError(f"the file ends at {f.frames / rate:.2f} s, before the clip starts")
        f.seek(first)
        wave = f.read(math.ceil(seconds * rate), dtype="float32", always_2d=True)
    if len(wave) < min(f.frames - first, seconds * rate) - 0.1 * rate or not len(wave):
        raise ValueError(f"only {len(wave) / rate:.2f} s of it could be decoded")
    if rate // math.gcd(rate, RATE) > UNEVEN:
        raise ValueError(f"unsupported sample rate of {rate} Hz; resample it to {RATE}")
    wave = torch.from_numpy(wave)                                            # (samples, channels)
    wave = wave @ torch.full(wave.shape[1:], 1 / wave.shape[1])  # mean(1), 7 times as fast
    if not wave.sum().isfinite():
        raise ValueError("it contains NaN or infinite samples")
    return (wave if rate == RATE else resampler(rate, RATE)(wave))[:round(seconds * RATE)]

def read_block(root, clips, seconds, pin, rows):
    """waves (B, samples), failed {row: reason}. Shorter clips are zero-padded [ours; most official
    code pads the log-mel]. An unreadable clip becomes silence: its batch is unaffected."""
    waves, failed = torch.zeros(len(rows), round(seconds * RATE)), {}
    for i, row in enumerate(rows):
        try:
            wave = read_wave(os.path.join(root, clips[row].path), clips[row].start, seconds)
            waves[i, :len(wave)] = wave
        except (ValueError, RuntimeError, OSError, EOFError, TypeError) as e:
            failed[row] = " ".join(str(e).split()) or type(e).__name__
    return waves.pin_memory() if pin else waves, failed

def in_order(pool, function, items, ahead):
    """Yield function(item) for each item, in order; the pool computes up to `ahead` items early."""
    jobs = collections.deque()
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) > ahead:
            yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()

def one_core(device):
    """Thread initializer: one torch thread, and this rank's GPU."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)


# ---- datasets
#
# A reader is named after its dataset and yields (path below root, split, labels[, start, (onset,
# offset)]) from the unpacked tables; an unknown time is "". The path "**/name" is a file anywhere.
# A repeated clip keeps its first split and gains labels. A path of None only adds classes.

def table(file, columns, *optional, header=True):
    """Rows of a .csv (commas) or any other file (tabs), without # comment lines: the columns "a,b"
    and optional ones ("" if missing). Without a header, the file has just these. Raises Stop."""
    columns = columns.split(",")
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(("\n" if line.startswith("#") else line for line in lines),
                          delimiter="," if file.endswith(".csv") else "\t", skipinitialspace=True)
        try:  # comments and blank lines are empty rows
            names = [name.strip() for name in next(filter(None, rows), [])] if header else columns
            for row in filter(None, rows):
                if len(row) != len(names) or any(names.count(name) != 1 for name in columns):
                    raise ValueError(f"row {str(row)[:200]} does not match the header; it needs "
                                     f"{columns}, and cells with commas need quotes")
                row = dict(zip(names, row))
                yield [row.get(name, "").strip() for name in (*columns, *optional)]
        except (ValueError, csv.Error) as e:
            raise Stop(f"{file}:{rows.line_num}: {e}; fix the line, and save the file as UTF-8")

def drawn(name):
    """A split by hash of the name, the same on every machine: 70 % train, 30 % test [ours]."""
    return "train" if int(hashlib.md5(name.encode()).hexdigest()[:8], 16) < 0.7 * 2**32 else "test"

def own(root, seconds):
    """The default: manifest.csv, labels joined with ; or, without one, every audio file below root,
    cut into clips, the last one zero-padded, all in split test, without labels. Raises Stop."""
    manifest = f"{root}/manifest.csv"
    if os.path.exists(manifest):
        for path, split, labels, start in table(manifest, "path,split,labels", "start"):
            yield path, split, labels.split(";"), start
        return
    for path in sorted(glob.glob("**", root_dir=root, recursive=True)):  # not .hidden files
        if path.lower().endswith(AUDIO):
            try:
                length = soundfile.info(os.path.join(root, path)).duration
            except (RuntimeError, UnicodeEncodeError):  # read_wave or read_clips will say why
                length = 0
            if length > 1e9:  # how libsndfile reports an unknown length
                raise Stop(f"{root}/{path} does not say how long it is; encode it again")
            for i in range(max(1, math.ceil(length / seconds - 1e-3))):  # drops 0.1 % of a clip
                yield path, "test", [], i * seconds

def as20k(root):
    names = dict(table(f"{root}/class_labels_indices.csv", "mid,display_name"))
    for part, folder, split in ("balanced_train", "bal_train", "train"), ("eval", "eval", "test"):
        for name, *_, mids in table(f"{root}/{part}_segments.csv", "id,from,to,mids", header=False):
            yield f"audio/{folder}/{name}.flac", split, [names.get(m, m) for m in mids.split(",")]

def fsd50k(root):
    for name, labels, split in table(f"{root}/FSD50K.ground_truth/dev.csv", "fname,labels,split"):
        yield f"FSD50K.dev_audio/{name}.wav", split, labels.split(",")
    for name, labels in table(f"{root}/FSD50K.ground_truth/eval.csv", "fname,labels"):
        yield f"FSD50K.eval_audio/{name}.wav", "test", labels.split(",")

def desed(root):
    for name, labels in table(f"{root}/metadata/train/weak.tsv", "filename,event_labels"):
        yield f"audio/train/weak/{name}", "train", labels.split(",")
    yield from desed_public(root, "validation/validation.tsv", "audio/validation", "valid")
    yield from desed_public(root, split="test")

def desed_public(root, tsv="eval/public.tsv", folder="audio/eval/public", split=None):
    for name, *times, label in table(f"{root}/metadata/{tsv}", "filename,onset,offset,event_label"):
        path = f"{folder}/{name}"
        yield path, split or drawn(path), [label], 0, times

def spass(root, merged={}):  # [?] the names of the time columns
    for file in sorted(glob.glob(f"{root}/?_MatrixLabels*.csv")):
        for name, label, *times in table(file, "audio_filename,class", "start (s)", "end (s)"):
            yield f"**/{name}", drawn(name), [merged.get(label, label)], 0, times

def spass28(root):
    """How 33 names become the paper's 28 is a guess [ours]: idling and moving are one, and so are
    buses and trucks, as in its makers' taxonomy. "Vwater" (boats) is not "water"."""
    vehicles = {"car": "car", "motorcycle": "motorcycle", "bus": "bus_truck", "truck": "bus_truck"}
    return spass(root, {f"{vehicle}_{does}": new for vehicle, new in vehicles.items()
                        for does in ("idling", "moving")})

def urban(root):
    for file in sorted(glob.glob(f"{root}/annotations/*/*.txt")):
        split, name = pathlib.Path(file).parts[-2:]
        for *times, label in table(file, "onset,offset,label", header=False):
            yield f"audio/{split}/{name[:-4]}.wav", split, [label], 0, times

def esc50(root):
    for name, fold, label in table(f"{root}/meta/esc50.csv", "filename,fold,category"):
        yield f"audio/{name}", fold, [label]

def sc2(root):
    for file, split in (("testing_list.txt", "test"), ("validation_list.txt", "valid")):
        for path, in table(f"{root}/{file}", "path", header=False):
            yield path, split, [path.split("/")[0]]
    for path in sorted(pathlib.Path(root).glob("[a-z]*/*.wav")):  # listed files keep their split
        yield "/".join(path.parts[-2:]), "train", [path.parts[-2]]

def fsdd(root):
    for path in sorted(pathlib.Path(root).glob("recordings/*.wav")):
        digit, speaker, _ = path.stem.split("_")
        yield f"recordings/{path.name}", speaker, [digit]

def birdset(root):
    from pyarrow.parquet import read_table  # not needed by other datasets
    train, test = ([row for file in glob.glob(f"{root}/*_metadata_{split}.parquet")
                    for row in read_table(file).to_pylist()] for split in ("train", "test_5s"))
    yield None, None, {row["ebird_code"] for row in train}
    for row, start in few_shot(train, 64, 5, seed=1):
        yield f"**/{os.path.basename(row['filepath'])}", "train", [row["ebird_code"]], start
    for row in test:
        yield f"**/{os.path.basename(row['filepath'])}", "test", row["ebird_code_multilabel"] or []

def few_shot(rows, shots, seconds, seed):
    """Yield (row, start) by Bird-MAE's lenient k-shot rule, no fill-up. Of recordings up to 20 s
    without secondary species: the events of the most frequent cluster (the first of equals; -1,
    noise, only if it is the only event), except those inside another; one at random is primary. k
    primaries per species, else all, and others up to k [official code]. Clips are centered, where
    BirdSet takes a random 5 s, and equal ones count once: the same anywhere for a seed [ours]."""
    rng = random.Random(seed)
    species = collections.defaultdict(lambda: ([], []))  # (primaries, others)
    for row in sorted(rows, key=lambda row: row["filepath"]):
        length = float(row["length"] or 0)
        if length > 20 or row["ebird_code_secondary"]:
            continue
        clusters = row["event_cluster"] or []
        known = [cluster for cluster in clusters if cluster != -1 or len(clusters) == 1]
        first = max(sorted(known), key=known.count, default=None)
        events = [event for event, cluster in zip(row["detected_events"] or [], clusters)
                  if cluster == first] or [(0, seconds)]
        last = length - seconds if length else math.inf  # a length of 0 is not known
        starts = sorted({round(max(0, min((a + b - seconds) / 2, last)), 3) for a, b in events
                         if not any(c < a and b < d for c, d in events)})
        primary = rng.choice(starts)
        for start in starts:
            species[row["ebird_code"]][start != primary].append((row, start))
    for _, (primary, others) in sorted(species.items()):
        taken = rng.sample(primary, min(shots, len(primary)))
        yield from taken + rng.sample(others, min(shots - len(taken), len(others)))

READERS = {f.__name__: f for f in (as20k, fsd50k, desed, desed_public, spass, spass28, urban, esc50,
                                   sc2, fsdd)}
READERS |= dict.fromkeys("hsn nbp nes per pow sne uhh".split(), birdset)  # the paper's BirdSet
Clip = collections.namedtuple("Clip", "path start split labels")  # labels: a set

def read_clips(root, rows, task):
    """A reader's rows -> clips [Clip], missing {(path, start): split}, classes (sorted, of all
    rows: a missing file drops none), events [(path, onset, offset, label)]. Raises Stop."""
    clips, missing, classes, events, row = {}, {}, set(), [], "the first row"
    try:
        for row in rows:
            wanted, split, labels, start, span = (*row, 0, 0)[:5]  # span 0: no event
            labels = {label.strip() for label in labels} - {""}
            classes |= labels
            if wanted is None:
                continue
            split, start = SPLITS.get(split.lower(), split), float(start or 0)
            if not split or not 0 <= start < math.inf or re.search("[;\r\n]", "".join(labels)):
                raise ValueError("it needs a split, a start of 0 s or more and labels without ;")
            path = find_audio(root, wanted)
            if path is None:
                missing.setdefault((wanted, start), split)
                continue
            path.encode()  # raises for a name that is not UTF-8
            clips.setdefault((path, start), Clip(path, start, split, set())).labels.update(labels)
            onset, offset = (float(time or 0) for time in span or (0, 0))
            if not 0 <= onset <= offset < math.inf:
                raise ValueError("its event needs 0 <= onset <= offset, in seconds")
            events += [(path, onset, offset, x) for x in sorted(labels) if offset and span[0] != ""]
    except (ValueError, KeyError) as e:  # KeyError: a column of a parquet file
        raise Stop(f"{root}: {str(row)[:200]} cannot be used ({e}); fix the table")
    for clip in clips.values():
        if task == "single" and len(clip.labels) != 1:
            raise Stop(f"{root}: {clip.path} has the labels {sorted(clip.labels)}, but a 'single' "
                       f"dataset needs exactly one; fix the table, or make it 'multi'")
    return list(clips.values()), missing, sorted(classes), events

def find_audio(root, wanted):
    """Path below root, or None, trying other audio endings too. Raises Stop if two files match."""
    stem, ending = os.path.splitext(wanted)
    for name in [wanted, *(stem + other for other in AUDIO if ending in AUDIO)]:
        paths = files_by_name(root)[name[3:]] if name.startswith("**/") else [name]
        if len(paths) > 1:
            raise Stop(f"{root}: {paths[0]} and {paths[1]} both match {wanted}; remove one")
        if paths and os.path.isfile(os.path.join(root, paths[0])):
            return os.path.normpath(paths[0]).replace(os.sep, "/")

@functools.lru_cache(maxsize=1)
def files_by_name(root):
    found = collections.defaultdict(list)
    for path in glob.iglob("**", root_dir=root, recursive=True):  # not .hidden files
        found[os.path.basename(path)].append(path)
    return found

def read_datasets(file="datasets.txt"):
    """{name: (task, seconds, classes, urls)}. {01..03} in a URL counts up; without ://, a URL is
    relative to the last one; indented lines continue. Raises Stop with file:line."""
    sets, urls, text = {}, [], pathlib.Path(file).read_text("utf-8-sig", "replace")
    for row, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if words and not line[0].isspace():
            fits = re.fullmatch(r"\S+ (single|multi) \d+(\.\d+)? \d+", " ".join(words[:4]))
            if not fits or not float(words[2]) or words[0] in sets:
                raise Stop(f"{file}:{row}: {line!r} is not 'name single|multi seconds classes "
                           f"[URLs]' with a new name")
            name, task, seconds, classes, *words = words
            sets[name] = task, float(seconds), int(classes), (urls := [])
        for word in words:
            if "." not in word or not (urls or sets and "://" in word):
                raise Stop(f"{file}:{row}: {word} is not a URL; only URLs may be indented")
            word = urllib.parse.urljoin(urls[-1], word) if urls else word
            first, last = re.search(r"\{(\d+)\.\.(\d+)\}|$", word).groups()
            numbers = range(int(first), int(last) + 1) if first else [0]
            urls += [re.sub(r"\{.*\}", str(i).zfill(len(first or "")), word) for i in numbers]
    return sets


# ---- downloads

def download(url, file):
    """Fetch url, which may end in #<sha256>, into file, all or nothing. Raises Stop."""
    url, _, sha256 = url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/")).partition("#")
    print(f"downloading {url}", file=sys.stderr)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
        torch.hub.download_url_to_file(url, file + ".part", sha256 or None)
        if size and os.path.getsize(file + ".part") != size:  # torch.hub does not check
            raise OSError(f"{os.path.getsize(file + '.part'):,} of {size:,} bytes arrived")
    except Exception as e:  # network, disk or checksum
        raise Stop(f"{url}: {e}; run the same command again, or download it by hand to {file}")
    os.replace(file + ".part", file)

def fetch_dataset(root, urls):
    """Download and unpack the archives of a dataset. Root appears only when complete; if all is in
    one folder, that becomes root. Finished downloads survive a stop. Raises Stop."""
    parts, new = root + ".download", root + ".download/unpacked"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    files = {os.path.join(parts, re.sub("[?#].*", "", url).split("/")[-1]): url for url in urls}
    for file, url in files.items():
        if not os.path.exists(file):
            download(url, file)
    for file in files:
        print(f"unpacking {file}", file=sys.stderr)
        try:
            whole = file
            if file.endswith(".zip") and os.path.exists(file[:-3] + "z01"):  # a split zip
                whole = file[:-4] + ".whole.zip"  # q: quit, if zip asks for a missing part
                subprocess.run(["zip", "-qs", "0", file, "--out", whole], input=b"q\n", check=True)
            if whole.endswith((".zip", ".tar", ".tar.gz")):
                shutil.unpack_archive(whole, new, filter=None if whole.endswith("zip") else "data")
            elif not re.search(r"\.z\d\d$", file):
                shutil.copy(file, new)
        except Exception as e:  # every kind of archive has its own errors
            raise Stop(f"{file} cannot be unpacked ({e}); delete it, or all of {parts}, and retry, "
                       f"or unpack it into {root} by hand (split zips: zip -s 0 A.zip --out B.zip)")
    inside = glob.glob(f"{new}/*")
    os.rename(inside[0] if len(inside) == 1 and os.path.isdir(inside[0]) else new, root)
    shutil.rmtree(parts, ignore_errors=True)


# ---- the dump

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun's
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))

def open_dump(folder, meta, clips, classes, events):
    """Create the dump, all or nothing, or leave an existing one as it is. Raises Stop, naming what
    differs, if it has other settings; versions and the checkpoint's path may differ."""
    if os.path.exists(folder):
        def settings(meta):
            sha256 = meta["checkpoint"] and meta["checkpoint"]["sha256"]
            return meta | {"versions": None, "checkpoint": None, "sha256": sha256}
        try:
            file = "meta.json"
            old = settings(json.loads(pathlib.Path(folder, file).read_text("utf-8")))
            for file in ("tokens.npy", "cls.npy", "checks.npy", "state.npy"):
                np.load(f"{folder}/{file}", mmap_mode="r")
        except Exception as e:  # numpy and json have their own errors for damaged files
            raise Stop(f"{folder}/{file} is damaged ({str(e)[:200]}); --overwrite starts over")
        differ = [f"{key}: {old.get(key)}, now {value}" for key, value in settings(meta).items()
                  if old.get(key) != value]
        if differ:
            raise Stop(f"{folder} was extracted with other settings ({'; '.join(differ)}); "
                       f"use --overwrite to start over")
        return
    new, n = folder + ".new", len(clips)
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    np.save(f"{new}/labels.npy", np.uint8([[c in clip.labels for c in classes] for clip in clips]))
    np.save(f"{new}/state.npy", np.zeros(n, np.uint8))
    np.save(f"{new}/checks.npy", np.zeros((n, len(CHECKS))))
    for name, shape in (("cls", ()), ("tokens", (math.prod(meta["grid"]),))):
        np.lib.format.open_memmap(f"{new}/{name}.npy", "w+", np.float16, (n, *shape, meta["dim"]))
        if hasattr(os, "posix_fallocate"):  # reserve the space now: a full disk fails at once
            with open(f"{new}/{name}.npy", "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(f.name))
    for name, header, rows in (("clips", "path,start,split,labels", clip_rows(clips)),
                               ("events", "path,onset,offset,label", events)):
        if rows:
            with open(f"{new}/{name}.csv", "w", newline="", encoding="utf-8") as f:
                csv.writer(f, lineterminator="\n").writerows([header.split(","), *rows])
    pathlib.Path(new, "classes.txt").write_text("".join(f"{c}\n" for c in classes), "utf-8")
    pathlib.Path(new, "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    os.rename(new, folder)

def clip_rows(clips):
    return [(c.path, f"{c.start:.12g}", c.split, ";".join(sorted(c.labels))) for c in clips]

def write_rows(file, first, rows):
    """Write rows of a .npy file from row `first` on. Not through a memory map: machines that share
    a file system would overwrite each other's pages. Raises Stop if tokens overflow float16."""
    if not np.isfinite(rows).all():
        raise Stop(f"{file}: rows from {first} on overflow float16; check checkpoint and clips.csv")
    array = np.load(file, mmap_mode="r")
    with open(file, "r+b") as f:
        f.seek(array.offset + first * array.strides[0])
        f.write(np.ascontiguousarray(rows))

def save_part(folder, part, failed, arrays, done):
    """Write the rows `part` of a block (`failed`: zeros), then their bytes in state.npy: marked
    rows survive a kill, not a power cut. done: CUDA event to wait for, or None. Returns seconds."""
    if done:
        done.synchronize()
    begin = time.time()
    state = np.uint8([2 if row in failed else 1 for row in part])
    for name, array in arrays.items():
        array[state == 2] = 0
        write_rows(f"{folder}/{name}.npy", part[0], array)
    write_rows(f"{folder}/state.npy", part[0], state)
    return time.time() - begin

def fill_dump(folder, root, encoder, clips, seconds, most_bad):
    """Encode this rank's share of the blocks that are unfinished or have unreadable clips. Raises
    Stop if more than most_bad of these are unreadable."""
    size, gpu = max(1, int(BLOCK[encoder.device] * min(1, 10 / seconds))), encoder.device == "cuda"
    state = np.load(f"{folder}/state.npy")
    blocks = [range(i, min(i + size, len(clips))) for i in range(0, len(clips), size)]
    todo = [block for block in blocks[RANK::WORLD] if (state[block.start:block.stop] != 1).any()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(2, cores // LOCAL_WORLD - 3)  # leaves 3 for encoding and writing
    readers, writers = (concurrent.futures.ThreadPoolExecutor(
        n, initializer=one_core, initargs=(encoder.device,)) for n in (threads, WRITERS))
    read = functools.partial(read_block, root, clips, seconds, gpu)
    bar = tqdm(total=sum(map(len, todo)), unit="clip", mininterval=1 if sys.stderr.isatty() else 60)
    begin, writing, saving = time.time(), 0, collections.deque()
    with readers, writers, bar:
        for block, (waves, failed) in zip(todo, in_order(readers, read, todo, threads + 2)):
            for row, reason in failed.items():
                bar.write(f"unreadable: {clips[row].path} ({clips[row].start:g} s): {reason}",
                          file=sys.stderr)
            most_bad = refuse_bad(most_bad, [clips[row].path for row in failed])
            waves = waves.to(encoder.device, non_blocking=True)
            spec = encoder.spectrogram(waves)
            tokens, cls = encoder.encode(spec)
            arrays = {"tokens": tokens.half(),
                      "cls": (tokens.mean(1) if cls is None else cls).half(),
                      "checks": describe(waves, spec, tokens, encoder.grid)}
            # from CUDA into pinned memory, complete once `done` is reached
            arrays = {name: x.to("cpu", non_blocking=True).numpy() for name, x in arrays.items()}
            done = torch.cuda.current_stream().record_event(
                torch.cuda.Event(blocking=True)) if gpu else None
            n = math.ceil(len(block) / WRITERS)  # rows of a part
            for i in range(0, len(block), n):
                part = {name: array[i:i + n] for name, array in arrays.items()}
                saving.append(writers.submit(save_part, folder, block[i:i + n], failed, part, done))
            while len(saving) > 2 * WRITERS:  # two blocks may wait in memory
                writing += saving.popleft().result()
            bar.update(len(block))
        writing += sum(job.result() for job in saving)
    if writing > 0.9 * WRITERS * (time.time() - begin):
        written = bar.n * math.prod(encoder.grid) * encoder.dim * 2e-9
        print(f"the disk was the limit: {WRITERS * written / writing:.2f} GB/s written")

def refuse_bad(most_bad, paths):
    """How many more clips may be missing or unreadable after these. Raises Stop."""
    if len(paths) > most_bad:
        raise Stop(f"more than {MAX_BAD:.0%} of the clips are missing or unreadable, such as "
                   f"{', '.join(paths[:3])}; fix them, or use --allow-bad")
    return most_bad - len(paths)


# ---- the report

def print_report(clips, missing, state, classes):
    """One row per split. Prevalence: mean share of clips per class, the macro mAP of a constant."""
    print(f"{'split':>12} {'clips':>8} {'missing':>8} {'unreadable':>11} {'prevalence':>11}")
    for split in dict.fromkeys([*(clip.split for clip in clips), *missing.values()]):
        here = [(clip, s) for clip, s in zip(clips, state) if clip.split == split]
        good = [clip for clip, s in here if s == 1]
        labels = sum(len(clip.labels) for clip in good) / max(1, len(good) * len(classes))
        print(f"{split:>12} {len(good):8,} {list(missing.values()).count(split):8,} "
              f"{len(here) - len(good):11,} {labels:11.1%}")

# columns of checks.npy, filled by describe, read by examine: a new check changes all three
CHECKS = "audio peak flat zeros clipped high mean square change".split()

def describe(waves, spec, tokens, grid):
    """waves (B, samples), spec (B, T, mels), tokens (B, N, D) -> float64 (B, 9), see CHECKS. From a
    part of the values: 17 shares no factor with the number of mel bins or a usual tone's period."""
    some, spec = waves[:, ::17].contiguous(), spec.flatten(1)[:, ::17]
    maps, bits = tokens.unflatten(1, grid)[..., :4], some.view(torch.int32).long()
    factors = 1 + 2 * torch.arange(bits.shape[1], device=bits.device)        # odd
    frames = waves.unfold(1, FFT, FFT)[:, ::waves.shape[1] // FFT // 32 + 1]  # (B, <= 32, FFT)
    frames = frames * torch.hann_window(FFT, device=waves.device)
    power = torch.view_as_real(torch.fft.rfft(frames)).square().sum((1, 3))  # (B, 257)
    return torch.stack([figure.double() for figure in (
        (bits * factors).sum(1) % 2 ** 48,            # hash of the audio, small enough for float64
        some.abs().amax(1),                           # peak
        (some.diff().abs() < 1e-6).float().mean(1),   # share of values equal to the one before
        (some == 0).float().mean(1),                  # share of zeros
        (some.abs() > 0.999).float().mean(1),         # share at full scale, all channels mixed
        power[:, 160:].sum(1) / power[:, 2:].sum(1).clamp(1e-20),  # share of the power above 5 kHz
        spec.mean(1), spec.square().mean(1),          # of the normalized input
        # largest change of tokens over time; more than 0 if there is only one time step
        (maps.amax(1) - maps.amin(1)).amax((1, 2)) + (grid[0] == 1))], 1)

def examine(folder, root, clips, seconds, train_sd):
    """Print what looks wrong with the readable clips of a complete dump, and return it: {"input":
    mean and sd of the normalized input, what: number of clips}. The encoder was trained on a mean
    of 0 and train_sd. All limits are ours, wide enough for other domains. Raises Stop."""
    checks, cls, state = (np.load(f"{folder}/{name}.npy") for name in ("checks", "cls", "state"))
    rows = sorted(np.flatnonzero(state == 1), key=lambda row: checks[row, 0])  # copies side by side
    if not rows:
        raise Stop(f"{folder}: no clip could be read; see the reasons above")
    audio, peak, flat, zeros, clipped, high, mean, square, change = checks[rows].T
    clips, mean, flat = [clips[row] for row in rows], mean.mean(), flat > 0.99
    sd, same, dull = max(0, square.mean() - mean ** 2) ** 0.5, counts(audio), ~flat & (high < 1e-5)
    splits, paths = [clip.split for clip in clips], [clip.path for clip in clips]
    rate, length = np.full(len(rows), RATE), np.full(len(rows), seconds)
    for i in np.flatnonzero(dull | (zeros > 0.25)):  # does the file's header explain it?
        info = soundfile.info(os.path.join(root, paths[i]))
        rate[i], length[i] = info.samplerate, info.duration - clips[i].start
    padded = (1 - length / seconds).clip(min=0)
    found = {
        "silent: peak below -80 dB": peak < 1e-4,
        "constant: an offset without sound": flat & (peak >= 1e-4) & (zeros < 0.5),
        "clipped: over 0.1 % of the samples at full scale": clipped > 1e-3,
        "zeros: over 25 % of the clip, within the file": zeros - padded > 0.25,
        "padded: over 25 % of the clip, the file is shorter": padded > 0.25,
        "dull: nothing above 5 kHz, from a lower sample rate?": dull,
        "tokens that do not change over time": change == 0,
        "tokens of another clip": ~flat & (counts([hash(cls[row].tobytes()) for row in rows]) > 1),
        "audio of another clip": ~flat & (same > 1),
        "audio of another split": ~flat & (same > counts(list(zip(audio, splits)))),
        "recording also in another split": counts(paths) > counts(list(zip(paths, splits)))}
    usual = {  # unmarked: files of varying length; a low rate, unless it makes whole files too long
        "padded": not (counts(padded.round(2))[padded > 0.25] > len(rows) / 2).any(),
        "dull": dull.mean() > 0.5 and rate[dull].max() < 10000 and (
            np.median(length) <= seconds or any(clip.start for clip in clips))}
    odd = abs(mean) > 2 * train_sd or not train_sd / 4 < sd < 2 * train_sd
    print(f"{len(rows):8,} clips; input: mean {mean:.2f}, sd {sd:.2f}, in training 0 and {train_sd}"
          + ("  <- look at this" if odd else ""))
    for text, here in found.items():
        names = ", ".join(f"{clips[i].path} ({clips[i].start:g} s, {splits[i]})"
                          for i in np.flatnonzero(here)[:3])
        marked = names and not usual.get(text.split(":")[0])
        print(f"{here.sum():8,} {text}" + (f"  <- look at this: {names}" if marked else ""))
    return {"input": [round(float(mean), 3), round(float(sd), 3)],
            **{text.split(":")[0]: int(here.sum()) for text, here in found.items()}}

def counts(keys):  # how often each of them occurs
    times = collections.Counter(keys)
    return np.array([times[key] for key in keys])


# ---- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="logmel", choices=MODELS, help="default logmel")
    flag("--data", default="demo", metavar="NAME", help="a line of datasets.txt (default demo)")
    flag("--checkpoint", metavar="FILE", help="use these weights (default: the official ones)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    flag("--device", choices=devices, default=devices[-1], help="default: cuda if there is one")
    flag("--precision", choices=("fp32", "fp16"), help="default: fp16 on cuda, fp32 on cpu")
    flag("--allow-bad", action="store_true", help="accept more than 1 %% missing or unreadable")
    flag("--overwrite", action="store_true", help="discard an existing dump and start over")
    args = parser.parse_args()
    sets, root, folder = read_datasets(), f"data/{args.data}", f"tokens/{args.data}/{args.model}"
    if args.data not in sets:
        raise Stop(f"unknown dataset {args.data}; datasets.txt has {' '.join(sets)}")
    if args.overwrite and WORLD > 1:
        raise Stop(f"--overwrite works with one process only; delete {folder} and drop the flag")
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    while RANK and not os.path.exists(folder):  # rank 0 downloads and creates what is missing
        time.sleep(1)
    task, seconds, number, urls = sets[args.data]
    if not os.path.isdir(root):
        if not urls:
            raise Stop(f"{root} does not exist; see datasets.txt (demo: python tests/demo.py)")
        fetch_dataset(root, urls)
    rows = READERS[args.data](root) if args.data in READERS else own(root, seconds)
    clips, missing, classes, events = read_clips(root, rows, task)
    if os.path.exists(f"{root}/events.csv"):
        rows = table(f"{root}/events.csv", "path,onset,offset,label")
        rows = ((path, "-", [label], 0, times) for path, *times, label in rows)
        events = read_clips(root, rows, "multi")[3]
    if len(classes) != number or not clips:
        raise Stop(f"{root}: found {len(clips)} clips and {len(classes)} classes "
                   f"({', '.join(classes[:12])} ...), datasets.txt says {number}; fix one of them; "
                   f"without manifest.csv, clips are the {' '.join(AUDIO)} files, without classes")
    for path, _ in list(missing)[:3]:
        print(f"missing: {root}/{path}, one of {len(missing):,}", file=sys.stderr)
    most_bad = MAX_BAD * (len(clips) + len(missing)) if classes and not args.allow_bad else math.inf
    most_bad = refuse_bad(most_bad, [path for path, _ in missing])
    file, checkpoint = find_checkpoint(args.model, args.checkpoint)
    precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    encoder = Encoder(args.model, file, seconds, args.device, precision)
    digest = hashlib.md5(repr(clip_rows(clips)).encode()).hexdigest()[:12]
    meta = {"data": args.data, "model": args.model, "task": task, "grid": list(encoder.grid),
            "seconds": seconds, "token_seconds": encoder.token_seconds, "sample_rate": RATE,
            "dim": encoder.dim, "cls": "cls" if encoder.has_cls else "mean", "precision": precision,
            "checkpoint": checkpoint, "clips": f"{len(clips)}, md5 {digest}",
            "versions": {m.__name__: m.__version__ for m in (np, torch, torchaudio, soundfile)}}
    size = len(clips) * math.prod(encoder.grid) * encoder.dim * 2 / 1e9
    print(f"{args.model} on {args.data}: {len(clips):,} clips of {seconds:g} s, {encoder.grid[0]} "
          f"x {encoder.grid[1]} tokens of {encoder.dim}, {size:.2f} GB; {args.device}, {precision}")
    if args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    open_dump(folder, meta, clips, classes, events)
    fill_dump(folder, root, encoder, clips, seconds, most_bad)
    state = np.load(f"{folder}/state.npy")
    if state.all():
        print_report(clips, missing, state, classes)
        meta = json.loads(pathlib.Path(folder, "meta.json").read_text("utf-8"))  # keeps versions
        train_sd = 1 if encoder.family == "dasheng" else 0.5
        meta["examined"] = examine(folder, root, clips, seconds, train_sd)
        pathlib.Path(folder, f".meta.{RANK}").write_text(json.dumps(meta, indent=1), "utf-8")
        os.replace(f"{folder}/.meta.{RANK}", f"{folder}/meta.json")
        refuse_bad(most_bad, [clip.path for clip, how in zip(clips, state) if how == 2])
        print(f"complete: {folder}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stop, ImportError, OSError, soundfile.LibsndfileError, torch.OutOfMemoryError) as e:
        text = str(e) if isinstance(e, Stop) else (
            f"{re.split('[.]( |$)', str(e))[0]}; fix that and run the same command again to resume")
        print(f"extract.py: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("extract.py: stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
