"""How fast each part is, as ratios measured side by side in one run.

    python tests/bench.py extract     # encoder: clips/s, naive path, share of the matmul rate
    python tests/bench.py probe       # one training step of protobin beside the naive graphs
    python tests/bench.py io          # training reads beside the disk's sequential rate
    python tests/bench.py evaluate    # intervals beside scikit-learn in a loop
    python tests/bench.py scale       # 20,000 clips, K = 5,270: s/epoch and memory
    python tests/bench.py seeds       # five seeds in one pass over the file beside one by one
    python tests/bench.py costs       # no speed: the paper's grid, counted
    python tests/bench.py rates       # no speed: learning rates on planted tokens

Absolute times belong to the machine they were taken on: quote the ratios. What is compared runs in
turn, A B A B ..., and the median is printed (`scale` runs once).
"""

import concurrent.futures
import inspect
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock(*functions, rounds=5):
    """Median seconds of each, run in turn after one warm-up of each."""
    times = [[] for _ in functions]
    for i in range(rounds + 1):
        for f, t in zip(functions, times):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            f()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i:
                t.append(time.perf_counter() - begin)
    return [statistics.median(t) for t in times]


def machine():
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    if DEVICE == "cpu" and os.path.exists("/proc/cpuinfo"):
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                     if line.startswith("model name")), name)
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def bench_extract():
    """EAT's shapes with random weights on 10-s clips.

    naive: torchaudio's kaldi fbank clip by clip, batch 1, attention as softmax(q k') v. matmul: the
    same multiplications (qkv, proj, fc1, fc2 of 12 blocks, and attention's two) and nothing else,
    so 100 % would mean that front-end, GELU, layer norm and softmax cost nothing. What is left
    over goes there; the exact GELU and the softmax are the largest part."""
    import torchaudio

    import extract
    B, L, D, H = extract.BLOCK[DEVICE], 513, 768, 12
    precision = "fp16" if DEVICE == "cuda" else "fp32"
    encoder = extract.Encoder("random", None, 10.0, DEVICE, precision)
    waves = 0.1 * torch.randn(B, 160000)

    def naive():
        with torch.inference_mode():
            for wave in waves[:1] if DEVICE == "cpu" else waves:
                spec = torchaudio.compliance.kaldi.fbank(
                    (wave - wave.mean())[None], htk_compat=True, sample_frequency=16000,
                    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0)
                spec = torch.nn.functional.pad(spec, (0, 0, 0, 1024 - len(spec)))
                x = encoder.vit.embed(((spec + 4.268) / (2 * 4.569))[None].to(DEVICE))
                for block in encoder.vit.blocks:
                    q, k, v = block.attn.qkv(x).view(1, L, 3, H, -1).permute(2, 0, 3, 1, 4)
                    a = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
                    x = block.norm1(x + block.attn.proj(a.transpose(1, 2).reshape(1, L, D)))
                    x = block.norm2(x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(x))))
        return x[:, 1:]

    kind = dict(device=DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.float32)
    x, hidden = torch.randn(B * L, D, **kind), torch.randn(B * L, 4 * D, **kind)
    w = [torch.randn(n, m, **kind) for n, m in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))]
    q, a = torch.randn(B * H, L, 64, **kind), torch.randn(B * H, L, L, **kind)
    products = [(x, w[0]), (x, w[1]), (x, w[2]), (hidden, w[3]), (q, q.transpose(1, 2)), (a, q)]
    out = [m @ n for m, n in products]  # used again: fresh memory would cost more than a product

    def matmul():
        for _ in range(12):
            for (m, n), o in zip(products, out):
                torch.matmul(m, n, out=o)
    flop = 12 * (2 * L * D * 12 * D + 2 * 2 * L * L * D)
    ours, slow, floor = clock(lambda: encoder(waves), naive, matmul)
    ours, slow, floor = ours / B, slow / (1 if DEVICE == "cpu" else B), floor / B
    check = (encoder(waves[:1])[0] - naive()[:1]).abs().max().item()
    print(f"EAT, 10-s clips, batch {B}, {precision}: {1 / ours:.2f} clips/s "
          f"({flop / 1e9:.0f} GFLOP a clip, outputs differ by {check:.0e})")
    print(f"  naive path            {1 / slow:8.2f} clips/s   ours is {slow / ours:.2f} x faster")
    print(f"  matmuls alone         {1 / floor:8.2f} clips/s   {flop / floor / 1e9:,.0f} GFLOP/s; "
          f"ours reaches {floor / ours:.0%} of it, naive {floor / slow:.0%}")
    front = clock(lambda: encoder.spectrogram(waves.to(DEVICE)))[0] / B
    print(f"  front-end alone       {1 / front:8.2f} clips/s   {front / ours:.0%} of the time")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        import soundfile
        file = os.path.join(folder, "a.wav")
        soundfile.write(file, np.random.default_rng(0).uniform(-.1, .1, (441000, 2)), 44100)
        whole = pipeline(extract, file, folder, B)
        extract.RATE = 44100  # nothing to resample, as if that were done elsewhere
        raw = pipeline(extract, file, folder, B)
        extract.RATE = 16000
        torch.set_num_threads(1)
        wave = torch.randn(441000)
        read, resampled = clock(lambda: extract.read_wave(file, 0, 10),
                                lambda: extract.resampler(44100)(wave), rounds=15)
    print(f"  10 s of 44.1 kHz stereo: {1 / read:.0f} clips/s read and resampled by one worker, "
          f"{resampled / read:.0%} of it resampling")
    print(f"  all but the encoder   {whole:8.2f} clips/s   {whole * ours:.1f} x what it takes: "
          f"read, resampled, carried over, written; {os.cpu_count()} cores")
    print(f"  without resampling    {raw:8.2f} clips/s   but 2.8 x the samples carried over: "
          f"{raw / whole:.2f} x, the most that resampling on the device could bring")


