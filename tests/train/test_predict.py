"""Masks and overlays of a segmenter, and its exported graph."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from segment_runs import save

from models.segmentation import load_segmenter
from train import predict
from train.engine import plots


def test_masks_and_overlays_of_a_folder(finished, folder, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(folder / "val/images", images / "sub")
    (images / "bad.jpg").write_bytes(b"no image")
    arguments = [f"--segmenter={finished}", f"--images={images}", f"--out={out}", "--device=cpu"]
    with pytest.raises(SystemExit) as stop:
        predict.main(arguments)
    assert stop.value.code == 1
    assert f"{images / 'bad.jpg'} was skipped: UnidentifiedImageError" in capsys.readouterr().err
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    assert names == sorted(f"{kind}/sub/{i}.png" for kind in ("masks", "overlays") for i in range(5))
    single = [f"--images={images / 'sub/4.png'}", f"--out={tmp_path / 'one'}", "--first=1", "--device=cpu"]
    predict.main([f"--segmenter={finished / 'segmenter.safetensors'}", *single])
    mask, shifted = (
        np.asarray(Image.open(p)) for p in (out / "masks/sub/4.png", tmp_path / "one/masks/4.png")
    )
    assert mask.shape == (33, 70)
    assert (shifted == mask + 1).all()
    over = np.asarray(Image.open(out / "overlays/sub/4.png")).astype(float)
    source = np.asarray(Image.open(images / "sub/4.png")).astype(float)
    assert np.abs(over - (source + plots.colour_table().numpy()[mask]) / 2).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "images: expected a file or a folder; or --export"),
        (["--images={tmp}"], "images, out: expected both or none"),
        (["--images={tmp}/none", "--out={tmp}/out"], "images: no such file or folder: .*none"),
        (["--images={tmp}/twice", "--out={tmp}/out"], "a.jpg and a.png would have the same masks"),
        (["--images={tmp}/twice/a.png", "--out={tmp}/out", "--first=2"], "first: expected 0 or 1, got 2"),
        (
            ["--images={tmp}", "--out={tmp}/out", "--evaluation.scales=[0]"],
            "evaluation.scales: expected factors",
        ),
        (["--export={tmp}/model.onnx"], "export: expected the name of a .pt2 file"),
        (
            ["--segmenter={tmp}", "--export={tmp}/model.pt2"],
            "no such segmentation model: .*segmenter.safetensors",
        ),
    ],
)
def test_predictions_that_cannot_be_made_say_why(finished, tmp_path, capsys, arguments, message):
    for name in ("a.jpg", "a.png"):
        save(tmp_path / "twice" / name, np.zeros((8, 8, 3)))
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        predict.main([f"--segmenter={finished}", "--device=cpu", *arguments])
    assert stop.value.code == 2
    assert re.search(f"predict: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_exported_graph_computes_what_the_model_does(finished, tmp_path):
    target = tmp_path / "made" / "model.pt2"
    predict.main([f"--segmenter={finished}", f"--export={target}", "--device=cpu"])
    extra = {"about.json": ""}
    graph = torch.export.load(target, extra_files=extra).module()
    assert json.loads(extra["about.json"])["classes"] == ["class 0", "class 1", "class 2"]
    model = load_segmenter(finished / "segmenter.safetensors").model.eval()
    images = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(graph(images), model(images).logits, atol=1e-4, rtol=1e-3)


def test_a_graph_that_computes_something_else_is_not_written(finished, tmp_path, monkeypatch):
    loaded = predict.find_segmenter(str(finished))
    real = torch.export.export

    def off(model, *arguments, **options):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.classifier.bias += 1
        return real(other, *arguments, **options)

    monkeypatch.setattr(torch.export, "export", off)
    with pytest.raises(RuntimeError, match="the exported graph is off by"):
        predict.export(loaded)
