"""Which layers to decorrelate, and by which R, for a given part of the time of a training step.

    def step():
        loss_of(model(next(batches))).backward()

    plan = planning.plan(model, step, budget=0.05)
    print(plan)
    decor = dbpkern.DecorPreconditioner(model, optimizer, plan.decor())

docs/planning.md says how it chooses.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import distributed
from dbpkern.capture import Sampler
from dbpkern.config import Decor
from dbpkern.diagnostics import correlations
from dbpkern.layers.convert import check_stock
from dbpkern.sites import Filter, check_weights, inputs_of, select
from dbpkern.stock import StockLayer, unsampled

MODES = ("optimizer", "layers")
ROWS = 2048
"""Rows of a layer's input that are measured in each call of `step`, at most."""


@dataclass(frozen=True)
class Price:
    """What an R takes in time, counted in FLOPs of the plain step that take as long.

    Args:
        ratio: for each FLOP.
        entry: for each weight, as gradients and changes are copied and small products wait for memory.
        each: for each R, whatever its size, on one thread: further threads do not start operations sooner.
        group: likewise for each group of equal R, which make their step together.
    """

    ratio: float
    entry: float
    each: float
    group: float

    def of(self, count: int, flops: float, entries: int, threads: float) -> float:
        """FLOPs of the plain step that take as long as `count` equal R.

        Args:
            count: how many.
            flops: of one.
            entries: of the weights that one serves.
            threads: that the plain step computes on.
        """
        fixed = threads * (count * self.each + self.group)
        return count * (self.ratio * flops + self.entry * entries) + fixed


# Of a full and of a low-rank R, fitted to the time that DecorPreconditioner adds to a step on the CPU of
# bench/results/epyc-2-cores, see docs/planning.md. No other device has been measured.
FULL = Price(ratio=0.98, entry=130.0, each=1e7, group=5e7)
LOW_RANK = Price(ratio=1.0, entry=230.0, each=4.5e6, group=7e7)


@dataclass(frozen=True)
class Option:
    """A way to decorrelate a group of layers.

    Args:
        rank: of R; None for a full one.
        cost: part of the step's time.
        benefit: the part of the model's squared correlations that it can remove, see `Plan`.
    """

    rank: int | None
    cost: float
    benefit: float

    def __str__(self) -> str:
        """As in the table."""
        return "full" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Group:
    """Layers that are decided together: the same layer of every block.

    Args:
        name: of the layers, with `*` for the block's number.
        layers: their names, those that read one input side by side.
        width: features of the input.
        outputs: of the layers that read one input, together.
        tokens: rows of the input in a step, of one process.
        correlation: mean square of the correlation coefficients of two features, in [0, 1].
        options: what there was to choose from.
        chosen: one of them, or None.
    """

    name: str
    layers: tuple[tuple[str, ...], ...]
    width: int
    outputs: int
    tokens: float
    correlation: float
    options: tuple[Option, ...]
    chosen: Option | None = None


