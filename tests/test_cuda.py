"""What only a GPU can show, in seven groups; skipped where torch finds no CUDA device.

    pytest tests/test_cuda.py          # some minutes; each group prints a line of figures
    python tests/test_cuda.py heads    # one group, in an empty folder

A group is a function that runs in its own process: conftest.py hides GPUs from the suite, peak
memory is per process, and a device assert ends a process's use of its GPU."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, planted, refused, script, write_dump
from sklearn.metrics import average_precision_score

import extract
import official
import probe

GROUPS = "encoders", "dump", "races", "heads", "runs", "waits", "figures"
cuda_device_count = torch.cuda.device_count


def relative(got, want):
    """Norm of the difference, relative to what is wanted."""
    got, want = (torch.as_tensor(x).detach().double().cpu() for x in (got, want))
    return ((got - want).norm() / want.norm()).item()


def main(module, *args, device="cuda"):
    argv = [f"{module.__name__}.py", "--data", "made", "--device", device, *args]
    with mock.patch.object(sys, "argv", argv):
        module.main()


def write_clips(n, seconds):
    """data/made: noise, of which number 7 is unreadable."""
    os.makedirs("data/made")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000 * seconds + n)
    for i in range(n):
        soundfile.write(f"data/made/{i}.wav", noise[i:16000 * seconds + i], 16000)
    pathlib.Path("data/made/7.wav").write_bytes(b"not audio")
    rows = [f"{i}.wav,{('train', 'test')[i % 2]},c{i % 3}" for i in range(n)]
    pathlib.Path("data/made/manifest.csv").write_text("\n".join(["path,split,labels", *rows]))
    pathlib.Path("datasets.txt").write_text(f"made multi {seconds} 3\n")


def extraction(*args):
    """The bytes of a dump of EAT's shapes."""
    main(extract, "--model", "random", *args)
    return [pathlib.Path(f"tokens/made/random/{name}.npy").read_bytes()
            for name in ("tokens", "cls", "state")]


