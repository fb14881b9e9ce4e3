"""Divergences of dense distributions; and what touches the student's logits [N, V], a chunk of rows at a time.

`split_logits` and `loss_of_rows` are differentiable in the logits. What they keep for the backward pass are
the logits, which the caller holds anyway; the only tensor of the size of the logits that is made is their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore.errors import InvalidInputError

CHUNK_BYTES: Final = 2**24
"""The size of one chunk of logits in the dtype that is computed in, unless the caller gives a number of rows."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""From the logits [c, V] of some of the rows and which of them these are, to their losses [c]."""


Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From the logprobs of teacher and student over the same classes [M, C] to one number a row [M]."""


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def split_logits(
    logits: Tensor, rows: Tensor, ids: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Splits rows of logits into those of some entries and the logsumexp of all others.

    Nothing is subtracted to leave entries out, hence nothing cancels: the second result is exact however small it is.

    Args:
        logits: [N, V].
        rows: int64 [M], the rows to look at, ascending.
        ids: int64 [M, K], the entries; one that comes twice in a row is left out of the others once.
        temperature: the logits are divided by it.
        chunk: rows at a time.

    Returns:
        (logits of the entries [M, K], logsumexp of the others [M]; -inf where there are none), both of the working
        dtype.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (logits.shape[1] * working_dtype(logits).itemsize))
    entries, others = _Split.apply(logits, rows, ids, temperature, chunk)  # type: ignore[no-untyped-call]
    return entries, others


def loss_of_rows(logits: Tensor, rows: Tensor, loss: RowLoss, chunk: int | None = None) -> Tensor:
    """A loss that needs every entry of a row, computed anew in the backward pass.

    Args:
        logits: [N, V].
        rows: int64 [M], the rows to look at, ascending.
        loss: differentiable function of the chunk's logits in the working dtype, by torch's own means.
        chunk: rows at a time; such a loss makes several tensors of the size of a chunk.

    Returns:
        [M], of the working dtype.
    """
    chunk = chunk or max(1, CHUNK_BYTES // 4 // (logits.shape[1] * working_dtype(logits).itemsize))
    losses: Tensor = _Recomputed.apply(logits, rows, loss, chunk)  # type: ignore[no-untyped-call]
    return losses


def divergence_of(kind: Kind, beta: float) -> Divergence:
    """The divergence of that name, for distributions over the same classes; -inf on both sides is no class.

    Args:
        kind: its name.
        beta: weight of the teacher in the mixture of the Jensen-Shannon divergence.

    Raises:
        InvalidInputError: there is no divergence of that name, or beta does not lie between 0 and 1.
    """
    divergences: dict[Kind, Divergence] = {
        "forward_kl": _kl,
        "reverse_kl": lambda teacher, student: _kl(student, teacher),
        "jensen_shannon": lambda teacher, student: _jensen_shannon(teacher, student, beta),
        "total_variation": lambda teacher, student: (teacher.exp() - student.exp()).abs().sum(-1) / 2,
    }
    if kind not in divergences:
        raise InvalidInputError(f"kind={kind!r} is not one of {', '.join(map(repr, divergences))}")
    if not 0 < beta < 1:
        raise InvalidInputError(
            f"beta={beta} must lie between 0 and 1: at the ends the divergence is zero; use forward_kl or reverse_kl"
        )
    return divergences[kind]


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Sum of a (log a - log b), 0 where a is 0."""
    return (first.exp() * torch.where(first > -torch.inf, first - second, 0.0)).sum(-1)


def _jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    # logaddexp of twice -inf has the gradient NaN; the floor has none, and stands where nothing is added up.
    floor = torch.finfo(student.dtype).min / 2
    mixture = torch.logaddexp(
        (teacher + math.log(beta)).clamp(min=floor), (student + math.log1p(-beta)).clamp(min=floor)
    )
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, temperature: float, chunk: int) -> Any:
        entries, others = [], []
        space = _space(logits, chunk)
        for part in _parts(rows, chunk):
            z = _copy(logits, rows, part, space, temperature)
            entries.append(z.gather(1, ids[part]))
            # logsumexp in place: a new tensor for each step would cost more time than the step.
            most = z.scatter_(1, ids[part], -torch.inf).amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
            others.append(z.sub_(most).exp_().sum(1).log_().add_(most[:, 0]))
        ctx.temperature, ctx.chunk = temperature, chunk
        result = torch.cat(entries), torch.cat(others)
        ctx.save_for_backward(logits, rows, ids, result[1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entries: Tensor, grad_others: Tensor) -> Any:
        logits, rows, ids, others = ctx.saved_tensors
        # Where there are no others, every entry is overwritten below; this only avoids inf - inf.
        others = others.masked_fill(others == -torch.inf, 0)
        grad_entries, grad_others = grad_entries / ctx.temperature, grad_others / ctx.temperature
        grad = _empty_gradient(logits, rows)
        direct = len(rows) == len(logits) and grad.dtype == others.dtype
        space = _space(logits, 0 if direct else ctx.chunk)
        for part in _parts(rows, ctx.chunk):
            z = _copy(logits, rows, part, grad[part] if direct else space, ctx.temperature)
            z.sub_(others[part, None]).exp_().mul_(grad_others[part, None])
            # First all to zero, then added: an id that comes twice has the gradient of both.
            z.scatter_(1, ids[part], 0.0).scatter_add_(1, ids[part], grad_entries[part])
            if not direct:
                grad.index_copy_(0, rows[part], z.to(grad.dtype))
        return grad, None, None, None, None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, loss: RowLoss, chunk: int) -> Tensor:
        ctx.loss, ctx.chunk = loss, chunk
        ctx.save_for_backward(logits, rows)
        space = _space(logits, chunk)
        return torch.cat([loss(_copy(logits, rows, part, space), part) for part in _parts(rows, chunk)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> Any:
        logits, rows = ctx.saved_tensors
        grad, space = _empty_gradient(logits, rows), _space(logits, ctx.chunk)
        for part in _parts(rows, ctx.chunk):
            z = _copy(logits, rows, part, space).detach().requires_grad_()
            with torch.enable_grad():
                losses = ctx.loss(z, part)
            (grad_z,) = torch.autograd.grad(losses, z, grad_losses[part])
            grad.index_copy_(0, rows[part], grad_z.to(grad.dtype))
        return grad, None, None, None


def _parts(rows: Tensor, chunk: int) -> Iterator[slice]:
    """Slices of the rows; an empty one where there are no rows, so that results have their shape all the same."""
    return (slice(start, start + chunk) for start in range(0, max(1, len(rows)), chunk))


def _space(logits: Tensor, rows: int) -> Tensor:
    """Room for so many rows, or for all, in the working dtype."""
    return logits.new_empty(min(rows, len(logits)), logits.shape[1], dtype=working_dtype(logits))


def _copy(logits: Tensor, rows: Tensor, part: slice, space: Tensor, temperature: float = 1.0) -> Tensor:
    """The part's rows divided by the temperature, at the beginning of that space."""
    taken = logits[part] if len(rows) == len(logits) else logits.index_select(0, rows[part])
    z = space[: len(taken)].copy_(taken)
    return z if temperature == 1 else z.div_(temperature)


def _empty_gradient(logits: Tensor, rows: Tensor) -> Tensor:
    """Zeros where rows are left out; when all are written, nothing needs to be zero first."""
    return torch.empty_like(logits) if len(rows) == len(logits) else torch.zeros_like(logits)
