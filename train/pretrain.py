"""Pre-train a model, MAE or DARL, plain or with decorrelated backpropagation.

    torchrun --standalone --nproc_per_node 1 train/pretrain.py --config train/configs/demo.yaml --out runs/a

Also runs with plain python. `--help` lists every option; `docs/training.md` explains them.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from timm.optim import kron, param_groups_weight_decay
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

import dbpkern
from dbpkern import diagnostics
from dbpkern.convert import PRESETS, find_sites, select
from dbpkern.env import collect
from dbpkern.precondition import EVERY
from train import checkpoint, plots, processes
from train.data import DataConfig, StepSampler, TrainingSet, build_data, build_loader, to_images
from train.energy import EnergyConfig, carbon_intensity
from train.loop import Diverged, Interrupted, Loop, moved
from train.processes import Processes
from train.run_folder import NEUTRAL, RunFolder, flat, to_json, write_atomically
from train.schedule import warmup_cosine
from train.tasks import COUNT, FAMILIES, DarlConfig, DvaeConfig, Rows, Task, task_of


@dataclass
class OptimConfig:
    """The optimizer of the weights and its schedule; by default AdamW, as in MAE.

    Args:
        name: "adamw", or a rival by timm: "muon" (AdamW for vectors and tokens) or "kron" (PSGD).
        blr: Base learning rate; the peak rate is blr * batch_size / 256.
        min_lr: Rate at the end of the cosine.
        warmup_epochs: Length of the linear warm-up.
        warmup_steps: The same in steps; overrides warmup_epochs.
        weight_decay: Of weights with two or more dimensions; biases and norms have none.
        betas: Of AdamW; the first is Muon's momentum (Nesterov's), too.
        clip_grad: Largest norm of the gradient, before R maps it; null for no limit.
    """

    name: Literal["adamw", "muon", "kron"] = "adamw"
    blr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float = 40
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None


@dataclass
class DecorConfig:
    """Decorrelated backpropagation.

    Args:
        enable: Turns it on.
        form: "optimizer" maps gradients and updates around the optimizer (dbpkern.DecorPreconditioner);
            "auto", "fold" and "apply" put decorrelated layers into the model, see docs/method.md.
        sites: Which layers of a block: "sublayers" (patch embedding, qkv, fc1), "all", or a list of
            patch_embed, qkv, proj, fc1, fc2. "auto" chooses layers and ranks by measurements, see budget.
        budget: For sites "auto": the part of a step's time that decorrelation may take.
        decoder: Whether to decorrelate the decoder, too.
        eta: Rate of the decorrelation step.
        follow: Whether eta follows the schedule of the learning rate.
        scale_free: Whether the step is free of the variances of z.
        limit: Of eta times an upper bound of the eigenvalues of each layer's M; null for no limit.
        every: Steps from one update of R to the next, which has that many times eta.
        kappa: Weight in [0, 1] of the unit-variance term.
        sample: Part of the rows, in (0, 1], that the statistics are taken from.
        rank: Of R - I: "low" (a twelfth of each layer's width, 1/48 for fc2), "mixed" (the same, with a full
            R for qkv), null for a full R everywhere, a number of dimensions, or below 1 a part of the width;
            also by site, such as {fc2: 64}, where the others get a full R. sites "auto" chooses ranks itself.
    """

    enable: bool = False
    form: Literal["optimizer", "auto", "fold", "apply"] = "optimizer"
    sites: str | list[str] = "all"
    budget: float = 0.05
    decoder: bool = True
    eta: float = 0.05
    follow: bool = False
    scale_free: bool = True
    limit: float | None = 0.5
    every: int = EVERY
    kappa: float = 0.0
    sample: float = 0.1
    rank: Literal["mixed", "low"] | int | float | dict[str, int | float] | None = "mixed"

    @property
    def in_layers(self) -> bool:
        """Whether the model has decorrelated layers."""
        return self.enable and self.form != "optimizer"

    @property
    def planned(self) -> bool:
        """Whether a plan chooses the layers."""
        return self.enable and self.sites == "auto"

    def present(self, model: nn.Module) -> str | list[str]:
        """The sites; of a preset those that the model has, for one that reads tokens has no patch embedding.

        Where a plan chooses, those of "all": evaluation observes them in a model without decorrelated layers.
        """
        sites = "all" if self.sites == "auto" else self.sites
        if isinstance(sites, str) and sites in PRESETS:
            found = find_sites(model)
            return [site for site in PRESETS[sites] if found[site]]
        return sites

    def accepts(self, name: str, module: nn.Module) -> bool:
        """The filter for `dbpkern.decorrelate`: leaves the decoder out unless it is asked for."""
        return self.decoder or not name.startswith("decoder")


def check_numbers(config, least_steps: int) -> None:
    """Raise ValueError for numbers out of range that any script's configuration has.

    Args:
        config: Of this script or another, with `optim` and `energy`.
        least_steps: The shortest run.
    """
    at_least = {
        "batch_size": 1, "accumulation": 1, "eval_every": 1, "checkpoint_every": 1,
        "keep": 1, "max_bad_steps": 1, "seed": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)}")
    if config.steps is not None and config.steps < least_steps:
        raise ValueError(f"steps: expected at least {least_steps}, got {config.steps}")
    if not (math.isfinite(config.epochs) and config.epochs > 0):
        raise ValueError(f"epochs: expected a number above 0, got {config.epochs}")
    if config.seed >= 2**63:
        raise ValueError(f"seed: expected less than 2**63, got {config.seed}")
    for name in ("blr", "lr", "min_lr", "weight_decay", "warmup_epochs", "warmup_steps"):
        value = getattr(config.optim, name, None)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"optim.{name}: expected a finite number >= 0, got {value}")
    clip = config.optim.clip_grad
    if clip is not None and not clip > 0:
        raise ValueError(f"optim.clip_grad: expected a number above 0 or null, got {clip}")
    if config.energy.country is not None:
        carbon_intensity(config.energy.country)


@dataclass
class Config:
    """Pre-training of a masked autoencoder or a DARL model.

    Args:
        out: Folder of the run; made if missing. It must be empty, or hold this very run and be resumed.
        model: mae_vit_tiny, mae_vit_small, mae_vit_base, mae_vit_large or mae_vit_huge; or darl_vit_tiny and
            so on; dvae_tiny, dvae_small or dvae_base.
        decoder: Preset of MAE's decoder: "mae" (8 blocks, 512 wide) or "dbp" (2 blocks, 512 wide).
        model_args: Changes to the model, such as {depth: 6, embed_dim: 128}; any of patch_size (one number or
            two), embed_dim, depth, num_heads, mlp_ratio, and for MAE decoder_embed_dim, decoder_depth,
            decoder_num_heads; of a discrete VAE patch_size, vocabulary, width, depth.
        img_size: Side of the training crops in pixels, or height and width.
        mask_ratio: Part of the patches that MAE hides, in (0, 1).
        norm_pix_loss: Whether MAE's targets are pixels normalised per patch.
        darl: What DARL predicts, and how.
        dvae: The loss of a discrete VAE.
        epochs: Length of the run, in passes over the training images.
        steps: The same in optimizer steps; overrides epochs.
        batch_size: Images per optimizer step, over all processes and micro-batches.
        accumulation: Micro-batches per step.
        optim: The optimizer of the weights.
        decor: Decorrelated backpropagation.
        data: The images.
        energy: What is told of the energy that the steps take.
        seed: Of weights, order, crops, masks and samples.
        device: "auto", "cpu" or "cuda".
        parallel: What several processes share: "ddp" for the batch alone, or "fsdp" for the weights and the
            optimizer's state, too.
        precision: "fp32", "bf16" (autocast), or "auto" for bf16 on GPUs and fp32 elsewhere.
        compile: Whether to run the model through torch.compile.
        deterministic: Whether to ask for bit-reproducible results on GPUs; on CPUs they always are.
        resume: "none", "auto" to continue from the newest whole checkpoint in out if there is one, or
            the path of a checkpoint of this run.
        eval_every: Steps between evaluations on held-out images.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        max_bad_steps: Steps in a row with a non-finite loss that are skipped before the run stops.
        profile: Whether to write a trace of a few steps, for TensorBoard's profiler plugin.
    """

    out: str
    model: str = "mae_vit_base"
    decoder: str = "mae"
    model_args: dict[str, int | float | list[int]] = field(default_factory=dict)
    img_size: int | tuple[int, int] = 224
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    darl: DarlConfig = field(default_factory=DarlConfig)
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    epochs: float = 800
    steps: int | None = None
    batch_size: int = 4096
    accumulation: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    decor: DecorConfig = field(default_factory=DecorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    resume: str = "none"
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    max_bad_steps: int = 10
    profile: bool = False

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.optim.blr * self.batch_size / 256

    def check(self) -> None:
        """Raise ValueError for numbers out of range."""
        check_numbers(self, least_steps=1)
        task = task_of(self)
        task.check()
        for family, names in FAMILIES.items():
            changed = [n for n in names if family != task.name and getattr(self, n) != getattr(Config(""), n)]
            if changed:
                raise ValueError(
                    f"{changed[0]}: a setting of models {family}_*, got model {self.model}; leave it out"
                )
        for name, value in self.model_args.items():
            if name not in task.model_args:
                raise ValueError(f"model_args: unknown argument {name!r}, expected some of {task.model_args}")
            parts = value if isinstance(value, list) and name == "patch_size" else [value]
            if name != "mlp_ratio" and not all(isinstance(part, int) for part in parts):
                raise ValueError(f"model_args: {name}: expected a whole number, got {value}")
        if self.parallel == "fsdp" and self.optim.name != "adamw":
            raise ValueError(
                f"parallel: {self.optim.name} works on whole matrices, which fsdp shares out; "
                "expected --optim.name adamw or --parallel ddp"
            )
        if self.decor.sites == "auto" and self.decor.rank not in (None, "mixed"):
            raise ValueError(
                f'decor.rank: sites "auto" choose the ranks, too; expected null, got {self.decor.rank}'
            )


def check_same_run(old: Mapping, config, where: str) -> None:
    """Raise ValueError naming the settings in which an old configuration differs from that of this run.

    A setting that did not exist when the old one was written was what it is by default.
    """
    old, new = flat(old), flat(asdict(config))
    for name, value in flat(asdict(type(config)(""))).items():
        if not any(known.startswith(f"{name}.") for known in old):  # a rank, say, may be one or many
            old.setdefault(name, value)
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in NEUTRAL
    ]
    if differing:
        raise ValueError(f"{where} is of another configuration: {'; '.join(differing)}")


def open_run(config, procs: Processes) -> tuple[RunFolder, tuple[Path, dict] | None]:
    """The run's folder, and the checkpoint to continue from with its state if there is one.

    Args:
        config: Of this script or another, with `out` and `resume`.
        procs: This process among the others.

    Raises:
        ValueError: the folder holds another run, or this one while `resume` is "none".
        train.checkpoint.CheckpointError: the checkpoint that `resume` names is missing or damaged.
    """
    run = RunFolder(config.out)
    old = run.read_config()
    if old is not None:
        check_same_run(old, config, f"out: the run in {run.path}")
        if config.resume == "none":
            raise ValueError(f"out: {run.path} holds a run; continue it with --resume auto or choose another")
    if config.resume == "none":
        return run, None
    if config.resume == "auto":
        found = checkpoint.newest(run.checkpoints, procs)
        if found is None:
            return run, None
        path, state = found
    else:
        path = Path(config.resume)
        state = checkpoint.load(path, procs)
    check_same_run(state["config"], config, f"resume: {path}")
    if procs.is_main:
        print(f"resuming from {path}, step {state['step']}", flush=True)
    return run, (path, state)


def chosen_by(config, model: nn.Module, ranks: Mapping[str, int | None] | None) -> tuple:
    """Sites, filter and rank for `dbpkern.decorrelate`: the planned layers, or what the options say."""
    if ranks is None:
        return config.decor.present(model), config.decor.accepts, config.decor.rank
    return None, lambda name, module: name in ranks, ranks


def build_model(config: Config, ranks: Mapping[str, int | None] | None = None) -> nn.Module:
    """The model of a configuration, with decorrelated layers if it asks for them.

    Where a plan chooses them, they are those of `ranks`, and there are none before it has.
    """
    torch.manual_seed(config.seed)
    model = task_of(config).build()
    decor = config.decor
    if decor.in_layers and (ranks is not None or not decor.planned):
        sites, accepts, rank = chosen_by(config, model, ranks)
        dbpkern.decorrelate(model, sites, accepts, decor.form, rank)
    else:
        select(model, decor.present(model), decor.accepts)  # raises now: evaluation observes them
    return model


def build_optimizers(
    config: Config, model: nn.Module, ranks: Mapping[str, int | None] | None = None
) -> tuple[torch.optim.Optimizer, dbpkern.DecorSGD | None]:
    """The optimizer of the weights, and that of R where the run decorrelates; one step makes both.

    With a plan, `ranks` are its layers.
    """
    groups = param_groups_weight_decay(model, config.optim.weight_decay)
    peak, betas = config.peak_lr, config.optim.betas
    if config.optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas)
    elif config.optim.name == "muon":
        # Nesterov's momentum, as its authors have it; timm's default is without, and worse here.
        optimizer = Muon(groups, lr=peak, momentum=betas[0], nesterov=True, betas=betas)
    else:
        optimizer = kron.Kron(groups, lr=peak, decoupled_decay=True, deterministic=True)
        # Compiled, as timm has them, its contractions of a 384 x 128 weight ask for 9 GB.
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(optimizer, name, getattr(kron, name))
    for group in optimizer.param_groups:
        group["initial_lr"] = peak
    return optimizer, build_decor(config, model, optimizer, ranks)


def build_decor(
    config, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Mapping[str, int | None] | None = None
) -> dbpkern.DecorSGD | None:
    """The optimizer of R, whose step is part of that of the weights; None for a run without decorrelation.

    Args:
        config: Of this script or another, with `decor` and `seed`.
        model: Whose layers are decorrelated.
        optimizer: Of the weights, with `initial_lr` in its groups.
        ranks: The layers of a plan.
    """
    if not config.decor.enable:
        return None
    c = config.decor
    rule = {
        "lr": c.eta,
        "kappa": c.kappa,
        "sample": c.sample,
        "seed": config.seed,
        "scale_free": c.scale_free,
        "limit": c.limit,
        "every": c.every,
        "follow": optimizer if c.follow else None,
    }
    if not c.in_layers:
        return dbpkern.DecorPreconditioner(model, optimizer, *chosen_by(config, model, ranks), **rule)
    decor = dbpkern.DecorSGD(model, **rule)
    optimizer.register_step_post_hook(lambda *_: decor.step())
    return decor


def check_sample(config, tokens: int, slices: int) -> None:
    """Raise ValueError if a micro-batch of this size would give no rows to decorrelate by.

    `DecorSGD` takes one row at the least; statistics of one row where the user asked for less are noise.
    """
    rows = config.batch_size // slices * tokens
    if config.decor.enable and 0 < config.decor.sample <= 1 and round(config.decor.sample * rows) < 1:
        raise ValueError(
            f"decor.sample: {config.decor.sample} of the {rows} rows of a micro-batch gives no rows; "
            f"expected at least {1 / rows:.2g}"
        )


def make_plan(
    config: Config, model: nn.Module, loss: Callable, training: TrainingSet, procs: Processes
) -> dbpkern.Plan:
    """Measure a model on the run's first batches, which are read anew, and choose layers and ranks.

    Args:
        config: What the run was started with.
        model: Without decorrelated layers.
        loss: As of `Loop`.
        training: The images.
        procs: This process among the others.

    Raises:
        ValueError: as `dbpkern.plan`.
    """
    calls = 4
    decor = config.decor
    order = order_of(config, training, procs, calls)
    loader = build_loader(training, order, config.data.workers, pin_memory=procs.device.type == "cuda")
    batches = iter(loader)
    autocast = autocast_of(config, procs.device)

    def step() -> None:
        for _ in range(config.accumulation):
            batch = moved(next(batches), procs.device) | {"progress": (0, calls)}
            with torch.autocast(procs.device.type, autocast, enabled=autocast is not None):
                value = loss(model, batch) / config.accumulation
            value.backward()

    plan = dbpkern.plan(
        model,
        step,
        decor.budget,
        calls,
        filter=decor.accepts,
        sample=decor.sample,
        every=decor.every,
        form="layers" if decor.in_layers else "optimizer",
        seed=config.seed,
    )
    if procs.is_main:
        tqdm.write(f"pretrain: sites by measurement\n{plan}")
    return plan


def order_of(
    config: Config, training: TrainingSet, procs: Processes, total: int, start: int = 0
) -> StepSampler:
    """The samples of this process in the steps from `start` to `total`."""
    return StepSampler(
        len(training),
        config.batch_size,
        config.seed,
        total,
        start,
        config.accumulation,
        procs.rank,
        procs.world_size,
        training.shards,
        config.data.shard_window,
    )


def autocast_of(config, device: torch.device) -> torch.dtype | None:
    """dtype of mixed precision, None for none."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    precision = auto if config.precision == "auto" else config.precision
    return torch.bfloat16 if precision == "bf16" else None


