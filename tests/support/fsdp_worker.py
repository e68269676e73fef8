"""What each process of test_fsdp.py does; the results go to files, and the tests judge them."""

import copy
import itertools
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rules import convert, decor_sgd, preconditioner
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from vits import HuggingFaceViT, decorrelated, everything, images, make, mlp, randomise, shake, timm_vit

import dbpkern
import train.engine.checkpoint
import train.pretrain
from dbpkern import Decor, DecorAdamW, DecorMuon, DecorPreconditioner
from dbpkern.layers.modules import DecorLinear
from dbpkern.stock import stock_layer
from train.engine.processes import Processes
from train.tasks import pretraining

MICRO, STEPS, BATCH = 2, 3, 8


def checkpointed_vit() -> nn.Module:
    model = randomise(timm_vit())
    model.set_grad_checkpointing()
    return model


def frozen_vit() -> nn.Module:
    """A decorrelated layer whose weight rests, behind one that trains."""
    model = convert(randomise(timm_vit()), sites="all")
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "folded": lambda: convert(make("timm"), sites="all", form="fold"),
    "applied": lambda: convert(make("timm"), sites="all", form="apply"),
    "shared R, some low rank": lambda: convert(
        randomise(HuggingFaceViT()), sites="all", rank={"fc2": 6, "qkv": 3}
    ),
    "nn.MultiheadAttention": lambda: convert(
        make("torchvision"), sites=("patch_embed", "qkv", "fc1", "fc2"), form="fold"
    ),
    "activation checkpointing": lambda: convert(checkpointed_vit(), sites="all"),
    "a frozen weight": frozen_vit,
}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model of vits.py."""
    for holder in ("blocks", "encoder.layers", "encoder.layer"):
        try:
            return list(model.get_submodule(holder).children())
        except AttributeError:
            continue
    raise AssertionError


def shard(model: nn.Module, **options) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict on every process."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def trained(
    model: nn.Module,
    rank: int = 0,
    world: int = 1,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 2,
) -> dict:
    """Steps of MICRO micro-batches on this process's part of each batch, with clipped gradients.

    By AdamW and DecorSGD, or another optimizer.
    """
    torch.manual_seed(seed)
    batches = [images(BATCH).to(dtype) for _ in range(MICRO * STEPS)]
    if optimizer is None:
        decor = decor_sgd(model, eta=0.02, kappa=0.1, sample=1.0)
        main = torch.optim.AdamW(model.parameters(), lr=0.003)
        main.register_step_post_hook(lambda *_: decor.step())
    else:
        main = optimizer
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(MICRO):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == MICRO - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(batches[step * MICRO + i][part])
            loss = y.double().square().mean() / MICRO
            loss.backward()
            total += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        losses.append(total)
        main.step()
        main.zero_grad()
    moments = [
        value
        for state in main.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq", "momentum_buffer")
    ]
    local = [m.to_local() if isinstance(m, DTensor) else m for m in moments]
    return {
        "state": full(model) if isinstance(model, FSDPModule) else dict(model.state_dict()),
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "moments": sum(m.numel() for m in local),
    }


RULE = Decor(rank={"fc2": 6, "proj": 4}, eta=0.2, sample=1.0, every=1)


def around_adamw(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    DecorPreconditioner(model, optimizer, RULE)
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "DecorAdamW": lambda m: DecorAdamW(m.parameters(), 0.003, weight_decay=0.1, model=m, decor=RULE),
    "DecorMuon": lambda m: DecorMuon(m.parameters(), 0.003, weight_decay=0.1, model=m, decor=RULE),
    "DecorPreconditioner": around_adamw,
}


def optimized(name: str, rank: int = 0, world: int = 1) -> dict:
    """A stock model in training by an optimizer that holds R, with the optimizer's whole state."""
    torch.manual_seed(1)
    model = make("timm").double()
    if world > 1:
        shard(model)
    optimizer = OPTIMIZERS[name](model)
    results = trained(model, rank, world, optimizer=optimizer)
    layers = filter(None, map(stock_layer, model.modules()))
    results["R"] = [factor.clone() for layer in layers for factor in layer.factors]
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    results["optimizer"] = {f"{name}.{key}": v for name, entry in state.items() for key, v in entry.items()}
    return results


def resumed(name: str) -> dict:
    """Losses of a sharded run, and of one that goes on from its state, by each way to keep it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for how, options in {
        "sharded": StateDictOptions(),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
        "whole": StateDictOptions(full_state_dict=True),
    }.items():
        torch.manual_seed(1)
        first, second = (shard(make("timm").double()) for _ in range(2))
        runs = [(model, OPTIMIZERS[name](model)) for model in (first, second)]
        trained(first, rank, world, optimizer=runs[0][1])
        set_model_state_dict(second, get_model_state_dict(first, options=options), options=options)
        state = get_optimizer_state_dict(*runs[0], options=options)
        set_optimizer_state_dict(*runs[1], copy.deepcopy(state), options=options)
        results[how] = [trained(model, rank, world, optimizer=o, seed=5)["losses"] for model, o in runs]
    return results


def mixed_precision() -> dict:
    """Training with weights that are gathered in bf16, and in fp32 without and with autocast."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    runs = {}
    for name, policy in {
        "fp32": MixedPrecisionPolicy(),
        "bf16": bf16,
        "autocast": MixedPrecisionPolicy(),
    }.items():
        torch.manual_seed(1)
        model = shard(MODELS["folded"](), mp_policy=policy)
        runs[name] = trained(model, rank, world, torch.float32, name == "autocast")
    return runs


