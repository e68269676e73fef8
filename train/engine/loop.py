"""The training loop that all scripts share: steps, skipped steps, logs, checkpoints, signals."""

import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, schedule, tensorboard_trace_handler
from torch.utils._pytree import tree_map_only
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dbpkern import DecorPreconditioner, DecorSGD
from dbpkern.capture import derive_seed
from dbpkern.layers import Decorrelated
from dbpkern.optim.base import DecorOptimizer
from dbpkern.stacks import Holder
from train.data.loading import build_loader
from train.data.samples import Batch
from train.engine import checkpoint
from train.engine.energy import KINDS, Meter
from train.engine.evaluation import Evaluator
from train.engine.processes import moved
from train.engine.run_folder import RunFolder, to_json
from train.engine.task import AnyTask


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or Ctrl-C), and saved its state if that was sound."""


HoldsR = DecorOptimizer | DecorPreconditioner | DecorSGD
"""What moves R, by its engine."""


def health(model: nn.Module, decor: HoldsR | None = None) -> dict[str, float]:
    """The largest absolute entry of parameters, R and running statistics by name, one wait for the device.

    R are those of decorrelated layers, and those that `decor` moves.

    A collective where weights are sharded.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Decorrelated):
            tensors |= _factors(name, module)
        for part, statistic in _statistics(module).items():
            tensors[f"{name}.{part}"] = statistic
    if decor is not None:
        assert decor.engine is not None
        for name, layer in decor.engine.layers.items():
            tensors |= _factors(name, layer)
    peaks = torch.stack([_peak(t.detach()) for t in tensors.values() if t.numel()])
    if any(isinstance(t, DTensor) for t in tensors.values()):
        # No maximum of several processes can be relied on to keep a NaN.
        dist.all_reduce(peaks.nan_to_num_(math.inf, math.inf), op=dist.ReduceOp.MAX)
    return dict(zip((n for n, t in tensors.items() if t.numel()), peaks.tolist(), strict=True))


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a BatchNorm."""
    if not (isinstance(module, _BatchNorm) and module.track_running_stats):
        return {}
    assert module.running_mean is not None
    assert module.running_var is not None
    return {"running_mean": module.running_mean, "running_var": module.running_var}


def _factors(name: str, layer: Decorrelated | Holder) -> dict[str, Tensor]:
    return {f"{name}.{factor}": t for factor, t in zip(layer.structure.names, layer.factors, strict=True)}


def _peak(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.abs().amax().float() if local.numel() else local.new_zeros((), dtype=torch.float32)


def blame(model: nn.Module, decor: HoldsR | None = None) -> str:
    """Which layer made the loss non-finite, as far as its state shows, and what to try."""
    peaks = health(model, decor)
    broken = [name for name, peak in peaks.items() if not math.isfinite(peak)]
    matrices = [name for name in peaks if name.endswith((".R", ".Q", ".S"))]
    # R goes first where it goes: its entries grow by factors while weights still look ordinary.
    wild = [name for name in broken if name in matrices]
    if not wild and matrices:
        largest = max(matrices, key=peaks.__getitem__)
        wild = [largest] if peaks[largest] > 1e3 else []
    if wild:
        others = f" (and {len(wild) - 1} more)" if len(wild) > 1 else ""
        return (
            f"the decorrelation matrix {wild[0]} has entries up to {peaks[wild[0]]:g}{others}; "
            "start again with a smaller --decor.eta"
        )
    if broken:
        return (
            f"{broken[0]} is not finite ({len(broken)} of {len(peaks)} tensors); "
            "start again with a smaller --optim.blr, a longer warm-up, or --optim.clip_grad 1"
        )
    return (
        f"all weights are finite, the largest entry is {max(peaks.values()):g} in "
        f"{max(peaks, key=peaks.__getitem__)}; start again with a smaller --optim.blr or --optim.clip_grad 1"
    )


class Loop:
    """One run: what is trained, how long, and where it is written.

    Args:
        task: What is learned, prepared.
        run: Folder of the run.
        optimizer: Of the weights.
        decor: What moves R, None for plain backpropagation.
        found: The checkpoint to continue from, with its state; None to start.
        recheck: Called once after a tenth of the steps, if given, on every process; the record goes to the
            log.

    Attributes:
        config: What the run was started with; kept in checkpoints.
        processes: This process among the others.
        model: The model whose state is saved.
        evaluate: `evaluate() -> record`, called on every process. Its "pictures" go to TensorBoard, and its
            "unreadable" to those of the run.
        total_steps: Length of the run.
        rate: Learning rate by step.
        batches: The micro-batches of this process.
        step: Steps made.
        seconds: Spent in steps and plans, waiting for data included, evaluation and saving not.
        skipped: Steps whose loss or gradient was not finite.
        unreadable: Files that could not be read, with the reason.
        energy: Of the steps.
        autocast: dtype of mixed precision, None for none.
    """

    def __init__(
        self,
        task: AnyTask,
        run: RunFolder,
        optimizer: torch.optim.Optimizer,
        decor: HoldsR | None,
        found: tuple[Path, dict[str, Any]] | None = None,
        recheck: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.task, self.run, self.optimizer, self.decor, self.recheck = task, run, optimizer, decor, recheck
        self.config, self.processes, self.model = task.config, task.processes, task.model
        self.evaluate: Callable[[], dict[str, Any]] = Evaluator(task)
        self.total_steps, self.rate = self.config.schedule(len(task.training))
        device = self.processes.device
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.unreadable: dict[str, str] = {}
        self.energy = Meter(self.processes)
        self.autocast = self.config.autocast(device)
        self._ddp: DistributedDataParallel | None = None
        self._statistics = [
            tensor for module in self.model.modules() for tensor in _statistics(module).values()
        ]
        self._bad = 0
        self._signalled = False  # here
        self._stop = False  # on any process, as all of them know
        if found is not None:
            self.load(*found)
        # Last, for its processes start here.
        self.batches: Iterator[Batch] = iter(
            build_loader(
                task.training,
                task.order(self.total_steps, self.step),
                task.workers,
                device.type == "cuda",
                task.collate,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "unreadable": self.unreadable,
            "energy": self.energy.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # Around an optimizer R is in its state; in layers it is in the model's.
            "decor": self.decor.state_dict() if isinstance(self.decor, DecorSGD) else None,
            "ranks": self.task.ranks,
        }

    def load(self, path: Path, outline: dict[str, Any]) -> None:
        """Continue from a checkpoint, however many processes wrote it; a collective.

        Args:
            path: Of the checkpoint.
            outline: What `checkpoint.load` gave for it.
        """
        state = tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), outline)
        state["model"] = self.model.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                sharded = isinstance(parameters[i], DTensor) and not name.startswith("decor_")
                if sharded and isinstance(value, Tensor) and value.dim():
                    moments[name] = torch.zeros_like(parameters[i], dtype=value.dtype)
        checkpoint.fill(path, state, self.processes)
        self.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.decor, DecorSGD):
            self.decor.load_state_dict(state["decor"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.skipped = state["skipped"]
        self.unreadable = state["unreadable"]
        self.energy.load_state_dict(state["energy"])

    def train(self) -> None:
        """Run from the present step to the last.

        Raises:
            Diverged: `config.max_bad_steps` steps in a row were skipped, or the run ended with entries that
                are not finite; the message names the layer.
            Interrupted: SIGTERM or Ctrl-C; the message says which checkpoint is the last.
        """
        main = self.processes.is_main
        evaluates = self.step in (0, self.total_steps)  # a finished run may lack what is made from it
        model = self._wrapped()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.processes.barrier()  # nobody writes to the folder before everybody has read it
        if main:
            self.run.write_start(asdict(self.config), self.task.files)
            self.run.rewind(self.step, evaluates)
            checkpoint.rewind(self.run.checkpoints, self.step)
        self._log = self.run.log.open("a") if main else None
        self._board = SummaryWriter(self.run.tensorboard, purge_step=self.step + 1) if main else None
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not main, unit="step", mininterval=1)
        try:
            if evaluates:
                self._evaluate()
            with self._profiler() as profiler:
                while self.step < self.total_steps:
                    self._train_step(model, parameters, bar)
                    if profiler is not None:
                        profiler.step()
                    if self.recheck is not None and self.step == math.ceil(self.total_steps / 10):
                        start = time.perf_counter()
                        found = self.recheck()
                        self.seconds += time.perf_counter() - start
                        self._record("plan", found | {"seconds": self.seconds})
                    last = self.step == self.total_steps
                    if last or self.step % self.config.eval_every == 0:
                        self._evaluate()
                    if last or self.step % self.config.checkpoint_every == 0 or self._stop:
                        self._save()
                    if self._stop and not last:
                        raise Interrupted(self._last_checkpoint())
            if not self._finite():
                raise Diverged(
                    f"the run ended in a state that is not finite: {blame(self.model, self.decor)}"
                )
        finally:
            bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler)
            if self._log is not None and self._board is not None:
                self._log.close()
                self._board.close()

    def close(self) -> None:
        """End the processes that load data."""
        self.batches = iter(())

    def _wrapped(self) -> nn.Module:
        model = self.model
        if self.processes.world_size > 1 and not isinstance(model, FSDPModule):
            # R is the same everywhere by construction: nothing to broadcast before each forward. Newer
            # versions of torch have another name for that.
            known = inspect.signature(DistributedDataParallel).parameters
            flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            device = self.processes.device
            ids = [device.index] if device.type == "cuda" else None
            options: dict[str, Any] = {flag: False}
            model = self._ddp = DistributedDataParallel(model, device_ids=ids, **options)
        return cast(nn.Module, torch.compile(model)) if self.config.compile else model

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        """Gradients made here stay in their process until a later backward takes them along."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
            return
        with nullcontext() if self._ddp is None else self._ddp.no_sync():
            yield

    def _train_step(self, model: nn.Module, parameters: list[nn.Parameter], bar: tqdm) -> None:
        start = time.perf_counter()
        self.energy.start()
        device = self.processes.device
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1)  # timm's field for decay by layers
        # The random state of a step is a function of its number, so that resuming needs no stored state.
        torch.manual_seed(derive_seed(self.config.seed, self.step, self.processes.rank))
        total = torch.zeros(2 + len(KINDS), device=device)  # loss, wish to stop, joules
        # A forward writes these before it is known whether the step is any good.
        before = [tensor.clone() for tensor in self._statistics]
        waited = 0.0
        for micro in range(self.config.accumulation):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            self.unreadable |= dict(batch.pop("skipped", ()))
            batch = moved(batch, device) | {"progress": (self.step, self.total_steps)}
            with self._unsynchronised() if micro + 1 < self.config.accumulation else nullcontext():
                with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                    loss = self.task.loss(model, batch) / self.config.accumulation
                loss.backward()
            total[0] += loss.detach()
            self.energy.read()
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_grad or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        total[0] /= self.processes.world_size
        total[1] = float(self._signalled)
        for i, joules in enumerate(self.energy.take(), 2):
            total[i] = joules
        # The one wait for the device in a step: whether to make it at all.
        loss, stop, *counted, norm = torch.cat([self.processes.sum(total), norm.reshape(1)]).tolist()
        self.energy.add(counted)
        self._stop = stop > 0
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self.optimizer.step()  # moves R, too: in its own step, or by a hook of `build_optimizers`
        else:
            for tensor, value in zip(self._statistics, before, strict=True):
                tensor.copy_(value)
            if self.decor is not None:
                self.decor.drop_samples()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.energy.read()
        duration = time.perf_counter() - start
        self.seconds += duration
        speed = self.config.batch_size / duration
        if good:
            self._bad = 0
            values = {"loss": loss, "lr": rate, "grad_norm": norm, "images_per_second": speed}
            values["data_seconds"] = waited
            self._record("step", values | self._spent())
        else:
            self._skip(loss, norm)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
        bar.update()

    def _spent(self) -> dict[str, Any]:
        joules = self.energy.joules()
        return {"seconds": self.seconds} | ({"joules": joules} if joules else {})

    def _skip(self, loss: float, norm: float) -> None:
        self._bad += 1
        self.skipped += 1
        values = {"loss": loss, "grad_norm": norm, "in_a_row": self._bad}
        self._record("skip", values | self._spent())
        if self._bad >= self.config.max_bad_steps:
            raise Diverged(
                f"step {self.step}: {self._bad} steps in a row had a loss or gradient that is not finite "
                f"(loss {loss}, gradient norm {norm}) and were skipped. "
                f"Likely cause: {blame(self.model, self.decor)}. {self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        saved = checkpoint.paths(self.run.checkpoints)
        return f"The last good checkpoint is {saved[-1]}" if saved else "No checkpoint was saved"

    def _finite(self) -> bool:
        return all(math.isfinite(peak) for peak in health(self.model, self.decor).values())

    def _evaluate(self) -> None:
        record = self.evaluate()
        for found in self.processes.gather(record.pop("unreadable", {})):
            self.unreadable |= found
        for name, image in record.pop("pictures", {}).items():
            if self._board is not None:
                self._board.add_image(name, image, self.step)
        caution = {}
        if self.decor is not None:
            assert self.decor.engine is not None
            caution = self.decor.engine.caution()
        if caution:  # layers whose samples were not finite: what is left of their eta
            record["caution"] = caution
        self._record("eval", record | {"seconds": self.seconds})

    def _save(self) -> None:
        self.energy.settle()
        if self._bad:
            return  # a state that cannot make a step is not worth replacing one that can
        found = self.processes.gather(self.unreadable)
        self.unreadable = {name: reason for part in found for name, reason in part.items()}
        if self._finite():
            checkpoint.save(
                self.run.checkpoints, self.step, self.state_dict(), self.config.keep, self.processes
            )
            return
        reason = blame(self.model, self.decor)
        if self.processes.is_main:
            tqdm.write(f"step {self.step}: not saved, {reason}")

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        """One line in the log, and its numbers to TensorBoard."""
        if self._log is None or self._board is None:
            return
        self._log.write(to_json({"kind": kind, "step": self.step} | values) + "\n")
        self._log.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, self.step)
            elif isinstance(value, dict):
                for key, number in value.items():
                    self._board.add_scalar(f"{name}/{key}", number, self.step)

    def _on_signal(self, *_: object) -> None:
        self._signalled = True

    def _profiler(self) -> AbstractContextManager[profile | None]:
        if not (self.config.profile and self.processes.is_main):
            return nullcontext()
        return profile(
            schedule=schedule(wait=2, warmup=1, active=3, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(self.run.tensorboard)),
            record_shapes=True,
            profile_memory=True,
        )
