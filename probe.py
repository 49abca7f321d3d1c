"""Train ONE pooling head on the frozen tokens of a dump, with fixed hyperparameters.

Paper: "Unmute the Patch Tokens" (ICLR 2026, arXiv 2509.24901), section 3. A head turns the token
map of a clip into logits; protobin, the paper's, scores it by its best cosine with binary vectors.

Reads    tokens/<data>/<model>/  tokens.npy float16 (clips, N, D), cls.npy float16 (clips, D) or
         none, labels.npy uint8 (clips, C), clips.csv, meta.json (task grid complete)
Writes   runs/<data>/<model>/<pool>/seed<k>/
         logits.npy float32 (tested clips, C), rows.npy int64 (tested clips), head.pt, run.json,
         and with --evidence evidence.npy float16 (tested clips, C, N)

    python probe.py                                          # protobin on the newest dump
    python probe.py --pool linear,mhca,protobin --data esc50 --model eat
    python probe.py --pool protobin --valid --lr 0.003       # choose on `valid`, in runs_valid/

Test labels play no part here: evaluate.py does the scoring. Each head below is one class that
needs torch alone: copy the one you want.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import itertools
import json
import os
import platform
import resource
import shutil
import sys
import time

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------
# constants: what, unit, source

EPOCHS = 30         # passes over the training clips [paper]
BATCH = 128         # clips [paper]
CHUNK = 8 * BATCH   # clips that all seeds draw at once, each to shuffle on its own [ours]
SEEDS = 5           # runs of a head [paper]
PROTOTYPES = 20     # per class; the line in datasets.txt may say otherwise (as20k: 10) [paper]
GAMMA_NEG, GAMMA_POS, MARGIN = 4, 1, 0.05  # asymmetric loss [official code: Bird-MAE]
DECAY = 1e-4        # weight decay, linear weights only; inside the paper's 1e-5..5e-4 [ours]
CENTRE = 1024       # training clips whose mean score evidence is counted from [ours]
MEMORY = 0.6        # share of the free memory that resident tokens may take [ours]

# Peak learning rate of the cosine schedule. The paper searches one per head, encoder and dataset
# (1e-4..7e-3, prototype heads 2e-3..8e-2) and does not print it. These are fixed [ours]: inside
# those ranges, the highest mean of valid macro mAP over three sets: the demo through logmel (D =
# 256) and random (D = 768), and planted tokens of 50 classes (K = 1,000). README has the table.
LR = {"linear": 7e-3, "mean": 7e-3, "mlp": 1e-3, "linearc": 3e-3, "conv": 1e-3, "linpre": 1e-3,
      "abmilp": 7e-3, "simpool": 7e-3, "ep": 3e-3, "mhca": 3e-3, "proto": 8e-2,
      "protofloat": 5e-3, "protobin": 5e-3}
LR_K = 5  # protobin, protofloat: at most LR_K / K, but 2e-3 at least. Adam moves all K weights of
          # a class together, its logit by lr * K * mean score; chosen at K = 4,000, 10,000 [ours]


class Stop(Exception):
    """A mistake of the user's, told in one sentence; main() prints it and exits with 2."""


# ---------------------------------------------------------------------------------------------
# heads: (D, C) in; tokens (B, N, D) float, cls (B, D) or None -> logits (B, C)
#
# evidence(tokens) -> (B, C, N), where it exists, is what each token added to each class's logit:
# logits - evidence.sum(-1) is the same for all clips. Heads without it mix tokens before a
# non-linearity or never see them.

class Linear(torch.nn.Module):
    """Linear probe: W z + b, z = [cls], or the mean of the tokens where there is none.
    D*C + C parameters. [paper]; no normalisation in front [ours: the paper's is not known]."""
    wants = "cls"

    def __init__(self, D, C):
        super().__init__()
        self.linear = torch.nn.Linear(D, C)

    def forward(self, tokens, cls=None):
        return self.linear(tokens.mean(1) if cls is None else cls)


class Mean(torch.nn.Module):
    """Linear probe on the mean of the tokens: W mean_n x_n + b. D*C + C parameters. Not one of the
    paper's eleven: it tells [cls] from pooling."""
    wants = "tokens"

    def __init__(self, D, C):
        super().__init__()
        self.linear = torch.nn.Linear(D, C)

    def forward(self, tokens, cls=None):
        return self.linear(tokens.mean(1))

    def evidence(self, tokens, cls=None):
        return (tokens @ self.linear.weight.T).transpose(1, 2) / tokens.shape[1]


class MLP(torch.nn.Module):
    """W2 relu(W1 z + b1) + b2 on [cls], or the mean of the tokens where there is none.
    D*h + h + h*C + C parameters. [paper]; h = 512 [official code: Bird-MAE]."""
    wants = "cls"

    def __init__(self, D, C, h=512):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(D, h), torch.nn.ReLU(),
                                          torch.nn.Linear(h, C))

    def forward(self, tokens, cls=None):
        return self.layers(tokens.mean(1) if cls is None else cls)


class LinearC(torch.nn.Module):
    """Linear probe on [cls] and mean side by side: W [c; mean_n x_n] + b. 2*D*C + C parameters.
    Reading of the paper's name 'linearc' [ours: no public definition]."""
    wants = "both"

    def __init__(self, D, C):
        super().__init__()
        self.linear = torch.nn.Linear(2 * D, C)

    def forward(self, tokens, cls=None):
        mean = tokens.mean(1)
        return self.linear(torch.cat([mean if cls is None else cls, mean], 1))  # (B, 2D)


class Conv(torch.nn.Module):
    """3 x 3 convolution to h channels over the T x F map, ReLU, mean, linear:
    W mean_n relu(conv(x))_n + b. 9*D*h + h + h*C + C parameters. [ours: no public definition]."""
    wants = "tokens"

    def __init__(self, D, C, grid, h=256):
        super().__init__()
        self.grid = tuple(grid)
        self.conv = torch.nn.Conv2d(D, h, 3, padding=1)
        self.linear = torch.nn.Linear(h, C)

    def features(self, tokens):
        maps = tokens.transpose(1, 2).unflatten(2, self.grid)                # (B, D, T, F)
        return self.conv(maps).relu().flatten(2).transpose(1, 2)             # (B, N, h)

    def forward(self, tokens, cls=None):
        return self.linear(self.features(tokens).mean(1))

    def evidence(self, tokens, cls=None):
        maps = self.features(tokens)
        return (maps @ self.linear.weight.T).transpose(1, 2) / maps.shape[1]


