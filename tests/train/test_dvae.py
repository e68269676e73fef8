"""The discrete VAE: the model, its file, its training script, and DARL on its codes."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from models.dvae import DiscreteVae, create_dvae, load_tokenizer, packed_tokenizer
from models.vit import patchify
from train import pretrain, tokenizer
from train.data.pretraining import DataConfig, build_data
from train.engine.run_folder import RunFolder

SIZE = {"img_size": (8, 12), "patch_size": (4, 2), "vocabulary": 10, "width": 8, "depth": 1}
TINY = [
    "--img_size=16",
    "--optim.blr=0.16",
    "--batch_size=16",
    "--eval_every=30",
    "--checkpoint_every=30",
    "--device=cpu",
]
TOKENIZER = [
    *TINY,
    "--model=dvae_tiny",
    "--model_args={patch_size: 4, width: 32, vocabulary: 32, depth: 1}",
    "--steps=60",
]
DARL = [
    *TINY,
    "--model=darl_vit_tiny",
    "--model_args={patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}",
    "--optim.warmup_steps=1",
    "--optim.blr=0.016",
    "--steps=4",
]


@pytest.fixture
def model() -> DiscreteVae:
    return DiscreteVae(**SIZE)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 12)


# The model


def test_shapes(model, images):
    loss, made, logits = model(images, 1.0)
    assert (loss.shape, made.shape, logits.shape) == ((), images.shape, (3, 12, 10))
    assert loss.dtype == made.dtype == logits.dtype == torch.float32
    codes = model.codes(images)
    assert (codes.shape, codes.dtype) == ((3, 12), torch.int64)
    assert torch.equal(codes, logits.argmax(-1))
    assert (model.vocabulary, model.patch_size) == (10, (4, 2))


def test_codes_are_in_raster_order_and_of_their_surroundings(model, images):
    # With one residual block, an entry is decided by its patch and the eight around.
    changed = images.clone()
    changed[:, :, :4, :2] += 10
    moved = (model.logits(changed) != model.logits(images)).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [0, 1, 6, 7]  # of rows of six


def test_every_parameter_gets_a_gradient(model, images):
    model(images, 0.5)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_without_a_temperature_it_codes_and_decodes(model, images):
    _, made, _ = model(images)
    assert torch.equal(made, model.decode(model.codes(images)))
    assert torch.equal(made, model(images)[1])
    assert not torch.equal(model(images, 1.0)[1], model(images, 1.0)[1])


def test_a_low_temperature_draws_entries_by_their_chances(model, images):
    # Without residual blocks, a patch of the reconstruction is a function of its entry alone.
    model.decoder = torch.nn.Sequential()
    with torch.no_grad():
        chances = model.logits(images[:1])[0, 0].softmax(-1)
        made = patchify(model(images[:1].expand(4000, -1, -1, -1), 1e-4)[1], model.patch_size)[:, 0]
        entries = torch.arange(10)[:, None].expand(-1, 12)
        each = patchify(model.decode(entries), model.patch_size)[:, 0]
    drawn = torch.cdist(made, each).argmin(1).bincount(minlength=10) / 4000
    assert torch.allclose(drawn, chances, atol=0.03)


def test_the_loss_by_hand(images):
    model = DiscreteVae(**SIZE, kl_weight=3.0)
    loss, made, logits = model(images)
    error = sum((a - b) ** 2 for a, b in zip(made.flatten().tolist(), images.flatten().tolist(), strict=True))
    divergences = []
    for row in logits.flatten(0, 1).tolist():
        total = sum(math.exp(score) for score in row)
        q = [math.exp(score) / total for score in row]
        divergences.append(sum(p * math.log(p * 10) for p in q))
    divergence = sum(divergences) / len(divergences)
    assert loss.item() == pytest.approx(error / images.numel() + 3 * divergence / (4 * 2 * 3), rel=1e-5)


def test_no_divergence_of_uniform_scores_and_the_most_of_certain_ones(model, images):
    torch.nn.init.zeros_(model.scores.weight)
    torch.nn.init.zeros_(model.scores.bias)
    for temperature in (None, 1.0):
        loss, made, _ = model(images, temperature)
        assert loss.item() == pytest.approx(F.mse_loss(made, images).item(), rel=1e-6)
    model.scores.bias.data[3] = 100
    loss, made, _ = model(images)
    assert loss.item() == pytest.approx(F.mse_loss(made, images).item() + math.log(10) / 24, rel=1e-5)


def test_other_sizes_of_images(model):
    images = torch.randn(2, 3, 16, 4)
    codes = model.codes(images)
    assert codes.shape == (2, 8)
    assert torch.equal(model.decode(codes, (4, 2)), model(images)[1])


def test_codes_are_the_same_under_autocast(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        loss, made, logits = model(images, 1.0)
        assert loss.dtype == made.dtype == logits.dtype == torch.float32
        codes = model.codes(images)
    assert torch.equal(codes, model.codes(images))


def test_temperatures_of_a_compiled_model_share_a_graph(model, images):
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    for temperature in (1.0, 0.5, 0.25):
        compiled(images, torch.tensor(temperature))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 1}, "vocabulary: expected at least 2, got 1"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"depth": -1}, "depth: expected at least 0, got -1"),
        ({"in_chans": 0}, "in_chans: expected at least 1, got 0"),
        ({"patch_size": 5}, "img_size must be divisible by patch_size"),
        ({"kl_weight": -1}, "kl_weight: expected a finite number >= 0, got -1"),
        ({"kl_weight": math.nan}, "kl_weight: expected a finite number >= 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiscreteVae(**{**SIZE, **arguments})


def test_bad_images_and_codes(model, images):
    for bad, message in (
        (images[:, :1], "[B, 3, H, W], got [3, 1, 8, 12]"),
        (images[..., 1:], "multiples of 4 and 2, got [3, 3, 8, 11]"),
        (images[0], "[B, 3, H, W], got [3, 8, 12]"),
    ):
        for call in (model, model.codes):
            with pytest.raises(ValueError, match=re.escape(message)):
                call(bad)
    codes = model.codes(images)
    for bad, message in (
        (codes[:, 1:], "codes: expected shape [B, 12] for a grid of (2, 6), got [3, 11]"),
        (codes[0], "got [12]"),
        (codes + 10, "codes: expected numbers from 0 to 9, got "),
        (codes - 10, "codes: expected numbers from 0 to 9, got -"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.decode(bad)


def test_models_by_name():
    model = create_dvae("dvae_tiny", img_size=32, patch_size=8)
    assert (model.vocabulary, model.patch_size) == (512, (8, 8))
    with pytest.raises(ValueError, match="unknown model 'dvae_giant', expected one of dvae_tiny"):
        create_dvae("dvae_giant")
    with pytest.raises(ValueError, match="unknown argument 'widht' for dvae_tiny, expected some of img_size"):
        create_dvae("dvae_tiny", widht=3)


# The file


def test_a_tokenizer_comes_back_as_it_was(model, images, tmp_path):
    model.kl_weight = 0.25
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(packed_tokenizer(model))
    before = torch.get_rng_state()
    loaded = load_tokenizer(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for mine, theirs in zip(model(images), loaded(images), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded.patch_embed.img_size == (8, 12)
    assert packed_tokenizer(loaded) == path.read_bytes()


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*; train/tokenizer\.py makes one"):
        load_tokenizer(path)
    content = packed_tokenizer(model)
    for damaged in (b"", b"not a tokenizer", content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole tokenizer"):
            load_tokenizer(path)
    save_file(model.state_dict(), path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a whole tokenizer.*no such model's arguments"):
        load_tokenizer(path)
    path.write_bytes(content.replace(b'\\"width\\": 8', b'\\"width\\": 9'))
    with pytest.raises(
        ValueError, match=r"is not a whole tokenizer.*its tensors are not those of a model of"
    ):
        load_tokenizer(path)
    path.write_bytes(content.replace(b'\\"width\\": 8', b'\\"breit\\": 8'))
    with pytest.raises(ValueError, match=r"is not a whole tokenizer.*breit"):
        load_tokenizer(path)


# The script


def evals(folder: Path) -> list[dict]:
    return [{**r, "seconds": None} for r in RunFolder(folder).records() if r["kind"] == "eval"]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in RunFolder(folder).records() if r["kind"] == "step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a trained tokenizer."""
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    tokenizer.main([*TOKENIZER, f"--out={out}"])
    return out


