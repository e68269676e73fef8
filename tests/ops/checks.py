"""How the tests of ops judge a kernel."""

import torch


def as_good(actual, exact, peer):
    """The error is at most twice that of PyTorch with the same operands, and 4 units in the last place."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (peer.double() - exact).abs().max()
    allowed += 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # false for NaN
