"""What a training step launches on a GPU, counted without one.

Forward and optimizer step run on fake CUDA tensors, which have shapes and no memory, under autocast as on the
GPU that `--device` names: the code that would run is the code that is counted. Autograd has no engine for
fake tensors, so gradients are given by hand, the rows that the forward sampled are delivered, and the
backward is taken as twice the forward's products and bytes. For every arm the figures are of a step in which
R is not due and of one in which it is, once sizes are known: gradients lie where they lay in the step before.
Where they move, the maps and `adamw_` write their tables of addresses again, two more operations each.

An operation starts work on the device; PyTorch's multi-tensor operations make several launches. "Beyond" is
beyond plain training with `torch.optim.AdamW(fused=True)`, or with timm's Muon for DecorMuon.

Times are estimates by a roofline, not measurements. An operation takes the larger of bytes / bandwidth and of
products / rate of their kind, over the part of the GPU that its programs fill, and a least time; columns of
small matrices that one program makes one after the other count by their number. The ceilings are those of
`--gpu` as its maker states them, times the efficiencies printed with them. Forward and backward of PyTorch
take longer than their roofline by a factor that is assumed, too, and printed: public measurements lie above
it (0.408 s a step of MAE's ViT-B with 128 images on an A6000, github.com/Alpha-VL/ConvMAE issue 5, where the
roofline of this file gives 0.15 s). What dbpkern adds is given no such factor.
"""

import argparse
import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # for numbers that are read back
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import cases, options, record
from bench.arms import Arm, muon
from dbpkern import Decor
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import IMPLEMENTATIONS


@dataclass(frozen=True)
class Gpu:
    """A GPU's ceilings by its data sheet (dense, no sparsity), and the parts of them that are assumed."""

    bandwidth: float
    """Bytes a second."""
    rates: dict[str, float]
    """Floating-point operations a second by kind of product."""
    processors: int
    bandwidth_efficiency: float = 0.85
    product_efficiency: float = 0.6
    launch: float = 2.5e-6
    """Seconds that a kernel takes at least."""
    serial: float = 0.5e-6
    """Seconds of one of many steps that a program makes one after the other."""
    eager: float = 2.0
    """Forward and backward in eager PyTorch, over their roofline."""


GPUS = {
    "h200": Gpu(4.8e12, {"16bit": 989e12, "tf32": 494e12, "fp32": 67e12}, 132),
    "h100": Gpu(3.35e12, {"16bit": 989e12, "tf32": 494e12, "fp32": 67e12}, 132),
    "a100": Gpu(2.04e12, {"16bit": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 108),
}
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
HALVES = (torch.float16, torch.bfloat16)
TILE = 128
"""Rows and columns of a product that a program of a library kernel is taken to make."""

# Launches of a multi-tensor operation: a program takes so many numbers, a launch so many programs and tensors
# (ATen/native/cuda/MultiTensorApply.cuh; tensors by the number of lists).
CHUNK, PROGRAMS = 65_536, 320
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}

NO_WORK = {
    "aten.detach", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.alias",
    "aten._local_scalar_dense", "aten.lift_fresh", "aten.new_empty_strided", "aten.resize_",
    "aten.set_", "aten.is_same_size",
}  # fmt: skip
"""Operations that start nothing on the device; views are found by their memory."""


@dataclass
class Work:
    """One operation on the device."""

    name: str
    bytes: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    """Of products, by kind."""
    launches: int = 1
    programs: int | None = None
    """How many share the work; None for enough."""
    serial: int = 0
    """Steps that a program makes one after the other."""
    ours: bool = False
    sampling: bool = False
    """Whether it takes rows aside, in the forward, and has no backward."""

    def seconds(self, gpu: Gpu) -> float:
        """The estimate."""
        filled = 1.0
        if self.programs is not None:
            waves = math.ceil(self.programs / gpu.processors)
            filled = self.programs / (waves * gpu.processors)
        moving = self.bytes / (gpu.bandwidth * gpu.bandwidth_efficiency)
        rates = gpu.rates
        products = sum(n / (rates[kind] * gpu.product_efficiency) for kind, n in self.flops.items())
        least = self.launches * gpu.launch
        return max(moving, products / filled, least) + self.serial * gpu.serial


