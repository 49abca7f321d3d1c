"""Train pooling heads on the frozen tokens of a dump, with fixed hyperparameters.

Paper: "Unmute the Patch Tokens" (ICLR 2026, arXiv 2509.24901), section 3. A head turns the token
map of a clip into logits; protobin, the paper's head, takes the best cosine between any token and
each of its binary vectors. Test labels are never used: evaluate.py scores.

Reads    tokens/<data>/<model>/  tokens.npy float16 (clips, N, D), labels.npy uint8 (clips, C),
         clips.csv, classes.txt, meta.json, and where they exist cls.npy (clips, D), state.npy
Writes   runs/<data>/<model>/<pool>/seed<k>/  logits.npy float32 (tested clips, C), rows.npy int64
         (tested clips), head.pt, run.json; --evidence: evidence.npy float16 (tested clips, C, N);
         --frames: frames.npy (.., T, C); --apply: applied/<data>/<model>/<pool>/, scores and tracks

    python probe.py                                          # protobin on the newest dump
    python probe.py --pool linear,mhca,protobin --data esc50 --model eat
    python probe.py --apply runs/demo/logmel/protobin/seed0/head.pt --data field
"""

import argparse
import concurrent.futures
import csv
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from types import SimpleNamespace

# Idle OpenMP threads would spin, and on a busy machine a run would take 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

# ---- constants: what, unit, and source: [paper], [official code] or [ours]

EPOCHS = 30         # passes over the training clips [paper]
BATCH = 128         # clips [paper]
SEEDS = 5           # runs of a head [paper]
PROTOTYPES = {"as20k": 10}  # per class, by dataset; 20 for all others [paper]
GAMMA_NEG, GAMMA_POS, MARGIN = 4, 1, 0.05  # asymmetric loss [official code: Bird-MAE]; BAT: 1, 0, 0
DECAY = 1e-4        # weight decay, of linear layers and proto's weights; paper: 1e-5..5e-4 [ours]
WINDOW = 1.0        # seconds of tokens around a time step, see frames [ours]
TILE = {"cpu": 2 ** 19, "cuda": 2 ** 24}  # cosines held at once [ours]
MEMORY = 0.6        # share of a GPU's free memory that resident tokens may take [ours]
AHEAD = 3           # batches read ahead from the file for a GPU, in as many threads [ours]

# Peak learning rate of the cosine schedule [ours]. The paper searches one per head, encoder and
# dataset (1e-4..7e-3, prototype heads 2e-3..8e-2) but does not list it. These have the best macro
# mAP on valid, averaged over three datasets (conv: two); tests/BENCH.md has the tables.
LR = {"linear": 7e-3, "mean": 7e-3, "mlp": 1e-3, "linearc": 3e-3, "conv": 1e-3, "linpre": 1e-3,
      "abmilp": 7e-3, "simpool": 7e-3, "ep": 3e-3, "mhca": 3e-3, "proto": 8e-2,
      "protofloat": 5e-3, "protobin": 5e-3}
LR_K = 5  # protobin, protofloat: the rate is at most LR_K / K, but at least 2e-3, as one Adam step
          # moves a logit by about lr * K * mean score. Chosen at K = 200 to 10,000 [ours]


class Stop(Exception):
    """A user error: its message is printed and the script exits with status 2."""


# ---- heads: built as Head(D, C, grid, M); called as head(tokens (B, N, D), cls (B, D)) -> (B, C)
#
# grid is (T, F); cls is None without [cls]. evidence(tokens) -> (B, C, N), if a head has it: what
# each token added to each class's logit, so that logits - evidence.sum(-1) is equal for all clips.
# To copy a head, copy its class and bases (proto...: also MaxCos, half_product, TILE). To add one:
# a class, HEADS, LR; MEANS if it needs only the mean over time, (B, F, D). Heads proto... get M.

