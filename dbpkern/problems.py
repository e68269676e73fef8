"""Each op as a run meets it: inputs of any size, the call, and what it computes in a few lines.

`python -m dbpkern.tune` and `python -m bench gpu` check and time the ops by these, in processes of
their own.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dbpkern import extension, ops
from dbpkern.ops._dispatch import AUTOMATIC

Product = Callable[[Tensor, Tensor], Tensor]
Factors = tuple[Tensor, ...]
Three = tuple[Tensor, Tensor, Tensor]
Made = tuple[tuple[Any, ...], Callable[..., object], Callable[..., object]]
"""Inputs, call and formula of a `Problem`."""
REPEATS, WARM_UP = 15, 3
STEP = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}


@dataclass(frozen=True)
class Sizes:
    """L layers of width d with n rows each, on a device; d is at least 8."""

    L: int
    n: int
    d: int
    device: torch.device

    @property
    def r(self) -> int:
        """The rank, as a run has it: a multiple of 8, a twelfth of the width, and no more than 64."""
        return max(8, min(64, self.d // 96 * 8))

    def draw(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device)

    def rows(self) -> Tensor:
        """16-bit rows, with correlated features."""
        return (self.draw(self.L, self.n, self.d) + 0.5 * self.draw(self.L, self.n, 1)).bfloat16()

    def index(self, n: int) -> Tensor:
        """The numbers of n rows of `4 n`."""
        return torch.randperm(4 * n, device=self.device)[:n]

    def R(self) -> Tensor:
        """A stack of full R near the identity."""
        return torch.eye(self.d, device=self.device) + self.draw(self.L, self.d, self.d) / (20 * self.d**0.5)

    def QS(self) -> tuple[Tensor, Tensor]:
        """A stack of low-rank R."""
        Q = torch.linalg.qr(self.draw(self.L, self.d, self.r)).Q.contiguous()
        return Q, self.draw(self.L, self.r, self.r) / (10 * self.r**0.5)

    def factors(self, low: bool) -> list[Factors]:
        """R for each layer."""
        return list(zip(*(self.QS() if low else (self.R(),)), strict=True))

    def weights(self, scale: float = 1.0) -> list[Tensor]:
        """A weight for each layer."""
        return [scale * self.draw(self.d, self.d) for _ in range(self.L)]


@dataclass(frozen=True)
class Problem:
    """An op with inputs."""

    op: str
    inputs: tuple[Any, ...]
    """Nested tensors; an op that works in place changes them."""
    call: Callable[..., object]
    """`call(*inputs, backend=...)` returns all that the op writes."""
    formula: Callable[..., object]
    """`formula(product, *inputs)` returns the same, with every product by `product`."""

    def fresh(self) -> tuple[Any, ...]:
        """A copy of the inputs."""
        return tree_map_only(Tensor, torch.clone, self.inputs)

    def cast(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """A copy of the inputs with all numbers in this dtype; counts of steps have one of their own."""

        def copy(t: Tensor) -> Tensor:
            wide = t.dim() or dtype == torch.float64
            return t.to(dtype if t.is_floating_point() and wide else t.dtype, copy=True)

        return tree_map_only(Tensor, copy, self.inputs)

    @cached_property
    def _yardstick(self) -> tuple[list[Any], list[Any]]:
        """What the formula gives in fp64, and with rounded operands: once for all that is held against it."""
        exact = self.formula(torch.matmul, *self.cast(torch.float64))
        return tree_leaves(exact), tree_leaves(self.formula(rounded_product, *self.fresh()))

    def error(self, found: object) -> float:
        """The largest error against fp64, relative to what is allowed; at most 1 where the result is right.

        Allowed is twice the error of PyTorch's products of the same operands, and 4 units in the last place
        of the largest value.
        """
        exact, peers = self._yardstick
        worst = 0.0
        for actual, truth, peer in zip(tree_leaves(found), exact, peers, strict=True):
            error, other = ((t.double() - truth).abs().max() for t in (actual, peer.to(actual.dtype)))
            allowed = 2 * other + 4 * torch.finfo(actual.dtype).eps * truth.abs().max()
            ratio = float(error / allowed) if error else 0.0
            worst = max(worst, ratio if math.isfinite(ratio) else math.inf)
        return worst


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """The fp32 product of operands that are rounded to bf16."""
    return a.bfloat16().float() @ b.bfloat16().float()


def _eye(R: Tensor) -> Tensor:
    return torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)


def _deviation(p: Product, x: Tensor, factors: Sequence[Tensor], transposed: bool = False) -> Tensor:
    """`x (R - I)`, or its transpose's."""
    *Q, last = factors
    last = last.mT if transposed else last
    return p(p(p(x, Q[0]), last), Q[0].mT) if Q else p(x, last - _eye(last))


