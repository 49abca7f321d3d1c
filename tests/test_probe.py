"""probe.py: each head against a slow, obvious second implementation, the training protocol, the
token store, and what happens when something is wrong."""

import copy
import inspect
import json
import math
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import planted, refused, script, start, write_dump

import probe

B, T, FREQ, D, C, M = 3, 5, 4, 64, 6, 3
N, GRID = T * FREQ, (T, FREQ)


@pytest.fixture
def clips():
    torch.manual_seed(0)
    return torch.randn(B, N, D), torch.randn(B, D)


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


# slow second implementations: one clip, plain loops, gradients by autograd

def slow_linear(h, x, c):
    return h.linear.weight @ c + h.linear.bias


def slow_mean(h, x, c):
    return h.linear.weight @ (sum(x) / len(x)) + h.linear.bias


def slow_mlp(h, x, c):
    one, _, two = h.layers
    return two.weight @ torch.clamp(one.weight @ c + one.bias, min=0) + two.bias


def slow_linearc(h, x, c):
    return h.linear.weight[:, :D] @ c + h.linear.weight[:, D:] @ (sum(x) / len(x)) + h.linear.bias


def slow_conv(h, x, c):
    w, total = h.conv.weight, 0
    for t in range(T):
        for f in range(FREQ):
            value = h.conv.bias
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= t + i < T and 0 <= f + j < FREQ:
                        value = value + w[:, :, 1 + i, 1 + j] @ x[(t + i) * FREQ + f + j]
            total = total + torch.clamp(value, min=0)
    return h.linear.weight @ (total / N) + h.linear.bias


def slow_linpre(h, x, c):
    steps = [torch.cat([x[t * FREQ + f] for f in range(FREQ)]) for t in range(T)]
    return h.linear.weight @ (sum(steps) / T) + h.linear.bias


def pool(weights, values):
    return sum(w * v for w, v in zip(weights, values))


def slow_abmilp(h, x, c):
    one, _, two = h.score
    u = torch.stack([(two.weight @ torch.tanh(one.weight @ v + one.bias) + two.bias)[0] for v in x])
    return h.linear.weight @ pool(u.softmax(0), x) + h.linear.bias


def slow_simpool(h, x, c):
    def norm(v):
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt() * h.norm.weight + h.norm.bias
    y = [norm(v) for v in x]
    q = sum(y) / len(y)
    a = torch.stack([q @ v / D ** 0.5 for v in y]).softmax(0)
    return h.linear.weight @ pool(a, y) + h.linear.bias


