"""The parts of a training step, of several arms in one process: time, launches, the host's part."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import launches, measure
from bench.arms import PERIOD, Arm
from bench.cases import Case
from bench.record import Stage


class Clock:
    """Times of the parts of a step, on the device and on the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what is within."""
        begin, start = time.perf_counter(), self._mark()
        yield
        self.spans.append((name, start, self._mark(), time.perf_counter() - begin))

    def _mark(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds a step by part, those of the host behind "host of"; the mean over a period of R."""
        if self.cuda:
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for name, start, end, host in self.spans:
            total[name] += (start.elapsed_time(end) / 1e3 if self.cuda else end - start) / PERIOD
            total[f"host of {name}"] += host / PERIOD
        self.spans = []
        return dict(total)


def period(arm: Arm, clock: Clock) -> dict[str, float]:
    """The steps from one update of R to the next."""
    for _ in range(PERIOD):
        with clock("step"):
            arm.step(clock)
    return clock.read()


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, object]:
    """Launches of a call, and those that took longest; operators where there is no GPU."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    calls, times = Counter(), Counter()
    for event in found.events():
        if (
            event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
            and not event.is_user_annotation
        ):
            calls[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
    top = [{"name": name, "calls": calls[name], "us": us} for name, us in times.most_common(40)]
    return {"launches": calls.total(), "device_us": times.total(), "top": top}


def measure_arms(stage: Stage, case: Case, names: Sequence[str], until: float) -> None:
    """Time, parts, launches and ratios of some arms of `bench launches`; the first is compared with."""
    sides = [next(side for side in launches.SIDES if side.name == name) for name in names]
    inputs = case.inputs(stage.device, torch.float32)
    clock, arms = Clock(stage.device), {}
    for side in sides:
        begin = time.perf_counter()
        try:
            arm = Arm(case, side.method, side.choice, inputs, "bf16", side.optimizer, side.rule)
            if arm.engine is not None:  # its step is within that of the optimizer
                arm.engine.step = _timed(clock, arm.engine.step)
            for _ in range(2):
                period(arm, clock)
            arms[side.name] = arm
            stage.add(case=case.describe(), arm=side.name, first_seconds=time.perf_counter() - begin)
        except Exception as error:
            stage.add(case=case.describe(), arm=side.name, error=f"{type(error).__name__}: {error}")
    found: dict[str, list[dict]] = {name: [] for name in arms}
    turn, rounds = 0, 2 if stage.dry else 15
    while arms and turn < rounds and (turn < 2 or stage.within(until)):
        steps = [functools.partial(period, arm, clock) for arm in arms.values()]
        for name, times in zip(arms, measure.rotated_round(steps, turn, lambda step: step()), strict=True):
            found[name].append(times)
            stage.add(case=case.describe(), arm=name, round=turn, seconds=times)
        turn += 1
        base = [times["step"] for times in found[names[0]]] if names[0] in found else None
        ratios = {}
        for name, rows in found.items():
            parts = {part: measure.quartiles(row[part] for row in rows).median for part in rows[0]}
            ratio = base and measure.paired_ratio([row["step"] for row in rows], base)._asdict()
            ratios[name] = {"of": names[0], "ratio": ratio, "median_seconds": parts}
        every = stage.content.get("ratios", {})
        of_case = every.get(case.describe(), {})
        stage.set("ratios", every | {case.describe(): of_case | ratios})
    for name, arm in arms.items():
        for _ in range(PERIOD):
            due = arm.engine is not None and arm.engine.sampler.due
            row = profiled(arm.step, stage.device)
            stage.add(case=case.describe(), arm=name, due=due, profile=row)


def _timed(clock: Clock, step: Callable) -> Callable:
    def timed(*args, **kwargs):
        with clock("R"):
            return step(*args, **kwargs)

    return timed