class Record(TorchDispatchMode):
    """Writes down what starts work on the device; dbpkern's operators run their own code."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.host = 0
        """Operations that PyTorch dispatched, views included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.host += 1
        if func.namespace == "dbpkern" and func._opname in IMPLEMENTATIONS:
            return self._ours(func, args, kwargs)
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        if self._works(name, args, kwargs, out):
            self.work.append(_of_pytorch(func, args, kwargs, out))
            self.work[-1].sampling = name == "aten.randperm"
        return out

    def _works(self, name: str, args: tuple, kwargs: dict, out: object) -> bool:
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if name in NO_WORK or name.startswith("prim.") or not any(t.is_cuda for t in tensors):
            return False
        produced = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        views = produced and all(t.untyped_storage()._cdata in given for t in produced)
        return not views or name.endswith(("_", "_out")) or "out" in kwargs or not produced

    def _ours(self, func, args: tuple, kwargs: dict) -> object:
        """Run an operator's implementation, on tensors without memory, and write down what it launches."""
        before = len(self.work)
        with _triton.recording() as launched, self:
            out = IMPLEMENTATIONS[func._opname](*args, **kwargs)
        self.work += [_of_triton(launch) for launch in launched]
        for work in self.work[before:]:
            work.sampling = func._opname.startswith("sample_")
        return out


def _of_triton(launch: _triton.Launch) -> Work:
    """A launch of one of our kernels: its tensors once each, and the products that its sizes say."""
    name, a, c = launch.kernel.__name__, launch.args, launch.constants
    programs = math.prod(launch.grid)
    moved = _bytes(list(a.values()))
    d, r = a.get("D", 0), a.get("RANK", c.get("RANK", 0))
    layers, n = launch.grid[-1], a.get("N", 0)
    weights = a.get("blocks", launch.grid[0]) * c.get("BLOCK_M", 0) * d  # of kernels that read a table
    kind = "tf32" if c.get("PRECISION") in ("tf32", "tf32x3") else "16bit"
    flops, precise, serial = 0.0, 0.0, 0
    if name == "map_kernel":
        moved += weights * 4 * (3 if c["CHANGE"] else 2)
        flops = weights * 2 * d
    elif name == "lowrank_map_kernel":
        moved += weights * 4 * 2
        flops = weights * 4 * r
        if c["CHANGE"]:  # V Q is made as `remember` makes it, and what that kept is read
            moved += weights / d * r * 4
            flops, precise = weights * 2 * r, weights * 3 * 2 * r
    elif name == "remember_kernel":
        moved += weights * 4 + weights / d * r * 4
        precise = weights * 3 * 2 * r  # three TF32 products for one of fp32
    elif name in ("adamw_kernel", "lowrank_adamw_kernel"):
        moved += weights * 4 * 7
        flops = 2 * weights * (4 * r if r else 2 * d)
    elif name == "deviation_kernel":
        moved += launch.grid[2] * d * d * 4
    elif name in ("rows_kernel", "patches_kernel"):
        moved = _bytes(a["out"]) + a["out"].numel() * a["x"].itemsize
    elif name == "matmul_kernel":
        flops = 2 * layers * a["M"] * a["N"] ** 2
    elif name in ("correlation_kernel", "gram_kernel"):
        flops = layers * n * d * (d + c["BLOCK"])
    elif name == "project_kernel":
        flops = 2 * layers * n * d * r
    elif name == "moments_kernel":
        flops = 2 * layers * n * r * (d + r)
    elif name in ("moved_kernel", "turn_kernel"):
        # Q and Y, or Q alone, lie where the table says. Three TF32 products for one of fp32.
        features, factors = a["A"].shape[0], 6 if name == "moved_kernel" else 1
        moved += features * r * 4 * (2 if factors > 1 else 1)
        flops = 3 * 2 * factors * features * r**2
        serial = 2 * r if factors > 1 else 0  # B is factorised column by column
    elif name == "small_kernel":
        kind, flops, serial = "fp32", 40 * launch.grid[0] * r**3, 2 * r  # a factorisation, and r x r products
    products = {kind: flops} if flops else {}
    if precise:
        products["tf32"] = precise
    return Work(name, moved, products, programs=programs, serial=serial, ours=True)