def held_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of tensors of the weights' shapes that autograd holds between forward and backward."""
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes or (tensor.dim() == 2 and tensor.mT.shape in shapes):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    held = sum(storage.nbytes() for storage in kept.values())
    y.square().mean().backward()
    return held


def chain(form: str) -> nn.Sequential:
    """Linear layers in blocks of two, one with a weight that rests; R of other shapes than the weights."""
    widths = (48, 64, 40, 56)
    layers = [nn.Linear(d, o) for d, o in itertools.pairwise(widths)]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))
    if form != "stock":
        convert(model, sites=None, filter=everything, form=form)
    layers[1].weight.requires_grad_(False)
    return model


def kept_between_passes() -> dict[str, int]:
    """What the sharded chain keeps in the shapes of its weights, by form."""
    kept = {}
    for form in ("stock", "fold", "apply"):
        model = chain(form)
        for block in model:
            fully_shard(block)
        kept[form] = held_bytes(fully_shard(model), torch.randn(70, 48))
    return kept


def backward_twice(form: str) -> bool:
    """Whether a second backward through one graph gives the gradients of the first."""
    model = mlp(6, 8, 4, form=form)
    for layer in decorrelated(model).values():
        fully_shard(layer)
    fully_shard(model)
    y = model(torch.randn(30, 6, requires_grad=True)).square().sum()
    gradients = []
    for _ in range(2):
        y.backward(retain_graph=True)
        gradients.append([p.grad.full_tensor().clone() for p in model.parameters()])
        model.zero_grad()
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def fused() -> dict:
    """Outputs before and after fuse on the sharded model, also by a layer that is sharded itself."""
    results = {}
    for name in ("folded", "shared R, some low rank", "nn.MultiheadAttention"):
        torch.manual_seed(3)
        model = shake(MODELS[name]().double())
        x = images(4).double()
        expected = model.eval()(x)
        if name == "folded":
            fully_shard(model.blocks[0].mlp.fc1)
        shard(model)
        before = model(x)  # the root's weights stay gathered
        dbpkern.fuse(model)
        after = model(x)
        after.square().mean().backward()
        layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        results[name] = {
            "expected": expected.detach(),
            "before": before.detach(),
            "after": after.detach(),
            "state": full(model),
            "gradient": layer.weight.grad.full_tensor().norm(),
            "layers left": len(decorrelated(model)),
        }
    return results


def refusals() -> dict[str, str]:
    messages = {}
    model = shard(make("timm"))
    try:
        dbpkern.decorrelate(model)
    except ValueError as error:
        messages["decorrelate"] = str(error)
    layer = DecorLinear.from_linear(nn.Linear(4, 6))
    columns = fully_shard(
        nn.Sequential(layer), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None
    )
    try:
        dbpkern.fuse(columns)
    except ValueError as error:
        messages["columns"] = str(error)
    stock = fully_shard(nn.Sequential(nn.Linear(4, 6)), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    try:
        preconditioner(stock, torch.optim.SGD(stock.parameters(), lr=0.1), sites=None, filter=everything)
    except ValueError as error:
        messages["around columns"] = str(error)
    gathered = fully_shard(nn.Sequential(DecorLinear.from_linear(nn.Linear(4, 6))))
    gathered(torch.randn(2, 4))
    try:
        gathered[0].fused()
    except ValueError as error:
        messages["gathered"] = str(error)
    return messages


def start(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )


def finish(results: dict, rank: int, folder: Path) -> None:
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(rank: int, world: int, folder: Path) -> None:
    """What is done on every number of processes."""
    start(rank, world, folder)
    results: dict = {"trained": {}, "fused": fused()}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        results["trained"][name] = trained(shard(build().double()), rank, world)
    results["optimized"] = {name: optimized(name, rank, world) for name in OPTIMIZERS}
    finish(results, rank, folder)


def special(rank: int, world: int, folder: Path) -> None:
    """What two processes show."""
    start(rank, world, folder)
    results = {
        "mixed precision": mixed_precision(),
        "kept": kept_between_passes(),
        "twice": {form: backward_twice(form) for form in ("fold", "apply")},
        "refusals": refusals(),
        "resumed": {name: resumed(name) for name in OPTIMIZERS},
    }
    finish(results, rank, folder)


def pretrain_with_a_bad_batch(arguments: list[str]) -> None:
    """Pre-training, with images that are not finite in the third step of the second process."""
    make, calls = pretraining.to_images, itertools.count(1)

    def spoilt(*given):
        made = make(*given)
        return made * torch.nan if os.environ["RANK"] == "1" and next(calls) == 3 else made

    pretraining.to_images = spoilt
    train.pretrain.main(arguments)


def die_while_saving(rank: int, world: int, folder: Path) -> None:
    """Save a checkpoint, and another in the middle of which process 1 is killed."""
    start(rank, world, folder)
    processes = Processes(rank, world, torch.device("cpu"))
    state = {"model": dict(mlp(4, 3).state_dict())}
    train.engine.checkpoint.save(folder / "checkpoints", 1, state | {"step": 1}, 2, processes)
    write = HuggingFaceStorageWriter.write_data

    def killed(self, *arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *arguments)

    HuggingFaceStorageWriter.write_data = killed
    train.engine.checkpoint.save(folder / "checkpoints", 2, state | {"step": 2}, 2, processes)
