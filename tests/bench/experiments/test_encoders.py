"""Studies of fine-tuning and segmentation: made-up figures, and real tiny ones with their encoders."""

import json
import os
import sys
from dataclasses import asdict, replace

import pytest
import studies
import torch
from PIL import Image
from safetensors.torch import load_file
from studies import ENERGY, HEADER, TINY

from bench import study as command
from bench.__main__ import main
from bench.experiments import trial as trials
from bench.experiments.finetuning import PRESETS
from bench.experiments.jobs import Job, run_all
from bench.experiments.preset import Arm, Encoder, Preset, Trial
from bench.experiments.study import FINISHED, Study
from train import finetune, pretrain, segment
from train.engine import processes
from train.engine.results import whole_weights, write_results

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
PHOTOS = {"data.source": "photos"}
SHORT = {"img_size": 16, "steps": 4, "batch_size": 8, "optim.warmup_steps": 1}
SCRATCH = Arm("From scratch", {"model": "mae_vit_tiny", "model_args": SIZES}, (1e-3, 3e-3))
MAE = Arm("MAE", {"readout": "mean"}, (1e-3, 3e-3), encoder=Encoder("tiny", "adamw"))
MADE = Preset(
    finetune,
    PRESETS["digits"].settings | SHORT,
    {"scratch": SCRATCH, "mae": MAE},
    decides="top1",
    evaluations=2,
)
SCENES = Preset(
    segment,
    PRESETS["scenes"].settings | SHORT,
    {
        "scratch": replace(SCRATCH, lrs=(1e-3,)),
        "dbp-seconds": Arm("DBP", {}, (1e-3,), encoder=Encoder("tiny", "dbp", "seconds")),
    },
    decides="miou",
    evaluations=2,
)
PRETRAINING = replace(TINY, lrs={"adamw": (3e-3,), "dbp": (5e-3,)})
WORKER = f"""\
import sys

sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(studies.__file__)!r}]
from test_encoders import shrink
from bench.__main__ import main

shrink(dict.__setitem__)
sys.exit(main(["study", "--worker", sys.argv[1]]))
"""