def _bytes(values: object) -> int:
    """Bytes of all tensors in a structure, broadcast dimensions once."""
    total = 0
    for t in tree_leaves(values):
        if isinstance(t, Tensor) and t.is_cuda:
            numbers = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
            total += numbers * t.itemsize
    return total


def _flops(formula: Callable, args: tuple, kwargs: dict, out: object) -> float:
    return float(formula(*args, **kwargs, out_val=out))


def _kind(tensors: Iterable[Tensor]) -> str:
    """The kind of a product of PyTorch's."""
    if any(t.dtype in HALVES for t in tensors):
        return "16bit"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def _of_pytorch(func, args: tuple, kwargs: dict, out: object) -> Work:
    """One of PyTorch's operations."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    moved = _bytes((args, kwargs)) + _bytes(out)
    if not _bytes(out):  # in place, without a result: what is written was read before
        mutated = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
        given = zip((a.name for a in func._schema.arguments), args, strict=False)
        moved += sum(_bytes(value) for name, value in given if name in mutated)
    work = Work(str(func.overloadpacket), moved)
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        work.flops = {_kind(tensors): _flops(formula, args, kwargs, out)}
        result = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
        if result.dim() > 1:
            *lead, m, n = result.shape
            work.programs = math.prod(lead) * math.ceil(m / TILE) * math.ceil(n / TILE)
    if work.name.startswith("aten._foreach") or work.name == "aten._fused_adamw_":
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        sizes = [t.numel() for t in lists[0]] if lists else []
        chunks = sum(math.ceil(n / CHUNK) for n in sizes)
        tensors_each = TENSORS.get(len(lists), 30)
        work.launches = max(1, math.ceil(chunks / PROGRAMS), math.ceil(len(sizes) / tensors_each))
    return work


def fake_cuda(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model whose tensors are fake and on a GPU."""
    with unset_fake_temporarily(), FakeCopyMode(mode):
        model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                moved = torch.empty_like(p, device="cuda")
                module._parameters[name] = nn.Parameter(moved, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return model


@dataclass(frozen=True)
class Side:
    """An arm of the table."""

    name: str
    method: str
    choice: str | None = None
    optimizer: Callable = torch.optim.AdamW
    rule: Decor | None = None
    plain: str = "AdamW, fused"
    """The arm that it is compared with."""


def fused(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's AdamW in one pass."""
    return torch.optim.AdamW(parameters, fused=True)


def foreach(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's AdamW by multi-tensor operations."""
    return torch.optim.AdamW(parameters, foreach=True)


SIDES = (
    Side("AdamW, fused", "plain", optimizer=fused),
    Side("AdamW, foreach", "plain", optimizer=foreach),
    Side("DecorAdamW", "DecorAdamW", "mixed"),
    Side("DecorPreconditioner", "DecorPreconditioner", "mixed", fused),
    Side("DecorPreconditioner, low rank", "DecorPreconditioner", "low", fused),
    Side("DecorPreconditioner, full R, sublayers", "full", "sublayers", fused),
    Side("DecorPreconditioner, full R, all sites", "full", "all", fused),
    Side("published", "published", "all", fused),
    Side("Muon", "plain", optimizer=muon, plain="Muon"),
    Side("DecorMuon", "DecorMuon", "mixed", plain="Muon"),
)
WARM_UP = 3
"""Steps before those that are counted: states are made, and rows find their place."""


class FlashAttention(TorchFunctionMode):
    """Attention as a GPU has it: fake tensors would take the way of separate products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None
        if attention and len(args) == 3 and all(t.dtype in HALVES for t in args):
            causal = kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, 0.0, causal)[0]
        return func(*args, **kwargs)


def _gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.empty_like(p)


def count(case: cases.Case, side: Side, capability: tuple[int, int]) -> dict[bool, tuple[Record, Record]]:
    """What a step does, in which R is not due (False) and in which it is (True): forward, and the rest.

    Args:
        case: the model.
        side: how it is trained.
        capability: of the GPU.
    """
    model, real = case.build(), case.inputs(torch.device("cpu"), torch.float32)
    found: dict[bool, tuple[Record, Record]] = {}
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # torch.autocast("cuda") turns itself off where there is no GPU; these do not.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(shape_env=ShapeEnv()) as mode, _dispatch.assume(capability):
            inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real)
            fake = fake_cuda(model, mode)
            arm = Arm(_Given(case, fake), side.method, side.choice, inputs, "fp32", side.optimizer, side.rule)
            for step in range(WARM_UP + 2):
                due = arm.engine is None or arm.engine.sampler.due
                with FlashAttention(), Record() as forward:
                    loss, _ = arm.model(*arm.inputs)
                if arm.engine is not None:
                    for site in arm.engine.sites:
                        site.slot.deliver()
                _gradients(arm.model)
                with Record() as rest:
                    arm.update()
                if step >= WARM_UP:
                    found[due] = forward, rest
                del loss
    finally:
        torch.set_autocast_enabled("cuda", autocast[0])
        torch.set_autocast_dtype("cuda", autocast[1])
        torch.clear_autocast_cache()
    return found


class _Given(cases.Case):
    """A case with its model."""

    def __init__(self, case: cases.Case, model: nn.Module) -> None:
        super().__init__(**asdict(case))
        object.__setattr__(self, "model", model)

    def build(self) -> nn.Module:
        """The model."""
        return self.model


def summary(found: tuple[Record, Record], gpu: Gpu) -> dict[str, object]:
    """The figures of a step."""
    forward, rest = found
    work = [*forward.work, *rest.work]
    flops: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for one in work:
        flops.update(one.flops)
        launches[one.name] += one.launches
    ours = {one.name for one in work if one.ours}
    # PyTorch's part of the forward has a backward, as long as two of it. Sampled rows have none.
    model = sum(one.seconds(gpu) for one in forward.work if not one.sampling)
    added = sum(one.seconds(gpu) for one in forward.work if one.sampling)
    update = sum(one.seconds(gpu) for one in rest.work)
    return {
        "launches": {name: n for name, n in sorted(launches.items()) if name in ours},
        "launches_of_pytorch": {name: n for name, n in sorted(launches.items()) if name not in ours},
        "operations": len(work),
        "host_operations": forward.host + rest.host,
        "all_launches": sum(launches.values()),
        "bytes": sum(one.bytes for one in work),
        "flops": dict(flops),
        # Those of small matrices, which one program makes one after the other, are below 1 MFLOP each.
        "largest_fp32_product": max(
            (one.flops.get("fp32", 0.0) for one in rest.work if not one.serial), default=0.0
        ),
        "milliseconds": 1e3 * (3 * gpu.eager * model + added + update),
        "model_milliseconds": 3e3 * gpu.eager * model,
        "sampling_milliseconds": 1e3 * added,
        "optimizer_milliseconds": 1e3 * update,
    }


def measure(case: cases.Case, capability: tuple[int, int], gpu: Gpu, sides: Sequence[Side]) -> list[dict]:
    """The rows of a case: each arm, not due and due."""
    figures: dict[str, dict[bool, dict]] = {}
    rows = []
    for side in sides:
        start = time.perf_counter()
        found = count(case, side, capability)
        figures[side.name] = {due: summary(one, gpu) for due, one in found.items()}
        record.progress(f"{case.name}: {side.name}, {time.perf_counter() - start:.0f} s")
        base = figures[side.plain][True]
        own = [
            {
                "arm": side.name,
                "due": due,
                **one,
                "operations_beyond_plain": one["operations"] - base["operations"],
                "launches_beyond_plain": one["all_launches"] - base["all_launches"],
                "overhead": one["milliseconds"] / base["milliseconds"] - 1,
            }
            for due, one in sorted(figures[side.name].items())
        ]
        mean = sum(row["overhead"] for row in own) / len(own)
        rows += [row | {"mean_overhead": mean} for row in own]
    return rows


def table(rows: Sequence[dict]) -> str:
    """The rows as Markdown."""
    columns = (
        "arm", "R", "ours", "operations beyond", "launches beyond", "GB", "TFLOP 16-bit", "TF32", "fp32",
        "ms, estimated", "overhead %", "mean %", "host operations",
    )  # fmt: skip
    lines = []
    for row in rows:
        flops = row["flops"]
        lines.append(
            [
                row["arm"],
                "due" if row["due"] else "not due",
                str(sum(row["launches"].values())),
                str(row["operations_beyond_plain"]),
                str(row["launches_beyond_plain"]),
                f"{row['bytes'] / 1e9:.2f}",
                *(f"{flops.get(kind, 0.0) / 1e12:.4f}" for kind in ("16bit", "tf32", "fp32")),
                f"{row['milliseconds']:.2f}",
                f"{100 * row['overhead']:.2f}",
                f"{100 * row['mean_overhead']:.2f}",
                str(row["host_operations"]),
            ]
        )
    return record.table(columns, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench launches`."""
    parser.add_argument("--device", choices=CAPABILITIES, default="sm_90", help="(default: sm_90)")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="whose ceilings (default: h200)")
    parser.add_argument("--case", nargs="+", choices=cases.CASES, default=["mae50"], help="(default: mae50)")
    parser.add_argument("--width", type=options.count, default=768, help="of the encoder (default: 768)")
    parser.add_argument("--depth", type=options.count, default=12, help="blocks (default: 12)")
    parser.add_argument("--decoder-depth", type=options.count, default=2, help="of MAE (default: 2)")
    parser.add_argument("--batch", type=options.count, default=256, help="images (default: 256)")
    names = [side.name for side in SIDES]
    parser.add_argument(
        "--arms", nargs="+", choices=names, default=names, metavar="ARM", help="(default: all)"
    )
    parser.add_argument("--json", type=options.file, metavar="FILE", help="also write the figures there")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Count, print, write; returns the exit code."""
    if _triton.INTERPRETED or _triton.triton is None:
        record.progress("launches: Triton is missing or in its interpreter, so no kernel would be launched")
        return 2
    gpu, capability = GPUS[args.gpu], CAPABILITIES[args.device]
    wanted = {side.plain for side in SIDES if side.name in args.arms} | set(args.arms)
    sides = [side for side in SIDES if side.name in wanted]
    head = record.header(argv, torch.device("cpu"), "bf16") | {"gpu": args.gpu, "ceilings": asdict(gpu)}
    print(record.machine_line(head))
    print(
        f"estimates for {args.gpu}: {gpu.bandwidth_efficiency:.0%} of {gpu.bandwidth / 1e12:g} TB/s, "
        f"{gpu.product_efficiency:.0%} of "
        + ", ".join(f"{rate / 1e12:g} TFLOP/s {kind}" for kind, rate in gpu.rates.items())
        + f", {gpu.launch * 1e6:g} us a launch; forward and backward {gpu.eager:g} times their roofline"
    )
    rows = []
    for name in args.case:
        case = cases.Case(name, args.width, args.depth, args.batch, args.decoder_depth)
        found = measure(case, capability, gpu, sides)
        rows += [{"case": case.describe(), **row} for row in found]
        print(f"\n## {case.describe()}, bf16 autocast, {args.device}\n\n{table(found)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    return 0
