"""What a study is made of: its preset, its arms, and the trials of these."""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Literal

from train import pretrain
from train.engine.config import RunConfig
from train.engine.plots import WINDOW
from train.engine.run_folder import NEUTRAL, flat
from train.tasks.pretraining import FAMILIES

KEPT = 600  # losses of a trial that are kept, at most, where the window allows it
PRESETS: dict[str, "Preset"] = {}  # by name of the study; the modules of presets fill it


@dataclass(frozen=True)
class Encoder:
    """The pre-trained encoder that an arm starts from.

    Args:
        study: of its pre-training.
        arm: of that study, at its best rate, with the seed of the trial that starts from it.
        length: of pre-training: "steps" for that of its study, "seconds" for as many steps as take the time
            of AdamW's, "none" for the weights that pre-training starts from.
    """

    study: str
    arm: str
    length: Literal["steps", "seconds", "none"] = "steps"


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: in tables.
        settings: of the script's configuration, by dotted name.
        lrs: peak learning rates to try, rising, where the study has none for it; none for an ablation.
        published: whether R is served by `bench.baselines`, the published rule as published.
        like: the main arm that an ablation changes, and whose best rate it has.
        encoder: where it starts; None for random weights.
    """

    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    lrs: tuple[float, ...] = ()
    published: bool = False
    like: str = ""
    encoder: Encoder | None = None


@dataclass(frozen=True)
class Preset:
    """What all trials of a study share.

    Args:
        script: of `train`, with its `Config` and `prepare`.
        settings: of the script's configuration, by dotted name.
        arms: the main ones, by name.
        families: ablations by family and name.
        decides: which rate is best: the final training "loss", or a figure of the last evaluation.
        evaluations: how often a trial is evaluated, at equal intervals.
        probe: how many labelled images the probe learns from, see `probe.py`; 0 for no probe.
        needs_source: whether the images must be named.
        lrs: peak learning rates to try, rising, by arm, where they are not the arm's own.
        own: settings by main arm, tuned for it; they hold for its ablations, too.
    """

    script: ModuleType
    settings: Mapping[str, object]
    arms: Mapping[str, Arm]
    families: Mapping[str, Mapping[str, Arm]] = field(default_factory=dict)
    decides: str = "loss"
    evaluations: int = 4
    probe: int = 0
    needs_source: bool = False
    lrs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Length of a trial."""
        return self.settings["steps"]

    @property
    def on_gpu(self) -> bool:
        """Whether the trials need a GPU."""
        return self.settings["device"] == "cuda"

    @property
    def pretrains(self) -> bool:
        """Whether the trials are pre-training."""
        return self.script is pretrain

    @property
    def needs_images(self) -> bool:
        """Whether the images to pre-train encoders on must be named."""
        return any(arm.encoder and PRESETS[arm.encoder.study].needs_source for arm in self.arms.values())

    @cached_property
    def every_arm(self) -> dict[str, Arm]:
        """Main arms and ablations by name."""
        return dict(self.arms) | {
            name: arm for family in self.families.values() for name, arm in family.items()
        }

    def tuned(self, arm: str) -> str:
        """The main arm whose best rate an arm has: itself, or the one that an ablation changes."""
        return self.every_arm[arm].like or arm

    def lrs_of(self, arm: str) -> tuple[float, ...]:
        """Peak learning rates that an arm is tried at; none for an ablation."""
        return self.lrs.get(arm, self.every_arm[arm].lrs)

    @property
    def stride(self) -> int:
        """Steps whose losses are kept as one mean.

        It divides the window, so that a trailing mean is the mean of whole strides, and the length of a
        trial.
        """
        fitting = [k for k in range(1, WINDOW + 1) if WINDOW % k == 0 and self.steps % k == 0]
        return next((k for k in fitting if self.steps <= k * KEPT), fitting[-1])

    def choose(self, asked: Sequence[str] | None) -> list[str]:
        """The arms that names of arms and of families of ablations stand for; None for the main arms.

        Raises:
            ValueError: there is none of a name.
        """
        arms = [name for a in (self.arms if asked is None else asked) for name in self.families.get(a, [a])]
        unknown = [name for name in arms if name not in self.every_arm]
        if unknown:
            known = ", ".join([*self.every_arm, *self.families])
            raise ValueError(f"--arms: expected some of {known}, got {', '.join(unknown)}")
        return list(dict.fromkeys(arms))


@dataclass(frozen=True)
class Trial:
    """One run of a study, or one that differs from it in its length only, to leave an encoder.

    Args:
        study: its name.
        arm: of the study.
        lr: peak learning rate.
        seed: of everything random.
        steps: None for those of the study; 0 for no training at all.
    """

    study: str
    arm: str
    lr: float
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """Within its study."""
        length = "" if self.steps is None else f"_steps{self.steps}"
        return f"{self.arm}_lr{self.lr:g}_seed{self.seed}{length}"

    @property
    def preset(self) -> Preset:
        """Of its study."""
        return PRESETS[self.study]

    def config(self, out: str, data: Mapping[str, object], encoder: str | None = None) -> RunConfig:
        """What the script is started with.

        Args:
            out: folder of the run.
            data: further settings, such as where the images are.
            encoder: file of the encoder, where it starts from one.

        Raises:
            ValueError: one of the settings has no such name.
        """
        preset, arm = self.preset, self.preset.every_arm[self.arm]
        config = preset.script.Config(out)
        common = {
            "seed": self.seed,
            "eval_every": max(1, preset.steps // preset.evaluations),
            "checkpoint_every": preset.steps,
        }
        own = preset.own.get(preset.tuned(self.arm), {})
        for name, value in (preset.settings | common | dict(data) | own | arm.settings).items():
            assign(config, name, value, preset.script.__name__)
        if preset.pretrains:
            config.optim.blr = self.lr * 256 / config.batch_size
        else:
            config.optim.lr, config.encoder = self.lr, encoder
        if self.steps is not None:
            config.steps = self.steps
        return config

    def settings(self, data: Mapping[str, object]) -> dict[str, object]:
        """All that its numbers depend on beside the encoder, by dotted name and as JSON gives it back.

        Args:
            data: as for `config`.
        """
        preset, published = self.preset, self.preset.every_arm[self.arm].published
        settings = flat(asdict(self.config("", data)))
        settings = {k: v for k, v in settings.items() if k not in NEUTRAL or k == "eval_every"}
        if not (published or settings["decor.enable"]):
            settings = {k: v for k, v in settings.items() if k == "decor.enable" or k[:6] != "decor."}
        if preset.pretrains:
            others = set(FAMILIES) - {settings["model"].partition("_")[0]}
            settings = {k: v for k, v in settings.items() if k.partition(".")[0] not in others}
        return json.loads(json.dumps(settings | {"stride": preset.stride, "published": published}))


def assign(config: RunConfig, name: str, value: object, script: str) -> None:
    """Set a setting of a training script by its dotted name.

    Args:
        config: of the script.
        name: of the setting.
        value: that it gets.
        script: the module, for the message.

    Raises:
        ValueError: there is none of that name.
    """
    target = config
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part, None)
    if not dataclasses.is_dataclass(target) or last not in {f.name for f in dataclasses.fields(target)}:
        raise ValueError(f"expected the name of a setting of {script.replace('.', '/')}.py, got {name!r}")
    setattr(target, last, copy.deepcopy(value))