def slow_ep(h, x, c):
    Q = len(h.queries)
    values, parts = [h.value.weight @ v for v in x], []
    for q in range(Q):
        a = torch.stack([h.queries[q] @ v / D ** 0.5 for v in x]).softmax(0)
        parts.append(pool(a, [v[q * D // Q:(q + 1) * D // Q] for v in values]))
    return h.linear.weight @ torch.cat(parts) + h.linear.bias


def slow_mhca(h, x, c):
    d, parts = D // h.heads, []
    for i in range(h.heads):
        at = slice(i * d, (i + 1) * d)
        keys = [(h.key.weight @ v)[at] for v in x]
        a = torch.stack([h.query[at] @ k / d ** 0.5 for k in keys]).softmax(0)
        parts.append(pool(a, [(h.value.weight @ v)[at] for v in x]))
    return h.linear.weight @ torch.cat(parts) + h.linear.bias


def slow_prototypes(h, x, c):
    p = h.prototypes
    if h.kind == "protobin":
        b = torch.where(p >= 0, torch.ones_like(p), -torch.ones_like(p))
        p = b + p - p.detach()
    s = []
    for k in range(len(p)):
        cosines = torch.stack([v @ p[k] / (v.norm() * p[k].norm()) for v in x])
        s.append(cosines.max())
    s = torch.stack(s)
    if h.kind != "proto":
        return h.linear.weight @ s + h.linear.bias
    return torch.stack([sum(torch.clamp(h.weight[j, m], min=0) * torch.clamp(s[j * M + m], min=0)
                            for m in range(M)) + h.bias[j] for j in range(C)])


SLOW = {name: globals()[f"slow_{name}"] for name in probe.HEADS if f"slow_{name}" in globals()}
SLOW |= dict.fromkeys(("proto", "protofloat", "protobin"), slow_prototypes)


def fresh(name):
    torch.manual_seed(1)
    head = probe.make_head(name, D, C, GRID, M)
    if name == "proto":  # signs of both kinds, so that its two relus matter
        head.weight.data = torch.randn(C, M)
        head.prototypes.data = torch.randn(M * C, D)
    return head


@pytest.mark.parametrize("name", probe.HEADS)
def test_head_equals_slow_implementation(name, clips):
    tokens, cls = clips
    head = fresh(name)
    logits = head(tokens, cls)
    g = torch.randn(B, C)
    (logits * g).sum().backward()
    fast = {k: p.grad.clone() for k, p in head.named_parameters()}
    head.zero_grad()
    slow = torch.stack([SLOW[name](head, list(x), c) for x, c in zip(tokens, cls)])
    (slow * g).sum().backward()
    torch.testing.assert_close(logits, slow, rtol=1e-4, atol=1e-5)
    for k, p in head.named_parameters():
        if (name, k) != ("abmilp", "score.2.bias"):  # softmax knows no shift
            assert p.grad.abs().max() > 1e-6, f"{k} gets no gradient"
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(fast[k], p.grad, rtol=0, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("kind", ("protobin", "protofloat", "proto"))
@pytest.mark.parametrize("K,tokens_per_clip", ((40, 31), (2500, 7)))
def test_similarity_gradient_equals_naive_graph(kind, K, tokens_per_clip, monkeypatch):
    """Against normalise + matmul + max + autograd in double precision, 1e-6 relative, over several
    tiles; the projection term of normalising after the sign is part of it."""
    torch.manual_seed(0)
    x = torch.randn(40, tokens_per_clip, 96)
    head = probe.Prototypes(96, 10, K // 10, kind)
    head.prototypes.data[0, 0] = 0  # the sign of zero is +1
    g = torch.randn(40, K)
    head.double()
    s, places = head.similarity(x.double())
    (s * g).sum().backward()
    p = head.prototypes.detach().clone().requires_grad_()
    b = torch.where(p >= 0, 1.0, -1.0) + p - p.detach() if kind == "protobin" else p
    naive = (torch.nn.functional.normalize(x.double(), dim=2)
             @ torch.nn.functional.normalize(b, dim=1).T).max(1)
    (naive.values * g).sum().backward()
    assert torch.equal(places, naive.indices)
    torch.testing.assert_close(s, naive.values, rtol=1e-9, atol=1e-12)
    error = (head.prototypes.grad - p.grad).norm() / p.grad.norm()
    assert error < 1e-6, error
    if kind == "protobin":  # without the projection term it would be another gradient
        flat = b.detach() / 96 ** 0.5
        along = (p.grad * flat).sum(1).abs().max()
        assert along < 1e-9 and p.grad.norm() > 1


@pytest.mark.parametrize("K", (40, 2500))
def test_search_in_half_precision(K, monkeypatch):
    """The branch for CUDA, here on the CPU: another token may win by half precision's rounding, but
    what wins is scored, and its gradient made, in float32."""
    torch.manual_seed(0)
    x, g = torch.randn(70, 33, 96), torch.randn(70, K)
    head = probe.Prototypes(96, 10, K // 10, "protofloat")
    exact, winner = head.similarity(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        s, places = head.similarity(x)
    assert (places == winner).float().mean() > 0.99
    p = torch.nn.functional.normalize(head.prototypes, dim=1)
    unit = torch.nn.functional.normalize(x, dim=2)
    naive = torch.stack([(unit[b, places[b]] * p).sum(1) for b in range(len(x))])   # (B, K)
    torch.testing.assert_close(s, naive, rtol=0, atol=1e-6)
    assert 0 <= (exact - s).min() + 1e-6 and (exact - s).max() < 1e-3
    for scores in (s, naive):
        head.prototypes.grad = None
        (scores * g).sum().backward(retain_graph=True)
        scores.gradient = head.prototypes.grad
    assert (s.gradient - naive.gradient).norm() < 1e-5 * naive.gradient.norm()


def test_no_similarity_tensor_is_kept():
    """What autograd saves is the tokens and the winners' places, never (B, N, K)."""
    head = probe.Prototypes(32, 50, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                  lambda t: t):
        head(torch.randn(8, 64, 32))
    assert max(saved) < 8 * 64 * 1000 / 10, saved


@pytest.mark.parametrize("name", probe.HEADS)
def test_token_order_and_batch_of_one(name, clips):
    tokens, cls = clips
    head = fresh(name).eval()
    with torch.no_grad():
        logits = head(tokens, cls)
        assert head(tokens[:1], cls[:1]).shape == (1, C)
        torch.testing.assert_close(head(tokens[:1], cls[:1])[0], logits[0], rtol=1e-4, atol=1e-5)
        shuffled = head(tokens[:, torch.randperm(N)], cls)
        same = torch.allclose(shuffled, logits, rtol=1e-4, atol=1e-5)
    assert same == (name not in ("conv", "linpre"))


@pytest.mark.parametrize("name", [n for n in probe.HEADS if hasattr(probe.HEADS[n], "evidence")])
def test_evidence_adds_up_to_the_logit(name, clips):
    tokens, cls = clips
    head = fresh(name).eval()
    with torch.no_grad():
        if hasattr(head, "score_mean"):
            head.score_mean.copy_(head.similarity(tokens)[0].relu().mean(0))
        evidence = head.evidence(tokens, cls)
        assert evidence.shape == (B, C, N)
        rest = head(tokens, cls) - evidence.sum(-1)  # the same for all clips
        torch.testing.assert_close(rest, rest[:1].expand(B, -1), rtol=0, atol=1e-4)
        if hasattr(head, "linear") and not hasattr(head, "score_mean"):
            torch.testing.assert_close(rest[0], head.linear.bias, rtol=0, atol=1e-4)
        # a token's evidence sits at its own place
        moved = head.evidence(tokens.roll(1, 1), cls)
    if name not in ("conv", "linpre"):
        torch.testing.assert_close(moved, evidence.roll(1, 2), rtol=0, atol=1e-4)


def test_heads_without_evidence():
    assert {n for n in probe.HEADS if not hasattr(probe.HEADS[n], "evidence")} == {
        "linear", "mlp", "linearc"}


# D*C + C and so on, counted by hand for D = 768, N = 64 x 8
COUNTS = {
    "linear": (7690, 38450, 153800, 405263), "mean": (7690, 38450, 153800, 405263),
    "mlp": (398858, 419378, 496328, 664079), "linearc": (15370, 76850, 307400, 809999),
    "linpre": (61450, 307250, 1229000, 3238415), "abmilp": (599051, 629811, 745161, 996624),
    "simpool": (9226, 39986, 155336, 406799), "ep": (622090, 652850, 768200, 1019663),
    "mhca": (1188106, 1218866, 1334216, 1585679),
    "proto": (153810, 769050, 3076200, 8105787),
    "protofloat": (155610, 818050, 3872200, 13649827),
    "protobin": (155610, 818050, 3872200, 13649827)}


@pytest.mark.parametrize("name", probe.HEADS)
def test_parameter_counts(name):
    for classes, count in zip((10, 50, 200, 527), COUNTS.get(name, ())):
        head = probe.make_head(name, 768, classes, (64, 8), 20)
        assert sum(p.numel() for p in head.parameters()) == count
    if name == "conv":  # our own: 9*D*h + h + h*C + C, h = 256
        head = probe.make_head(name, 768, 10, (64, 8), 20)
        assert sum(p.numel() for p in head.parameters()) == 9 * 768 * 256 + 256 + 2560 + 10
    if name == "protobin":  # as20k: ten prototypes a class
        head = probe.make_head(name, 768, 527, (64, 8), 10)
        assert sum(p.numel() for p in head.parameters()) == 6825177


@pytest.mark.parametrize("name", probe.HEADS)
def test_head_pasted_alone(name, clips):
    """The class's source in a namespace that holds torch and nothing else."""
    space = {"torch": torch}
    exec(inspect.getsource(probe.HEADS[name]), space)
    more = {"conv": {"grid": GRID}, "linpre": {"grid": GRID}}.get(name, {})
    if probe.HEADS[name] is probe.Prototypes:
        more = {"M": M, "kind": name}
    head = space[probe.HEADS[name].__name__](D, C, **more)
    tokens, cls = clips
    head(tokens, cls).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_protobin_is_exactly_binary_and_starts_small():
    torch.manual_seed(0)
    head = probe.Prototypes(256, 10, 20)
    assert abs(head.prototypes.std().item() - 0.02) < 1e-3
    x = torch.randn(2, 9, 256)
    s, _ = head.similarity(x)
    signs = torch.where(head.prototypes >= 0, 1.0, -1.0)
    assert torch.equal(s, head.MaxCos.apply(x, torch.nn.functional.normalize(signs, dim=1))[0])


def test_proto_penalty():
    head = probe.Prototypes(16, 3, 4, "proto")
    total = 0
    for c in range(3):
        p = head.prototypes[c * 4:c * 4 + 4]
        p = p / p.norm(dim=1, keepdim=True)
        total += ((p @ p.T - torch.eye(4)) ** 2).sum()
    torch.testing.assert_close(head.penalty(), total.sqrt() / (3 * 4 * 4))


def test_rates_lie_in_the_papers_ranges():
    for K in (200, 1000, 4000, 5270, 10540):
        for pool in probe.HEADS:
            low, high = (2e-3, 8e-2) if "proto" in pool else (1e-4, 7e-3)
            assert low <= probe.default_lr(pool, K) <= high, (pool, K)
    assert 1e-5 <= probe.DECAY <= 5e-4


def test_asymmetric_loss():
    logits, labels = torch.tensor([[2.0, -1.0, -6.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    p = [1 / (1 + math.exp(-v)) for v in (2.0, -1.0, -6.0)]
    total = (1 - p[0]) * math.log(p[0])
    q = 1 - p[1] + 0.05
    total += (1 - q) ** 4 * math.log(q)  # the third is within the margin: 0
    assert abs(probe.asymmetric_loss(logits, labels).item() + total / 3) < 1e-6


# ---------------------------------------------------------------------------------------------
# store and protocol

def test_store_reads_equal_resident_reads():
    tokens, labels = planted(clips=300)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 200 + ["test"] * 100)
    rows = torch.randperm(200)
    inside = probe.Store(folder / "tokens.npy", torch.arange(200), "cpu")
    outside = probe.Store(folder / "tokens.npy", rows[:0], "cpu")
    for (a, x), (b, y) in zip(probe.batches(inside, rows), probe.batches(outside, rows),
                              strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
        assert torch.equal(x, torch.from_numpy(tokens[a].astype(np.float16)).float())
    assert inside.resident is not None and outside.resident is None
    test = torch.arange(200, 300)  # not resident: read from the file by both
    assert torch.equal(torch.cat([x for _, x in probe.batches(inside, test)]),
                       torch.from_numpy(tokens[200:].astype(np.float16)).float())
    mean = probe.mean_of_tokens(inside, torch.arange(200), test)
    torch.testing.assert_close(mean.numpy(), tokens.astype(np.float16).astype(np.float32).mean(1),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory,times", ((1, 1), (200 * 768 / 1e9, 30 * 2 + 1)))
def test_how_often_a_clip_is_read(memory, times, monkeypatch):
    """Once for all heads and seeds where the memory is there; where it is not, once an epoch and
    head for all its seeds, and once for the mean."""
    tokens, labels = planted(clips=300)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 250 + ["test"] * 50)
    reads, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: reads.append(at) or preadv(fd, to, at))
    done = script("probe.py", "--pool", "mean,linear,simpool", "--seeds", 2, "--memory", memory)
    assert done.returncode == 0, done.stderr
    count = {at: reads.count(at) for at in set(reads)}
    assert len(count) == 300 and sorted(count.values())[-1] == times, count


def test_training_equals_a_plain_loop():
    """AdamW with torch's own betas, decay for the matrices of linear layers alone, a cosine from lr
    to 0 over all steps, proto's penalty in the objective, the last state kept."""
    tokens, labels = planted(clips=150)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 150)
    store = probe.Store(folder / "tokens.npy", torch.arange(150), "cpu")
    x = torch.from_numpy(np.load(folder / "tokens.npy")).float()
    y = torch.from_numpy(labels).float()
    for pool in ("proto", "protobin", "simpool"):
        torch.manual_seed(3)
        head = probe.make_head(pool, 32, 4, (12, 1), 2)
        plain = copy.deepcopy(head)
        (losses,), _ = probe.train([head], [7], store, None, y, torch.arange(150), 0.02, 0.1, "asl")
        matrices = {"proto": ["weight"]}.get(pool, ["linear.weight"])
        states = {k: [torch.zeros_like(p), torch.zeros_like(p)]
                  for k, p in plain.named_parameters()}
        shuffle, step = torch.Generator().manual_seed(7), 0
        for epoch in range(30):
            total = 0
            for part in torch.randperm(150, generator=shuffle).split(128):
                loss = probe.asymmetric_loss(plain(x[part]), y[part])
                total += loss.item() * len(part) / 150
                plain.zero_grad()
                (loss + (plain.penalty() if pool == "proto" else 0)).backward()
                lr, step = 0.02 * (1 + math.cos(math.pi * step / 60)) / 2, step + 1
                with torch.no_grad():
                    for k, p in plain.named_parameters():
                        m, v = states[k]
                        p -= lr * 0.1 * p if k in matrices else 0
                        m += 0.1 * (p.grad - m)
                        v += 0.001 * (p.grad ** 2 - v)
                        p -= lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt()
                                                             + 1e-8)
            if epoch == 0:
                assert abs(losses[0] - total) < 1e-5
        assert abs(losses[-1] - total) < 0.02 * total, (pool, losses[-1], total)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("pool", ("mean", "proto", "protobin", "linear"))
def test_seeds_in_one_pass_equal_seeds_one_by_one(pool, monkeypatch):
    """To the bit, over several chunks, from memory and from the file; each seed sees every clip
    once an epoch, in an order of its own."""
    tokens, labels = planted(clips=150)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 150)
    y, cls = torch.from_numpy(labels).float(), torch.from_numpy(tokens).float().mean(1)
    cls[:, 0] = torch.arange(150)  # tells the clip
    monkeypatch.setattr(probe, "BATCH", 16)
    monkeypatch.setattr(probe, "CHUNK", 64)
    monkeypatch.setattr(probe, "EPOCHS", 3)
    trained, orders = {}, {}
    for seeds, stay in (([4], 150), ([9], 0), ([4, 9], 0), ([9, 4], 150)):
        store = probe.Store(folder / "tokens.npy", torch.arange(stay), "cpu")
        heads = []
        for seed in seeds:
            torch.manual_seed(seed)
            heads.append(probe.make_head(pool, 32, 4, (12, 1), 2))
            order = orders[tuple(seeds), seed] = []
            heads[-1].register_forward_pre_hook(
                lambda _, given, order=order: order.extend(given[1][:, 0].int().tolist()))
        losses, seconds = probe.train(heads, seeds, store if pool != "linear" else None, cls, y,
                                      torch.arange(150), 0.02, 0.1, "asl")
        assert len(seconds) == 3 and [len(x) for x in losses] == [3] * len(seeds)
        for seed, head, loss in zip(seeds, heads, losses):
            trained[tuple(seeds), seed] = head.state_dict(), loss
    for seed in (4, 9):
        alone, *shared = [k for k in trained if k[1] == seed]
        for other in shared:
            assert trained[alone][1] == trained[other][1] and orders[alone] == orders[other]
            for name, value in trained[alone][0].items():
                assert torch.equal(value, trained[other][0][name])
        epochs = [orders[alone][i:i + 150] for i in (0, 150, 300)]
        assert all(sorted(x) == list(range(150)) for x in epochs) and epochs[0] != epochs[1]
    a, b = orders[(4,), 4], orders[(9,), 9]
    assert a != b and set(a[:64]) == set(b[:64]) != set(range(64))  # the chunk is shared


def runs(pool="protobin", seed=0, root="runs"):
    return pathlib.Path(root, "d", "m", pool, f"seed{seed}")


def test_run_on_a_foreign_dump_and_small_memory_give_the_same():
    """A folder written with np.save is enough; tokens larger than the allowed memory change
    nothing; the same seed gives the same bits."""
    tokens, labels = planted()
    write_dump("tokens/d/m", tokens, labels, ["train"] * 80 + ["test"] * 40)
    done = script("probe.py", "--pool", "protobin,linear,linearc", "--seeds", 2)
    assert done.returncode == 0, done.stderr
    assert "use the mean of the tokens" in done.stdout
    info = json.load(open(runs() / "run.json"))
    assert info["parameters"] == 80 * 32 + 80 * 4 + 4 and len(info["losses"]["test"]) == 30
    assert info["cls"] is None and info["seconds_per_epoch"] > 0
    assert 5e7 < info["peak_memory_bytes"] < 5e9
    assert json.load(open(runs("linear") / "run.json"))["cls"] == "mean of tokens (no [cls])"
    assert np.load(runs() / "rows.npy").tolist() == list(range(80, 120))
    first = np.load(runs() / "logits.npy")
    assert first.dtype == np.float32 and first.shape == (40, 4)
    assert not np.array_equal(first, np.load(runs(seed=1) / "logits.npy"))
    again = script("probe.py", "--pool", "protobin", "--seeds", 1, "--memory", 0, "--runs", "again")
    assert again.returncode == 0 and "read from the file" in again.stdout, again.stderr
    assert np.array_equal(first, np.load(runs(root="again") / "logits.npy"))
    # a finished run is left as it is
    before = os.path.getmtime(runs() / "run.json")
    third = script("probe.py", "--pool", "protobin", "--seeds", 1)
    assert "is there already" in third.stdout and os.path.getmtime(runs() / "run.json") == before
    # other settings would mix: refused, unless asked for
    refused(script("probe.py", "--pool", "protobin", "--seeds", 1, "--lr", 0.5), "lr",
            "--overwrite")


def test_test_labels_are_never_read():
    tokens, labels = planted()
    write_dump("tokens/d/m", tokens, labels, ["train"] * 80 + ["test"] * 40)
    wrong = labels.copy()
    wrong[80:] = ~wrong[80:]
    write_dump("tokens/e/m", tokens, wrong, ["train"] * 80 + ["test"] * 40)
    for data in ("d", "e"):
        assert script("probe.py", "--data", data, "--seeds", 1).returncode == 0
    assert np.array_equal(np.load("runs/d/m/protobin/seed0/logits.npy"),
                          np.load("runs/e/m/protobin/seed0/logits.npy"))


def test_folds_and_single_label():
    tokens, _ = planted(clips=900, C=3, strength=0)
    kinds = np.arange(900) % 3
    tokens[np.arange(900), 0] += 4 * np.random.default_rng(5).standard_normal((3, 32))[kinds]
    labels = np.eye(3, dtype=bool)[kinds]
    folder = write_dump("tokens/d/m", tokens, labels, [str(1 + i // 300) for i in range(900)],
                        task="single", cls=tokens.mean(1))
    done = script("probe.py", "--pool", "protobin", "--seeds", 1)
    assert done.returncode == 0, done.stderr
    info = json.load(open(runs() / "run.json"))
    assert info["loss"] == "ce" and set(info["losses"]) == {"1", "2", "3"}
    rows = np.load(runs() / "rows.npy")
    assert sorted(rows.tolist()) == list(range(900))
    accuracy = (np.load(runs() / "logits.npy").argmax(1) == kinds[rows]).mean()
    assert accuracy > 0.8, accuracy
    os.remove(folder / "cls.npy")  # linear on the mean, which is what the mean was given as [cls]
    first = script("probe.py", "--pool", "linear", "--seeds", 1)
    assert first.returncode == 0, first.stderr
    np.save(folder / "cls.npy", tokens.astype(np.float16).mean(1, dtype=np.float32))
    assert script("probe.py", "--pool", "linear", "--seeds", 1, "--runs", "own").returncode == 0
    np.testing.assert_allclose(*(np.load(runs("linear", root=r) / "logits.npy")
                                 for r in ("runs", "own")), rtol=1e-3, atol=1e-3)
    # each fold's head scores its own fold's clips to the logits on disk
    saved = torch.load(runs() / "head.pt", weights_only=True)
    assert list(saved["folds"]) == ["1", "2", "3"]
    head = probe.load_head(runs() / "head.pt", "2")
    fold = rows // 300 == 1
    x = torch.from_numpy(np.load(folder / "tokens.npy")[rows[fold]]).float()
    torch.testing.assert_close(head(x).detach().numpy(), np.load(runs() / "logits.npy")[fold],
                               rtol=1e-4, atol=1e-5)


def test_head_file_holds_bits():
    tokens, labels = planted(D=64)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 80 + ["test"] * 40)
    done = script("probe.py", "--seeds", 1, "--evidence")
    assert done.returncode == 0, done.stderr
    state = torch.load(runs() / "head.pt", weights_only=True)["folds"]["test"]
    assert state["prototypes"].dtype == torch.uint8 and state["prototypes"].shape == (80, 8)
    evidence, logits = np.load(runs() / "evidence.npy"), np.load(runs() / "logits.npy")
    assert evidence.dtype == np.float16 and evidence.shape == (40, 4, 12)
    head = probe.load_head(runs() / "head.pt")
    rest = logits - evidence.astype(np.float32).sum(-1)
    assert rest.std(0).max() < 5e-3 < logits.std(0).min()  # float16 on disk
    train = torch.from_numpy(tokens[:80].astype(np.float16)).float()
    torch.testing.assert_close(head.score_mean, head.similarity(train)[0].mean(0).detach(),
                               rtol=1e-4, atol=1e-6)


def test_valid_runs_go_elsewhere_and_never_see_test():
    tokens, labels = planted()
    splits = ["train"] * 60 + ["valid"] * 30 + ["test"] * 30
    write_dump("tokens/d/m", tokens, labels, splits)
    assert script("probe.py", "--valid", "--seeds", 1, "--lr", 0.02, "--loss", "bce").returncode == 0
    assert not os.path.exists("runs")
    assert np.load(runs(root="runs_valid") / "rows.npy").tolist() == list(range(60, 90))
    info = json.load(open(runs(root="runs_valid") / "run.json"))
    assert (info["split"], info["lr"], info["loss"]) == ("valid", 0.02, "bce")
    assert script("probe.py", "--seeds", 1).returncode == 0  # now train + valid
    assert np.load(runs() / "rows.npy").tolist() == list(range(90, 120))


def test_a_dump_that_changed_makes_its_runs_stale():
    """Also one without extract.py's own record of its clips."""
    tokens, labels = planted(clips=60)
    splits = ["train"] * 40 + ["test"] * 20
    write_dump("tokens/d/m", tokens, labels, splits)
    assert script("probe.py", "--pool", "mean", "--seeds", 1).returncode == 0
    shutil.rmtree("tokens")
    write_dump("tokens/d/m", tokens[::-1], labels[::-1], splits)
    refused(script("probe.py", "--pool", "mean", "--seeds", 1), "tokens_md5, labels_md5")
    shutil.rmtree("tokens")
    write_dump("tokens/d/m", tokens, labels, splits[::-1], cls=tokens.mean(1))
    refused(script("probe.py", "--pool", "mean", "--seeds", 1), "tokens_md5, labels_md5")
    scored = script("evaluate.py")
    assert scored.returncode == 1 and "labels or splits are others" in scored.stderr
    shutil.rmtree("tokens")
    write_dump("tokens/d/m", tokens + 1, labels, splits)
    scored = script("evaluate.py")
    assert scored.returncode == 1 and "tokens are others now" in scored.stderr


def test_shuffled_labels_bring_every_head_to_the_baseline():
    """No head may find its way to the test labels: trained on permuted labels, macro mAP is within
    3 points of prevalence; trained on the true ones it is not."""
    from sklearn.metrics import average_precision_score
    tokens, labels = planted(clips=2200, N=6, D=64, C=30, share=0.15, strength=0.8)
    mixed = labels.copy()
    mixed[:800] = labels[np.random.default_rng(1).permutation(800)]
    splits = ["train"] * 800 + ["test"] * 1400
    for data, y in (("mixed", mixed), ("true", labels)):
        write_dump(f"tokens/{data}/m", tokens, y, splits, grid=[3, 2], cls=tokens.mean(1),
                   prototypes=4)
    assert script("probe.py", "--data", "mixed", "--pool", "all", "--seeds", 1).returncode == 0
    assert script("probe.py", "--data", "true", "--seeds", 1).returncode == 0

    def score(folder):
        logits = np.load(f"runs/{folder}/seed0/logits.npy")
        return 100 * average_precision_score(labels[800:], logits)
    base = 100 * labels[800:].mean()
    for name in probe.HEADS:
        assert abs(score(f"mixed/m/{name}") - base) < 3, (name, score(f"mixed/m/{name}"), base)
    assert score("true/m/protobin") > base + 20


def test_killed_run_leaves_nothing_and_claims_are_respected():
    tokens, labels = planted(clips=3000, N=64, D=64, C=10)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 2500 + ["test"] * 500)
    lock = runs().with_name(".seed0.lock")
    job = start("probe.py", "--seeds", 1)
    while not lock.exists():
        time.sleep(0.02)
        assert job.poll() is None, job.stderr.read()
    other = script("probe.py", "--seeds", 1)  # while the first one works
    assert other.returncode == 0 and "being made by another process" in other.stdout, other.stdout
    assert job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert {p.name for p in lock.parent.iterdir()} == {".seed0.new", ".seed0.lock"}
    again = script("probe.py", "--seeds", 1)  # its lock went with it
    assert again.returncode == 0, again.stderr
    assert {p.name for p in lock.parent.iterdir()} == {"seed0", ".seed0.lock"}
    before = np.load(runs() / "logits.npy")
    again = script("probe.py", "--seeds", 1, "--overwrite")
    assert again.returncode == 0 and np.array_equal(before, np.load(runs() / "logits.npy"))
    assert {p.name for p in lock.parent.iterdir()} == {"seed0", ".seed0.lock"}


@pytest.mark.parametrize("moment", (0, 1))
def test_overwriting_loses_nothing_when_killed(moment, monkeypatch):
    """At each of its two renames: the run that is there afterwards is a whole one."""
    tokens, labels = planted(clips=40)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    assert script("probe.py", "--pool", "mean", "--seeds", 1).returncode == 0
    before, rename, calls = np.load(runs("mean") / "logits.npy"), os.rename, iter(range(9))

    def killed(a, b):
        if next(calls) == moment:
            raise KeyboardInterrupt
        rename(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        stopped = script("probe.py", "--pool", "mean", "--seeds", 1, "--overwrite", "--lr", 0.1)
    assert stopped.returncode == 130
    again = script("probe.py", "--pool", "mean", "--seeds", 1)
    assert again.returncode == 0 and "is there already" in again.stdout, again.stderr
    assert np.array_equal(before, np.load(runs("mean") / "logits.npy"))


def test_what_a_killed_overwriting_left_goes_with_the_next_start():
    """Also where the run is there and nothing is made."""
    tokens, labels = planted(clips=40)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    assert script("probe.py", "--pool", "mean", "--seeds", 1).returncode == 0
    for end in ("new", "old"):
        shutil.copytree(runs("mean"), runs("mean").with_name(f".seed0.{end}"))
    again = script("probe.py", "--pool", "mean", "--seeds", 1)
    assert again.returncode == 0 and "is there already" in again.stdout, again.stderr
    assert {p.name for p in runs("mean").parent.iterdir()} == {"seed0", ".seed0.lock"}


# ---------------------------------------------------------------------------------------------
# bad input

def test_mistakes_get_one_sentence():
    refused(script("probe.py"), "no complete dump", "python extract.py")
    tokens, labels = planted(clips=40)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    refused(script("probe.py", "--pool", "protobni"), "protobni", "protobin")
    refused(script("probe.py", "--pool", "linear", "--evidence"), "no evidence")
    refused(script("probe.py", "--valid"), "--valid needs train and valid")
    refused(script("probe.py", "--pool", "mhca,ep", "--data", "x"), "tokens/x")
    refused(script("probe.py", "--seeds", 0), "--seeds")
    refused(script("probe.py", "--lr", 0), "--lr")
    refused(script("probe.py", "--device", "cuda"), "no CUDA device")
    pathlib.Path("file").write_text("")
    refused(script("probe.py", "--seeds", 1, "--runs", "file"), "file")
    np.save(folder / "cls.npy", np.zeros((3, 32), np.float16))
    refused(script("probe.py", "--pool", "linear"), "cls.npy")
    os.remove(folder / "cls.npy")
    refused(script("probe.py", "--lr", 1e30, "--pool", "mlp", "--seeds", 1), "loss is")
    assert not list(pathlib.Path("runs").rglob("seed*"))

    meta = json.loads((folder / "meta.json").read_text())
    for change, words in (({"complete": False}, ["no complete dump", "d/m is begun"]), ({"grid": [5, 2]}, ["grid"]),
                          ({"grid": 12}, ["grid"]), ({"task": "multilabel"}, ["multilabel"])):
        (folder / "meta.json").write_text(json.dumps(meta | change))
        refused(script("probe.py"), *words)
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "task"}))
    refused(script("probe.py"), "lacks task")
    (folder / "meta.json").write_text(json.dumps(meta))
    np.save(folder / "labels.npy", labels[:-1].astype(np.uint8))
    refused(script("probe.py"), "do not belong together")
    classes = (folder / "classes.txt").read_text()
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    (folder / "classes.txt").write_text(classes + "one more\n")
    refused(script("probe.py"), "labels.npy (40, 4)", "5 lines")
    os.remove(folder / "classes.txt")
    refused(script("probe.py"), "classes.txt cannot be read")
    (folder / "classes.txt").write_text(classes)
    np.save(folder / "labels.npy", 0.7 * labels)
    refused(script("probe.py"), "labels.npy", "other than 0 and 1")
    (folder / "labels.npy").write_bytes(b"")
    refused(script("probe.py"), "labels.npy cannot be read")
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    np.save(folder / "tokens.npy", tokens.astype(np.float32))
    refused(script("probe.py"), "float16")
    np.save(folder / "tokens.npy", np.asfortranarray(tokens.astype(np.float16)))
    refused(script("probe.py"), "Fortran order")
    np.save(folder / "tokens.npy", tokens.astype(np.float16))
    np.save(folder / "labels.npy", 255 * labels.astype(np.uint8))
    refused(script("probe.py"), "labels.npy")
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    table = (folder / "clips.csv").read_text()
    for new in ("Test", "val", "", "\xff"):
        (folder / "clips.csv").write_text(table.replace(",test,", f",{new},"), encoding="latin-1")
        refused(script("probe.py"), "clips.csv")
    (folder / "clips.csv").write_text(table.replace("train", "Train").replace("test", "Test"))
    refused(script("probe.py"), "splits Train Test")
    (folder / "clips.csv").write_text(table)
    half = tokens.astype(np.float16)
    half[3, 0, 0] = np.nan
    np.save(folder / "tokens.npy", half)
    refused(script("probe.py", "--seeds", 1), "not finite")
    half[3, 0, 0], half[35, 0, 0] = 0, np.nan
    np.save(folder / "tokens.npy", half)
    refused(script("probe.py", "--seeds", 1), "row 35, a tested clip")


def test_a_file_that_ends_early_is_named():
    tokens, labels = planted(clips=40)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    store = probe.Store(folder / "tokens.npy", torch.arange(0), "cpu")
    os.truncate(folder / "tokens.npy", 3000)
    with pytest.raises(OSError, match="ends early"):
        next(store.reads([torch.arange(40)]))


def test_too_little_memory_for_resident_tokens_is_no_error(monkeypatch, capsys):
    tokens, labels = planted(clips=40)
    folder = write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    store, empty = probe.Store(folder / "tokens.npy", torch.arange(40), "cpu"), torch.empty

    def short(shape, **kind):
        if shape[0] == 40 and kind["dtype"] == torch.float16:
            raise RuntimeError("no memory")
        return empty(shape, **kind)
    monkeypatch.setattr(torch, "empty", short)
    monkeypatch.setattr(probe, "CHUNK", 16)
    got = torch.cat([x.clone() for _, x in probe.batches(store, torch.arange(40))])
    assert "no memory for resident tokens" in capsys.readouterr().out and store.resident is None
    assert torch.equal(got, torch.from_numpy(tokens.astype(np.float16)).float())


def test_one_head_that_fails_does_not_stop_the_others():
    tokens, labels = planted(clips=40, D=36)  # 32 does not divide 36: no ep
    write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    done = script("probe.py", "--pool", "ep,mean", "--seeds", 1)
    refused(done, "ep seed 0", "36")
    assert (runs("mean") / "run.json").exists()


def test_one_seed_that_fails_does_not_stop_the_others(monkeypatch):
    """From the file all seeds share a pass; when one of them fails they go one by one."""
    tokens, labels = planted(clips=40)
    write_dump("tokens/d/m", tokens, labels, ["train"] * 30 + ["test"] * 10)
    normal, made = torch.nn.Linear.reset_parameters, []

    def third_is_nan(self):
        normal(self)
        if torch.initial_seed() == 2:
            self.bias.data[0] = math.nan
        made.append(torch.initial_seed())
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "reset_parameters", third_is_nan)
        done = script("probe.py", "--pool", "mean", "--seeds", 4, "--memory", 0)
    refused(done, "mean seed 2", "the loss is nan in epoch 1")
    assert made == [0, 1, 2, 3, 0, 1, 2]
    assert {p.name for p in runs("mean").parent.glob("seed*")} == {"seed0", "seed1"}