def shrink(setitem):
    """Add tiny presets of pre-training and of fine-tuning."""
    setitem(PRESETS, "tiny", PRETRAINING)
    setitem(PRESETS, "made", MADE)
    setitem(PRESETS, "made-scenes", SCENES)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The tiny presets, and a study of pre-training that knows the best rates."""
    shrink(monkeypatch.setitem)
    timing = HEADER | {"arms": {}}
    lines = []
    for arm, lr, ratio in (("adamw", 3e-3, 1.0), ("dbp", 5e-3, 1.3)):
        trial = Trial("tiny", arm, lr, 0)
        evals = [{"step": 0, "heldout_loss": 1.0}]
        lines.append(json.dumps(result_of(trial, PHOTOS, evals=evals, losses=[1.0] * 8)))
        times = dict.fromkeys(("low", "median", "high"), ratio)
        settings = replace(trial, lr=1e-3).settings(PHOTOS)
        timing["arms"][arm] = {"seconds": times, "ratio": times, "settings": settings}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "timing.json").write_text(json.dumps(timing))


def result_of(trial, data, **content):
    """A made-up result as JSON has it."""
    return {
        "trial": asdict(trial),
        "outcome": FINISHED,
        "settings": trial.settings(data),
        "losses": [],
        "seconds": 1.0,
        "evals": [],
        "held_out": 360,
        "energy": ENERGY,
        "skipped_steps": 0,
        "jobs": 1,
        "encoder": None,
        "machine": HEADER,
    } | content


def made_study(folder, name="made"):
    return Study(folder, name, {}, PHOTOS)


def write_result(folder, arm, lr, seed, top1, loss=1.0, outcome=FINISHED, tuned=None, pretrained=None):
    """Add the line of a made-up trial; `tuned` and `pretrained` change its settings."""
    trial = Trial("made", arm, lr, seed)
    evals = [{"step": s, "heldout_loss": loss, "top1": top1 + s, "top5": 100.0} for s in (0, 2, 4)]
    encoder = None
    if arm == "mae":
        settings = made_study(folder).encoder_of(arm, seed).settings(PHOTOS) | (pretrained or {})
        encoder = {"steps": 8, "final_loss": 0.5 + seed, "settings": settings, "machine": HEADER}
    settings = trial.settings({}) | (tuned or {})
    content = result_of(trial, {}, outcome=outcome, evals=evals, encoder=encoder, settings=settings)
    path = folder / "made" / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(content) + "\n")
    return path


def results_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def use_worker(monkeypatch, folder, script=WORKER):
    (folder / "worker.py").write_text(script)
    monkeypatch.setattr(command, "WORKER", (sys.executable, str(folder / "worker.py")))


def fill(folder, *arguments, name="made"):
    return main(["study", name, "--folder", str(folder), *arguments])


def line_of(text, title):
    """The cells of the first row of a title."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_tiny_study_is_made_once_and_reported(tmp_path, monkeypatch, capsys):
    use_worker(monkeypatch, tmp_path)
    command = ("--seeds", "0", "--jobs", "2", "--lr", "1e-3")
    assert fill(tmp_path, *command) == 0
    told = capsys.readouterr().err
    assert told.count("encoder adamw_lr0.003_seed0 of tiny: started") == 1
    study = made_study(tmp_path)
    assert {trial.name for trial in study.results} == {"mae_lr0.001_seed0", "scratch_lr0.001_seed0"}
    result = study.results[Trial("made", "mae", 1e-3, 0)]
    assert [e["step"] for e in result.evals] == [0, 2, 4]
    assert all(e.keys() == {"step", "heldout_loss", "top1", "top5"} for e in result.evals)
    assert result.encoder["steps"] == TINY.steps
    assert result.encoder["settings"]["optim.blr"] == 3e-3 * 256 / 32  # of the best rate
    # The encoder is that of the same run by the script.
    encoder = study.encoder_of("mae", 0)
    loop = pretrain.prepare(encoder.config(str(tmp_path / "run"), PHOTOS), processes.start("cpu"))
    loop.train()
    write_results(loop, whole_weights(loop.model))
    expected = load_file(tmp_path / "run" / "encoder.safetensors")
    made = load_file(study.parent("tiny").encoder_path(encoder))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    text = (tmp_path / "made" / "report.md").read_text()
    assert line_of(text, "MAE")[3] == "256"  # 8 steps of 32 images
    assert line_of(text, "From scratch")[3] == "-"
    assert "![Arms](figure.png)" in text
    with Image.open(tmp_path / "made" / "figure.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert fill(tmp_path, *command) == 0
    assert "started" not in capsys.readouterr().err


def test_segmentation_is_compared_by_its_own_script_and_figure(tmp_path, monkeypatch, capsys):
    use_worker(monkeypatch, tmp_path)
    assert fill(tmp_path, "--seeds", "0", "--arms", "dbp-seconds", name="made-scenes") == 0
    results = {r.trial.arm: r for r in made_study(tmp_path, "made-scenes").results.values()}
    assert results.keys() == {"dbp-seconds"}
    for result in results.values():
        assert set(result.evals[0]) == {"step", "heldout_loss", "miou", "mean_accuracy", "pixel_accuracy"}
        assert result.held_out == 200
        assert result.settings["head"] == "linear"
    encoder = results["dbp-seconds"].encoder
    assert encoder["steps"] == 6  # AdamW has 8, and one of these takes 1.3 times as long
    assert encoder["settings"]["decor.enable"]
    shown = f"{results['dbp-seconds'].evals[-1]['miou']:.2f}"
    assert f"dbp-seconds_lr0.001_seed0: miou {shown} %" in capsys.readouterr().err
    text = (tmp_path / "made-scenes" / "report.md").read_text()
    assert "mean IoU at the end, %" in text
    cells = line_of(text, "DBP")
    assert (cells[3], cells[6]) == ("192", shown)  # 6 steps of 32 images


@pytest.mark.parametrize("spoil", [lambda path, arms: path.unlink(), lambda path, arms: arms.pop("dbp")])
def test_equal_seconds_need_the_time_of_a_step(tmp_path, capsys, spoil):
    path = tmp_path / "tiny" / "timing.json"
    timing = json.loads(path.read_text())
    spoil(path, timing["arms"])
    if path.exists():
        path.write_text(json.dumps(timing))
    assert fill(tmp_path, name="made-scenes") == 2
    told = capsys.readouterr().err
    assert "first run python -m bench study tiny --time 20" in told
    assert "started" not in told


def test_an_encoder_needs_the_best_rate_of_its_pre_training(tmp_path, capsys):
    (tmp_path / "tiny" / "runs.jsonl").unlink()
    assert fill(tmp_path) == 2
    assert "first run python -m bench study tiny --arms adamw" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


FINETUNING = [name for name, preset in PRESETS.items() if not preset.pretrains]


@pytest.mark.parametrize("name", FINETUNING)
def test_every_preset_gives_configurations_that_differ_in_their_start_only(name):
    found = [Trial(name, arm, 1e-3, 0).settings({}) for arm in PRESETS[name].arms]
    for settings in found[1:]:
        changed = {key for key in settings.keys() | found[0].keys() if settings.get(key) != found[0].get(key)}
        known = {"model", "readout", "optim.name"}
        assert changed <= known | {key for key in changed if key.startswith(("model_args", "decor."))}


def test_a_failing_encoder_stops_its_arm_only_and_is_tried_once(tmp_path, monkeypatch, capsys):
    script = """
import json, sys
sys.exit(0 if "encoder" in json.loads(sys.argv[1]) else 3)
"""
    use_worker(monkeypatch, tmp_path, script)
    for lr in SCRATCH.lrs:
        write_result(tmp_path, "scratch", lr, 0, top1=50.0)
    assert fill(tmp_path, "--seeds", "0") == 1
    told = capsys.readouterr().err
    assert told.count("encoder adamw_lr0.003_seed0 of tiny: started") == 1
    assert "encoder adamw_lr0.003_seed0 of tiny: FAILED" in told
    text = (tmp_path / "made" / "report.md").read_text()
    assert "| From scratch" in text
    assert "| MAE " not in text


def test_a_worker_that_leaves_another_trial_is_a_failure_and_not_repeated(tmp_path, monkeypatch, capsys):
    path = write_result(tmp_path, "scratch", 1e-3, 0, top1=50.0, tuned={"steps": 5})
    other = path.read_text()
    path.unlink()
    script = f"""
import json, pathlib, sys
pathlib.Path(json.loads(sys.argv[1])["path"]).write_text({other!r})
"""
    use_worker(monkeypatch, tmp_path, script)
    assert fill(tmp_path, "--seeds", "0", "--arms", "scratch") == 1
    told = capsys.readouterr().err
    assert told.count("scratch_lr0.001_seed0: started") == 1
    assert "scratch_lr0.001_seed0.json is of other settings: steps was 5, is 4" in told
    assert not path.exists()


def test_no_job_is_started_twice_even_if_it_stays_wanted(tmp_path, capsys):
    job = Job("endless", tmp_path / "x.json", {})
    assert run_all([sys.executable, "-c", "pass"], lambda: [job], lambda job: "done", 2) == []
    assert capsys.readouterr().err.count("endless: started") == 1


def test_a_rate_that_diverged_is_last_and_blocks_nothing(tmp_path, capsys):
    write_result(tmp_path, "scratch", 3e-3, 0, top1=90.0, outcome="the loss is not finite")
    for seed in (0, 1, 2):
        write_result(tmp_path, "scratch", 1e-3, seed, top1=50.0)
    assert fill(tmp_path, "--report") == 0
    text = capsys.readouterr().out
    assert line_of(text, "From scratch")[1] == "0.001, lowest tried"
    assert line_of(text[text.index("## Rates") :], "From scratch") == [
        "From scratch",
        "0",
        "54.00",
        "diverged",
    ]


def test_an_arm_that_diverged_at_every_rate_is_reported(tmp_path, capsys):
    write_result(tmp_path, "mae", 1e-3, 0, top1=50.0)
    for lr in SCRATCH.lrs:
        write_result(tmp_path, "scratch", lr, 0, top1=50.0, outcome="the loss is not finite")
    assert fill(tmp_path, "--report") == 0
    text = capsys.readouterr().out
    assert line_of(text, "From scratch")[1:] == ["all diverged", "0 (fewer than 3)", "-", "-", "-", "-", "-"]
    assert line_of(text, "MAE")[1] == "0.001, 1 rates missing"


def test_a_line_without_the_figure_that_decides_is_damaged(tmp_path, capsys):
    path = write_result(tmp_path, "scratch", 1e-3, 0, top1=50.0)
    path.write_text(path.read_text().replace("top1", "other"))
    assert fill(tmp_path, "--report") == 2
    assert "runs.jsonl:1 is damaged" in capsys.readouterr().err


def test_steps_of_fine_tuning_are_not_timed(tmp_path, capsys):
    assert fill(tmp_path, "--time", "1") == 2
    assert "--time: is for pre-training, got made" in capsys.readouterr().err


def test_a_report_needs_no_images(tmp_path):
    trial = Trial("made-scenes", "scratch", 1e-3, 0)
    figures = dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy"), 5.0)
    evals = [{"step": s, "heldout_loss": 1.0} | figures for s in (0, 2)]
    path = tmp_path / "made-scenes" / "runs.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(result_of(trial, {"data.source": "folder:/none"}, evals=evals)) + "\n")
    assert fill(tmp_path, "--report", name="made-scenes") == 0
    assert fill(tmp_path, "--source", "folder:/none", name="made-scenes") == 2


def test_seeds_that_diverged_are_told(tmp_path, capsys):
    write_result(tmp_path, "scratch", 3e-3, 0, top1=40.0)
    for seed, outcome in enumerate((FINISHED, "the loss is not finite", FINISHED)):
        write_result(tmp_path, "scratch", 1e-3, seed, top1=50.0, outcome=outcome)
    assert fill(tmp_path, "--report") == 0
    assert line_of(capsys.readouterr().out, "From scratch")[2] == "3 (1 diverged)"


def test_an_arm_that_diverges_at_every_rate_gets_no_further_seeds(tmp_path):
    for lr in MAE.lrs:
        write_result(tmp_path, "mae", lr, 0, top1=50.0, outcome="the loss is not finite")
    study = made_study(tmp_path)
    assert study.best_lr("mae", 0) is None
    assert list(study.jobs(["mae"], [0, 1, 2])) == []


def test_the_best_rate_is_by_accuracy_and_then_by_loss(tmp_path):
    write_result(tmp_path, "scratch", 1e-3, 0, top1=50.0, loss=1.0)
    assert made_study(tmp_path).best_lr("scratch", 0) is None
    write_result(tmp_path, "scratch", 3e-3, 0, top1=50.0, loss=0.9)
    study = made_study(tmp_path)
    assert study.best_lr("scratch", 0) == 3e-3
    assert study.missing(["scratch"], [0, 1]) == [Trial("made", "scratch", 3e-3, 1)]


def test_encoders_come_before_the_trials_that_need_them_and_are_not_made_for_finished_ones(tmp_path):
    names = [job.name for job in made_study(tmp_path).jobs(["scratch", "mae"], [0])]
    encoder = "encoder adamw_lr0.003_seed0 of tiny"
    assert names == ["scratch_lr0.001_seed0", "scratch_lr0.003_seed0", encoder, encoder]
    for lr in MAE.lrs:
        write_result(tmp_path, "mae", lr, 0, top1=50.0)
    assert list(made_study(tmp_path).jobs(["mae"], [0])) == []


def test_a_trial_from_an_encoder_of_other_settings_is_not_used(tmp_path, capsys):
    write_result(tmp_path, "mae", 1e-3, 0, top1=50.0, pretrained={"batch_size": 64})
    assert fill(tmp_path, "--arms", "mae") == 2
    assert "pre-training: batch_size was 64, is 32" in capsys.readouterr().err


def test_an_encoder_counts_only_whole_and_by_todays_settings(tmp_path):
    study = made_study(tmp_path)
    trial, parent = study.encoder_of("mae", 0), study.parent("tiny")
    path = parent.encoder_path(trial)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert not parent.has_encoder(trial)  # which a killed worker leaves: the JSON comes last
    about = {"settings": trial.settings(PHOTOS)}
    path.with_suffix(".json").write_text(json.dumps(about))
    assert parent.has_encoder(trial)
    about["settings"]["steps"] += 1
    path.with_suffix(".json").write_text(json.dumps(about))
    assert not parent.has_encoder(trial)
    path.with_suffix(".json").write_text("[]")
    assert not parent.has_encoder(trial)


def test_the_encoder_that_a_trial_of_pre_training_left_is_taken(tmp_path):
    study = made_study(tmp_path)
    trial = Trial("tiny", "adamw", 3e-3, 0)
    kept = study.parent("tiny").encoder_path(trial)
    spec = {"trial": asdict(trial), "data": PHOTOS, "jobs": 1, "encoder": None}
    trials.work(spec | {"leaves": str(kept), "path": str(tmp_path / "run.json")})
    assert json.loads(kept.with_suffix(".json").read_text())["steps"] == TINY.steps
    assert next(study.jobs(["mae"], [0])).name == "mae_lr0.001_seed0"
    left = load_file(kept)
    trials.work({"trial": asdict(trial), "data": PHOTOS, "leaves": str(kept), "path": str(kept)})
    assert all(torch.equal(tensor, left[name]) for name, tensor in load_file(kept).items())


def test_an_untrained_encoder_is_what_pre_training_starts_from(tmp_path):
    trial = Trial("tiny", "dbp", 5e-3, 0, steps=0)
    path = tmp_path / "encoder.safetensors"
    trials.pretrain_encoder(trial, PHOTOS, path)
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["steps"], about["final_loss"]) == (0, None)
    assert about["settings"] == trial.settings(PHOTOS)
    assert about["settings"]["steps"] == 0
    config = replace(trial, steps=None).config(str(tmp_path / "run"), PHOTOS)
    loop = pretrain.prepare(config, processes.start("cpu"))
    weights = load_file(path)
    mine = dict(loop.model.named_parameters())
    assert {name for name in weights if name in mine} >= {"pos_embed", "blocks.0.attn.qkv.weight"}
    assert all(torch.equal(tensor, mine[name]) for name, tensor in weights.items() if name in mine)