class Evaluator:
    """Held-out loss, pictures and input correlations of a model."""

    def __init__(self, config: Config, task: Task, model: nn.Module, held_out, processes: Processes) -> None:
        self.config = config
        self.task = task
        self.model = model
        self.processes = processes
        self.observes = True  # whether it tells decorrelation losses
        self.images: Tensor | None = None  # of the pictures
        self.pictures: dict[str, Rows] = {}
        self.size = len(held_out)
        # Processes share the work; a micro-batch of training fits in memory, so one of this size does.
        share = config.batch_size // (config.accumulation * processes.world_size)
        mine = range(self.size)[processes.rank :: processes.world_size]
        chunks = [list(mine[i : i + share]) for i in range(0, len(mine), share)]
        self.chunks = len(chunks)
        # Sharded weights are gathered by all together: who has less to do runs the first image once more.
        rounds = math.ceil(math.ceil(self.size / processes.world_size) / share)
        chunks += [[0]] * (rounds - len(chunks))
        self.loader = build_loader(held_out, chunks, 0, pin_memory=False)

    @torch.no_grad()
    def __call__(self) -> dict:
        """Mean loss and measures over the held-out set; the decorrelation loss per layer on part of it."""
        self.model.eval()
        total: Tensor | int = 0
        losses: dict[str, float] = {}
        unreadable: dict[str, str] = {}
        for i, batch in enumerate(self.loader):
            unreadable |= dict(batch["skipped"])
            batch = moved(batch, self.processes.device)
            images = batch["image"]
            first = i == 0 and self.processes.is_main
            # Stock layers are observed at the sites that DBP would take: both arms can be compared.
            decor = self.config.decor
            observes = first and self.observes
            watch = (
                diagnostics.observe(self.model, decor.present(self.model), decor.accepts)
                if observes
                else nullcontext({})
            )
            with watch as layers:
                loss, made = self.task.forward(self.model, images, batch)
            losses |= {name: layer.loss_after for name, layer in layers.items()}
            if i == 0:  # by all: sharded weights are gathered for it
                pictures = self.task.pictures(self.model, images, batch, made)
                if first:
                    self.images, self.pictures = images[:COUNT].clone(), pictures
            tally = self.task.tally(self.model, images, made)
            counted = torch.cat([loss.double().reshape(1) * len(images), tally])
            total = total + (counted if i < self.chunks else torch.zeros_like(counted))
        self.model.train()
        self.processes.sum(total)
        return {
            "heldout_loss": total[0].item() / self.size,
            **self.task.measures(total[1:], self.size),
            "decorrelation_loss": losses,
            "pictures": {name: plots.image_grid(rows) for name, rows in self.pictures.items()},
            "unreadable": unreadable,
        }


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU of the main process, {} on the others; a collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def fused_model(
    config: Config, ranks: Mapping[str, int | None] | None, weights: dict[str, Tensor]
) -> nn.Module:
    """The stock model of a run, on the CPU and for evaluation, with the function that `weights` have."""
    stock = build_model(config, ranks)
    stock.load_state_dict(weights)
    if config.decor.in_layers:
        dbpkern.fuse(stock)
    return stock.eval()


