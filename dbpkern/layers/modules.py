"""Layers that decorrelate their input.

Each is a subclass of the stock layer it replaces: `weight` and `bias` keep their names and stay the same
Parameter objects, and a buffer `R [d, d]` (fp32, the identity at first) joins them; or, for a low-rank
`R = I + Q S Q^T`, buffers `Q [d, r]` and `S [r, r]` (S zero at first). With `z = R x` the layer computes
`W z + b`, either in the folded form, `x (W R)^T`, whose cost does not grow with the number of tokens, or in
the applied form, `(x R^T) W^T`, which is cheaper for fewer rows than outputs.

R is not trained by the task loss: `dbpkern.DecorSGD` updates it from rows sampled in the backward pass.
"""

import copy
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbpkern import distributed, ops
from dbpkern.capture import MovedTap, Slot, Tap, slot_of
from dbpkern.rows import count_patches, count_tokens, pad, patch_grid, take_patches, take_tokens
from dbpkern.sites import SharedInput
from dbpkern.structure import Full, LowRank, structure_of

FORMS = ("auto", "fold", "apply")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_form(form: str) -> None:
    """Raise ValueError unless `form` names a way to compute the layer."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")


_BUFFERS = (*Full.names, *LowRank.names)


def _recast(module: nn.Module, cls: type[ModuleT]) -> ModuleT:
    """A `cls` with the attributes of `module`: the same Parameters, hooks and flags, not copies."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(module.__dict__[name])
    new._compiled_call_impl = None  # made by module.compile(), for the class left behind
    return new


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module or to one that holds it."""
    return getattr(module, "_is_fsdp_managed_module", False)  # set for torch.compile to know


class Decorrelated(nn.Module):
    """What the decorrelated layers share: R, its precision, its checkpoints and its samples."""

    stock: type[nn.Module]
    """The class of layer that this one replaces and fuses back into."""
    weight_name = "weight"

    weight: Tensor
    form: str
    """How the layer computes, one of `FORMS`."""
    structure: Full | LowRank
    """How the layer holds R."""
    site: str | None
    """Where in its block the layer stands, if `decorrelate` knew."""
    shared: SharedInput | None
    """Layers that hold the same object read one input and have one R."""
    _key: Tensor | None

    @classmethod
    def _from_stock(cls, module: nn.Module, form: str, rank: int | None) -> Self:
        if type(module) is not cls.stock:
            raise TypeError(
                f"{cls.__name__}: expected exactly {cls.stock.__name__}, got {type(module).__name__}"
            )
        check_form(form)
        structure = structure_of(rank)
        new = _recast(module, cls)
        new.form = form
        new.structure = structure
        new.site = None
        new.shared = None
        new._key = None
        for name, buffer in zip(structure.names, new._start(), strict=True):
            new.register_buffer(name, buffer)
        return new

    def _start(self) -> tuple[Tensor, ...]:
        """Buffers of R = I as the weight would have them."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.structure.start(self._matrix().shape[1], dtype, self.weight.device)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The buffers that hold R: `(R,)`, or `(Q, S)` for a low-rank R."""
        return tuple(getattr(self, name) for name in self.structure.names)

    @factors.setter
    def factors(self, values: tuple[Tensor, ...]) -> None:
        for name, value in zip(self.structure.names, values, strict=True):
            setattr(self, name, value)

    def dense_R(self) -> Tensor:
        """R as a matrix `[d, d]`, to look at: a low-rank R is multiplied out."""
        return self.structure.matrix(*self.factors)

    def fold(self, W: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`W R` for `W [o, d]`."""
        return self.structure.fold(W, out_dtype, *self.factors)

    def transform(self, x: Tensor) -> Tensor:
        """`x R^T` for `x [*, d]`."""
        return self.structure.transform(x, *self.factors)

    def _matrix(self) -> Tensor:
        """The weight as `[o, d]`."""
        return self.weight

    def count_rows(self, x: Tensor) -> int:
        """Number of rows in the input x: its tokens."""
        return count_tokens(x)

    def take_rows(self, out: Tensor, x: Tensor, index: Tensor | None) -> None:
        """Write the rows `index` (all of them for None) of the input x into `out [n_s, d]`."""
        take_tokens(out, x, index)

    def _folds(self, rows: int) -> bool:
        return self.form == "fold" or (self.form == "auto" and rows > len(self._matrix()))

    def _tapped(self, x: Tensor) -> Tensor:
        """The weight, tied to x so that its backward samples x, where anyone asked for samples."""
        if not self.training or not torch.is_grad_enabled():
            return self.weight
        if self.shared is not None and not torch.compiler.is_compiling():
            self.shared.check(self, x)
        if self._key is None:
            return self.weight
        return Tap.apply(self.weight, x.detach(), self._key)

    def _drop(self, folded: Tensor, weight: Tensor, x: Tensor, *outputs: Tensor | None) -> None:
        """Free `folded`, the W R that made `outputs` from x, until their backward, which folds again.

        Under FSDP alone: it frees the gathered weight in between, and W R, as large, must not outlive it.
        """
        if not is_sharded(self) or torch.compiler.is_compiling():
            return
        # What activation checkpointing repeats within a backward is used at once.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        users = [y.grad_fn for y in outputs if y is not None and y.grad_fn is not None]
        later = folded.grad_fn or x.grad_fn  # its backward comes after all that read W R
        if not users or later is None:
            return
        folded, weight = folded.data, weight.detach()  # .data: to fill it again is no change to autograd
        storage = folded.untyped_storage()
        size = storage.nbytes()

        @torch.no_grad()
        def fill(_: object) -> None:
            if not storage.nbytes():
                storage.resize_(size)
                folded.copy_(self.fold(weight.flatten(1), folded.dtype).view_as(folded))

        def free(_: object = None) -> None:
            storage.resize_(0)

        for user in users:
            user.register_prehook(fill)
        later.register_prehook(free)
        free()

    def _applied(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """z of all `rows [*, d]` of the input x, and the weight, tied to x as by `_tapped`.

        Where R's step is linear in M, the sampled rows say with z what R moves by: see `ops.fused_step`.
        """
        slot = self._linear_slot(rows)
        if slot is None:
            return self.transform(rows), self._tapped(x)
        flat = rows.reshape(-1, rows.shape[-1])
        index = slot.draw(len(flat), flat.device)
        if index is None:
            index = torch.arange(len(flat), device=flat.device)
        (R,) = self.factors
        z, new, a = ops.fused_step(flat, R, index, 1.0, slot.kappa)
        moved = new - R + 0 * a.sum()  # NaN where the samples are not finite: M is zero there
        weight = MovedTap.apply(self.weight, x.detach(), index, moved, self._key)
        return z.view(rows.shape), weight

    def _linear_slot(self, rows: Tensor) -> Slot | None:
        """The slot, if rows are sampled now and R's step is linear in M."""
        # A compiler cannot follow the host's choice of rows; several processes average statistics first.
        if self._key is None or torch.compiler.is_compiling() or distributed.world_size() > 1:
            return None
        wanted = self.training and torch.is_grad_enabled() and self.trains and rows.numel() > 0
        slot = slot_of(self._key) if wanted and isinstance(self.structure, Full) else None
        return slot if slot is not None and slot.linear and slot.sampler.due else None

    @property
    def trains(self) -> bool:
        """Whether the weight is trained; R rests where it is not."""
        return self.weight.requires_grad

    @property
    def slot_key(self) -> Tensor | None:
        """The key of the slot that samples go to, or None."""
        return self._key

    def attach(self, slot: Slot | None, samples: bool = True) -> None:
        """Send samples to `slot` from now on, if this layer is to; None stops sampling."""
        self._key = None if slot is None or not samples else slot.key

    def reset_R(self) -> None:
        """Set R to the identity, in place."""
        if any(b.is_meta for b in self.factors) and not self.weight.is_meta:
            self.factors = self._start()  # after load_state_dict(assign=True) on a meta model
        with torch.no_grad():
            self.structure.reset(*self.factors)

    def fused(self) -> nn.Module:
        """The stock layer with `W <- W R`, written into the same Parameter.

        Under FSDP, where every process folds its own rows of W, the layer itself becomes the stock layer.

        Raises:
            ValueError: under FSDP, the weight is gathered or not sharded by rows.
        """
        rows = self._own_rows()
        with torch.no_grad():
            rows.copy_(self.fold(rows.flatten(1)).view_as(rows))
        self.attach(None)
        names = self.structure.names
        new = self._restocked() if is_sharded(self) else _recast(self, self.stock)
        for name in ("form", "structure", "site", "shared", "_key"):
            del new.__dict__[name]
        for name in names:
            del new._buffers[name]
        return new

    def _own_rows(self) -> Tensor:
        """The rows of the weight that lie in this process."""
        weight = self.weight
        if not is_sharded(self):
            return weight
        if not (hasattr(weight, "to_local") and hasattr(weight, "placements")):
            raise ValueError(
                "fused: expected the weight as FSDP shards it, but it is gathered now; call reshard() on the "
                "module that fully_shard was applied to, or fuse(model)"
            )
        if any(p.is_shard() and not p.is_shard(0) for p in weight.placements):
            raise ValueError(f"fused: expected a weight sharded by rows, Shard(0), got {weight.placements}")
        return weight.to_local()

    def _restocked(self) -> nn.Module:
        # FSDP puts the gathered weight into the object that it was given: another would not get it.
        from torch.distributed.fsdp import FSDPModule  # slow to import, and rarely needed

        cls = self.stock
        if isinstance(self, FSDPModule):
            own = {"__deepcopy__": type(self).__deepcopy__}  # type: ignore[attr-defined]  # by fully_shard
            cls = type(f"FSDP{cls.__name__}", (FSDPModule, cls), own)
        self.__class__ = cls  # type: ignore[assignment]  # it is a stock layer from here on
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        factors = self.factors
        super()._apply(fn, recurse)
        # .half() and .to(dtype) are for weights: rounding R would undo what it has learned.
        self.factors = tuple(
            new if new.dtype in (torch.float32, torch.float64) else old.to(new.device)
            for old, new in zip(factors, self.factors, strict=True)
        )
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A stock checkpoint knows weights that act on x: with R = I this layer's do, too. One of a layer
        # whose R has another structure is no stock checkpoint, and its keys are reported.
        converted = any(prefix + name in state_dict for name in _BUFFERS)
        if not converted and prefix + self.weight_name in state_dict:
            ours = {prefix + name for name in self.structure.names}
            missing_keys[:] = [key for key in missing_keys if key not in ours]
            self.reset_R()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not send its samples to the original's optimizer.
        return {**self.__dict__, "_key": None}

    def extra_repr(self) -> str:
        """The stock layer's line, the size of R, and the form if it is forced."""
        form = "" if self.form == "auto" else f", form={self.form}"
        return f"{super().extra_repr()}, {self.structure.describe(*self.factors)}{form}".removeprefix(", ")


def _autocast(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """x and the dtype for weights as autocast would have them in a matrix product."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        # Cast here, once: the sampling and the product then keep one copy of x for the backward.
        return x.to(dtype), dtype
    return x, None


class DecorLinear(Decorrelated, nn.Linear):
    """`y = W R x + b`, a linear layer whose input is decorrelated (arXiv 2510.14657, Eqs. 1 to 3).

    Shapes as `nn.Linear`: `[*, d] -> [*, o]`. Made by `from_linear` or `dbpkern.decorrelate`.
    """

    stock = nn.Linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: str = "auto", rank: int | None = None) -> Self:
        """Take over a linear layer: same Parameters, R = I, the same output bit for bit.

        Args:
            linear: exactly an `nn.Linear`; a subclass may compute something else.
            form: "fold", "apply", or "auto" to fold when there are more rows than outputs.
            rank: of `R - I`, from 1 to the layer's width, for a low-rank R; None for a full one.

        Raises:
            TypeError: `linear` is of another class, or rank not an integer.
            ValueError: unknown form, or rank out of range.
        """
        return cls._from_stock(linear, form, rank)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, d] -> [*, o]`."""
        x, dtype = _autocast(x)
        if self._folds(self.count_rows(x)):
            weight = self._tapped(x)
            folded = self.fold(weight, dtype)
            y = F.linear(x, folded, self.bias)
            self._drop(folded, weight, x, y)
            return y
        z, weight = self._applied(x, x)
        return F.linear(z, weight, self.bias)


class DecorConv2d(Decorrelated, nn.Conv2d):
    """A convolution whose unfolded patches are decorrelated: a row is one patch of `C kh kw` values.

    Shapes as `nn.Conv2d` with `groups=1`: `[B, C, H, W] -> [B, o, H', W']`. Made for patch embeddings;
    any kernel size, stride, padding and dilation works. Made by `from_conv` or `dbpkern.decorrelate`.
    """

    stock = nn.Conv2d

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, form: str = "auto", rank: int | None = None) -> Self:
        """Take over a convolution: same Parameters, R = I, the same output bit for bit.

        Args:
            conv: exactly an `nn.Conv2d`, with `groups=1`.
            form: "fold", "apply", or "auto", which folds: unfolding images costs more than it could save.
            rank: of `R - I`, from 1 to the layer's width, for a low-rank R; None for a full one.

        Raises:
            TypeError: `conv` is of another class, or rank not an integer.
            ValueError: unknown form, rank out of range, or a grouped convolution.
        """
        if getattr(conv, "groups", 1) != 1:
            raise ValueError(f"DecorConv2d: expected groups=1, got groups={conv.groups}")
        return cls._from_stock(conv, form, rank)

    def _matrix(self) -> Tensor:
        return self.weight.flatten(1)

    def _folds(self, rows: int) -> bool:
        return self.form != "apply"

    def count_rows(self, x: Tensor) -> int:
        """Number of patches in the images x, `[B, C, H, W]` or `[C, H, W]`."""
        return count_patches(self, x)

    def take_rows(self, out: Tensor, x: Tensor, index: Tensor | None) -> None:
        """Write the patches `index` (all of them for None) of the images x into `out [n_s, C kh kw]`."""
        take_patches(out, self, x, index)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, o, H', W']`."""
        x, dtype = _autocast(x)
        if self._folds(self.count_rows(x)):
            weight = self._tapped(x)
            folded = self.fold(weight.flatten(1), dtype).view_as(weight)
            y = self._conv_forward(x, folded, self.bias)
            self._drop(folded, weight, x, y)
            return y
        images = pad(self, x if x.dim() == 4 else x[None])
        patches = F.unfold(images, self.kernel_size, self.dilation, stride=self.stride)
        z, weight = self._applied(x, patches.mT)
        y = F.linear(z, weight.flatten(1), self.bias).mT.unflatten(2, patch_grid(self, x))
        return y if x.dim() == 4 else y[0]


class DecorMultiheadAttention(Decorrelated, nn.MultiheadAttention):
    """Self-attention whose input is decorrelated before the q, k and v projections, which share one R.

    Arguments and shapes as `nn.MultiheadAttention`. R acts on `in_proj_weight`; the output projection
    stays as it is, because the stock function applies it to an input that never leaves it. Made by
    `from_attention` or `dbpkern.decorrelate`.
    """

    stock = nn.MultiheadAttention
    weight_name = "in_proj_weight"

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]  # nobody sets a layer's weight
        """Of q, k and v, `[3 d, d]`: what R acts on."""
        return self.in_proj_weight

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, form: str = "auto", rank: int | None = None
    ) -> Self:
        """Take over an attention layer: same Parameters, R = I, the same output bit for bit.

        Args:
            attention: exactly an `nn.MultiheadAttention`, with keys and values as wide as queries.
            form: "fold", "apply", or "auto" to fold when there are more tokens than 3 times the width.
            rank: of `R - I`, from 1 to the layer's width, for a low-rank R; None for a full one.

        Raises:
            TypeError: `attention` is of another class, or rank not an integer.
            ValueError: unknown form, rank out of range, or separate projections (`kdim` or `vdim` given).
        """
        if getattr(attention, "in_proj_weight", True) is None:
            raise ValueError(
                "DecorMultiheadAttention: expected one in_proj_weight for q, k and v, "
                f"got kdim={attention.kdim}, vdim={attention.vdim}, embed_dim={attention.embed_dim}"
            )
        return cls._from_stock(attention, form, rank)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention; the arguments are those of `nn.MultiheadAttention`.

        Raises:
            ValueError: query, key and value are not one tensor: their inputs would need an R each.
        """
        if key is not query or value is not query:
            raise ValueError(
                "DecorMultiheadAttention serves self-attention alone: expected the same tensor as "
                "query, key and value; keep cross-attention out with decorrelate(filter=...)"
            )
        x, dtype = _autocast(query)
        folds = self._folds(self.count_rows(x))
        if folds:
            source = self._tapped(x)
            weight = self.fold(source, dtype)
        else:
            x, weight = self._applied(x, x)
        swap = self.batch_first and x.dim() == 3
        if swap:
            x = x.transpose(0, 1)
        y, attention = F.multi_head_attention_forward(
            x,
            x,
            x,
            self.embed_dim,
            self.num_heads,
            weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if folds:
            self._drop(weight, source, x, y, attention)
        return (y.transpose(0, 1) if swap else y), attention
