"""Segmentation runs: what they leave, resumed ones, several processes, bad input."""

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ALONE, losses
from safetensors.torch import load_file
from segment_runs import SCRATCH, TINY, by_definition, make_pair, save
from torch.multiprocessing import ProcessExitedException

from models.segmentation import load_segmenter
from train import predict, segment
from train.data.masks import IGNORE
from train.data.reading import choose_subset
from train.engine import processes
from train.engine.loop import Loop
from train.engine.processes import Processes
from train.engine.results import write_results
from train.engine.run_folder import RunFolder
from train.tasks import segmentation

LINEAR = ["--head=linear", "--width=null", "--drop_path=0"]
FIGURES = ("heldout_loss", "miou", "mean_accuracy", "pixel_accuracy")


def evals(folder: Path) -> list[tuple]:
    records = (r for r in RunFolder(folder).records() if r["kind"] == "eval")
    return [(r["step"], *(r[name] for name in FIGURES)) for r in records]


# Runs


def predicted(run: Path, folder: Path, evaluation: segmentation.EvaluationConfig) -> tuple[list, dict]:
    """Labels of the held-out images, each alone by `train.predict`, and their figures by definition."""
    predictor = predict.Predictor(predict.find_segmenter(str(run)), evaluation, torch.device("cpu"))
    masks, predictions = [], []
    for image in sorted((folder / "val/images").iterdir()):
        masks.append(np.asarray(Image.open(folder / "val/masks" / image.name)))
        predictions.append(predictor(torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)).numpy())
    return predictions, by_definition(masks, predictions, 3)


def test_a_run_leaves_everything_it_promises(finished, folder):
    run = RunFolder(finished)
    assert list(losses(finished)) == list(range(1, 7))
    assert [record[0] for record in evals(finished)] == [0, 6]
    for name in ("curves.png", "accuracy.png", "confusion.png", "overlays.png", "correlation.png"):
        low, high = Image.open(finished / name).convert("L").getextrema()
        assert high - low > 100, f"{name} is blank"
    summary = json.loads(run.summary.read_text())
    assert [summary[name] for name in FIGURES] == list(evals(finished)[-1][1:])
    assert summary["best"]["miou"] == max(record[2] for record in evals(finished))
    # The file is the model that gave these figures, with its R gone: each image alone, by hand.
    loaded = load_segmenter(finished / "segmenter.safetensors")
    assert (loaded.classes, loaded.short_side) == (("class 0", "class 1", "class 2"), None)
    _, expected = predicted(finished, folder, segmentation.EvaluationConfig())
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert summary[name] == pytest.approx(expected[name], rel=1e-4), name
    table = list(csv.DictReader((finished / "classes.csv").read_text().splitlines()))
    for row, iou in zip(table, expected["iou"], strict=True):
        assert row["iou"] == ("" if np.isnan(iou) else f"{iou:.2f}")


def test_the_model_of_a_decorrelated_run_is_that_of_its_file(folder, tmp_path):
    arguments = ["--decor.enable=true", "--decor.every=1", "--steps=2", "--optim.warmup_steps=0"]
    config = segment.parse(
        [*TINY, *SCRATCH, *arguments, f"--data.source=folder:{folder}", f"--out={tmp_path / 'run'}"]
    )
    loop = segment.prepare(config, ALONE)
    loop.train()
    images = torch.randn(2, 3, 40, 33)
    expected = loop.model.eval()(images).logits
    write_results(loop, {})
    loaded = load_segmenter(tmp_path / "run" / "segmenter.safetensors")
    assert torch.equal(loaded.model.eval()(images).logits, expected)


@pytest.mark.parametrize(
    "options",
    [["--batch_size=2"], ["--batch_size=8"], ["--data.workers=1"]],
    ids=lambda options: options[0],
)
def test_figures_do_not_depend_on_batches(finished, folder, tmp_path, options):
    start = [f"--encoder={finished / 'segmenter.safetensors'}", f"--data.source=folder:{folder}", "--steps=0"]
    segment.main([*TINY, *start, *options, f"--out={tmp_path / 'run'}"])
    assert evals(tmp_path / "run")[0][1:] == pytest.approx(evals(finished)[-1][1:], rel=1e-4)