def load_run(folder: str, which: str | None = None) -> tuple[Config, nn.Module]:
    """The configuration of a run, and its stock model by a checkpoint, fused and for evaluation.

    Args:
        folder: Of the run.
        which: Path of the checkpoint, None for the newest that is whole.

    Raises:
        ValueError: there is no run, or no such checkpoint.
    """
    run = RunFolder(folder)
    if run.read_config() is None:
        raise ValueError(f"run: expected the folder of a run of train/pretrain.py, got {folder}")
    config = parse(["--config", str(run.config)])
    alone = Processes(0, 1, torch.device("cpu"))
    if which is None:
        found = checkpoint.newest(run.checkpoints, alone)
        if found is None:
            raise ValueError(f"run: {folder} has no checkpoint")
        path, state = found
    else:
        path, state = Path(which), checkpoint.load(Path(which), alone)
    weights = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state["model"].items()}
    checkpoint.fill(path, {"model": weights}, alone)
    return config, fused_model(config, state["ranks"], weights)


def plot_correlations(evals: list[dict], path: Path) -> None:
    """The decorrelation losses of a run's evaluations."""
    history: dict[str, dict[int, float]] = {}
    for record in evals:
        for name, value in record["decorrelation_loss"].items():
            history.setdefault(name, {})[record["step"]] = value
    diagnostics.plot_losses(history, path, "Decorrelation loss of z = R x, held out")