@dataclass(frozen=True)
class Plan:
    """Which layers to decorrelate; `print(plan)` shows a table.

    `plan.decor()` is the rule for these layers.

    Args:
        groups: the candidates, in the model's order.
        budget: part of the step's time that was allowed.
        rule: that the costs are those of.
    """

    groups: tuple[Group, ...]
    budget: float
    rule: Decor = field(default_factory=Decor)

    def decor(self) -> Decor:
        """The rule, for the chosen layers and with their ranks."""
        return replace(self.rule, sites=None, filter=self.accepts, rank=self.ranks)

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of R for each chosen layer, None for a full one."""
        return {
            name: group.chosen.rank
            for group in self.groups
            if group.chosen is not None
            for names in group.layers
            for name in names
        }

    @property
    def cost(self) -> float:
        """Part of the step's time that the chosen layers are expected to take."""
        return sum(group.chosen.cost for group in self.groups if group.chosen is not None)

    def accepts(self, name: str, module: nn.Module) -> bool:
        """The filter that leaves the chosen layers."""
        return name in self.ranks

    def __str__(self) -> str:
        """The candidates as a table, and what was chosen under which budget."""
        titles = ("layers", "count", "width", "outputs", "tokens", "correlation", "R", "cost %", "total %")
        rows, total = [titles], 0.0
        for group in self.groups:
            cost = 0.0 if group.chosen is None else group.chosen.cost
            total += cost
            rows.append(
                (
                    group.name,
                    str(sum(map(len, group.layers))),
                    str(group.width),
                    str(group.outputs),
                    f"{group.tokens:.0f}",
                    f"{group.correlation:.4f}",
                    str(group.chosen or "none"),
                    f"{100 * cost:.2f}",
                    f"{100 * total:.2f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        layers = sum(len(names) for group in self.groups for names in group.layers)
        allowed = f"the budget of {100 * self.budget:.4g} % of a step"
        if self.ranks:
            return f"{len(self.ranks)} of {layers} layers, {100 * self.cost:.2f} % of {allowed}"
        useful = [(option, group) for group in self.groups for option in group.options if option.benefit > 0]
        if not useful:
            return f"none of {layers} layers: their inputs show no correlations"
        option, group = min(useful, key=lambda pair: pair[0].cost)
        return (
            f"none of {layers} layers: the least, {group.name} with R {option}, takes "
            f"{100 * option.cost:.2f} %, above {allowed}"
        )


class _Input:
    """What the calls of `step` show of one layer's input."""

    def __init__(self, names: list[str], layers: list[StockLayer], sample: float) -> None:
        self.names = tuple(names)
        self.layers = layers
        d = layers[0].weight[0].numel()
        self.width = d
        self.outputs = sum(len(layer.weight) for layer in layers)
        self.sample = sample
        self.G = torch.zeros(d, d, dtype=layers[0].factors[0].dtype, device=layers[0].weight.device)
        self.measured = 0
        self.seen: list[int] = []  # rows of each forward
        self.waiting: list[Tensor] = []

    @property
    def entries(self) -> int:
        """Weights of the layers that read the input."""
        return self.width * self.outputs

    @property
    def template(self) -> tuple[str, int, int]:
        """What inputs of one group agree in: name without the numbers of blocks, width, outputs."""
        stems = [re.sub(r"\d+(?=[^.]*\.)", "*", name) for name in self.names]
        if len(stems) > 1:
            block = stems[0].rpartition(".")[0]
            stems = [f"{block}.{{{','.join(stem.rpartition('.')[2] for stem in stems)}}}".lstrip(".")]
        return stems[0], self.width, self.outputs

    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: take rows of the input, where a backward may follow."""
        repeats = torch._C._current_graph_task_id() != -1  # for activation checkpointing, in a backward
        if not module.training or not torch.is_grad_enabled() or repeats:
            return
        x = args[0] if args else kwargs["query" if isinstance(module, nn.MultiheadAttention) else "input"]
        layer = self.layers[0]
        n = layer.count_rows(x)
        if n:
            index = Sampler(min(1.0, ROWS / n), 0).index(n, len(self.seen), x.device)
            rows = x.new_empty(n if index is None else len(index), self.width)
            layer.take_rows(rows, x.detach(), index)
            self.waiting.append(rows)
            self.seen.append(n)

    def settle(self) -> None:
        """Add the rows of one call to G; outside `step`, whose FLOPs are counted."""
        for rows in self.waiting:
            rows = rows.to(self.G.dtype)
            self.G.addmm_(rows.mT, rows)
            self.measured += len(rows)
        self.waiting.clear()

    def average(self) -> None:
        """Make G the second moment, over all processes."""
        count = self.G.new_tensor([self.measured], dtype=torch.int64)
        if distributed.world_size() > 1:
            dist.all_reduce(self.G)
            dist.all_reduce(count)
        self.measured = int(count)
        self.G /= max(self.measured, 1)

    def flops(self, rank: int | None, mode: str, every: int, calls: int) -> float:
        """FLOPs that decorrelation adds to a step of this process."""
        d, o, r = self.width, self.outputs, rank
        tokens = sum(self.seen) / calls
        sampled = sum(max(1, round(self.sample * n)) for n in self.seen) / calls
        # Decorrelated layers fold W, or apply R to tokens where these are fewer, as in form="auto".
        rows = min(o, tokens) if mode == "layers" and isinstance(self.layers[0].layer, nn.Linear) else o
        if r is None:
            return 4 * rows * d**2 + (4 * sampled * d**2 + 2 * d**3) / every
        update = 4 * sampled * d * r + 2 * sampled * r**2 + 16 * d * r**2 + 35 * r**3
        return 8 * rows * d * r + 4 * rows * r**2 + update / every

    def measure(self, ranks: Sequence[int]) -> list[float]:
        """The correlation of the input, and for each rank the share of it that is within reach."""
        d, n = self.width, self.measured
        if d < 2 or n < 2:
            return [0.0] * (1 + len(ranks))
        C = correlations(self.G)
        squares = ((C.square().sum() - C.diagonal().square().sum()) / (d * (d - 1))).item()
        # n independent rows without any correlation show 1 / n.
        measured = (squares - 1 / n) / (1 - 1 / n) if squares > 2 / n else 0.0
        if not ranks or not measured:
            return [min(max(measured, 0.0), 1.0)] + [0.0] * len(ranks)
        # The squares of C off its diagonal of ones add up to those of its eigenvalues less 1.
        removed = (torch.linalg.eigvalsh(C).flip(0) - 1).clamp(min=0).square().cumsum(0)
        whole = squares * d * (d - 1)
        shares = [min((removed[min(r, d) - 1] / whole).item(), 1.0) for r in ranks]
        return [min(measured, 1.0), *shares]


def _inputs(model: nn.Module, filter: Filter | None, sample: float) -> list[_Input]:
    """The inputs of all layers that R could serve."""
    chosen, holders = {}, {}
    for name, found in select(model, None, filter or (lambda name, module: True)).items():
        try:
            check_weights(model, {name: found})
            # Of rank 1, to be small: R is never used.
            holder = StockLayer(found[0], 1)
        except ValueError:
            continue  # another layer's weight, or a layer of another kind
        holder.remove()
        if holder.trains:
            chosen[name], holders[name] = found, holder
    if not chosen:
        raise ValueError(
            "plan: expected a model with trained nn.Linear, patch nn.Conv2d or nn.MultiheadAttention layers "
            "of weights of their own, found none"
        )
    return [_Input(names, [holders[name] for name in names], sample) for names in inputs_of(chosen)]


@contextmanager
def _restored(model: nn.Module, seed: int) -> Iterator[None]:
    """Undo what runs of the model leave: gradients, buffers, modes, random numbers, samples of R."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p, _ in gradients if p.is_cuda})

    def refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
        raise ValueError(
            f"plan: expected a step() of forward and backward alone, but it calls {type(optimizer).__name__}"
            ".step(), which changes the weights"
        )

    guard = register_optimizer_step_pre_hook(refuse)
    try:
        with torch.random.fork_rng(devices), unsampled(model):
            torch.manual_seed(seed)
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        guard.remove()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _run(step: Callable[[], object], inputs: list[_Input], calls: int) -> int:
    """Call `step` and watch the inputs; returns its FLOPs over all calls."""
    flops = 0
    hooks = [
        source.layers[0].layer.register_forward_pre_hook(source.watch, with_kwargs=True) for source in inputs
    ]
    try:
        for _ in range(calls):
            with FlopCounterMode(display=False) as counter:
                step()
            flops += counter.get_total_flops()
            for source in inputs:
                source.settle()
    finally:
        for hook in hooks:
            hook.remove()
    if not any(layer.weight.grad is not None for source in inputs for layer in source.layers):
        raise ValueError(
            "plan: expected a step() that runs a forward and a backward of this model in training mode, but "
            f"no layer's weight got a gradient ({inputs[0].names[0]}, ...)"
        )
    return flops


def _mean(values: Tensor) -> Tensor:
    """The mean over processes, the same bits on all of them."""
    if distributed.world_size() > 1:
        dist.all_reduce(values)
        values /= distributed.world_size()
    return values


def _check(step: object, budget: float, calls: int, ranks: Sequence[int], mode: str) -> None:
    if not callable(step):
        raise TypeError(f"plan: step: expected a function, got {type(step).__name__}")
    if not budget >= 0:
        raise ValueError(f"plan: budget: expected a part of the step's time, at least 0, got {budget}")
    whole = {"calls": calls} | {f"ranks[{i}]": rank for i, rank in enumerate(ranks)}
    for name, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"plan: {name}: expected a whole number, at least 1, got {value!r}")
    if mode not in MODES:
        raise ValueError(f"plan: mode: expected one of {MODES}, got {mode!r}")


def plan(
    model: nn.Module,
    step: Callable[[], object],
    budget: float = 0.05,
    calls: int = 4,
    ranks: Sequence[int] = (8, 16, 32, 64, 128),
    mode: str = "optimizer",
    decor: Decor | None = None,
    seed: int = 0,
) -> Plan:
    """Choose layers and ranks by what decorrelation could do for them and what it takes.

    Calls `step` a few times to count its FLOPs and to measure the correlations of every candidate's input.
    A group of layers is worth its share of the candidates' weights times the mean squared correlation of
    its inputs, or the part of it that a subspace of the rank can hold: what R changes are the gradients of
    these weights. The choice first covers as many groups as fit into the budget, each by its cheapest R, and
    then spends what is left on higher ranks; the most benefit for its cost comes first. docs/planning.md says
    why. Costs are FLOPs and constants measured beforehand (`FULL`, `LOW_RANK`), not times: the same seed,
    data and number of threads give the same plan.

    Where a process group is initialised this is a collective, and all processes get one plan.

    Args:
        model: a stock model in training mode, without `torch.compile` around it. A `DecorPreconditioner` may
            be at work: it takes no samples meanwhile.
        step: runs one training step's forward and backward of the model on a new batch, all its micro-batches
            included, without the optimizer's step.
        budget: part of the time of a step that decorrelation may take.
        calls: how often `step` is called.
        ranks: candidates for a low-rank R, besides a full one.
        mode: "optimizer" for `DecorAdamW`, `DecorMuon` and `DecorPreconditioner`, "layers" for `decorrelate`
            with its form "auto".
        decor: the rule; its filter says which layers are candidates, its sites and rank have no say. None for
            the mode's default, `Decor()` or `Decor.layers()`.
        seed: of torch's random numbers in `step`.

    Returns:
        The plan. The model, its gradients, buffers and modes and torch's random numbers are as before.

    Raises:
        TypeError: `step` is no function.
        ValueError: a number out of range, a decorrelated model, one without candidates, or a `step` that
            makes no backward of the model or steps an optimizer.
    """
    ranks = tuple(ranks)
    _check(step, budget, calls, ranks, mode)
    if decor is None:
        decor = Decor() if mode == "optimizer" else Decor.layers()
    check_stock(model)
    inputs = _inputs(model, decor.filter, decor.sample)
    with _restored(model, seed):
        flops = _run(step, inputs, calls) / calls
    for source in inputs:
        source.average()
    device = inputs[0].G.device
    # Of each input: tokens, measures, costs.
    found = [
        [
            sum(source.seen) / calls,
            *source.measure(ranks),
            *(source.flops(rank, mode, decor.every, calls) for rank in (None, *ranks)),
        ]
        for source in inputs
    ]
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    everything = [flops, threads] + [value for values in found for value in values]
    flops, threads, *values = _mean(torch.tensor(everything, dtype=torch.float64, device=device)).tolist()
    if not flops:
        raise ValueError("plan: expected a step() whose FLOPs can be counted, got none; is it compiled?")
    size = len(found[0])
    measured = {
        source.names: values[i * size : (i + 1) * size]
        for i, source in enumerate(inputs)
        if values[i * size]  # whose layers ran
    }
    groups = _groups(
        [source for source in inputs if source.names in measured], measured, ranks, flops, threads
    )
    return Plan(_choose(groups, budget), budget, decor)


def _groups(
    inputs: list[_Input],
    measured: dict[tuple[str, ...], list[float]],
    ranks: Sequence[int],
    flops: float,
    threads: float,
) -> list[Group]:
    """The candidates, with the cost and the benefit of every way to decorrelate them."""
    members: dict[tuple[str, int, int], list[_Input]] = {}
    for source in inputs:
        members.setdefault(source.template, []).append(source)
    weights = sum(source.entries for source in inputs)
    groups = []
    for (name, width, outputs), sources in members.items():
        rows = [measured[source.names] for source in sources]
        tokens, correlation, *rest = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        shares, costs = [1.0, *rest[: len(ranks)]], rest[len(ranks) :]
        entries = len(sources) * width * outputs
        options = [
            Option(
                rank,
                (FULL if rank is None else LOW_RANK).of(len(sources), cost, width * outputs, threads) / flops,
                entries / weights * correlation * share,
            )
            for rank, share, cost in zip((None, *ranks), shares, costs, strict=True)
            if rank is None or rank < width
        ]
        layers = tuple(source.names for source in sources)
        groups.append(Group(name, layers, width, outputs, tokens, correlation, tuple(options)))
    return groups


def _choose(groups: list[Group], budget: float) -> tuple[Group, ...]:
    """Cover as many groups as fit, each by its cheapest option; then improve on these as long as one fits.

    In either stage the change with the most benefit for its cost comes first.
    """
    chosen: list[Option | None] = [None] * len(groups)
    spent = 0.0
    for covering in (True, False):
        while True:
            changes = []
            for i, group in enumerate(groups):
                useful = [option for option in group.options if option.benefit > 0]
                if covering:
                    useful = [] if chosen[i] else sorted(useful, key=lambda option: option.cost)[:1]
                held = chosen[i]
                cost, benefit = (0.0, 0.0) if held is None else (held.cost, held.benefit)
                for option in useful:
                    more, gain = option.cost - cost, option.benefit - benefit
                    if more > 0 and gain > 0 and spent + more <= budget:
                        ties = (group.name, group.width, group.outputs, option.rank or group.width)
                        changes.append((-gain / more, ties, i, option, more))
            if not changes:
                break
            _, _, i, chosen[i], more = min(changes, key=lambda change: change[:2])
            spent += more
    return tuple(replace(group, chosen=option) for group, option in zip(groups, chosen, strict=True))
