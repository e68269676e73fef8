"""The pre-training script: whole runs, resumed runs, several processes, bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import timm
import torch
from PIL import Image
from runs import ALONE, ENVIRONMENT, TINY, losses
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing import ProcessExitedException

import train.data.pretraining
import train.engine.loop
from dbpkern.stock import StockLayer
from train import pretrain
from train.engine import checkpoint
from train.engine.run_folder import RunFolder

SCRIPT = str(Path(__file__).parents[2] / "train" / "pretrain.py")
SITES = ["--decor.sites=sublayers", "--decor.encoder_only=true"]
# The published rule, by an optimizer that holds R; "--decor.enable=true" alone is the default rule.
DBP = [
    "--decor.enable=true",
    *SITES,
    "--decor.eta=0.002",
    "--decor.follow=false",
    "--decor.scale_free=false",
    "--decor.limit=null",
    "--decor.every=1",
    "--decor.rank=null",
]


def heldout(folder: Path) -> list[tuple]:
    records = (r for r in RunFolder(folder).records() if r["kind"] == "eval")
    return [(r["step"], r["heldout_loss"], r["decorrelation_loss"]) for r in records]


def weights(saved: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint that one process wrote."""
    (file,) = saved.glob("*.safetensors")
    tensors = load_file(file)
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole decorrelated run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.main([*TINY, *DBP, f"--out={out}"])
    return out


