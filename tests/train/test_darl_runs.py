"""DARL by the pre-training script, and images from its runs."""

from pathlib import Path

import launch
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.eva import Eva

from models.darl import DARL
from train import generate, pretrain
from train.data.pretraining import Sample, build_data, collate
from train.engine.run_folder import RunFolder
from train.tasks.autoregressive import neighbours_mean
from train.tasks.families import task_of

TINY = [
    "--model=darl_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "--img_size=32",
    "--batch_size=8",
    "--steps=8",
    "--optim.warmup_steps=2",
    "--optim.blr=0.03",
    "--eval_every=4",
    "--checkpoint_every=4",
    "--device=cpu",
]
DIFFUSION = ["--darl.objective=diffusion", "--darl.gamma=[1,1]", "--darl.gamma_conditioned=true"]
DBP = ["--decor.enable=true", "--decor.sample=1"]  # every row, so that processes draw nothing of their own


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in RunFolder(folder).records() if r["kind"] == "step"]


def heldout(folder: Path) -> list[float]:
    return [r["heldout_loss"] for r in RunFolder(folder).records() if r["kind"] == "eval"]


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    """A whole decorrelated run of diffusion."""
    out = tmp_path_factory.mktemp("runs") / "diffusion"
    pretrain.main([*TINY, *DIFFUSION, *DBP, f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def mse(tmp_path_factory) -> Path:
    """A whole decorrelated run of mean squared error, with decorrelated layers."""
    out = tmp_path_factory.mktemp("runs") / "mse"
    pretrain.main([*TINY, *DBP, "--decor.form=auto", "--decor.rank=null", f"--out={out}"])
    return out


def test_neighbours_mean_on_a_grid_by_hand():
    """Two rows of three patches of one value each."""
    patches = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape(1, 6, 1)
    expected = torch.tensor([0.0, 1.0, 2.0, 1.0, (8 + 2) / 2, (16 + 4) / 2]).reshape(1, 6, 1)
    assert torch.equal(neighbours_mean(patches, (2, 3)), expected)
    assert neighbours_mean(patches[:0], (2, 3)).shape == (0, 6, 1)


def test_evaluations_tell_the_loss_without_a_model(diffusion, mse, tmp_path):
    task, model = pretrain.load_run(str(mse))
    config = task.config
    _, held_out = build_data(config.data, (32, 32), 16, config.seed)
    images = collate([held_out[i] for i in range(len(held_out))])["image"]
    target = model.targets(images)
    expected = (neighbours_mean(target, (4, 4)) - target).square().mean().item()
    for run in (diffusion, mse):
        told = [r["neighbours_loss"] for r in RunFolder(run).records() if r["kind"] == "eval"]
        assert told == pytest.approx([expected] * 3, rel=1e-5)
    pretrain.main([*TINY, *DIFFUSION, "--darl.prediction=epsilon", "--steps=2", f"--out={tmp_path / 'eps'}"])
    assert all("neighbours_loss" not in record for record in RunFolder(tmp_path / "eps").records())


def colours(path: Path) -> int:
    return len(Image.open(path).convert("RGB").getcolors(1 << 24))


def test_a_run_leaves_its_pictures(diffusion, mse):
    for path in (
        diffusion / "denoising.png",
        diffusion / "samples.png",
        mse / "predictions.png",
        mse / "samples.png",
    ):
        assert colours(path) > 100
    assert not (mse / "denoising.png").exists()
    assert not (mse / "reconstructions.png").exists()


def test_the_exported_encoder_is_the_fused_model_and_a_stock_vit(mse):
    task, model = pretrain.load_run(str(mse))
    assert isinstance(model, DARL)
    assert task.config.model == "darl_vit_tiny"
    stock = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="",
        attn_type="rope", use_abs_pos_emb=False, use_rot_pos_emb=True, rope_grid_indexing="xy",
        rope_temperature=100.0,
    ).eval()  # fmt: skip
    stock.norm.eps = 1e-6
    for block in stock.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    stock.load_state_dict(load_file(mse / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.features(images, is_causal=True)
        torch.testing.assert_close(
            stock.forward_features(images, is_causal=True), expected, rtol=1e-4, atol=1e-5
        )
        # A trained model, not the start.
        start = task.build_model().features(images, is_causal=True)
        assert not torch.allclose(start, expected, atol=1e-2)


def test_a_run_resumed_half_way_gives_the_losses_of_one_never_stopped(diffusion, tmp_path):
    half = diffusion / "checkpoints" / "step-00000004"
    pretrain.main([*TINY, *DIFFUSION, *DBP, f"--out={tmp_path / 'second'}", f"--resume={half}"])
    assert losses(tmp_path / "second") == losses(diffusion)[4:]
    assert heldout(tmp_path / "second") == heldout(diffusion)[2:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_run_of_one(diffusion, tmp_path, parallel):
    arguments = [*TINY, *DIFFUSION, *DBP, f"--parallel={parallel}", f"--out={tmp_path}/two"]
    launch.run(pretrain.main, arguments, world=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(diffusion), rel=1e-4)
    assert heldout(tmp_path / "two") == pytest.approx(heldout(diffusion), rel=1e-4)
    assert (tmp_path / "two" / "denoising.png").exists()


def test_a_seed_decides_the_noise_of_its_image():
    task = task_of(pretrain.parse([*TINY, *DIFFUSION, "--img_size=[32,16]", "--out=x"]))
    images = [Sample(torch.zeros(3, 32, 16), torch.rand(8), [], seed=seed) for seed in (5, 6, 7)]
    gamma, noise = task.collate(images)["drawn"]
    assert (gamma.shape, noise.shape) == ((3, 8), (3, 8, 3 * 8 * 8))
    # Whatever else is in the batch.
    for others in ([1], [2, 0], [1, 1, 2]):
        again = task.collate([images[i] for i in others])["drawn"]
        assert torch.equal(again[0], gamma[others])
        assert torch.equal(again[1], noise[others])
    for numbers in (gamma, noise):
        assert len(numbers.flatten(1).unique(dim=0)) == 3


def test_micro_batches_see_the_noise_of_the_whole_batch(diffusion, tmp_path):
    pretrain.main([*TINY, *DIFFUSION, *DBP, "--accumulation=2", f"--out={tmp_path / 'parts'}"])
    assert losses(tmp_path / "parts") == pytest.approx(losses(diffusion), rel=1e-4)


def test_orders_by_image_follow_the_data(tmp_path):
    random = ["--darl.order=random", "--darl.two_stream=true", "--steps=2", "--eval_every=2"]
    for parts in (1, 2):
        pretrain.main([*TINY, *random, f"--accumulation={parts}", f"--out={tmp_path / str(parts)}"])
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=mae_vit_tiny", "--darl.objective=diffusion"],
            "darl: settings of models darl_*, got model",
        ),
        (["--mae.mask_ratio=0.5"], "mae: settings of models mae_*, got model darl_vit_tiny"),
        (["--model_args={decoder_depth: 1}"], "model_args: unknown argument 'decoder_depth'"),
        (["--darl.order=random"], 'order: "random" needs two_stream'),
        (["--darl.objective=tokens"], "darl.tokenizer: expected the file of one, got None"),
        (["--model=dare_vit_tiny"], "unknown model 'dare_vit_tiny', expected one of mae_vit_tiny"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TINY, *arguments, f"--out={tmp_path / 'x'}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Images.


@pytest.mark.parametrize("known", [0, 0.5])
def test_images_are_drawn_from_a_run(diffusion, tmp_path, known, capsys):
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / "new" / f"{name}.png"
        arguments = [f"--run={diffusion}", f"--out={out}", f"--known={known}", f"--seed={seed}"]
        generate.main([*arguments, "--steps=3", "--count=2", "--device=cpu"])
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    assert f"2 images, {16 - round(16 * known)} patches each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=nothing"], "generate: run: expected the folder of a run of train/pretrain.py, got nothing"),
        (["--steps=0"], "generate: steps: expected at least 1, got 0"),
        (["--known=2"], r"generate: known: expected a part in [0, 1], got 2"),
        (["--out=x.jpg"], "generate: out: expected the name of a PNG file, got x.jpg"),
        (["--checkpoint=nothing"], "generate: no checkpoint at nothing"),
    ],
)
def test_bad_input_to_drawing_is_named(mse, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        generate.main([f"--run={mse}", f"--out={tmp_path / 'x.png'}", "--device=cpu", *arguments])
    assert message in str(stop.value.code)
    assert not list(tmp_path.iterdir())


def test_a_masked_autoencoder_draws_nothing(tmp_path):
    small = ["--model=mae_vit_tiny", "--mae.decoder=dbp", "--steps=1", "--optim.warmup_steps=0"]
    pretrain.main([*TINY, *small, f"--out={tmp_path / 'mae'}"])
    with pytest.raises(SystemExit) as stop:
        generate.main([f"--run={tmp_path / 'mae'}", f"--out={tmp_path / 'x.png'}"])
    assert "run: expected that of a model darl_vit_*, got mae_vit_tiny" in str(stop.value.code)