def test_a_tokenizer_learns_photographs(trained):
    _, held_out = build_data(DataConfig(), (16, 16), 16, 0)
    images = torch.stack([held_out[i].image for i in range(len(held_out))])
    model = load_tokenizer(trained / "tokenizer.safetensors")
    made = model.decode(model.codes(images))
    error = (made - images).square().mean().item()
    last = evals(trained)[-1]
    assert [r["step"] for r in evals(trained)] == [0, 30, 60]
    assert last["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert last["heldout_loss"] >= last["reconstruction_error"]
    variance = (images - images.mean((0, 2, 3), keepdim=True)).square().mean().item()
    assert error < 0.9 * variance
    assert 2 < last["perplexity"] <= len(model.codes(images).unique())
    chances = model.codes(images).flatten().bincount().double() / (256 * 16)
    assert last["perplexity"] == pytest.approx(torch.special.entr(chances).sum().exp().item(), rel=1e-3)


def test_a_run_leaves_everything_it_promises(trained):
    run = RunFolder(trained)
    low, high = Image.open(trained / "reconstructions.png").convert("L").getextrema()
    assert high - low > 100
    assert {"curves.png", "correlation.png"} <= {p.name for p in trained.iterdir()}
    assert not (trained / "encoder.safetensors").exists()
    summary = json.loads(run.summary.read_text())
    assert summary["heldout_loss"] == evals(trained)[-1]["heldout_loss"]
    assert "energy" in summary
    assert summary["parameters"] == sum(
        p.numel() for p in load_tokenizer(trained / "tokenizer.safetensors").parameters()
    )
    assert run.read_config()["optim"]["weight_decay"] == 1e-4


def test_a_resumed_run_is_the_same_bit_for_bit(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    (out / "tokenizer.safetensors").unlink()
    tokenizer.main([*TOKENIZER, f"--out={out}", "--resume=auto"])
    assert losses(out) == losses(trained)
    assert evals(out) == evals(trained)
    name = "tokenizer.safetensors"
    assert (out / name).read_bytes() == (trained / name).read_bytes()


def test_the_temperature_falls_from_1_to_a_sixteenth(monkeypatch, tmp_path):
    seen = []
    real = F.gumbel_softmax

    def spy(logits, temperature):
        seen.append(float(temperature))
        return real(logits, temperature)

    monkeypatch.setattr(F, "gumbel_softmax", spy)
    out = tmp_path / "run"
    tokenizer.main([*TOKENIZER, "--steps=4", "--accumulation=2", f"--out={out}"])
    cosine = [1 / 16 + 15 / 16 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert seen == pytest.approx([t for t in cosine for _ in range(2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=mae_vit_tiny"], "model: expected dvae_tiny, dvae_small or dvae_base, got mae_vit_tiny"),
        (["--model=dvae_giant"], "unknown model 'dvae_giant'"),
        (["--model_args={embed_dim: 8}"], "unknown argument 'embed_dim'"),
        (["--dvae.kl_weight=-1"], "kl_weight: expected a finite number >= 0, got -1"),
        (["--decor.enable=true", "--decor.sites=[qkv]"], "site 'qkv' matches no layer"),
        (["--img_size=18"], "img_size must be divisible by patch_size"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        tokenizer.main([*TOKENIZER, *arguments, f"--out={out}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenizer: ")
    assert message in error
    assert not out.exists()


def test_help_is_of_this_script(capsys):
    with pytest.raises(SystemExit):
        tokenizer.main(["--help"])
    shown = capsys.readouterr().out
    assert "usage: train/tokenizer.py" in shown
    assert "leaves tokenizer.safetensors" in shown
    assert "default: dvae_small" in shown


# DARL on its codes


@pytest.mark.parametrize(
    ("objective", "inputs", "picture"),
    [("tokens", "pixels", "predictions"), ("mse", "tokens", "predictions"), ("tokens", "tokens", "samples")],
)
def test_darl_runs_on_codes(trained, tmp_path, objective, inputs, picture):
    out = tmp_path / "run"
    pretrain.main(
        [
            *DARL,
            f"--darl.objective={objective}",
            f"--darl.inputs={inputs}",
            f"--darl.tokenizer={trained / 'tokenizer.safetensors'}",
            f"--out={out}",
        ]
    )
    assert len(losses(out)) == 4
    if objective == "tokens":
        assert losses(out)[0] == pytest.approx(math.log(32), rel=0.3)
    observed = evals(out)[-1]["decorrelation_loss"]
    assert ("patch_embed.proj" in observed) == (inputs == "pixels")
    assert {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} <= set(observed)
    assert (out / f"{picture}.png").is_file()
    with safe_open(out / "encoder.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("patch_embed.embedding.weight" in names) == (inputs == "tokens")


def test_darl_on_codes_with_decorrelation(trained, tmp_path):
    out = tmp_path / "run"
    path = trained / "tokenizer.safetensors"
    arguments = [*DARL, "--darl.objective=tokens", "--darl.inputs=tokens", f"--darl.tokenizer={path}"]
    pretrain.main([*arguments, "--steps=2", "--decor.enable=true", f"--out={out}"])
    assert next(iter(evals(out)[-1]["decorrelation_loss"])) == "blocks.0.attn.qkv"


def test_codes_of_images_of_another_size(trained, tmp_path):
    out = tmp_path / "run"
    path = trained / "tokenizer.safetensors"
    arguments = [*DARL, "--darl.objective=tokens", "--darl.inputs=tokens", f"--darl.tokenizer={path}"]
    pretrain.main([*arguments, "--img_size=[8, 16]", "--steps=1", f"--out={out}"])
    assert (out / "samples.png").is_file()


def test_tokenizers_that_do_not_fit_are_refused(trained, tmp_path, capsys):
    path = trained / "tokenizer.safetensors"
    for arguments, message in (
        (
            [f"--darl.tokenizer={path}", "--model_args={patch_size: 8, embed_dim: 32, num_heads: 2}"],
            "darl.tokenizer: expected codes of patches of (8, 8) pixels, got (4, 4)",
        ),
        ([f"--darl.tokenizer={tmp_path / 'none'}"], f"no tokenizer at {tmp_path / 'none'}"),
        ([f"--darl.tokenizer={trained / 'log.jsonl'}"], "log.jsonl is not a whole tokenizer.safetensors"),
        ([], "darl.tokenizer: expected the file of one, got None"),
        (
            [f"--darl.tokenizer={path}", "--darl.objective=tokens", "--decor.sites=[patch_embed]"],
            "site 'patch_embed' matches no layer",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrain.main([*DARL, "--darl.inputs=tokens", *arguments, f"--out={tmp_path / 'run'}"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
