"""How fast each part is, as ratios measured side by side in one run: A B A B ..., medians. Files,
up to 10 GB, go into a temporary folder where you stand. BENCH.md has the results.

    python tests/bench.py extract     # the encoder beside a naive one; reading and writing alone
    python tests/bench.py probe       # a training step of protobin beside naive graphs
    python tests/bench.py io          # training reads beside the disk's sequential rate
    python tests/bench.py scale       # an epoch over 20,000 clips, K = 5,270
    python tests/bench.py evaluate    # intervals beside scikit-learn in a loop
    python tests/bench.py busy        # the demo beside a process that keeps a core busy
    python tests/bench.py costs       # no speed: the paper's grid, counted
    python tests/bench.py rates       # no speed: learning rates on planted tokens
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the scripts, before torch is imported

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

import evaluate
import extract
import probe

CUDA, LINUX = torch.cuda.is_available(), sys.platform == "linux"
DEVICE, HALF = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)  # half only on a GPU

def clock(*functions, rounds=5, before=lambda: None):
    """Median seconds of each, run in turn after one warm-up of each."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, times):
            before()
            begin = time.perf_counter()
            function()
            if CUDA:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return [np.median(seconds[1:]) for seconds in times]

def mapped_tokens(*shape):
    block = np.random.default_rng(0).standard_normal((50, *shape[1:])).astype(np.float16)
    np.save("tokens.npy", np.resize(block, shape))  # repeats the block
    return np.load("tokens.npy", mmap_mode="r")

def train(head, source, labels, rows, lr):
    settings = {"lr": lr, "weight_decay": probe.DECAY, "loss": "asl", "seed": 0}
    dtype = HALF if type(head) is probe.ProtoBin else torch.float32
    return probe.train(head.to(DEVICE), source, None, labels, rows, settings, dtype)

def eat_products(B, L, D=768, H=12):
    """(a function that does the multiplications of EAT's 12 blocks and no more, their FLOP)"""
    x, hidden, q, a, *w = (torch.randn(shape, device=DEVICE, dtype=HALF) for shape in (
        (B * L, D), (B * L, 4 * D), (B * H, L, 64), (B * H, L, L),
        (D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)))
    pairs = [*zip((x, x, x, hidden), w), (q, q.transpose(1, 2)), (a, q)]
    out = [m @ n for m, n in pairs]  # used again: fresh memory would cost more than a product
    def products():
        for (m, n), o in 12 * [*zip(pairs, out)]:
            torch.matmul(m, n, out=o)
    return products, 12 * sum(2 * m.numel() * n.shape[-1] for m, n in pairs)

