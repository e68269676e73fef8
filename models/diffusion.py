"""Denoising diffusion of single patches: noise levels, corruption, ancestral sampling.

A patch x0 is corrupted to `x = sqrt(gamma) x0 + sqrt(1 - gamma) e`, e from N(0, I): gamma 1 is clean, 0 is
pure noise. It is the cumulative product (alpha-bar) of DDPM (Ho et al. 2020, arXiv 2006.11239), drawn for
each patch by itself as in DARL (Li et al. 2024, arXiv 2403.05196).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def sample_gamma(
    shape: Sequence[int],
    a: float,
    b: float,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw noise levels from Beta(a, b), in [0, 1], float32.

    With a = 0.03, as the paper has it, two thirds of the values lie below 1e-6. So they are formed from
    logarithms: those of gamma variates of small shape, which themselves would be 0, are finite.

    Args:
        shape: Of the result.
        a: First parameter, above 0; a small one favours pure noise.
        b: Second parameter, above 0; a small one favours clean patches.
        device: Of the result.
        generator: Of the random numbers; torch's own for None.
    """

    def log_gamma_variate(parameter: float) -> Tensor:
        # G(p) = G(p + 1) U^(1/p) in distribution (Marsaglia and Tsang 2000, section 6).
        # A private function, for torch.distributions.Gamma takes no generator.
        larger = torch._standard_gamma(torch.full(shape, parameter + 1.0, device=device), generator)
        uniform = 1.0 - torch.rand(shape, device=device, generator=generator)  # above 0
        return larger.log() + uniform.log() / parameter

    return torch.sigmoid(log_gamma_variate(a) - log_gamma_variate(b))


def draw(
    shape: Sequence[int],
    a: float,
    b: float,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The random numbers of a training step.

    Args:
        shape: Of the patches, [..., P].
        a: Of Beta(a, b).
        b: Likewise.
        device: Of the results.
        generator: Of the random numbers; torch's own for None.

    Returns:
        Noise levels [...] and noise [..., P], float32.
    """
    gamma = sample_gamma(shape[:-1], a, b, device, generator)
    return gamma, torch.randn(shape, device=device, generator=generator)


def corrupt(x: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """Corrupt patches.

    Args:
        x: [..., P].
        gamma: [...].
        noise: [..., P].
    """
    gamma = gamma.unsqueeze(-1)
    return gamma.sqrt() * x + (1.0 - gamma).sqrt() * noise


def clean_from_noise(x: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """What `corrupt` gave x from, if `noise` is right; gamma is above 0. Shapes as there."""
    gamma = gamma.unsqueeze(-1)
    return (x - (1.0 - gamma).sqrt() * noise) / gamma.sqrt()


def posterior(x: Tensor, x0: Tensor, gamma: float, cleaner: float) -> tuple[Tensor, float]:
    """Mean and variance of the patch at a cleaner level, given a corrupted one and the clean one.

    DDPM's equation 7 with alpha = gamma / cleaner.

    Args:
        x: Corrupted patches [..., P].
        x0: The clean ones, or what a model takes them for.
        gamma: Level of x, in [0, 1).
        cleaner: The next level, in (gamma, 1].

    Returns:
        The mean [..., P], and the variance of each value.
    """
    alpha = gamma / cleaner
    mean = alpha**0.5 * (1 - cleaner) / (1 - gamma) * x + cleaner**0.5 * (1 - alpha) / (1 - gamma) * x0
    return mean, (1 - alpha) * (1 - cleaner) / (1 - gamma)


def levels(steps: int, first: float = 0.0) -> list[float]:
    """Noise levels of a sampling run, from `first` to 1 in equal steps: gamma(s) = 1 - s."""
    return [first + (1.0 - first) * i / steps for i in range(steps + 1)]


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    start: Tensor,
    gammas: Sequence[float],
    normal: Callable[[], Tensor],
) -> Tensor:
    """Ancestral sampling from pure noise to clean patches.

    Args:
        denoise: `denoise(x, gamma) -> x0`, the model.
        start: Patches at the first level [..., P].
        gammas: Rising levels; the last is 1.
        normal: Draws from N(0, I) in the shape of `start`.

    Returns:
        The patches [..., P].
    """
    x = start
    for gamma, cleaner in pairwise(gammas):
        x, variance = posterior(x, denoise(x, gamma), gamma, cleaner)
        if variance > 0:
            x = x + variance**0.5 * normal()
    return x