class LinPre(torch.nn.Module):
    """Frequency-preserving linear probe: the F tokens of a time step side by side, mean over
    time: W mean_t [x_t1; ...; x_tF] + b. F*D*C + C parameters. Reading of the paper's name
    'linpre' after Niizumi et al. [ours: no public definition]."""
    wants = "tokens"

    def __init__(self, D, C, grid):
        super().__init__()
        self.grid = tuple(grid)
        self.linear = torch.nn.Linear(grid[1] * D, C)

    def forward(self, tokens, cls=None):
        return self.linear(tokens.unflatten(1, self.grid).mean(1).flatten(1))

    def evidence(self, tokens, cls=None):
        weight = self.linear.weight.unflatten(1, (self.grid[1], -1))         # (C, F, D)
        maps = torch.einsum("btfd,cfd->bctf", tokens.unflatten(1, self.grid), weight)
        return maps.flatten(2) / self.grid[0]


class ABMILP(torch.nn.Module):
    """Attention-based MIL pooling: a = softmax_n(w . tanh(V x_n)), logits = W sum_n a_n x_n + b.
    D^2 + D + D + 1 + D*C + C parameters. Ilse et al. 2018; depth 2, no self-attention in front
    [official code: copies of the paper's heads]."""
    wants = "tokens"

    def __init__(self, D, C):
        super().__init__()
        self.score = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh(),
                                         torch.nn.Linear(D, 1))
        self.linear = torch.nn.Linear(D, C)

    def forward(self, tokens, cls=None):
        a = self.score(tokens).softmax(1)                                    # (B, N, 1)
        return self.linear((a.transpose(1, 2) @ tokens)[:, 0])

    def evidence(self, tokens, cls=None):
        return (self.score(tokens).softmax(1) * (tokens @ self.linear.weight.T)).transpose(1, 2)


class SimPool(torch.nn.Module):
    """SimPool without projections: y = LN(x), a = softmax_n(mean(y) . y_n / sqrt(D)),
    logits = W sum_n a_n y_n + b. 2*D + D*C + C parameters. Psomas et al., ICCV 2023; the variant
    without W_q and W_k [official code: copies of the paper's heads; which one it used is open].

    LN's shift b adds the same to every score and pooling commutes with its scale g, so the frozen
    tokens are normalised without them and no gradient of their size is made."""
    wants = "tokens"

    def __init__(self, D, C):
        super().__init__()
        self.norm = torch.nn.LayerNorm(D, 1e-6)
        self.linear = torch.nn.Linear(D, C)

    def attend(self, tokens):
        x = torch.nn.functional.layer_norm(tokens, tokens.shape[2:], eps=self.norm.eps)
        g, b = self.norm.weight, self.norm.bias                              # y = g x + b
        query = g * (g * x.mean(1) + b) / len(g) ** 0.5                      # (B, D)
        return (x @ query[:, :, None]).softmax(1), x                         # (B, N, 1)

    def forward(self, tokens, cls=None):
        a, x = self.attend(tokens)
        return self.linear(self.norm.weight * (a.transpose(1, 2) @ x)[:, 0] + self.norm.bias)

    def evidence(self, tokens, cls=None):
        a, x = self.attend(tokens)
        y = self.norm.weight * x + self.norm.bias
        return (a * (y @ self.linear.weight.T)).transpose(1, 2)


class EP(torch.nn.Module):
    """Efficient probing: Q learned queries attend to the raw tokens, a_q = softmax_n(u_q . x_n /
    sqrt(D)); query q pools slice q of V = X W_V; the slices are joined and classified.
    D^2 + Q*D + D*C + C parameters. Psomas et al., ICLR 2026; Q = 32 [official code].

    (A X) W_V = A (X W_V), so the tokens are pooled first: the same numbers at 1/12 of the work."""
    wants = "tokens"

    def __init__(self, D, C, Q=32):
        super().__init__()
        if D % Q:
            raise ValueError(f"ep needs a token width that {Q} divides, not {D}")
        self.queries = torch.nn.Parameter(0.02 * torch.randn(Q, D))
        self.value = torch.nn.Linear(D, D, bias=False)
        self.linear = torch.nn.Linear(D, C)

    def attend(self, tokens):
        return (self.queries @ tokens.transpose(1, 2) / tokens.shape[2] ** 0.5).softmax(-1)

    def forward(self, tokens, cls=None):
        pooled = self.attend(tokens) @ tokens                                # (B, Q, D)
        value = self.value.weight.unflatten(0, (len(self.queries), -1))      # (Q, D/Q, D)
        return self.linear(torch.einsum("bqd,qed->bqe", pooled, value).flatten(1))

    def evidence(self, tokens, cls=None):
        Q = len(self.queries)
        value = self.value.weight.unflatten(0, (Q, -1))                      # (Q, D/Q, D)
        weight = torch.einsum("cqe,qed->qcd", self.linear.weight.unflatten(1, (Q, -1)), value)
        a = self.attend(tokens)                                              # (B, Q, N)
        return sum(a[:, q, None] * (weight[q] @ tokens.transpose(1, 2)) for q in range(Q))