def test_a_run_leaves_everything_it_promises(finished):
    run = RunFolder(finished)
    assert list(losses(finished)) == list(range(1, 25))
    evals = [r for r in run.records() if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 8, 16, 24]
    sites = ["patch_embed.proj", *(f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "mlp.fc1"))]
    assert list(evals[0]["decorrelation_loss"]) == sites
    for name in ("curves.png", "reconstructions.png", "correlation.png"):
        low, high = Image.open(finished / name).convert("L").getextrema()
        assert high - low > 100, f"{name} is blank"
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 24
    assert summary["skipped_steps"] == 0
    assert summary["final_loss"] == pytest.approx(sum(losses(finished).values()) / 24)
    assert summary["heldout_loss"] == evals[-1]["heldout_loss"]
    assert summary["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in board.Images("reconstructions")] == [0, 8, 16, 24]
    assert len(board.Scalars("step/loss")) == 24
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000020", "step-00000024"]
    assert run.files.read_text().splitlines()[:2] == ["astronaut.png", "brick.png"]


def test_the_exported_encoder_is_a_stock_vit(finished):
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    vit.load_state_dict(load_file(finished / "encoder.safetensors"), strict=True)
    state = weights(finished / "checkpoints" / "step-00000024")
    assert torch.equal(vit.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("form", ["fold", "apply"])
def test_decorrelated_layers_are_fused_into_the_exported_encoder(form, tmp_path):
    out = tmp_path / "run"
    layers = ["--decor.mode=layers", f"--decor.form={form}", "--steps=4", "--eval_every=4"]
    pretrain.main([*TINY, *DBP, "--decor.eta=0.02", *layers, f"--out={out}"])
    state, name = weights(out / "checkpoints" / "step-00000004"), "blocks.1.attn.qkv"
    assert (state[f"{name}.R"] - torch.eye(32)).abs().max() > 1e-4
    folded = state[f"{name}.weight"] @ state[f"{name}.R"]
    encoder = load_file(out / "encoder.safetensors")
    torch.testing.assert_close(encoder[f"{name}.weight"], folded, rtol=0, atol=1e-6)


def test_low_rank_sites_train_and_fuse(tmp_path):
    out = tmp_path / "run"
    ranks = ["--decor.mode=layers", "--decor.sites=all", "--decor.rank={fc1: 5, fc2: 7}", "--decor.eta=0.02"]
    pretrain.main([*TINY, *DBP, *ranks, "--steps=4", "--eval_every=4", f"--out={out}"])
    state = weights(out / "checkpoints" / "step-00000004")
    assert state["blocks.0.mlp.fc2.Q"].shape == (128, 7)
    Q, S = state["blocks.1.mlp.fc1.Q"], state["blocks.1.mlp.fc1.S"]
    assert S.shape == (5, 5)
    assert S.abs().max() > 1e-4
    assert "blocks.0.attn.qkv.R" in state
    # Ranks by site are the same setting when they are read again.
    resumed = [*TINY, *DBP, *ranks, "--steps=4", "--eval_every=4", f"--out={out}", "--resume=auto"]
    pretrain.main(resumed)
    with pytest.raises(SystemExit):
        pretrain.main([*resumed, "--decor.rank={fc1: 5, fc2: 8}"])
    encoder = load_file(out / "encoder.safetensors")
    weight = state["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(encoder["blocks.1.mlp.fc1.weight"], weight + weight @ Q @ S @ Q.T)


def test_the_same_configuration_gives_the_same_run(finished, tmp_path):
    pretrain.main([f"--config={finished / 'config.yaml'}", f"--out={tmp_path / 'again'}"])
    assert losses(tmp_path / "again") == losses(finished)


def test_plain_and_decorrelated_arms_start_alike_and_see_the_same_data(finished, tmp_path):
    out = tmp_path / "plain"
    pretrain.main([*TINY, *SITES, f"--out={out}"])
    assert losses(out)[1] == losses(finished)[1]
    assert losses(out)[24] != losses(finished)[24]
    assert (out / "files.txt").read_text() == (finished / "files.txt").read_text()
    # Also the plain arm reports the correlations of the inputs.
    record = [r for r in RunFolder(out).records() if r["kind"] == "eval"][-1]
    assert set(record["decorrelation_loss"]) == {
        name for r in RunFolder(finished).records() if r["kind"] == "eval" for name in r["decorrelation_loss"]
    }


def test_by_default_dbp_works_around_the_optimizer_and_resumes_exactly(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = ["--decor.enable=true", "--decor.every=3"]
    pretrain.main([*TINY, *settings, f"--out={straight}"])
    run = [*TINY, *settings, f"--out={killed}", "--resume=auto"]
    script = launch.Script(pretrain.main, run)
    launch.wait_until(lambda: 14 in losses(killed), script)
    script.kill()
    pretrain.main(run)
    assert losses(killed) == losses(straight)
    assert heldout(killed) == heldout(straight)
    # The model is the plain one throughout: what is exported is what was trained.
    state = load_file(straight / "encoder.safetensors")
    assert not any(name.endswith((".R", ".Q", ".S")) for name in state)
    plain = tmp_path / "plain"
    pretrain.main([*TINY, f"--out={plain}"])
    assert losses(plain)[1] == losses(straight)[1]
    assert losses(plain)[24] != losses(straight)[24]


@pytest.mark.parametrize("optimizer", ["muon", "kron"])
def test_rivals_train_and_resume_with_and_without_dbp(optimizer, tmp_path):
    found = []
    for name, settings in (("plain", []), ("dbp", ["--decor.enable=true"])):
        out = tmp_path / name
        rival = [f"--optim.name={optimizer}", "--optim.blr=0.06", *settings]
        pretrain.main([*TINY, *rival, "--steps=6", f"--out={out}"])
        found.append(losses(out))
        shutil.rmtree(out / "checkpoints" / "step-00000006")
        pretrain.main([*TINY, *rival, "--steps=6", f"--out={out}", "--resume=auto"])
        assert losses(out) == found[-1]
        assert found[-1][6] < found[-1][1]
    assert found[0] != found[1]


def test_a_run_killed_twice_gives_the_losses_of_one_never_killed(finished, tmp_path):
    out = tmp_path / "killed"
    run = [*TINY, *DBP, f"--out={out}", "--resume=auto"]
    for step in (7, 17):
        script = launch.Script(pretrain.main, run)
        launch.wait_until(lambda step=step: step in losses(out), script)
        script.kill()
    assert "resuming from" in launch.run(pretrain.main, run)
    assert losses(out) == losses(finished)
    assert heldout(out) == heldout(finished)
    encoders = [load_file(folder / "encoder.safetensors") for folder in (out, finished)]
    assert all(torch.equal(encoders[0][name], tensor) for name, tensor in encoders[1].items())


def test_sigterm_saves_on_two_processes_and_one_process_can_go_on(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    arguments = [*DBP, "--decor.sample=1", "--checkpoint_every=1000", "--steps=30"]
    arguments.append("--data.workers=1")  # the loaders get the signal, too
    pretrain.main([*TINY, *arguments, f"--out={whole}"])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*start, SCRIPT, *TINY, *arguments, f"--out={out}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    launch.wait_until(lambda: 2 in losses(out), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "The last good checkpoint is" in output
    (saved,) = (out / "checkpoints").iterdir()
    step = checkpoint.load(saved, ALONE)["step"]
    assert step == max(losses(out)) < 30
    pretrain.main([*TINY, *arguments, f"--out={out}", "--resume=auto"])
    # Every row is sampled, so that the number of processes changes only the order of sums.
    assert list(losses(out)) == list(losses(whole))
    assert list(losses(out).values()) == pytest.approx(list(losses(whole).values()), rel=2e-5)


def test_accumulation_changes_only_rounding(tmp_path):
    runs = []
    for name, accumulation in (("one", 1), ("four", 4)):
        pretrain.main(
            [*TINY, *DBP, "--decor.sample=1", f"--accumulation={accumulation}", f"--out={tmp_path / name}"]
        )
        runs.append(list(losses(tmp_path / name).values()))
    assert runs[0] == pytest.approx(runs[1], rel=2e-5)


def test_a_single_bad_step_is_skipped_counted_and_logged(tmp_path, monkeypatch):
    real = train.engine.loop.nn.utils.clip_grad_norm_
    calls = []

    def once_infinite(*arguments):
        calls.append(1)
        norm = real(*arguments)
        return torch.full_like(norm, torch.inf) if len(calls) == 3 else norm

    monkeypatch.setattr(train.engine.loop.nn.utils, "clip_grad_norm_", once_infinite)
    pretrain.main([*TINY, *DBP, f"--out={tmp_path / 'run'}"])
    records = list(RunFolder(tmp_path / "run").records())
    assert [r["step"] for r in records if r["kind"] == "skip"] == [3]
    assert list(losses(tmp_path / "run")) == [step for step in range(1, 25) if step != 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1


def test_samples_that_are_not_finite_halve_their_layers_eta_and_are_logged(tmp_path, monkeypatch):
    real = StockLayer.take_rows
    seen = []

    def once_overflown(self, out, x, index):
        real(self, out, x, index)
        if self.weight.shape == (128, 32):  # fc1 of the encoder's two blocks
            seen.append(1)
            if len(seen) == 4:  # of the second, in the second step
                out.fill_(torch.inf)

    monkeypatch.setattr(StockLayer, "take_rows", once_overflown)
    pretrain.main([*TINY, "--decor.enable=true", "--decor.every=1", f"--out={tmp_path / 'run'}"])
    records = list(RunFolder(tmp_path / "run").records())
    logged = {r["step"]: r.get("caution") for r in records if r["kind"] == "eval"}
    halved = {"blocks.1.mlp.fc1": 0.5}
    assert logged == {0: None, 8: halved, 16: halved, 24: halved}
    assert len(losses(tmp_path / "run")) == 24


def test_divergence_stops_names_the_matrix_and_leaves_a_good_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TINY, *DBP, "--decor.eta=0.02", "--steps=200", "--max_bad_steps=3", f"--out={out}"])
    message = str(stop.value)
    assert "3 steps in a row" in message
    assert "decorrelation matrix" in message
    assert ".R" in message
    assert "smaller --decor.eta" in message
    skips = [r for r in RunFolder(out).records() if r["kind"] == "skip"]
    assert [r["in_a_row"] for r in skips] == [1, 2, 3]
    path, state = checkpoint.newest(out / "checkpoints", ALONE)
    assert 0 < state["step"] < skips[0]["step"]
    assert f"step-{state['step']:08d}" in message
    assert all(torch.isfinite(tensor).all() for tensor in weights(path).values())


def test_divergence_of_the_weights_is_told_apart(tmp_path):
    with pytest.raises(SystemExit, match=r"smaller --optim\.blr"):
        pretrain.main([*TINY, "--optim.blr=1e38", "--max_bad_steps=2", f"--out={tmp_path / 'run'}"])


def split_with(name: str):
    """The usual split, with one more file held out."""
    real = train.data.pretraining.split_files

    def split(names, load, part):
        training, held_out = real([n for n in names if n != name], load, part)
        return training, [*held_out, name]

    return split


def test_a_folder_with_broken_files_trains_and_lists_them(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.effect_noise((40, 40), 40 + i).convert("RGB").save(images / f"{i:02d}.png")
    for i in (3, 7):
        (images / f"{i:02d}.png").write_bytes(b"not an image")
    # Broken and the first in line to be held out.
    monkeypatch.setattr(train.data.pretraining, "split_files", split_with("held.png"))
    (images / "held.png").write_bytes(b"not an image")
    pretrain.main([*TINY, f"--data.source=folder:{images}", "--data.workers=2", f"--out={tmp_path / 'run'}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["unreadable_files"]) == {"03.png", "07.png", "held.png"}
    assert summary["unreadable"] == 3


def test_a_finished_run_can_be_resumed_on_two_processes(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "encoder.safetensors").unlink()  # as if the run had been killed before it was written
    launch.run(pretrain.main, [*TINY, *DBP, f"--out={out}", "--resume=auto"], world=2)
    assert (out / "encoder.safetensors").exists()
    assert losses(out) == losses(finished)
    assert [step for step, *_ in heldout(out)] == [0, 8, 16, 24]
    assert heldout(out)[-1][1] == pytest.approx(heldout(finished)[-1][1], rel=1e-5)


def test_a_run_killed_over_its_first_file_can_start_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.writing").write_text("model: ma")
    pretrain.main([*TINY, f"--out={out}", "--resume=auto", "--steps=2"])
    assert list(losses(out)) == [1, 2]


def test_profile_writes_a_trace_for_tensorboard(tmp_path):
    pretrain.main([*TINY, *DBP, "--profile=true", f"--out={tmp_path / 'run'}"])
    (trace,) = (tmp_path / "run" / "tb").glob("*.pt.trace.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("DecorAdamW.step" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=mae_vit_giant"], "unknown model 'mae_vit_giant'"),
        (["--mae.decoder=none"], "unknown decoder 'none'"),
        (["--model_args={width: 3}"], "unknown argument 'width'"),
        (["--model_args={depth: 2.5}"], "depth: expected a whole number, got 2.5"),
        (["--mae.mask_ratio=0.99"], "keeps none of 16 patches"),
        (["--optim.warmup_steps=-1"], "warmup_steps: expected a finite number >= 0"),
        (["--optim.warmup_steps=25"], "warm-up of 25 steps is longer than the run of 24"),
        ([*DBP, "--batch_size=2", "--accumulation=4"], "multiple of"),
        (["--decor.sites=[fc3]"], "sites: expected a preset"),
        (["--data.source=foo"], "source must be"),
        (["--data.fraction=2"], "fraction must be"),
        (["--img_size=30"], "30"),
        (["--mae.mask_ratio=1"], r"mae\.mask_ratio: expected a number in \(0, 1\), got 1"),
        (["--mae.mask_ratio=.nan"], "mask_ratio"),
        (["--parallel=fsdp", "--optim.name=muon"], "parallel: muon works on whole matrices"),
        (["--steps=0"], "steps: expected at least 1, got 0"),
        (["--batch_size=9", "--accumulation=2"], "multiple of"),
        (["--optim.blr=.nan"], "optim.blr: expected a finite number"),
        (["--optim.clip_grad=-1"], "optim.clip_grad"),
        ([*DBP, "--decor.sites=[qkv,mlp]"], "sites: expected a preset"),
        ([*DBP, "--decor.sample=0"], r"sample: expected a fraction in \(0, 1\], got 0"),
        ([*DBP, "--decor.sample=1.5"], "sample: expected a fraction"),
        ([*DBP, "--decor.sample=0.001"], "gives no rows"),
        ([*DBP, "--decor.eta=.nan"], "eta: expected a finite number"),
        ([*DBP, "--decor.eta=-1"], "eta: expected a finite number"),
        ([*DBP, "--decor.kappa=2"], r"kappa: expected a number in \[0, 1\], got 2"),
        ([*DBP, "--decor.kappa=.nan"], "kappa"),
        ([*DBP, "--decor.rank=33"], "rank: expected an integer in"),
        ([*DBP, "--decor.rank={fc2: 4}"], "fc2"),
        (["--data.source=folder:/does/not/exist"], "no such folder"),
        (["--resume=/does/not/exist"], "no checkpoint at"),
        (["--device=cuda"], "needs a GPU"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    if arguments == ["--device=cuda"] and torch.cuda.is_available():
        arguments, message = ["--device=cuda", "--mae.mask_ratio=0"], "mask_ratio"
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TINY, *arguments, f"--out={out}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pretrain: ")
    assert re.search(message, error), error
    assert not out.exists()


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        pretrain.main([*TINY, f"--data.source=folder:{tmp_path / 'empty'}", f"--out={tmp_path / 'run'}"])
    assert "no image file" in capsys.readouterr().err


def test_other_peoples_folders_and_other_runs_are_left_alone(finished, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    for arguments, message in (
        (DBP, "holds a run; continue it with --resume auto"),
        ([*DBP, "--decor.eta=0.02", "--resume=auto"], "decor.eta was 0.002, is 0.02"),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrain.main([*TINY, *arguments, f"--out={finished}"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        pretrain.main([*TINY, f"--out={tmp_path}"])
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path, capsys):
    path = finished / "checkpoints" / "step-00000020"
    with pytest.raises(SystemExit):
        pretrain.main([*TINY, f"--out={tmp_path / 'run'}", f"--resume={path}"])
    assert "decor.enable was True, is False" in capsys.readouterr().err


def test_a_named_checkpoint_continues_in_another_folder(finished, tmp_path):
    path = finished / "checkpoints" / "step-00000020"
    pretrain.main([*TINY, *DBP, f"--out={tmp_path / 'run'}", f"--resume={path}"])
    assert losses(tmp_path / "run") == {step: losses(finished)[step] for step in range(21, 25)}


def test_damaged_checkpoints_are_named_or_passed_over(finished, tmp_path, capsys):
    run = tmp_path / "run"
    pretrain.main([*TINY, *DBP, f"--out={run}"])
    newest = run / "checkpoints" / "step-00000024"
    (tensors,) = newest.glob("*.safetensors")
    for file, damage, message in (
        (tensors, lambda content: content[: len(content) // 2], "is truncated"),
        (tensors, lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is corrupted: its SHA-256"),
        (newest / "state.pt", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is corrupted: its"),
        (newest / "meta.json", lambda content: b'{"step": 24}', "meta.json is corrupted"),
        (newest / "state.pt", None, "is not a whole checkpoint: state.pt is missing"),
    ):
        content = file.read_bytes()
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage(content))
        with pytest.raises(SystemExit):
            pretrain.main([*TINY, *DBP, f"--out={tmp_path / 'a'}", f"--resume={newest}"])
        assert message in capsys.readouterr().err
        if damage is not None:
            file.write_bytes(content)
    pretrain.main([*TINY, *DBP, f"--out={run}", "--resume=auto"])
    out = capsys.readouterr().out
    assert "passing over a damaged checkpoint" in out
    assert "step 20" in out
    assert losses(run) == losses(finished)


def test_a_checkpoint_cut_off_while_it_is_written_does_not_count(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"step": 1, "weight": torch.arange(3.0)}, 2, ALONE)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {"step": 2, "weight": torch.ones(3)}, 2, ALONE)
    path, state = checkpoint.newest(tmp_path, ALONE)
    assert (path.name, state["step"], state["weight"].shape) == ("step-00000001", 1, (3,))
    state["weight"] = torch.empty(3)
    checkpoint.fill(path, state, ALONE)
    assert state["weight"].tolist() == [0, 1, 2]
    checkpoint.rewind(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_loading_a_checkpoint_runs_no_code_from_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = checkpoint.save(tmp_path, 1, {"step": Evil(), "weight": torch.ones(1)}, 1, ALONE)
    with pytest.raises(checkpoint.CheckpointError, match="holds more than plain data"):
        checkpoint.load(path, ALONE)
    assert not (tmp_path / "ran").exists()


def test_more_processes_than_data(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(images / f"{i}.png")
    arguments = [*TINY, f"--data.source=folder:{images}", f"--out={tmp_path / 'run'}"]
    script = launch.Script(pretrain.main, arguments, world=2)
    with pytest.raises(ProcessExitedException, match="exit code 2"):
        script.wait()
    assert "2 processes are more than the 1 training samples" in script.output
    assert not (tmp_path / "run").exists()


def test_help_explains_every_option():
    help_ = [sys.executable, SCRIPT, "--help"]
    done = subprocess.run(help_, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for option in ("--out", "--decor.eta", "--data.source", "--optim.blr", "--resume"):
        assert option in done.stdout
    assert "Rate of the decorrelation step." in done.stdout