def summary_of(config, loop: Loop, records: list[dict]) -> dict:
    """What summary.json says of any run.

    Args:
        config: Of this script or another, with `batch_size` and `energy`.
        loop: The finished run.
        records: Of its log, with at least one evaluation.
    """
    final = [r["loss"] for r in records if r["kind"] == "step"][-plots.WINDOW :]
    return {
        "steps": loop.step,
        "seconds": loop.seconds,
        "images_per_second": loop.step * config.batch_size / loop.seconds if loop.seconds else None,
        "final_loss": sum(final) / len(final) if final else None,
        "heldout_loss": [r for r in records if r["kind"] == "eval"][-1]["heldout_loss"],
        "energy": loop.energy.summary(config.energy.country),
        "skipped_steps": loop.skipped,
        "unreadable": len(loop.unreadable),
        "unreadable_files": loop.unreadable,
        "processes": loop.processes.world_size,
        "device": str(loop.processes.device),
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "machine": collect(),
    }


def write_results(config: Config, loop: Loop, evaluator: Evaluator, weights: dict[str, Tensor]) -> None:
    """The exported model, the summary and the pictures of a finished run, whose model has `weights`."""
    run = loop.run
    records = list(run.records())
    stock = fused_model(config, loop.ranks, weights)
    # First what nothing else can replace.
    for name, content in evaluator.task.exports(stock).items():
        write_atomically(run.path / name, content)
    write_atomically(run.summary, to_json(summary_of(config, loop, records), indent=1))
    plots.plot_curves(records, run.path / "curves.png")
    evals = [r for r in records if r["kind"] == "eval"]
    plot_correlations(evals, run.path / "correlation.png")
    final = evaluator.task.final_pictures(stock.to(loop.processes.device), evaluator.images)
    for name, rows in (evaluator.pictures | final).items():
        plots.save_image_grid(rows, run.path / f"{name}.png")


