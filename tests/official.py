"""Synthetic checkpoints under the official key names, and the waveform of encoders_golden.json.

Weights are RandomState(crc32(key)) noise, scaled by the rules in `scaled`, so that anybody can
write the same file and compare an encoder with those outputs of the official implementations."""

import zlib

import numpy as np
import torch

D, DEPTH = 768, 12

def waveform(seconds):
    """Tone bursts, a chirp and noise, float32 (16000 * seconds,)."""
    t = np.arange(16000 * seconds) / 16000
    x = (0.3 * np.sin(2 * np.pi * 440 * t) * (t % 2 < 1)
         + 0.1 * np.sin(2 * np.pi * (500 + 300 * t) * t)
         + 0.02 * np.random.RandomState(0).standard_normal(len(t)))
    return torch.from_numpy(x.astype(np.float32))

def noise(key, shape):
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)

def scaled(key, shape):
    if "relative_attention_bias" in key:  # one table, in every layer
        return noise("encoder.layers.0.self_attn.relative_attention_bias.weight", shape)
    n = noise(key, shape)
    if key.endswith("running_mean"):
        return 10 * n
    if key.endswith("running_var"):
        return 100 * (1 + 0.1 * np.abs(n))
    if key.endswith(("grep_a", "weight_g")) or (len(shape) == 1 and key.endswith("weight")):
        return 1 + 0.1 * n
    if key.endswith(("pos_embed", "cls_token", "extra_tokens")):
        return 0.2 * n
    if "patch_embed" in key or "local_encoder" in key:
        return 0.05 * n
    return 0.02 * n

def sincos(rows, columns, D=D):
    """(rows * columns, D): the first half of D encodes the column, the second the row."""
    def wave(p):
        angle = p[:, None] * 10000.0 ** (-np.arange(D // 4) / (D // 4))
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([wave(c), wave(r)], 1).astype(np.float32)

def affine(name, *shape):
    """The shapes of a weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

def blocks(prefix="", depth=DEPTH, D=D):
    shapes = {}
    for at in (f"{prefix}blocks.{i}." for i in range(depth)):
        shapes |= affine(at + "norm1", D) | affine(at + "norm2", D)
        shapes |= affine(at + "attn.qkv", 3 * D, D) | affine(at + "attn.proj", D, D)
        shapes |= affine(at + "mlp.fc1", 4 * D, D) | affine(at + "mlp.fc2", D, 4 * D)
    return shapes

def shapes(family, depth=DEPTH, D=D, rows=513):
    """{official key: shape} of one checkpoint; family amae, asit, beats, dasheng or eat."""
    if family in ("amae", "asit"):
        return {"cls_token": (1, 1, D), "pos_embed": (1, rows, D), **affine("norm", D),
                **affine("patch_embed.proj", D, 1, 16, 16), **blocks(depth=depth, D=D)}
    if family == "eat":
        return {"model.extra_tokens": (1, 1, D), **affine("model.pre_norm", D),
                "model.fixed_positional_encoder.positions": (1, 6144, D),
                **affine("model.local_encoder.proj", D, 1, 16, 16), **blocks("model.", depth, D)}
    if family == "dasheng":
        return {"time_pos_embed": (1, D, 1, 252), "freq_pos_embed": (1, D, 1, 1),
                **affine("init_bn.1", 64), "init_bn.1.running_mean": (64,),
                "init_bn.1.running_var": (64,), **affine("patch_embed.proj", D, 1, 64, 4),
                **blocks(depth=depth, D=D), **affine("norm", D)}
    out = {"patch_embedding.weight": (512, 1, 16, 16), "encoder.pos_conv.0.bias": (D,),
           "encoder.pos_conv.0.weight_g": (1, 1, 128),
           "encoder.pos_conv.0.weight_v": (D, D // 16, 128), **affine("layer_norm", 512),
           **affine("post_extract_proj", D, 512), **affine("encoder.layer_norm", D)}
    for at in (f"encoder.layers.{i}." for i in range(depth)):
        out |= {at + "self_attn.grep_a": (1, D // 64, 1, 1),
                at + "self_attn.relative_attention_bias.weight": (320, D // 64)}
        out |= affine(at + "self_attn.grep_linear", 8, 64)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= affine(at + f"self_attn.{name}", D, D)
        out |= affine(at + "self_attn_layer_norm", D) | affine(at + "final_layer_norm", D)
        out |= affine(at + "fc1", 4 * D, D) | affine(at + "fc2", D, 4 * D)
    return out

def state(family, **sizes):
    """{official key: float32 tensor}."""
    out = {key: torch.from_numpy(scaled(key, s)) for key, s in shapes(family, **sizes).items()}
    width = sizes.get("D", D)
    if family == "eat":
        rows = sincos(768, 8, width)
        out["model.fixed_positional_encoder.positions"] = torch.from_numpy(rows)[None]
    if family == "amae":  # the official table is laid out for 8 x 64
        rows = np.concatenate([np.zeros((1, width), np.float32), sincos(8, 64, width)])
        out["pos_embed"] = torch.from_numpy(rows)[None]
    if family == "dasheng":
        out["init_bn.1.num_batches_tracked"] = torch.tensor(7)
    return out
