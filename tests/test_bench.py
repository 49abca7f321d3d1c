"""bench.py at sizes of seconds: it runs, and the graphs it compares compute the same."""

import re

import bench
import pytest
import torch

@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_graphs_agree(kind):
    ours, naive = (bench.protobin_graph(k, 5, 20, 4, 12, 32)[:2] for k in ("ours", kind))
    for step, _ in (ours, naive):
        step()
    for a, b in zip(ours[1].parameters(), naive[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-8)
    assert ours[1].prototypes.grad.abs().max() > 0

def test_products_have_the_encoders_flop():
    run, flop = bench.eat_products(2, 9)
    run()
    assert flop == 2 * 12 * (24 * 9 * 768**2 + 4 * 9**2 * 768)

@pytest.mark.parametrize("name,sizes,says", [
    ("extract", dict(B=1, seconds=1.0, rounds=1, clips=40), r"free encoder: \d+ clips/s"),
    ("probe", dict(sizes=[(4, 2)], B=4, N=12, D=32, rounds=1), r"conv2d: .* x ours"),
    ("io", dict(clips=50), r"training reads \d+\.\d\d GB/s = \d+%"),
    ("scale", dict(clips=256, N=8, D=32, C=20, M=2), r"K = 40: [\d.]+ s an epoch"),
    ("evaluate", dict(clips=4000, C=4, halves=5), r"x faster than scikit-learn"),
    ("costs", {}, r"9 x 377,543 clips of 14 sets: 179 PFLOP"),
    ("rates", dict(D=32, N=8, clips=20, tested=20, sizes=[6]), r"protobin +0.005 +\d")])
def test_small_sizes(name, sizes, says, capsys, monkeypatch):
    monkeypatch.setattr(bench.probe, "EPOCHS", 1)
    getattr(bench, f"bench_{name}")(**sizes)
    assert re.search(says, capsys.readouterr().out)
