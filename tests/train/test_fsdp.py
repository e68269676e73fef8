"""FSDP2 with gloo on 2 and 4 processes: training, checkpoints at other numbers of processes, restarts."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fsdp_worker
import launch
import pytest
import torch
from PIL import Image
from runs import ALONE, losses
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from train import pretrain
from train.engine import checkpoint, processes
from train.engine.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore:1 of 9 layers sampled no input")  # one weight rests


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def ranks(request, tmp_path_factory):
    """The results of every process, in the order of ranks."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    launch.processes(fsdp_worker.run, world, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def single():
    """The same training in this process alone, on whole batches."""
    results = {}
    for name, build in fsdp_worker.MODELS.items():
        torch.manual_seed(1)
        results[name] = fsdp_worker.trained(build().double())
    return results


@pytest.mark.parametrize("name", fsdp_worker.MODELS)
def test_sharded_training_equals_one_process(ranks, single, name):
    torch.manual_seed(1)
    untrained = fsdp_worker.MODELS[name]().double().state_dict()
    wanted = single[name]
    for rank in ranks:
        found = rank["trained"][name]
        torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-10, atol=0)
        torch.testing.assert_close(found["norms"], wanted["norms"], rtol=1e-10, atol=0)
        assert found["state"].keys() == wanted["state"].keys()
        moved = 0
        for key, value in wanted["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-9, atol=1e-9)
            moved += (value - untrained[key]).abs().max() > 1e-6
        assert moved > 0.8 * len(untrained)


def test_R_are_bitwise_equal_on_all_ranks_and_whole(ranks):
    for name, first in ranks[0]["trained"].items():
        ours = [key for key in first["state"] if key.endswith((".R", ".Q", ".S"))]
        assert ours
        for rank in ranks[1:]:
            assert all(torch.equal(rank["trained"][name]["state"][key], first["state"][key]) for key in ours)


def test_the_optimizers_state_is_shared_out(ranks, single):
    for name, alone in single.items():
        shares = [rank["trained"][name]["moments"] for rank in ranks]
        assert sum(shares) == alone["moments"]
        assert max(shares) < 1.2 * alone["moments"] / len(ranks)


def test_fuse_works_on_shards(ranks):
    for rank in ranks:
        for name, found in rank["fused"].items():
            torch.testing.assert_close(found["before"], found["expected"], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found["after"], found["expected"], rtol=1e-10, atol=1e-10)
            assert found["layers left"] == 0
            assert found["gradient"] > 0
            assert not any(key.endswith((".R", ".Q", ".S")) for key in found["state"]), name


@pytest.fixture(scope="module")
def whole():
    """Training by optimizers that hold R, in this process alone."""
    return {name: fsdp_worker.optimized(name) for name in fsdp_worker.OPTIMIZERS}


@pytest.mark.parametrize("name", fsdp_worker.OPTIMIZERS)
def test_optimizers_that_hold_R_train_sharded_weights_as_whole_ones(ranks, whole, name):
    wanted = whole[name]
    R = [key for key in wanted["optimizer"] if key.rpartition(".")[2] in ("decor_R", "decor_Q", "decor_S")]
    assert len(R) == 1 + 2 * (2 + 2 * 2)
    for rank in ranks:
        found = rank["optimized"][name]
        torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-10, atol=0)
        for key, value in wanted["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-8, atol=1e-8)
        first = ranks[0]["optimized"][name]
        assert all(map(torch.equal, found["R"], first["R"]))
    found = ranks[0]["optimized"][name]["optimizer"]  # a whole state is on the first process alone
    assert found.keys() == wanted["optimizer"].keys()
    for key, value in wanted["optimizer"].items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-8)
        if key in R:
            start = 0.0 if key.endswith("S") else torch.eye(*value.shape, dtype=value.dtype)
            assert (value - start).abs().max() > 1e-4
    shares = [rank["optimized"][name]["moments"] for rank in ranks]
    assert sum(shares) == wanted["moments"]
    assert max(shares) < 1.2 * wanted["moments"] / len(ranks)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    launch.processes(fsdp_worker.special, 2, folder)
    return torch.load(folder / "0.pt", weights_only=True)


