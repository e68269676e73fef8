"""Time and memory on either kind of device."""

import contextlib
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, where the C library is glibc.

    By default glibc gives large blocks back and gets them again as fresh pages, whose faults cost a few
    percent of a step, and which arm pays is a matter of how its tensors happen to lie. The caching allocator
    of a GPU does not give memory back either.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # numbers of the parameters in malloc.h
        mallopt(trim_threshold, -1)  # never trim
        mallopt(mmap_max, 0)


def seconds(step: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Time of one `step`, the mean over `inner` in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner
    begin = time.perf_counter()
    for _ in range(inner):
        step()
    return (time.perf_counter() - begin) / inner


def flush_buffer(device: torch.device) -> Tensor | None:
    """Memory that fills the L2 cache when it is written, twice over; None on the CPU."""
    if device.type != "cuda":
        return None
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device=device)


def cold_seconds(
    steps: Sequence[Callable[[], object]], device: torch.device, inner: int, flush: Tensor | None
) -> float:
    """Mean time of `inner` calls, of each of `steps` in turn; on a GPU none finds anything in L2.

    Steps that do the same to other inputs keep a call from finding what the last one left in other caches.
    """
    if flush is None:
        begin = time.perf_counter()
        for i in range(inner):
            steps[i % len(steps)]()
        return (time.perf_counter() - begin) / inner
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(inner)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(pairs):
        # While the device writes this, the host queues the step: what it needs for that is not measured
        # unless it needs more.
        flush.zero_()
        start.record()
        steps[i % len(steps)]()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / inner


@dataclass(frozen=True)
class Replay:
    """A captured step, to be called.

    It keeps the step and all that it closes over: the graph knows no more than their addresses.

    Args:
        graph: replays the step.
        step: what was captured.
        outputs: what the step returned; every replay writes to these tensors.
    """

    graph: torch.cuda.CUDAGraph
    step: Callable[[], object]
    outputs: object

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def graph_replay(prepare: Callable[[], Callable[[], object]]) -> Replay:
    """Capture what `prepare()` returns in a CUDA graph.

    It is prepared on the stream of the capture, because a backward runs on the stream of its forward.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = prepare()
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = step()
    return Replay(graph, step, outputs)


@contextlib.contextmanager
def matmul_setting(name: str) -> Iterator[None]:
    """Within, PyTorch's fp32 matrix products are "ieee" or may be "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


TRIES = 11  # of which the best is the ceiling


def matmul_ceiling(kind: str, device: torch.device, size: int | None = None) -> float:
    """FLOP/s of the best of some large square products of PyTorch, by the kind of the operands.

    Args:
        kind: "ieee", "tf32" or "16bit" (bf16).
        device: where.
        size: of the matrices; None for 2048, on a GPU 8192.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if kind == "16bit" else None)
    with matmul_setting(kind):
        best = min(seconds(lambda: a @ b, device) for _ in range(TRIES))
    return 2 * size**3 / best


def copy_ceiling(device: torch.device, size: int | None = None) -> float:
    """Bytes per second, read and written, of the best of some copies; `size` bytes each, None for many."""
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(TRIES))
    return 2 * size / best


def rotated_round(
    steps: Sequence[Callable[[], object]], turn: int, measure: Callable[[Callable], float]
) -> list[float]:
    """Measure every step once, beginning with step number `turn`; returns them in the order of `steps`.

    Whatever drifts (temperature, other users) reaches all steps of a round alike; over the rounds none
    always comes first.
    """
    found = [0.0] * len(steps)
    for place in range(len(steps)):
        i = (turn + place) % len(steps)
        found[i] = measure(steps[i])
    return found


class Quartiles(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def quartiles(values: Iterable[float]) -> Quartiles:
    """Quartiles, interpolated linearly."""
    return Quartiles(*np.quantile(list(values), (0.25, 0.5, 0.75)).tolist())


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios within each round: what two rounds differ by cancels."""
    return quartiles(value / reference for value, reference in zip(values, base, strict=True))


class Span(NamedTuple):
    """Bytes held when a phase began and the most held during it."""

    start: int
    peak: int


class Allocations:
    """Bytes of tensors allocated since it was entered, in named phases.

        with Allocations(device) as memory:
            ...
            with memory.phase("backward"):
                loss.backward()
        memory.spans["backward"].peak

    On a GPU these are the caching allocator's figures. On the CPU they are those of every allocation and
    release that PyTorch's profiler records: exact, scratch inside operators included, whatever else the
    process holds; what BLAS and oneDNN allocate for themselves passes it by on either.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: dict[str, Span] = {}

    def __enter__(self) -> "Allocations":
        gc.collect()  # what the last one left behind must not be released in here
        if self.cuda:
            self.base = torch.cuda.memory_allocated()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if not self.cuda:
            self.profile.__exit__(*exception)
            if exception[0] is None:
                self._read_profile()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Look at what is allocated until it ends."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated() - self.base
            yield
            self.spans[name] = Span(start, torch.cuda.max_memory_allocated() - self.base)
        else:
            with record_function(f"phase:{name}"):
                yield

    def _read_profile(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        times = np.array([at for at, _ in changes])
        held = np.concatenate([[0], np.cumsum([size for _, size in changes])])
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith("phase:"):
                first, last = np.searchsorted(times, (event["ts"], event["ts"] + event["dur"]))
                name = event["name"].removeprefix("phase:")
                self.spans[name] = Span(int(held[first]), int(held[first : last + 1].max()))


@contextlib.contextmanager
def saved_storages(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect what autograd saves for the backward, tensors in `known` excepted.

    Yields:
        Bytes by address of the storage, so that what is saved twice counts once.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