def pipeline(extract, file, folder, B, clips=3000 if DEVICE == "cpu" else 12800):
    """Clips/s that fill_dump reads and writes when the encoder costs nothing."""
    class Free:
        grid, dim, cls, token_seconds, device = (64, 8), 768, True, 0.16, DEVICE
        tokens, one = torch.zeros(B, 512, 768, device=DEVICE), torch.zeros(B, 768, device=DEVICE)

        def __call__(self, waves):
            waves.to(DEVICE, non_blocking=True)
            return self.tokens[:len(waves)], self.one[:len(waves)]
    clips = [{"path": "a.wav", "source": file, "start": i % 2 / 100, "split": "test",
              "labels": set()} for i in range(clips)]
    meta = {"block": B, "seconds": 9.9, "complete": False}
    dump = os.path.join(folder, f"dump{extract.RATE}")
    extract.open_dump(dump, meta, clips, ["a"], [], Free)
    begin = time.perf_counter()
    extract.fill_dump(dump, Free(), clips, meta, 0, 1, 0)
    return len(clips) / (time.perf_counter() - begin)


def protobin_graph(kind, K, B, N=512, D=768):
    """One training step: forward, loss, backward to the latents and W."""
    import probe
    torch.manual_seed(0)
    tokens = torch.randn(B, N, D, device=DEVICE)
    labels = (torch.rand(B, 50, device=DEVICE) < 0.1).float()
    head = probe.Prototypes(D, 50, K // 50).to(DEVICE)
    if K % 50:
        head.prototypes = torch.nn.Parameter(0.02 * torch.randn(K, D, device=DEVICE))
        head.linear = torch.nn.Linear(K, 50).to(DEVICE)

    def step():
        head.zero_grad()
        if kind == "ours":
            logits = head(tokens)
        else:
            p = head.prototypes
            p = torch.where(p >= 0, 1.0, -1.0) + p - p.detach()
            p = torch.nn.functional.normalize(p, dim=1)
            x = torch.nn.functional.normalize(tokens, dim=2)
            if kind == "conv2d":
                s = torch.nn.functional.conv2d(x.transpose(1, 2)[..., None], p[:, :, None, None])
                s = s.flatten(2).max(2).values
            else:
                with torch.autocast(DEVICE, torch.float16, enabled=kind == "half"):
                    s = (x @ p.T).max(1).values.float()
            logits = head.linear(s)
        probe.asymmetric_loss(logits, labels).backward()
    return step, tokens, head


def bench_probe(one=None):
    """protobin at N = 512, D = 768. Peak memory is what a step adds to the tokens, each graph in a
    process of its own. The forward's product is the floor: the backward adds up winners only, a
    naive graph multiplies twice and keeps two or three (B, N, K) tensors. On a GPU our search is in
    half precision; `half` is the matmul graph in half precision too."""
    import probe
    if one:
        kind, K, B = one[0], int(one[1]), int(one[2])
        step, tokens, _ = protobin_graph(kind, K, B)
        before = (torch.cuda.memory_allocated() if DEVICE == "cuda"
                  else probe.peak_memory(tokens.device, reset=True))
        step()
        print(probe.peak_memory(tokens.device) - before)
        return
    for K in (200, 1000, 5270):
        B = 128
        kinds = ("ours", "matmul", "conv2d") + ("half",) * (DEVICE == "cuda")
        steps = [protobin_graph(kind, K, B) for kind in kinds]
        _, tokens, head = steps[0]
        flat, p = tokens.reshape(-1, 768), head.prototypes.detach()
        half = (flat.half(), p.half()) if DEVICE == "cuda" else (flat, p)
        some = 512 if DEVICE == "cpu" else len(flat)  # rows at a time: out of memory, in the cache
        out = half[0].new_empty(1024, some)

        def floor():
            for x in half[0].split(some):
                for q in half[1].split(1024):
                    torch.mm(q, x.T, out=out[:len(q)])
        times = clock(*(s for s, *_ in steps), floor, rounds=3 if K > 1000 else 5)
        grads = []
        for step, _, h in steps:
            step()
            grads.append(h.prototypes.grad)
        error = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
        del steps, tokens, flat, half, grads, out
        peak = [int(subprocess.run([sys.executable, __file__, "probe", kind, str(K), str(B)],
                                   capture_output=True, text=True, check=True).stdout.split()[-1])
                for kind in kinds]
        print(f"K = {K:,}, B = {B}: {times[0]:.3f} s a step, {peak[0] / 1e9:.2f} GB more than the "
              f"tokens; the product alone {times[-1]:.3f} s ({times[-1] / times[0]:.0%} of the "
              f"step, {2 * 128 * 512 * 768 * K / times[-1] / 1e9:,.0f} GFLOP/s); gradient "
              f"{error:.0e} from the naive one")
        for kind, t, m in list(zip(kinds, times, peak))[1:]:
            print(f"  {kind:>7} graph  {t:.3f} s, {m / 1e9:.2f} GB   ours is {t / times[0]:.2f} x "
                  f"faster with {peak[0] / m:.2f} of the memory")


def bench_seeds(clips=4096, N=256, D=768, C=10, seeds=5):
    """An epoch of five seeds of a head as probe.py trains them where the tokens do not fit into
    memory, in one pass over the file, beside one pass each (the same numbers, see test_probe.py).
    The file is dropped from the page cache before every pass."""
    import probe
    probe.EPOCHS = 1
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = os.path.join(folder, "tokens.npy")
        block = np.random.default_rng(0).standard_normal((64, N, D)).astype(np.float16)
        np.save(file, np.tile(block, (clips // 64, 1, 1)))
        labels = (torch.rand(clips, C) < 0.1).float().to(DEVICE)
        store = probe.Store(file, torch.arange(0), DEVICE)
        for pool in ("mean", "mhca", "protobin"):
            def train(some):
                drop_cache(file)
                heads = [probe.make_head(pool, D, C, (N // 8, 8)).to(DEVICE) for _ in some]
                probe.train(heads, some, store, None, labels, torch.arange(clips), 1e-3, 1e-4,
                            "asl")
            alone, shared = clock(lambda: [train([k]) for k in range(seeds)],
                                  lambda: train(range(seeds)), rounds=3)
            print(f"{pool:>8}: {seeds} seeds, one epoch: {alone:.2f} s one by one, {shared:.2f} s "
                  f"in one pass = {alone / shared:.2f} x faster")


def drop_cache(file):
    """Make the next read of the file come from the disk."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_io(clips=4000):
    """Training reads (chunks of 1,024 random clips of 786 kB) from a file that is not in the page
    cache. Beside them: the same file from end to end by four threads, a quarter each.
    naive: tokens[rows] of a memory-mapped array, one page fault after the other. The file is
    dropped from the cache before every pass, which is how a file larger than the memory behaves.
    """
    import probe
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = os.path.join(folder, "tokens.npy")
        array = np.lib.format.open_memmap(file, "w+", np.float16, (clips, 512, 768))
        block = np.random.default_rng(0).standard_normal((50, 512, 768)).astype(np.float16)
        for i in range(0, clips, 50):
            array[i:i + 50] = block
        array.flush()
        del array
        store = probe.Store(file, torch.arange(0), "cpu")
        size, order = os.path.getsize(file), torch.randperm(clips).split(probe.CHUNK)

        def part(i):
            with open(file, "rb", buffering=0) as f:
                f.seek(i * size // 4)
                while f.tell() < (i + 1) * size // 4 and f.read(1 << 23):
                    pass

        def sequential():
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                list(pool.map(part, range(4)))

        def ours():
            for _ in store.reads(order):
                pass

        def naive():
            tokens = np.load(file, mmap_mode="r")
            for rows in torch.cat(order).split(128):
                tokens[rows.numpy()]
        readers = sequential, ours, naive
        rates = {f: [] for f in readers}
        for i in range(6):  # each is first, second and last twice: a disk may have its own cache
            for f in readers[i % 3:] + readers[:i % 3]:
                drop_cache(file)
                begin = time.perf_counter()
                f()
                rates[f].append(size / (time.perf_counter() - begin) / 1e9)
    limit, ours, naive = (statistics.median(rates[f]) for f in readers)
    print(f"{size / 1e9:.1f} GB, not in the cache: sequential {limit:.2f} GB/s, training reads "
          f"{ours:.2f} GB/s = {ours / limit:.0%}")
    print(f"  naive                 {naive:8.2f} GB/s   ours is {ours / naive:.1f} x faster")


def bench_scale(clips=20000, N=128, D=768, C=527, M=10):
    """20,000 clips of random tokens, K = 5,270, one epoch of protobin as probe.py trains it, once
    from the file and once resident. Peak: of the training alone, not of writing the tokens."""
    import probe
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = os.path.join(folder, "tokens.npy")
        array = np.lib.format.open_memmap(file, "w+", np.float16, (clips, N, D))
        rng = np.random.default_rng(0)
        for i in range(0, clips, 500):
            array[i:i + 500] = rng.standard_normal((min(500, clips - i), N, D), dtype=np.float32)
        array.flush()
        del array
        labels = (torch.rand(clips, C) < 0.005).float().to(DEVICE)
        probe.EPOCHS = 1
        for stay in (torch.arange(0), torch.arange(clips)):
            store = probe.Store(file, stay, DEVICE)
            probe.peak_memory(labels.device, reset=True)
            torch.manual_seed(0)
            head = probe.Prototypes(D, C, M).to(DEVICE)
            _, seconds = probe.train([head], [0], store, None, labels, torch.arange(clips),
                                     probe.default_lr("protobin", M * C), 1e-4, "asl")
            peak = probe.peak_memory(labels.device)
            print(f"{clips:,} clips, N = {N}, K = {M * C:,}, "
                  f"{'resident' if store.resident is not None else 'from the file'}: "
                  f"{seconds[0]:.0f} s an epoch, peak {peak / 1e9:.1f} GB "
                  f"(tokens {os.path.getsize(file) / 1e9:.1f} GB)")


def bench_evaluate():
    """200 halves of an AudioSet-sized test set: 20,000 clips, 527 classes of 0.03 to 6 %. naive:
    scikit-learn's average_precision_score with sample_weight, class by class and half by half,
    timed on 17 of the classes (from rare to frequent) and 3 halves and scaled. The machine's limit:
    sort each class's scores, and add up the weights once in the order they lie in."""
    from sklearn.metrics import average_precision_score

    import evaluate
    n, C, R, few = 20_000, 527, 200, 3
    rng = np.random.default_rng(0)
    labels = rng.random((n, C)) < np.geomspace(0.0003, 0.06, C)
    logits = (rng.standard_normal((n, C)) + 2 * labels).astype(np.float32)
    weights = evaluate.resamples(np.arange(n), R)
    some = range(3, C, 31)

    def ours():
        return evaluate.main_metric("multi", labels, logits, weights)

    def naive():
        return np.array([[average_precision_score(labels[:, j], logits[:, j],
                                                  sample_weight=weights[:, r])
                          for r in range(few)] for j in some])           # (some, few)

    def limit():
        return evaluate.per_class(lambda _, s: np.argsort(s, kind="stable")[0] + weights.sum(0),
                                  labels, logits)
    fast, slow, least = clock(ours, naive, limit, rounds=3)
    slow *= C * R / (len(some) * few)
    same = np.stack([evaluate.average_precision(labels[:, j], logits[:, j], weights[:, :few])
                     for j in some])
    print(f"{n:,} clips x {C} classes ({labels.mean():.2%} positive) x {R} halves: {fast:.1f} s "
          f"(values differ by {np.abs(same - naive()).max():.0e})")
    print(f"  scikit-learn in a loop {slow:8.0f} s   ours is {slow / fast:.0f} x faster")
    print(f"  sort and add alone     {least:8.1f} s   {least / fast:.0%} of ours")


def bench_costs():
    """The paper's grid, counted: 9 encoders (as ViT-B), 14 datasets, 11 heads, 5 seeds, 30 epochs.
    Multiplications of encoders and of heads in training, a head's backward counted as its forward
    (tokens get no gradient; prototype heads have none to speak of); no search of hyperparameters.
    Read: once a dataset and encoder where the tokens stay in memory, else by every head once an
    epoch, for all its seeds."""
    sets = {  # clips, of them trained on in an epoch, N, K: README's table
        "as20k": (35827, 18685, 512, 5270), "fsd50k": (51197, 40966, 512, 4000),
        "desed": (3438, 2746, 512, 200), "spass": (25000, 17500, 512, 660),
        "urban": (10000, 8000, 512, 200), "hsn": (13344, 1344, 256, 420),
        "nbp": (3827, 3264, 256, 1020), "nes": (30176, 5696, 256, 1780),
        "per": (23568, 8448, 256, 2640), "pow": (7632, 3072, 256, 960),
        "sne": (27340, 3584, 256, 1120), "uhh": (38365, 1728, 256, 540),
        "esc50": (2000, 8000, 256, 1000), "sc2": (105829, 94824, 56, 700)}  # esc50: 5 folds
    D = 768
    pooled = {"conv": lambda N, K: 4 * 9 * D * 256 * N, "abmilp": lambda N, K: 4 * D * D * N,
              "ep": lambda N, K: 12 * 32 * D * N, "mhca": lambda N, K: 12 * 12 * D * N,
              "simpool": lambda N, K: 12 * D * N, "linpre": lambda N, K: 2 * D * N,
              "linearc": lambda N, K: D * N, "proto": lambda N, K: 2 * D * K * N,
              "protobin": lambda N, K: 2 * D * K * N}
    for title, names, heads, encoders in (
            ("the grid", list(sets), list(pooled), 9),
            ("an evening: one encoder, five multi-label sets, linear, mhca, protobin",
             ["as20k", "fsd50k", "desed", "spass", "urban"], ["mhca", "protobin"], 1)):
        clips = tokens = encoder = head = read = 0
        for name in names:
            here, train, N, K = sets[name]
            clips, tokens = clips + here, tokens + here * N * D * 2
            encoder += here * 12 * (2 * (N + 1) * D * 12 * D + 4 * (N + 1) ** 2 * D)
            head += 5 * 30 * train * sum(pooled[h](N, K) for h in heads)
            read += 30 * train * len(heads) * N * D * 2
        print(f"{title}: {encoders} x {clips:,} clips, {encoders * tokens / 1e12:.2f} TB of "
              f"tokens, {encoders * encoder / 1e15:,.0f} PFLOP of encoder, "
              f"{encoders * head / 1e15:,.0f} PFLOP of heads; read {encoders * tokens / 1e12:.2f} "
              f"TB if resident, else {encoders * read / 1e12:,.0f} TB")


def bench_rates(D=256, N=32, train=1000, clips=1400, sizes=(50, 200, 500)):
    """Which learning rates survive on another set than the demo: valid macro mAP on planted tokens,
    noise about a common mean into which each class of a clip puts its own direction once or twice,
    1 seed. 50 classes for all heads, 200 and 500 (K = 4,000, 10,000) for those with prototypes."""
    import evaluate
    import probe
    usual, high = (0.0003, 0.001, 0.003, 0.007), (0.01, 0.02, 0.04, 0.08)
    for C in sizes:
        rng = np.random.default_rng(0)
        directions, common = rng.standard_normal((C, D)), rng.standard_normal(D)
        labels, share = np.zeros((clips, C), bool), 1 / np.arange(5, 5 + C)
        tokens = rng.standard_normal((clips, N, D)) + common
        for i in range(clips):
            for j in rng.choice(C, rng.integers(1, 6), replace=False, p=share / share.sum()):
                labels[i, j] = True
                for t in rng.choice(N, rng.integers(1, 3), replace=False):
                    tokens[i, t] += 0.6 * directions[j] * rng.uniform(0.6, 1.2)
        hot = torch.from_numpy(labels).float().to(DEVICE)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            file = os.path.join(folder, "tokens.npy")
            np.save(file, tokens.astype(np.float16))
            store = probe.Store(file, torch.arange(clips), DEVICE)
            for pool in [h for h in probe.HEADS if C == 50 and h != "linear" or "proto" in h]:
                scores = {}
                for lr in (high if pool == "proto" else (0.001, 0.002, 0.003, 0.005, 0.01)
                           if "proto" in pool else usual):
                    torch.manual_seed(0)
                    head = probe.make_head(pool, D, C, (N // 4, 4), 20).to(DEVICE)
                    probe.train([head], [0], store, None, hot, torch.arange(train), lr,
                                probe.DECAY, "asl")
                    with torch.no_grad():
                        logits = torch.cat([head(x).cpu() for _, x in probe.batches(
                            store, torch.arange(train, clips))])
                    scores[lr] = evaluate.metrics("multi", labels[train:],
                                                  logits.numpy())["macro mAP"]
                print(f"{C:3} classes  {pool:>10}  default {probe.default_lr(pool, 20 * C):g}   "
                      + "   ".join(f"{lr:g}: {score:.1f}" for lr, score in scores.items()),
                      flush=True)


if __name__ == "__main__":
    names = {n[6:]: f for n, f in list(globals().items()) if n.startswith("bench_")}
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(__doc__)
    if sys.argv[1] == "probe" and len(sys.argv) > 2:
        bench_probe(sys.argv[2:])
    else:
        machine()
        print(inspect.cleandoc(names[sys.argv[1]].__doc__), end="\n\n")
        names[sys.argv[1]]()