def test_weights_are_never_beside_what_is_known_of_others(tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    path.with_suffix(".json").write_text("{}")

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        trials.pretrain_encoder(Trial("tiny", "adamw", 3e-3, 0), PHOTOS, path)
    assert not path.with_suffix(".json").exists()


def test_the_report_has_the_figures_computed_by_hand(tmp_path, capsys):
    for arm, better in (("scratch", 0.0), ("mae", 20.0)):
        write_result(tmp_path, arm, 1e-3, 0, top1=10.0)
        for seed in (0, 1, 2):
            write_result(tmp_path, arm, 3e-3, seed, top1=50.0 + better + seed)
    assert fill(tmp_path, "--report") == 0
    text = (tmp_path / "made" / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    cells = line_of(text, "MAE")
    assert cells[:3] == ["MAE", "0.003, highest tried", "3"]
    assert cells[3:5] == ["256", "1.5000"]  # 8 steps of 32 images; the mean of .5, 1.5 and 2.5
    assert cells[5:7] == ["73.0 (2.0)", "75.00 (2.00)"]
    assert line_of(text[text.index("## Rates") :], "MAE") == ["MAE", "0", "14.00", "74.00"]
    assert "360 held-out images" in text
    arms = json.loads((tmp_path / "made" / "report.json").read_text())["arms"]
    assert [found["mean"] for found in arms["scratch"]["top1"].values()] == [51.0, 53.0, 55.0]
    assert [found["mean"] for found in arms["mae"]["top1"].values()] == [71.0, 73.0, 75.0]


def test_a_setting_that_came_later_counts_as_its_default(tmp_path):
    path = write_result(tmp_path, "mae", 1e-3, 0, top1=50.0)
    content = json.loads(path.read_text())
    assert content["settings"].pop("optim.min_lr") == finetune.Config("").optim.min_lr
    assert content["encoder"]["settings"].pop("optim.clip_grad") is None
    path.write_text(json.dumps(content) + "\n")
    assert made_study(tmp_path).unusable == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made", "--arms", "nothing"], "--arms: expected some of scratch, mae, got nothing"),
        (["made", "--seeds", "-1"], "--seeds: expected numbers of at least 0, got -1"),
        (["made", "--report"], "holds no trial that can be used"),
        (["made", "--source", "folder:/none"], "--source: there is no folder /none"),
        (["made", "--source", "foo"], "data.source: expected 'digits' or 'folder:PATH', got 'foo'"),
        (["made", "--images", "folder:/none"], "--images: there is no folder /none"),
        (["ade20k"], "ade20k needs --source, such as"),
        (["ade20k", "--source", "ade20k:/"], "ade20k needs --images, those to pre-train on"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, arguments, message):
    assert main(["study", *arguments, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