class MHCA(torch.nn.Module):
    """Multi-head cross-attention with one learned query q (AIM's attentive probe): K = X W_K,
    V = X W_V, per head softmax_n(q . k_n / sqrt(d)), no output projection, linear.
    2*D^2 + D + D*C + C parameters. El-Nouby et al. 2024; heads of 64 (12 at D = 768)
    [official code]; AIM's batch norm is left out [official code: copies of the paper's heads].

    q . (W_K x) = (W_K' q) . x and pooling commutes with W_V: no token is ever projected."""
    wants = "tokens"

    def __init__(self, D, C):
        super().__init__()
        self.heads = D // 64 if D % 64 == 0 else 1
        self.query = torch.nn.Parameter(0.02 * torch.randn(D))
        self.key = torch.nn.Linear(D, D, bias=False)
        self.value = torch.nn.Linear(D, D, bias=False)
        self.linear = torch.nn.Linear(D, C)

    def attend(self, tokens):
        shape = (self.heads, -1)
        query = torch.einsum("hed,he->hd", self.key.weight.unflatten(0, shape),
                             self.query.unflatten(0, shape))                 # (H, D)
        d = len(self.query) // self.heads
        return (query @ tokens.transpose(1, 2) / d ** 0.5).softmax(-1)       # (B, H, N)

    def forward(self, tokens, cls=None):
        pooled = self.attend(tokens) @ tokens                                # (B, H, D)
        value = self.value.weight.unflatten(0, (self.heads, -1))             # (H, d, D)
        return self.linear(torch.einsum("bhd,hed->bhe", pooled, value).flatten(1))

    def evidence(self, tokens, cls=None):
        H = self.heads
        value = self.value.weight.unflatten(0, (H, -1))                      # (H, d, D)
        weight = torch.einsum("che,hed->hcd", self.linear.weight.unflatten(1, (H, -1)), value)
        a = self.attend(tokens)
        return sum(a[:, h, None] * (weight[h] @ tokens.transpose(1, 2)) for h in range(H))


