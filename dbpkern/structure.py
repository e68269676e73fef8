"""How an R is held: as a matrix, or by factors of low rank."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dbpkern import ops
from dbpkern.capture import derive_seed


@dataclass(frozen=True)
class Full:
    """R as a matrix of its own: one buffer `R [d, d]`."""

    names: ClassVar[tuple[str, ...]] = ("R",)

    def start(self, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
        """The buffers of R = I."""
        return (torch.eye(d, dtype=dtype, device=device),)

    def reset(self, R: Tensor) -> None:
        """Set R to the identity, in place."""
        R.zero_().diagonal().fill_(1)

    def matrix(self, R: Tensor) -> Tensor:
        """R, `[d, d]`."""
        return R

    def fold(self, W: Tensor, out_dtype: torch.dtype | None, R: Tensor) -> Tensor:
        """`W R`, `[o, d]`."""
        return ops.fold(W, R, out_dtype)

    def transform(self, x: Tensor, R: Tensor) -> Tensor:
        """`x R^T`, `[*, d]`."""
        return ops.transform(x, R)

    def describe(self, R: Tensor) -> str:
        """For `extra_repr`."""
        return f"R={list(R.shape)}"


@dataclass(frozen=True)
class LowRank:
    """`R = I + Q S Q^T`: buffers `Q [d, r]`, orthonormal, and `S [r, r]`."""

    rank: int

    names: ClassVar[tuple[str, ...]] = ("Q", "S")

    def start(self, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The buffers of R = I: a random subspace, the same in every process, and S = 0."""
        if not 1 <= self.rank <= d:
            raise ValueError(f"rank: expected an integer in [1, {d}], the layer's width, got {self.rank}")
        Q = torch.empty(d, self.rank, dtype=dtype, device=device)
        S = torch.empty(self.rank, self.rank, dtype=dtype, device=device)
        self.reset(Q, S)
        return Q, S

    def reset(self, Q: Tensor, S: Tensor) -> None:
        """Set R to the identity, in place, and Q to its start: it may never have been written before."""
        S.zero_()
        if not Q.is_meta:
            generator = torch.Generator("cpu").manual_seed(derive_seed(*Q.shape))
            normal = torch.randn(Q.shape, generator=generator, dtype=torch.float64, device="cpu")
            Q.copy_(torch.linalg.qr(normal).Q)

    def matrix(self, Q: Tensor, S: Tensor) -> Tensor:
        """R, `[d, d]`."""
        return self.fold(torch.eye(len(Q), dtype=Q.dtype, device=Q.device), None, Q, S)

    def fold(self, W: Tensor, out_dtype: torch.dtype | None, Q: Tensor, S: Tensor) -> Tensor:
        """`W R`, `[o, d]`."""
        return ops.lowrank_fold(W, Q, S, out_dtype)

    def transform(self, x: Tensor, Q: Tensor, S: Tensor) -> Tensor:
        """`x R^T`, `[*, d]`."""
        return ops.lowrank_transform(x, Q, S)

    def describe(self, Q: Tensor, S: Tensor) -> str:
        """For `extra_repr`."""
        d, r = Q.shape
        return f"R=[{d}, {d}], rank={r}"


def structure_of(rank: int | None) -> Full | LowRank:
    """How a layer holds R: full for None.

    Raises:
        TypeError: rank is neither None nor an integer.
    """
    if rank is None:
        return Full()
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an integer or None, got {type(rank).__name__}")
    return LowRank(rank)
