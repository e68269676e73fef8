"""Classifiers on pre-trained encoders: whole runs, linear probes, several processes, bad input."""

import json
import math
import multiprocessing
import re
import shutil
from pathlib import Path

import launch
import pytest
import timm
import torch
from image_files import make_folder
from PIL import Image
from runs import ALONE, ARCHITECTURE, CONFIGS, SIZES, losses
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import train.engine.loop
from models import darl, mae
from models.classifier import classifier_state_dict, create_vit, load_encoder, to_classifier
from train import finetune, pretrain
from train.data.labelled import build_labelled
from train.engine import plots, processes
from train.engine.run_folder import RunFolder

PRETRAIN = [
    "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "--img_size=32",
    "--batch_size=8",
    "--steps=4",
    "--optim.warmup_steps=1",
    "--optim.blr=0.03",
    "--checkpoint_every=4",
    "--device=cpu",
]
TINY = [
    f"--config={CONFIGS / 'finetune_digits.yaml'}",
    "--img_size=32",
    "--batch_size=16",
    "--steps=6",
    "--optim.warmup_steps=2",
    "--augment.mixup=0.2",
    "--eval_every=6",
    "--checkpoint_every=3",
    "--device=cpu",
]
SCRATCH = ["--model=mae_vit_tiny", "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"]
LINEAR = ["--linear=true", "--optim.lr=0.03", "--augment.mixup=0"]
LARS = [*LINEAR, "--optim.name=lars", "--optim.lr=5", "--optim.weight_decay=0"]


def evals(folder: Path) -> list[tuple]:
    records = (r for r in RunFolder(folder).records() if r["kind"] == "eval")
    return [(r["step"], r["heldout_loss"], r["top1"], r["top5"]) for r in records]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model in the last checkpoint of a run of one process."""
    (file,) = (folder / "checkpoints" / "step-00000004").glob("*.safetensors")
    tensors = load_file(file)
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mae") / "run"
    decoder = ["--model_args.decoder_embed_dim=16", "--model_args.decoder_depth=1"]
    pretrain.main([*PRETRAIN, "--model=mae_vit_tiny", *decoder, f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def darl_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("darl") / "run"
    pretrain.main([*PRETRAIN, "--model=darl_vit_tiny", "--darl.rope_temperature=50", f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def finished(mae_run, tmp_path_factory) -> Path:
    """Fine-tuning of MAE's encoder."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    finetune.main([*TINY, f"--encoder={mae_run / 'encoder.safetensors'}", f"--out={out}"])
    return out


def test_features_of_mae_are_those_of_its_pretraining(mae_run):
    model = mae.create_mae("mae_vit_tiny", img_size=32, decoder_embed_dim=16, decoder_depth=1, **SIZES).eval()
    model.load_state_dict(final_weights(mae_run))
    imgs = torch.randn(3, 3, 32, 32)
    order = torch.arange(16.0).expand(3, -1)
    expected, _, _ = model.forward_encoder(imgs, 0.0, order)
    vit = load_encoder(mae_run / "encoder.safetensors").model.eval()
    torch.testing.assert_close(vit.forward_features(imgs), expected)


def test_features_of_darl_are_those_of_its_pretraining(darl_run):
    model = darl.create_darl("darl_vit_tiny", img_size=32, rope_temperature=50, **SIZES).eval()
    model.load_state_dict(final_weights(darl_run), strict=False)
    imgs = torch.randn(3, 3, 32, 32)
    loaded = load_encoder(darl_run / "encoder.safetensors")
    assert isinstance(loaded.model, timm.models.Eva)
    to_classifier(loaded.model, loaded.architecture, 5, "last", causal=True)
    vit = loaded.model.eval()
    torch.testing.assert_close(vit.forward_features(imgs), model.features(imgs))
    seen = vit.forward_features(imgs, attn_mask=vit.attn_mask)
    torch.testing.assert_close(seen, model.features(imgs, is_causal=True))
    assert not torch.allclose(seen, model.features(imgs), atol=1e-3)


