"""Runs of which a plan chooses the layers: killed and resumed, exported, refused."""

from pathlib import Path

import launch
import pytest
import torch

from train import pretrain
from train.engine.run_folder import RunFolder

RUN = [
    "--model=mae_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 2}",
    "--img_size=32",
    "--batch_size=8",
    "--steps=20",
    "--optim.warmup_steps=2",
    "--optim.blr=0.03",
    "--eval_every=20",
    "--checkpoint_every=3",
    "--device=cpu",
    "--decor.enable=true",
    "--decor.sites=auto",
    "--resume=auto",
]


def records(out: Path, kind: str) -> list[dict]:
    return [record for record in RunFolder(out).records() if record["kind"] == kind]


def test_a_planned_run_killed_and_resumed_gives_the_losses_of_one_never_killed(tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain.main([*RUN, "--decor.budget=40", f"--out={whole}"])
    assert capsys.readouterr().out.count("sites by measurement") == 2
    (plan,) = records(whole, "plan")
    assert plan["step"] == 2
    assert plan["chosen"]
    assert 0 < plan["overhead"] <= 40
    # Making a plan is time that the run would not take without.
    taken = {r["step"]: r["seconds"] for r in records(whole, "step")}
    assert taken[2] < plan["seconds"] < taken[3]
    script = launch.Script(pretrain.main, [*RUN, "--decor.budget=40", f"--out={killed}"])
    launch.wait_until(lambda: len(records(killed, "step")) >= 7, script)
    script.kill()
    pretrain.main([*RUN, "--decor.budget=40", f"--out={killed}"])
    said = capsys.readouterr().out
    assert "resuming from" in said
    assert "sites by measurement" not in said  # both plans were made before
    losses = [[(r["step"], r["loss"]) for r in records(out, "step")] for out in (whole, killed)]
    assert losses[0] == losses[1]
    (again,) = records(killed, "plan")
    assert plan.pop("seconds") > 0
    assert again.pop("seconds") > 0
    assert again == plan


def test_a_planned_run_with_decorrelated_layers_exports_its_encoder(tmp_path):
    out = tmp_path / "run"
    layers = ["--decor.mode=layers", "--decor.eta=0.001", "--decor.scale_free=false", "--steps=3"]
    pretrain.main([*RUN, "--decor.budget=40", f"--out={out}", *layers])
    assert not records(out, "plan")  # only around the optimizer
    saved = out / "checkpoints" / "step-00000003" / "state.pt"
    state = torch.load(saved, map_location="cpu", weights_only=True)
    assert state["ranks"]
    for name, rank in state["ranks"].items():
        assert f"{name}.{'R' if rank is None else 'Q'}" in state["model"]
    assert (out / "encoder.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--decor.budget=0", "decor.budget: no layer could be chosen for 0 of a step"),
        ("--decor.budget=-1", "budget: expected a part of the step's time, at least 0, got -1.0"),
        ("--decor.rank=4", 'decor.rank: sites "auto" choose the ranks, too; expected null, got 4'),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_written(tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*RUN, option, f"--out={tmp_path / 'run'}"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