class Prototypes(torch.nn.Module):
    """Best cosine of any token with each of K = M*C prototypes, then linear (paper section 3):

        s_k = max_n cos(x_n, p_k),  logits = W s + b

    protobin    p = sign(latent), +1 at 0, identity straight-through gradient, normalised after
                it; shared by all classes, W dense. K*D + K*C + C parameters. [paper]
    protofloat  the same without the sign (the paper's ablation).
    proto       p = latent; relu(s), each class sees its own M prototypes, W >= 0 from 1, b from
                -2, plus penalty(). K*D + K + C parameters. [official code: Bird-MAE], without its
                x2 upsampling, focal subtraction and constants inside the cosine [ours].
    """
    wants = "tokens"

    def __init__(self, D, C, M=20, kind="protobin"):
        super().__init__()
        K = M * C
        self.kind = kind
        self.prototypes = torch.nn.Parameter(torch.rand(K, D) if kind == "proto"
                                             else 0.02 * torch.randn(K, D))
        if kind == "proto":
            self.weight = torch.nn.Parameter(torch.ones(C, M))
            self.bias = torch.nn.Parameter(torch.full((C,), -2.0))
        else:
            self.linear = torch.nn.Linear(K, C)
        self.register_buffer("score_mean", torch.zeros(K))  # over training clips, for evidence

    class MaxCos(torch.autograd.Function):
        """tokens (B, N, D), unit p (K, D) -> max_n cos(x_n, p_k) and its n, both (B, K).

        Exact, and no (B, N, K) tensor: tiles of a few clips stay in the cache, the winner's place
        is kept, and the backward adds up the winners, dp_k = sum_b g_bk x_b,n(b,k) / |x|. Tokens
        get no gradient. On CUDA the search runs in half precision, the winner is scored in fp32."""

        @staticmethod
        def forward(ctx, tokens, p):
            (B, N, _), K, cuda = tokens.shape, len(p), tokens.is_cuda
            scores = tokens.new_empty(K, B)
            places = torch.empty(K, B, dtype=torch.long, device=tokens.device)  # row of (B*N, D)
            length = tokens.norm(dim=2).clamp(min=1e-12)                     # (B, N)
            chunks = p.split(1024)
            fast = p.half().split(1024) if cuda else chunks
            step = (2 ** 25 if cuda else 2 ** 19) // (len(chunks[0]) * N)
            step = min(B, max(1, step))
            tile = fast[0].new_empty(len(chunks[0]) * step * N)  # used again and again
            for b in range(0, B, step):
                x = (tokens[b:b + step] / length[b:b + step, :, None]).flatten(0, 1)  # (b*N, D)
                wide, some = x.half().T if cuda else x.T, slice(b, b + step)
                first = N * torch.arange(len(x) // N, device=x.device)       # row of each clip
                for k, (exact, rough) in enumerate(zip(chunks, fast)):
                    rows = slice(1024 * k, 1024 * k + len(exact))
                    dots = tile[:len(exact) * len(x)].view(len(exact), len(x))  # (k, b*N)
                    torch.mm(rough, wide, out=dots)
                    best, place = dots.unflatten(1, (-1, N)).max(-1)         # (k, b), one n
                    place += first
                    if cuda:
                        best = torch.einsum("kbd,kd->kb", x[place], exact)
                    scores[rows, some], places[rows, some] = best, place + b * N
            ctx.save_for_backward(tokens, length, places)
            n = (places % N).T
            ctx.mark_non_differentiable(n)
            return scores.T, n

        @staticmethod
        def backward(ctx, grad, _):
            tokens, length, places = ctx.saved_tensors
            weights = grad.T / length.flatten()[places]                      # (K, B)
            return None, torch.nn.functional.embedding_bag(
                places, tokens.flatten(0, 1), mode="sum", per_sample_weights=weights)

    def similarity(self, tokens):
        """(B, N, D) -> scores (B, K) and the winning token's n (B, K)."""
        p = self.prototypes
        if self.kind == "protobin":
            sign = torch.where(p >= 0, 1.0, -1.0)  # torch.sign would make 0 of 0
            p = sign + (p - p.detach())  # forward: exactly +-1; backward: identity
        p = torch.nn.functional.normalize(p, dim=1)  # after the sign: keeps the projection term
        return self.MaxCos.apply(tokens, p)

    def classify(self, scores):
        if self.kind != "proto":
            return self.linear(scores)
        scores = scores.relu().unflatten(1, self.weight.shape)               # (B, C, M)
        return (scores * self.weight.relu()).sum(2) + self.bias

    def forward(self, tokens, cls=None):
        return self.classify(self.similarity(tokens)[0])

    def penalty(self):
        """proto: ||P_c P_c' - I||_F over the classes, per entry [official code: Bird-MAE]."""
        if self.kind != "proto":
            return 0
        p = torch.nn.functional.normalize(self.prototypes, dim=1).unflatten(0, self.weight.shape)
        gram = p @ p.transpose(1, 2) - torch.eye(p.shape[1], device=p.device)  # (C, M, M)
        return gram.norm() / gram.numel()

    def evidence(self, tokens, cls=None):
        """The token that won prototype k is credited with W_ck (s_k - its training mean)."""
        scores, places = self.similarity(tokens)
        if self.kind == "proto":
            scores, dense = scores.relu(), torch.block_diag(*self.weight.relu()).T  # (K, C)
        else:
            dense = self.linear.weight.T
        out = tokens.new_zeros(*tokens.shape[:2], dense.shape[1])            # (B, N, C)
        for b in range(len(out)):
            out[b].index_add_(0, places[b], (scores[b] - self.score_mean)[:, None] * dense)
        return out.transpose(1, 2)


HEADS = {"linear": Linear, "mean": Mean, "mlp": MLP, "linearc": LinearC, "conv": Conv,
         "linpre": LinPre, "abmilp": ABMILP, "simpool": SimPool, "ep": EP, "mhca": MHCA,
         "proto": Prototypes, "protofloat": Prototypes, "protobin": Prototypes}


def make_head(pool, D, C, grid, M=PROTOTYPES):
    """A fresh head by name. Raises ValueError where the head cannot have this token width."""
    more = {"conv": {"grid": grid}, "linpre": {"grid": grid}}.get(pool, {})
    if HEADS[pool] is Prototypes:
        more = {"M": M, "kind": pool}
    return HEADS[pool](D, C, **more)


def default_lr(pool, K):
    """LR, lowered where protobin or protofloat has more than a thousand prototypes."""
    return max(2e-3, min(LR[pool], LR_K / K)) if pool in ("protobin", "protofloat") else LR[pool]


def save_head(file, pool, D, C, grid, M, folds):
    """head.pt: sizes and one state dict a fold; protobin's prototypes as bits, 1 for +1."""
    states = {}
    for fold, head in folds.items():
        state = {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}
        if pool == "protobin":
            bits = np.packbits(state["prototypes"].numpy() >= 0, axis=1)
            state["prototypes"] = torch.from_numpy(bits)                     # (K, D/8) uint8
        states[fold] = state
    memory = io.BytesIO()  # a full disk is an OSError then, and no error of torch's own
    torch.save({"pool": pool, "D": D, "C": C, "grid": list(grid), "M": M, "folds": states}, memory)
    with open(file, "wb") as f:
        f.write(memory.getvalue())


def load_head(file, fold=None):
    """The trained head of a head.pt (of its first fold, if it has several), ready to use."""
    saved = torch.load(file, weights_only=True)
    state = saved["folds"][fold or next(iter(saved["folds"]))]
    if saved["pool"] == "protobin":
        bits = np.unpackbits(state["prototypes"].numpy(), axis=1, count=saved["D"])
        state["prototypes"] = torch.from_numpy(bits).float() * 2 - 1
    head = make_head(saved["pool"], saved["D"], saved["C"], saved["grid"], saved["M"])
    head.load_state_dict(state)
    return head.eval()


def asymmetric_loss(logits, labels):
    """Ridnik et al. 2021: -mean[ y (1-p)^g+ log p + (1-y) (1-q)^g- log q ], q = min(1-p+m, 1)."""
    p = logits.sigmoid()
    q = (1 - p + MARGIN).clamp(max=1)
    positive = labels * (1 - p) ** GAMMA_POS * p.clamp(1e-8).log()
    negative = (1 - labels) * (1 - q) ** GAMMA_NEG * q.clamp(1e-8).log()
    return -(positive + negative).mean()


LOSSES = {"asl": asymmetric_loss,
          "bce": torch.nn.functional.binary_cross_entropy_with_logits,
          "ce": torch.nn.functional.cross_entropy}  # multi-hot rows of one 1 are class weights


# ---------------------------------------------------------------------------------------------
# tokens: resident where they fit, read ahead from the file where they do not

class Store:
    """Rows of tokens.npy (float16 (clips, N, D)) as batches on the device.

    rows: those that are read once and stay on the device. All others come from the file by sorted
    reads, in threads, a chunk ahead of the step; on CUDA through pinned memory."""

    def __init__(self, file, rows, device):
        self.file, self.rows, self.device = file, rows, device
        array = np.load(file, mmap_mode="r")
        self.shape, self.offset, self.stride = array.shape, array.offset, array[0].nbytes
        self.fd = os.open(file, os.O_RDONLY)
        self.pool = concurrent.futures.ThreadPoolExecutor(4)
        self.slot, self.resident = torch.full((len(array),), -1), None

    def fill(self):
        """Read the resident rows, once; where the memory is not there, do without."""
        rows, self.rows = self.rows, self.rows[:0]
        if not len(rows):
            return
        try:
            resident = torch.empty((len(rows), *self.shape[1:]), dtype=torch.float16,
                                   device=self.device)
        except RuntimeError:  # of which torch.OutOfMemoryError is one
            print("no memory for resident tokens: they are read from the file in every epoch")
            return
        for i, tokens in zip(range(0, len(rows), BATCH), self.reads(rows.split(BATCH))):
            resident[i:i + BATCH] = tokens
        self.slot[rows], self.resident = torch.arange(len(rows)), resident

    def read(self, rows, out):
        """The tokens of rows, in the order asked for, read in the file's, into the first of out
        (clips, N, D) float16 on the CPU; returns these."""
        out = out[:len(rows)]
        view = memoryview(out.numpy()).cast("B")

        def fetch(items):
            for i, row in items:
                done = 0
                while done < self.stride:
                    at = i * self.stride
                    got = os.preadv(self.fd, [view[at + done:at + self.stride]],
                                    self.offset + row * self.stride + done)
                    if not got:
                        raise OSError(errno.EIO, "it ends early", self.file)
                    done += got
        jobs = sorted(enumerate(rows.tolist()), key=lambda job: job[1])
        share = -(-len(jobs) // 4)
        list(self.pool.map(fetch, [jobs[i:i + share] for i in range(0, len(jobs), share)]))
        return out

    def chunks(self, parts):
        """Yield (rows of a part, take): take(places) is the tokens (B, N, D), B <= BATCH, of
        rows[places], float32 on the device, good until the next.

        Every batch is written into the same memory: fresh pages cost more than what is copied."""
        self.fill()
        shape = (min(BATCH, max(map(len, parts))), *self.shape[1:])
        half = torch.empty(shape, dtype=torch.float16, device=self.device)
        whole = torch.empty(shape, device=self.device)
        resident = self.resident is not None and bool((self.slot[torch.cat(parts)] >= 0).all())
        for part, source in zip(parts, itertools.repeat(self.resident) if resident
                                else self.reads(parts)):
            source = source.to(self.device)  # waits: the next but one is read into its memory
            slots = self.slot[part] if resident else torch.arange(len(part))
            slots = slots.to(self.device, non_blocking=True)

            def take(places):
                torch.index_select(source, 0, slots[places], out=half[:len(places)])
                return whole[:len(places)].copy_(half[:len(places)])
            yield part, take

    def reads(self, parts):
        """Yield the tokens of each part from the file, good until the next, which is read ahead."""
        shape = (max(map(len, parts)), *self.shape[1:])
        outs = [torch.empty(shape, dtype=torch.float16, pin_memory=self.device == "cuda")
                for _ in range(2)]
        with concurrent.futures.ThreadPoolExecutor(1) as ahead:
            job = None
            for part, out in zip(parts, itertools.cycle(outs)):
                job, ready = ahead.submit(self.read, part, out), job
                if ready:
                    yield ready.result()
            yield job.result()


def chunks(store, parts):
    """Store.chunks, or None for tokens where a head wants [cls] alone."""
    return store.chunks(parts) if store else ((part, lambda places: None) for part in parts)


def batches(store, rows):
    """Yield (rows of a batch, its tokens as above), in order."""
    for chunk, take in chunks(store, rows.split(CHUNK)):
        places = torch.arange(len(chunk), device=store.device if store else "cpu")
        for part, at in zip(chunk.split(BATCH), places.split(BATCH)):
            yield part, take(at)


def mean_of_tokens(store, *groups):
    """In place of [cls]: (clips, D) float32, the mean of the tokens of the rows in groups."""
    out = torch.zeros(store.shape[0], store.shape[2])
    for rows in filter(len, groups):
        for part, tokens in batches(store, rows):
            out[part] = tokens.mean(1).cpu()
    return out


# ---------------------------------------------------------------------------------------------
# one run

def train(heads, seeds, store, cls, labels, rows, lr, decay, loss, name=""):
    """EPOCHS passes of AdamW with a cosine to zero, no warm-up; the last state is the result.

    heads, one a seed, are trained in one pass, each as if alone: an epoch goes through random
    chunks of clips, the same for all seeds, and each seed shuffles the clips of a chunk, so that
    its order is as random as any. Returns (per head: loss per epoch, seconds per epoch of all).
    Raises Stop if a loss is not finite."""
    device, optimizers, schedules = labels.device, [], []
    for head in heads:
        plain, decayed = [], []
        for key, p in head.named_parameters():
            (decayed if key.endswith("weight") and p.ndim == 2 else plain).append(p)
        optimizers.append(torch.optim.AdamW([{"params": decayed, "weight_decay": decay},
                                             {"params": plain, "weight_decay": 0}],
                                            lr=lr, fused=True))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizers[-1], EPOCHS * -(-len(rows) // BATCH)))
    draw = torch.Generator()  # its default seed is always the same
    shuffles = [torch.Generator().manual_seed(seed) for seed in seeds]
    parts = [[rows[some.sort().values] for some in  # sorted: as they lie in the file
              torch.randperm(len(rows), generator=draw).split(CHUNK)] for _ in range(EPOCHS)]
    stream = chunks(store, sum(parts, []))
    losses, seconds, shown = [[] for _ in heads], [], time.time()
    for epoch in range(EPOCHS):
        begin, total = time.time(), torch.zeros(len(heads), device=device)
        for part, take in itertools.islice(stream, len(parts[epoch])):
            part = part.to(device, non_blocking=True)
            for k, head in enumerate(heads):
                order = torch.randperm(len(part), generator=shuffles[k])
                for places in order.to(device, non_blocking=True).split(BATCH):
                    at = part[places]
                    logits = head(take(places), None if cls is None else cls[at])
                    value = LOSSES[loss](logits, labels[at])
                    objective = value + head.penalty() if hasattr(head, "penalty") else value
                    optimizers[k].zero_grad()
                    objective.backward()
                    optimizers[k].step()
                    schedules[k].step()
                    total[k] += value.detach() * len(places)  # .item() would wait for the GPU
        for k, value in enumerate((total / len(rows)).tolist()):
            losses[k].append(value)
            if not np.isfinite(value):
                raise Stop(f"the loss is {value} in epoch {epoch + 1}: the tokens hold numbers "
                           f"that are not finite, or the learning rate {lr} is too high")
        seconds.append(time.time() - begin)
        if sys.stderr.isatty() or time.time() - shown > 60:  # in place, or a line a minute in a log
            print(f"{name}  epoch {epoch + 1:2d}/{EPOCHS}  loss {losses[0][-1]:.5f}  "
                  f"{seconds[-1]:.2f} s", end="   \r" if sys.stderr.isatty() else "\n",
                  file=sys.stderr)
            shown = time.time()
    return losses, seconds


@torch.no_grad()
def centre(head, store, rows, seed):
    """Set score_mean to the mean score of each prototype over CENTRE random training clips."""
    total = torch.zeros_like(head.score_mean)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CENTRE]]
    for _, tokens in batches(store, rows):
        scores = head.similarity(tokens)[0]
        total += (scores.relu() if head.kind == "proto" else scores).sum(0)
    head.score_mean.copy_(total / len(rows))


def is_there(folder, settings, evidence):
    """Whether this run is there, whole. Raises Stop if it was made with other settings."""
    file = os.path.join(folder, "run.json")
    if not os.path.exists(file):
        return False
    try:
        old = json.load(open(file, encoding="utf-8"))
        differ = [k for k in settings if old.get(k) != settings[k]]
    except (ValueError, AttributeError):
        raise Stop(f"{file} cannot be read; --overwrite makes the run anew")
    if differ:
        raise Stop(f"{folder} was made with other settings ({', '.join(differ)}); --overwrite "
                   f"makes it anew")
    return not evidence or os.path.exists(os.path.join(folder, "evidence.npy"))


def run(pool, seeds, dump, store, cls, labels, args, root):
    """Make the runs of one head, in one pass, but for those that are there or that another process
    makes: in hidden folders, which get their names when all is in them."""
    settings = {"pool": pool, "lr": args.lr or default_lr(pool, dump["M"] * labels.shape[1]),
                "weight_decay": args.decay, "loss": args.loss
                or ("asl" if dump["meta"]["task"] == "multi" else "ce"), "epochs": EPOCHS,
                "batch": BATCH, "chunk": CHUNK, "prototypes": dump["M"],
                "split": "valid" if args.valid else "test", "dump": dump["meta"],
                "tokens_md5": dump["tokens_md5"], "labels_md5": dump["labels_md5"]}
    todo = {}  # seed: (folder, hidden folder, where an old run goes)
    with contextlib.ExitStack() as held:
        for seed in seeds:
            folder = os.path.join(root, pool, f"seed{seed}")
            lock, work, old = (os.path.join(root, pool, f".seed{seed}.{end}")
                               for end in ("lock", "new", "old"))
            try:
                held.enter_context(alone(lock, f"{folder} is being made by another process, left "
                                               f"alone"))
            except Stop as e:
                print(e)
                continue
            if os.path.exists(old) and not os.path.exists(folder):  # killed between two renames
                os.rename(old, folder)
            for rest in (old, work):  # of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            if not args.overwrite and is_there(folder, settings | {"seed": seed}, args.evidence):
                print(f"{folder} is there already")
                continue
            os.makedirs(work)
            held.callback(shutil.rmtree, work, ignore_errors=True)
            todo[seed] = folder, work, old
        if not todo:
            return
        infos = train_and_test(settings, {seed: work for seed, (_, work, _) in todo.items()}, dump,
                               store, cls, labels, args.evidence)
        for info, (folder, work, old) in zip(infos, todo.values()):
            if os.path.exists(folder):
                os.rename(folder, old)
            os.rename(work, folder)
            shutil.rmtree(old, ignore_errors=True)
            print(f"{pool:>10}  seed {info['seed']}  {info['parameters']:>10,} parameters  "
                  f"{info['seconds_per_epoch']:.2f} s/epoch  loss {info['loss_at_end']:.5f}  -> "
                  f"{folder}")


def train_and_test(settings, works, dump, store, cls, labels, with_evidence):
    """Train a head on every fold with each seed of works {seed: folder}, test each clip once, write
    the files of the runs into those folders; returns what each run.json says. Raises Stop for
    tokens that are not finite."""
    pool, seeds, folds = settings["pool"], list(works), dump["folds"]
    M, grid, device = dump["M"], dump["meta"]["grid"], labels.device
    C, (N, D) = labels.shape[1], dump["shape"][1:]
    clips = sum(len(test) for _, test in folds.values())
    heads, losses = [{} for _ in seeds], [{} for _ in seeds]
    logits, evidence = np.zeros((len(seeds), clips, C), np.float32), []
    for work in works.values() if with_evidence else ():
        evidence.append(np.lib.format.open_memmap(os.path.join(work, "evidence.npy"), "w+",
                                                  np.float16, (clips, C, N)))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no crash later
            with open(evidence[-1].filename, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(f.name))
    if store:
        store.fill()
    begin, seconds, done = time.time(), [], 0
    peak_memory(device, reset=True)
    for fold, (rows, test) in folds.items():
        some = []
        for seed in seeds:
            torch.manual_seed(seed)  # before the head: seeds draw the initialisation too
            some.append(make_head(pool, D, C, grid, M).to(device))
        name = (f"{pool} seed {' '.join(map(str, seeds))}"
                + (f" fold {fold}" if len(folds) > 1 else ""))
        lost, took = train(some, seeds, store, cls, labels, rows, settings["lr"],
                           settings["weight_decay"], settings["loss"], name)
        seconds += took
        for k, head in enumerate(some):
            heads[k][fold], losses[k][fold] = head.eval(), lost[k]
            if hasattr(head, "similarity"):
                centre(head, store, rows, seeds[k])
        with torch.no_grad():
            for part, tokens in batches(store, test):
                z, at = None if cls is None else cls[part.to(device)], slice(done, done + len(part))
                for k, head in enumerate(some):
                    logits[k, at] = head(tokens, z).cpu().numpy()
                    if with_evidence:
                        evidence[k][at] = head.evidence(tokens, z).half().cpu()
                done += len(part)
    if not np.isfinite(logits).all():
        row = torch.cat([test for _, test in folds.values()])[~np.isfinite(logits).all((0, 2))][0]
        raise Stop(f"{dump['folder']}: the tokens of row {row}, a tested clip, are not finite")
    infos = []
    for k, (seed, work) in enumerate(works.items()):
        np.save(os.path.join(work, "logits.npy"), logits[k])
        np.save(os.path.join(work, "rows.npy"),
                torch.cat([test for _, test in folds.values()]).numpy())
        save_head(os.path.join(work, "head.pt"), pool, D, C, grid, M, heads[k])
        infos.append(settings | {
            "seed": seed, "parameters": sum(p.numel() for p in head.parameters()),
            "losses": losses[k], "loss_at_end": losses[k][fold][-1],
            "seconds_per_epoch": sum(seconds) / len(seconds) / len(seeds),
            "seconds": (time.time() - begin) / len(seeds), "seeds_in_one_pass": len(seeds),
            "peak_memory_bytes": peak_memory(device), "device": device_name(device),
            "wants": head.wants, "cls": None if head.wants == "tokens" else dump["cls_is"],
            "resident": bool(store) and store.resident is not None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}})
        with open(os.path.join(work, "run.json"), "w", encoding="utf-8") as f:
            json.dump(infos[k], f, indent=1)
    return infos