@pytest.mark.parametrize("name", ["scales", "flip", "stride"])
def test_held_out_images_are_looked_at_as_asked(finished, folder, tmp_path, name):
    value = {"scales": (0.75, 1.5), "flip": True, "stride": 16}[name]
    start = [f"--encoder={finished / 'segmenter.safetensors'}", f"--data.source=folder:{folder}", "--steps=0"]
    option = f"--evaluation.{name}={json.dumps(value)}"
    segment.main([*TINY, *start, option, f"--out={tmp_path / 'run'}"])
    found = evals(tmp_path / "run")[0]
    labels, expected = predicted(finished, folder, segmentation.EvaluationConfig(**{name: value}))
    assert dict(zip(FIGURES[1:], found[2:], strict=True)) == pytest.approx(
        {figure: expected[figure] for figure in FIGURES[1:]}, rel=1e-4
    )
    usual, _ = predicted(finished, folder, segmentation.EvaluationConfig())
    assert any((a != b).any() for a, b in zip(usual, labels, strict=True))  # the option does something


def test_ade20k_from_its_official_layout(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for i in range(3):
        make_pair(root, "training", f"ADE_train_0000000{i}", (40, 60), 4, "ade20k")
    make_pair(root, "validation", "ADE_val_00000001", (70, 48), 4, "ade20k")
    out = tmp_path / "run"
    options = ["--steps=2", "--optim.warmup_steps=0", "--data.short_side=32", f"--data.source=ade20k:{root}"]
    segment.main([*TINY, *SCRATCH, *LINEAR, *options, f"--out={out}"])
    loaded = load_segmenter(out / "segmenter.safetensors")
    assert (len(loaded.classes), loaded.short_side) == (150, 32)
    table = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    mask = np.asarray(Image.open(root / "annotations/validation/ADE_val_00000001.png"))
    # Value 1 is the first class; 0 counts nowhere.
    assert [int(row["pixels"]) for row in table[:4]] == [int((mask == value).sum()) for value in (1, 2, 3, 4)]
    assert sum(int(row["pixels"]) for row in table) == (mask != 0).sum()


def test_long_silent_phases_have_a_bar(finished, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "SILENT", 0.0)
    segmenter = finished / "segmenter.safetensors"
    arguments = [*TINY, f"--encoder={segmenter}", f"--data.source=folder:{folder}", "--steps=0"]
    segment.main([*arguments, f"--out={tmp_path / 'a'}"])
    captured = capsys.readouterr()
    assert re.search(r"counting classes: .*0/4 \[.*mask", captured.err)
    assert re.search(r"evaluating: .*0/\d \[.*batch", captured.err)
    assert "counting" not in captured.out
    monkeypatch.setenv("RANK", "1")  # other processes keep silent
    assert list(processes.progress([1, 2], "work", "item")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_run_is_evaluated_on_the_split_asked_for(tmp_path):
    root = tmp_path / "data"
    for part, value in (("train", 0), ("val", 1), ("test", 2)):
        values = np.full((40, 40), value)
        values[:10], values[-1] = np.arange(10)[:, None] % 3, 11  # 11 is no class
        save(root / f"images/{part}/a.png", np.stack([values * 60] * 3, 2))
        save(root / f"annotations/{part}/a.png", values)
    out, again = tmp_path / "run", tmp_path / "test"
    options = ["--steps=2", "--optim.warmup_steps=0", "--data.ignored=11"]
    options += ["--data.classes={sky: 0, sea: 1, land: [2, 3]}", f"--data.source=folder:{root}"]
    segment.main([*TINY, *SCRATCH, *LINEAR, *options, f"--out={out}"])
    segment.main(
        [f"--config={out / 'config.yaml'}", f"--encoder={out / 'segmenter.safetensors'}", "--steps=0",
         "--data.split=test", f"--out={again}"]
    )  # fmt: skip
    for folder, part, label in ((out, "val", 1), (again, "test", 2)):
        assert f"held out: images/{part}/a.png" in (folder / "files.txt").read_text().splitlines()
        rows = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
        assert [row["class"] for row in rows] == ["sky", "sea", "land"]
        counts = [int(row["pixels"]) for row in rows]
        assert sum(counts) == 39 * 40
        assert counts[label] == 29 * 40 + 3 * 40


def test_a_resumed_run_gives_the_figures_of_one_never_stopped(finished, folder, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    decor = ["--decor.enable=true", "--decor.every=1"]
    segment.main([*TINY, *SCRATCH, *decor, f"--data.source=folder:{folder}", f"--out={out}", "--resume=auto"])
    assert "step-00000003, step 3" in capsys.readouterr().out
    assert losses(out) == losses(finished)
    assert evals(out) == evals(finished)
    made, again = (load_file(path / "segmenter.safetensors") for path in (finished, out))
    assert all(torch.equal(made[name], again[name]) for name in made)


def killed_in_the_fifth_step(arguments: list[str]) -> None:
    step = Loop._train_step

    def killed(self, *given):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *given)

    Loop._train_step = killed
    segment.main(arguments)


def test_a_killed_run_goes_on(finished, folder, tmp_path, capsys):
    out = tmp_path / "run"
    decor = ["--decor.enable=true", "--decor.every=1"]
    arguments = [*TINY, *SCRATCH, *decor, f"--data.source=folder:{folder}", f"--out={out}"]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch.run(killed_in_the_fifth_step, arguments)
    assert not (out / "segmenter.safetensors").exists()
    segment.main([*arguments, "--resume=auto"])
    assert "step-00000003, step 3" in capsys.readouterr().out
    assert losses(out) == losses(finished)
    assert evals(out) == evals(finished)
    made, again = (load_file(path / "segmenter.safetensors") for path in (finished, out))
    assert all(torch.equal(made[name], again[name]) for name in made)


@pytest.mark.parametrize("names", ["a\nb\nc\nd", "a\nc\nb"])
def test_a_run_is_not_resumed_on_other_classes(folder, tmp_path, capsys, names):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, root)
    (root / "classes.txt").write_text("a\nb\nc")
    start = [*TINY, *SCRATCH, *LINEAR, f"--data.source=folder:{root}", f"--out={out}"]
    segment.main([*start, "--data.fraction=0.5"])
    assert (out / "files.txt").read_text().splitlines() == [
        *(f"train/images/{name}" for name in kept(root)),
        *(f"held out: val/images/{i}.png" for i in range(5)),
        *(f"class {i}: {name}" for i, name in enumerate("abc")),
    ]
    (root / "classes.txt").write_text(names)
    with pytest.raises(SystemExit) as stop:
        segment.main([*start, "--data.fraction=0.5", "--resume=auto"])
    assert stop.value.code == 2
    assert f"data: they are no longer those of {out / 'files.txt'}" in capsys.readouterr().err


def kept(root: Path) -> list[str]:
    """The half of the training images that is used."""
    return choose_subset(sorted(path.name for path in (root / "train/images").iterdir()), 0.5, 0)


def test_two_processes_give_the_figures_of_one(folder, tmp_path):
    start = [*TINY, *SCRATCH, *LINEAR, f"--data.source=folder:{folder}", "--steps=3", "--eval_every=3"]
    segment.main([*start, f"--out={tmp_path / 'one'}"])
    launch.run(segment.main, [*start, f"--out={tmp_path / 'two'}"], world=2)
    one, two = tmp_path / "one", tmp_path / "two"
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=2e-5)
    assert [e[0] for e in evals(two)] == [0, 3]
    for ours, theirs in zip(evals(one), evals(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_train_upernet_and_evaluate_as_one(folder, tmp_path):
    start = [*TINY, f"--data.source=folder:{folder}"]
    launch.run(segment.main, [*start, *SCRATCH, "--steps=2", f"--out={tmp_path / 'two'}"], world=2)
    assert list(losses(tmp_path / "two")) == [1, 2]
    # Each has normalised by its own images, but its file gives the figures that both found.
    encoder = tmp_path / "two" / "segmenter.safetensors"
    segment.main([*start, f"--encoder={encoder}", "--steps=0", f"--out={tmp_path / 'one'}"])
    assert evals(tmp_path / "one")[0][1:] == pytest.approx(evals(tmp_path / "two")[-1][1:], rel=1e-4)


def test_the_configuration_of_a_run_serves_to_evaluate_it(finished, folder, tmp_path):
    start = [f"--config={finished / 'config.yaml'}", f"--encoder={finished / 'segmenter.safetensors'}"]
    segment.main([*start, "--steps=0", "--batch_size=1", f"--out={tmp_path / 'run'}"])
    assert evals(tmp_path / "run")[0][1:] == pytest.approx(evals(finished)[-1][1:], rel=1e-4)


def test_deterministic_algorithms_give_the_same_figures(finished, folder, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        test_the_configuration_of_a_run_serves_to_evaluate_it(finished, folder, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    config = segment.parse([*TINY, *SCRATCH, "--deterministic=true", "--out=x"])
    config.check(ALONE)
    with pytest.raises(ValueError, match="deterministic: on GPUs PyTorch has no reproducible"):
        config.check(Processes(0, 1, torch.device("cuda")))


def test_a_process_without_readable_images_stops_nobody(finished, folder, tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, root)
    broken = [f"val/images/{i}.png" for i in (0, 1, 2, 4)]  # all of the main process, one of the other
    for name in broken:
        (root / name).write_bytes(b"no image")
    start = [f"--encoder={finished / 'segmenter.safetensors'}", f"--data.source=folder:{root}", "--steps=0"]
    launch.run(segment.main, [*TINY, *start, f"--out={out}"], world=2)
    assert set(json.loads((out / "summary.json").read_text())["unreadable_files"]) == set(broken)
    table = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    mask = np.asarray(Image.open(folder / "val/masks/3.png"))
    assert sum(int(row["pixels"]) for row in table) == (mask != IGNORE).sum()
    assert not (out / "overlays.png").exists()  # the main process has none to show


def test_held_out_masks_without_any_class_end_a_run(finished, folder, tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, root)
    (root / "classes.txt").write_text("class 0\nclass 1\nclass 2")
    for mask in (root / "val/masks").iterdir():
        save(mask, np.full_like(np.asarray(Image.open(mask)), IGNORE))
    start = [f"--encoder={finished / 'segmenter.safetensors'}", f"--data.source=folder:{root}", "--steps=0"]
    with pytest.raises(SystemExit) as stop:
        segment.main([*TINY, *start, f"--out={out}"])
    assert (
        stop.value.code
        == f"segment: data.source: no pixel of the held-out masks of folder:{root} has a class"
    )


def test_further_training_starts_from_a_segmenter(finished, tmp_path, capsys):
    encoder = finished / "segmenter.safetensors"
    options = ["--steps=1", "--optim.warmup_steps=1", "--img_size=64", "--eval_every=1"]
    config = segment.parse([*TINY, *options, f"--encoder={encoder}", f"--out={tmp_path / 'run'}"])
    # Ten classes for three: the last layers are new, the rest stays.
    loop = segment.prepare(config, ALONE)
    assert "the data have 10 classes from 'brick' to 'vessels'" in capsys.readouterr().out
    old, new = load_file(encoder), loop.model.state_dict()
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    assert changed == {
        "encoder.pos_embed",
        *(f"{layer}.{part}" for layer in ("classifier", "auxiliary.2") for part in ("weight", "bias")),
    }
    assert loop.model.classifier.out_channels == 10


# Bad input


def broken(folder: Path, root: Path, how: str) -> Path:
    """A copy of the folder with one bad file."""
    shutil.copytree(folder, root)
    mask = root / "train/masks/2.png"
    values = np.array(Image.open(mask))
    if how == "size":
        save(mask, values[:-1])
    elif how == "range":
        save(mask, np.where(values == 2, 7, values))
        (root / "classes.txt").write_text("a\nb\nc\n")
    elif how == "rgb":
        save(mask, np.stack([values] * 3, 2))
        (root / "classes.txt").write_text("a\nb\nc\n")
    elif how == "unreadable":
        (root / "train/images/2.png").write_bytes(b"no image")
        (root / "val/images/1.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("size", r"masks/2.png: expected a mask of its image's size \(40, 48\), got \(39, 48\)"),
        ("range", "masks/2.png: expected labels 0 to 2, or 255 for none, got 7"),
        (
            "rgb",
            "masks/2.png: expected one channel of class numbers, got 3 channels; .* data.classes tells .*",
        ),
    ],
)
def test_bad_masks_end_a_run_with_their_names(folder, tmp_path, capfd, how, message, workers):
    root, out = broken(folder, tmp_path / "data", how), tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        segment.main(
            [
                *TINY,
                *SCRATCH,
                *LINEAR,
                f"--data.workers={workers}",
                f"--data.source=folder:{root}",
                f"--out={out}",
            ]
        )
    assert re.fullmatch(f"segment: .*{message}", str(stop.value.code)), stop.value.code
    assert not (out / "segmenter.safetensors").exists()


def test_unreadable_images_are_left_out_and_listed(folder, tmp_path, capsys):
    root, out = broken(folder, tmp_path / "data", "unreadable"), tmp_path / "run"
    segment.main([*TINY, *SCRATCH, *LINEAR, f"--data.source=folder:{root}", f"--out={out}"])
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["unreadable_files"]) == {"train/images/2.png", "val/images/1.png"}
    table = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    masks = [np.asarray(Image.open(folder / f"val/masks/{i}.png")) for i in (0, 2, 3, 4)]
    assert sum(int(row["pixels"]) for row in table) == sum(int((mask != IGNORE).sum()) for mask in masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder=/does/not/exist.safetensors"], "no such encoder: /does/not/exist"),
        ([], "encoder: expected a file or timm:NAME"),
        (["--encoder={segmenter}", *LINEAR], "segmenter.safetensors has the head 'upernet' of width 8"),
        (["--encoder={segmenter}", "--model=mae_vit_base"], "says itself that it is mae_vit_tiny"),
        (["--encoder={segmenter}", "--model_args={depth: 3}"], "says itself .* 'depth': 2.*null or the same"),
        (
            ["--encoder={segmenter}", "--steps=0"],
            r"steps: 0 evaluates .* classes of the data \(10, .*segmenter.safetensors has 3",
        ),
        ([*SCRATCH, "--steps=0"], "steps: 0 evaluates .* but None has none"),
        ([*SCRATCH, "--img_size=36"], "must be divisible by patch_size"),
        ([*SCRATCH, "--batch_size=1"], "BatchNorms of UPerNet need at least 2 images"),
        (
            [*SCRATCH, "--evaluation.stride=40"],
            r"evaluation.stride: expected at most the window's \(32, 32\)",
        ),
        ([*SCRATCH, "--width=0"], "width: expected at least 1"),
        ([*SCRATCH, "--data.source=folder:{tmp}/empty"], "no such folder: .*/empty/images"),
        ([*SCRATCH, "--data.source=folder:{tmp}/one"], "labels from 0 to 1 at least, .*0.png, are all 0"),
        ([*SCRATCH, "--data.source=folder:{tmp}/rgb"], "0.png: expected one channel .*, got 3 channels"),
        ([*SCRATCH, "--data.source=folder:{tmp}/one", "--data.split=test"], "no such folder: .*/test/images"),
        (
            [*SCRATCH, "--data.source=folder:{tmp}/one", "--data.classes={a: 1, b: 2}"],
            "0.png: expected labels 1 to 2, or 255 for none, got 0",
        ),
        (
            [*SCRATCH, "--data.source=folder:{tmp}/one", "--data.classes={a: red, b: 2}"],
            "data.classes: expected colours such as '#804080', got 'red'",
        ),
        ([*SCRATCH, "--data.source=folder:{tmp}/broken"], "none of 1 images can be read.*0.png"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, finished, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    for kind in ("rgb", "broken"):
        for part in ("train", "val"):
            make_pair(tmp_path / kind, part, "0", (8, 8), 2, "folder")
        (tmp_path / kind / "classes.txt").write_text("a\nb\n")
    save(tmp_path / "rgb/train/masks/0.png", np.zeros((8, 8, 3)))
    for part in ("train", "val"):
        make_pair(tmp_path / "one", part, "0", (8, 8), 1, "folder")
    (tmp_path / "broken/train/images/0.png").write_bytes(b"no image")
    places = {"{tmp}": str(tmp_path), "{segmenter}": str(finished / "segmenter.safetensors")}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        segment.main([*TINY, *arguments, f"--out={out}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("segment: ")
    assert re.search(message, error), error
    assert not out.exists()