def write_tokens(model="enc", clips=1000):
    """A dump that a maximum over tokens solves, or with shuffled labels. Labels of its test."""
    tokens, labels = planted(clips, N=64, D=64)
    labels = labels[np.random.default_rng(1).permutation(clips)] if model == "shuffled" else labels
    splits = ["test", "train"] * (clips // 2)
    write_dump(f"tokens/made/{model}", tokens, labels, splits, grid=[16, 4])
    return labels[::2]


def training(pool, memory=0.6, model="enc"):
    with mock.patch.object(probe, "MEMORY", memory):
        main(probe, "--model", model, "--pool", pool, "--seeds", "1", "--overwrite")
    return np.load(f"runs/made/{model}/{pool}/seed0/logits.npy")


def encoders():
    """fp32 against the golden outputs, fp16 against fp32, a clip alone against one in a batch."""
    golden = json.loads((ROOT / "tests/assets/encoders_golden.json").read_text())
    wave, far, halves, alone = official.waveform(10), [], [], []
    waves = torch.stack([wave, wave.flip(0), 0.01 * wave, wave.roll(40000)])
    for name in "eat_10s", "beats_10s", "dasheng_10s", "audiomae_10s", "asit_1024":
        model = name.split("_")[0].replace("audiomae", "amae")
        torch.save(official.state(model), "weights.pt")
        exact, half = (extract.Encoder(model, "weights.pt", 10, "cuda", precision)
                       for precision in ("fp32", "fp16"))
        tokens, cls = exact(waves)
        out = tokens[0] if cls is None else torch.cat([cls[:1], tokens[0]])
        for key, row in {"first": 0, "mid": len(out) // 2, "last": -1}.items():
            far += (out[row, :4].cpu() - torch.tensor(golden[name][key])).abs().tolist()
        halves.append(relative(half(waves)[0], tokens))
        alone.append(relative(half(waves[2:3])[0], half(waves)[0][2:3]))
    assert max(far) < 1e-3 and max(halves) < 2e-3 and max(alone) < 2e-3, (far, halves, alone)
    return f"golden {max(far):.1e}, fp16 {max(halves):.1e}, in a batch {max(alone):.1e} off"


def killed(row):
    """extract.py, whose process is killed when it comes to write this row or one behind it."""
    def write_rows(file, first, rows):
        os.kill(os.getpid(), signal.SIGKILL if first >= row else 0)
        write(file, first, rows)
    write, extract.write_rows = extract.write_rows, write_rows
    extraction()


def dump():
    """300 clips: killed twice and resumed, the same bytes as in one go; memory of the GPU."""
    write_clips(300, 10)
    want, peak = extraction(), torch.cuda.max_memory_allocated() / 1e9
    os.rename("tokens", "whole")
    for row in "150", "220":  # in the third block, and in the fourth
        code = subprocess.run([sys.executable, __file__, "killed", row]).returncode
        assert code == -signal.SIGKILL
    done = np.count_nonzero(np.load("tokens/made/random/state.npy"))
    assert extraction() == want and 64 <= done <= 192 and want[2][-300:][7] == 2 and peak < 2.5
    return f"the same bytes, resumed after {done} of 300 clips; {peak:.2f} GB on the GPU"


def races():
    """The GPU sleeps after each block and each batch, so that the host runs ahead."""
    write_clips(300, 1)
    write_tokens()
    want = extraction(), training("protobin", memory=0)
    encode, batches = extract.Encoder.encode, probe.batches

    def late(out):
        torch.cuda._sleep(3 * 10 ** 7)  # cycles; before the copies to the host, or the next batch
        return out
    with mock.patch.object(extract.Encoder, "encode", lambda *args: late(encode(*args))), \
            mock.patch.object(probe, "batches", lambda *args: map(late, batches(*args))):
        got = extraction("--overwrite"), training("protobin", memory=0)
    assert got[0] == want[0] and np.array_equal(got[1], want[1])
    return "the same bytes and logits on a GPU that lags behind"


def heads(B=8, C=6, grid=(16, 8), D=768):
    """All heads against float64 on the CPU; protobin's winners against float64's."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    tokens, cls, g = torch.randn(B, 128, D).half(), torch.randn(B, D), torch.randn(B, C)
    worst, others = 0, 0
    for name, Head in probe.HEADS.items():
        fast, results = Head(D, C, grid, 3).eval(), []
        if name == "proto":
            torch.nn.init.normal_(fast.prototypes)  # for cosines of both signs
        exact = Head(D, C, grid, 3).double().eval()
        exact.load_state_dict(fast.state_dict())
        half = torch.float16 if name == "protobin" else torch.float32
        for head, x in (exact, tokens.double()), (fast.cuda(), tokens.to("cuda", half)):
            kind = x.device, next(head.parameters()).dtype
            logits = head(x, cls.to(*kind))
            (logits * g.to(*kind)).sum().backward()
            results.append([logits, *(p.grad for key, p in head.named_parameters()
                                      if key != "score.2.bias")])  # ABMILP's, which is 0
            results[-1] += [head.evidence(x)] if hasattr(head, "evidence") else []
        errors = [relative(got, want) for want, got in zip(*results)]
        assert max(errors) < 1e-4, (name, errors)
        worst = max(worst, *errors)
    for K, N in ((K, N) for K in (40, 200, 1025, 5270) for N in (31, 250, 496, 513)):
        x, p = torch.randn(B, N, D).half().cuda(), torch.randn(K, D).sign().cuda() / D ** 0.5
        scores, places = probe.MaxCos.apply(x, p)
        cosines = torch.nn.functional.normalize(x.double(), dim=2) @ p.double().T  # (B, N, K)
        best, where = cosines.max(1)
        lost = best - cosines.gather(1, places[:, None])[:, 0]
        assert lost.max() < 1e-6 and (scores - best).abs().max() < 1e-5, (K, N)
        others += (where != places).sum().item()
    assert others <= 20  # of 209,120, by ties
    return f"logits, gradients, evidence {worst:.1e} off; {others} other winners of 209,120"


def runs():
    """Resident and streamed tokens, and the same command twice, give the same logits."""
    labels, shuffled = write_tokens(), write_tokens("shuffled", 4000)
    for pool in probe.HEADS:
        first, *more = training(pool), training(pool), training(pool, memory=0)
        for x in more:  # cuDNN's gradients of a convolution add up in any order
            same = relative(x, first) < 0.05 if pool == "conv" else np.array_equal(x, first)
            assert same and np.isfinite(first).all(), (pool, relative(x, first))
    found = average_precision_score(labels, training("protobin"))
    chance = average_precision_score(shuffled, training("protobin", model="shuffled"))
    assert found > 0.8 and abs(chance - shuffled.mean()) < 0.05, (found, chance)
    return f"mAP {found:.3f}; shuffled labels {chance:.3f}, prevalence {shuffled.mean():.3f}"


def waits():
    """No step of training waits for the GPU; what a step holds; how errors end."""
    tokens, labels = np.random.randn(600, 32, 64).astype("f2"), torch.rand(600, 4).round().cuda()
    cls, rows, real = torch.randn(600, 64).cuda(), torch.arange(600), probe.batches
    settings = {"lr": 1e-3, "weight_decay": 0, "loss": "asl", "seed": 0}

    def watched(*args):
        for batch in real(*args):
            torch.cuda.set_sync_debug_mode("error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")
    with mock.patch.multiple(probe, batches=watched, EPOCHS=2):
        for Head in probe.HEADS.values():
            for source in (torch.tensor(tokens, device="cuda"), tokens):
                head = Head(64, 4, (8, 4), 3).cuda()
                dtype = torch.float16 if Head is probe.ProtoBin else torch.float32
                probe.train(head, source, cls, labels, rows, settings, dtype)
    source = torch.randn(600, 512, 768, dtype=torch.float16, device="cuda")
    labels, head = torch.rand(600, 527).round().cuda(), probe.ProtoBin(768, 527, M=10).cuda()
    kept = torch.cuda.memory_allocated() + 2 * sum(p.nbytes for p in head.parameters())  # AdamW's
    torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(probe, "EPOCHS", 1):
        probe.train(head, source, None, labels, rows, settings, torch.float16)
    step = (torch.cuda.max_memory_allocated() - kept) / 1e6
    assert step < 520
    write_tokens(clips=4000)  # 33 MB: more than the allocator keeps in a block that is half free
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    refused(script("probe.py", "--device", "cuda", "--pool", "mhca"), "memory")
    torch.cuda.set_per_process_memory_fraction(1.0)

    def broken(optimizer):  # a device assert: index out of bounds
        torch.zeros(4, device="cuda")[torch.full((1,), 4, device="cuda")].add(1)
    with mock.patch.object(torch.optim.AdamW, "zero_grad", broken):
        ended = script("probe.py", "--device", "cuda", "--pool", "mhca")
    assert ended.returncode == 1 and "Traceback" in ended.stderr, ended
    return f"no step waits; one at K = 5,270 holds {step:.0f} MB; errors end as they should"


def figures(B=64):
    """Clips per second, and milliseconds of protobin's step; nothing is asserted."""
    import bench  # looks for a GPU when imported
    out, waves = [torch.cuda.get_device_name()], 0.1 * torch.randn(B, 160000, device="cuda")
    for model, file in ("random", None), ("beats", "weights.pt"), ("dasheng", "weights.pt"):
        if file:
            torch.save(official.state(model), file)
        encoder = extract.Encoder(model, file, 10, "cuda", "fp16")
        whole, matmuls = bench.clock(lambda: encoder(waves), bench.eat_products(B, 513)[0])
        out.append(f"{model} {B / whole:,.0f} clips/s (EAT's matmuls alone {B / matmuls:,.0f})")
    write_clips(1000, 10)
    free, begin = torch.zeros(B, 512, 768, device="cuda"), time.perf_counter()
    with mock.patch.multiple(extract.Encoder, spectrogram=lambda _, waves: waves,
                             encode=lambda _, waves: (free[:len(waves)], None)):
        extraction()
    rate = 1000 / (time.perf_counter() - begin)
    block, file = np.zeros((B, 512, 768), np.float16), "tokens/made/random/tokens.npy"
    write, = bench.clock(lambda: extract.write_rows(file, 0, block))
    out.append(f"all but the encoder {rate:,.0f} clips/s, one writer {B / write:,.0f}")
    for C, M in ((10, 20), (527, 10)):
        (ours, head, x), (naive, *_) = (bench.protobin_graph(kind, C, M, 128, 512, 768)
                                        for kind in ("ours", "half"))
        p = head.unit().detach()
        step, graph, product, search = (f"{1000 * seconds:.2f}" for seconds in bench.clock(
            ours, naive, lambda: [len(p.half() @ part.T) for part in x.flatten(0, 1).split(4096)],
            lambda: probe.MaxCos.apply(x, p)))
        out.append(f"K = {C * M:,}: step {step} ms, of it search {search} (product {product}); "
                   f"naive in half {graph}")
    return "; ".join(out)


@functools.cache
def child(group):
    return subprocess.run([sys.executable, __file__, group], capture_output=True, text=True)


@pytest.mark.parametrize("group", GROUPS)
def test_cuda(capsys, group):
    if child("cuda_device_count").stdout == "0\n":
        pytest.skip("torch finds no CUDA device")
    process = child(group)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-8000:]
    with capsys.disabled():
        print(f"\n{group}: {process.stdout.splitlines()[-1]}", end="")


if __name__ == "__main__":  # conftest, imported above, has hidden the GPUs from this process too
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["TESTS_CUDA_VISIBLE_DEVICES"]
    print(globals()[sys.argv[1]](*map(int, sys.argv[2:])), flush=True)
    os._exit(0)  # CUDA's own clean-up fails after a device assert
