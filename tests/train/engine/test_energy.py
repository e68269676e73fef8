"""Energy of runs: counters of processors, memory and GPUs, sums over processes and resumed runs, CO2."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import torch
from runs import ALONE, ENVIRONMENT, TINY

from train import pretrain
from train.engine import energy
from train.engine.energy import Counter, Meter, carbon_intensity, rapl_counters
from train.engine.evaluation import Evaluator
from train.engine.processes import Processes
from train.engine.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
SPAN = 262_143_328_850  # microjoules, of a common processor


class Zones:
    """A tree such as /sys/class/powercap."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, folder: str, name: str, microjoules: int = 5_000_000) -> None:
        (self.root / folder).mkdir()
        (self.root / folder / "name").write_text(f"{name}\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{SPAN}\n")
        self.set(folder, microjoules)

    def set(self, folder: str, microjoules: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def zones(tmp_path, monkeypatch) -> Zones:
    root = tmp_path / "powercap"
    root.mkdir()
    monkeypatch.setattr(energy, "POWERCAP", root)
    return Zones(root)


def test_packages_and_memory_count_and_what_they_contain_does_not(zones):
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    zones.add("intel-rapl:0:0", "core")
    zones.add("intel-rapl:0:1", "dram", 2_000_000)
    zones.add("intel-rapl:1", "package-1", 70_000_000)
    zones.add("intel-rapl:2", "psys")
    zones.add("intel-rapl-mmio:0", "package-0")
    meter = Meter(ALONE)
    for folder in sorted(zones.root.iterdir()):
        zones.set(folder.name, 80_000_000)
    meter.read()
    assert meter.take() == [79.0 + 10.0, 78.0, 0.0]
    assert meter.take() == [0.0, 0.0, 0.0]
    assert meter.sources["cpu"] == {"RAPL package-0 (intel-rapl:0)", "RAPL package-1 (intel-rapl:1)"}


def test_only_what_lies_between_start_and_read_counts(zones):
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    meter = Meter(ALONE)
    zones.set("intel-rapl:0", 50_000_000)
    meter.start()
    zones.set("intel-rapl:0", 53_000_000)
    meter.read()
    zones.set("intel-rapl:0", 54_000_000)
    meter.read()
    zones.set("intel-rapl:0", 90_000_000)
    assert meter.take()[0] == pytest.approx(4.0)


def test_a_counter_that_starts_again_at_zero(zones):
    zones.add("intel-rapl:0", "package-0", SPAN - 3_000_000)
    meter = Meter(ALONE)
    zones.set("intel-rapl:0", 4_000_000)
    meter.read()
    assert meter.take()[0] == pytest.approx(7.0)


def test_a_counter_that_may_have_wrapped_twice_gives_no_number(zones, monkeypatch):
    zones.add("intel-rapl:0", "package-0")
    now = 1000.0
    monkeypatch.setattr(energy.time, "monotonic", lambda: now)
    meter = Meter(ALONE)
    now += 262
    meter.read()
    assert meter.take()[0] == 0.0
    now += 263
    meter.read()
    assert math.isnan(meter.take()[0])
    assert "263 s between readings" in meter.missing["cpu"]


def test_dies_that_show_the_counter_of_their_package_count_once(zones):
    zones.add("intel-rapl:0", "package-0-die-0", 50_000_000)
    zones.add("intel-rapl:1", "package-0-die-1", 50_000_400)
    zones.add("intel-rapl:2", "package-1-die-0", 50_000_100)
    zones.add("intel-rapl:3", "package-1-die-1", 90_000_000)
    counters, _ = rapl_counters()
    assert [counter.name.split()[1] for counter in counters] == [
        "package-0-die-0",
        "package-1-die-0",
        "package-1-die-1",
    ]


def test_a_counter_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chmod(folder, 0o755)
        zones = Zones(Path(folder))
        zones.add("intel-rapl:0", "package-0")
        zones.add("intel-rapl:1", "package-1")
        (zones.root / "intel-rapl:1" / "energy_uj").chmod(0)
        patch.setattr(energy, "POWERCAP", zones.root)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            meter = Meter(ALONE)
        finally:
            os.seteuid(user)
    meter.settle()
    # The other package alone would pass for the whole.
    assert meter.counters == []
    summary = meter.summary(None)
    assert summary["joules"] is None
    assert "Permission denied" in summary["missing"]["cpu"]
    assert "intel-rapl:1" in summary["missing"]["cpu"]


def test_a_counter_that_vanishes_leaves_no_number_even_when_it_returns(zones):
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    zones.add("intel-rapl:0:0", "dram", 1_000_000)
    meter = Meter(ALONE)
    zones.set("intel-rapl:0", 2_000_000)
    zones.set("intel-rapl:0:0", 4_000_000)
    meter.read()
    meter.settle()
    assert meter.joules() == {"cpu": 1.0, "dram": 3.0}
    (zones.root / "intel-rapl:0" / "energy_uj").unlink()
    meter.read()
    zones.set("intel-rapl:0", 3_000_000)
    zones.set("intel-rapl:0:0", 5_000_000)
    meter.start()
    meter.read()
    meter.settle()
    summary = meter.summary("DEU")
    assert summary["by_device"] == {"dram": 3.0}
    assert summary["source"] == ["RAPL dram (intel-rapl:0:0)"]
    assert "No such file" in summary["missing"]["cpu"]


def test_a_counter_that_stands_still_has_measured_nothing(zones):
    zones.add("intel-rapl:0", "package-0", 0)
    meter = Meter(ALONE)
    meter.read()
    meter.settle()
    assert meter.joules() == {}
    assert meter.summary(None)["joules"] is None
    assert meter.summary(None)["missing"]["cpu"] == "the counter stood still"


def test_without_counters_there_is_no_number_but_a_reason(zones):
    meter = Meter(ALONE)
    meter.start()
    meter.read()
    meter.settle()
    assert meter.summary("DEU") == {
        "joules": None,
        "by_device": {},
        "source": [],
        "kg_co2": None,
        "country": "DEU",
        "kg_co2_per_kwh": carbon_intensity("DEU")[0],
        "kg_co2_per_kwh_source": carbon_intensity("DEU")[1],
        "missing": {
            "cpu": f"no RAPL zone package* under {zones.root}",
            "dram": f"no RAPL zone dram* under {zones.root}",
            "kg_co2": "no energy was measured",
        },
    }


def test_the_first_process_of_a_machine_alone_reads_its_processors(zones, monkeypatch):
    zones.add("intel-rapl:0", "package-0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    meter = Meter(Processes(1, 2, torch.device("cpu")))
    zones.set("intel-rapl:0", 9_000_000)
    meter.read()
    assert meter.take() == [0.0, 0.0, 0.0]
    assert meter.missing == {}


class FakeNvml:
    """As much of pynvml as the meter asks."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules: dict[str, int] = {}
        self.initialized = False

    def nvmlInit(self):
        self.initialized = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert self.initialized
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle not in self.millijoules:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(energy, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"u{index}", name="Fake")
    )
    return fake


def gpu_meter() -> Meter:
    meter = Meter(Processes(1, 1, torch.device("cuda", 1)))
    meter.processes.device = torch.device("cpu")  # where sums are made
    return meter


def test_a_process_reads_the_gpu_that_it_computes_on(zones, nvml):
    nvml.millijoules = {"GPU-u0": 1, "GPU-u1": 5_000_000}
    meter = gpu_meter()
    nvml.millijoules = {"GPU-u0": 9_999_999, "GPU-u1": 5_250_500}
    meter.read()
    meter.settle()
    summary = meter.summary("DEU")
    assert summary["by_device"] == {"gpu": 250.5}
    assert summary["joules"] == 250.5
    assert summary["source"] == ["NVML GPU 1 (Fake)"]
    assert summary["kg_co2"] == pytest.approx(250.5 / 3.6e6 * carbon_intensity("DEU")[0])
    assert list(summary["missing"]) == ["cpu", "dram"]


def test_a_gpu_without_counter_is_named(zones, nvml):
    meter = gpu_meter()
    meter.read()
    meter.settle()
    assert meter.summary(None)["missing"]["gpu"] == "GPU 1: Not Supported"
    assert meter.summary(None)["joules"] is None


def test_a_counter_of_a_gpu_does_not_wrap(zones, nvml):
    nvml.millijoules = {"GPU-u1": 5_000_000}
    meter = gpu_meter()
    nvml.millijoules = {"GPU-u1": 1_000}  # the driver was loaded again
    meter.read()
    meter.settle()
    assert meter.summary(None)["missing"]["gpu"] == "NVML GPU 1 (Fake): went back from 5000 J to 1 J"


def test_a_resumed_run_adds_up(zones):
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    first = Meter(ALONE)
    zones.set("intel-rapl:0", 4_000_000)
    first.read()
    first.settle()
    state = json.loads(json.dumps(first.state_dict()))
    zones.set("intel-rapl:0", 50_000_000)
    second = Meter(ALONE)
    second.load_state_dict(state)
    zones.set("intel-rapl:0", 52_000_000)
    second.read()
    second.settle()
    assert second.joules() == {"cpu": 5.0}


def test_what_was_not_measured_once_is_never_a_number(zones):
    before = Meter(ALONE)
    before.settle()
    zones.add("intel-rapl:0", "package-0", 1_000_000)
    after = Meter(ALONE)
    after.load_state_dict(before.state_dict())
    zones.set("intel-rapl:0", 4_000_000)
    after.read()
    after.settle()
    assert after.joules() == {}
    assert after.summary(None)["missing"]["cpu"].startswith("no RAPL zone package* under")


def test_the_intensity_of_a_country_needs_no_network_and_leaves_no_trace(tmp_path):
    script = (
        "import socket, threading\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from train.engine.energy import carbon_intensity\n"
        "print(*carbon_intensity('FRA'))\n"
        "print(carbon_intensity('POL')[0], threading.active_count())\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stderr == ""
    french, polish = done.stdout.splitlines()
    assert "codecarbon" in french
    assert 0.01 < float(french.split()[0]) < 0.15  # nuclear power
    assert 0.4 < float(polish.split()[0]) < 1.0  # coal
    assert polish.split()[1] == "1"
    assert list(tmp_path.iterdir()) == []


def test_a_country_without_figures_is_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main([*TINY, f"--out={tmp_path / 'run'}", "--energy.country=DE"])
    error = capsys.readouterr().err
    assert "energy.country: expected one of" in error
    assert "got 'DE'" in error
    assert not (tmp_path / "run").exists()


def ticking(kind: str, joules: float) -> Counter:
    """A counter that grows with every reading."""
    readings = iter(range(10**9))
    return Counter(kind, f"fake {kind}", lambda: joules * next(readings))


def summary_and_steps(out: Path) -> tuple[dict, list[dict]]:
    run = RunFolder(out)
    steps = [record for record in run.records() if record["kind"] == "step"]
    return json.loads(run.summary.read_text())["energy"], steps


def test_a_run_without_counters_says_so(zones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain.main([*TINY, "--steps=2", "--out=run", "--energy.country=NLD"])
    summary, steps = summary_and_steps(tmp_path / "run")
    assert summary["joules"] is None
    assert summary["kg_co2"] is None
    assert summary["missing"]["kg_co2"] == "no energy was measured"
    assert "no RAPL zone" in summary["missing"]["cpu"]
    assert not any("joules" in record for record in steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["powercap", "run"]


def test_steps_are_metered_and_a_resumed_run_adds_to_them(tmp_path, monkeypatch):
    counters = []

    def find_counters(_):
        counters[:] = [ticking("cpu", 10.0)]
        return counters, {"dram": "none here"}

    def evaluate(self, make=Evaluator.__call__):
        counters[0].read()  # draws, which is no energy of the steps
        return make(self)

    monkeypatch.setattr(energy, "find_counters", find_counters)
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    options = [*TINY, "--steps=8", "--eval_every=2", "--accumulation=2"]
    pretrain.main([*options, f"--out={tmp_path / 'a'}"])
    resumed = [f"--resume={tmp_path / 'a/checkpoints/step-00000004'}", "--energy.country=NLD"]
    pretrain.main([*options, f"--out={tmp_path / 'b'}", *resumed])
    whole, steps = summary_and_steps(tmp_path / "a")
    # Two readings for two micro-batches, a third for what follows them: the log has that one a step later.
    assert [record["joules"] for record in steps] == [{"cpu": 30.0 * n - 10} for n in range(1, 9)]
    assert whole["by_device"] == {"cpu": 240.0}
    assert whole["joules"] == 240.0
    assert whole["kg_co2"] is None
    assert whole["missing"] == {"dram": "none here", "kg_co2": "energy.country is not set"}
    rest, more = summary_and_steps(tmp_path / "b")
    assert [record["joules"] for record in more] == [{"cpu": 30.0 * n - 10} for n in range(5, 9)]
    assert rest["joules"] == 240.0
    assert rest["kg_co2"] == pytest.approx(240.0 / 3.6e6 * rest["kg_co2_per_kwh"])


def pretrain_metered(arguments: list[str]) -> None:
    rank = int(os.environ["RANK"])
    counters = [ticking("gpu", 1.0 + 2.0 * rank)] + ([] if rank else [ticking("cpu", 100.0)])
    energy.find_counters = lambda _: (counters, {"dram": "denied"} if rank else {})
    pretrain.main(arguments)


def test_what_processes_read_is_summed(tmp_path):
    launch.run(pretrain_metered, [*TINY, "--steps=4", f"--out={tmp_path / 'run'}"], world=2)
    summary, steps = summary_and_steps(tmp_path / "run")
    assert summary["by_device"] == {"cpu": 800.0, "gpu": 2 * 4 * (1.0 + 3.0)}
    assert summary["joules"] == 832.0
    assert summary["source"] == ["fake cpu", "fake gpu"]
    # Memory that one machine cannot measure is not measured.
    assert summary["missing"]["dram"] == "denied"
    assert [record["joules"] for record in steps] == [
        {"cpu": 200.0 * n - 100, "gpu": 8.0 * n - 4} for n in range(1, 5)
    ]
