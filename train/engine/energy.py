"""Energy of a run's steps, as the hardware's own counters give it, and the CO2 of that energy.

What has no counter gets no number. codecarbon serves for the carbon intensity of countries alone: its tracker
adds up measured joules and estimates (without RAPL a constant share of the processor's rated power, always a
constant for memory) and does not tell them apart.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

import pynvml
import torch

from train.engine.processes import Processes

POWERCAP = Path("/sys/class/powercap")
KINDS = ("cpu", "dram", "gpu")

# RAPL's zones by the start of their names. "core" and "uncore" are parts of a package, "psys" contains it.
ZONES = {"package": "cpu", "dram": "dram"}

# More than any processor package draws: tells how long a counter surely wraps no more than once.
MOST_WATTS = 1000

JOULES_PER_KWH = 3.6e6


@dataclass
class EnergyConfig:
    """Energy of the run, measured where the hardware has counters.

    Args:
        country: Where the electricity comes from, as an ISO 3166 code of three letters, such as DEU; null for
            joules without CO2.
    """

    country: str | None = None


def carbon_intensity(country: str) -> tuple[float, str]:
    """Carbon intensity of a country's electricity, from the tables inside codecarbon; nothing is downloaded.

    Args:
        country: ISO 3166 code of three letters.

    Returns:
        Kilograms of CO2 equivalent per kilowatt-hour, and where the figure is from.

    Raises:
        ValueError: codecarbon has no figure for this code.
    """
    getLogger("codecarbon").disabled = True  # before the import, which sets the logger up to print
    # Here, since the import looks for GPUs: most runs name no country and need none of it.
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    data = DataSource()
    known = data.get_global_energy_mix_data()
    if country not in known:  # codecarbon itself would take the world's average
        raise ValueError(
            f"energy.country: expected one of {len(known)} ISO 3166 codes of three letters that codecarbon "
            f"has data for, such as DEU or USA, got {country!r}"
        )
    place = GeoMetadata(country_iso_code=country)
    kilograms = Emissions(data).get_country_emissions(Energy.from_energy(kWh=1), place)
    return kilograms, f"codecarbon {version('codecarbon')}, data of {known[country]['year']}"


@dataclass
class Counter:
    """A counter of energy that only grows, but for starting again at 0 where it wraps.

    Args:
        kind: One of `KINDS`.
        name: What is read, for people.
        read: The counter in joules.
        span: Joules after which it starts again at 0; infinite if it does not.
    """

    kind: str
    name: str
    read: Callable[[], float]
    span: float = math.inf

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> float:
        """Count from now on; 0 joules so far."""
        self.last, self._time = self.read(), time.monotonic()
        return 0.0

    def advance(self) -> float:
        """Joules since the last call of this or `restart`.

        Raises:
            ValueError: the readings do not tell.
        """
        before, since = self.last, self._time
        self.restart()
        if (self._time - since) * MOST_WATTS >= self.span:
            raise ValueError(f"{self._time - since:.0f} s between readings, it may have wrapped unnoticed")
        joules = self.last - before
        if joules < 0:
            joules += self.span
        if not 0 <= joules < math.inf:
            raise ValueError(f"went back from {before:g} J to {self.last:g} J")
        return joules


def _microjoules(path: Path) -> float:
    """A file of RAPL's, in joules."""
    return int(path.read_text()) / 1e6


def rapl_counters() -> tuple[list[Counter], dict[str, str]]:
    """The counters of this machine's processor packages and memory.

    Returns:
        The counters, and by kind why it cannot be measured: one unreadable counter makes the sum worthless.
    """
    counters: list[Counter] = []
    missing: dict[str, str] = {}
    # Not intel-rapl-mmio:*, where the same packages show a second time.
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):
        kind = "cpu"  # until the name says so
        try:
            zone = (folder / "name").read_text().strip()
            known = next((kind for name, kind in ZONES.items() if zone.startswith(name)), None)
            if known is None:
                continue
            kind = known
            file = folder / "energy_uj"
            span = _microjoules(folder / "max_energy_range_uj")
            counter = Counter(kind, f"RAPL {zone} ({folder.name})", partial(_microjoules, file), span)
        except (OSError, ValueError) as error:
            missing.setdefault(kind, f"{folder}: {error}")
            continue
        # Some processors show the counter of a whole package once for each of its dies.
        package = f"RAPL {zone.partition('-die-')[0]}-die-"
        if any(c.name.startswith(package) and abs(c.last - counter.last) < 1 for c in counters):
            continue
        counters.append(counter)
    for name, kind in ZONES.items():
        if not any(counter.kind == kind for counter in counters):
            missing.setdefault(kind, f"no RAPL zone {name}* under {POWERCAP}")
    return [counter for counter in counters if counter.kind not in missing], missing