def test_positions_of_other_image_sizes_are_resampled(mae_run):
    loaded = load_encoder(mae_run / "encoder.safetensors")
    table = loaded.model.pos_embed.detach().clone()
    to_classifier(loaded.model, loaded.architecture, 5, img_size=(48, 64))
    torch.testing.assert_close(loaded.model.pos_embed, resample_abs_pos_embed(table, (6, 8), (4, 4)))
    assert loaded.model(torch.randn(2, 3, 48, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="divisible"):
        to_classifier(loaded.model, loaded.architecture, 5, img_size=30)


def test_a_model_of_timm_trains_and_its_classifier_is_read_again(tmp_path):
    start = ["--encoder=timm:vit_tiny_patch16_224", "--pretrained=false", "--layer=1", "--steps=1"]
    finetune.main([*TINY, *start, "--optim.warmup_steps=0", f"--out={tmp_path / 'run'}"])
    loaded = load_encoder(tmp_path / "run" / "classifier.safetensors")
    assert loaded.architecture.model == "timm:vit_tiny_patch16_224"
    assert len(loaded.model.blocks) == 1
    # These weights of timm's are for pixels between -1 and 1.
    config = finetune.parse([f"--config={tmp_path / 'run' / 'config.yaml'}", f"--out={tmp_path / 'other'}"])
    image = finetune.prepare(config, ALONE).task.held_out[0].image
    assert -1.01 < image.min() < -0.9


def test_evaluation_ends_its_workers(tmp_path):
    found = []
    for workers in (0, 1):
        options = [*SCRATCH, f"--data.workers={workers}", f"--out={tmp_path}/{workers}"]
        evaluator = finetune.prepare(finetune.parse([*TINY, *options]), ALONE).evaluate
        known = set(multiprocessing.active_children())
        record = evaluator()
        assert set(multiprocessing.active_children()) == known
        found.append((record["heldout_loss"], record["top1"], record["top5"]))
    assert found[0] == found[1]


def test_the_loop_scales_the_rate_of_each_group(finished):
    (file,) = (finished / "checkpoints" / "step-00000006").glob("state.pt")
    groups = torch.load(file, weights_only=True)["optimizer"]["param_groups"]
    rate = [r["lr"] for r in RunFolder(finished).records() if r["kind"] == "step"][-1]
    assert rate > 0
    assert len({g["lr"] for g in groups}) > 2
    for group in groups:
        assert group["lr"] == pytest.approx(rate * group["lr_scale"])


@pytest.mark.parametrize("model", ["mae_vit_tiny", "darl_vit_tiny"])
def test_small_images_train_in_their_own_size(tmp_path, model):
    """Images of 32 pixels with patches of 4, from pre-training to fine-tuning, in the layout of CIFAR-10."""
    for part in ("train", "test"):
        for i, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for j in range(12):
                pixels = torch.randint(100 * i, 100 * i + 100, (32, 32, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{j}.png")
    sizes = "patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2"
    if model.startswith("mae"):
        sizes += ", decoder_embed_dim: 16, decoder_depth: 1, decoder_num_heads: 2"
    run, out = tmp_path / "run", tmp_path / "out"
    pretrain.main(
        [*PRETRAIN, f"--model={model}", f"--model_args={{{sizes}}}", f"--data.source=folder:{tmp_path}/train",
         f"--data.val={tmp_path}/test", "--data.cache=auto", f"--out={run}"]
    )  # fmt: skip
    assert len((run / "files.txt").read_text().splitlines()) == 24
    finetune.main(
        [*TINY, f"--encoder={run}/encoder.safetensors", f"--data.source=folder:{tmp_path}", "--batch_size=8",
         "--data.fraction=0.5", "--data.crop_padding=4", "--data.crop_pct=1", "--data.cache=1",
         f"--out={out}"]
    )  # fmt: skip
    files = (out / "files.txt").read_text().splitlines()
    assert [sum(name.startswith(f"train/{c}/") for name in files) for c in "ab"] == [6, 6]
    weights = load_file(out / "classifier.safetensors")
    assert weights["patch_embed.proj.weight"].shape[2:] == (4, 4)
    assert evals(out)[-1][0] == 6


def test_a_run_leaves_everything_it_promises(finished):
    run = RunFolder(finished)
    assert list(losses(finished)) == list(range(1, 7))
    assert [record[0] for record in evals(finished)] == [0, 6]
    for name in ("curves.png", "accuracy.png", "confusion.png", "correlation.png"):
        low, high = Image.open(finished / name).convert("L").getextrema()
        assert high - low > 100, f"{name} is blank"
    summary = json.loads(run.summary.read_text())
    (_, loss, top1, top5) = evals(finished)[-1]
    assert (summary["heldout_loss"], summary["top1"], summary["top5"]) == (loss, top1, top5)
    assert summary["best"]["top1"] == max(record[2] for record in evals(finished))
    assert summary["trained_parameters"] == summary["parameters"]
    assert top1 <= top5
    # The file is timm's model, and gives these figures.
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10, global_pool="avg"
    ).eval()
    vit.load_state_dict(load_file(finished / "classifier.safetensors"), strict=True)
    config = finetune.parse([f"--config={run.config}"])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    _, held_out, _ = build_labelled(config.data, config.augment, (32, 32), mean, std, 0)
    images = torch.stack([held_out[0, i].image for i in range(len(held_out))])
    labels = torch.tensor(held_out.labels)
    with torch.no_grad():
        scores = vit(images)
    assert nn.functional.cross_entropy(scores, labels).item() == pytest.approx(loss, rel=1e-5)
    assert 100 * (scores.argmax(1) == labels).double().mean().item() == pytest.approx(top1)
    hits = (scores.argsort(1)[:, 5:] == labels[:, None]).any(1)
    assert 100 * hits.double().mean().item() == pytest.approx(top5)


def test_evaluation_alone_and_further_training_start_from_a_classifier(finished, tmp_path, capsys):
    start = [f"--encoder={finished / 'classifier.safetensors'}"]
    finetune.main([*TINY, *start, "--steps=0", f"--out={tmp_path / 'eval'}"])
    assert evals(tmp_path / "eval") == [(0, *evals(finished)[-1][1:])]
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["top1"] == evals(finished)[-1][2]
    loaded = load_encoder(finished / "classifier.safetensors")
    assert (loaded.readout, loaded.classes) == ("mean", tuple("0123456789"))
    with pytest.raises(SystemExit):
        finetune.main([*TINY, *start, "--steps=0", "--readout=last", f"--out={tmp_path / 'last'}"])
    assert "steps: 0 evaluates a classifier.safetensors" in capsys.readouterr().err
    finetune.main(
        [*TINY, *start, "--steps=2", "--readout=last", "--img_size=40", f"--out={tmp_path / 'more'}"]
    )
    assert len(losses(tmp_path / "more")) == 2


def test_linear_probe_trains_the_head_alone(darl_run, tmp_path):
    out = tmp_path / "run"
    encoder = darl_run / "encoder.safetensors"
    probe = [*LINEAR, "--causal=true", "--layer=1", "--steps=30", "--eval_every=30"]
    finetune.main([*TINY, f"--encoder={encoder}", *probe, f"--out={out}"])
    before, after = load_file(encoder), load_file(out / "classifier.safetensors")
    names = [name for name in after if not name.startswith(("head", "fc_norm"))]
    assert "blocks.0.attn.qkv.weight" in names
    assert not any(name.startswith(("blocks.1", "norm")) for name in names)
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert evals(out)[-1][1] < evals(out)[0][1]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trained_parameters"] == 330
    # BatchNorm is folded into the head, and the causal mask comes with the file.
    loaded = load_encoder(out / "classifier.safetensors")
    assert loaded.causal
    assert len(loaded.model.blocks) == 1
    start = [f"--encoder={out / 'classifier.safetensors'}", "--causal=true", "--steps=0"]
    finetune.main([*TINY, *start, f"--out={tmp_path / 'eval'}"])
    assert evals(tmp_path / "eval")[0][1:] == pytest.approx(evals(out)[-1][1:], rel=1e-4)


def test_a_skipped_step_leaves_the_statistics_of_batches_as_they_were(darl_run, tmp_path, monkeypatch):
    known = []

    def broken(batch, device):
        batch = moved(batch, device)
        if len(known) == 2:
            batch["image"] = torch.full_like(batch["image"], torch.nan)
        known.append(batch["image"])
        return batch

    moved = train.engine.loop.moved
    monkeypatch.setattr(train.engine.loop, "moved", broken)
    out = tmp_path / "run"
    probe = [*LINEAR, "--steps=4", "--eval_every=4", "--checkpoint_every=4"]
    finetune.main([*TINY, f"--encoder={darl_run / 'encoder.safetensors'}", *probe, f"--out={out}"])
    assert [r["step"] for r in RunFolder(out).records() if r["kind"] == "skip"] == [3]
    assert all(tensor.isfinite().all() for tensor in load_file(out / "classifier.safetensors").values())


def test_statistics_that_are_not_finite_count_as_a_state_that_is_not():
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert all(map(math.isfinite, train.engine.loop.health(norm).values()))
    norm[1].running_var[1] = math.inf
    assert train.engine.loop.health(norm)["1.running_var"] == math.inf


def test_lars_is_that_of_mae():
    vit = create_vit(ARCHITECTURE)
    to_classifier(vit, ARCHITECTURE, 5, "class", linear=True)
    weight, bias = vit.head[1].weight, vit.head[1].bias
    assert weight.std().item() == pytest.approx(0.01, rel=0.3)
    config = finetune.parse(["--out=x", *LARS])
    optimizer, _ = finetune.build_optimizers(config, vit)
    start = weight.detach().clone()
    weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
    slopes = weight.grad.clone(), bias.grad.clone()
    for _ in range(2):  # constant gradients: the second step is by 1.9 of it
        ratio = 0.001 * weight.norm() / slopes[0].norm()
        first = weight.detach().clone()
        optimizer.step()
    momentum = 0.9 * (0.001 * start.norm() / slopes[0].norm()) + ratio
    torch.testing.assert_close(weight.detach(), first - 5 * momentum * slopes[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias.detach(), -5 * 2.9 * slopes[1])


def test_digits_are_learned_from_random_weights(tmp_path):
    arguments = ["--model=mae_vit_tiny", "--batch_size=64"]
    arguments += ["--model_args={patch_size: 16, embed_dim: 64, depth: 1, num_heads: 2}"]
    arguments += ["--optim.lr=0.01", "--optim.layer_decay=1", "--augment.mixup=0", "--eval_every=60"]
    arguments += ["--data.crop_scale=[0.9,1.0]", "--checkpoint_every=60", "--steps=60"]
    finetune.main([*TINY, *arguments, f"--out={tmp_path / 'run'}"])
    assert evals(tmp_path / "run")[-1][2] > 60
    assert evals(tmp_path / "run")[-1][3] > 90


@pytest.mark.parametrize(
    "arguments",
    [
        ["--decor.enable=true", "--drop_path=0.2"],
        ["--decor.enable=true", "--optim.name=muon"],
        LARS,
    ],
)
def test_a_resumed_run_gives_the_losses_of_one_never_stopped(mae_run, tmp_path, arguments):
    start = [*TINY, f"--encoder={mae_run / 'encoder.safetensors'}", *arguments, f"--out={tmp_path / 'run'}"]
    finetune.main(start)
    whole, figures = losses(tmp_path / "run"), evals(tmp_path / "run")
    made = load_file(tmp_path / "run" / "classifier.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    finetune.main([*start, "--resume=auto"])
    assert losses(tmp_path / "run") == whole
    assert evals(tmp_path / "run") == figures
    again = load_file(tmp_path / "run" / "classifier.safetensors")
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_decorrelation_works_in_fine_tuning(finished, mae_run, tmp_path):
    out = tmp_path / "run"
    decor = ["--decor.enable=true", "--decor.every=1"]
    finetune.main([*TINY, f"--encoder={mae_run / 'encoder.safetensors'}", *decor, f"--out={out}"])
    assert losses(out)[1] == losses(finished)[1]
    assert losses(out)[6] != losses(finished)[6]
    first, last = [r["decorrelation_loss"] for r in RunFolder(out).records() if r["kind"] == "eval"]
    assert set(first) == set(last)
    assert "blocks.1.mlp.fc2" in first
    names = set(load_file(out / "classifier.safetensors"))
    assert names == set(load_file(finished / "classifier.safetensors"))


def test_two_processes_give_the_losses_of_one(darl_run, tmp_path):
    start = [*TINY, f"--encoder={darl_run / 'encoder.safetensors'}", "--readout=last", "--augment.cutmix=1"]
    start += ["--augment.mixup=0.8", "--augment.policy=rand-m9-mstd0.5-inc1", "--augment.erase=0.25"]
    start += ["--decor.enable=true", "--decor.sample=1"]
    finetune.main([*start, "--accumulation=2", f"--out={tmp_path / 'one'}"])
    launch.run(finetune.main, [*start, f"--out={tmp_path / 'two'}"], world=2)
    one, two = tmp_path / "one", tmp_path / "two"
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=2e-5)
    for ours, theirs in zip(evals(one), evals(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # One process goes on from the checkpoint of two.
    half = two / "checkpoints" / "step-00000003"
    finetune.main([*start, f"--resume={half}", f"--out={tmp_path / 'rest'}"])
    rest = losses(tmp_path / "rest")
    assert list(rest) == [4, 5, 6]
    assert list(rest.values()) == pytest.approx(list(losses(one).values())[3:], rel=2e-5)


def probed(arguments: list[str]) -> None:
    """Train, and leave what this process's norm in front of the head has seen and found."""
    config = finetune.parse(arguments)
    procs = processes.start(config.device)
    loop = finetune.prepare(config, procs)
    norm, seen = loop.model.head[0], []
    norm.register_forward_pre_hook(
        lambda norm, args: seen.append(args[0].detach()) if norm.training else None
    )
    loop.train()
    made = {
        "seen": torch.stack(seen),
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "classifier": classifier_state_dict(loop.model),
    }
    torch.save(made, f"{config.out}/rank-{procs.rank}.pt")
    processes.stop()


def test_statistics_of_a_linear_probe_are_means_over_processes(tmp_path):
    out = tmp_path / "run"
    steps = ["--steps=2", "--optim.warmup_steps=0", "--checkpoint_every=2"]
    launch.run(probed, [*TINY, *SCRATCH, *LINEAR, *steps, f"--out={out}"], world=2)
    first, second = (torch.load(out / f"rank-{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first["seen"], second["seen"])
    for name in ("mean", "variance"):
        assert torch.equal(first[name], second[name])
    for name, tensor in first["classifier"].items():
        assert torch.equal(tensor, second["classifier"][name]), name
    mean, variance = torch.zeros(32), torch.ones(32)
    for shares in zip(first["seen"], second["seen"], strict=True):
        mean = 0.9 * mean + 0.1 * torch.stack([share.mean(0) for share in shares]).mean(0)
        variance = 0.9 * variance + 0.1 * torch.stack([share.var(0) for share in shares]).mean(0)
    torch.testing.assert_close(first["mean"], mean)
    torch.testing.assert_close(first["variance"], variance)


def test_confusion_is_drawn_in_per_cent_of_each_class():
    counts = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    figure = plots.confusion_figure(counts, ["cat", "a dog with a very long name"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[75, 25], [0, 0]]
    assert [text.get_text() for text in axis.texts] == ["75", "25"]
    assert axis.get_yticklabels()[1].get_text() == "a dog with a very l…"
    many = plots.confusion_figure(torch.eye(500), [f"class {i}" for i in range(500)])
    assert many.axes[0].images[0].get_array().shape == (250, 250)
    assert many.axes[0].get_xlim()[1] == 499.5
    assert len(many.axes[0].get_yticks()) < 30
    picture = plots.as_picture(many)
    assert picture.shape[0] == 3
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder=/does/not/exist.safetensors"], "no such encoder: /does/not/exist"),
        (["--encoder={tmp}"], "a folder, expected a file"),
        (["--encoder={tmp}/plain.safetensors"], "plain.safetensors: expected an encoder"),
        (["--encoder={tmp}/text.safetensors"], "text.safetensors cannot be read"),
        (["--encoder={tmp}/plain.pth"], "does not tell of which model it is"),
        (
            ["--encoder={tmp}/plain.pth", "--model=mae_vit_tiny"],
            r"expected a dict of weights under 'model', got \['a'\]",
        ),
        (
            ["--encoder={tmp}/head.pth", "--model=mae_vit_tiny"],
            "is not an encoder: expected patch_embed and pos_embed, got .*head",
        ),
        (
            ["--encoder={tmp}/text.safetensors.pth", "--model=mae_vit_tiny"],
            "is no checkpoint of facebookresearch/mae",
        ),
        (["--encoder={encoder}", "--model=mae_vit_base"], "says itself that it is .*mae_vit_tiny"),
        (["--encoder={encoder}", "--model_args={depth: 3}"], "expected null or the same, got .*'depth': 3"),
        (
            ["--encoder=timm:vit_tiny_patch16_224", "--model=mae_vit_tiny"],
            "model: timm:vit_tiny_patch16_224 is one itself",
        ),
        (["--encoder=timm:nonsense", "--pretrained=false"], "timm cannot build 'nonsense'"),
        ([], "encoder: expected a file or timm:NAME"),
        ([*SCRATCH, "--model=mae_vit_giant"], "unknown model 'mae_vit_giant'"),
        ([*SCRATCH, "--model_args={width: 3}"], "unknown argument 'width'"),
        ([*SCRATCH, "--layer=3"], "layer: expected 1 to 2, or null for the last, got 3"),
        ([*SCRATCH, "--layer=0"], "layer: expected 1 to 2"),
        ([*SCRATCH, "--causal=true"], "causal: expected an encoder of DARL"),
        ([*SCRATCH, "--img_size=30"], "must be divisible by patch_size"),
        ([*SCRATCH, "--data.source=folder:/does/not/exist"], "no such folder: /does/not/exist"),
        ([*SCRATCH, "--data.source=folder:{tmp}/empty"], "find any class folder"),
        ([*SCRATCH, "--data.source=folder:{tmp}/odd"], "only one has c"),
        ([*SCRATCH, "--data.source=folder:{tmp}/single"], "a fifth of each class cannot be held out"),
        ([*SCRATCH, "--data.source=photos"], "data.source: expected 'digits' or 'folder:PATH'"),
        ([*SCRATCH, "--data.split=test"], "data.split: is for folders with parts, .* null for digits, got"),
        ([*SCRATCH, "--data.fraction=0"], r"data.fraction: expected a part in \(0, 1\], got 0"),
        ([*SCRATCH, "--data.fraction=0.999"], "data.fraction: 0.999 of 1437 images takes 144 of each"),
        ([*SCRATCH, "--data.subset_seed=-1"], "data.subset_seed: expected at least 0"),
        ([*SCRATCH, "--data.cache=auto"], "data.cache has no meaning for source digits, which are in memory"),
        ([*SCRATCH, "--data.source=folder:a", "--data.cache=-1"], "data.cache must be .* 'auto', not -1"),
        ([*SCRATCH, "--data.crop_padding=-1"], "data.crop_padding: expected null or at least 0, got -1"),
        ([*SCRATCH, "--augment.policy=nonsense"], "augment.policy: timm does not know 'nonsense'"),
        ([*SCRATCH, "--augment.smoothing=2"], r"augment.smoothing: expected a part in \[0, 1\], got 2"),
        (
            [*SCRATCH, "--batch_size=6", "--accumulation=2"],
            "mixup and cutmix need pairs, expected a multiple of 4",
        ),
        ([*SCRATCH, "--linear=true", "--decor.enable=true"], "decor.enable: a linear probe"),
        ([*SCRATCH, "--linear=true", "--drop_path=0.1"], "drop_path: a linear probe"),
        ([*SCRATCH, "--optim.name=lars"], "lars is for linear probes"),
        ([*SCRATCH, "--optim.layer_decay=0"], r"optim.layer_decay: expected a factor in \(0, 1\], got 0"),
        ([*SCRATCH, "--optim.lr=.nan"], "optim.lr: expected a finite number"),
        ([*SCRATCH, "--optim.warmup_steps=7"], "warm-up of 7 steps is longer than the run of 6"),
        ([*SCRATCH, "--decor.enable=true", "--decor.sites=auto"], "sites: expected a preset .*, got .*auto"),
        ([*SCRATCH, "--decor.enable=true", "--decor.sample=1e-4"], "gives no rows"),
        ([*SCRATCH, "--decor.enable=true", "--batch_size=2", "--accumulation=4"], "must be a multiple of"),
        ([*SCRATCH, "--steps=0"], "steps: 0 evaluates a classifier.safetensors"),
        ([*SCRATCH, "--resume=/does/not/exist"], "no checkpoint at"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, mae_run, capsys, arguments, message):
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "plain.pth")
    torch.save({"model": {"head": torch.ones(1)}}, tmp_path / "head.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.safetensors.pth").write_text("hello")
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "single", "ab", 1)
    make_folder(tmp_path / "odd" / "train", "ab", 1)
    make_folder(tmp_path / "odd" / "val", "abc", 1)
    places = {"{tmp}": str(tmp_path), "{encoder}": str(mae_run / "encoder.safetensors")}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        finetune.main([*TINY, *arguments, f"--out={out}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune: ")
    assert re.search(message, error), error
    assert not out.exists()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    text = capsys.readouterr().out
    for option in (
        "--encoder",
        "--readout",
        "--optim.layer_decay",
        "--augment.mixup",
        "--decor.eta",
        "--linear",
    ):
        assert option in text
    # Plans and decorrelated layers are for pre-training.
    assert "--decor.budget" not in text
    assert "--decor.form" not in text
    assert "Factor of the rate from each block" in text
