"""What each process of test_distributed.py and test_statistics.py does.

The results go to files, and the tests judge them.
"""

import contextlib
import inspect
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rules import convert, decor_sgd, preconditioner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from vits import HuggingFaceViT, captured, decorrelated, everything, images, mlp, randomise

from dbpkern import Decor, DecorAdamW, DecorMuon, distributed

MICRO, STEPS, BATCH = 2, 3, 8


def models() -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    """Models and their global batches, the same in every process and in the single one."""
    torch.manual_seed(1)
    vit, lean = (
        convert(randomise(HuggingFaceViT()), sites="all", rank=rank) for rank in (None, {"fc2": 6, "qkv": 3})
    )
    return {
        "vit, float32": (vit, [images(BATCH) for _ in range(MICRO * STEPS)]),
        "vit, some low rank, float64": (
            lean.double(),
            [images(BATCH).double() for _ in range(MICRO * STEPS)],
        ),
        "mlp, float64": (
            mlp(6, 9, 5, dtype=torch.float64),
            [torch.randn(BATCH, 6, dtype=torch.float64) for _ in range(MICRO * STEPS)],
        ),
    }


def parallel(model: nn.Module, broadcast_buffers: bool) -> DistributedDataParallel:
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the old name
    return DistributedDataParallel(model, **{name: broadcast_buffers})


def train(
    model: nn.Module, batches: list[torch.Tensor], rank: int = 0, world: int = 1
) -> dict[str, torch.Tensor]:
    """Data-parallel training: steps of MICRO micro-batches on this process's part of each batch."""
    net = parallel(model, False) if world > 1 else model
    decor = decor_sgd(net, eta=0.05, kappa=0.1, sample=1.0, limit=None)
    main = torch.optim.SGD(model.parameters(), lr=0.1)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        main.zero_grad()
        for i in range(MICRO):
            last = i == MICRO - 1
            with contextlib.nullcontext() if last or world == 1 else net.no_sync():
                (net(batches[step * MICRO + i][part]).square().mean() / MICRO).backward()
        main.step()
        decor.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def Rs(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.R.clone() for name, layer in decorrelated(model).items()}


def factors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {name: [f.clone() for f in layer.factors] for name, layer in decorrelated(model).items()}


def sampled_step(rank: int) -> dict:
    """Samples of 20 % and a DecorSGD of their statistics, on different data."""
    model = mlp(6, 9, 6, 6)
    decor = decor_sgd(model, eta=0.05, kappa=0.1, sample=0.2, limit=None)
    torch.manual_seed(rank)
    x = torch.randn(40, 6)
    steps = []
    for _ in range(3):
        before = Rs(model)
        model(x).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.engine.loss()
        decor.step()
        steps.append({"before": before, "rows": rows, "loss": loss, "after": Rs(model)})
    return {"steps": steps, "index": decor.engine.sampler.index(1000, 0, x.device)}


def unequal_step(rank: int) -> dict:
    """Another number of rows on every rank; then none on rank 0, and none anywhere for one layer."""
    model = mlp(5, 5, 5, 5, dtype=torch.float64)
    decor = decor_sgd(model, eta=0.05, sample=1.0, limit=None)
    torch.manual_seed(rank)
    steps = []
    for step in range(2):
        before = Rs(model)
        if step == 0:
            model(torch.randn(3 * rank + 2, 5, dtype=torch.float64)).square().mean().backward()
        elif rank:
            model[:3](torch.randn(rank, 5, dtype=torch.float64)).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.engine.loss()
        decor.step()
        steps.append(
            {
                "before": before,
                "rows": rows,
                "loss": loss,
                "after": Rs(model),
                "loss after": decor.engine.loss(),
            }
        )
    return {"steps": steps}


def lowrank_step(rank: int) -> dict:
    """Low-rank R: other numbers of rows on every rank; then none on rank 0, none anywhere for one layer."""
    model = mlp(5, 5, 5, 5, dtype=torch.float64, rank=2)
    decor = decor_sgd(model, eta=0.05, kappa=0.1, sample=1.0, limit=None)
    torch.manual_seed(rank)
    steps = []
    for step in range(2):
        before = factors(model)
        if step == 0:
            model(torch.randn(7 * rank + 6, 5, dtype=torch.float64)).square().mean().backward()
        elif rank:
            model[:3](torch.randn(6 * rank, 5, dtype=torch.float64)).square().mean().backward()
        rows = {name: r.clone() for name, r in captured(decor).items()}
        loss = decor.engine.loss()
        decor.step()
        steps.append({"before": before, "rows": rows, "loss": loss, "after": factors(model)})
    return {"steps": steps}


