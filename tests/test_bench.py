"""bench.py at sizes of seconds: it runs, and the graphs it compares compute the same."""

import re

import bench
import pytest
import torch


def test_graphs_agree():
    """Ours, matmul and conv2d: the same gradient of latents and layer."""
    grads = []
    for kind in ("ours", "matmul", "conv2d"):
        step, _, head = bench.protobin_graph(kind, 100, 4, N=12, D=32)
        step()
        grads.append([p.grad for p in head.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert grads[0][0].abs().max() > 0


@pytest.mark.parametrize("name,sizes,says", (
    ("io", dict(clips=50), r"training reads \d+\.\d\d GB/s = \d+%"),
    ("scale", dict(clips=256, N=8, D=32, C=20, M=2), r"K = 40, resident: \d+ s an epoch, peak 0\.\d"),
    ("seeds", dict(clips=128, N=8, D=64, seeds=2), r"protobin: 2 seeds.* x faster"),
    ("costs", {}, r"the grid: 9 x 377,543 clips, 1\.49 TB")))
def test_small_sizes(name, sizes, says, capsys, monkeypatch):
    import probe
    monkeypatch.setattr(probe, "EPOCHS", 1)  # bench_scale sets it
    getattr(bench, f"bench_{name}")(**sizes)
    assert re.search(says, capsys.readouterr().out)


def test_pipeline_without_encoder(tmp_path, monkeypatch):
    import extract
    import numpy as np
    import soundfile
    soundfile.write(tmp_path / "a.wav", np.zeros(16000 * 10), 16000)
    assert bench.pipeline(extract, str(tmp_path / "a.wav"), str(tmp_path), 4, clips=20) > 1
    tokens = np.load(tmp_path / "dump16000" / "tokens.npy", mmap_mode="r")
    assert tokens.shape == (20, 512, 768)
