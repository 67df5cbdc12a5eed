"""RowGrad: the gradient of a table of rows, of which only a batch's rows are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def sum_repeats(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """rows (int64 [n]) sorted, each once, then -1; values [n, C] summed over repeats. Does not wait for the device."""
    rows, order = torch.sort(rows, stable=True)
    starts = torch.ones_like(rows)
    starts[1:] = rows[1:] != rows[:-1]
    place = starts.cumsum(0) - 1
    counts = torch.zeros_like(rows).index_add_(0, place, torch.ones_like(rows))
    summed = torch.segment_reduce(values[order], "sum", lengths=counts, axis=0, unsafe=True)
    return torch.full_like(rows, -1).scatter_(0, place, rows), summed


class RowGrad(Tensor):
    """A gradient [N, C], zero outside `rows` (int64 [n], may repeat: repeats add up), where it is `values` [n, C].

    It behaves as the dense gradient for what training loops do to gradients (accumulate, scale, clip, unscale, zero);
    any other reading, views included, gives a dense copy, any other writing raises.
    """

    _stored: list[Tensor]  # rows and values, shared with aliases (grad.data, grad.detach())

    @staticmethod
    def __new__(cls, rows: Tensor, values: Tensor, num_rows: int) -> RowGrad:
        shape = (num_rows, values.shape[1])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=(shape[1], 1), dtype=values.dtype, device=values.device
        )

    def __init__(self, rows: Tensor, values: Tensor, num_rows: int):
        self._stored = [rows, values]

    @property
    def rows(self) -> Tensor:
        return self._stored[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]  # shadows Tensor.values, which only sparse tensors have
        return self._stored[1]

    def _store(self, rows: Tensor, values: Tensor) -> None:
        self._stored[:] = rows, values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RowGrad(shape={tuple(self.shape)}, rows={self.rows}, values={self.values})"

    def with_values(self, values: Tensor) -> RowGrad:
        return RowGrad(self.rows, values, self.shape[0])

    def merge_(self) -> RowGrad:
        """Sum the values of repeated rows, in place; rows come out sorted. Returns self."""
        rows, order = torch.sort(self.rows, stable=True)
        values = self.values[order]
        rows, counts = torch.unique_consecutive(rows, return_counts=True)
        if len(rows) < len(order):
            values = torch.segment_reduce(values, "sum", lengths=counts, axis=0)
        self._store(rows, values)
        return self

    def dense(self) -> Tensor:
        """The gradient as an ordinary tensor [N, C]."""
        self.merge_()
        return self.values.new_zeros(self.shape).index_copy_(0, self.rows, self.values)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError("cannot write into the gradient of a RowTable by index; read it as grad.dense()")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if _writes_row_grad(func, args, kwargs):
            raise NotImplementedError(
                f"{func} cannot write into the gradient of a RowTable; read it as grad.dense(), or scale it with mul_"
            )
        return func(*_densified(args), **_densified(kwargs))


def _writes_row_grad(func: Any, args: tuple, kwargs: dict) -> bool:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return any(isinstance(leaf, RowGrad) for leaf in torch.utils._pytree.tree_leaves(written))


def _densified(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(RowGrad, RowGrad.dense, tree)


def _alias(func: Any, grad: RowGrad) -> RowGrad:
    alias = grad.with_values(grad.values)
    alias._stored = grad._stored
    return alias


def _clone(func: Any, grad: RowGrad, **_: Any) -> RowGrad:
    return RowGrad(grad.rows.clone(), grad.values.clone(), grad.shape[0])


def _add(func: Any, grad: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    if not (isinstance(grad, RowGrad) and isinstance(other, RowGrad)):
        return func(*_densified((grad, other)), alpha=alpha)
    values = torch.cat((grad.values, other.values if alpha == 1 else other.values * alpha))
    return RowGrad(torch.cat((grad.rows, other.rows)), values, grad.shape[0])


def _add_(func: Any, grad: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    if not isinstance(grad, RowGrad):
        return func(grad, _densified(other), alpha=alpha)
    if not isinstance(other, RowGrad):
        raise NotImplementedError(
            "a dense tensor cannot be added to the gradient of a RowTable; use grad.dense() + other"
        )
    summed = _add(func, grad, other, alpha=alpha)
    assert isinstance(summed, RowGrad)
    grad._store(summed.rows, summed.values)
    return grad


def _zero_(func: Any, grad: RowGrad) -> RowGrad:
    grad._store(grad.rows[:0], grad.values[:0])
    return grad


def _scaled(func: Any, grad: Any, *factors: Any, **kwargs: Any) -> Any:
    """mul and div by a scalar: zero stays zero, so the stored values are enough."""
    if not isinstance(grad, RowGrad) or any(isinstance(f, Tensor) and f.numel() != 1 for f in factors):
        return func(*_densified((grad, *factors)), **kwargs)
    return grad.with_values(func(grad.values, *factors, **kwargs))


def _scaled_(func: Any, grad: Any, *factors: Any, **kwargs: Any) -> Any:
    if not isinstance(grad, RowGrad) or any(isinstance(f, Tensor) and f.numel() != 1 for f in factors):
        raise NotImplementedError(f"{func}: the gradient of a RowTable can be scaled in place by one number only")
    func(grad.values, *factors, **kwargs)
    return grad


def _vector_norm(
    func: Any, grad: RowGrad, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The norm over all entries; stored repeats are summed first. Orders up to zero count the zeros: dense."""
    if order <= 0 or dim is not None or keepdim:
        return func(grad.dense(), order, dim, keepdim, dtype=dtype)
    values = grad.merge_().values
    return func(values if values.numel() else values.new_zeros(1), order, dtype=dtype)


