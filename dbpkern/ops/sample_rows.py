"""Sampled rows, converted and put in their place: tokens, or the unfolded patches of images."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import check_same_device, check_tensor, operator
from dbpkern.ops._matmul import cdiv, rounded
from dbpkern.ops._triton import Kernel, jit, tl

ROWS, BLOCK = 8, 256
"""Rows and features that a program moves."""


@jit
def row_numbers(index, COUNT, N, INDEXED: tl.constexpr, ROWS: tl.constexpr):
    """This program's places in `out`, the numbers of the rows that go there, and which of these exist."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if INDEXED:
        row = tl.load(index + place, mask=place < COUNT, other=0)
    else:
        row = place
    return place, row, (row >= 0) & (row < N)


@jit
def store_rows(out, x, place, f, exists, COUNT, D, out_n, EMULATE: tl.constexpr):
    """Store `x [ROWS, BLOCK]` as features f of the rows `place`; NaN for rows that do not exist."""
    x = tl.where(exists[:, None], x.to(tl.float32), float("nan"))
    inside = (place < COUNT)[:, None] & (f < D)[None, :]
    tl.store(
        out + place[:, None] * out_n + f[None, :], rounded(x, out.dtype.element_ty, EMULATE), mask=inside
    )


@jit
def rows_kernel(
    out, x, index, COUNT, N, PER, D, out_n, x_b, x_n, x_d,
    INDEXED: tl.constexpr, EMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out [COUNT, D]` from the rows `index` of `x [N / PER, PER, D]`; rows on axis 0, features on axis 1."""
    place, row, exists = row_numbers(index, COUNT, N, INDEXED, ROWS)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = row // PER * x_b + row % PER * x_n
    inside = (exists & (place < COUNT))[:, None] & (f < D)[None, :]
    values = tl.load(x + start[:, None] + (f.to(tl.int64) * x_d)[None, :], mask=inside, other=0.0)
    store_rows(out, values, place, f, exists, COUNT, D, out_n, EMULATE)


@jit
def patches_kernel(
    out, x, index, COUNT, N, PER, GRID_W, D, H, W, out_n, x_b, x_c, x_h, x_w,
    left, top, stride_h, stride_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    INDEXED: tl.constexpr, EMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out [COUNT, D]` from the patches `index` of `x [N / PER, C, H, W]`, GRID_W side by side."""
    place, row, exists = row_numbers(index, COUNT, N, INDEXED, ROWS)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cell = (row % PER).to(tl.int32)
    y = (cell // GRID_W * stride_h - top)[:, None] + (f // KERNEL_W % KERNEL_H * dilation_h)[None, :]
    v = (cell % GRID_W * stride_w - left)[:, None] + (f % KERNEL_W * dilation_w)[None, :]
    corner = (row // PER * x_b)[:, None] + ((f // (KERNEL_H * KERNEL_W)).to(tl.int64) * x_c)[None, :]
    inside = (exists & (place < COUNT))[:, None] & (f < D)[None, :]
    inside = inside & (y >= 0) & (y < H) & (v >= 0) & (v < W)
    values = tl.load(x + corner + y.to(tl.int64) * x_h + v.to(tl.int64) * x_w, mask=inside, other=0.0)
    store_rows(out, values, place, f, exists, COUNT, D, out_n, EMULATE)


def _launch(
    kernel: Kernel, out: Tensor, x: Tensor, index: Tensor | None,
    sizes: Mapping[str, object], constants: Mapping[str, object],
) -> None:  # fmt: skip
    count, d = out.shape
    _triton.launch(
        kernel,
        (cdiv(count, ROWS), cdiv(d, BLOCK)),
        {
            "out": out, "x": x, "index": out if index is None else index,
            "COUNT": count, "D": d, "out_n": out.stride(0), **sizes,
        },
        {
            "INDEXED": index is not None, "EMULATE": _triton.INTERPRETED, "ROWS": ROWS, "BLOCK": BLOCK,
            **constants,
        },
        4,
        1,
    )  # fmt: skip


def triton_rows(out: Tensor, x: Tensor, index: Tensor | None) -> None:
    """The rows by the Triton kernel."""
    if x.dim() != 3:  # tokens of several images are read where they lie, with the class token cut off, too
        x = x.reshape(1, -1, x.shape[-1])
    images, per, _ = x.shape
    x_b, x_n, x_d = x.stride()
    sizes = {"N": images * per, "PER": per, "x_b": x_b, "x_n": x_n, "x_d": x_d}
    _launch(rows_kernel, out, x, index, sizes, {})


def triton_patches(
    out: Tensor,
    x: Tensor,
    index: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """The patches of `x [B, C, H, W]` by the Triton kernel."""
    rows, columns = patch_grid(x, kernel, stride, padding, dilation)
    sizes = {
        "N": len(x) * rows * columns, "PER": rows * columns, "GRID_W": columns,
        "H": x.shape[2], "W": x.shape[3], **dict(zip(("x_b", "x_c", "x_h", "x_w"), x.stride(), strict=True)),
        "left": padding[0], "top": padding[2], "stride_h": stride[0], "stride_w": stride[1],
        "dilation_h": dilation[0], "dilation_w": dilation[1],
    }  # fmt: skip
    _launch(patches_kernel, out, x, index, sizes, {"KERNEL_H": kernel[0], "KERNEL_W": kernel[1]})


def patch_grid(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Numbers of rows and columns of patches in the images `x [B, C, H, W]`."""
    left, right, top, bottom = padding
    sizes = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    rows, columns = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    return rows, columns


def _eager_patches(
    out: Tensor,
    x: Tensor,
    index: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    rows, columns = patch_grid(x, kernel, stride, padding, dilation)
    x = F.pad(x, tuple(padding))
    if index is None:
        index = torch.arange(len(out), device=x.device)
    cell = index % (rows * columns)
    # Reads the sampled patches alone: unfolding every patch would copy the whole batch.
    y, v = (
        start[:, None] * s + torch.arange(k, device=x.device) * d  # [n_s, k]
        for start, s, k, d in zip((cell // columns, cell % columns), stride, kernel, dilation, strict=True)
    )
    image = (index // (rows * columns))[:, None, None]
    patches = x[image, :, y[:, :, None], v[:, None, :]]  # [n_s, kh, kw, C]
    out.unflatten(1, (-1, *kernel)).copy_(patches.permute(0, 3, 1, 2))


def _serves(op: str, out: Tensor, x: Tensor, backend: str) -> str:
    refusal = _dispatch.triton_refusal(out.device, out.dtype, x.dtype)
    return _dispatch.choose(op, backend, {"triton": refusal}, _dispatch.preferred(op, out.device))


@operator("sample_rows_", mutates=("out",))
def _sample_rows(out: Tensor, x: Tensor, index: Tensor | None, backend: str) -> None:
    if not out.numel():
        return
    if _serves("sample_rows_", out, x, backend) == "triton":
        triton_rows(out, x, index)
        return
    rows = x.reshape(-1, x.shape[-1])
    out.copy_(rows if index is None else rows.index_select(0, index))


@_sample_rows.register_fake
def _(out: Tensor, x: Tensor, index: Tensor | None, backend: str) -> None:
    return None


@operator("sample_patches_", mutates=("out",))
def _sample_patches(
    out: Tensor,
    x: Tensor,
    index: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> None:
    if not out.numel():
        return
    gather = triton_patches if _serves("sample_patches_", out, x, backend) == "triton" else _eager_patches
    gather(out, x, index, kernel, stride, padding, dilation)


@_sample_patches.register_fake
def _(
    out: Tensor,
    x: Tensor,
    index: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> None:
    return None


def _check_rows(out: Tensor, x: Tensor, index: Tensor | None, rows: int, d: int) -> None:
    """Raise unless `out` holds the sampled ones of `rows` rows of d features."""
    check_tensor("out", out, "[n_s, d]", (2,))
    tensors = {"out": out, "x": x}
    if index is not None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected None or an int64 tensor [n_s], got {kind}")
        if index.dim() != 1 or not index.is_contiguous():
            raise ValueError(f"index: expected contiguous [n_s], got shape {list(index.shape)}")
        tensors["index"] = index
        rows = len(index)
    if out.shape != (rows, d):
        raise ValueError(f"out: expected shape {[rows, d]}, got {list(out.shape)}")
    if d > 1 and out.stride(1) != 1:
        raise ValueError(f"out: expected features side by side, got strides {list(out.stride())}")
    check_same_device(**tensors)


def sample_rows_(out: Tensor, x: Tensor, index: Tensor | None, *, backend: str | None = None) -> Tensor:
    """Write the rows `index` of x into `out`, in its dtype.

    Args:
        out: `[n_s, d]`, any floating-point dtype, features side by side; overwritten.
        x: `[*, d]`, any floating-point dtype.
        index: `[n_s]`, int64 numbers of rows, counted over all leading dimensions of x; None for every row.
            Eager gathering checks their range (on a GPU asynchronously), Triton answers a number out of
            range with NaN.
        backend: None for the automatic choice, "eager" or "triton" (one launch).

    Returns:
        out.

    Raises:
        TypeError: not floating-point tensors, or an index that is not int64.
        ValueError: shapes, strides or devices that do not fit, a backend that cannot serve the call.
    """
    check_tensor("x", x, "[*, d]", tuple(range(1, 9)))
    d = x.shape[-1]
    _check_rows(out, x, index, x.shape[:-1].numel(), d)
    _dispatch.check_backend(backend)
    torch.ops.dbpkern.sample_rows_(out, x, index, backend or "")
    return out


def sample_patches_(
    out: Tensor,
    x: Tensor,
    index: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    backend: str | None = None,
) -> Tensor:
    """Write the patches `index` of images, as a convolution reads them, into `out`, in its dtype.

    Row by row what `F.unfold(x, ...).mT` has: image, row and column of the patch count from the slowest
    to the fastest, and a patch's features are ordered by channel, row and column.

    Args:
        out: `[n_s, C kh kw]`, any floating-point dtype, features side by side; overwritten.
        x: images `[B, C, H, W]` or `[C, H, W]`, any floating-point dtype.
        index: `[n_s]`, int64 numbers of patches; None for every patch. Out of range as in `sample_rows_`.
        kernel: `(kh, kw)`.
        stride: `(rows, columns)` between patches.
        padding: zeros at the (left, right, top, bottom) of an image, as `F.pad` takes them.
        dilation: `(rows, columns)` between the elements of a patch.
        backend: None for the automatic choice, "eager" or "triton" (one launch).

    Returns:
        out.

    Raises:
        TypeError: not floating-point tensors, or an index that is not int64.
        ValueError: shapes, strides or devices that do not fit, a backend that cannot serve the call.
    """
    check_tensor("x", x, "[B, C, H, W] or [C, H, W]", (3, 4))
    for name, value, count in (
        ("kernel", kernel, 2), ("stride", stride, 2), ("padding", padding, 4), ("dilation", dilation, 2),
    ):  # fmt: skip
        if len(value) != count:
            raise ValueError(f"{name}: expected {count} numbers, got {value}")
    x = x if x.dim() == 4 else x[None]
    rows, columns = patch_grid(x, kernel, stride, padding, dilation)
    if min(rows, columns) < 1:
        raise ValueError(f"kernel: expected one that fits into the padded images, got {kernel}")
    _check_rows(out, x, index, len(x) * rows * columns, x.shape[1] * kernel[0] * kernel[1])
    _dispatch.check_backend(backend)
    torch.ops.dbpkern.sample_patches_(out, x, index, kernel, stride, padding, dilation, backend or "")
    return out