def prepare(
    config: Config, procs: Processes, optimizers: Callable = build_optimizers
) -> tuple[Loop, Evaluator, Iterator[dict]]:
    """Everything up to the first step. Whatever can be wrong is found before a file is written.

    Args:
        config: What is asked for.
        procs: This process among the others.
        optimizers: `build_optimizers`, or another that takes its place.

    Raises:
        ValueError, FileNotFoundError: what the user asked for cannot be done; the message says why.
    """
    config.check()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS, read at its start
        torch.use_deterministic_algorithms(True)

    task = task_of(config)

    def build(ranks: Mapping[str, int | None] | None) -> nn.Module:
        model = build_model(config, ranks)
        if config.parallel == "fsdp":
            procs.shard(model, task.blocks(model))
        return model.to(procs.device)

    model = build(None)
    if not config.decor.planned:
        optimizer, decor = optimizers(config, model)  # raises before anything is read
    patches = model.patch_embed
    training, held_out = build_data(config.data, patches.img_size, patches.num_patches, config.seed)

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return task.forward(model, to_images(batch, patches.img_size), batch)[0]

    per_epoch = len(training) / config.batch_size
    total = config.steps or max(1, round(config.epochs * per_epoch))
    warmup = config.optim.warmup_steps
    if warmup is None:
        warmup = round(config.optim.warmup_epochs * per_epoch)
    if warmup > total:
        raise ValueError(
            f"optim: the warm-up of {warmup} steps is longer than the run of {total}; "
            "set --optim.warmup_steps or --optim.warmup_epochs"
        )
    run, found = open_run(config, procs)
    files = "".join(f"{name}\n" for name in training.files)
    if found is not None and run.files.is_file() and run.files.read_text() != files:
        raise ValueError(f"data: the training images are no longer those of {run.files}; restore them")
    sampler = order_of(config, training, procs, total, 0 if found is None else found[1]["step"])
    check_sample(config, task.tokens(patches.num_patches), procs.world_size * config.accumulation)
    batches = build_loader(training, sampler, config.data.workers, pin_memory=procs.device.type == "cuda")
    ranks, planning = None, 0.0
    if config.decor.planned:
        if found is not None:
            ranks = found[1]["ranks"]
        else:
            start = time.perf_counter()
            ranks = make_plan(config, model, loss, training, procs).ranks
            planning = time.perf_counter() - start
        if not ranks:
            raise ValueError(
                f"decor.budget: no layer could be chosen for {config.decor.budget:g} of a step; expected a "
                "larger budget, or --decor.enable false"
            )
        if config.decor.in_layers:
            model = build(ranks)
        optimizer, decor = optimizers(config, model, ranks)
    evaluator = Evaluator(config, task, model, held_out, procs)

    def recheck() -> dict:
        plan = make_plan(config, model, loss, training, procs)
        if plan.ranks:  # or the layers of before stay
            decor.replan(model, None, plan.accepts, plan.ranks)
            loop.ranks = plan.ranks
        chosen = [f"{group.name}: {group.chosen}" for group in plan.groups if group.chosen is not None]
        return {"overhead": plan.cost, "chosen": chosen}

    loop = Loop(
        config=asdict(config),
        processes=procs,
        run=run,
        model=model,
        optimizer=optimizer,
        decor=decor,
        ranks=ranks,
        loss=loss,
        evaluate=evaluator,
        rate=lambda step: warmup_cosine(step, total, warmup, config.peak_lr, config.optim.min_lr),
        recheck=recheck if config.decor.planned and not config.decor.in_layers else None,
        total_steps=total,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        autocast=autocast_of(config, procs.device),
        clip_grad=config.optim.clip_grad,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        max_bad_steps=config.max_bad_steps,
        seed=config.seed,
        compile=config.compile,
        profile=config.profile,
    )
    loop.seconds = planning
    if found is not None:
        loop.load(*found)
    procs.barrier()  # nobody writes to the folder before everybody has read it
    if procs.is_main:
        run.write_config(asdict(config))
        write_atomically(run.files, files)
    return loop, evaluator, iter(batches)


