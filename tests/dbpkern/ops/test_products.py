"""`ops.transform` and `ops.fold`: products with R."""

import pytest
import torch
from checks import (
    BACKENDS,
    DEVICE,
    FLOATS,
    HALVES,
    LAYOUTS,
    SERVED,
    SHAPES,
    accumulator,
    as_good,
    close,
    far_apart,
    launches,
    matrix,
    operand,
    tensor,
)

from dbpkern import ops, reference
from dbpkern.ops import _dispatch
from dbpkern.ops._dispatch import Tiles
from dbpkern.ops._matmul import matmul

pytestmark = pytest.mark.usefixtures("poisoned", "small_tiles")


def plain(a, b, backend, out):
    """PyTorch's product with the operands that a backend takes."""
    if backend == "eager":
        compute = torch.promote_types(a.dtype, b.dtype)
        return (a.to(compute) @ b.to(compute)).to(out)
    kind = _dispatch.operands(a.dtype, b.dtype, out=out)
    return (operand(a, kind) @ operand(b, kind)).to(out)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize(("L", "n", "d"), SHAPES)
def test_transform(L, n, d, backend, dtype):
    x, R = tensor(L, n, d, dtype=dtype), matrix(L, d, d, dtype=accumulator(dtype))
    z = ops.transform(x, R, backend=backend)
    as_good(z, reference.transform(x.double(), R.double()), plain(x, R.mT, backend, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 3, 4, 7), (3, 1), (4, 0)])
def test_transform_of_rows_of_any_shape(shape, backend):
    x, R = tensor(*shape), matrix(shape[-1], shape[-1])
    close(ops.transform(x, R, backend=backend), torch.einsum("...j,ij->...i", x, R))


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize(("L", "o", "d"), [(1, 1, 1), (2, 5, 7), (1, 0, 3), (2, 33, 65), (1, 48, 32)])
def test_fold(L, o, d, backend, dtype, out):
    W, R = tensor(L, o, d, dtype=dtype), matrix(L, d, d, dtype=accumulator(dtype))
    if backend == "triton" and {dtype, out} == {torch.float16, torch.bfloat16}:
        with pytest.raises(ValueError, match="does not mix float16 and bfloat16"):
            ops.fold(W, R, out, backend=backend)
        return
    exact = reference.fold(W.double(), R.double())
    as_good(ops.fold(W, R, out, backend=backend), exact, plain(W, R, backend, out))
    if L == 1:
        as_good(ops.fold(W[0], R[0], out, backend=backend), exact[0], plain(W[0], R[0], backend, out))
    assert ops.fold(W, R, backend=backend).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_once(dtype):
    """Beyond the criterion: each element of a half result is the exact one's nearest neighbour, or nearly."""
    x, W, R = tensor(40, 24, dtype=dtype), tensor(40, 24), matrix(24, 24)
    half_ulp = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-5}
    for actual, expected in (
        (ops.transform(x, R, backend="eager"), x.double() @ R.double().mT),
        (ops.fold(x, R, backend="eager"), x.double() @ R.double()),
        (ops.fold(W, R, dtype, backend="eager"), W.double() @ R.double()),
    ):
        torch.testing.assert_close(actual.double(), expected, **half_ulp)


def test_an_identity_changes_nothing():
    W, R = tensor(40, 24), torch.eye(24, device=DEVICE)
    for out in FLOATS:
        assert torch.equal(ops.fold(W, R, out, backend="triton"), W.to(out))
    x = tensor(9, 24, dtype=torch.bfloat16)
    assert torch.equal(ops.transform(x, R, backend="triton"), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    R, x = matrix(3, 13, 13), tensor(3, 21, 13)
    (R_, _), (x_, _) = layout(R), layout(x)
    for op in (ops.transform, ops.fold):
        for actual, expected in (
            (op(x_, R_, backend=backend), op(x, R, backend=backend)),
            (op(x_[0], R_[0], backend=backend), op(x[0], R[0], backend=backend)),
        ):
            close(actual, expected)
            assert actual.is_contiguous()


@pytest.mark.parametrize("op", [ops.transform, ops.fold])
def test_expanded_inputs(op):
    x, R = tensor(1, 1, 6).expand(3, 5, 6), matrix(1, 6, 6).expand(3, 6, 6)
    close(op(x, R), op(x.clone(), R.clone()))


def test_offsets_beyond_32_bits():
    far = 2**31 + 16
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill them all
    room = torch.empty(far + 2**12, dtype=torch.bfloat16, device=DEVICE)
    a, R = room.as_strided((2, 20, 24), (far, 24, 1)).copy_(tensor(2, 20, 24)), matrix(2, 24, 24)
    kind = _dispatch.operands(a.dtype)
    z = matmul(a, R, torch.float32, kind, Tiles(16, 16, 16, 4, 2))
    as_good(z, a.double() @ R.double(), a.float() @ operand(R, kind))


def test_strides_beyond_the_reach_of_a_tile():
    x, R = far_apart(tensor(17, 5, dtype=torch.bfloat16)), matrix(5, 5)
    z = ops.transform(x, R, backend="triton")
    as_good(z, x.double() @ R.mT.double(), plain(x, R.mT, "triton", x.dtype))


@pytest.mark.parametrize(
    ("shape", "stack"), [((6,), ()), ((5, 6), ()), ((2, 3, 6), ()), ((3, 4, 6), (3,)), ((0, 6), ())]
)
def test_gradients_of_transform(shape, stack):
    x, R = tensor(*shape, dtype=torch.float64).requires_grad_(), matrix(*stack, 6, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.transform(x, R), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.transform(x, R), x)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_gradients_of_fold(stack):
    W, R = tensor(*stack, 5, 4, dtype=torch.float64), matrix(*stack, 4, 4, dtype=torch.float64)
    W.requires_grad_()
    assert torch.autograd.gradcheck(lambda W: ops.fold(W, R), W)
    assert torch.autograd.gradgradcheck(lambda W: ops.fold(W, R), W)
    assert torch.autograd.gradcheck(lambda W: ops.fold(W, R.mT), W)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", FLOATS)
def test_gradients_come_in_the_dtype_of_the_input(out, backend):
    W, R = tensor(24, 19).requires_grad_(), matrix(19, 19)
    grad = tensor(24, 19, dtype=out)
    (dW,) = torch.autograd.grad(ops.fold(W, R, out, backend=backend), W, grad)
    as_good(dW, grad.double() @ R.mT.double(), plain(grad, R.mT, backend, torch.float32))
    x, dz = tensor(30, 19, dtype=out).requires_grad_(), tensor(30, 19, dtype=out)
    (dx,) = torch.autograd.grad(ops.transform(x, R, backend=backend), x, dz)
    as_good(dx, dz.double() @ R.double(), plain(dz, R, backend, out))


def test_gradients_go_through_the_kernel():
    W, R = tensor(24, 19).requires_grad_(), matrix(19, 19)
    for op in (ops.fold, ops.transform):
        kernels = launches(lambda op=op: op(W, R, backend="triton").sum().backward())
        assert kernels == ["matmul_kernel"] * 2


def test_autograd_notices_that_a_saved_R_changed():
    R, x = matrix(3, 4, 4), tensor(3, 2, 4).requires_grad_()
    z = ops.transform(x, R)
    ops.apply_(R, torch.zeros_like(R), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