def gpu_counter(index: int) -> Counter:
    """The counter of a CUDA device, which NVIDIA GPUs have from Volta on.

    Raises:
        pynvml.NVMLError: there is none.
    """
    pynvml.nvmlInit()
    properties = torch.cuda.get_device_properties(index)
    # NVML numbers the GPUs without regard to CUDA_VISIBLE_DEVICES.
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    return Counter(
        "gpu",
        f"NVML GPU {index} ({properties.name})",
        lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
    )


def find_counters(processes: Processes) -> tuple[list[Counter], dict[str, str]]:
    """What this process reads: its own GPU and, as the first on its machine, the processors and the memory.

    Returns:
        The counters, and by kind why it cannot be measured.
    """
    counters: list[Counter] = []
    missing: dict[str, str] = {}
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        counters, missing = rapl_counters()
    if processes.device.type == "cuda":
        index = processes.device.index
        try:
            counters.append(gpu_counter(index))
        except pynvml.NVMLError as error:
            missing["gpu"] = f"GPU {index}: {error}"
    return counters, missing


class Meter:
    """Joules of a run's steps by kind of device, over all processes and resumed runs.

    A kind that cannot be measured on some machine, or at some time of the run, has NaN joules, which no sum
    turns into a number again.

    Args:
        processes: This process among the others.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.counters, self.missing = find_counters(processes)
        self.sources = {
            kind: {counter.name for counter in self.counters if counter.kind == kind} for kind in KINDS
        }
        self.totals = dict.fromkeys(KINDS, 0.0)
        self._pending = dict.fromkeys(KINDS, 0.0)

    def start(self) -> None:
        """Count from now on."""
        self._visit(Counter.restart)

    def read(self) -> None:
        """Count up to now."""
        self._visit(Counter.advance)

    def take(self) -> list[float]:
        """Joules that this process has counted since the last call, in the order of `KINDS`."""
        joules = [math.nan if kind in self.missing else self._pending[kind] for kind in KINDS]
        self._pending = dict.fromkeys(KINDS, 0.0)
        return joules

    def add(self, joules: list[float]) -> None:
        """Add what all processes took together."""
        for kind, value in zip(KINDS, joules, strict=True):
            self.totals[kind] += value

    def settle(self) -> None:
        """Add what is left, and let all processes know what each of them reads and misses; a collective."""
        values = torch.tensor(self.take(), dtype=torch.float64, device=self.processes.device)
        self.add(self.processes.sum(values).tolist())
        found = self.processes.gather((self.missing, self.sources))
        self.missing = {}
        for missing, sources in found:
            self._merge(missing, sources)

    def joules(self) -> dict[str, float]:
        """What was measured so far, by kind. A counter that stands still has measured nothing."""
        return {kind: total for kind, total in self.totals.items() if total > 0}

    def summary(self, country: str | None) -> dict[str, object]:
        """What a run's summary says of its energy.

        Args:
            country: ISO 3166 code of three letters, None for joules without CO2.

        Raises:
            ValueError: there is no figure for this country.
        """
        joules = self.joules()
        missing = {
            kind: self.missing.get(kind, "the counter stood still")
            for kind in KINDS
            if kind not in joules and (kind in self.missing or self.sources[kind])
        }
        total = sum(joules.values()) if joules else None
        intensity, source = (None, None) if country is None else carbon_intensity(country)
        if country is None:
            missing["kg_co2"] = "energy.country is not set"
        elif total is None:
            missing["kg_co2"] = "no energy was measured"
        kilograms = None if total is None or intensity is None else total / JOULES_PER_KWH * intensity
        return {
            "joules": total,
            "by_device": joules,
            "source": [name for kind in joules for name in sorted(self.sources[kind])],
            "kg_co2": kilograms,
            "country": country,
            "kg_co2_per_kwh": intensity,
            "kg_co2_per_kwh_source": source,
            "missing": missing,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; complete after `settle`."""
        sources = {kind: sorted(names) for kind, names in self.sources.items()}
        return {"joules": dict(self.totals), "missing": dict(self.missing), "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.totals = dict(state["joules"])
        self._merge(state["missing"], state["sources"])

    def _merge(self, missing: dict[str, str], sources: Mapping[str, Iterable[str]]) -> None:
        self.missing = missing | self.missing
        for kind, names in sources.items():
            self.sources[kind] |= set(names)

    def _visit(self, method: Callable[[Counter], float]) -> None:
        for counter in self.counters:
            try:
                self._pending[counter.kind] += method(counter)
            except (OSError, ValueError, pynvml.NVMLError) as error:
                self.missing.setdefault(counter.kind, f"{counter.name}: {error}")
        self.counters = [counter for counter in self.counters if counter.kind not in self.missing]
