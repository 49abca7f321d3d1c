"""Each head against a slow, obvious second implementation; the loss and the learning rates."""

import inspect
import itertools
import re

import pytest
import torch
from conftest import ROOT
import probe

B, T, F, D, C, M = 3, 5, 4, 64, 6, 3
N, GRID = T * F, (T, F)
TOKENS = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0)).double()
CLS = TOKENS[:, 0].flip(1)                                                   # (B, D)
PROTOTYPES = "protobin", "protofloat", "proto"
normalize = torch.nn.functional.normalize

def build(name, D=D, C=C, M=M):
    torch.manual_seed(1)
    head = probe.HEADS[name](D, C, GRID, M).double().eval()
    if name == "proto":  # weights and cosines of both signs, so that its two relus matter
        torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(head.prototypes)
    return head

def sums(name, h, x):
    """What a head adds up over the tokens x of a clip: per part, a weight and a value per token."""
    parts, values = [], x
    if name == "linpre":
        return [([(n % F == f) * F / len(x) for n in range(len(x))], x) for f in range(F)]
    if name == "conv":
        values = [h.conv.bias] * len(x)
        for n, i, j in itertools.product(range(len(x)), (-1, 0, 1), (-1, 0, 1)):
            t, f = n // F + i, n % F + j
            if 0 <= t < len(x) // F and 0 <= f < F:
                values[n] = values[n] + h.conv.weight[:, :, 1 + i, 1 + j] @ x[t * F + f]
        values = [value.clamp(min=0) for value in values]
    if name in ("mean", "conv"):
        return [([1 / len(x)] * len(x), values)]
    if name == "abmilp":
        u, _, w = h.score
        a = torch.cat([w.weight @ (u.weight @ v + u.bias).tanh() + w.bias for v in x])
        return [(a.softmax(0), x)]
    if name == "simpool":
        y = [(v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt() for v in x]
        y = [h.norm.weight * v + h.norm.bias for v in y]
        return [(torch.stack([sum(y) / len(y) @ v / D ** 0.5 for v in y]).softmax(0), y)]
    if name in PROTOTYPES:
        p = h.prototypes
        p = torch.where(p >= 0, 1, -1) + p - p.detach() if name == "protobin" else p
        for k, row in enumerate(p):
            cosines = torch.stack([v @ row / (v.norm() * row.norm()) for v in x])
            best = cosines.max().clamp(min=0 if name == "proto" else -1)
            wins = torch.arange(len(x)) == cosines.argmax()
            parts.append((wins, [(best - h.score_mean[k]).view(1)] * len(x)))
        return parts
    width = D // (len(h.query) if name == "ep" else h.heads)
    for i, at in enumerate(slice(first, first + width) for first in range(0, D, width)):
        a = ([h.query[i] @ v / D ** 0.5 for v in x] if name == "ep" else  # else mhca
             [h.query[at] @ (h.key.weight @ v)[at] / width ** 0.5 for v in x])
        parts.append((torch.stack(a).softmax(0), [(h.value.weight @ v)[at] for v in x]))
    return parts

def slow(name, h, x, c, keep):
    """The logits of one clip by plain loops; only the tokens in `keep` are added up."""
    if name == "mlp":
        one, _, two = h.linear
        return two.weight @ (one.weight @ c + one.bias).clamp(min=0) + two.bias
    if name in ("linear", "linearc"):
        z = [c] if name == "linear" else [c, sum(x) / len(x)]
    else:
        z = [sum((a[n] * v[n] for n in keep), 0 * v[0]) for a, v in sums(name, h, x)]
    if name == "proto":
        return (h.weight.clamp(min=0) * torch.cat(z).view(C, M)).sum(1) + h.bias
    return h.linear.weight @ torch.cat(z) + h.linear.bias

@pytest.mark.parametrize("clips, steps", ((B, T), (B, 2), (1, T)))  # heads take T from the tokens
@pytest.mark.parametrize("name", probe.HEADS)
def test_head_equals_slow_implementation(name, clips, steps):
    head, tokens, keep = build(name), TOKENS[:clips, :steps * F], range(steps * F)
    logits, g = head(tokens, CLS[:clips]), torch.randn(clips, C)
    expected = torch.stack([slow(name, head, list(x), c, keep) for x, c in zip(tokens, CLS)])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)
    keys, params = zip(*head.named_parameters())
    for key, *grads in zip(keys, *(torch.autograd.grad(x, params, g) for x in (logits, expected))):
        if (name, key) != ("abmilp", "score.2.bias"):  # softmax ignores a shift
            assert grads[0].abs().max() > 1e-6, f"{key} gets no gradient"
        torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-10)

