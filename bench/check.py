"""The gate before every figure: ours and the published rule compute the same thing.

Decorrelated layers are held to the rule as it stands; `DecorPreconditioner` to the rule with
`W <- W R_old R_new^-1` after each update, so that R does not change the network's function; and a low-rank R
whose rank is the whole width to the full one.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bench.arms import PRECISIONS, Arm
from bench.baselines import published_layers
from bench.cases import Case, in_encoder
from dbpkern import Decor

# Relative differences that rounding explains. Under autocast the sides round at different places: the
# published rule rounds z and R x to bf16, the fold rounds W R.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 3e-2}


class CheckFailed(Exception):
    """Two sides of a comparison compute different things."""


class _Rows:
    """One draw of samples for both sides: of rows, or of whole images where there is a row for each patch.

    The published rule draws images for its convolutions.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.step = 0

    def draw(self, n: int) -> Tensor:
        """Of n rows or images."""
        if n == self.case.batch * self.case.patches:
            patches = torch.arange(self.case.patches)
            return (self.draw(self.case.batch)[:, None] * len(patches) + patches).flatten()
        generator = torch.Generator().manual_seed(self.step)
        return torch.randint(n, (max(1, n // 10),), generator=generator)

    def index(self, n: int, turn: int, device: torch.device) -> Tensor:
        """What `Sampler.index` is for the others."""
        return self.draw(n).to(device)


def _change(pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Relative difference of two ways from a start: `|a - b| / |b - start|`, over (start, a, b) together."""
    pairs = [[tensor.detach().double() for tensor in pair] for pair in pairs]
    difference = sum((a - b).square().sum() for _, a, b in pairs)
    way = sum((b - start).square().sum() for start, _, b in pairs)
    return float((difference / way).sqrt())


def compare(case: Case, sites: str, device: torch.device, precision: str) -> dict[str, float]:
    """Train ours and the published rule from one start on the same rows; returns how far they differ.

    Returns:
        Relative differences of the losses, the change of the weights and that of R, the worst of all ours.

    Raises:
        CheckFailed: converting the model changed its output.
    """
    inputs = case.inputs(device, PRECISIONS[precision][0])
    # Not AdamW: it divides each gradient by its own size, which blows rounding up where a gradient is zero.
    # With these rates three steps change something.
    sgd = functools.partial(torch.optim.SGD, lr=0.1)

    rule = replace(Decor.published(), sites=sites, filter=in_encoder, eta=0.02, kappa=0.1)

    def make(method: str, **changes: object) -> Arm:
        return Arm(case, method, sites, inputs, precision, sgd, replace(rule, **changes))

    plain, published, kept = make("plain"), make("published"), make("published")
    layers, optimizer = make("layers"), make("full")
    low = make("full", rank={name: len(R) for name, R in optimizer.R().items()})
    for arm in (layers, optimizer, low, published):
        if not torch.equal(arm.output(), plain.output()):
            raise CheckFailed(
                f"{case.name}, {sites}: with R = I, {arm.method} computes another output than plain"
            )

    rows = _Rows(case)
    for arm in (layers, optimizer, low):  # they draw without replacement; here they must not
        arm.engine.sampler.index = rows.index
    for arm in (published, kept):
        for layer in published_layers(arm.model).values():
            layer.draw = rows.draw
    losses = []
    for step in range(3):
        rows.step = step
        full = optimizer.step()
        losses += [(layers.step(), published.step()), (full, _step_in_place(kept)), (low.step(), full)]
    _fuse(kept)

    sides = [(layers, published), (optimizer, kept), (low, optimizer)]
    weights = [zip(*(arm.model.parameters() for arm in (plain, *pair)), strict=True) for pair in sides]
    Rs = [(R, theirs.R()[name]) for mine, theirs in sides[:2] for name, R in mine.R().items()]
    return {
        "loss": max(float(abs(a - b) / abs(b)) for a, b in losses),
        "weights": max(map(_change, weights)),
        "R": max(_change([(torch.eye(len(a), device=device), a, b)]) for a, b in Rs),
    }


@torch.no_grad()
def _step_in_place(published: Arm) -> Tensor:
    """A step of the published rule after which W makes up for the change of R; returns the loss."""
    layers = published_layers(published.model).values()
    before = [layer.R.clone() for layer in layers]
    with torch.enable_grad():
        loss = published.step()
    for layer, R in zip(layers, before, strict=True):
        W = layer.weight.flatten(1) @ R
        layer.weight.copy_(torch.linalg.solve(layer.R.T, W.T).T.view_as(layer.weight))
    return loss


@torch.no_grad()
def _fuse(published: Arm) -> None:
    for layer in published_layers(published.model).values():
        layer.weight.copy_((layer.weight.flatten(1) @ layer.R).view_as(layer.weight))


def check(case: Case, sites: Iterable[str], device: torch.device, precision: str) -> dict[str, dict]:
    """Compare arms with what they are held to, in fp64 and in the measured precision, at a small size.

    Returns:
        By precision, the largest difference of each quantity over the sites.

    Raises:
        CheckFailed: a difference is more than rounding explains.
    """
    found: dict[str, dict] = {}
    for kind in ("fp64", precision):
        for chosen in sites:
            differences = compare(case.small(), chosen, device, kind)
            for quantity, difference in differences.items():
                if not difference <= TOLERANCES[kind]:  # also for NaN
                    raise CheckFailed(
                        f"{case.name}, {chosen}, {kind}: arms that should agree differ by "
                        f"{difference:.2g} in {quantity}, expected at most {TOLERANCES[kind]:g}"
                    )
                worst = found.setdefault(kind, {})
                worst[quantity] = max(difference, worst.get(quantity, 0.0))
    return found