def messages(broadcast_buffers: bool) -> list[str]:
    """The warnings of a DecorSGD for a DistributedDataParallel."""
    model = parallel(mlp(3, 3, 3), broadcast_buffers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decor = decor_sgd(model, sample=1.0, limit=None)
        for _ in range(2):
            model(torch.randn(9, 3)).square().mean().backward()
            decor.step()
    return [str(w.message) for w in caught if "broadcast_buffers" in str(w.message)]


def forced(mode: str):
    """Steps of full R in this mode, whatever it costs."""
    return mock.patch.object(distributed, "choose_mode", return_value=mode)


def operators_of_a_step(low: int | None, mode: str) -> list[str]:
    """What a step runs, after the first, in which the processes compare what they are to do."""
    model = mlp(5, 5, 5, rank=low)
    decor = decor_sgd(model, sample=1.0)
    with forced(mode):
        for _ in range(2):
            model(torch.randn(9, 5)).sum().backward()
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                decor.step()
    return [event.name for event in recorded.events()]


class Blocks(nn.Module):
    """Residual blocks that are recomputed in the backward; six inputs of 6 features and one of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=False)
        return self.head(x)


# Rows of both micro-batches of each step, over all processes. One process has all those of the third step.
ROWS = [(13, 9), (8, 8), (4, 5), (7, 3)]
ALONE = 2

CASES = {
    "plain": {"eta": 0.05, "kappa": 0.1, "limit": None},
    "limited": {"eta": 2.0, "limit": 0.3},
    "scale-free": {"eta": 0.3, "scale_free": True},
    "every": {"eta": 0.05, "every": 2},
    "low rank": {"eta": 0.05, "kappa": 0.1, "limit": None},
    "low rank, limited, scale-free": {"eta": 2.0, "limit": 0.3, "scale_free": True},
    "preconditioner": {"eta": 0.2},
    "preconditioner, low rank": {"eta": 0.2, "rank": 2},
    "DecorAdamW": {"eta": 0.2, "every": 2},
    "DecorMuon, low rank": {"eta": 0.2, "rank": 2},
}


def modes_of(case: str) -> tuple[str, ...]:
    return ("all-reduce",) if "low rank" in case else ("all-reduce", "owner")


def uneven_training(case: str, rank: int = 0, world: int = 1) -> dict:
    """Steps of accumulated micro-batches that no number of processes divides, with checkpointing."""
    torch.manual_seed(4)
    model = randomise(Blocks().double())
    options = CASES[case] | {"sample": 1.0}
    kind = case.partition(",")[0]
    around = kind in ("preconditioner", "DecorAdamW", "DecorMuon")
    if not around:
        convert(model, sites=None, filter=everything, rank=2 if "low rank" in case else None)
    net = parallel(model, False) if world > 1 else model
    rule = {"sites": None, "filter": everything, "rank": None, "every": 1} | options
    if kind == "DecorAdamW":
        main = decor = DecorAdamW(model.parameters(), 0.01, model=model, decor=Decor(**rule))
    elif kind == "DecorMuon":
        main = decor = DecorMuon(model.parameters(), 0.01, model=model, decor=Decor(**rule))
    else:
        main = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        decor = preconditioner(model, main, **rule) if around else decor_sgd(model, **options)
    rates, counts = [], []
    for step, rows in enumerate(ROWS):
        main.zero_grad()
        for i, n in enumerate(rows):
            x = torch.randn(n, 5, dtype=torch.float64)
            x = x.tensor_split(world if step != ALONE else [n] * (world - 1))[rank]
            with net.no_sync() if world > 1 and i == 0 else contextlib.nullcontext():
                (net(x).square().sum() * world / sum(rows)).backward()
        counts.append(captured(decor).get("stem", x[:0]).shape[0])
        main.step()
        if not around:
            decor.step()
        rates.append({name: rate.clone() for name, rate in decor.engine.rates().items()})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if around:
        for name, layer in decor.engine.layers.items():
            state |= {f"{name}.{i}.R": factor.clone() for i, factor in enumerate(layer.factors)}
    return {"state": state, "rates": rates, "rows": counts}


class Separate(nn.Module):
    """Layers with inputs of their own: three of 4 features and two of 7."""

    def __init__(self, low: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, 2).double() for d in (4, 4, 4, 7, 7))
        convert(self, sites=None, filter=everything, rank=low)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return sum(layer(x).sum() for layer, x in zip(self.layers, xs, strict=True))


def spoilt_steps(rank: int, low: int | None, mode: str) -> dict:
    """In the second step rank 0 has no samples, and the last process' of the second layer are not finite."""
    model = Separate(low)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    torch.manual_seed(rank)
    steps = []
    with forced(mode):
        for step in range(3):
            xs = [torch.randn(9, d, dtype=torch.float64) for d in (4, 4, 4, 7, 7)]
            if step == 1 and rank == distributed.world_size() - 1:
                xs[1][3, 2] = torch.inf
            if step != 1 or rank:
                model(xs).backward()
            decor.step()
            steps.append(
                {
                    "factors": factors(model),
                    "caution": decor.engine.caution(),
                    "rates": {name: rate.clone() for name, rate in decor.engine.rates().items()},
                }
            )
    return {"steps": steps}


def collectives_of_a_step(low: int | None, mode: str) -> dict:
    """What a step starts and waits for, in order, with the bytes of the larger tensor; and what it counts."""
    model = Separate(low)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    events: list[tuple[str, int]] = []

    def recorded(name):
        call = getattr(dist, name)

        def start(output, *rest, **options):
            work = call(output, *rest, **options)
            number = sum(event != "wait" for event, _ in events)
            events.append((name, max(tensor.nbytes for tensor in (output, *rest))))
            return mock.Mock(wait=lambda: (events.append(("wait", number)), work.wait()))

        return mock.patch.object(dist, name, start)

    before = decor.engine.traffic()
    with forced(mode), contextlib.ExitStack() as stack:
        for step in range(2):
            model([torch.randn(9, d, dtype=torch.float64) for d in (4, 4, 4, 7, 7)]).backward()
            if step == 1:
                for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
                    stack.enter_context(recorded(name))
            decor.step()
    return {"before": before, "events": events, "traffic": [tuple(part) for part in decor.engine.traffic()]}


def refusals(rank: int) -> dict[str, str]:
    """What steps say where processes have different things to do."""
    messages = {}
    for name, width, options in (("widths", 4 + (rank == 1), {}), ("options", 4, {"every": 1 + rank})):
        model = mlp(width, 4, 4)
        decor = decor_sgd(model, sample=1.0, **options)
        model(torch.randn(9, width)).sum().backward()
        try:
            decor.step()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )


def finish(results: dict, rank: int, folder: str) -> None:
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(rank: int, world: int, folder: str) -> None:
    """What test_distributed.py judges."""
    start(rank, world, folder)
    results = {
        "trained": {name: train(model, batches, rank, world) for name, (model, batches) in models().items()},
        "sampled": sampled_step(rank),
        "unequal": unequal_step(rank),
        "warnings": {flag: messages(flag) for flag in (True, False)},
        "lowrank": lowrank_step(rank),
    }
    finish(results, rank, folder)


# Ranks of R (None: full) and modes of their steps.
KINDS = [(None, "all-reduce"), (None, "owner"), (2, "all-reduce")]


def run_statistics(rank: int, world: int, folder: str) -> None:
    """What test_statistics.py judges."""
    start(rank, world, folder)
    results: dict = {"trained": {}, "refused": refusals(rank)}
    for case in CASES:
        for mode in modes_of(case):
            with forced(mode):
                results["trained"][case, mode] = uneven_training(case, rank, world)
    for name, work in {
        "spoilt": lambda *kind: spoilt_steps(rank, *kind),
        "collectives": collectives_of_a_step,
        "operators": operators_of_a_step,
    }.items():
        results[name] = {kind: work(*kind) for kind in KINDS}
    finish(results, rank, folder)
