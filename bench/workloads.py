"""What `python -m bench kernels` measures, as data: shapes, inputs, the ways to compute, costs, the truth.

Every tensor of a workload has the layers as its first dimension, so that any of them can be checked alone.
Costs are those of the least arithmetic known and of every operand moved once; they are the same for all ways
to compute the same, so that redundant work shows as a lower rate. Ways that compute something else have a
cost of their own: those of a low rank beside those of a full R, and the published rule, which knows no low
rank.

At bf16 the published layers are measured as they are, in fp32, and as under autocast, with bf16 products. The
published step forms its statistics in R's precision, so there it is fp32 always.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import SAMPLE, PublishedLinear, draw_rows
from dbpkern import ops, reference

Inputs = dict[str, Tensor]
Outputs = Sequence[Tensor | Sequence[Tensor]]
Prepare = Callable[[Inputs, float], Callable[[], Outputs]]
Narrow = Callable[[Tensor], Tensor]
Reference = Callable[[Inputs, float, Narrow], Outputs]

Q_RATE = 4
"""Q's rate over R's: what is checked moves Q by the op's default, what is timed leaves it where it is."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = ("eager", "triton", "cuda")


@dataclass(frozen=True)
class Model:
    """The layers of a vision transformer, by widths."""

    width: int
    depth: int
    patch_values: int

    @property
    def stacks(self) -> list[tuple[int, int]]:
        """(d, layers) of the patch embedding, of qkv, proj and fc1, and of fc2; equal widths together."""
        layers: dict[int, int] = {}
        wide = [(self.patch_values, 1), (self.width, 3 * self.depth), (4 * self.width, self.depth)]
        for d, number in wide:
            layers[d] = layers.get(d, 0) + number
        return sorted(layers.items())

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of qkv, proj, fc1 and fc2."""
        d = self.width
        return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]


MODELS = {
    "S": Model(384, 12, 768),
    "B": Model(768, 12, 768),
    "L": Model(1024, 24, 768),
    "H": Model(1280, 32, 588),  # patches of 14 pixels
}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of products, and bytes that have to move."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Arm:
    """One way to compute a workload.

    Args:
        family: "ours", "published" or "baddbmm".
        prepare: makes a function without arguments of inputs and rate; what it does itself is not timed.
        group: names what is computed where that is not what the workload's first arm computes.
        backend: of ours, by name; None: the automatic choice.
        compiled: uses torch.compile.
        halves: rounds fp32 operands to bf16 and sums in fp32. PyTorch has no such product with an fp32 result
            on the CPU; there it raises `NotImplementedError`.
        kind: operands of its products: "ieee", "tf32" or "16bit"; None: as PyTorch's setting says.
        capturable: whether it may be in a CUDA graph; a host that reads results may not.
        cost: of a group of its own, or of a published arm that has to compute more than the workload.
        references: where the result is not that of the workload.
    """

    family: str
    prepare: Prepare
    group: str = ""
    backend: str | None = None
    compiled: bool = False
    halves: bool = False
    kind: str | None = None
    capturable: bool = True
    cost: Cost | None = None
    references: tuple[Reference, ...] = ()

    @property
    def name(self) -> str:
        """How tables call it."""
        parts = (self.family, self.group, self.backend, self.compiled * "compiled", self.halves * "bf16")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Workload:
    """An op in one mode at one shape.

    Args:
        op: name of the op, or "model_update".
        mode: "forward", "backward" or "step".
        sizes: L layers, n rows, d features, o outputs, r rank, as far as they apply.
        dtype: a key of `DTYPES`: of rows, and of the folded weight.
        make: inputs on a device from a seed.
        references: the specification of the result; further ones give the same by other orders of products.
        cost: of the least arithmetic known.
        published_flops: what the published rule spends on the same.
        arms: ways to compute it, ours first.
        mutates: inputs that a step changes.
    """

    op: str
    mode: str
    sizes: dict[str, int]
    dtype: str
    make: Callable[[torch.device, int], Inputs]
    references: tuple[Reference, ...]
    cost: Cost
    published_flops: int
    arms: list[Arm]
    mutates: tuple[str, ...] = ()
    where: dict[str, object] = field(default_factory=dict)
    """The model, batch and tokens whose shape this is."""

    def describe(self) -> str:
        """Op, mode, shape and dtype in words."""
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"{self.op} {self.mode}, {sizes}, {self.dtype}"


def checked_layers(layers: int) -> list[int]:
    """First, middle and last: what goes wrong with a layer's offset goes wrong in the last one, too."""
    return sorted({0, layers // 2, layers - 1})


def pick(stack: Tensor | Sequence[Tensor]) -> Tensor:
    """The layers that are checked."""
    chosen = checked_layers(len(stack))
    return stack[chosen] if isinstance(stack, Tensor) else torch.stack([stack[i] for i in chosen])


# Ways to call


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def widen(inputs: Inputs) -> Inputs:
    """Add fp32 copies of bf16 inputs, which the published arms share: they were captured in fp32."""
    copies = {f"{name} fp32": x.float() for name, x in inputs.items() if x.dtype == torch.bfloat16}
    return inputs | copies


def _wide(inputs: Inputs, name: str) -> Tensor:
    return inputs.get(f"{name} fp32", inputs[name])


def forward(function: Callable[[Inputs, float], Outputs]) -> Prepare:
    """Time the function itself."""
    return lambda inputs, lr: lambda: function(inputs, lr)


def backward(function: Callable[[Inputs, float], Outputs], leaves: Sequence[str]) -> Prepare:
    """Time the gradients of `leaves`, given that of the only output as the input "g"."""

    def prepare(inputs: Inputs, lr: float) -> Callable[[], Outputs]:
        leafed = dict(inputs) | {name: inputs[name].detach().requires_grad_() for name in leaves}
        (output,) = function(leafed, lr)
        sources = [leafed[name] for name in leaves]
        return lambda: torch.autograd.grad(output, sources, inputs["g"], retain_graph=True)

    return prepare


@dataclass(frozen=True)
class Loop:
    """The published way: a loop in Python over layers.

    Args:
        function: computes one layer; takes its tensors and the rate.
        names: its tensors.
        wide: they are all fp32; else they are as they came, and what the function multiplies is up to it.
    """

    function: Callable[..., tuple[Tensor, ...]]
    names: tuple[str, ...]
    wide: bool = True

    def _stack(self, inputs: Inputs, name: str) -> Tensor:
        return _wide(inputs, name) if self.wide else inputs[name]

    def _layers(self, inputs: Inputs) -> list[list[Tensor]]:
        stacks = (self._stack(inputs, name).unbind() for name in self.names)
        return [list(layer) for layer in zip(*stacks, strict=True)]

    def forward(self, compiled: bool) -> Prepare:
        """Time the loop."""
        function = torch.compile(self.function, dynamic=False) if compiled else self.function

        def prepare(inputs: Inputs, lr: float) -> Callable[[], Outputs]:
            layers = self._layers(inputs)
            return lambda: list(zip(*(function(*layer, lr) for layer in layers), strict=True))

        return prepare

    def backward(self, leaves: Sequence[str], compiled: bool) -> Prepare:
        """Time the gradients of all layers, of which each has an autograd graph of its own."""
        function = torch.compile(self.function, dynamic=False) if compiled else self.function

        def prepare(inputs: Inputs, lr: float) -> Callable[[], Outputs]:
            outputs, sources = [], [[] for _ in leaves]
            for layer in self._layers(inputs):
                for place, name in enumerate(leaves):
                    i = self.names.index(name)
                    layer[i] = layer[i].detach().requires_grad_()
                    sources[place].append(layer[i])
                outputs.append(function(*layer, lr)[0])
            flat = [tensor for layers in sources for tensor in layers]
            gradients = self._stack(inputs, "g").unbind()

            def step() -> Outputs:
                found = torch.autograd.grad(outputs, flat, gradients, retain_graph=True)
                return [found[i : i + len(outputs)] for i in range(0, len(found), len(outputs))]

            return step

        return prepare


def product(a: Tensor, b: Tensor, out: torch.dtype, halves: bool) -> Tensor:
    """`a b` of stacks by cuBLAS: operands widened to fp32, or rounded to bf16 with sums in fp32."""
    if not halves:
        return torch.bmm(_widened(a), _widened(b)).to(out)
    a, b = a.bfloat16(), b.bfloat16()
    return torch.bmm(a, b) if out == torch.bfloat16 else torch.bmm(a, b, out_dtype=out)


def add_product(c: Tensor, a: Tensor, b: Tensor, alpha: float, halves: bool) -> Tensor:
    """`c + alpha a b` of stacks in fp32."""
    if not halves:
        return torch.baddbmm(c, _widened(a), _widened(b), alpha=alpha)
    return torch.baddbmm(c, a.bfloat16(), b.bfloat16(), alpha=alpha, out_dtype=c.dtype)


def _arms(
    dtype: str,
    mode: str,
    leaves: Sequence[str],
    ours: Callable[[Inputs, float, str | None], Outputs],
    loop: Loop,
    algebra: Callable[[Inputs, float, bool], Outputs] | None,
    kind: str | None,
    autocast: Loop | None = None,
    **published: object,
) -> list[Arm]:
    """Every way to compute an op of its own.

    Args:
        ours: takes a backend's name.
        loop: the published way.
        algebra: stacks in PyTorch, unless ours is just that; takes whether operands are rounded to bf16.
        kind: of our operands, where PyTorch's setting does not decide.
        autocast: the published way under autocast to bf16, for workloads of that dtype.
        published: further fields of the published arms.
    """
    way = forward if mode != "backward" else lambda function: backward(function, leaves)

    def own(backend: str | None) -> Prepare:
        return way(lambda inputs, lr: ours(inputs, lr, backend))

    def stacked(halves: bool) -> Prepare:
        return way(lambda inputs, lr: algebra(inputs, lr, halves))

    def looped(loop: Loop, compiled: bool) -> Prepare:
        return loop.backward(leaves, compiled) if mode == "backward" else loop.forward(compiled)

    arms = [Arm("ours", own(backend), backend=backend, kind=kind) for backend in (None, *BACKENDS)]
    arms += [Arm("published", looped(loop, it), compiled=it, **published) for it in (False, True)]
    if dtype == "bf16" and autocast is not None:
        halved = {"halves": True, "kind": "16bit"} | published
        arms += [Arm("published", looped(autocast, it), compiled=it, **halved) for it in (False, True)]
    if algebra is not None:
        arms += [_baddbmm(stacked(halves), halves) for halves in (False, True)[: 1 + (dtype == "bf16")]]
    return arms


def _baddbmm(prepare: Prepare, halves: bool, **others: object) -> Arm:
    return Arm("baddbmm", prepare, halves=halves, kind="16bit" if halves else None, **others)


# The rules, of one layer as published and of stacks in PyTorch's best algebra; kappa is 0


def _low(*tensors: Tensor) -> list[Tensor]:
    """Operands as autocast hands them to a product: cast for every call."""
    return [tensor.bfloat16() for tensor in tensors]


TRANSFORM = Loop(lambda x, R, lr: (F.linear(x, R),), ("x", "R"))
LOW_TRANSFORM = Loop(lambda x, R, lr: (F.linear(*_low(x, R)),), ("x", "R"), wide=False)
FOLD = Loop(lambda W, R, lr: (W @ R,), ("W", "R"))
LOW_FOLD = Loop(lambda W, R, lr: (torch.mm(*_low(W, R)),), ("W", "R"), wide=False)


def _published_correlation(z: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    G = z.T @ z / len(z)
    a = torch.diag(G)
    return G - torch.diag(a), a


def _published_apply(R: Tensor, M: Tensor, lr: float) -> tuple[Tensor]:
    R -= lr * (M @ R)
    return (R,)


def _published_update(R: Tensor, z: Tensor, lr: float) -> tuple[Tensor]:
    return _published_apply(R, _published_correlation(z, lr)[0], lr)


def _published_fused(x: Tensor, R: Tensor, index: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bf16 meet R in that dtype, as under autocast; statistics have R's."""
    z = F.linear(x, R.to(x.dtype))
    C, a = _published_correlation(F.linear(x[index], R.to(x.dtype)).to(R.dtype), lr)
    return z, R - lr * (C @ R), a


def _correlation(z: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    G = product(z.mT, z, torch.float32, halves).div_(z.shape[1])
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    a = diagonal.clone()
    diagonal.zero_()
    return G, a


def _update(R: Tensor, z: Tensor, lr: float, halves: bool) -> tuple[Tensor, Tensor]:
    """The new R and the mean squares, by the cheaper association."""
    n, d = z.shape[1:]
    if n >= d:
        M, a = _correlation(z, halves)
        return add_product(R, M, R, -lr, halves), a
    z = z if halves else _widened(z)
    a = torch.linalg.vector_norm(z, dim=1, dtype=torch.float32).square_().div_(n)
    zR = product(z, R, z.dtype, halves)
    return add_product(R * (1 + lr * a[:, :, None]), z.mT, zR, -lr / n, halves), a


def _lowrank_map(A: Tensor, Q: Tensor, S: Tensor, out: torch.dtype, halves: bool) -> Tensor:
    """`A + ((A Q) S) Q^T`; with halves the result is bf16, too."""
    inner = torch.bfloat16 if halves else torch.float32
    T = product(product(A, Q, inner, halves), S, inner, halves)
    if halves:
        return torch.baddbmm(A.bfloat16(), T, Q.mT.bfloat16())
    return add_product(A.float(), T, Q.mT, 1, halves).to(out)


def _lowrank_statistics(x: Tensor, Q: Tensor, halves: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[1]
    x = x if halves else _widened(x)
    P = product(x, Q, x.dtype, halves)
    B = product(P.mT, P, torch.float32, halves).div_(n)
    Y = product(x.mT, P, torch.float32, halves).div_(n)
    return B, Y, torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_().div_(n)


def _lowrank_step(
    factors: Sequence[tuple[Tensor, Tensor]],
    statistics: Sequence[Sequence[Tensor]],
    lr: float,
    backend: str | None = None,
) -> Outputs:
    """Every stack at the rate lr: none is bounded, and caution is 1."""
    stacks = []
    for (Q, S), found in zip(factors, statistics, strict=True):
        caution = Q.new_ones(len(Q))
        stacks.append((Q, S, caution, torch.zeros_like(caution), *found))
    ops.lowrank_step_(stacks, lr, scale_free=False, limit=None, q_eta=Q_RATE * lr, backend=backend)
    return [factor for pair in factors for factor in pair]


# The specification, with products in the order in which a fast path may form them. In fp64 that makes no
# difference; with rounded operands it does, and the yardstick has to round where the arms do.


def mean_squares(x: Tensor) -> Tensor:
    """`[L, n, d] -> [L, d]`."""
    return torch.linalg.vector_norm(x, dim=1).square() / x.shape[1]


def exact_update(R: Tensor, z: Tensor, lr: float) -> Tensor:
    """`reference.update` without M."""
    return R * (1 + lr * mean_squares(z)[:, :, None]) - lr / z.shape[1] * (z.mT @ (z @ R))


UPDATES = (reference.update, exact_update)


def exact_lowrank(A: Tensor, Q: Tensor, S: Tensor) -> Tensor:
    """`reference.lowrank_fold` of a stack, without a dense R."""
    return A + ((A @ Q) @ S) @ Q.mT


def exact_statistics(x: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lowrank_statistics`, without the dense second moment."""
    P = x @ Q
    n = x.shape[1]
    return P.mT @ P / n, x.mT @ P / n, mean_squares(x)


# Inputs


class _Draw:
    """Random tensors on a device from a seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "fp32") -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(DTYPES[dtype])

    def rows(self, L: int, n: int, d: int, dtype: str = "fp32") -> Tensor:
        """Rows whose features have something in common: a wrong step shows where M is not small."""
        return (self.normal(L, n, d) + 0.5 * self.normal(L, n, 1)).to(DTYPES[dtype])

    def R(self, L: int, d: int) -> Tensor:
        """Near the identity, as R is after some training."""
        R = self.normal(L, d, d).mul_(0.1 / d**0.5)
        R.diagonal(dim1=-2, dim2=-1).add_(1)
        return R

    def M(self, L: int, d: int) -> Tensor:
        """Symmetric, with an empty diagonal."""
        half = self.normal(L, d, d).mul_(0.1 / d**0.5)
        M = half + half.mT
        M.diagonal(dim1=-2, dim2=-1).zero_()
        return M

    def QS(self, L: int, d: int, r: int) -> tuple[Tensor, Tensor]:
        """Orthonormal columns, and what they scale, by so much that `x Q S Q^T` is about as large as x.

        Were it small, a result without it would be right to within the rounding of bf16.
        """
        return torch.linalg.qr(self.normal(L, d, r))[0], self.normal(L, r, r).mul_(d**0.5 / r)

    def index(self, n: int, number: int) -> Tensor:
        """Rows without repetition, `[1, number]`."""
        return torch.randperm(n, generator=self.generator, device=self.device)[None, :number]


def dense(Q: Tensor, S: Tensor) -> Tensor:
    """`R = I + Q S Q^T`."""
    return torch.eye(Q.shape[-2], dtype=Q.dtype, device=Q.device) + Q @ S @ Q.mT


def _exact(x: Tensor) -> Tensor:
    return x


# Ops. `e` is the size in bytes of an element of the workload's dtype.


def transform(L: int, n: int, d: int, dtype: str, mode: str) -> Workload:
    """z of the samples of a stack."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        inputs = {"x": draw.rows(L, n, d, dtype), "R": draw.R(L, d)}
        return inputs | ({"g": draw.normal(L, n, d, dtype=dtype)} if mode == "backward" else {})

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return (reference.transform(t["x"], t["R"]) if mode == "forward" else t["g"] @ t["R"],)

    e, flops = DTYPES[dtype].itemsize, 2 * L * n * d**2
    arms = _arms(
        dtype,
        mode,
        ("x",),
        lambda t, lr, backend: (ops.transform(t["x"], t["R"], backend=backend),),
        TRANSFORM,
        lambda t, lr, halves: (product(t["x"], t["R"].mT, t["x"].dtype, halves),),
        "16bit" if dtype == "bf16" else None,
        LOW_TRANSFORM,
    )
    cost = Cost(flops, e * 2 * L * n * d + 4 * L * d * d)
    return Workload("transform", mode, {"L": L, "n": n, "d": d}, dtype, make, (truth,), cost, flops, arms)


def _weights(o: int, d: int, dtype: str, mode: str, *lowrank: int) -> Callable[..., Inputs]:
    """Inputs of folds: W, the gradient of the result, and R or Q and S."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        inputs = {"W": draw.normal(1, o, d).mul_(d**-0.5)}
        if lowrank:
            inputs["Q"], inputs["S"] = draw.QS(1, d, *lowrank)
        else:
            inputs["R"] = draw.R(1, d)
        return inputs | ({"g": draw.normal(1, o, d, dtype=dtype)} if mode == "backward" else {})

    return make


def _fold_kind(dtype: str, mode: str) -> str | None:
    """fp32 operands may be TF32 where the result is rounded to bf16; a bf16 gradient is a 16-bit operand."""
    return None if dtype == "fp32" else "tf32" if mode == "forward" else "16bit"


def fold(o: int, d: int, dtype: str, mode: str) -> Workload:
    """A weight with R, as every forward of a folded layer forms it; `dtype` is that of the result."""
    out = DTYPES[dtype]

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return (reference.fold(t["W"], t["R"]) if mode == "forward" else t["g"] @ t["R"].mT,)

    e, flops = out.itemsize, 2 * o * d**2
    arms = _arms(
        dtype,
        mode,
        ("W",),
        lambda t, lr, backend: (ops.fold(t["W"][0], t["R"][0], out, backend=backend)[None],),
        FOLD,
        lambda t, lr, halves: (product(t["W"], t["R"], out, halves),),
        _fold_kind(dtype, mode),
        LOW_FOLD,
    )
    cost = Cost(flops, (4 + e) * o * d + 4 * d * d)
    sizes = {"o": o, "d": d}
    return Workload("fold", mode, sizes, dtype, _weights(o, d, dtype, mode), (truth,), cost, flops, arms)


def linear(n: int, o: int, d: int, dtype: str, mode: str) -> Workload:
    """A whole layer: here folded, as published with every token through R."""
    out = DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        x, W, R = draw.rows(1, n, d, dtype), draw.normal(1, o, d).mul_(d**-0.5), draw.R(1, d)
        g = {"g": draw.normal(1, n, o, dtype=dtype)} if mode == "backward" else {}
        return {"x": x, "W": W, "R": R} | g

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        folded = narrow(reference.fold(t["W"], t["R"]))
        if mode == "forward":
            return (t["x"] @ folded.mT,)
        return t["g"] @ folded, narrow(t["g"].mT @ t["x"]) @ t["R"].mT

    def applied(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        z = narrow(t["x"] @ t["R"].mT)
        if mode == "forward":
            return (z @ t["W"].mT,)
        return narrow(t["g"] @ t["W"]) @ t["R"], narrow(t["g"].mT @ z)

    def ours(t: Inputs, lr: float, backend: str | None) -> Outputs:
        folded = ops.fold(t["W"][0], t["R"][0], out, backend=backend)
        return (F.linear(t["x"], folded),)

    e = out.itemsize
    if mode == "forward":
        cost = Cost(2 * o * d**2 + 2 * n * o * d, e * n * (d + o) + 4 * (o * d + d * d))
        published = 2 * n * d**2 + 2 * n * o * d
    else:
        cost = Cost(2 * o * d**2 + 4 * n * o * d, e * (n * (2 * d + o) + o * d) + 4 * (o * d + d * d))
        published = 2 * n * d**2 + 4 * n * o * d
    arms = _arms(
        dtype,
        mode,
        ("x", "W"),
        ours,
        Loop(lambda x, W, R, lr: (F.linear(F.linear(x, R), W),), ("x", "W", "R")),
        lambda t, lr, halves: (torch.bmm(t["x"], product(t["W"], t["R"], out, halves).mT),),
        "16bit" if dtype == "bf16" else None,
        Loop(lambda x, W, R, lr: (F.linear(F.linear(*_low(x, R)), *_low(W)),), ("x", "W", "R"), wide=False),
        references=(truth, applied),
    )
    if dtype == "bf16":  # the layer's own products are 16-bit ones in every folded form
        arms = [replace(arm, kind="16bit") if arm.family == "baddbmm" else arm for arm in arms]
    sizes = {"n": n, "o": o, "d": d}
    return Workload("linear", mode, sizes, dtype, make, (truth,), cost, published, arms)


def correlation(L: int, n: int, d: int, dtype: str) -> Workload:
    """M and the mean squares of a stack."""

    def make(device: torch.device, seed: int) -> Inputs:
        return {"z": _Draw(device, seed).rows(L, n, d, dtype)}

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return reference.correlation(t["z"])[:2]

    arms = _arms(
        dtype,
        "step",
        (),
        lambda t, lr, backend: ops.correlation(t["z"], backend=backend)[:2],
        Loop(_published_correlation, ("z",)),
        lambda t, lr, halves: _correlation(t["z"], halves),
        "16bit" if dtype == "bf16" else None,
    )
    cost = Cost(L * n * d * (d + 1), DTYPES[dtype].itemsize * L * n * d + 4 * L * (d * d + d))
    sizes = {"L": L, "n": n, "d": d}
    return Workload("correlation", "step", sizes, dtype, make, (truth,), cost, 2 * L * n * d**2, arms)


def apply_(L: int, d: int) -> Workload:
    """R from finished statistics; everything in fp32."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        return {"R": draw.R(L, d), "M": draw.M(L, d)}

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return (reference.apply(t["R"], t["M"], lr),)

    arms = _arms(
        "fp32",
        "step",
        (),
        lambda t, lr, backend: (ops.apply_(t["R"], t["M"], lr, backend=backend),),
        Loop(_published_apply, ("R", "M")),
        lambda t, lr, halves: (add_product(t["R"], t["M"], t["R"], -lr, halves),),
        None,
    )
    flops = 2 * L * d**3
    cost, sizes = Cost(flops, 12 * L * d * d), {"L": L, "d": d}
    return Workload("apply_", "step", sizes, "fp32", make, (truth,), cost, flops, arms, ("R",))


def _update_flops(n: int, d: int) -> int:
    """M symmetric, then the product with R; or `z^T (z R)`."""
    return min(n * d * (d + 1) + 2 * d**3, 4 * n * d**2)


def update_(L: int, n: int, d: int, dtype: str) -> Workload:
    """R from z."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        return {"R": draw.R(L, d), "z": draw.rows(L, n, d, dtype)}

    def by(update: Callable[..., Tensor]) -> Reference:
        return lambda t, lr, narrow: (update(t["R"], t["z"], lr),)

    arms = _arms(
        dtype,
        "step",
        (),
        lambda t, lr, backend: (ops.update_(t["R"], t["z"], lr, backend=backend),),
        Loop(_published_update, ("R", "z")),
        lambda t, lr, halves: _update(t["R"], t["z"], lr, halves)[:1],
        "16bit" if dtype == "bf16" else None,
    )
    cost = Cost(L * _update_flops(n, d), DTYPES[dtype].itemsize * L * n * d + 8 * L * d * d)
    published, sizes = L * (2 * n * d**2 + 2 * d**3), {"L": L, "n": n, "d": d}
    orders = tuple(by(update) for update in UPDATES)
    return Workload("update_", "step", sizes, dtype, make, orders, cost, published, arms, ("R",))


def fused_step(n: int, samples: int, d: int, dtype: str) -> Workload:
    """z of every token and R's update; its backward is that of `transform`."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        x, R = draw.rows(1, n, d, dtype), draw.R(1, d)
        return {"x": x, "R": R, "index": draw.index(n, samples)}

    def by(update: Callable[..., Tensor]) -> Reference:
        def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
            z = reference.transform(t["x"], t["R"])
            rows = narrow(z)[:, t["index"][0]]
            return z, update(t["R"], rows, lr), mean_squares(rows)

        return truth

    def ours(t: Inputs, lr: float, backend: str | None) -> Outputs:
        found = ops.fused_step(t["x"][0], t["R"][0], t["index"][0], lr, backend=backend)
        return [tensor[None] for tensor in found]

    def algebra(t: Inputs, lr: float, halves: bool) -> Outputs:
        z = product(t["x"], t["R"].mT, t["x"].dtype if halves else torch.float32, halves)
        return z.to(t["x"].dtype), *_update(t["R"], z[:, t["index"][0]], lr, halves)

    arms = _arms(
        dtype,
        "forward",
        (),
        ours,
        Loop(_published_fused, ("x", "R", "index")),
        algebra,
        "16bit" if dtype == "bf16" else None,
        Loop(_published_fused, ("x", "R", "index"), wide=False),
    )
    cost = Cost(
        2 * n * d**2 + _update_flops(samples, d),
        DTYPES[dtype].itemsize * 2 * n * d + 8 * samples + 4 * (2 * d * d + d),
    )
    published = 2 * n * d**2 + 4 * samples * d**2 + 2 * d**3
    sizes = {"n": n, "n_s": samples, "d": d}
    orders = tuple(by(update) for update in UPDATES)
    return Workload("fused_step", "forward", sizes, dtype, make, orders, cost, published, arms)


def lowrank_transform(L: int, n: int, d: int, r: int, dtype: str, mode: str) -> Workload:
    """z of rows by a low-rank R, against the dense R of the same value."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        Q, S = draw.QS(L, d, r)
        inputs = {"x": draw.rows(L, n, d, dtype), "Q": Q, "S": S, "R": dense(Q, S)}
        return inputs | ({"g": draw.normal(L, n, d, dtype=dtype)} if mode == "backward" else {})

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        if mode == "forward":
            return (exact_lowrank(t["x"], t["Q"], t["S"].mT),)
        return (exact_lowrank(t["g"], t["Q"], t["S"]),)

    full = transform(L, n, d, dtype, mode)
    arms = _arms(
        dtype,
        mode,
        ("x",),
        lambda t, lr, backend: (ops.lowrank_transform(t["x"], t["Q"], t["S"], backend=backend),),
        TRANSFORM,
        lambda t, lr, halves: (_lowrank_map(t["x"], t["Q"], t["S"].mT, t["x"].dtype, halves),),
        "16bit" if dtype == "bf16" else None,
        LOW_TRANSFORM,
        references=full.references,
        cost=full.cost,
    )
    cost = Cost(
        L * (4 * n * d * r + 2 * n * r**2),
        DTYPES[dtype].itemsize * 2 * L * n * d + 4 * L * (d * r + r * r),
    )
    sizes, published = {"L": L, "n": n, "d": d, "r": r}, 2 * L * n * d**2
    return Workload("lowrank_transform", mode, sizes, dtype, make, (truth,), cost, published, arms)


def lowrank_fold(o: int, d: int, r: int, dtype: str, mode: str) -> Workload:
    """A weight with a low-rank R, against the dense R of the same value."""
    out = DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = _weights(o, d, dtype, mode, r)(device, seed)
        return inputs | {"R": dense(inputs["Q"], inputs["S"])}

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        if mode == "forward":
            return (exact_lowrank(t["W"], t["Q"], t["S"]),)
        return (exact_lowrank(t["g"], t["Q"], t["S"].mT),)

    def ours(t: Inputs, lr: float, backend: str | None) -> Outputs:
        return (ops.lowrank_fold(t["W"][0], t["Q"][0], t["S"][0], out, backend=backend)[None],)

    full = fold(o, d, dtype, mode)
    arms = _arms(
        dtype,
        mode,
        ("W",),
        ours,
        FOLD,
        lambda t, lr, halves: (_lowrank_map(t["W"], t["Q"], t["S"], out, halves),),
        _fold_kind(dtype, mode),
        LOW_FOLD,
        references=full.references,
        cost=full.cost,
    )
    cost = Cost(4 * o * d * r + 2 * o * r**2, (4 + out.itemsize) * o * d + 4 * (d * r + r * r))
    sizes, published = {"o": o, "d": d, "r": r}, 2 * o * d**2
    return Workload("lowrank_fold", mode, sizes, dtype, make, (truth,), cost, published, arms)


def _lowrank_statistics_cost(L: int, n: int, d: int, r: int, dtype: str) -> Cost:
    flops = L * (4 * n * d * r + n * r * (r + 1))
    return Cost(flops, DTYPES[dtype].itemsize * L * n * d + 4 * L * (2 * d * r + r * r + d))


def _lowrank_step_cost(L: int, d: int, r: int) -> Cost:
    """Products alone: 11 of d r^2 operations (symmetric ones count half), 10 of r^3; Q and S both ways."""
    return Cost(L * (11 * d * r**2 + 10 * r**3), 4 * L * (3 * d * r + 3 * r * r + d))


def lowrank_statistics(L: int, n: int, d: int, r: int, dtype: str) -> Workload:
    """B, Y and c of raw rows, against M of the published rule with the dense R."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        Q, S = draw.QS(L, d, r)
        return {"x": draw.rows(L, n, d, dtype), "Q": Q, "R": dense(Q, S)}

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return exact_statistics(t["x"], t["Q"])

    def full(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return reference.correlation(reference.transform(t["x"], t["R"]))[:2]

    arms = _arms(
        dtype,
        "step",
        (),
        lambda t, lr, backend: ops.lowrank_statistics(t["x"], t["Q"], backend=backend),
        Loop(lambda x, R, lr: _published_correlation(F.linear(x, R), lr), ("x", "R")),
        lambda t, lr, halves: _lowrank_statistics(t["x"], t["Q"], halves),
        "16bit" if dtype == "bf16" else None,
        references=(full,),
        cost=transform(L, n, d, dtype, "forward").cost + correlation(L, n, d, dtype).cost,
    )
    cost, sizes = _lowrank_statistics_cost(L, n, d, r, dtype), {"L": L, "n": n, "d": d, "r": r}
    published = 4 * L * n * d**2
    return Workload("lowrank_statistics", "step", sizes, dtype, make, (truth,), cost, published, arms)


def lowrank_step_(L: int, d: int, r: int) -> Workload:
    """Q and S from finished statistics, against the published step of a dense R; everything in fp32.

    The op itself is PyTorch's algebra on stacks, so there is no arm "baddbmm".
    """

    def make(device: torch.device, seed: int) -> Inputs:
        draw = _Draw(device, seed)
        Q, S = draw.QS(L, d, r)
        B, Y, c = _lowrank_statistics(draw.rows(L, 4 * r, d), Q, False)
        return {"Q": Q, "S": S, "B": B, "Y": Y, "c": c, "R": dense(Q, S), "M": draw.M(L, d)}

    def truth(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return reference.lowrank_apply(t["Q"], t["S"], t["B"], t["Y"], t["c"], lr, q_eta=Q_RATE * lr)

    def full(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        return (reference.apply(t["R"], t["M"], lr),)

    def ours(t: Inputs, lr: float, backend: str | None) -> Outputs:
        return _lowrank_step([(t["Q"], t["S"])], [(t["B"], t["Y"], t["c"])], lr, backend)

    arms = _arms(
        "fp32",
        "step",
        (),
        ours,
        Loop(_published_apply, ("R", "M")),
        None,
        None,
        references=(full,),
        cost=apply_(L, d).cost,
    )
    cost, sizes = _lowrank_step_cost(L, d, r), {"L": L, "d": d, "r": r}
    mutates, published = ("R", "Q", "S"), 2 * L * d**3
    return Workload("lowrank_step_", "step", sizes, "fp32", make, (truth,), cost, published, arms, mutates)


def _published_model_update(compiled: bool) -> Prepare:
    """A loop over the layers, whose losses the host reads; the samples go through R again."""

    def one(layer: PublishedLinear, x: Tensor, lr: float) -> Tensor:
        layer.z = F.linear(x, layer.R)
        return layer.update(lr, 0.0)

    function = torch.compile(one, dynamic=False) if compiled else one

    def prepare(inputs: Inputs, lr: float) -> Callable[[], Outputs]:
        layers = []
        for name, stack in inputs.items():
            if name.startswith("R"):
                for R, x in zip(stack, _wide(inputs, "x" + name[1:]), strict=True):
                    layer = PublishedLinear(nn.Linear(len(R), 1, device="meta"), draw_rows)
                    layer.R = R
                    layers.append((layer, x))

        def step() -> Outputs:
            for layer, x in layers:
                function(layer, x, lr).item()
            return [stack for name, stack in inputs.items() if name.startswith("R")]

        return step

    return prepare


def _lowrank_model_cost(stacks: Sequence[tuple[int, int]], n: int, dtype: str, rank: int) -> Cost:
    """Rows once, Q and S both ways; the statistics between the two ops need not move."""
    cost = Cost(0, 0)
    for d, L in stacks:
        r = min(rank, d)
        flops = _lowrank_statistics_cost(L, n, d, r, dtype).flops + _lowrank_step_cost(L, d, r).flops
        cost += Cost(flops, DTYPES[dtype].itemsize * L * n * d + 8 * L * (d * r + r * r))
    return cost


def model_update(stacks: Sequence[tuple[int, int]], n: int, dtype: str, rank: int | None) -> Workload:
    """All R of a model from the captured rows of every layer, with full R and with low rank.

    Args:
        stacks: (d, layers).
        n: sampled rows of each layer.
        rank: of the low-rank arms, at most d.
    """
    places = range(len(stacks))

    def make(device: torch.device, seed: int) -> Inputs:
        draw, inputs = _Draw(device, seed), {}
        for i, (d, L) in enumerate(stacks):
            inputs[f"x{i}"], inputs[f"R{i}"] = draw.rows(L, n, d, dtype), draw.R(L, d)
            if rank:
                inputs[f"Q{i}"], inputs[f"S{i}"] = draw.QS(L, d, min(rank, d))
        return inputs

    def by(update: Callable[..., Tensor]) -> Reference:
        return lambda t, lr, narrow: [
            update(t[f"R{i}"], narrow(reference.transform(t[f"x{i}"], t[f"R{i}"])), lr) for i in places
        ]

    def low(t: Inputs, lr: float, narrow: Narrow) -> Outputs:
        found = []
        for i in places:
            statistics = exact_statistics(t[f"x{i}"], t[f"Q{i}"])
            found += reference.lowrank_apply(t[f"Q{i}"], t[f"S{i}"], *statistics, lr, q_eta=Q_RATE * lr)
        return found

    def ours(t: Inputs, lr: float, backend: str | None) -> Outputs:
        found = []
        for i in places:
            R = t[f"R{i}"]
            z = ops.transform(t[f"x{i}"], R, backend=backend)
            found.append(ops.update_(R, z, lr, backend=backend))
        return found

    def ours_low(t: Inputs, lr: float, backend: str | None) -> Outputs:
        factors = [(t[f"Q{i}"], t[f"S{i}"]) for i in places]
        found = [ops.lowrank_statistics(t[f"x{i}"], t[f"Q{i}"], backend=backend) for i in places]
        return _lowrank_step(factors, found, lr)

    def algebra(t: Inputs, lr: float, halves: bool) -> Outputs:
        found = []
        for i in places:
            x, R = t[f"x{i}"], t[f"R{i}"]
            z = product(x, R.mT, x.dtype if halves else torch.float32, halves)
            found.append(_update(R, z, lr, halves)[0])
        return found

    def algebra_low(t: Inputs, lr: float, halves: bool) -> Outputs:
        factors = [(t[f"Q{i}"], t[f"S{i}"]) for i in places]
        return _lowrank_step(
            factors, [_lowrank_statistics(t[f"x{i}"], t[f"Q{i}"], halves) for i in places], lr
        )

    def way(function: Callable, argument: object) -> Prepare:
        return forward(lambda t, lr: function(t, lr, argument))

    kind = "16bit" if dtype == "bf16" else None
    precisions = (False, True)[: 1 + (dtype == "bf16")]
    arms = [Arm("ours", way(ours, name), backend=name, kind=kind) for name in (None, *BACKENDS)]
    arms += [
        Arm("published", _published_model_update(it), compiled=it, capturable=False) for it in (False, True)
    ]
    arms += [_baddbmm(way(algebra, halves), halves) for halves in precisions]
    if rank:
        own = {
            "cost": _lowrank_model_cost(stacks, n, dtype, rank),
            "references": (low,),
            "group": f"rank {rank}",
        }
        arms += [
            Arm("ours", way(ours_low, name), backend=name, kind=kind, **own) for name in (None, *BACKENDS)
        ]
        arms += [_baddbmm(way(algebra_low, halves), halves, **own) for halves in precisions]
    flops = sum(L * (2 * n * d**2 + _update_flops(n, d)) for d, L in stacks)
    e = DTYPES[dtype].itemsize
    moved = sum(e * L * n * d + 8 * L * d * d for d, L in stacks)
    sizes = {f"L[{d}]": L for d, L in stacks} | {"n": n}
    return Workload(
        "model_update",
        "step",
        sizes,
        dtype,
        make,
        tuple(by(update) for update in UPDATES),
        Cost(flops, moved),
        sum(L * (4 * n * d**2 + 2 * d**3) for d, L in stacks),
        arms,
        tuple(name for i in places for name in ((f"R{i}", f"Q{i}", f"S{i}") if rank else (f"R{i}",))),
    )


OPS = (
    "transform",
    "fold",
    "linear",
    "correlation",
    "apply_",
    "update_",
    "fused_step",
    "lowrank_transform",
    "lowrank_fold",
    "lowrank_statistics",
    "lowrank_step_",
    "model_update",
)


def _of_model(op: str, model: Model, n: int, dtype: str, rank: int) -> Iterator[Workload]:
    """An op at the shapes of a model, the patch embedding's apart; n tokens."""
    samples = max(1, round(SAMPLE * n))
    widths = [(d, L) for d, L in model.stacks if d in (model.width, 4 * model.width)]
    modes = ("forward", "backward")
    if op == "model_update":
        yield model_update(model.stacks, samples, dtype, rank)
    elif op in ("fold", "lowrank_fold", "linear"):
        for (o, d), mode in itertools.product(dict.fromkeys(model.linears), modes):
            if op == "fold":
                yield fold(o, d, dtype, mode)
            elif op == "linear":
                yield linear(n, o, d, dtype, mode)
            else:
                yield lowrank_fold(o, d, min(rank, d), dtype, mode)
    for d, L in widths:
        r = min(rank, d)
        if op == "transform":
            yield from (transform(L, samples, d, dtype, mode) for mode in modes)
        elif op == "correlation":
            yield correlation(L, samples, d, dtype)
        elif op == "apply_":
            yield apply_(L, d)
        elif op == "update_":
            yield update_(L, samples, d, dtype)
        elif op == "fused_step":
            yield fused_step(n, samples, d, dtype)
        elif op == "lowrank_transform":
            yield from (lowrank_transform(L, samples, d, r, dtype, mode) for mode in modes)
        elif op == "lowrank_statistics":
            yield lowrank_statistics(L, samples, d, r, dtype)
        elif op == "lowrank_step_":
            yield lowrank_step_(L, d, r)


def workloads(
    op_names: Iterable[str],
    models: Iterable[str],
    batches: Iterable[int],
    tokens: Iterable[int],
    dtypes: Iterable[str],
    rank: int,
) -> list[Workload]:
    """Ops at the shapes of models, every shape once: not all depend on the batch."""
    found: dict[str, Workload] = {}
    for op, name, dtype in itertools.product(op_names, models, dtypes):
        for batch, length in itertools.product(batches, tokens):
            where = {"model": name, "batch": batch, "tokens": length}
            for workload in _of_model(op, MODELS[name], batch * length, dtype, rank):
                found.setdefault(workload.describe(), replace(workload, where=where))
    return list(found.values())