def parse(
    arguments: list[str] | None = None, prog: str = "train/pretrain.py", about: str = __doc__, **defaults
) -> Config:
    """The configuration from the command line and YAML files, for a script with these defaults."""
    parser = ArgumentParser(prog=prog, description=about)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(Config)
    parser.set_defaults(defaults)
    settings = parser.instantiate(parser.parse_args(arguments))
    settings.pop("config")
    return Config(**settings)


def run_script(
    name: str, parse: Callable, prepare: Callable, write_results: Callable, arguments: list[str] | None
) -> None:
    """Run a training script, and say in one line what went wrong where it is not a defect of the program.

    Args:
        name: What messages start with.
        parse: As in this module, like the two that follow.
        prepare: Makes everything up to the first step.
        write_results: Called on the main process of a finished run.
        arguments: Of the command line, None for those of this process.
    """
    procs = None
    try:
        config = parse(arguments)
        procs = processes.start(config.device)
        loop, evaluator, batches = prepare(config, procs)
    except (ValueError, FileNotFoundError) as error:
        processes.stop()
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        loop.train(batches)
        weights = whole_weights(loop.model)
    except Diverged as error:
        sys.exit(f"{name}: {error}" if procs.is_main else 1)
    except Interrupted as stopped:
        if procs.is_main:
            print(f"{name}: stopped at step {loop.step}. {stopped}; continue with --resume auto")
        return
    finally:
        del batches  # ends the loader's workers
        processes.stop()
    if procs.is_main:
        write_results(config, loop, evaluator, weights)
        if loop.unreadable:
            print(f"{name}: {len(loop.unreadable)} unreadable files were skipped, see {loop.run.summary}")
        print(f"{name}: {loop.step} steps in {loop.seconds:.1f} s, results in {config.out}")


def main(arguments: list[str] | None = None) -> None:
    """Pre-train."""
    run_script("pretrain", parse, prepare, write_results, arguments)


if __name__ == "__main__":
    main()