def _eagerly(call: Callable[..., object]) -> Callable[..., object]:
    """The formula of an op whose operands have the inputs' dtypes."""
    return lambda p, *inputs: call(*inputs, backend="eager")


def _correlation(s: Sizes) -> Made:
    def formula(p: Product, z: Tensor) -> Three:
        G = p(z.mT, z) / z.shape[1]
        a = G.diagonal(dim1=-2, dim2=-1)
        M = (G - torch.diag_embed(a)) / (a[:, :, None] + a[:, None, :])
        return M, a, torch.minimum(M.square().sum((1, 2)).sqrt(), M.abs().sum(2).amax(1))

    def call(z: Tensor, backend: str) -> Three:
        return ops.correlation(z, 0.0, True, torch.bfloat16, backend=backend)

    return (s.rows(),), call, formula


def _apply(s: Sizes) -> Made:
    M = s.draw(s.L, s.d, s.d).bfloat16() / s.d**0.5
    return (
        (s.R(), M),
        lambda R, M, backend: ops.apply_(R, M, 0.01, backend=backend),
        (lambda p, R, M: R - p(M, 0.01 * R)),
    )


def _transform(s: Sizes) -> Made:
    return (s.rows(), s.R()), ops.transform, lambda p, x, R: x + _deviation(p, x, (R,), True)


def _fold(s: Sizes) -> Made:
    def call(W: Tensor, R: Tensor, backend: str) -> Tensor:
        return ops.fold(W, R, torch.bfloat16, backend=backend)

    return (torch.stack(s.weights()), s.R()), call, lambda p, W, R: W + _deviation(p, W, (R,))


def _lowrank_transform(s: Sizes) -> Made:
    return (s.rows(), *s.QS()), ops.lowrank_transform, (lambda p, x, Q, S: x + p(p(x, Q), S.mT @ Q.mT))


def _lowrank_fold(s: Sizes) -> Made:
    def call(W: Tensor, Q: Tensor, S: Tensor, backend: str) -> Tensor:
        return ops.lowrank_fold(W, Q, S, torch.bfloat16, backend=backend)

    return (torch.stack(s.weights()), *s.QS()), call, lambda p, W, Q, S: W + p(p(W, Q), S @ Q.mT)


