"""extract.py and probe.py with --device cuda on a simulated device, compared with --device cpu.

A device tensor is an ordinary CPU tensor whose storage is registered with `Device`, through which
every operator passes. Two rules are enforced: no operator mixes device and host tensors (numbers
and indices excepted); and what an asynchronous copy brings to the host is NaN until an event behind
it was waited for, while the pinned source of one to the device must stay the same until then. Waits
and bytes are counted. Autocast is the CPU's; kernels and speed are left to tests/test_cuda.py."""

import contextlib
import functools
import os
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import extract
import numpy as np
import official
import probe
import pytest
import torch
from test_cuda import main, write_clips, write_tokens
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten, TO, NUMPY, PLACE = torch.ops.aten, torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.device
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}

class Device(TorchDispatchMode):
    """inner: "cpu" computes, "meta" only follows sizes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.ops, self.busy, self.time, self.waits, self.peak = inner, set(), 0, 0, 0, 0
        self.storages, self.pinned, self.copies = {}, {}, {}  # copies: {time: what finishes it}

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages

    def register(self, tensor, pinned=False):
        storage, table = tensor.untyped_storage(), self.pinned if pinned else self.storages
        if storage._cdata not in table:
            table[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, table.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(list(self.storages.values())))
        return tensor

    def pin(self, tensor):
        return self.register(tensor.clone(), pinned=True)

    def wait(self, until=None):  # a time; None: now
        self.waits += 1
        for time, finish in list(self.copies.items()):
            if until is None or time <= until:
                finish()
                self.copies.pop(time, None)

    def move(self, tensor, asynchronous):  # -> its copy on the other side
        def finish():
            if held:
                out[...] = value
            elif pinned:
                same = source.tobytes() == value.tobytes()  # pytest would compare bytes one by one
                assert same, "pinned and overwritten too early"
        with _disable_current_modes():
            source, held = NUMPY(tensor.detach()), self.holds(tensor)
            value, pinned = source.copy(), tensor.untyped_storage()._cdata in self.pinned
            out, self.time = np.full_like(source, np.nan) if held else value, self.time + 1
            self.copies[self.time] = finish
            if not asynchronous:
                self.wait()
            moved = torch.from_numpy(out)
            return moved if held else self.register(TO(moved, self.inner, copy=True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = [self.holds(x) for x in tensors]
        asked = torch.device(kwargs.get("device") or "cpu").type == "cuda" or (
            not tensors and sys._getframe(1).f_code.co_name == "_engine_run_backward")
        if not asked and not any(held):
            return func(*args, **kwargs)
        if asked or kwargs.get("device"):
            kwargs["device"] = self.inner
        mixed = any(held) and any(x.dim() and not on for x, on in zip(tensors, held))
        if mixed and (func not in INDEXING or not held[0]):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        masked = func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if mixed or masked or func in WAITING:
            self.wait()
        if self.inner == "meta" and func in (*WAITING, aten._fused_adamw_.default):
            return 0.0 if func in WAITING else None
        self.ops, self.busy = self.ops | {func}, 1
        if func is aten.mm.dtype:  # has no CPU kernel
            func, args = aten.mm.default, [x.float() for x in args[:2]]
        out, self.busy = func(*args, **kwargs), 0
        return tree_map_only(torch.Tensor, self.register, out)

@contextlib.contextmanager
def simulated(inner="cpu"):
    """A Device that --device cuda finds."""
    device, autocast = Device(inner), torch.autocast

    def record_event(event):
        return SimpleNamespace(synchronize=functools.partial(device.wait, device.time))

    def to(tensor, *args, **kwargs):
        target, dtype, asynchronous, _ = torch._C._nn._parse_to(*args, **kwargs)
        moves = target is not None and device.holds(tensor) != (target.type == "cuda")
        tensor = TO(tensor, dtype or tensor.dtype)
        return device.move(tensor, asynchronous) if moves else tensor

    def place(x):  # busy: meta kernels written in Python see the real device
        return PLACE.__get__(x) if device.busy or not device.holds(x) else torch.device("cuda", 0)
    methods = {"to": to, "cpu": lambda x: to(x, "cpu"), "pin_memory": lambda x: device.pin(x),
               "numpy": lambda x: pytest.fail("a device tensor") if device.holds(x) else NUMPY(x),
               "is_cuda": property(device.holds), "device": property(place)}
    functions = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "set_device": lambda index: None,
        "Event": lambda blocking: None, "is_current_stream_capturing": lambda: False,
        "current_stream": lambda: SimpleNamespace(record_event=record_event),
        "mem_get_info": lambda: (2 ** 36, 2 ** 36), "get_device_name": lambda: "simulated"}
    torch._C._ensureCUDADeviceGuardSet()
    with mock.patch.multiple(torch.Tensor, create=True, **methods), \
            mock.patch.multiple(torch.cuda, **functions), device, \
            mock.patch.object(torch, "autocast", lambda _, *x, **y: autocast("cpu", *x, **y)):
        yield device
        device.wait()

def train(device, pool, **constants):
    """Logits of a small dump, and the simulated device."""
    os.path.exists("tokens") or write_tokens(clips=400)
    with mock.patch.multiple(probe, **{"EPOCHS": 2, "BATCH": 16} | constants), \
            simulated() if device == "cuda" else contextlib.nullcontext() as world:
        main(probe, "--pool", pool, "--seeds", "1", "--overwrite", "--model", "enc", device=device)
    return np.load(f"runs/made/enc/{pool}/seed0/logits.npy"), world

def encode(device, model):
    """Tokens and cls of 11 clips of 1 s, 4 a block, of which number 7 is unreadable."""
    if not os.path.exists("data"):
        write_clips(11, 1)
        torch.save(official.state("eat", depth=2, D=128), "eat.pt")
    args = ["--model", model] + ["--checkpoint", "eat.pt"] * (model == "eat")
    with mock.patch.dict(extract.BLOCK, {device: 40}), \
            simulated() if device == "cuda" else contextlib.nullcontext():
        main(extract, "--allow-bad", "--overwrite", *args, device=device)
    return [np.load(f"tokens/made/{model}/{name}.npy").astype("f4") for name in ("tokens", "cls")]

@pytest.mark.parametrize("memory", [0.6, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("pool", ["protobin", "linear", "mhca"])
def test_training(pool, memory):
    want, _ = train("cpu", pool)
    got, device = train("cuda", pool, MEMORY=memory)
    assert np.isfinite(got).all() and np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (aten.mm.dtype in device.ops) == (pool == "protobin")  # its tokens stay float16

@pytest.mark.parametrize("model", ["logmel", "eat"])
def test_extraction(model):
    for want, got in zip(*(encode(device, model) for device in ("cpu", "cuda"))):
        assert np.isfinite(got).all() and (got[7] == 0).all() and np.abs(want).mean() > 0.1
        assert np.linalg.norm(want - got) < 2e-3 * np.linalg.norm(want)

def test_planted_faults(monkeypatch):
    """Labels on the host, one pinned buffer for all batches, tokens saved before they arrive."""
    loss, save = probe.asymmetric_loss, extract.save_part
    buffer = torch.zeros(16, 64, 64, dtype=torch.float16)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="same device"):
        patch.setitem(probe.LOSSES, "asl", lambda logits, labels: loss(logits, labels.cpu()))
        train("cuda", "protobin")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="pinned"):
        patch.setattr(Device, "pin", lambda device, tensor: device.register(
            buffer, pinned=True)[:len(tensor)].copy_(tensor))
        train("cuda", "mhca", MEMORY=0)
    with monkeypatch.context() as patch, pytest.raises(extract.Stop, match="overflow"):  # NaN
        patch.setattr(extract, "save_part", lambda *args: save(*args[:-1], None))
        encode("cuda", "eat")

@pytest.mark.parametrize("pool", ["protobin", "mhca"])
def test_waits_per_epoch(monkeypatch, pool):
    """An epoch has 13 steps. A wait in each of them is noticed."""
    def waits():
        two, three = (train("cuda", pool, EPOCHS=n)[1].waits for n in (2, 3))
        return three - two
    assert 1 <= waits() <= 3
    real = probe.asymmetric_loss
    monkeypatch.setitem(probe.LOSSES, "asl", lambda *x: real(*x) + 0 * real(*x).item())
    assert waits() >= 13

def test_memory_of_a_step(monkeypatch):
    """protobin at K = 5,270, beside resident tokens, weights and AdamW's two states of each."""
    monkeypatch.setattr(probe, "EPOCHS", 1)
    settings = {"lr": 1e-3, "weight_decay": 0, "seed": 0, "loss": "asl"}
    with simulated("meta") as device:
        x = torch.empty(300, 512, 768, dtype=torch.float16, device="cuda")  # tokens
        labels, head = torch.empty(300, 527, device="cuda"), probe.ProtoBin(768, 527, M=10)
        kept = sum(device.storages.values()) + 3 * sum(p.nbytes for p in head.parameters())
        probe.train(head.to("cuda"), x, None, labels, torch.arange(300), settings, x.dtype)
    assert 150e6 < device.peak - kept < 300e6
