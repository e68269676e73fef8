"""`ops.correlation`: second moments of the sampled rows, M, and the bound of its eigenvalues."""

import math
import sys

import pytest
import torch
from checks import (
    BACKENDS,
    DEVICE,
    FLOATS,
    LAYOUTS,
    SERVED,
    SHAPES,
    accumulator,
    as_good,
    close,
    far_apart,
    launches,
    tensor,
)

from dbpkern import ops, reference
from dbpkern.ops import _triton
from dbpkern.ops._triton import tl

correlation_triangle_position = sys.modules["dbpkern.ops.correlation"].triangle_position
pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")


@pytest.mark.parametrize(("kappa", "scale_free"), [(0.0, False), (0.0, True), (0.3, True), (1.0, False)])
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_correlation(L, n, d, backend, dtype, kappa, scale_free):
    z = tensor(L, n, d, dtype=dtype)
    found = ops.correlation(z, kappa, scale_free, backend=backend)
    exact = reference.correlation(z.double(), kappa, scale_free)
    peers = reference.correlation(z.to(accumulator(dtype)), kappa, scale_free)
    for parts in zip(found, exact, peers, strict=True):
        as_good(*parts)
        assert parts[0].is_contiguous()


def test_correlation_by_its_definition():
    z = tensor(1, 6, 4, dtype=torch.float64)
    M, a, _ = ops.correlation(z, 0.3)
    scaled, _, _ = ops.correlation(z, 0.3, scale_free=True)
    for i in range(4):
        close(a[0, i], z[0, :, i].square().mean())
        for j in range(4):
            G = sum(z[0, k, i] * z[0, k, j] for k in range(6)) / 6
            close(M[0, i, j], 0.3 * (G - 1) if i == j else 0.7 * G)
            close(scaled[0, i, j], M[0, i, j] / (a[0, i] + a[0, j]))


