"""Diffusion of patches against closed forms: Beta and Gaussian distributions, products of Gaussians."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from models import diffusion
from models.diffusion import clean_from_noise, corrupt, levels, posterior, sample, sample_gamma

PAPERS = (0.03, 1.0)


def randn64(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Noise levels.


@pytest.mark.parametrize(
    ("a", "b"), [PAPERS, (1, 1), (3, 10), (0.3, 0.3), (0.1, 10), (1, 0.05), (0.03, 0.03), (20, 4)]
)
def test_noise_levels_follow_the_beta_distribution(a, b):
    count = 50_000
    found = sample_gamma((count,), a, b).double().sort().values.numpy()
    # Beyond these bounds float32 has too few numbers: there the distribution goes up in steps.
    inside = (found > 1e-30) & (found < 1 - 1e-6)
    assert inside.sum() > count / 10
    below = (np.arange(count) + 0.5) / count
    # Kolmogorov's statistic exceeds this once in 8000 times.
    assert np.abs(stats.beta.cdf(found, a, b) - below)[inside].max() < 2.2 / math.sqrt(count)


@pytest.mark.parametrize(
    ("a", "b", "cdf"), [(0.03, 1, lambda x: x**0.03), (1, 10, lambda x: 1 - (1 - x) ** 10)]
)
def test_quantiles_of_known_distributions(a, b, cdf):
    gamma = sample_gamma((50_000,), a, b).double()
    for x in (1e-30, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9):
        assert (gamma <= x).double().mean().item() == pytest.approx(cdf(x), abs=0.01)


def test_noise_levels_are_numbers_between_zero_and_one():
    gamma = sample_gamma((1000, 1000), 0.03, 0.03)
    assert gamma.dtype == torch.float32
    assert gamma.shape == (1000, 1000)
    assert gamma.isfinite().all()
    assert gamma.min() == 0
    assert gamma.max() == 1
    # The standard deviation of a mean of a million is below 0.0005.
    assert gamma.double().mean().item() == pytest.approx(0.5, abs=0.0025)


@pytest.mark.parametrize(("a", "b"), [(1e-4, 1), (1, 1e-4), (1e-4, 1e-4), (1e4, 1e4)])
def test_extreme_parameters_give_numbers(a, b):
    gamma = sample_gamma((10_000,), a, b)
    assert gamma.isfinite().all()
    assert gamma.double().mean().item() == pytest.approx(a / (a + b), abs=0.02)


def test_a_random_number_of_zero_does_no_harm(monkeypatch):
    # It comes once in 17 million times, and has no logarithm.
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert sample_gamma((5,), *PAPERS).isfinite().all()


def test_noise_levels_stay_float32_under_autocast():
    expected = sample_gamma((1000,), *PAPERS, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gamma = sample_gamma((1000,), *PAPERS, generator=torch.Generator().manual_seed(1))
    assert gamma.dtype == torch.float32
    assert torch.equal(gamma, expected)


def test_noise_levels_repeat_with_generator_or_seed():
    state = torch.get_rng_state()
    first, second = (sample_gamma((9,), 3, 10, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    seeded = sample_gamma((9,), 3, 10)
    assert not torch.equal(sample_gamma((9,), 3, 10), seeded)
    torch.set_rng_state(state)
    assert torch.equal(sample_gamma((9,), 3, 10), seeded)


# The random numbers of a step.


def test_draw_gives_a_level_and_noise_for_every_patch():
    gamma, noise = diffusion.draw((100, 15, 288), 3, 10)
    assert (gamma.shape, noise.shape) == ((100, 15), (100, 15, 288))
    assert gamma.dtype == noise.dtype == torch.float32
    assert stats.kstest(gamma.flatten().numpy(), stats.beta(3, 10).cdf).pvalue > 1e-4
    assert stats.kstest(noise.flatten()[:20_000].numpy(), stats.norm.cdf).pvalue > 1e-4


def test_draw_follows_the_generator_or_torch():
    def seeded(seed):
        return diffusion.draw((15, 288), 3, 10, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first, again, other = seeded(5), seeded(5), seeded(6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, diffusion.draw((15, 288), 3, 10), strict=True))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    # No two patches share their noise.
    assert len(first[1].unique(dim=0)) == 15


# Corruption.


def test_corruption_from_the_definition():
    x, noise, gamma = randn64(2, 3, 4), randn64(2, 3, 4), torch.rand(2, 3, dtype=torch.float64)
    found = corrupt(x, gamma, noise)
    for b, i, v in np.ndindex(2, 3, 4):
        g = gamma[b, i].item()
        expected = math.sqrt(g) * x[b, i, v].item() + math.sqrt(1 - g) * noise[b, i, v].item()
        assert found[b, i, v].item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 1.0])
def test_corruption_has_mean_and_variance(gamma):
    count = 100_000
    noisy = corrupt(torch.full((count, 1), 3.0), torch.full((count,), gamma), torch.randn(count, 1))
    assert noisy.mean().item() == pytest.approx(3 * math.sqrt(gamma), abs=0.015)
    assert noisy.var().item() == pytest.approx(1 - gamma, abs=0.02)


def test_noise_can_be_taken_off():
    x, noise = randn64(5, 3, 4), randn64(5, 3, 4)
    gamma = torch.rand(5, 3, dtype=torch.float64) * 0.99 + 0.01
    torch.testing.assert_close(clean_from_noise(corrupt(x, gamma, noise), gamma, noise), x)
    clean = torch.ones(5, 3, dtype=torch.float64)
    assert torch.equal(clean_from_noise(x, clean, noise), x)
    assert torch.equal(corrupt(x, clean, noise), x)
    assert torch.equal(corrupt(x, 0 * clean, noise), noise)


# A step towards the clean patch.

STEPS = [(0.0, 0.001), (0.0, 0.5), (0.001, 0.002), (0.3, 0.31), (0.25, 0.5), (0.5, 0.999), (0.9, 0.95)]


@pytest.mark.parametrize(("gamma", "cleaner"), STEPS)
def test_posterior_is_the_product_of_two_gaussians(gamma, cleaner):
    x, x0 = randn64(3, 4), randn64(3, 4)
    mean, variance = posterior(x, x0, gamma, cleaner)
    # p(y | x0), and p(x | y) as a function of y, where x = sqrt(alpha) y + sqrt(1 - alpha) e. Precisions add,
    # and so do means times precisions.
    alpha = gamma / cleaner
    precision = 1 / (1 - cleaner) + alpha / (1 - alpha)
    weighted = math.sqrt(cleaner) * x0 / (1 - cleaner) + math.sqrt(alpha) * x / (1 - alpha)
    assert variance == pytest.approx(1 / precision, rel=1e-12)
    torch.testing.assert_close(mean, weighted / precision, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("gamma", "cleaner"), STEPS)
def test_a_step_leads_from_one_level_to_the_next(gamma, cleaner):
    # Corrupted patches, given the clean one, go over into patches that are less corrupted.
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    (of_x, variance), (of_x0, _) = posterior(one, zero, gamma, cleaner), posterior(zero, one, gamma, cleaner)
    assert (of_x * math.sqrt(gamma) + of_x0).item() == pytest.approx(math.sqrt(cleaner), rel=1e-12)
    assert (of_x**2 * (1 - gamma)).item() + variance == pytest.approx(1 - cleaner, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.999])
def test_the_last_step_ends_at_the_clean_patch(gamma):
    x0 = torch.randn(3, 4)
    mean, variance = posterior(torch.randn(3, 4), x0, gamma, 1.0)
    assert variance == 0
    assert torch.equal(mean, x0)


def test_pure_noise_tells_nothing():
    x0 = torch.randn(3, 4)
    first, second = (posterior(torch.randn(3, 4), x0, 0.0, 0.25) for _ in range(2))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], 0.5 * x0)
    assert first[1] == 0.75


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 1000])
def test_levels_rise_in_equal_steps_to_exactly_one(steps):
    for first in (0.0, 0.5 / steps):
        found = levels(steps, first)
        assert len(found) == steps + 1
        assert found[0] == first
        assert found[-1] == 1
        assert np.diff(found) == pytest.approx((1 - first) / steps, rel=1e-6)


# Sampling.


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_a_denoiser_that_knows_returns_what_it_knows(steps):
    truth = torch.randn(3, 4)
    seen, drawn = [], []

    def denoise(x, gamma):
        seen.append(gamma)
        assert x.isfinite().all()
        return truth

    def normal():
        drawn.append(torch.randn(3, 4))
        return drawn[-1]

    assert torch.equal(sample(denoise, torch.randn(3, 4), levels(steps), normal), truth)
    assert seen == levels(steps)[:-1]
    assert len(drawn) == steps - 1  # the last step has no noise


def test_every_intermediate_patch_is_corrupted_as_its_level_says():
    truth = torch.full((20_000,), 3.0)

    def denoise(x, gamma):
        assert x.mean().item() == pytest.approx(3 * math.sqrt(gamma), abs=0.04)
        assert x.var().item() == pytest.approx(1 - gamma, abs=0.04)
        return truth

    sample(denoise, torch.randn(20_000), levels(20), lambda: torch.randn(20_000))


@pytest.mark.parametrize(("mean", "deviation"), [(2.0, 0.5), (-1.0, 1.5)])
@pytest.mark.parametrize("first", [0.0, 0.001])
def test_sampling_from_a_gaussian(mean, deviation, first):
    # The best denoiser is the mean of x0 given x, a linear function.
    def denoise(x, gamma):
        slope = deviation**2 * math.sqrt(gamma) / (deviation**2 * gamma + 1 - gamma)
        return mean + slope * (x - math.sqrt(gamma) * mean)

    count = 20_000
    found = sample(denoise, torch.randn(count), levels(400, first), lambda: torch.randn(count))
    assert found.mean().item() == pytest.approx(mean, abs=0.04)
    # 400 steps have an error of 4 percent in the variance.
    assert found.var().item() == pytest.approx(deviation**2, rel=0.08)
    assert stats.kstest(((found - found.mean()) / found.std()).numpy(), stats.norm.cdf).pvalue > 1e-3
