"""bench transfer: what is run and kept, and what the report says; made-up figures and a real tiny matrix."""

import json
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_bench_convergence import HEADER, TINY

from bench import convergence, matrix, starts, transfer
from bench.__main__ import main
from bench.jobs import Job, run_all
from bench.starts import CLASSIFICATION, SEGMENTATION, Preset, Pretraining, Run, Start
from bench.transfer import Comparison, Result
from train import finetune, pretrain, processes
from train.run import whole_weights

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
PHOTOS = {"data.source": "photos"}
MADE = Preset(
    CLASSIFICATION,
    starts.PRESETS["digits"].settings
    | {"img_size": 16, "steps": 4, "batch_size": 8, "optim.warmup_steps": 1},
    {
        "scratch": Start("From scratch", {"model": "mae_vit_tiny", "model_args": SIZES}),
        "mae": Start("MAE", {"readout": "mean"}, ("tiny", "adamw")),
    },
    (1e-3, 3e-3),
    evaluations=2,
)
SCENES = Preset(
    SEGMENTATION,
    starts.PRESETS["scenes"].settings
    | {"img_size": 16, "steps": 4, "batch_size": 8, "optim.warmup_steps": 1},
    {
        "scratch": MADE.starts["scratch"],
        "dbp-seconds": Start("DBP", {}, ("tiny", "dbp"), "seconds"),
    },
    (1e-3,),
    evaluations=2,
)
WORKER = f"""\
import sys

sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_bench_transfer import shrink
from bench.__main__ import main

shrink(dict.__setitem__)
sys.exit(main(["transfer", "--worker", sys.argv[1]]))
"""