def _foreach_norm(func: Any, grads: list[Tensor], order: float = 2, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(g, order, dtype=dtype) for g in grads]


def _foreach_stored_(func: Any, grads: list[Tensor], *args: Any, **kwargs: Any) -> None:
    """In-place foreach operations that leave zero at zero, on what is stored."""
    func([g.values if isinstance(g, RowGrad) else g for g in grads], *args, **kwargs)


def _clamp_(func: Any, grad: Any, low: Any = None, high: Any = None) -> Any:
    if not isinstance(grad, RowGrad) or isinstance(low, Tensor) or isinstance(high, Tensor):
        raise NotImplementedError(f"{func}: the gradient of a RowTable can be clamped by numbers only")
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise NotImplementedError("clamping the gradient of a RowTable must leave 0 at 0: min <= 0 <= max")
    func(grad.merge_().values, low, high)
    return grad


def _foreach_clamp_min_(func: Any, grads: list[Tensor], low: float) -> None:
    for grad in grads:
        grad.clamp_(min=low)


def _foreach_clamp_max_(func: Any, grads: list[Tensor], high: float) -> None:
    for grad in grads:
        grad.clamp_(max=high)


def _foreach_zero_(func: Any, grads: list[Tensor]) -> None:
    for grad in grads:
        grad.zero_()


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.zero_.default: _zero_,
    aten.mul.Tensor: _scaled,
    aten.div.Tensor: _scaled,
    aten.neg.default: _scaled,
    aten.mul_.Tensor: _scaled_,
    aten.mul_.Scalar: _scaled_,
    aten.div_.Tensor: _scaled_,
    aten.div_.Scalar: _scaled_,
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._foreach_mul_.Scalar: _foreach_stored_,
    aten._foreach_mul_.Tensor: _foreach_stored_,
    aten._foreach_div_.Scalar: _foreach_stored_,
    aten._foreach_div_.Tensor: _foreach_stored_,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _foreach_stored_,
    aten.clamp_.default: _clamp_,
    aten._foreach_clamp_min_.Scalar: _foreach_clamp_min_,
    aten._foreach_clamp_max_.Scalar: _foreach_clamp_max_,
    aten._foreach_zero_.default: _foreach_zero_,
}