def bench_extract(B=extract.BLOCK[DEVICE], seconds=10.0, rounds=5, clips=12800 if CUDA else 3000):
    """EAT's shapes, random weights; on a GPU in half precision. naive: clip by clip, attention as
    softmax(q k') v. free encoder: extract.fill_dump with an encoder that takes no time. Reading a
    clip holds the interpreter at most as long as a clip of 0.03 s takes: above 0.25 ms, no number
    of readers feeds a GPU."""
    encoder = extract.Encoder("random", None, seconds, DEVICE, "fp16" if CUDA else "fp32")
    waves = torch.randn(B, round(seconds * 16000)) / 10
    products, flop = eat_products(B, 1 + encoder.frames // 2)
    shapes, some = encoder(waves[:1]), waves[:B if CUDA else 1]
    def naive():
        with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: (
                q @ k.transpose(2, 3) / 8).softmax(-1) @ v):
            return [encoder(wave[None]) for wave in some]
    on_device = waves.to(DEVICE)
    spec = encoder.spectrogram(on_device)
    tokens = encoder.encode(spec)[0]
    times = clock(lambda: encoder(waves), naive, products, lambda: encoder.spectrogram(on_device),
                  lambda: extract.describe(on_device, spec, tokens, encoder.grid), rounds=rounds)
    ours, slow, matmul, front, check = (t / n for t, n in zip(times, (B, len(some), B, B, B)))
    print(f"EAT, {seconds:g} s, batch {B}: {1 / ours:.2f} clips/s, {slow / ours:.2f} x naive; "
          f"front-end alone {1 / front:.0f} clips/s\nexamining the input: {1000 * check:.2f} ms "
          f"per clip, {check / front:.0%} of the front-end\nmatmuls alone: "
          f"{flop / B / matmul / 1e9:,.0f} GFLOP/s, of which ours reaches {matmul / ours:.0%}, "
          f"naive {matmul / slow:.0%}")
    soundfile.write("a.wav", np.random.default_rng(0).uniform(-.1, .1, (441000, 2)), 44100)
    table = [extract.Clip("a.wav", 0.0, "test", set())] * clips
    extract.open_dump("dump", {"grid": encoder.grid, "dim": encoder.dim}, table, ["a"], [])
    with mock.patch.multiple(encoder, spectrogram=lambda waves: waves, vit=lambda waves: [
            torch.zeros(len(waves), *x.shape[1:], device=DEVICE) for x in shapes]):
        begin = time.time()
        extract.fill_dump("dump", ".", encoder, table, seconds, 0)
    rate = clips / (time.time() - begin)
    print(f"free encoder: {rate:.0f} clips/s on {os.cpu_count()} cores, {rate * ours:.1f} x ours")
    if CUDA:
        pinned, tokens = waves.pin_memory(), encoder(waves)[0].half()
        back = torch.empty_like(tokens, device="cpu", pin_memory=True)
        times = clock(lambda: pinned.to("cuda", non_blocking=True), lambda: back.copy_(tokens))
        into, out = waves.nbytes / times[0] / 1e9, back.nbytes / times[1] / 1e9
        print(f"copies alone: {into:.1f} GB/s in, {out:.1f} out, {B / sum(times):.0f} clips/s")
    read, short = (functools.partial(extract.read_block, ".", table, duration, False, range(40))
                   for duration in (seconds, 0.03))
    resample = functools.partial(extract.resampler(44100, 16000), torch.randn(int(seconds * 44100)))
    with ThreadPoolExecutor(1, "reader", extract.one_core, (DEVICE,)) as reader:
        whole, part, least = reader.submit(clock, read, resample, short, rounds=rounds).result()
    print(f"one reader, 44.1 kHz stereo: {40 / whole:.0f} clips/s, {40 * part / whole:.0%} of it "
          f"resampling; at most {1000 * least / 40:.2f} ms per clip hold the interpreter")

def protobin_graph(kind, C, M, B, N, D):
    """(step, head, tokens): one training step, forward, loss, backward to the latents and W."""
    torch.manual_seed(0)
    dtype = HALF if kind == "ours" else torch.float32
    tokens = torch.randn(B, N, D, device=DEVICE).half().to(dtype)  # half as in a dump
    labels = (torch.rand(B, C, device=DEVICE) < 0.1).float()
    head = probe.ProtoBin(D, C, M=M).to(DEVICE)
    def scores():
        p = head.prototypes
        p = F.normalize(torch.where(p >= 0, 1.0, -1.0) + p - p.detach(), dim=1)
        x = F.normalize(tokens, dim=2)
        if kind == "conv2d":
            return F.conv2d(x.mT[..., None], p[..., None, None]).flatten(2).max(2).values
        with torch.autocast(DEVICE, torch.float16, enabled=kind == "half"):
            return (x @ p.T).max(1).values.float()
    def step():
        head.zero_grad()
        logits = head(tokens) if kind == "ours" else head.linear(scores())
        probe.asymmetric_loss(logits, labels).backward()
    return step, head, tokens

def step_memory(*graph):
    """Most bytes that a step holds beside the tokens and the head; nan if not measured."""
    step, _, tokens = protobin_graph(*graph)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    elif LINUX:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    def peak():
        status = pathlib.Path("/proc/self/status").read_text() if LINUX else "VmHWM: nan"
        return (torch.cuda.max_memory_allocated() if CUDA else
                1024 * float(status.split("VmHWM:")[1].split()[0]))
    before = peak()
    step()
    return peak() - before

def bench_probe(sizes=((10, 20), (50, 20), (527, 10)), B=128, N=512, D=768, rounds=3):
    """A training step of protobin beside graphs that keep (B, N, K) cosines; `half` is the matmul
    graph under autocast. product: prototypes times tokens, once. memory: what a step adds."""
    kinds = ("ours", "matmul", "conv2d") + ("half",) * CUDA
    for C, M in sizes:
        graphs = [protobin_graph(kind, C, M, B, N, D) for kind in kinds]
        _, head, tokens = graphs[0]
        p, few = head.prototypes.detach().to(tokens.dtype), B * N if CUDA else 512
        def product():  # on a CPU a few rows at a time: the result stays in the cache
            for x in tokens.flatten(0, 1).split(few):
                p @ x.T
        *times, alone = clock(*(step for step, _, _ in graphs), product, rounds=rounds)
        codes = [f"from bench import *; print(step_memory{kind, C, M, B, N, D})" for kind in kinds]
        peaks = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT / "tests"))
                 for code in codes]
        print(f"K = {M * C:,}, B = {B}: the product is {alone / times[0]:.0%} of our step, "
              f"{2 * B * N * D * M * C / alone / 1e9:,.0f} GFLOP/s")
        for kind, seconds, peak in zip(kinds, times, peaks):
            print(f"{kind:>9}: {seconds:.4f} s, {seconds / times[0]:.1f} x ours; memory "
                  f"{peak / 1e9:.2f} GB, {peak / peaks[0]:.1f} x ours")