def shrink(setitem):
    """Add tiny presets of pre-training and of fine-tuning."""
    setitem(matrix.PRESETS, "tiny", TINY)
    setitem(matrix.ARMS, "adamw", replace(matrix.ARMS["adamw"], rates=(3e-3,)))
    setitem(matrix.ARMS, "dbp", replace(matrix.ARMS["dbp"], rates=(5e-3,)))
    setitem(starts.PRESETS, "made", MADE)
    setitem(starts.PRESETS, "made-scenes", SCENES)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The tiny presets, and a convergence matrix that knows the best rate of pre-training."""
    shrink(monkeypatch.setitem)
    monkeypatch.setattr(convergence, "FOLDER", tmp_path / "convergence")
    folder = tmp_path / "convergence" / "tiny"
    (folder / "runs").mkdir(parents=True)
    runs = {"adamw": matrix.Run("tiny", "adamw", 3e-3, 0), "dbp": matrix.Run("tiny", "dbp", 5e-3, 0)}
    timing = HEADER | {"arms": {}}
    for (arm, run), ratio in zip(runs.items(), (1.0, 1.3), strict=True):
        result = convergence.Result(
            run, convergence.FINISHED, run.settings(PHOTOS), [1.0] * 8, 1.0,
            [{"step": 0, "heldout_loss": 1.0}], {}, 0, 1, HEADER,
        )  # fmt: skip
        (folder / "runs" / f"{run.name}.json").write_text(json.dumps(asdict(result)))
        times = dict.fromkeys(("low", "median", "high"), ratio)
        settings = replace(run, rate=1e-3).settings(PHOTOS)
        timing["arms"][arm] = {"seconds": times, "ratio": times, "settings": settings}
    (folder / "timing.json").write_text(json.dumps(timing))


def made_comparison(folder, preset="made"):
    return Comparison(folder, preset, {}, PHOTOS)


def encoder_of(comparison, start="mae"):
    pretraining = comparison.pretraining(start, 0)
    return comparison.matrix(pretraining.preset).encoder(pretraining)


def write_result(folder, start, rate, seed, top1, loss=1.0, outcome="finished", tuned=None, pretrained=None):
    """The file of a made-up run; `tuned` and `pretrained` change its settings."""
    run = Run("made", start, rate, seed)
    evals = [{"step": s, "heldout_loss": loss, "top1": top1 + s, "top5": 100.0} for s in (0, 2, 4)]
    pretraining = None
    if start == "mae":
        settings = made_comparison(folder / "nothing").pretraining(start, seed).settings(PHOTOS)
        settings |= pretrained or {}
        pretraining = {"steps": 8, "final_loss": 0.5 + seed, "settings": settings, "machine": HEADER}
    settings = run.settings({}) | (tuned or {})
    path = folder / "made" / "runs" / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(Result(run, outcome, settings, pretraining, evals, 360, HEADER))))
    return path


def use_worker(monkeypatch, folder, script=WORKER):
    (folder / "worker.py").write_text(script)
    monkeypatch.setattr(transfer, "WORKER", (sys.executable, str(folder / "worker.py")))


def transfer_made(folder, *arguments):
    return main(["transfer", "--preset", "made", "--folder", str(folder), *arguments])


def test_a_tiny_comparison_is_made_once_and_reported(tmp_path, monkeypatch, capsys):
    use_worker(monkeypatch, tmp_path)
    assert transfer_made(tmp_path, "--seeds", "0", "--jobs", "2") == 0
    told = capsys.readouterr().err
    assert told.count("encoder mae, seed 0: started") == 1
    runs = sorted(path.name for path in (tmp_path / "made" / "runs").iterdir())
    assert runs == [f"{s}_lr{rate}_seed0.json" for s in ("mae", "scratch") for rate in ("0.001", "0.003")]
    result = json.loads((tmp_path / "made" / "runs" / runs[0]).read_text())
    assert [e["step"] for e in result["evals"]] == [0, 2, 4]
    assert result["pretraining"]["steps"] == TINY.steps
    assert result["pretraining"]["settings"]["optim.blr"] == 3e-3 * 256 / 32  # by the convergence matrix
    # The encoder is that of the same run by the script.
    config = Pretraining("tiny", "adamw", 3e-3, 0).config(str(tmp_path / "run"), PHOTOS)
    loop, evaluator, batches = pretrain.prepare(config, processes.start("cpu"))
    loop.train(batches)
    pretrain.write_results(loop, evaluator, whole_weights(loop.model))
    expected = load_file(tmp_path / "run" / "encoder.safetensors")
    made = load_file(encoder_of(made_comparison(tmp_path)))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert "| From scratch" in (tmp_path / "made" / "report.md").read_text()
    with Image.open(tmp_path / "made" / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert transfer_made(tmp_path, "--seeds", "0") == 0
    assert "started" not in capsys.readouterr().err


def test_segmentation_is_compared_by_its_own_script_and_figure(tmp_path, monkeypatch, capsys):
    use_worker(monkeypatch, tmp_path)
    assert main(["transfer", "--preset", "made-scenes", "--folder", str(tmp_path), "--seeds", "0"]) == 0
    folder = tmp_path / "made-scenes"
    results = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in folder.glob("runs/*")}
    assert results.keys() == SCENES.starts.keys()
    for result in results.values():
        assert set(result["evals"][0]) == {"step", "heldout_loss", "miou", "mean_accuracy", "pixel_accuracy"}
        assert result["held_out"] == 200
        assert result["settings"]["head"] == "linear"
    pretraining = results["dbp-seconds"]["pretraining"]
    assert pretraining["steps"] == 6  # AdamW has 8, and one of these takes 1.3 times as long
    assert pretraining["settings"]["decor.enable"]
    shown = f"{results['dbp-seconds']['evals'][-1]['miou']:.2f}"
    assert f"dbp-seconds_lr0.001_seed0: mean IoU {shown} %" in capsys.readouterr().err
    text = (folder / "report.md").read_text()
    assert "mean IoU at the end, %" in text
    line = next(line for line in text.splitlines() if line.startswith("| DBP "))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert (cells[3], cells[6]) == ("192", f"{shown} ({shown} to {shown})")  # 6 steps of 32 images


@pytest.mark.parametrize("spoil", [lambda path, arms: path.unlink(), lambda path, arms: arms.pop("dbp")])
def test_equal_seconds_need_the_time_of_a_step(tmp_path, capsys, spoil):
    path = convergence.FOLDER / "tiny" / "timing.json"
    timing = json.loads(path.read_text())
    spoil(path, timing["arms"])
    if path.exists():
        path.write_text(json.dumps(timing))
    assert main(["transfer", "--preset", "made-scenes", "--folder", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "first run python -m bench convergence --preset tiny --time 20" in told
    assert "started" not in told


@pytest.mark.parametrize("preset", starts.PRESETS)
def test_every_preset_gives_configurations_that_differ_in_their_start_alone(preset):
    found = [Run(preset, start, 1e-3, 0).settings({}) for start in starts.PRESETS[preset].starts]
    for settings in found[1:]:
        changed = {name for name in settings if settings[name] != found[0][name]}
        known = {"model", "readout", "optim.name", "decor.enable"}
        assert changed <= known | {name for name in settings if name[:10] == "model_args"}


def test_a_failing_encoder_stops_its_start_alone_and_is_tried_once(tmp_path, monkeypatch, capsys):
    script = """