def test_no_weight_stays_between_forward_and_backward(pair):
    whole = fsdp_worker.held_bytes(fsdp_worker.chain("fold"), torch.randn(70, 48))
    assert whole == 4 * (48 * 64 + 64 * 40 + 40 * 56) - 4 * 48 * 64  # the first x needs no gradient
    assert pair["kept"] == {"stock": 0, "fold": 0, "apply": 0}


@pytest.mark.parametrize("name", fsdp_worker.OPTIMIZERS)
def test_a_sharded_run_goes_on_from_its_state(pair, name):
    for how, (first, second) in pair["resumed"][name].items():
        assert torch.equal(first, second), how


def test_a_graph_can_be_walked_twice(pair):
    assert pair["twice"] == {"fold": True, "apply": True}


def test_autocast_on_sharded_weights_is_that_on_whole_ones(pair):
    torch.manual_seed(1)
    whole = fsdp_worker.trained(fsdp_worker.MODELS["folded"](), dtype=torch.float32, autocast=True)
    torch.testing.assert_close(
        pair["mixed precision"]["autocast"]["losses"], whole["losses"], rtol=1e-2, atol=0
    )


def test_weights_gathered_in_bf16(pair):
    fp32, bf16 = (pair["mixed precision"][name] for name in ("fp32", "bf16"))
    torch.testing.assert_close(bf16["losses"], fp32["losses"], rtol=0.02, atol=0)
    assert not torch.equal(bf16["losses"], fp32["losses"])
    for key, R in fp32["state"].items():
        if key.endswith(".R"):
            moved = R - torch.eye(len(R))
            assert moved.norm() > 1e-3
            assert (bf16["state"][key] - R).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("decorrelate", r"patch_embed.proj: .* call decorrelate\(model\) before fully_shard"),
        ("columns", r"expected a weight sharded by rows, Shard\(0\), got"),
        ("around columns", r"0: expected a weight sharded by rows, Shard\(0\), got"),
        ("gathered", r"it is gathered now; call reshard\(\)"),
    ],
)
def test_what_cannot_work_is_refused(pair, what, message):
    assert re.search(message, pair["refusals"][what])


# Training runs: every row is sampled, so that the number of processes changes only the order of sums.


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    images = tmp_path_factory.mktemp("images")
    for i in range(12):
        Image.effect_noise((40, 40), 20 + 10 * i).convert("RGB").save(images / f"{i:02d}.png")
    return [
        "--model=mae_vit_tiny",
        "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, decoder_embed_dim: 16,"
        " decoder_depth: 1, decoder_num_heads: 2}",
        "--img_size=32",
        "--batch_size=8",
        f"--steps={STEPS}",
        "--optim.warmup_steps=1",
        "--optim.blr=0.03",
        "--optim.clip_grad=1",
        f"--eval_every={STEPS}",
        "--checkpoint_every=2",
        "--keep=9",
        "--device=cpu",
        f"--data.source=folder:{images}",
    ]


DBP = ["--decor.enable=true", "--decor.sample=1", "--decor.rank={fc1: 8}"]
ARMS = {"plain": [], **{m: [*DBP, f"--decor.mode={m}"] for m in ("layers", "optimizer", "preconditioner")}}


def run_of(world: int, arguments: list[str]) -> None:
    """A run on `world` processes."""
    if world == 1:
        pretrain.main(arguments)
        return
    launch.run(pretrain.main, arguments, world)


def final(folder: Path) -> float:
    return [r["heldout_loss"] for r in RunFolder(folder).records() if r["kind"] == "eval"][-1]


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory):
    """Whole runs by (mode, processes, arm), each made when it is first asked for."""
    made: dict[tuple, Path] = {}
    folder = tmp_path_factory.mktemp("runs")

    def get(mode: str, world: int, arm: str = "layers") -> Path:
        key = (mode, world, arm)
        if key not in made:
            made[key] = folder / f"{mode}-{world}-{arm}"
            run_of(world, [*options, *ARMS[arm], f"--parallel={mode}", f"--out={made[key]}"])
        return made[key]

    return get


