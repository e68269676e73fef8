"""What the tests of the ops share: inputs, layouts, and when a result is as good as PyTorch's."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dbpkern.ops import _triton
from dbpkern.ops._dispatch import Operands

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HALVES = FLOATS[1:]
computes_on_fakes = pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="fake tensors of a GPU ask for a driver, or give no number, before torch 2.12",
)
# Who serves which samples.
SERVED = [("eager", dtype) for dtype in (torch.float64, *FLOATS)] + [("triton", dtype) for dtype in FLOATS]
BACKENDS = ["eager", "triton"]
KAPPAS = [0.0, 0.3, 1.0]
# (L, n, d): one and none of each, primes, fewer and more samples than features, more layers than pieces of
# apply_, widths beside those of the tiles.
SHAPES = [
    (1, 1, 1),
    (1, 5, 1),
    (2, 0, 5),
    (1, 5, 7),
    (3, 8, 8),
    (2, 35, 33),
    (1, 20, 50),
    (9, 31, 19),
    (0, 4, 3),
    (2, 3, 0),
]


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def matrix(*shape, dtype=torch.float32):
    """Matrices near the identity, not symmetric."""
    return torch.eye(shape[-1], device=DEVICE, dtype=dtype) + 0.1 * tensor(*shape, dtype=dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x, kind: Operands):
    """x as it enters a product, in fp32."""
    return x.to(kind.dtype).float()


def as_good(actual, exact, peer):
    """The error is at most twice that of PyTorch with the same dtypes, and 4 units in the last place.

    fp64, in which the specification itself is computed, is `close` to it.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == peer.dtype
    if exact.numel() == 0:
        return
    if actual.dtype == torch.float64:
        close(actual, exact)
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (peer.double() - exact).abs().max()
    allowed += 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # false for NaN


def close(actual, expected):
    """Equal but for the rounding of a few operations in their dtype."""
    tolerance = 1e-12 if actual.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def launches(call):
    """Names of the kernels that a call launches."""
    with _triton.recording() as recorded:
        call()
    return [launch.kernel.__name__ for launch in recorded]


# Layouts. The storage around a view is NaN: reading it poisons the result, writing it is noticed.


def transposed(t):
    base = t.mT.clone(memory_format=torch.contiguous_format)
    return base.mT, base


def sliced(t):
    base = t.new_full([s + 3 for s in t.shape], float("nan"))
    view = base[tuple(slice(2, 2 + s) for s in t.shape)]
    return view.copy_(t), base


def strided(t):
    base = t.new_full([2 * s for s in t.shape], float("nan"))
    view = base[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t), base


def layers_last(t):
    base = t.movedim(0, -1).clone(memory_format=torch.contiguous_format)
    return base.movedim(-1, 0), base


LAYOUTS = [transposed, sliced, strided, layers_last]

# What eta may be, and the rate of each layer that it stands for.
ETAS = {
    "number": lambda L: (0.1, [0.1] * L),
    "integer": lambda L: (1, [1.0] * L),
    "zero": lambda L: (0.0, [0.0] * L),
    "0-d float64": lambda L: (torch.tensor(0.1, dtype=torch.float64), [0.1] * L),
    "0-d float32": lambda L: (torch.tensor(0.125, device=DEVICE), [0.125] * L),
    "[L] float64": lambda L: ((eta := 0.1 * torch.arange(1, L + 1, device=DEVICE).double()), eta.tolist()),
    "[L] float32": lambda L: ((eta := 0.125 * torch.arange(1, L + 1, device=DEVICE)), eta.tolist()),
    "[L] strided": lambda L: ((eta := torch.arange(2 * L, device=DEVICE).double()[::2] / 10), eta.tolist()),
}


def far_apart(rows):
    """The same 16-bit rows `[n, d]`, each further from the next than 32 bits count."""
    # Pages that nobody touches take no memory, but deterministic algorithms would fill them all.
    torch.use_deterministic_algorithms(False)
    stride = 2**28
    room = torch.empty(stride * (len(rows) - 1) + rows.shape[1], dtype=rows.dtype, device=DEVICE)
    return room.as_strided(rows.shape, (stride, 1)).copy_(rows)


def peak(function) -> int:
    """Most bytes that were allocated at a time while `function` ran, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