import json, sys
spec = json.loads(sys.argv[1])
sys.exit(3 if "pretraining" in spec else 0)
"""
    use_worker(monkeypatch, tmp_path, script)
    for rate in MADE.rates:
        write_result(tmp_path, "scratch", rate, 0, top1=50.0)
    assert transfer_made(tmp_path, "--seeds", "0") == 1
    told = capsys.readouterr().err
    assert told.count("encoder mae, seed 0: started") == 1
    assert "encoder mae, seed 0: FAILED" in told
    assert "diverged at every rate: MAE." in (tmp_path / "made" / "report.md").read_text()


def test_a_worker_that_leaves_another_run_is_a_failure_and_not_repeated(tmp_path, monkeypatch, capsys):
    path = write_result(tmp_path, "scratch", 1e-3, 0, top1=50.0, tuned={"steps": 5})
    other = path.read_text()
    path.unlink()
    script = f"""
import json, pathlib, sys
pathlib.Path(json.loads(sys.argv[1])["path"]).write_text({other!r})
"""
    use_worker(monkeypatch, tmp_path, script)
    assert transfer_made(tmp_path, "--seeds", "0", "--starts", "scratch") == 1
    told = capsys.readouterr().err
    assert told.count("scratch_lr0.001_seed0: started") == 1
    assert "scratch_lr0.001_seed0.json is of other settings: steps was 5, is 4" in told
    assert "scratch_lr0.003_seed0.json is damaged" in told


def test_no_job_is_started_twice_even_if_it_stays_wanted(tmp_path, capsys):
    job = Job("endless", tmp_path / "x.json", {})
    assert run_all([sys.executable, "-c", "pass"], lambda: [job], lambda job: "done", 2) == []
    assert capsys.readouterr().err.count("endless: started") == 1


def test_a_rate_that_diverged_is_last_and_blocks_nothing(tmp_path, capsys):
    write_result(tmp_path, "scratch", 3e-3, 0, top1=90.0, outcome="the loss is not finite")
    for seed in (0, 1, 2):
        write_result(tmp_path, "scratch", 1e-3, seed, top1=50.0)
    assert transfer_made(tmp_path, "--report") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| From scratch"))
    assert "0.001, lowest tried" in line
    assert "0.001: 54.0, 0.003: diverged" in line


def test_a_report_needs_no_images(tmp_path):
    for rate in SCENES.rates:
        run = Run("made-scenes", "scratch", rate, 0)
        evals = [{"step": s, "heldout_loss": 1.0} | dict.fromkeys(SEGMENTATION.figures, 5.0) for s in (0, 2)]
        source = {"data.source": "folder:/none"}
        result = Result(run, "finished", run.settings(source), None, evals, 200, HEADER)
        path = tmp_path / "made-scenes" / "runs" / f"{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)))
    start = ["transfer", "--preset", "made-scenes", "--folder", str(tmp_path), "--source", "folder:/none"]
    assert main([*start, "--report"]) == 0
    assert main(start) == 2


def test_seeds_that_diverged_are_told(tmp_path, capsys):
    write_result(tmp_path, "scratch", 3e-3, 0, top1=40.0)
    for seed, outcome in enumerate(("finished", "the loss is not finite", "finished")):
        write_result(tmp_path, "scratch", 1e-3, seed, top1=50.0, outcome=outcome)
    assert transfer_made(tmp_path, "--report") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| From scratch"))
    assert "| 2 (fewer than 3), and 1 that diverged |" in " ".join(line.split())


def test_a_start_that_diverges_at_every_rate_gets_no_further_seeds(tmp_path):
    for rate in MADE.rates:
        write_result(tmp_path, "mae", rate, 0, top1=50.0, outcome="the loss is not finite")
    comparison = made_comparison(tmp_path)
    assert comparison.best_rate("mae") is None
    assert list(comparison.jobs(["mae"], [0, 1, 2])) == []


def test_the_best_rate_is_by_accuracy_and_then_by_loss(tmp_path):
    write_result(tmp_path, "scratch", 1e-3, 0, top1=50.0, loss=1.0)
    assert made_comparison(tmp_path).best_rate("scratch") is None
    write_result(tmp_path, "scratch", 3e-3, 0, top1=50.0, loss=0.9)
    comparison = made_comparison(tmp_path)
    assert comparison.best_rate("scratch") == 3e-3
    missing = list(comparison.missing(["scratch"], [0, 1]))
    assert missing == [Run("made", "scratch", 3e-3, 1)]


def test_encoders_come_before_the_runs_that_need_them_and_are_not_made_for_finished_ones(tmp_path):
    comparison = made_comparison(tmp_path)
    names = [job.name for job in comparison.jobs(["scratch", "mae"], [0])]
    assert names == ["scratch_lr0.001_seed0", "scratch_lr0.003_seed0"] + 2 * ["encoder mae, seed 0"]
    for rate in MADE.rates:
        write_result(tmp_path, "mae", rate, 0, top1=50.0)
    assert list(made_comparison(tmp_path).jobs(["mae"], [0])) == []


def test_an_encoder_counts_only_whole_and_by_todays_settings(tmp_path):
    comparison = made_comparison(tmp_path)
    run = comparison.pretraining("mae", 0)
    matrix = comparison.matrix("tiny")
    path = matrix.encoder(run)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert not matrix.has_encoder(run)  # which a killed worker leaves: the JSON comes last
    about = {"settings": run.settings(PHOTOS)}
    path.with_suffix(".json").write_text(json.dumps(about))
    assert matrix.has_encoder(run)
    about["settings"]["steps"] += 1
    path.with_suffix(".json").write_text(json.dumps(about))
    assert not matrix.has_encoder(run)
    path.with_suffix(".json").write_text("[]")
    assert not matrix.has_encoder(run)


def test_the_encoder_that_a_run_of_the_matrix_left_is_taken(tmp_path):
    comparison = made_comparison(tmp_path)
    run = matrix.Run("tiny", "adamw", 3e-3, 0)
    kept = comparison.matrix("tiny").encoder(run)
    assert kept == encoder_of(comparison)
    spec = {"run": asdict(run), "data": PHOTOS, "jobs": 1}
    convergence.work(spec | {"encoder": str(kept), "path": str(tmp_path / "run.json")})
    assert json.loads(kept.with_suffix(".json").read_text())["steps"] == TINY.steps
    assert next(comparison.jobs(["mae"], [0])).name == "mae_lr0.001_seed0"
    left = load_file(kept)
    transfer.pretrain_encoder(Pretraining("tiny", "adamw", 3e-3, 0), kept, PHOTOS)
    assert all(torch.equal(tensor, left[name]) for name, tensor in load_file(kept).items())
    assert Pretraining("tiny", "adamw", 3e-3, 0, steps=6).name == f"{run.name}_steps6"


def test_an_untrained_encoder_is_what_pre_training_starts_from(tmp_path):
    run = Pretraining("tiny", "dbp", 5e-3, 0, steps=0)
    path = tmp_path / "encoder.safetensors"
    transfer.pretrain_encoder(run, path, PHOTOS)
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["steps"], about["final_loss"]) == (0, None)
    assert about["settings"] == run.settings(PHOTOS)
    assert about["settings"]["steps"] == 0
    config = replace(run, steps=None).config(str(tmp_path / "run"), PHOTOS)
    loop, _, _ = pretrain.prepare(config, processes.start("cpu"))
    weights = load_file(path)
    mine = dict(loop.model.named_parameters())
    assert {name for name in weights if name in mine} >= {"pos_embed", "blocks.0.attn.qkv.weight"}
    assert all(torch.equal(tensor, mine[name]) for name, tensor in weights.items() if name in mine)


def test_weights_are_never_beside_what_is_known_of_others(tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    path.with_suffix(".json").write_text("{}")

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        transfer.pretrain_encoder(Pretraining("tiny", "adamw", 3e-3, 0), path, PHOTOS)
    assert not path.with_suffix(".json").exists()


def test_the_report_has_the_figures_computed_by_hand(tmp_path, capsys):
    for start, better in (("scratch", 0.0), ("mae", 20.0)):
        write_result(tmp_path, start, 1e-3, 0, top1=10.0)
        for seed in (0, 1, 2):
            write_result(tmp_path, start, 3e-3, seed, top1=50.0 + better + seed)
    assert transfer_made(tmp_path, "--report") == 0
    text = (tmp_path / "made" / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    line = next(line for line in text.splitlines() if line.startswith("| MAE "))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["MAE", "0.003, highest tried", "3"]
    assert cells[3:5] == ["256", "1.5000"]  # 8 steps of 32 images; the mean of .5, 1.5 and 2.5
    assert cells[5:7] == ["73.0", "75.00 (74.00 to 76.00)"]
    assert cells[8] == "0.001: 14.0, 0.003: 74.0"
    assert "360 held-out images" in text
    known = json.loads((tmp_path / "made" / "report.json").read_text())["starts"]
    assert [row["curve"] for row in known] == [
        {"0": 51.0, "2": 53.0, "4": 55.0},
        {"0": 71.0, "2": 73.0, "4": 75.0},
    ]


def damage(path):
    path.write_text("{")


def rename(path):
    path.rename(path.with_name("mae_lr1_seed0.json"))


def change_tuning(path):
    write_result(path.parents[2], "mae", 1e-3, 0, 9.0, tuned={"steps": 5})


def change_pretraining(path):
    write_result(path.parents[2], "mae", 1e-3, 0, 9.0, pretrained={"seed": 7})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "is damaged: expected the JSON of a run"),
        (rename, "mae_lr1_seed0.json is damaged"),
        (change_tuning, "is of other settings: steps was 5, is 4"),
        (change_pretraining, "is of other settings: pretraining: seed was 7, is 0"),
    ],
)
def test_files_that_do_not_fit_are_named_and_nothing_is_started(tmp_path, capsys, spoil, message):
    spoil(write_result(tmp_path, "mae", 1e-3, 0, top1=50.0))
    assert transfer_made(tmp_path) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "move or delete these files" in told
    assert "started" not in told
    assert transfer_made(tmp_path, "--report", "--starts", "scratch") == 2  # which these files are not of
    assert "nothing to report" in capsys.readouterr().err


def test_a_setting_that_came_later_counts_as_its_default(tmp_path):
    path = write_result(tmp_path, "mae", 1e-3, 0, top1=50.0)
    content = json.loads(path.read_text())
    assert content["settings"].pop("optim.min_lr") == finetune.Config("").optim.min_lr
    assert content["pretraining"]["settings"].pop("optim.clip_grad") is None
    path.write_text(json.dumps(content))
    assert made_comparison(tmp_path).unusable == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--starts", "nothing"], "--starts: expected some of scratch, mae, got nothing"),
        (["--seeds", "-1"], "--seeds: expected numbers of at least 0, got -1"),
        (["--report"], "nothing to report"),
        (["--source", "folder:/none"], "--source: there is no folder /none"),
        (["--source", "foo"], "data.source: expected 'digits' or 'folder:PATH', got 'foo'"),
        (["--images", "folder:/none"], "transfer: --images: there is no folder /none"),
        (["--preset", "ade20k"], "ade20k needs --source, the images to fine-tune on"),
        (["--preset", "ade20k", "--source", "ade20k:/"], "ade20k needs --images, those to pre-train on"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, arguments, message):
    assert transfer_made(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("--report",)])
def test_a_rate_that_nobody_knows_yet_is_asked_for(tmp_path, capsys, monkeypatch, arguments):
    if arguments:
        write_result(tmp_path, "mae", 1e-3, 0, top1=50.0)
    monkeypatch.setattr(convergence, "FOLDER", tmp_path / "nothing")
    assert transfer_made(tmp_path, "--starts", "mae", *arguments) == 2
    assert "first run python -m bench convergence --preset tiny --arms adamw" in capsys.readouterr().err
