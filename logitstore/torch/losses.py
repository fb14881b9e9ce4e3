"""Losses from a student's logits and a teacher's sparse distributions.

Row t of the logits is compared with row t of the targets: both predict token t + 1, and nothing is shifted. Below, p is
the teacher and q = softmax(logits) the student, both over the V entries of the vocabulary; C are the candidates of a
position and O the V - |C| other entries, of which the teacher says no more than their mass together, exp(tail).

What becomes of that mass is said by `tail`:

`"ghost"`
    O is one more class. p(O) = exp(tail), q(O) = the sum of q over O, and two distributions over |C| + 1 classes are
    compared. Nothing is assumed of how the teacher's mass lies within O, and the student is not told either.
    (Sparse Logit Sampling, arXiv 2503.16870, calls the class a ghost token.)
`"renormalise"`
    p is divided by its sum over C, and is zero in O. The student keeps its full softmax, except in the reverse
    divergence KL(q || p), which would be infinite: there q is divided by its sum over C as well. From top-k candidates
    this is biased: C gets what O should have. From draws (logprob = log(draws / N)) p sums to one over C by itself,
    and the cross-entropy -sum p log q, which has the gradient of the forward KL, is an unbiased estimator of that of
    the whole teacher (arXiv 2503.16870): at T = 1 this is the mode for draws.
`"uniform"`
    Each entry of O has p = exp(tail) / |O|.
`"target"`
    The token that really follows gets the mass of the tail (arXiv 2503.16870, "residual to the ground truth"), on top
    of its own when it is a candidate; p is zero elsewhere. The student keeps its full softmax. Rows whose next token is
    unknown are left out.

Details that hold for all of them:

*Tail.* The stored tail is used where there is one. Where there is none (NaN, or no `target_tail`) it is log(1 - the sum
of p over C), but at least log(1e-6), below which the rounding of float32 logprobs hides it. Where every entry is a
candidate there is none. The sum of what remains is made one, which undoes what rounding did to stored logprobs.

*Temperature* T. Distributions become p^(1/T) / sum and softmax(logits / T), after the tail is dealt with. Two
consequences: "uniform" is exact when the teacher's tail is uniform; and under "ghost" O is tempered as one class, on
both sides (q(O)^(1/T), with q(O) the student's mass at T = 1), so that a student equal to the teacher still has the
loss zero. The result is multiplied by T^2, which keeps the size of the gradients (Hinton et al. 2015,
arXiv 1503.02531).

*Rows.* A row counts when `mask` is true there and it has a candidate. `"mean"` is over these; of no rows it is 0.

*Precision.* float64 for float64 logits, else float32, whatever the dtype of the logits; so is the result. Gradients
have the dtype of the logits. The only large tensor that is made is the gradient; give contiguous logits, since others
are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional

from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.torch.losses_dense import (
    Divergence,
    Kind,
    divergence_of,
    loss_of_rows,
    split_logits,
)
from logitstore.torch.losses_input import (
    Given,
    Normalised,
    Reduction,
    Tail,
    Teacher,
    check_chunk,
    check_ids,
    check_logits,
    check_one_of,
    check_options,
    check_support,
    check_tensor,
    flat_mask,
    read_teacher,
    rows_where,
)
from logitstore.torch.text import UNKNOWN


class LossOptions(TypedDict, total=False):
    """What every loss takes by keyword.

    Attributes:
        target_tail: floating point [...], log of the mass outside the candidates, nats; NaN where it is not known; inf
            where the logprobs are normalised over the candidates: then `tail` must be "renormalise".
        target_next: int64 [...], the token that follows, -100 where unknown; needed by `tail="target"`.
        mask: bool [...], the positions that count; all when not given.
        tail: "ghost" (the default), "renormalise", "uniform" or "target".
        temperature: T, 1 by default.
        reduction: "mean" (the default), "sum", or "none" for one loss a position [...], 0 where it does not count.
        normalised: what the logprobs are normalised over: the "vocabulary" (the default), or the "candidates" when only
            their ratios are known; then there is no tail, and `tail` must be "renormalise".
        chunk: positions at a time; by default as many as fill 16 MB.
    """

    target_tail: Tensor | None
    target_next: Tensor | None
    mask: Tensor | None
    tail: Tail
    temperature: float
    reduction: Reduction
    normalised: Normalised
    chunk: int | None


def forward_kl(logits: Tensor, target_ids: Tensor, target_logprobs: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    """KL(p || q) = sum of p (log p - log q): covers all that the teacher thinks possible.

    Source: Hinton et al. 2015, arXiv 1503.02531 (as cross-entropy, which has the same gradient).

    Args:
        logits: the student's, floating point [..., V], such as [B, T, V] or [N, V].
        target_ids: int [..., K], the candidates' ids; anything where there is none.
        target_logprobs: floating point [..., K], nats; -inf where there is no candidate.
        **options: see `LossOptions`.

    Returns:
        A scalar, or [...] for `reduction="none"`; nats, times T^2.

    Raises:
        InvalidInputError: shapes that do not fit, options that make no sense together, ids outside the logits (the
            student's vocabulary is too small, or another one), an id twice at one position, logprobs that are NaN.
        InvalidTypeError: a dtype that cannot be used.
    """
    return _loss("forward_kl", logits, target_ids, target_logprobs, **options)


def reverse_kl(logits: Tensor, target_ids: Tensor, target_logprobs: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    """KL(q || p) = sum of q (log q - log p): keeps the student to what the teacher thinks likely.

    It is infinite where the teacher gives zero and the student does not. So `tail="target"` is refused, and
    "renormalise" compares q renormalised over the candidates: the student's mass elsewhere is then not held down.

    Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543; here at each position of given text.

    Arguments, result and errors are those of `forward_kl`.
    """
    return _loss("reverse_kl", logits, target_ids, target_logprobs, **options)


def jensen_shannon(
    logits: Tensor, target_ids: Tensor, target_logprobs: Tensor, *, beta: float = 0.5, **options: Unpack[LossOptions]
) -> Tensor:
    """JSD = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: between the two KLs, and bounded.

    With beta = 1/2 it is at most log 2. Divided by beta it tends to KL(p || q) as beta tends to 0, and divided by
    (1 - beta) to KL(q || p) as beta tends to 1.

    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, the generalised Jensen-Shannon divergence.

    Arguments, result and errors are those of `forward_kl`; also:

    Args:
        logits: as there.
        target_ids: as there.
        target_logprobs: as there.
        beta: weight of the teacher in the mixture, between 0 and 1, neither included.
        **options: as there.
    """
    return _loss("jensen_shannon", logits, target_ids, target_logprobs, beta=beta, **options)


def total_variation(
    logits: Tensor, target_ids: Tensor, target_logprobs: Tensor, **options: Unpack[LossOptions]
) -> Tensor:
    """1/2 sum of |p - q|: the mass that would have to be moved, between 0 and 1 (times T^2, as all losses here).

    Source: Wen et al. 2023 (f-distill), arXiv 2307.15190.

    Arguments, result and errors are those of `forward_kl`.
    """
    return _loss("total_variation", logits, target_ids, target_logprobs, **options)


def cross_entropy(
    logits: Tensor,
    target_next: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """-log q(next token), as `torch.nn.functional.cross_entropy`, in chunks and with the precision of the losses here.

    Args:
        logits: floating point [..., V].
        target_next: int [...], the token that row predicts; -100 where unknown: these do not count.
        mask: bool [...], the positions that count; all when not given.
        reduction: "mean" over the positions that count, "sum", or "none".
        chunk: positions at a time.

    Returns:
        A scalar, or [...] for `reduction="none"`; nats.

    Raises:
        InvalidInputError: shapes that do not fit, or tokens outside the logits.
        InvalidTypeError: a dtype that cannot be used.
    """
    check_one_of("reduction", reduction, Reduction)
    check_chunk(chunk)
    check_logits(logits)
    check_tensor("target_next", target_next, logits.shape[:-1], "int")
    flat, following = logits.reshape(-1, logits.shape[-1]), target_next.reshape(-1).long()
    rows = rows_where(following >= 0, flat_mask(mask, logits))
    following = following[rows]
    check_ids("target_next", following[:, None], flat.shape[1])
    own, others = split_logits(flat, rows, following[:, None], chunk=chunk)
    return _reduced(functional.softplus(others - own[:, 0]), rows, logits.shape[:-1], reduction)


def distillation_loss(
    logits: Tensor,
    batch: Mapping[str, Tensor],
    *,
    kind: Kind = "forward_kl",
    tail: Tail = "ghost",
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
    normalised: Normalised = "vocabulary",
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """The sum alpha * divergence(teacher, student) + (1 - alpha) * cross-entropy of the real next tokens.

    The cross-entropy is at temperature 1 and has no factor. Each of the two is over its own positions: the divergence
    over those with a distribution in `target_mask`; the cross-entropy over those that `labels` name (also where there
    is no distribution), or, without `labels`, over `target_mask` where `target_next` is known. A part with the weight
    0 is not computed.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.

    Args:
        logits: the student's, floating point [B, T, V].
        batch: a batch of the `hf` collator: `target_ids`, `target_logprobs`, `target_mask` and, where there are such,
            `target_tail`, `target_next` and `labels` (labels[t] is tokens[t]: they are shifted here).
        kind: the divergence: "forward_kl", "reverse_kl", "jensen_shannon" or "total_variation".
        tail: what becomes of the mass outside the candidates.
        temperature: T of the divergence.
        alpha: weight of the divergence, 0 to 1.
        beta: of the Jensen-Shannon divergence.
        normalised: what the logprobs are normalised over; "candidates" is known from `target_tail`, where it is inf.
        reduction: "mean" or "sum" of each of the two parts.
        chunk: positions at a time.

    Returns:
        A scalar, nats.

    Raises:
        InvalidInputError: as `forward_kl`; also when the batch lacks what is needed.
        InvalidTypeError: a dtype that cannot be used.
    """
    if not isinstance(batch, Mapping):
        raise InvalidTypeError(
            f"the batch is a {type(batch).__name__}, not a dict of tensors; decode it with "
            f"logitstore.torch.decode_batch, or load it with LogitLoader, which does"
        )
    check_one_of("kind", kind, Kind)
    check_one_of("reduction", reduction, Literal["mean", "sum"])
    if not 0 <= alpha <= 1:
        raise InvalidInputError(f"alpha={alpha}: the weight of the distillation loss must be between 0 and 1")
    parts = []
    if alpha > 0:
        loss = _loss(
            kind,
            logits,
            _entry(batch, "target_ids"),
            _entry(batch, "target_logprobs"),
            target_tail=batch.get("target_tail"),
            target_next=batch.get("target_next"),
            mask=_entry(batch, "target_mask"),
            tail=tail,
            temperature=temperature,
            beta=beta,
            normalised=normalised,
            reduction=reduction,
            chunk=chunk,
        )
        parts.append(alpha * loss)
    if alpha < 1:
        following, mask = _next_tokens(batch)
        parts.append((1 - alpha) * cross_entropy(logits, following, mask=mask, reduction=reduction, chunk=chunk))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _entry(batch: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise InvalidInputError(
            f"the batch has no {name!r}, only {', '.join(sorted(batch))}: use the `hf` collator of logitstore.torch "
            f"and keep its columns (transformers.Trainer needs remove_unused_columns=False)"
        )
    return batch[name]


def _next_tokens(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The token that each row predicts, and the mask to go with it."""
    if "labels" in batch:
        return functional.pad(batch["labels"][..., 1:], (0, 1), value=UNKNOWN), None
    return _entry(batch, "target_next"), _entry(batch, "target_mask")


def _loss(
    kind: Kind,
    logits: Tensor,
    target_ids: Tensor,
    target_logprobs: Tensor,
    *,
    target_tail: Tensor | None = None,
    target_next: Tensor | None = None,
    mask: Tensor | None = None,
    tail: Tail = "ghost",
    temperature: float = 1.0,
    beta: float = 0.5,
    reduction: Reduction = "mean",
    normalised: Normalised = "vocabulary",
    chunk: int | None = None,
) -> Tensor:
    """The frame of all losses: see `forward_kl` and `LossOptions`."""
    divergence = divergence_of(kind, beta)
    check_options(kind, tail, temperature, normalised)
    check_one_of("reduction", reduction, Reduction)
    check_chunk(chunk)
    given = Given(target_ids, target_logprobs, target_tail, target_next if tail == "target" else None, mask)
    teacher = read_teacher(logits, given, tail)
    flat = logits.reshape(-1, logits.shape[-1])
    if kind == "reverse_kl" and tail in ("ghost", "uniform"):
        check_support(teacher, tail)
    if tail == "uniform":
        losses = _uniform_loss(divergence, flat, teacher, temperature, chunk)
    else:
        restricted = kind == "reverse_kl" and tail == "renormalise"
        losses = divergence(*_classes(flat, teacher, temperature, chunk, ghost=tail == "ghost", restricted=restricted))
    return _reduced(losses * temperature**2, teacher.rows, logits.shape[:-1], reduction)


def _classes(
    logits: Tensor, teacher: Teacher, temperature: float, chunk: int | None, *, ghost: bool, restricted: bool
) -> tuple[Tensor, Tensor]:
    """Logprobs [M, K + 1] of teacher and student over the candidates and one class for all other entries.

    One class for all is exact also where the teacher gives them zero. Ghost: the class is formed at T = 1, then
    tempered. Otherwise the logits are tempered first. Restricted: the class is left out.
    """
    candidates, others = split_logits(logits, teacher.rows, teacher.ids, 1.0 if ghost else temperature, chunk)
    candidates = candidates.masked_fill(teacher.logprobs == -torch.inf, -torch.inf)
    student = torch.cat([candidates, (torch.full_like(others, -torch.inf) if restricted else others)[:, None]], 1)
    tail = teacher.tail if ghost else torch.full_like(teacher.tail, -torch.inf)
    known = torch.cat([teacher.logprobs, tail[:, None]], 1) / temperature
    return known.log_softmax(1), (student / temperature if ghost else student).log_softmax(1)


def _uniform_loss(
    divergence: Divergence, logits: Tensor, teacher: Teacher, temperature: float, chunk: int | None
) -> Tensor:
    """The divergence from the teacher's distribution with its tail spread evenly, over all V entries."""
    each = teacher.tail - teacher.others.clamp(min=1).to(teacher.tail.dtype).log()
    # A repeated id brings the value of the one that it repeats: the order of writing does not matter.
    logprobs = torch.where(teacher.logprobs > -torch.inf, teacher.logprobs, teacher.logprobs.amax(1, keepdim=True))

    def loss(z: Tensor, part: slice) -> Tensor:
        dense = each[part, None].repeat(1, z.shape[1]).scatter_(1, teacher.ids[part], logprobs[part])
        return divergence((dense / temperature).log_softmax(1), (z / temperature).log_softmax(1))

    return loss_of_rows(logits, teacher.rows, loss, chunk)


def _reduced(losses: Tensor, rows: Tensor, positions: torch.Size, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses.new_zeros(positions.numel()).index_copy(0, rows, losses).reshape(positions)
    total = losses.sum()
    return total if reduction == "sum" else total / max(1, len(rows))
