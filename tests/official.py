"""Synthetic checkpoints under the official key names, and the waveform of encoders_golden.json.

For each key the weights are RandomState(crc32(key)) noise, scaled by the rules in `scaled`, so that
anybody can write the same file and compare an encoder with the recorded outputs of the official
implementations (tests/assets/encoders_golden.json)."""

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
    raw = np.random.RandomState(zlib.crc32(key.encode()) & 0xffffffff).standard_normal(
        int(np.prod(shape)))
    return raw.astype(np.float32).reshape(shape)


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


def blocks(prefix="", depth=DEPTH, D=D):
    shapes = {}
    for i in range(depth):
        for name, shape in {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D),
                            "norm2": (D,), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}.items():
            shapes[f"{prefix}blocks.{i}.{name}.weight"] = shape
            shapes[f"{prefix}blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def shapes(family, depth=DEPTH, D=D, rows=513):
    """{official key: shape} of one checkpoint; family amae, asit, beats, dasheng or eat."""
    if family in ("amae", "asit"):
        return {"cls_token": (1, 1, D), "pos_embed": (1, rows, D),
                "patch_embed.proj.weight": (D, 1, 16, 16), "patch_embed.proj.bias": (D,),
                **blocks(depth=depth, D=D), "norm.weight": (D,), "norm.bias": (D,)}
    if family == "eat":
        return {"model.local_encoder.proj.weight": (D, 1, 16, 16),
                "model.local_encoder.proj.bias": (D,), "model.extra_tokens": (1, 1, D),
                "model.fixed_positional_encoder.positions": (1, 6144, D),
                "model.pre_norm.weight": (D,), "model.pre_norm.bias": (D,),
                **blocks("model.", depth, D)}
    if family == "dasheng":
        return {"time_pos_embed": (1, D, 1, 252), "freq_pos_embed": (1, D, 1, 1),
                **{f"init_bn.1.{k}": (64,) for k in ("weight", "bias", "running_mean",
                                                     "running_var")},
                "patch_embed.proj.weight": (D, 1, 64, 4), "patch_embed.proj.bias": (D,),
                **blocks(depth=depth, D=D), "norm.weight": (D,), "norm.bias": (D,)}
    out = {"post_extract_proj.weight": (D, 512), "post_extract_proj.bias": (D,),
           "patch_embedding.weight": (512, 1, 16, 16), "layer_norm.weight": (512,),
           "layer_norm.bias": (512,), "encoder.pos_conv.0.bias": (D,),
           "encoder.pos_conv.0.weight_g": (1, 1, 128),
           "encoder.pos_conv.0.weight_v": (D, D // 16, 128), "encoder.layer_norm.weight": (D,),
           "encoder.layer_norm.bias": (D,)}
    for i in range(depth):
        at = f"encoder.layers.{i}."
        out[at + "self_attn.grep_a"] = (1, D // 64, 1, 1)
        out[at + "self_attn.relative_attention_bias.weight"] = (320, D // 64)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out[at + f"self_attn.{name}.weight"] = (D, D)
            out[at + f"self_attn.{name}.bias"] = (D,)
        out[at + "self_attn.grep_linear.weight"] = (8, 64)
        out[at + "self_attn.grep_linear.bias"] = (8,)
        for name, shape in {"self_attn_layer_norm": (D,), "fc1": (4 * D, D), "fc2": (D, 4 * D),
                            "final_layer_norm": (D,)}.items():
            out[at + name + ".weight"], out[at + name + ".bias"] = shape, shape[:1]
    return out


def state(family, **sizes):
    """{official key: float32 tensor}."""
    out = {k: torch.from_numpy(np.asarray(scaled(k, s), np.float32))
           for k, s in shapes(family, **sizes).items()}
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