@pytest.mark.parametrize("out", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [7, 40])
def test_triton_is_symmetric_and_repeats_itself_bit_for_bit(n, dtype, out):
    z = tensor(2, n, 37, dtype=dtype)
    first, again = (ops.correlation(z, 0.3, True, out, backend="triton") for _ in range(2))
    assert torch.equal(first[0], first[0].mT)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_M_of_16_bits_is_the_rounded_one(backend, dtype, scale_free):
    z = tensor(2, 40, 21, dtype=dtype)
    whole = ops.correlation(z, 0.3, scale_free, backend=backend)
    found = ops.correlation(z, 0.3, scale_free, torch.bfloat16, backend=backend)
    assert torch.equal(found[0], whole[0].bfloat16())
    for one, other in zip(found[1:], whole[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [3, 90])
def test_no_eigenvalue_exceeds_the_bound(backend, n, scale_free):
    z = tensor(4, n, 37) * torch.rand(37, device=DEVICE)
    M, _, bound = ops.correlation(z, 0.3, scale_free, backend=backend)
    assert (torch.linalg.eigvalsh(M.double()).abs().amax(1) <= bound * (1 + 1e-5)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("bad", "scale_free"), [(float("nan"), False), (float("inf"), True)])
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_samples_that_are_not_finite_show_in_a_alone(backend, dtype, scale_free, bad):
    z = tensor(3, 20, 33, dtype=dtype)
    whole, _, bounds = ops.correlation(z, 0.3, scale_free, backend=backend)
    z[1, 4, 17] = bad
    M, a, bound = ops.correlation(z, 0.3, scale_free, backend=backend)
    assert torch.equal(a.isfinite(), ~torch.isin(torch.arange(99, device=DEVICE), 33 + 17).view(3, 33))
    assert M.isfinite().all()
    assert bound.isfinite().all()
    assert not M[1, 17].any()
    assert not M[1, :, 17].any()
    for other in (0, 2):
        assert torch.equal(M[other], whole[other])
        assert torch.equal(bound[other], bounds[other])


@pytest.mark.parametrize("kappa", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_features_without_variance_have_no_correlations(backend, dtype, kappa):
    z = tensor(1, 20, 19, dtype=dtype)
    z[..., [3, 18]] = 0
    M, a, bound = ops.correlation(z, kappa, True, backend=backend)
    assert not a[0, [3, 18]].any()
    assert not M[0, [3, 18]][:, [3, 18]].any()
    assert M.isfinite().all()
    assert bound.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", [None, torch.bfloat16])
def test_squares_beyond_the_range_of_fp16(backend, out):
    z = torch.full((1, 20, 6), 300.0, dtype=torch.float16, device=DEVICE)
    M, a, bound = ops.correlation(z, dtype=out, backend=backend)
    close(a, torch.full((1, 6), 9e4, device=DEVICE))
    assert M.isfinite().all()
    close(bound, torch.full((1,), 5 * 9e4, device=DEVICE))


def test_the_bound_of_a_wide_layer_has_all_its_digits():
    z = tensor(3, 32, 1536) + tensor(3, 32, 1)  # so that the norm is the smaller of the two bounds
    M, _, bound = ops.correlation(z, 0.0, True, backend="eager")
    M = M.double()
    exact = torch.minimum(torch.linalg.matrix_norm(M), torch.linalg.matrix_norm(M, math.inf))
    torch.testing.assert_close(bound.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, dtype):
    z = tensor(3, 21, 13, dtype=dtype)
    expected = ops.correlation(z, 0.3, True, backend=backend)
    for one, other in zip(ops.correlation(layout(z)[0], 0.3, True, backend=backend), expected, strict=True):
        close(one, other)


def test_offsets_beyond_32_bits():
    far = 2**31 + 16
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill them all
    room = torch.empty(far + 2**12, dtype=torch.bfloat16, device=DEVICE)
    z = room.as_strided((2, 20, 24), (far, 24, 1)).copy_(tensor(2, 20, 24))
    M, _, _ = ops.correlation(z, backend="triton")
    as_good(M, reference.correlation(z.double())[0], reference.correlation(z.float())[0])


def test_strides_beyond_the_reach_of_a_tile():
    z = far_apart(tensor(17, 5, dtype=torch.bfloat16))[None]
    M, _, _ = ops.correlation(z, backend="triton")
    as_good(M, reference.correlation(z.double())[0], reference.correlation(z.float())[0])


def test_two_launches():
    z = tensor(3, 20, 37)
    assert launches(lambda: ops.correlation(z, backend="triton")) == ["correlation_kernel", "bound_kernel"]


@_triton.jit
def triangle_kernel(places, found, COUNT: tl.constexpr):
    p = tl.load(places + tl.arange(0, COUNT))
    row, column = correlation_triangle_position(p)
    tl.store(found + tl.arange(0, COUNT) * 2, row)
    tl.store(found + tl.arange(0, COUNT) * 2 + 1, column)


def test_tiles_of_the_triangle_are_counted_without_gaps():
    # The index is a rounded square root: first and last of each row, up to 1,024 tiles a side.
    rows = torch.arange(1024, dtype=torch.int32, device=DEVICE)
    first = rows * (rows + 1) // 2
    for places, columns in ((first, rows * 0), (first + rows, rows)):
        found = torch.empty(1024, 2, dtype=torch.int32, device=DEVICE)
        _triton.launch(triangle_kernel, (1,), {"places": places, "found": found}, {"COUNT": 1024}, 4, 1)
        assert torch.equal(found, torch.stack([rows, columns], 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "n", "d"), [(37, 1280, 768), (12, 1280, 3072), (3, 700, 771)])
def test_shapes_that_fill_the_device(monkeypatch, L, n, d):
    monkeypatch.undo()  # the tiles of the table
    z = tensor(L, n, d, dtype=torch.bfloat16)
    first = ops.correlation(z, 0.0, True, backend="triton")
    exact = reference.correlation(z.double(), 0.0, True)
    peers = ops.correlation(z, 0.0, True, backend="eager")
    for parts in zip(first, exact, peers, strict=True):
        as_good(*parts)
    for _ in range(5):  # races would show as differences
        for one, again in zip(first, ops.correlation(z, 0.0, True, backend="triton"), strict=True):
            assert torch.equal(one, again)
