"""Pre-train a model, MAE or DARL, plain or with decorrelated backpropagation.

    torchrun --standalone --nproc_per_node 1 train/pretrain.py --config train/configs/demo.yaml --out runs/a

Also runs with plain python. `--help` lists every option; `docs/training.md` explains them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from timm.optim import kron, param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

import dbpkern
from dbpkern import diagnostics
from dbpkern.sites import select
from train import planning
from train.data.loading import StepSampler, build_loader
from train.data.pretraining import DataConfig, TrainingSet, build_data, to_images
from train.engine import checkpoint, plots
from train.engine import config as shared
from train.engine.loop import HoldsR, Loop, moved
from train.engine.processes import Processes, progress
from train.engine.run import (
    build_optimizer,
    open_run,
    parse_config,
    plot_correlations,
    run_script,
    summary_of,
)
from train.engine.run_folder import RunFolder, to_json, write_atomically
from train.tasks.autoregressive import DarlConfig
from train.tasks.families import FAMILIES, task_of
from train.tasks.task import COUNT, Rows, Task
from train.tasks.tokenizer import DvaeConfig


@dataclass
class OptimConfig(shared.OptimConfig):
    """The optimizer of the weights and its schedule; by default AdamW, as in MAE.

    Args:
        name: "adamw", "muon" (dbpkern.DecorMuon, AdamW for vectors and tokens), or timm's "kron" (PSGD).
        betas: Of AdamW; the first is Muon's momentum (Nesterov's), too.
    """

    name: Literal["adamw", "muon", "kron"] = "adamw"
    _: KW_ONLY
    blr: float = 1.5e-4
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class DecorConfig(shared.DecorConfig):
    """Decorrelated backpropagation.

    Args:
        mode: "optimizer" takes an optimizer that holds R (dbpkern.DecorAdamW, dbpkern.DecorMuon),
            "preconditioner" maps gradients and changes around a plain one (dbpkern.DecorPreconditioner), as
            kron always has it; "layers" puts decorrelated layers into the model, see docs/method.md.
        form: How decorrelated layers compute: "auto", "fold" or "apply".
        sites: Which layers of a block: "sublayers" (patch embedding, qkv, fc1), "all", or a list of
            patch_embed, qkv, proj, fc1, fc2. "auto" chooses layers and ranks by measurements, see budget.
        budget: For sites "auto": the part of a step's time that decorrelation may take.
    """

    mode: Literal["optimizer", "preconditioner", "layers"] = "optimizer"
    form: Literal["auto", "fold", "apply"] = "auto"
    budget: float = 0.05

    @property
    def in_layers(self) -> bool:
        """Whether the model has decorrelated layers."""
        return self.enable and self.mode == "layers"

    @property
    def planned(self) -> bool:
        """Whether a plan chooses the layers."""
        return self.enable and self.sites == "auto"

    def present(self, model: nn.Module) -> list[str]:
        """The sites that the model has; where a plan chooses, those of "all".

        Evaluation observes them in a model without decorrelated layers.
        """
        return replace(self, sites="all").present(model) if self.sites == "auto" else super().present(model)


@dataclass
class Config(shared.RunConfig):
    """Pre-training of a masked autoencoder or a DARL model.

    Args:
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
        data: The images.
        decor: Decorrelated backpropagation.
        seed: Of weights, order, crops, masks and samples.
        parallel: What several processes share: "ddp" for the batch alone, or "fsdp" for the weights and the
            optimizer's state, too.
    """

    model: str = "mae_vit_base"
    decoder: str = "mae"
    model_args: dict[str, int | float | list[int]] = field(default_factory=dict)
    img_size: int | tuple[int, int] = 224
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    darl: DarlConfig = field(default_factory=DarlConfig)
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    _: KW_ONLY
    epochs: float = 800
    batch_size: int = 4096
    optim: OptimConfig = field(default_factory=OptimConfig)
    decor: DecorConfig = field(default_factory=DecorConfig)

    def check(self) -> None:
        """Raise ValueError for numbers out of range."""
        self.check_numbers()
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


def build_model(config: Config, ranks: Mapping[str, int | None] | None = None) -> nn.Module:
    """The model of a configuration, with decorrelated layers if it asks for them.

    Where a plan chooses them, they are those of `ranks`, and there are none before it has.
    """
    torch.manual_seed(config.seed)
    model = task_of(config).build()
    decor = config.decor
    if decor.in_layers and (ranks is not None or not decor.planned):
        dbpkern.decorrelate(model, decor.rule(model, config.seed, ranks), decor.form)
    else:
        select(model, decor.present(model), decor.accepts)  # raises now: evaluation observes them
    return model


def build_optimizers(
    config: Config, model: nn.Module, ranks: Mapping[str, int | None] | None = None
) -> tuple[torch.optim.Optimizer, HoldsR | None]:
    """The optimizer of the weights, and what moves R where the run decorrelates; one step makes both.

    With a plan, `ranks` are its layers.
    """
    groups = param_groups_weight_decay(model, config.optim.weight_decay)
    peak, decor = config.peak_lr, config.decor
    rule = decor.rule(model, config.seed, ranks) if decor.enable else None
    inside = decor.enable and decor.mode == "optimizer" and config.optim.name != "kron"
    if config.optim.name == "kron":
        optimizer = kron.Kron(groups, lr=peak, decoupled_decay=True, deterministic=True)
        # Compiled, as timm has them, its contractions of a 384 x 128 weight ask for 9 GB.
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(optimizer, name, getattr(kron, name))
    else:
        optimizer = build_optimizer(config, groups, peak, model, rule if inside else None)
    for group in optimizer.param_groups:
        group["initial_lr"] = peak
    if not decor.enable:
        return optimizer, None
    if decor.in_layers:
        layers = dbpkern.DecorSGD(model, rule, optimizer if decor.follow else None)
        optimizer.register_step_post_hook(lambda *_: layers.step())
        return optimizer, layers
    return optimizer, optimizer if inside else dbpkern.DecorPreconditioner(model, optimizer, rule)


def make_plan(
    config: Config, model: nn.Module, loss: Callable, training: TrainingSet, procs: Processes
) -> planning.Plan:
    """Measure a model on the run's first batches, which are read anew, and choose layers and ranks.

    Args:
        config: What the run was started with.
        model: Without decorrelated layers.
        loss: As of `Loop`.
        training: The images.
        procs: This process among the others.

    Raises:
        ValueError: as `train.planning.plan`.
    """
    calls = 4
    decor = config.decor
    order = order_of(config, training, procs, calls)
    collate = task_of(config).collate
    batches = iter(build_loader(training, order, config.data.workers, procs.device.type == "cuda", collate))
    autocast = config.autocast(procs.device)

    def step() -> None:
        for _ in range(config.accumulation):
            batch = moved(next(batches), procs.device) | {"progress": (0, calls)}
            with torch.autocast(procs.device.type, autocast, enabled=autocast is not None):
                value = loss(model, batch) / config.accumulation
            value.backward()

    plan = planning.plan(
        model,
        step,
        decor.budget,
        calls,
        mode="layers" if decor.in_layers else "optimizer",
        decor=decor.rule(model, config.seed),
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
        self.held_out = held_out
        # Processes share the work; a micro-batch of training fits in memory, so one of this size does.
        share = config.micro_batch(processes.world_size)
        mine = range(self.size)[processes.rank :: processes.world_size]
        self.chunks = [list(mine[i : i + share]) for i in range(0, len(mine), share)]
        # Sharded weights are gathered by all together: who has less to do runs the first image once more.
        rounds = math.ceil(math.ceil(self.size / processes.world_size) / share)
        self.fillers = [[0]] * (rounds - len(self.chunks))

    @torch.no_grad()
    def __call__(self) -> dict:
        """Mean loss and measures over the held-out set; the decorrelation loss per layer on part of it."""
        self.model.eval()
        total: Tensor | int = 0
        losses: dict[str, float] = {}
        unreadable: dict[str, str] = {}
        # Its workers end with the evaluation, as between evaluations they would only hold memory.
        loader = build_loader(
            self.held_out,
            self.chunks + self.fillers,
            self.config.data.workers,
            self.processes.device.type == "cuda",
            self.task.collate,
        )
        for i, batch in enumerate(progress(loader, "evaluating", "batch")):
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
            total = total + (counted if i < len(self.chunks) else torch.zeros_like(counted))
        self.model.train()
        self.processes.sum(total)
        return {
            "heldout_loss": total[0].item() / self.size,
            **self.task.measures(total[1:], self.size),
            "decorrelation_loss": losses,
            "pictures": {name: plots.image_grid(rows) for name, rows in self.pictures.items()},
            "unreadable": unreadable,
        }


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


def write_results(loop: Loop, evaluator: Evaluator, weights: dict[str, Tensor]) -> None:
    """The exported model, the summary and the pictures of a finished run, whose model has `weights`."""
    run = loop.run
    records = list(run.records())
    stock = fused_model(loop.config, loop.ranks, weights)
    # First what nothing else can replace.
    for name, content in evaluator.task.exports(stock).items():
        write_atomically(run.path / name, content)
    write_atomically(run.summary, to_json(summary_of(loop, records), indent=1))
    plots.plot_curves(records, run.path / "curves.png")
    plot_correlations(records, run.path / "correlation.png")
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

    total, rate = config.schedule(len(training))
    run, found = open_run(config, procs, training.files)
    sampler = order_of(config, training, procs, total, 0 if found is None else found[1]["step"])
    config.check_sample(task.tokens(patches.num_patches), procs.world_size)
    workers, pin_memory = config.data.workers, procs.device.type == "cuda"
    batches = build_loader(training, sampler, workers, pin_memory, task.collate)
    ranks, planned = None, 0.0
    if config.decor.planned:
        if found is not None:
            ranks = found[1]["ranks"]
        else:
            start = time.perf_counter()
            ranks = make_plan(config, model, loss, training, procs).ranks
            planned = time.perf_counter() - start
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
            decor.replan(model, plan.decor())
            loop.ranks = plan.ranks
        chosen = [f"{group.name}: {group.chosen}" for group in plan.groups if group.chosen is not None]
        return {"overhead": plan.cost, "chosen": chosen}

    loop = Loop(
        config=config,
        processes=procs,
        run=run,
        files=training.files,
        model=model,
        optimizer=optimizer,
        decor=decor,
        loss=loss,
        evaluate=evaluator,
        total_steps=total,
        rate=rate,
        ranks=ranks,
        recheck=recheck if config.decor.planned and not config.decor.in_layers else None,
    )
    loop.seconds = planned
    if found is not None:
        loop.load(*found)
    return loop, evaluator, iter(batches)


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration from the command line and YAML files."""
    return parse_config(Config, "train/pretrain.py", __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Pre-train."""
    run_script("pretrain", parse, prepare, write_results, arguments)


if __name__ == "__main__":
    main()