class MaxCos(torch.autograd.Function):
    """tokens (B, N, D), unit p (K, D) -> max_n cos(x_n, p_k) and its n, both (B, K).

    Exact, without a (B, N, K) tensor: a few clips at a time, keeping each prototype's best token;
    backward sums those tokens, dp_k = sum_b g_bk x_b,n(b,k) / |x|. Tokens get no gradient. float16
    tokens need p = +-1/sqrt(D): half times +-1, summed in float32, rounds no more than float32."""

    @staticmethod
    def forward(ctx, tokens, p):
        (N, D), K, half = tokens.shape[1:], len(p), tokens.dtype == torch.float16
        length = torch.linalg.vector_norm(tokens, dim=2, dtype=p.dtype).clamp(min=1e-12)  # (B, N)
        step, tiles = min(len(tokens), max(1, TILE[tokens.device.type] // (N * K))), []
        signs, memory = (p.sign().half(), None) if half else (None, p.new_empty(K * step * N))
        def product(x):  # (D, b*N) -> (K, b*N); on a CPU, new memory each time costs 10 % more
            return half_product(signs, x) if half else torch.mm(
                p, x, out=memory[:K * x.shape[1]].view(K, -1))
        for x, norm in zip(tokens.split(step), length.split(step)):
            tiles.append(product(x.flatten(0, 1).T).div_(norm.flatten()).view(K, -1, N).max(2))
        scores, places = (torch.cat(part, 1) for part in zip(*tiles))        # (K, B)
        ctx.save_for_backward(tokens, length, places)
        return (scores * D ** -0.5 if half else scores).T, places.T

    @staticmethod
    def backward(ctx, grad, _):
        tokens, length, places = ctx.saved_tensors
        weights, total = (grad / length.gather(1, places.T)).T, 0            # (K, B)
        step = 32 if tokens.dtype == torch.float16 else len(tokens)  # halves are copied to float32
        for x, n, weight in zip(tokens.split(step), places.split(step, 1), weights.split(step, 1)):
            n = n + x.shape[1] * torch.arange(len(x), device=x.device)
            total += nn.functional.embedding_bag(n, x.flatten(0, 1).to(grad.dtype), mode="sum",
                                                 per_sample_weights=weight.contiguous())
        return None, total

def half_product(a, b):
    """a @ b of float16 matrices, summed and returned in float32."""
    try:
        return torch.mm(a, b, out_dtype=torch.float32)
    except NotImplementedError:  # not on every device
        return a.float() @ b.float()

class ProtoBin(nn.Module):
    """Binarized prototypes, shared by all classes, K = M*C (the paper's head, section 3):

        s_k = max_n cos(x_n, sign(p_k)),  logits = W s + b

    sign(0) = 1, its gradient is the identity (straight-through), and normalizing comes after it.
    K*D + K*C + C parameters. [paper], checked against a co-author's code to 1e-13. With 527 classes
    the gradients come close to Adam's eps, which halves the prototypes' steps, as in that code."""

    def __init__(self, D, C, grid=None, M=20):
        super().__init__()
        self.prototypes = nn.Parameter(0.02 * torch.randn(M * C, D))
        self.linear = nn.Linear(M * C, C)
        self.register_buffer("score_mean", torch.zeros(M * C))  # running mean, for evidence

    def unit(self):
        p = self.prototypes
        sign = torch.where(p >= 0, 1.0, -1.0)  # torch.sign(0) is 0
        return nn.functional.normalize(sign + (p - p.detach()), dim=1)

    def similarity(self, tokens):
        """(B, N, D) -> scores (B, K) and the winning token's n (B, K)."""
        scores, places = MaxCos.apply(tokens, self.unit())
        if self.training:
            self.score_mean.lerp_(scores.detach().mean(0), 0.1)
        return scores, places

    def forward(self, tokens, cls=None):
        return self.linear(self.similarity(tokens)[0])

    def dense(self):
        return self.linear.weight.T                                          # (K, C)

    def evidence(self, tokens, cls=None):
        """The token that won prototype k is credited with W_ck (s_k - its mean in training)."""
        (scores, places), weight = self.similarity(tokens), self.dense()
        empty = weight.new_zeros(tokens.shape[1], weight.shape[1])           # (N, C)
        return torch.stack([empty.index_add(0, place, score[:, None] * weight).T
                            for place, score in zip(places, scores - self.score_mean)])

class ProtoFloat(ProtoBin):
    """protobin without the sign: s_k = max_n cos(x_n, p_k). The paper's ablation."""

    def unit(self):
        return nn.functional.normalize(self.prototypes, dim=1)

class Proto(ProtoFloat):
    """Prototypes bound to their class (Bird-MAE's head): each class sees its own M of them,
    logits_c = sum_m relu(W_cm) relu(s_cm) + b_c. W starts at 1, b at -2, p in [0, 1).
    K*D + K + C parameters; penalty() keeps a class's prototypes apart. [official code: Bird-MAE],
    without its x2 upsampling, focal subtraction and constants inside the cosine [ours]."""
    betas = 0.9, 0.95  # AdamW's [official code: Bird-MAE]; 0.999 averages in large early gradients

    def __init__(self, D, C, grid=None, M=20):
        nn.Module.__init__(self)  # not ProtoBin's
        self.prototypes = nn.Parameter(torch.rand(M * C, D))
        self.weight = nn.Parameter(torch.ones(C, M))
        self.bias = nn.Parameter(torch.full((C,), -2.0))
        self.register_buffer("score_mean", torch.zeros(M * C))

    def similarity(self, tokens):
        scores, places = super().similarity(tokens)
        return scores.relu(), places

    def forward(self, tokens, cls=None):
        scores = self.similarity(tokens)[0].unflatten(1, self.weight.shape)  # (B, C, M)
        return (scores * self.weight.relu()).sum(2) + self.bias

    def dense(self):
        return torch.block_diag(*self.weight.relu()).T                       # (K, C)

    def penalty(self):
        """||P_c P_c' - I||_F over all classes, per entry."""
        p = self.unit().unflatten(0, self.weight.shape)                      # (C, M, D)
        gram = p @ p.transpose(1, 2) - torch.eye(p.shape[1], device=p.device)
        return gram.norm() / gram.numel()

class Linear(nn.Module):
    """Linear probe: W z + b, z = [cls], or the mean token where there is none. D*C + C parameters.
    [paper]; no normalization [ours: the paper's is not known]."""

    def __init__(self, D, C, grid=None, M=None):
        super().__init__()
        self.linear = nn.Linear(D, C)

    def forward(self, tokens, cls=None):
        return self.linear(tokens.mean(1) if cls is None else cls)

class MLP(Linear):
    """W2 relu(W1 z + b1) + b2, z as for linear [ours: the paper's is not known]. D*h + h + h*C + C
    parameters. [paper]; h = 512 [official code: Bird-MAE]."""

    def __init__(self, D, C, grid=None, M=None, h=512):
        super().__init__(h, C)  # whose linear is our second layer
        self.linear = nn.Sequential(nn.Linear(D, h), nn.ReLU(), self.linear)

class LinearC(Linear):
    """Linear probe on [cls] and mean side by side: W [c; mean_n x_n] + b. 2*D*C + C parameters.
    A reading of the paper's name 'linearc' [ours: no public definition]."""

    def __init__(self, D, C, grid=None, M=None):
        super().__init__(2 * D, C)

    def forward(self, tokens, cls=None):
        mean = tokens.mean(1)
        return self.linear(torch.cat([mean if cls is None else cls, mean], 1))  # (B, 2D)

class LinPre(Linear):
    """Frequency-preserving linear probe: the F tokens of a time step side by side, mean over
    time: W mean_t [x_t1; ...; x_tF] + b. F*D*C + C parameters. A reading of the paper's name
    'linpre' after Niizumi et al. [ours: no public definition]."""

    def __init__(self, D, C, grid, M=None):
        super().__init__(grid[1] * D, C)
        self.F = grid[1]

    def forward(self, tokens, cls=None):
        return self.linear(tokens.unflatten(1, (-1, self.F)).mean(1).flatten(1))

    def evidence(self, tokens, cls=None):
        weight = self.linear.weight.unflatten(1, (self.F, -1))               # (C, F, D)
        maps = torch.einsum("btfd,cfd->bctf", tokens.unflatten(1, (-1, self.F)), weight)
        return maps.flatten(2) / maps.shape[2]

class Mean(Linear):
    """Linear probe on the mean token: W mean_n x_n + b. D*C + C parameters. Not one of the paper's
    eleven: it separates the effect of [cls] [ours]. Base of the heads with learned weights."""

    def attend(self, tokens):
        """Weights (1 or B, N, 1) and what they weigh (B, N, width)."""
        return tokens.new_full((1, tokens.shape[1], 1), 1 / tokens.shape[1]), tokens

    def forward(self, tokens, cls=None):
        a, y = self.attend(tokens)
        return self.linear((a.transpose(1, 2) @ y)[:, 0])

    def evidence(self, tokens, cls=None):
        a, y = self.attend(tokens)
        return (a * (y @ self.linear.weight.T)).transpose(1, 2)

class Conv(Mean):
    """3 x 3 convolution to h channels over the T x F map, ReLU, mean, linear:
    W mean_n relu(conv(x))_n + b. 9*D*h + h + h*C + C parameters. [ours: no public definition]."""

    def __init__(self, D, C, grid, M=None, h=256):
        super().__init__(h, C)
        self.F, self.conv = grid[1], nn.Conv2d(D, h, 3, padding=1)

    def attend(self, tokens):
        maps = tokens.transpose(1, 2).unflatten(2, (-1, self.F))             # (B, D, T, F)
        return super().attend(self.conv(maps).relu().flatten(2).transpose(1, 2))

class ABMILP(Mean):
    """Attention-based MIL pooling: a = softmax_n(w . tanh(V x_n)), logits = W sum_n a_n x_n + b.
    D^2 + D + D + 1 + D*C + C parameters. Ilse et al. 2018; depth 2, without the self-attention
    and batch norm of its official probe [official code: copies of the paper's heads]."""

    def __init__(self, D, C, grid=None, M=None):
        super().__init__(D, C)
        self.score = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def attend(self, tokens):
        return self.score(tokens).softmax(1), tokens

class SimPool(Mean):
    """SimPool without projections: y = LN(x), a = softmax_n(mean(y) . y_n / sqrt(D)),
    logits = W sum_n a_n y_n + b. 2*D + D*C + C parameters. Psomas et al., ICCV 2023; the variant
    without W_q and W_k [official code: copies of the paper's heads; which one it used is open]."""

    def __init__(self, D, C, grid=None, M=None):
        super().__init__(D, C)
        self.norm = nn.LayerNorm(D, 1e-6)

    def attend(self, tokens):
        y = self.norm(tokens)
        return (y @ y.mean(1)[:, :, None] / y.shape[2] ** 0.5).softmax(1), y

class EP(nn.Module):
    """Efficient probing: Q learned queries attend to the raw tokens, a_q = softmax_n(u_q . x_n /
    sqrt(D)); query q pools slice q of V = X W_V; the slices are joined and classified.
    D^2 + Q*D + D*C + C parameters. Psomas et al., ICLR 2026; Q = 32 [official code], without the
    batch norm of its probe. (A X) W_V = A (X W_V), so tokens are pooled first: 1/12 of the work."""

    def __init__(self, D, C, grid=None, M=None, Q=32):
        super().__init__()
        if D % Q:
            raise ValueError(f"ep needs a token width that {Q} divides, not {D}")
        self.query = nn.Parameter(0.02 * torch.randn(Q, D))
        self.value = nn.Linear(D, D, bias=False)
        self.linear = nn.Linear(D, C)

    def queries(self):
        return self.query / self.query.shape[1] ** 0.5                       # (H, D), H = Q

    def forward(self, tokens, cls=None):
        pooled = (self.queries() @ tokens.transpose(1, 2)).softmax(-1) @ tokens  # (B, H, D)
        value = self.value.weight.unflatten(0, (pooled.shape[1], -1))        # (H, D/H, D)
        return self.linear(torch.einsum("bhd,hed->bhe", pooled, value).flatten(1))

    def evidence(self, tokens, cls=None):
        a = (self.queries() @ tokens.transpose(1, 2)).softmax(-1)            # (B, H, N)
        value = self.value(tokens).unflatten(2, (a.shape[1], -1))            # (B, N, H, D/H)
        weight = self.linear.weight.unflatten(1, value.shape[2:])            # (C, H, D/H)
        return torch.einsum("bhn,bnhe,che->bcn", a, value, weight)

class MHCA(EP):
    """Multi-head cross-attention with one learned query q (AIM's attentive probe): K = X W_K,
    V = X W_V, per head softmax_n(q . k_n / sqrt(d)), no output projection, linear.
    2*D^2 + D + D*C + C parameters. El-Nouby et al. 2024; 12 heads at D = 768 [official code], 64
    wide elsewhere [ours]; no batch norm and, unlike AIM, a classifier bias [official code: copies
    of the paper's heads]. q . (W_K x) = (W_K' q) . x, so it is ep with other queries."""

    def __init__(self, D, C, grid=None, M=None):
        nn.Module.__init__(self)  # not EP's
        self.heads = D // 64 if D % 64 == 0 else 1
        self.query = nn.Parameter(0.02 * torch.randn(D))
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.linear = nn.Linear(D, C)

    def queries(self):
        query = self.query.unflatten(0, (self.heads, -1))                    # (H, d)
        key = self.key.weight.unflatten(0, (self.heads, -1))                 # (H, d, D)
        return torch.einsum("hed,he->hd", key, query) / query.shape[1] ** 0.5

HEADS = {"linear": Linear, "mean": Mean, "mlp": MLP, "linearc": LinearC, "conv": Conv,
         "linpre": LinPre, "abmilp": ABMILP, "simpool": SimPool, "ep": EP, "mhca": MHCA,
         "proto": Proto, "protofloat": ProtoFloat, "protobin": ProtoBin}
MEANS = {"linear", "mean", "mlp", "linearc", "linpre"}  # need tokens only as their mean over time

def default_lr(pool, K):
    return max(2e-3, min(LR[pool], LR_K / K)) if pool in ("protobin", "protofloat") else LR[pool]

def load_head(file, fold=None):
    """The trained head of a head.pt (of its first fold, if it has several), ready to use."""
    saved = torch.load(file, weights_only=True)
    head = HEADS[saved["pool"]](*saved["sizes"])
    head.load_state_dict(saved["folds"][next(iter(saved["folds"])) if fold is None else fold])
    return head.eval()


# ---- training

def asymmetric_loss(logits, labels):
    """Ridnik et al. 2021: -mean[ y (1-p)^g+ log p + (1-y) (1-q)^g- log q ], q = min(1-p+m, 1).
    The gradient flows through the focusing weight, as in Bird-MAE and not in Ridnik's train.py."""
    p = logits.sigmoid()
    right = torch.where(labels > 0, p, (1 - p + MARGIN).clamp(max=1))        # p or q
    gamma = torch.where(labels > 0, float(GAMMA_POS), float(GAMMA_NEG))
    return -((1 - right) ** gamma * right.clamp(1e-8).log()).mean()

LOSSES = {"asl": asymmetric_loss, "bce": nn.functional.binary_cross_entropy_with_logits,
          "ce": nn.functional.cross_entropy}  # one-hot rows are class probabilities

def batches(source, rows, device, dtype=torch.float32):
    """Yield (rows of a batch, source[rows]), both on the device. source: a tensor there, or the
    mapped file, for a GPU read ahead by threads. On a CPU a batch overwrites the one before."""
    parts, at = rows.split(BATCH), rows.to(device).split(BATCH)
    if device == "cpu":  # memory is reused, as allocating takes 6 times as long as copying
        source = np.asarray(source)
        raw = np.empty((len(parts[0]), *source.shape[1:]), source.dtype)
        out = torch.empty(raw.shape, dtype=dtype)
        for part in parts:
            np.take(source, part.numpy(), 0, out=raw[:len(part)], mode="clip")  # "raise" copies
            yield part, out[:len(part)].copy_(torch.from_numpy(raw[:len(part)]))
    elif torch.is_tensor(source):
        yield from ((part, source[part].to(dtype)) for part in at)
    else:
        def read(part):
            return torch.from_numpy(source[part.numpy()]).pin_memory()
        jobs = []
        with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
            for i, part in enumerate(at):
                jobs += [pool.submit(read, ahead) for ahead in parts[i + len(jobs):i + AHEAD + 1]]
                yield part, jobs.pop(0).result().to(device, non_blocking=True).to(dtype)

def train(head, source, cls, labels, rows, settings, dtype=torch.float32):
    """EPOCHS passes of AdamW with cosine decay to zero, no warm-up; keeps the last epoch. rows of
    source (clips, N, D), cls (clips, D) or None and labels (clips, C) are trained on. Returns (loss
    of each epoch, seconds per epoch). Raises Stop if the loss is not finite."""
    lr, decay, losses, begin = settings["lr"], settings["weight_decay"], [], time.time()
    decayed = {key: key.endswith("weight") and p.ndim == 2 for key, p in head.named_parameters()}
    groups = [{"params": [p for key, p in head.named_parameters() if decayed[key] == yes],
               "weight_decay": decay * yes} for yes in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr, getattr(head, "betas", (0.9, 0.999)), fused=True)
    shuffle = torch.Generator().manual_seed(settings["seed"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, EPOCHS * math.ceil(len(rows) / BATCH))
    for _ in tqdm(range(EPOCHS), settings.get("pool"), leave=False, disable=None):
        total, order = 0, rows[torch.randperm(len(rows), generator=shuffle)]
        for at, tokens in batches(source, order, labels.device.type, dtype):
            logits = head(tokens, None if cls is None else cls[at])
            loss = LOSSES[settings["loss"]](logits, labels[at])
            optimizer.zero_grad()
            (loss + head.penalty() if hasattr(head, "penalty") else loss).backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(at)  # .item() would wait for the GPU
        losses.append(total.item() / len(rows))
        if not math.isfinite(losses[-1]):
            raise Stop(f"the loss is {losses[-1]}: tokens are not finite, or --lr {lr} is too high")
    return losses, (time.time() - begin) / EPOCHS

def frames(head, meta, tokens):
    """(B, T, C): the head's logits on the tokens of WINDOW around each time step of a clip."""
    (T, F), side = meta["grid"], round((WINDOW / meta["token_seconds"] - 1) / 2)  # side: in steps
    return torch.stack([head(tokens[:, F * max(0, t - side):F * (t + side + 1)])
                        for t in range(T)], 1)

def run(work, settings, dump, source, kinds):
    """Train a head per fold, test each clip once, and write the files of a run into `work`,
    of kinds logits, evidence, frames. source: tokens, or their means (clips, F, D) for MEANS.
    Returns what run.json says. Raises Stop for numbers that are not finite. float16: see MaxCos."""
    pool, device = settings["pool"], dump.device
    (_, N, D), C, (T, F) = dump.tokens.shape, dump.labels.shape[1], dump.meta["grid"]
    sizes = D, C, (T, F), settings["prototypes"]  # what a head is built from
    dtype = torch.float16 if (pool, device) == ("protobin", "cuda") else torch.float32
    rows = torch.cat([test for _, test in dump.folds.values()])
    heads, losses, seconds, done, n = {}, {}, 0, 0, len(rows)
    form = {"logits": ("f4", (n, C)), "evidence": ("f2", (n, C, N)), "frames": ("f2", (n, T, C))}
    files = {k: np.lib.format.open_memmap(f"{work}/{k}.npy", "w+", *form[k]) for k in kinds}
    for fold, (train_rows, test_rows) in dump.folds.items():
        torch.manual_seed(settings["seed"])  # before the head: seeds draw the initialization too
        head = heads[fold] = HEADS[pool](*sizes).to(device)
        losses[fold], took = train(head, source, dump.cls, dump.labels, train_rows, settings, dtype)
        seconds += took / len(dump.folds)
        head.eval().requires_grad_(False)
        tested = source if kinds == ["logits"] else dump.tokens  # the others need every token
        for at, tokens in batches(tested, test_rows, device, dtype):
            for kind, file in files.items():
                out = (head.evidence(tokens) if kind == "evidence" else
                       frames(head, dump.meta, tokens) if kind == "frames" else
                       head(tokens, None if dump.cls is None else dump.cls[at]))
                file[done:done + len(at)] = out.float().cpu()
            done += len(at)
    wrong = rows[~np.isfinite(files["logits"]).all(1)]
    if len(wrong):
        raise Stop(f"tokens/{dump.name}: tokens of row {wrong[0]}, a tested clip, are not finite")
    clips = "".join("{} {}\n".format(*dump.clips[row]) for row in rows.sort().values)
    info = settings | {
        "classes": dump.classes, "encoder": dump.encoder,
        "tested": f"{n} ({hashlib.md5(clips.encode()).hexdigest()[:6]})",
        "parameters": sum(p.numel() for p in head.parameters()), "losses": losses,
        "seconds_per_epoch": seconds, "device": torch.cuda.get_device_name() if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    np.save(f"{work}/rows.npy", rows.numpy())
    torch.save({"pool": pool, "sizes": sizes, "folds": {
        fold: head.cpu().state_dict() for fold, head in heads.items()}}, f"{work}/head.pt")
    pathlib.Path(work, "run.json").write_text(json.dumps(info, indent=1), "utf-8")
    return info

def run_exists(folder, settings, kinds):
    """Whether this run has all the files asked for. Raises Stop if it has other settings."""
    try:
        old = json.loads(pathlib.Path(folder, "run.json").read_text("utf-8"))
        differ = [key for key in settings if old.get(key) != settings[key]]
    except (OSError, ValueError, AttributeError):  # no run, or a damaged one
        return False
    if differ:
        raise Stop(f"{folder} has other settings ({', '.join(differ)}); --overwrite replaces it")
    return all(os.path.exists(f"{folder}/{kind}.npy") for kind in kinds)


# ---- a trained head on other recordings

@torch.no_grad()
def apply_head(file, dump, threshold, overwrite):
    """Score the readable clips of a dump with the head in `file` (mean logits of its folds), into
    applied/<data>/<model>/<pool>/: scores.csv, and label tracks of when a class is above threshold,
    by frames, or by clips if the head reads [cls]. Raises Stop for tokens of another encoder."""
    try:
        info = json.loads(pathlib.Path(file).with_name("run.json").read_text("utf-8"))
        saved = torch.load(file, weights_only=True)
        heads = [load_head(file, fold).to(dump.device) for fold in saved["folds"]]
        classes, multi = [*map(str, info["classes"])], info["dump"]["task"] == "multi"
        if (info["encoder"], len(classes)) != (dump.encoder, saved["sizes"][1]):
            raise ValueError(f"trained on tokens of {info['encoder']}, not of {dump.encoder}")
    except Exception as e:  # torch and json have their own errors for damaged files
        raise Stop(f"{file} cannot be applied to tokens/{dump.name} ({type(e).__name__}: "
                   f"{str(e).split('. ')[0][:200]}); it needs run.json and its encoder's tokens")
    out = f"applied/{dump.name}/{saved['pool']}"
    if os.path.exists(out) and not overwrite:
        raise Stop(f"{out} already exists; --overwrite replaces it, with any labels you corrected")
    def probabilities(tokens, cls=None):
        logits = torch.stack([head(tokens, cls) for head in heads]).mean(0)  # (B, C)
        return logits.sigmoid() if multi else logits.softmax(1)
    seconds, step, (T, _) = (dump.meta[key] for key in ("seconds", "token_seconds", "grid"))
    by_frames = dump.cls is None or hasattr(heads[0], "evidence")
    edges = [t * step for t in range(T if by_frames else 1) if t * step < seconds] + [seconds]
    rows = sorted((i for i, split in enumerate(dump.splits) if split), key=dump.clips.__getitem__)
    last = {dump.clips[row][0]: row for row in rows}  # of each recording
    active = []  # a recording's steps above threshold: (label, onset, offset, probability)
    shutil.rmtree(out + ".new", ignore_errors=True)
    os.makedirs(out + ".new")
    with open(f"{out}.new/scores.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["path", "start", "end", *classes])
        for at, tokens in batches(dump.tokens, torch.tensor(rows), dump.device):
            scores = probabilities(tokens, None if dump.cls is None else dump.cls[at])
            steps = frames(probabilities, dump.meta, tokens) if by_frames else scores[:, None]
            for row, clip, p in zip(at.tolist(), scores.tolist(), steps.cpu()):
                path, start = dump.clips[row]
                table.writerow([path, start, start + seconds, *(f"{score:.6g}" for score in clip)])
                active += [(classes[j], start + edges[t], start + edges[t + 1], p[t, j].item())
                           for t, j in (p[:len(edges) - 1] > threshold).nonzero().tolist()]
                if row == last[path]:
                    write_tracks(out + ".new", path, active)
                    active = []
    shutil.rmtree(out, ignore_errors=True)
    os.rename(out + ".new", out)
    print(f"{out}: scores of {len(rows)} clips; {len(dump.splits) - len(rows)} are unreadable")

def write_tracks(folder, path, steps):
    """Join time steps (label, onset, offset, probability) of a recording that touch or overlap, and
    write these events as audacity/<path>.txt and raven/<path>.txt."""
    events = []
    for label, onset, offset, p in sorted(steps):
        if events and events[-1][2] == label and onset <= events[-1][1] + 1e-3:
            onset, end, _, highest = events.pop()
            offset, p = max(end, offset), max(highest, p)
        events.append((onset, offset, label, p))
    audacity, raven = "", ("Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\t"
                           "Low Freq (Hz)\tHigh Freq (Hz)\tLabel\tProbability\n")
    for i, (onset, offset, label, p) in enumerate(sorted(events), 1):
        times = f"{onset:.3f}\t{offset:.3f}"
        audacity += f"{times}\t{label} {p:.2f}\n"
        raven += f"{i}\tSpectrogram 1\t1\t{times}\t0\t8000\t{label}\t{p:.2f}\n"
    for kind, text in ("audacity", audacity), ("raven", raven):
        track = pathlib.Path(f"{folder}/{kind}/{path.replace('../', '_/')}.txt")
        track.parent.mkdir(parents=True, exist_ok=True)
        track.write_text(text, "utf-8")


# ---- the dump

def open_dump(data, model, device):
    """The newest tokens/<data>/<model>, either may be None: its name <data>/<model>, meta, classes,
    tokens (clips, N, D), clips [(path, start)], splits (clips,), None where unreadable, md5s; on
    the device, labels (clips, C) and cls (clips, D) or None. Raises Stop if they do not match."""
    found = list(pathlib.Path().glob(f"tokens/{data or '*'}/{model or '*'}/meta.json"))
    if not found:
        raise Stop(f"no dump in tokens/{data or '*'}/{model or '*'}; run python extract.py first")
    folder = max(found, key=os.path.getmtime).parent
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        arrays = {f.stem: np.load(f, mmap_mode="c") for f in folder.glob("*.npy")}  # "r" warns
        tokens, labels, cls = arrays["tokens"], arrays["labels"], arrays.get("cls")
        with open(folder / "clips.csv", newline="", encoding="utf-8") as f:
            splits, clips = zip(*((clip["split"], (clip["path"], float(clip["start"])))
                                  for clip in csv.DictReader(f)))
        classes = (folder / "classes.txt").read_text("utf-8").splitlines()
        n, D, (T, F), task = len(clips), tokens.shape[-1], torch.Size(meta["grid"]), meta["task"]
        state = arrays.get("state", np.ones(n))
        rules = {
            f"tokens.npy is {tokens.dtype} {tokens.shape}, not float16 {n, T * F, D}, grid {T, F}":
                tokens.dtype == np.float16 and tokens.shape == (n, T * F, D) and min(T, F, D) > 0,
            f"labels.npy is {labels.shape}, not {(n, len(classes))} integers, 0 or 1":
                labels.shape == (n, len(classes)) and labels.dtype.kind in "bui"
                and np.isin(labels, (0, 1)).all(),
            f"cls.npy is not float {(n, D)}":
                cls is None or cls.shape == (n, D) and cls.dtype.kind == "f",
            "each row of clips.csv needs a split": all(splits),
            "task must be multi, or single with one class per clip":
                task == "multi" or task == "single" and (labels.sum(1) == 1).all(),
            "extract.py is not done, run it again": state.shape == (n,) and state.all(),
            "no clip is readable": (state != 2).any()}
        broken = [rule for rule, kept in rules.items() if not kept]
    except Exception as e:  # numpy, csv and json have their own errors for damaged files
        broken = [f"{type(e).__name__}: {e}"]
    if broken:
        raise Stop(f"{folder}: {broken[0]}; fix it (needed: tokens.npy, labels.npy, classes.txt, "
                   f"path,start,split in clips.csv, task, grid in meta.json) or rerun extract.py")
    labels_md5 = hashlib.md5(labels.tobytes() + "\n".join(splits).encode())
    tokens_md5 = hashlib.md5(b"".join(array[i].tobytes() for array in (tokens, cls)
                                      if array is not None for i in (0, n // 2, -1)))
    has_cls = cls is not None and meta.get("cls") != "mean"  # heads compute the mean in float32
    meta = {"model": folder.name} | meta | {"cls": "cls" if has_cls else "mean"}
    checkpoint = meta.get("checkpoint")  # a dict, if extract.py wrote it
    weights = checkpoint.get("sha256") if isinstance(checkpoint, dict) else checkpoint
    return SimpleNamespace(
        data=folder.parts[1], name="/".join(folder.parts[1:]), device=device, meta=meta,
        encoder=f"{meta['model']} ({meta['cls']}, F = {F}, D = {D}, weights {str(weights)[:12]})",
        tokens=tokens, classes=classes, clips=clips, splits=np.where(state == 2, None, splits),
        labels=torch.from_numpy(labels.astype(np.float32)).to(device),  # any byte order
        cls=torch.from_numpy(cls.astype(np.float32)).to(device) if has_cls else None,
        tokens_md5=tokens_md5.hexdigest(), labels_md5=labels_md5.hexdigest())

def make_folds(splits, valid):
    """{fold: (train rows, tested rows)}. With a `test` split there is one fold, train + valid ->
    test (or, to choose settings, train -> valid); without one, each split is a fold."""
    names, test = {"train", "valid", "test"}, "valid" if valid else "test"
    found = set(splits) - {None}
    if {"train", test} <= found <= names:
        trained, tested = ["train"] if valid else ["train", "valid"], [test]
    elif not valid and len(found) > 1 and not names & {split.lower() for split in found}:
        trained = tested = sorted(found)
    else:
        raise Stop(f"clips.csv has readable clips in the splits {' '.join(sorted(found))}; needed "
                   f"are train and test (--valid: train and valid), or folds of other names")
    masks = {fold: (np.isin(splits, trained) & (splits != fold), splits == fold) for fold in tested}
    return {fold: [torch.tensor(np.flatnonzero(mask)) for mask in masks[fold]] for fold in tested}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--pool", default="protobin", help=f'comma-separated, or "all": {" ".join(HEADS)}')
    flag("--data", help="dataset (default: the newest dump's)")
    flag("--model", help="encoder (default: the newest dump's)")
    flag("--seeds", type=int, default=SEEDS, help=f"runs, with seeds 0, 1, ... (default {SEEDS})")
    flag("--evidence", action="store_true", help="also write what each token added to each logit")
    flag("--frames", action="store_true", help="also write the logits around each time step")
    flag("--apply", metavar="HEAD.PT", help="score a dump with a trained head, into applied/")
    flag("--threshold", type=float, default=0.5, help="of events, with --apply (default 0.5)")
    flag("--valid", action="store_true", help="train on train, test on valid, below runs_valid/")
    flag("--lr", type=float, default=0, help="peak learning rate (default: per head)")
    flag("--decay", type=float, default=DECAY, help=f"weight decay (default {DECAY:g})")
    flag("--loss", choices=tuple(LOSSES), help="default: asl for multi, ce for single")
    flag("--prototypes", type=int, default=0, help="per class (default 20; as20k: 10)")
    flag("--runs", metavar="DIR", help="default runs, with --valid runs_valid")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    flag("--device", choices=devices, default=devices[0], help="default: cuda if there is one")
    flag("--overwrite", action="store_true", help="replace existing runs, or scores of --apply")
    args = parser.parse_args()
    pools = list(HEADS) if args.pool == "all" else args.pool.split(",")
    if not set(pools) <= set(HEADS):
        raise Stop(f"unknown head in --pool {args.pool}; there are {' '.join(HEADS)}")
    if args.seeds < 1 or min(args.prototypes, args.lr, args.decay) < 0 or args.threshold >= 1:
        raise Stop("needed: --seeds above 0, --threshold below 1, --prototypes, --lr, --decay >= 0")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in conv too
    dump = open_dump(args.data, args.model, args.device)
    blind = [pool for pool in pools if not hasattr(HEADS[pool], "evidence")]
    if blind and (args.evidence or args.frames and dump.cls is not None):
        raise Stop(f"{blind[0]} has no evidence, and no frames if it reads [cls]: drop the flags")
    times = [dump.meta.get(key) for key in ("seconds", "token_seconds")]
    if (args.frames or args.apply) and not all(type(t) in (int, float) and t > 0 for t in times):
        raise Stop(f"tokens/{dump.name}/meta.json needs seconds and token_seconds above 0 for that")
    if args.apply:
        return apply_head(args.apply, dump, args.threshold, args.overwrite)
    if not dump.classes:
        raise Stop(f"tokens/{dump.name} has no labels to train on; --apply scores it")
    dump.folds = make_folds(dump.splits, args.valid)
    tokens, C, task = dump.tokens, dump.labels.shape[1], dump.meta["task"]
    print(f"tokens/{dump.name}: (clips, N, D) = {tokens.shape}, {C} classes, {task}; "
          + ", ".join(f"{len(a):,} -> {len(b):,} ({s})" for s, (a, b) in dump.folds.items()))
    if args.device == "cuda" and tokens.nbytes <= MEMORY * torch.cuda.mem_get_info()[0]:
        tokens = dump.tokens = torch.from_numpy(tokens).to("cuda")
    if MEANS & set(pools):  # then means: (clips, F, D)
        means = torch.cat([part.unflatten(1, tuple(dump.meta["grid"])).mean(1) for _, part in
                           batches(tokens, torch.arange(len(tokens)), args.device)])
    root, failed = args.runs or ("runs_valid" if args.valid else "runs"), []
    for pool, seed in [(pool, seed) for pool in pools for seed in range(args.seeds)]:
        M = (args.prototypes or PROTOTYPES.get(dump.data, 20)) if "proto" in pool else None
        settings = {"pool": pool, "seed": seed, "lr": args.lr or default_lr(pool, M and M * C),
                    "weight_decay": args.decay, "epochs": EPOCHS, "batch": BATCH, "prototypes": M,
                    "loss": args.loss or ("asl" if task == "multi" else "ce"),
                    "split": "valid" if args.valid else "test", "dump": dump.meta,
                    "tokens_md5": dump.tokens_md5, "labels_md5": dump.labels_md5}
        out = f"{root}/{dump.name}/{pool}/seed{seed}"
        work = f"{root}/{dump.name}/{pool}/.seed{seed}.{os.getpid()}"
        kinds = ["logits", *(kind for kind in ("evidence", "frames")  # also those it had before
                             if getattr(args, kind) or os.path.exists(f"{out}/{kind}.npy"))]
        try:
            if not args.overwrite and run_exists(out, settings, kinds):
                print(f"{out} already exists; --overwrite replaces it")
                continue
            shutil.rmtree(work, ignore_errors=True)  # of a killed process with the same number
            os.makedirs(work)
            info = run(work, settings, dump, means if pool in MEANS else tokens, kinds)
            shutil.rmtree(out, ignore_errors=True)
            os.rename(work, out)
            print(f"{pool:>10}  seed {seed}  {info['parameters']:>10,} parameters  "
                  f"{info['seconds_per_epoch']:.2f} s/epoch  -> {out}")
        except (Stop, ValueError, torch.OutOfMemoryError) as e:  # the other heads still run
            failed.append(f"{pool} seed {seed}: {e}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if failed:
        raise Stop("; ".join(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stop, OSError, torch.OutOfMemoryError) as e:
        text = str(e) if isinstance(e, Stop) else str(e).split(". ")[0] + "; finished runs are kept"
        print(f"probe.py: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("probe.py: stopped; finished runs are kept", file=sys.stderr)
        sys.exit(130)