def check_like(found: Path, whole: Path, start: int = 0) -> None:
    """That a run, continued from the step `start`, equals another up to the order of sums."""
    expected = {step: loss for step, loss in losses(whole).items() if step > start}
    assert losses(found) == pytest.approx(expected, rel=2e-5)
    assert final(found) == pytest.approx(final(whole), rel=2e-5)
    encoders = [load_file(folder / "encoder.safetensors") for folder in (found, whole)]
    assert encoders[0].keys() == encoders[1].keys()
    for name, tensor in encoders[1].items():
        torch.testing.assert_close(encoders[0][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("world", "arm"), [(2, "layers"), (4, "layers"), (2, "optimizer")])
def test_a_sharded_run_is_that_of_one_process(runs, world, arm):
    whole = runs("ddp", 1, arm)
    assert len(set(losses(whole).values())) == STEPS
    check_like(runs("fsdp", world, arm), whole)
    saved = runs("fsdp", world, arm) / "checkpoints" / f"step-{STEPS:08d}"
    sizes = [path.stat().st_size for path in saved.glob("*.safetensors")]
    assert len(sizes) == world


@pytest.mark.parametrize(
    ("writer", "reader", "arm"),
    [
        (("fsdp", 2), ("ddp", 1), "layers"),
        (("fsdp", 2), ("fsdp", 4), "layers"),
        (("fsdp", 4), ("ddp", 2), "layers"),
        (("ddp", 1), ("fsdp", 4), "plain"),
        (("fsdp", 2), ("ddp", 1), "optimizer"),
        (("ddp", 1), ("fsdp", 2), "optimizer"),
    ],
    ids=str,
)
def test_checkpoints_load_in_the_other_mode_and_at_other_numbers(
    runs, options, tmp_path, writer, reader, arm
):
    saved = runs(*writer, arm) / "checkpoints" / "step-00000002"
    mode, world = reader
    out = tmp_path / "continued"
    run_of(world, [*options, *ARMS[arm], f"--parallel={mode}", f"--resume={saved}", f"--out={out}"])
    check_like(out, runs("ddp", 1, arm), start=2)


def test_a_step_that_is_bad_on_one_process_is_skipped_by_all(runs, options, tmp_path):
    out = tmp_path / "run"
    arguments = [*options, *ARMS["layers"], "--parallel=fsdp", f"--out={out}"]
    launch.run(fsdp_worker.pretrain_with_a_bad_batch, arguments, world=2)
    records = list(RunFolder(out).records())
    assert [r["step"] for r in records if r["kind"] == "skip"] == [3]
    assert losses(out).keys() == {1, 2, 4, 5, 6}
    assert all(loss == losses(runs("fsdp", 2))[step] for step, loss in losses(out).items() if step < 3)


def test_divergence_of_sharded_weights_ends_the_run(options, tmp_path):
    out = tmp_path / "run"
    arguments = [*options, "--parallel=fsdp", "--optim.blr=1e38", "--max_bad_steps=2", f"--out={out}"]
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        launch.run(pretrain.main, arguments, world=2)
    assert [r["in_a_row"] for r in RunFolder(out).records() if r["kind"] == "skip"] == [1, 2]


def test_a_process_that_dies_while_it_saves_leaves_nothing_half(tmp_path):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch.processes(fsdp_worker.die_while_saving, 2, tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".writing-00000002", "step-00000001"]
    path, state = checkpoint.newest(folder, ALONE)
    assert (path.name, state["step"]) == ("step-00000001", 1)
    checkpoint.rewind(folder, state["step"])
    assert list(folder.iterdir()) == [path]


def test_torchrun_restarts_a_run_whose_worker_is_killed(runs, options, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=2", str(ROOT / "train" / "pretrain.py"), *options, *ARMS["layers"]]
    launcher = subprocess.Popen(
        [*command, "--parallel=fsdp", "--resume=auto", f"--out={out}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    launch.wait_until(lambda: 3 in losses(out), launcher)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0
    assert re.search(r"resuming from \S+, step (2|4)\n", output)
    assert losses(out) == losses(runs("fsdp", 2))
    assert final(out) == final(runs("fsdp", 2))
    assert not list((out / "checkpoints").glob(".*"))


def test_several_machines_must_be_able_to_restart(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        processes.start("cpu")