def bench_io(clips=4000):
    """Training reads (probe.batches, 786 kB per clip) of a file that is dropped from the page cache
    before every pass. sequential: four threads. naive: tokens[rows] of the mapped array."""
    tokens, rows = mapped_tokens(clips, 512, 768), torch.randperm(clips)
    def drop_cache():
        with open("tokens.npy", "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    def sequential():
        with open("tokens.npy", "rb") as f, ThreadPoolExecutor(4) as pool:
            starts = range(0, tokens.nbytes, 2**23)
            return sum(pool.map(lambda at: len(os.pread(f.fileno(), 2**23, at)), starts))
    limit, fast, slow = (tokens.nbytes / seconds / 1e9 for seconds in clock(
        sequential, lambda: [len(x) for _, x in probe.batches(tokens, rows, "cpu")],
        lambda: [len(torch.from_numpy(tokens[part.numpy()]).float())
                 for part in rows.split(probe.BATCH)], before=drop_cache))
    print(f"{tokens.nbytes / 1e9:.1f} GB: sequential {limit:.2f} GB/s, training reads {fast:.2f} "
          f"GB/s = {fast / limit:.0%} of it, {fast / slow:.1f} x naive")

def bench_scale(clips=20000, N=128, D=768, C=527, M=10):
    """One epoch of protobin as probe.py trains it, tokens mapped; on a GPU they are resident."""
    tokens, labels = mapped_tokens(clips, N, D), (torch.rand(clips, C) < 0.005).float().to(DEVICE)
    source, head = torch.tensor(tokens).to(DEVICE) if CUDA else tokens, probe.ProtoBin(D, C, M=M)
    with mock.patch.object(probe, "EPOCHS", 1):
        _, seconds = train(head, source, labels, torch.arange(clips), 2e-3)
    print(f"{clips:,} clips, N = {N}, K = {M * C:,}: {seconds:.1f} s an epoch")

def bench_evaluate(clips=20_000, C=527, halves=200):
    """Halves of an AudioSet-sized test set, classes of 0.03 to 6 %. naive: scikit-learn's AP with
    sample_weight in a loop, timed on every 31st class and 3 halves and scaled."""
    rng = np.random.default_rng(0)
    labels = rng.random((clips, C)) < np.geomspace(0.0003, 0.06, C)
    logits = (rng.standard_normal((clips, C)) + 2 * labels).astype(np.float32)
    weights, some = evaluate.resamples(np.arange(clips), halves), range(3, C, 31)
    fast, slow = clock(lambda: evaluate.main_metric("multi", labels, [logits], weights), lambda: [
        average_precision_score(labels[:, j], logits[:, j], sample_weight=weights[:, r])
        for j in some for r in range(3)])
    slow *= C / len(some) * halves / 3
    print(f"{clips:,} clips x {C} classes x {halves} halves: {fast:.1f} s, {slow / fast:.0f} x "
          f"faster than scikit-learn's {slow:.0f} s")

def bench_busy(**sizes):
    """The demo's extraction and one seed of protobin, scripts run as processes on the CPU, beside
    `while True: pass` and alone, idle OpenMP threads asleep (PASSIVE, the default) or not."""
    import demo
    demo.make(**sizes)
    pathlib.Path("datasets.txt").write_text("demo multi 5 10\n")
    def run(args, policy, code="while True: pass"):
        other = subprocess.Popen([sys.executable, "-c", code])
        try:
            subprocess.run([sys.executable, *args, "--overwrite", "--device", "cpu"], check=True,
                           capture_output=True, env=os.environ | {"OMP_WAIT_POLICY": policy})
        finally:
            other.kill()
    for args in ([ROOT / "extract.py"], [ROOT / "probe.py", "--seeds", "1"]):
        for policy in ("PASSIVE", "ACTIVE"):
            alone, busy = clock(lambda: run(args, policy, ""), lambda: run(args, policy), rounds=1)
            print(f"{args[0].name}, {policy}: {alone:.1f} s alone, {busy:.1f} s beside a busy "
                  f"process = {busy / alone:.2f} x", flush=True)

def bench_costs():
    """The paper's grid, counted: 9 encoders (as ViT-B), 14 datasets, 11 heads, 5 seeds, 30 epochs.
    A backward counts as a forward, heads trained on means as nothing; BENCH.md says more."""
    sets = np.array((  # clips, of them trained on in an epoch (esc50: 5 folds), N, K
        (35827, 18685, 512, 5270), (51197, 40966, 512, 4000), (3438, 2746, 512, 200),  # as20k ...
        (25000, 17500, 512, 660), (10000, 8000, 512, 200), (13344, 1344, 256, 420),  # spass urban
        (3827, 3264, 256, 1020), (30176, 5696, 256, 1780), (23568, 8448, 256, 2640),
        (7632, 3072, 256, 960), (27340, 3584, 256, 1120), (38365, 1728, 256, 540),
        (2000, 8000, 256, 1000), (105829, 94824, 56, 700)), float)
    D, grid = 768, (36 * 256, 4 * 768, 12 * 32, 12 * 12, 12)  # conv abmilp ep mhca simpool
    for number, encoders, heads, banks in (14, 9, grid, 2), (5, 1, grid[3:4], 1):
        clips, train, N, K = sets[:number].T
        encoder = clips @ (12 * (24 * (N + 1) * D * D + 4 * (N + 1) ** 2 * D)) * encoders / 1e15
        head = train @ (150 * N * D * (sum(heads) + 2 * K * banks)) * encoders / 1e15
        once = clips @ N * 2 * D * encoders / 1e12
        epochs = 150 * train @ N * (len(heads) + banks) * 2 * D * encoders / 1e12
        print(f"{encoders} x {clips.sum():,.0f} clips of {number} sets: {encoder:,.0f} PFLOP of "
              f"encoders, {head:,.0f} of heads; reads {once:.2f} or {epochs:,.0f} TB")

def bench_rates(D=256, N=32, clips=1000, tested=400, sizes=(50, 200, 500)):
    """Valid macro mAP, 1 seed, on planted tokens: noise about a common mean into which each class
    of a clip puts its direction once or twice. More classes only for the heads with prototypes."""
    rates = dict.fromkeys(probe.HEADS, (0.0003, 0.001, 0.003, 0.007)) | dict.fromkeys(
        ("protobin", "protofloat"), (0.001, 0.002, 0.003, 0.005, 0.01))
    rates["proto"] = 0.005, 0.01, 0.02, 0.04, 0.08
    for C in sizes:
        rng, n = np.random.default_rng(0), clips + tested
        directions, common = rng.standard_normal((C, D)), rng.standard_normal(D)
        labels, share = np.zeros((n, C), bool), 1 / np.arange(5, 5 + C)
        tokens = rng.standard_normal((n, N, D)) + common
        for i in range(n):
            for j in rng.choice(C, rng.integers(1, 6), replace=False, p=share / share.sum()):
                labels[i, j] = True
                for t in rng.choice(N, rng.integers(1, 3), replace=False):
                    tokens[i, t] += 0.6 * directions[j] * rng.uniform(0.6, 1.2)
        source, hot = (torch.from_numpy(a).to(DEVICE) for a in (tokens.astype("f2"), labels * 1.))
        heads = [h for h in rates if "proto" in h or C == sizes[0] and h != "linear"]
        for pool, lr in [(pool, lr) for pool in heads for lr in rates[pool]]:
            torch.manual_seed(0)
            head = probe.HEADS[pool](D, C, (N // 4, 4), 20)
            train(head, source, hot.float(), torch.arange(clips), lr)
            parts = probe.batches(source, torch.arange(clips, n), DEVICE)
            logits = torch.cat([head(x).detach().cpu() for _, x in parts]).numpy()
            score = evaluate.metrics("multi", labels[clips:], logits)["macro mAP"]
            print(f"{C:3} classes  {pool:>10}  {lr:6g}  {score:.1f}", flush=True)

if __name__ == "__main__":
    bench = globals().get("bench_" + "".join(sys.argv[1:])) or sys.exit(__doc__)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}\n\n    {bench.__doc__}\n")
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        os.chdir(folder)
        bench()