def alone(file, otherwise=None):
    """An open file with a lock that ends when it is closed or the process ends. Where another
    process has it: wait, or raise Stop(otherwise)."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    f = open(file, "w")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
    except (BlockingIOError, PermissionError):
        raise Stop(otherwise)
    return f


def peak_memory(device, reset=False):
    """Most bytes held since the last reset: on the GPU, or by this process (Linux; elsewhere since
    it began)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            open("/proc/self/clear_refs", "w").write("5")
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(lines["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------
# the dump

def newest_dump(data, model):
    """The newest complete tokens/<data>/<model>, either name left open. Raises Stop."""
    found, begun = [], ""
    for file in glob.glob(os.path.join("tokens", data or "*", model or "*", "meta.json")):
        try:
            if json.load(open(file, encoding="utf-8"))["complete"]:
                found.append((os.path.getmtime(file), os.path.dirname(file)))
            else:
                begun = f" ({os.path.dirname(file)} is begun; the command that began it goes on)"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        raise Stop(f"no complete dump in tokens/{data or '*'}/{model or '*'}{begun}; make one with "
                   f"python extract.py" + (f" --data {data}" if data else "")
                   + (f" --model {model}" if model else "")
                   + ", or by hand with \"complete\": true in its meta.json")
    return max(found)[1]


def open_dump(folder, valid):
    """dict: folder, meta, shape (clips, N, D), labels (clips, C), M, folds {name: (train rows,
    tested rows)}. With a `test` split one fold, train + valid -> test (or, to choose settings,
    train -> valid); without one each split is a fold. Raises Stop for what does not fit."""
    def load(name):
        try:
            return np.load(os.path.join(folder, name), mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise Stop(f"{folder}/{name} cannot be read ({e}); extract the tokens again")
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    absent = {"task", "grid", "complete"} - set(meta)
    if absent:
        raise Stop(f"{folder}/meta.json lacks {' '.join(sorted(absent))}")
    if meta["task"] not in ("single", "multi") or not isinstance(meta["grid"], list) \
            or [type(n) for n in meta["grid"]] != [int, int]:
        raise Stop(f"{folder}/meta.json: task {meta['task']!r} must be single or multi, grid "
                   f"{meta['grid']} must be [T, F]")
    tokens, labels = load("tokens.npy"), load("labels.npy")
    try:
        classes = open(os.path.join(folder, "classes.txt"), encoding="utf-8").read().splitlines()
    except (OSError, ValueError) as e:
        raise Stop(f"{folder}/classes.txt cannot be read ({e}); it names the classes, one a line, "
                   f"in the order of labels.npy's columns")
    try:
        with open(os.path.join(folder, "clips.csv"), newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            splits = [row["split"] for row in reader]
            if not all(splits) or {"path", "start"} - set(reader.fieldnames):
                raise ValueError("a column is missing, or some row's split")
    except (OSError, KeyError, ValueError) as e:
        raise Stop(f"{folder}/clips.csv cannot be read ({e}); its header is "
                   f"path,start,split,labels")
    if not tokens.ndim == 3 or not len(tokens) == len(labels) == len(splits):
        raise Stop(f"{folder}: tokens.npy {tokens.shape}, labels.npy {labels.shape} and clips.csv "
                   f"({len(splits)} rows) do not belong together; make them again")
    cls = load("cls.npy") if os.path.exists(os.path.join(folder, "cls.npy")) else None
    if labels.shape[1:] != (len(classes),):
        raise Stop(f"{folder}: labels.npy {labels.shape} must be (clips, classes), and classes.txt "
                   f"has {len(classes)} lines; mend one of them")
    if cls is not None and cls.shape != (len(tokens), tokens.shape[2]):
        raise Stop(f"{folder}: cls.npy {cls.shape} does not fit tokens.npy {tokens.shape}; make "
                   f"them again, or remove cls.npy")
    if tokens.dtype != np.float16:
        raise Stop(f"{folder}/tokens.npy is {tokens.dtype}; save it as float16")
    if not tokens.flags.c_contiguous:
        raise Stop(f"{folder}/tokens.npy is in Fortran order; save np.ascontiguousarray(tokens)")
    if not np.isin(labels, (0, 1)).all() or (meta["task"] == "single"
                                             and (labels.sum(1) != 1).any()):
        raise Stop(f"{folder}/labels.npy holds other than 0 and 1, or the task is single and some "
                   f"clip has not exactly one class; mend it")
    if tokens.shape[1] != meta["grid"][0] * meta["grid"][1]:
        raise Stop(f"{folder}: {tokens.shape[1]} tokens a clip and grid {meta['grid']} in "
                   f"meta.json do not agree")
    rows = {s: torch.tensor([i for i, x in enumerate(splits) if x == s])
            for s in dict.fromkeys(splits)}
    names, lower = {"train", "valid", "test"}, {s.lower() for s in rows}
    if names & lower and (set(rows) - names or not valid and "test" not in rows):
        raise Stop(f"{folder}/clips.csv has the splits {' '.join(map(str, rows))}; they are train, "
                   f"valid and test, the last one needed but for --valid, or folds of other names")
    if valid:
        if not {"train", "valid"} <= set(rows):
            raise Stop(f"{folder} has the splits {' '.join(rows)}; --valid needs train and valid")
        folds = {"valid": (rows["train"], rows["valid"])}
    elif "test" in rows:
        chosen = [rows[s] for s in ("train", "valid") if s in rows]
        if not chosen:
            raise Stop(f"{folder} has the splits {' '.join(rows)}; there is nothing to train on")
        folds = {"test": (torch.cat(chosen).sort().values, rows["test"])}
    elif len(rows) > 1:
        folds = {s: (torch.cat([rows[o] for o in rows if o != s]).sort().values, rows[s])
                 for s in sorted(rows)}
    else:
        raise Stop(f"{folder} has one split only ({' '.join(rows)}); name some clips test, or "
                   f"give them folds")
    some = [a[i] for a in (tokens, cls) if a is not None for i in (0, len(a) // 2, -1)]
    md5 = [hashlib.md5(b"".join(parts)).hexdigest()  # enough to know the dump again
           for parts in ([a.tobytes() for a in some],
                         [np.ascontiguousarray(labels), "\n".join(splits).encode()])]
    return {"folder": folder, "meta": meta, "shape": tokens.shape, "labels": labels, "cls": cls,
            "tokens_md5": md5[0], "labels_md5": md5[1],
            "M": meta.get("prototypes", PROTOTYPES), "folds": folds}


def free_memory(device):
    """Bytes: of the GPU, or of the machine without what other programs hold."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":") for line in open("/proc/meminfo"))
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # a container or a batch job may have less than the machine
        group = open("/proc/self/cgroup").read().strip().rpartition(":")[2]
        return min(free, int(open(f"/sys/fs/cgroup{group}/memory.max").read()))
    except (OSError, ValueError):  # there is none, or it is "max"
        return free


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    parser.add_argument("--pool", default="protobin", metavar="NAME[,NAME...]",
                        help=f"all, or of {' '.join(HEADS)} (default protobin)")
    parser.add_argument("--data", help="dataset (default: of the newest complete dump)")
    parser.add_argument("--model", help="encoder (default: of the newest complete dump)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N",
                        help=f"runs, with seeds 0 to N-1 (default {SEEDS})")
    parser.add_argument("--evidence", action="store_true",
                        help="also write what each token added to each logit")
    # to choose settings
    parser.add_argument("--valid", action="store_true",
                        help="train on train, test on valid, write below runs_valid/")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: per head)")
    parser.add_argument("--decay", type=float, default=DECAY,
                        help=f"weight decay (default {DECAY:g})")
    parser.add_argument("--loss", choices=tuple(LOSSES),
                        help="default: asl for multi, ce for single")
    # how
    parser.add_argument("--runs", metavar="DIR", help="default runs, with --valid runs_valid")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one")
    parser.add_argument("--memory", type=float, metavar="GB",
                        help=f"for resident tokens (default: {100 * MEMORY:g} %% of what is free)")
    parser.add_argument("--overwrite", action="store_true", help="make runs that are there anew")
    args = parser.parse_args()

    pools = list(HEADS) if args.pool == "all" else args.pool.split(",")
    for pool in pools:
        if pool not in HEADS:
            raise Stop(f"unknown head {pool!r}; there are {' '.join(HEADS)}")
        if args.evidence and not hasattr(HEADS[pool], "evidence"):
            raise Stop(f"{pool} has no evidence: its logits are not a sum over tokens; leave "
                       f"--evidence out")
    if args.seeds < 1 or not (args.lr is None or args.lr > 0) or not args.decay >= 0:
        raise Stop("--seeds must be 1 or more, --lr more than 0, --decay 0 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Stop("torch finds no CUDA device here; leave --device out")
    dump = open_dump(folder := newest_dump(args.data, args.model), args.valid)
    meta = dump["meta"]
    runs = args.runs or ("runs_valid" if args.valid else "runs")
    root = os.path.join(runs, *folder.split(os.sep)[-2:])
    clips, N, D = dump["shape"]
    print(f"{folder}: {clips:,} clips, {N} tokens of {D}, {dump['labels'].shape[1]} classes, "
          f"{meta['task']}; " + ", ".join(f"{len(a):,} -> {len(b):,} ({s})"
                                          for s, (a, b) in dump["folds"].items()))
    device = torch.device(args.device)
    wanted = torch.cat([a for a, _ in dump["folds"].values()]).unique()
    tested = torch.cat([b for _, b in dump["folds"].values()])
    tested = tested[~torch.isin(tested, wanted)]  # none where there are folds
    labels = torch.zeros(clips, dump["labels"].shape[1])
    labels[wanted] = torch.from_numpy(dump["labels"][wanted.numpy()]).float()  # no test label
    labels = labels.to(device)
    wants = {HEADS[pool].wants for pool in pools}
    budget = args.memory * 1e9 if args.memory is not None else MEMORY * free_memory(args.device)
    store = None
    if wants != {"cls"} or dump["cls"] is None:
        stay, where = wanted[:0], "read from the file in every epoch"
        if wants == {"cls"}:
            where = "read for their means"
        elif (len(wanted) + len(tested)) * 2 * N * D <= budget:
            stay, where = torch.cat([wanted, tested]), "resident"
        elif len(wanted) * 2 * N * D <= budget:
            stay, where = wanted, "resident, but for the tested ones"
        store = Store(os.path.join(folder, "tokens.npy"), stay, args.device)
        print(f"{device_name(device)}; tokens ({(len(wanted) + len(tested)) * 2 * N * D / 1e9:.2f} "
              f"GB) {where}")
    cls, dump["cls_is"] = None, None
    if wants & {"cls", "both"}:
        if dump["cls"] is not None:
            cls, dump["cls_is"] = torch.from_numpy(np.array(dump["cls"])).float(), "[cls]"
        else:
            cls = mean_of_tokens(store, wanted, tested)
            dump["cls_is"] = "mean of tokens (no [cls])"
            print("this encoder has no [cls]: linear, mlp and linearc use the mean of the tokens")
        cls = cls.to(device)
    seeds, failed = range(args.seeds), []
    # from the file: all seeds in one pass; from memory one by one, so that a stop costs one run
    groups = [seeds] if store and not len(stay) else [[s] for s in seeds]
    for pool in pools:
        wants, left = HEADS[pool].wants, groups[:]
        while left:
            group = left.pop(0)
            try:
                run(pool, group, dump, None if wants == "cls" else store,
                    None if wants == "tokens" else cls, labels, args, root)
            except (Stop, ValueError, RuntimeError) as e:
                if type(e) is RuntimeError and "allocate memory" not in str(e):  # the CPU's way
                    raise
                if len(group) == 1:
                    failed.append(f"{pool} seed {group[0]}: {str(e).splitlines()[0]}")
                    break
                left = [[seed] for seed in group]  # the others need not fail with one of them
    if failed:
        raise Stop("; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except Stop as e:
        sys.exit(print(f"probe.py: {e}", file=sys.stderr) or 2)
    except OSError as e:
        sys.exit(print(f"probe.py: {e.filename or 'the run'}: {e.strerror or e}; mend that and run "
                       "the same command again, finished runs are kept", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nprobe.py: stopped; finished runs are kept", file=sys.stderr) or 130)