def _fused_step(s: Sizes) -> Made:
    def formula(p: Product, x: Tensor, R: Tensor, index: Tensor) -> Three:
        z = x + _deviation(p, x, (R,), True)
        sampled = z.to(x.dtype)[index].to(R.dtype)
        # What one product leaves to the next waits in the dtype of the rows.
        P = (p(sampled.mT, x[index]) / len(index)).to(x.dtype).to(R.dtype)
        G = P + _deviation(p, P, (R,), True)
        M = (G - torch.diag(G.diagonal())).to(x.dtype).to(R.dtype)
        return z, R - 0.05 * (M + _deviation(p, M, (R,))), sampled.square().mean(0)

    def call(x: Tensor, R: Tensor, index: Tensor, backend: str) -> Three:
        return ops.fused_step(x, R, index, 0.05, backend=backend)

    x = s.rows().flatten(0, 1)[: 4 * s.n]
    return (x, s.R()[0], torch.randperm(len(x), device=s.device)[: max(1, len(x) // 10)]), call, formula


def _map_gradients(s: Sizes, low: bool = False) -> Made:
    def call(gradients: list[Tensor], factors: list[Factors], backend: str) -> list[Tensor]:
        ops.map_gradients_(gradients, factors, backend=backend)
        return gradients

    def formula(p: Product, gradients: list[Tensor], factors: list[Factors]) -> list[Tensor]:
        return [g + _deviation(p, g, own, True) for g, own in zip(gradients, factors, strict=True)]

    return (s.weights(), s.factors(low)), call, formula


def _map_changes(s: Sizes, low: bool = False) -> Made:
    def call(
        weights: list[Tensor], old: object, kept: list[Tensor], factors: list[Factors], backend: str
    ) -> list[Tensor]:
        ops.map_changes_(weights, kept, factors, backend=backend)
        return weights

    def formula(
        p: Product, weights: list[Tensor], old: list[Tensor], kept: object, factors: list[Factors]
    ) -> list[Tensor]:
        parts = zip(weights, old, factors, strict=True)
        return [V + _deviation(p, V - before, own) for V, before, own in parts]

    old, factors = s.weights(), s.factors(low)
    weights = [V + change for V, change in zip(old, s.weights(0.01), strict=True)]
    return (weights, old, ops.remember(old, factors, backend="eager"), factors), call, formula


def _remember(s: Sizes) -> Made:
    return (s.weights(), s.factors(low=True)), ops.remember, _eagerly(ops.remember)


def _adamw(s: Sizes, low: bool = False) -> Made:
    def call(
        V: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], steps: list[Tensor],
        factors: list[Factors], backend: str,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        ops.adamw_(V, g, m, v, steps, factors, **STEP, backend=backend)
        return V, m, v

    def formula(p: Product, *groups: Sequence[Any]) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(zip(*(one(p, *parts) for parts in zip(*groups, strict=True)), strict=True))

    def one(p: Product, V: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, own: Factors) -> Three:
        # The products of a full R wait in 16 bits.
        def held(t: Tensor) -> Tensor:
            return t if low or V.dtype == torch.float64 else t.bfloat16().float()

        g = g + held(_deviation(p, g, own, True))
        m, v = m.lerp(g, 1 - STEP["beta1"]), v.lerp(g * g, 1 - STEP["beta2"])
        first, second = m / (1 - STEP["beta1"] ** step), v / (1 - STEP["beta2"] ** step)
        D = first / (second.sqrt() + STEP["eps"])
        return V - STEP["lr"] * (D + held(_deviation(p, D, own)) + STEP["weight_decay"] * V), m, v

    steps = [torch.tensor(7.0, device=s.device) for _ in range(s.L)]
    squares = [t.square() for t in s.weights()]
    return (s.weights(), s.weights(), s.weights(0.3), squares, steps, s.factors(low)), call, formula


def _lowrank_statistics(s: Sizes) -> Made:
    def formula(p: Product, x: Tensor, Q: Tensor) -> Three:
        n, P = x.shape[1], p(x, Q)
        return p(P.mT, P) / n, p(x.mT, P) / n, x.to(Q.dtype).square().mean(1)

    return (s.rows(), s.QS()[0]), ops.lowrank_statistics, formula


def _lowrank_step(s: Sizes) -> Made:
    def call(
        Q: Tensor, S: Tensor, caution: Tensor, rates: Tensor, B: Tensor, Y: Tensor, c: Tensor, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops.lowrank_step_([(Q, S, caution, rates, B, Y, c)], 0.1, backend=backend)
        return Q, S, caution, rates

    Q, S = s.QS()
    ones = torch.ones(s.L, device=s.device)
    statistics = ops.lowrank_statistics(s.rows().float(), Q, backend="eager")
    return (Q, S, ones, ones.clone(), *statistics), call, _eagerly(call)


def _choose_rates(s: Sizes) -> Made:
    def call(caution: Tensor, rates: Tensor, a: Tensor, bound: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ops.choose_rates_(caution, rates, a, bound, 0.1, 0.5, backend=backend)
        return caution, rates

    ones, bound = torch.ones(s.L, device=s.device), s.draw(s.L).abs()
    return (ones, ones.clone(), s.draw(s.L, s.d).square(), 10 * bound), call, _eagerly(call)


def _orthogonalize(s: Sizes) -> Made:
    call = ops.orthogonalize
    return (torch.stack(s.weights()).bfloat16(),), call, _eagerly(call)


def _sample_rows(s: Sizes) -> Made:
    inputs = torch.empty(s.n, s.d, dtype=torch.bfloat16, device=s.device), s.draw(4 * s.n, s.d), s.index(s.n)
    return inputs, ops.sample_rows_, lambda p, out, x, index: x[index]


def _sample_patches(s: Sizes) -> Made:
    size = 16 if s.d >= 768 else 2
    images = s.draw(max(1, 4 * s.n // 196), 3, 14 * size, 14 * size)
    index = torch.randperm(196 * len(images), device=s.device)[: s.n]
    out = torch.empty(len(index), 3 * size**2, dtype=torch.bfloat16, device=s.device)

    def call(out: Tensor, x: Tensor, index: Tensor, backend: str) -> Tensor:
        return ops.sample_patches_(out, x, index, (size, size), (size, size), backend=backend)

    def formula(p: Product, out: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return F.unfold(x, size, stride=size).mT.flatten(0, 1)[index]

    return (out, images, index), call, formula


MAKERS: dict[str, Callable[[Sizes], Made]] = {
    "adamw_": _adamw,
    "adamw_, low rank": lambda s: _adamw(s, True),
    "apply_": _apply,
    "choose_rates_": _choose_rates,
    "correlation": _correlation,
    "fold": _fold,
    "fused_step": _fused_step,
    "lowrank_fold": _lowrank_fold,
    "lowrank_statistics": _lowrank_statistics,
    "lowrank_step_": _lowrank_step,
    "lowrank_transform": _lowrank_transform,
    "map_, changes": _map_changes,
    "map_, changes, low rank": lambda s: _map_changes(s, True),
    "map_, gradients": _map_gradients,
    "map_, gradients, low rank": lambda s: _map_gradients(s, True),
    "orthogonalize": _orthogonalize,
    "remember, low rank": _remember,
    "sample_patches_": _sample_patches,
    "sample_rows_": _sample_rows,
    "transform": _transform,
}
"""By name: the op, as the tables of backends have it, and after a comma a variant."""


def make(name: str, L: int, n: int, d: int, device: torch.device) -> Problem:
    """A problem by its name, always with the same numbers."""
    torch.manual_seed(0)
    return Problem(name.partition(",")[0], *MAKERS[name](Sizes(L, n, d, device)))


def kernels(op: str) -> list[str]:
    """The backends of an op beside PyTorch's; the CUDA extension where it is built."""
    built = op == "lowrank_statistics" and torch.cuda.is_available() and extension.load() is not None
    return ["triton"] * (op in AUTOMATIC) + ["cuda"] * built


def isolated(work: Callable[..., dict[str, Any]], *args: object, seconds: float) -> dict[str, Any]:
    """What `work(*args)` returns, a dict, from a process of its own; `{"error": why}` if it does not.

    The process is killed after that many seconds.
    """
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, before the processes are forked.
    context.set_forkserver_preload([__name__, *{work.__module__} - {"__main__"}])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, work, args), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"error": f"no answer within {seconds:g} s"}
    except EOFError:
        process.join(5)
        return {"error": f"the process died, exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join(10)  # a driver may hold it longer: nobody waits


def _answer(sender: Connection, work: Callable[..., dict[str, Any]], args: tuple[object, ...]) -> None:
    try:
        sender.send(work(*args))
    except Exception as error:
        sender.send({"error": reason(error)})


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call that finds nothing in L2; of a single one where there is no GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    size = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for _ in range(WARM_UP):
        call()
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3