@pytest.mark.parametrize("name", sorted(probe.HEADS.keys() - {"linear", "mlp", "linearc"}))
def test_evidence_is_what_each_token_added(name):
    head = build(name).requires_grad_(False)
    if name in PROTOTYPES:
        head.score_mean.copy_(0.1 * torch.rand(M * C))
    evidence = head.evidence(TOKENS)                                         # (B, C, N)
    for i, n in itertools.product(range(B), range(N)):
        one, none = (slow(name, head, list(TOKENS[i]), None, keep) for keep in ([n], []))
        torch.testing.assert_close(evidence[i, :, n], one - none, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize("clips_at_once", (1, 3))
@pytest.mark.parametrize("name", PROTOTYPES)
@pytest.mark.parametrize("K,N", ((40, 31), (2500, 7)))
def test_prototype_gradient_equals_naive_graph(name, K, N, clips_at_once, monkeypatch):
    head, x, g = build(name, 96, 10, K // 10), torch.randn(40, N, 96).double(), torch.randn(40, K)
    x[:, 1], x[:, 4], x[2] = x[:, 3], 0, 0  # ties, zero tokens, a clip of zeros
    head.prototypes.data[0, 0] = 0          # its sign is +1
    monkeypatch.setattr(probe, "TILE", {"cpu": clips_at_once * N * K})
    s, places = head.similarity(x)
    (s * g).sum().backward()
    p = head.prototypes.detach().clone().requires_grad_()
    unit = torch.where(p >= 0, 1, -1) + p - p.detach() if name == "protobin" else p
    cosines = normalize(x, dim=2) @ normalize(unit, dim=1).T                 # (B, N, K)
    best = cosines.max(1).values
    naive = best.relu() if name == "proto" else best
    (naive * g).sum().backward()
    torch.testing.assert_close(s, naive, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cosines.gather(1, places[:, None])[:, 0], best)
    assert (head.prototypes.grad - p.grad).norm() < 1e-9 * p.grad.norm()

@pytest.mark.parametrize("K, N", ((40, 31), (1025, 250)))
def test_half_precision_finds_the_winners_of_float64(K, N):
    torch.manual_seed(0)
    x, p = torch.randn(36, N, 96).half(), normalize(torch.randn(K, 96).sign(), dim=1)
    q = p.double().requires_grad_()
    s, places = probe.MaxCos.apply(x, p.requires_grad_())
    exact, winners = (normalize(x.double(), dim=2) @ q.T).max(1)
    assert torch.equal(places, winners)
    torch.testing.assert_close(s.double(), exact, rtol=0, atol=1e-6)
    (s.square().sum() + exact.square().sum()).backward()
    torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)

def test_initial_values():
    torch.manual_seed(0)
    protobin, proto = (probe.HEADS[name](256, 10, None, 20) for name in ("protobin", "proto"))
    assert abs(protobin.prototypes.std().item() - 0.02) < 1e-3
    assert (proto.weight == 1).all() and (proto.bias == -2).all()
    assert 0 <= proto.prototypes.min() < 0.01 and 0.99 < proto.prototypes.max() < 1

def test_proto_penalty():
    head = build("proto")
    total = sum(((p @ p.T - torch.eye(M)) ** 2).sum()
                for p in normalize(head.prototypes, dim=1).split(M))
    torch.testing.assert_close(head.penalty(), total.sqrt() / (C * M * M))

@pytest.mark.parametrize("name", probe.HEADS)
def test_parameter_counts_of_the_readme(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row, = re.findall(rf"^\| `{name}` \|.*`(.*)` \| (?:yes|no) \|", readme, re.M)
    for C, M in ((10, 20), (527, 10)):
        sizes = {"D": 768, "C": C, "K": M * C, "F": 8, "h": 256 if name == "conv" else 512}
        head = probe.HEADS[name](768, C, (64, 8), M)
        assert sum(p.numel() for p in head.parameters()) == eval(row.replace("^", "**"), sizes)

@pytest.mark.parametrize("name", probe.HEADS)
def test_head_pasted_alone(name):
    parts = [probe.half_product, probe.MaxCos] * (name in PROTOTYPES)
    parts += [base for base in probe.HEADS[name].__mro__[::-1] if base.__module__ == "probe"]
    space = {"torch": torch, "nn": torch.nn, "TILE": probe.TILE}
    exec("".join(inspect.getsource(part) for part in parts), space)
    pasted = space[probe.HEADS[name].__name__](D, C, GRID, M).double()
    pasted.load_state_dict(build(name).state_dict())
    assert torch.equal(pasted(TOKENS, CLS), build(name)(TOKENS, CLS))
    pasted(TOKENS, CLS).sum().backward()

def test_asymmetric_loss_equals_two_terms_in_value_and_gradient():
    logits, y = (4 * torch.randn(50, 9)).double().requires_grad_(), torch.rand(50, 9).round()
    p = logits.sigmoid()
    q = (1 - p + 0.05).clamp(max=1)
    plain = -(y * (1 - p) * p.log() + (1 - y) * (1 - q) ** 4 * q.log()).mean()
    loss = probe.asymmetric_loss(logits, y)
    torch.testing.assert_close(*((value, torch.autograd.grad(value, logits)[0])
                                 for value in (loss, plain)), rtol=1e-9, atol=1e-12)

def test_default_rates_lie_in_the_papers_ranges():
    for pool, K in itertools.product(probe.HEADS, (200, 1000, 4000, 5270, 10540)):
        low, high = (2e-3, 8e-2) if "proto" in pool else (1e-4, 7e-3)
        assert low <= probe.default_lr(pool, K) <= high
        assert K > 1000 or probe.default_lr(pool, K) == probe.LR[pool]
    assert 1e-5 <= probe.DECAY <= 5e-4
