"""Losses from sparse targets equal plain formulas over the whole vocabulary, in float64, for every way to treat the tail."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreError
from logitstore.torch import losses

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
TAILS = ("ghost", "renormalise", "uniform", "target")
PAIRS = [pair for pair in itertools.product(KINDS, TAILS) if pair != ("reverse_kl", "target")]
NAN, INF = math.nan, math.inf


# The reference: one row at a time, dense, float64, nothing but the definitions.


def dense_teacher(width, ids, logprobs, tail, following, mode):
    p = torch.zeros(width, dtype=torch.float64)
    found = [(i, math.exp(lp)) for i, lp in zip(ids, logprobs, strict=True) if lp > -INF]
    for i, probability in found:
        p[i] = probability
    others = sorted(set(range(width)) - {i for i, _ in found})
    mass = max(1 - sum(probability for _, probability in found), 1e-6) if math.isnan(tail) else math.exp(tail)
    mass = mass if others else 0.0
    if mode == "uniform" and others:
        p[others] = mass / len(others)
    if mode == "target":
        p[following] += mass
    return p, [i for i, _ in found], others, mass


def plain_divergence(kind, p, q, beta):
    def kl(a, b):
        there = a > 0
        return (a[there] * torch.log(a[there] / b[there])).sum()

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "total_variation":
        return (p - q).abs().sum() / 2
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def reference_row(kind, mode, z, ids, logprobs, tail, following, temperature, beta):
    p, candidates, others, mass = dense_teacher(len(z), ids, logprobs, tail, following, mode)
    if mode == "ghost":
        q = torch.softmax(z, 0)
        p = torch.cat([p[candidates], torch.tensor([mass], dtype=torch.float64)])
        q = torch.cat([q[candidates], q[others].sum()[None]])
        if not others:
            p, q = p[:-1], q[:-1]
        q = q ** (1 / temperature)
        q = q / q.sum()
    else:
        q = torch.softmax(z / temperature, 0)
        if kind == "reverse_kl" and mode == "renormalise":
            p, q = p[candidates], q[candidates] / q[candidates].sum()
    p = p ** (1 / temperature)
    return plain_divergence(kind, p / p.sum(), q, beta) * temperature**2


def reference(kind, mode, logits, case, temperature, beta):
    """(mean loss, its gradient) in float64."""
    z = logits.detach().double().requires_grad_()
    rows = [
        reference_row(kind, mode, z[n], case["ids"][n].tolist(), case["logprobs"][n].tolist(), *more, temperature, beta)
        for n, more in enumerate(zip(case["tail"].tolist(), case["next"].tolist(), strict=True))
        if case["mask"][n] and (case["logprobs"][n] > -INF).any() and not (mode == "target" and case["next"][n] < 0)
    ]
    loss = sum(rows) / len(rows) if rows else z.sum() * 0
    loss.backward()
    return loss.item(), z.grad


def make_case(seed, n, width, k, scale=3.0):
    """Teachers of random shape: some candidates missing, ids of pads that look real, tails stored, wrong or not there."""
    random = np.random.default_rng(seed)
    z = random.normal(0, scale, (n, width))
    full = z - np.log(np.exp(z).sum(1, keepdims=True))
    ids = np.argsort(random.random((n, width)) * random.choice([0, 1]) - full * random.choice([0, 1]), axis=1)[:, :k]
    logprobs = np.take_along_axis(full, ids, 1)
    there = random.random((n, k)) < random.choice([0.3, 0.9, 2.0])
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - (np.exp(logprobs) * there).sum(1), 1e-9)) + random.normal(0, 0.1, n)
    tail[random.random(n) < 0.3] = NAN
    following = random.integers(0, width, n)
    following[random.random(n) < 0.2] = -100
    return {
        "logits": torch.tensor(random.normal(0, scale, (n, width))),
        "ids": torch.tensor(np.where(there, ids, random.choice([0, -1, ids[0, 0], 2**40], (n, k)))),
        "logprobs": torch.tensor(np.where(there, logprobs, -INF), dtype=torch.float32),
        "tail": torch.tensor(tail, dtype=torch.float32),
        "next": torch.tensor(following),
        "mask": torch.tensor(random.random(n) < 0.8),
    }


def call(kind, mode, logits, case, beta=0.3, **more):
    if kind == "jensen_shannon":
        more["beta"] = beta
    options = {"target_tail": case["tail"], "target_next": case["next"], "mask": case["mask"], "tail": mode}
    return getattr(losses, kind)(logits, case["ids"], case["logprobs"], **{**options, **more})


@st.composite
def cases(draw):
    width = draw(st.integers(1, 300))
    k = draw(st.one_of(st.just(width), st.integers(1, min(width, 24)))) if width < 40 else draw(st.integers(1, 24))
    return make_case(draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 6)), width, k)


@pytest.mark.parametrize("mode", TAILS)
@given(
    kind=st.sampled_from(KINDS),
    case=cases(),
    temperature=st.sampled_from([0.5, 1.0, 1.7, 4.0]),
    beta=st.sampled_from([0.05, 0.5, 0.8]),
    chunk=st.sampled_from([None, 1, 3]),
)
def test_a_loss_and_its_gradient_equal_the_dense_reference(mode, kind, case, temperature, beta, chunk):
    if (kind, mode) not in PAIRS:
        kind = "forward_kl"
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        logits = case["logits"].detach().to(dtype).requires_grad_()
        loss = call(kind, mode, logits, case, temperature=temperature, beta=beta, chunk=chunk)
        loss.backward()
        expected, gradient = reference(kind, mode, logits, case, temperature, beta)
        assert loss.dtype == logits.grad.dtype == dtype
        # What is nearly zero is a difference of numbers from 1 to 10, and keeps their rounding.
        assert loss.item() == pytest.approx(expected, rel=close, abs=close / 5 * max(1, temperature**2))
        assert (logits.grad - gradient).abs().max() <= close * gradient.abs().max() + close / 5 * max(1, temperature)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(kind, mode, temperature):
    case = make_case(1, 4, 8, 3)
    case["mask"] = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda z: call(kind, mode, z, case, temperature=temperature, reduction="none", chunk=2),
        case["logits"].requires_grad_(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_equal_to_the_teacher_has_no_loss(kind, temperature):
    logits = torch.tensor(np.random.default_rng(0).normal(0, 2, (4, 50)))
    logprobs, ids = logits.log_softmax(1).topk(6)
    tail = torch.log(1 - logprobs.exp().sum(1))
    flat = torch.full_like(logits, 0).scatter(1, ids, 2 + torch.rand(4, 6).double())
    known, where = flat.log_softmax(1).topk(6)
    assert getattr(losses, kind)(
        logits, ids, logprobs, target_tail=tail, tail="ghost", temperature=temperature
    ).item() == pytest.approx(0, abs=1e-12)
    assert getattr(losses, kind)(
        flat, where, known, target_tail=torch.log(1 - known.exp().sum(1)), tail="uniform", temperature=temperature
    ).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_entry_a_candidate_all_tails_agree(kind):
    case = make_case(2, 4, 9, 9)
    full = torch.tensor(np.random.default_rng(3).normal(0, 2, (4, 9))).log_softmax(1)
    values = [
        getattr(losses, kind)(
            case["logits"], torch.arange(9).expand(4, 9), full, tail=tail, target_next=torch.arange(4)
        )
        for tail in TAILS
        if (kind, tail) in PAIRS
    ]
    assert all(value.item() == pytest.approx(values[0].item(), rel=1e-9) for value in values)


def test_draws_give_the_gradient_of_the_whole_teacher_on_average():
    """All outcomes of two draws from three tokens, weighted by their probability."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    logits = torch.tensor([[0.3, -0.2, 1.1]], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(1, 3, dtype=torch.float64)
    for outcome in itertools.product(range(3), repeat=2):
        ids, draws = np.unique(outcome, return_counts=True)
        loss = losses.forward_kl(
            logits, torch.tensor(ids)[None], torch.tensor(draws / 2).log()[None], tail="renormalise"
        )
        total += p[list(outcome)].prod() * torch.autograd.grad(loss, logits)[0]
    (whole,) = torch.autograd.grad(functional.cross_entropy(logits, p[None]), logits)
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_reductions_and_shapes(kind, mode):
    case = make_case(5, 6, 30, 5)
    case["mask"][0], case["mask"][1:] = False, True
    each = call(kind, mode, case["logits"], case, reduction="none")
    counts = case["mask"] & (case["logprobs"] > -INF).any(1) & ((case["next"] >= 0) | (mode != "target"))
    assert 0 < counts.sum() < 6
    assert (each[~counts] == 0).all()
    assert (each[counts] > 0).all()
    assert call(kind, mode, case["logits"], case, reduction="sum").item() == pytest.approx(each.sum().item())
    assert call(kind, mode, case["logits"], case).item() == pytest.approx((each.sum() / counts.sum()).item())
    batched = {name: value.reshape(2, 3, *value.shape[1:]) for name, value in case.items()}
    torch.testing.assert_close(call(kind, mode, batched["logits"], batched, reduction="none"), each.reshape(2, 3))
    turned = case["logits"].t().contiguous().t()
    torch.testing.assert_close(call(kind, mode, turned, case, reduction="none"), each)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(kind, mode, dtype):
    case = make_case(6, 5, 40, 6)
    logits = case["logits"].detach().to(dtype).requires_grad_()
    same = logits.detach().float().requires_grad_()
    loss, expected = call(kind, mode, logits, case), call(kind, mode, same, case)
    (loss + expected).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad, same.grad.to(dtype))


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_extreme_logits_stay_finite_and_exact(kind, mode):
    """A student that is all but certain, rightly and wrongly: one side underflows in float32."""
    ids, logprobs = torch.tensor([[3, 1], [3, 1]]), torch.tensor([[0.7, 0.2], [0.7, 0.2]]).log()
    logits = torch.zeros(2, 8)
    logits[0, [1, 3]] = 300.0
    logits[1, 5] = 300.0
    case = {"ids": ids, "logprobs": logprobs, "tail": torch.tensor([NAN, NAN]), "next": torch.tensor([3, 6])}
    case["mask"] = torch.tensor([True, True])
    logits.requires_grad_()
    loss = call(kind, mode, logits, case)
    loss.backward()
    expected, gradient = reference(kind, mode, logits, case, 1.0, 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
@pytest.mark.parametrize("k", [0, 3])
def test_without_any_row_to_train_on_the_loss_and_gradient_are_zero(kind, mode, k):
    logits = torch.randn(2, 3, 10, requires_grad=True)
    nothing = {"ids": torch.zeros(2, 3, k, dtype=torch.int64), "logprobs": torch.full((2, 3, k), -INF)}
    nothing |= {"tail": torch.full((2, 3), NAN), "next": torch.full((2, 3), -100), "mask": torch.ones(2, 3).bool()}
    loss = call(kind, mode, logits, nothing)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


class LargeTensors(TorchDispatchMode):
    """Names of the operations that make a tensor of at least so many numbers."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.makers = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numel:
                self.makers += [str(function)] if tensor.untyped_storage().data_ptr() not in given else []
        return result


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_the_only_large_tensor_that_is_made(kind, mode, masked):
    case = make_case(7, 64, 500, 4)
    case["mask"][:] = True
    case["mask"][:8] = not masked
    case["logprobs"][:, 0], case["ids"][:, 0] = -1.0, 499
    case["logprobs"][:, 1:] = -INF
    case["next"][:] = 3
    logits = case["logits"].float().requires_grad_()
    with LargeTensors(logits.numel() // 4) as large:
        call(kind, mode, logits, case, chunk=8).backward()
    assert large.makers == ["aten.zeros_like.default" if masked else "aten.empty_like.default"]


def test_cross_entropy_equals_torchs():
    logits = torch.randn(3, 7, 50, dtype=torch.float64, requires_grad=True)
    following = torch.randint(0, 50, (3, 7))
    following[0, :3] = -100
    ours = losses.cross_entropy(logits, following, chunk=4)
    theirs = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def make_batch(labels=True):
    case = make_case(8, 12, 30, 5)
    batch = {"target_ids": case["ids"], "target_logprobs": case["logprobs"], "target_tail": case["tail"]}
    batch |= {"target_mask": case["mask"], "target_next": case["next"]}
    batch = {name: value.reshape(3, 4, *value.shape[1:]) for name, value in batch.items()}
    if labels:
        batch["labels"] = torch.randint(0, 30, (3, 4), generator=torch.Generator().manual_seed(0))
        batch["labels"][0, :2] = -100
    return case["logits"].reshape(3, 4, 30), batch


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_distillation_loss_is_the_weighted_sum(kind, mode):
    logits, batch = make_batch()
    case = {name: batch[f"target_{name}"] for name in ("ids", "logprobs", "tail", "next", "mask")}
    divergence = call(kind, mode, logits, case, temperature=2.0)
    real = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    settings = {"kind": kind, "tail": mode, "temperature": 2.0, "beta": 0.3}
    for alpha in (0.0, 0.25, 1.0):
        loss = losses.distillation_loss(logits, batch, alpha=alpha, **settings)
        torch.testing.assert_close(loss, alpha * divergence + (1 - alpha) * real)


def test_without_labels_the_next_tokens_of_the_targets_are_taken():
    logits, batch = make_batch(labels=False)
    known = batch["target_next"].masked_fill(~batch["target_mask"], -100)
    expected = functional.cross_entropy(logits.flatten(0, 1), known.flatten())
    torch.testing.assert_close(losses.distillation_loss(logits, batch, alpha=0.0), expected)


LOGITS, IDS = torch.zeros(2, 5), torch.tensor([[0, 1], [2, 3]])
LOGPROBS = torch.full((2, 2), 0.25).log()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("reverse_kl", {"tail": "target", "target_next": torch.tensor([0, 1])}, "infinite"),
        ("forward_kl", {"tail": "ghost", "normalised": "candidates"}, "normalised over their candidates.*renormalise"),
        ("jensen_shannon", {"tail": "uniform", "normalised": "candidates"}, "unknown"),
        ("total_variation", {"tail": "target", "normalised": "candidates"}, "unknown"),
        ("forward_kl", {"tail": "target"}, "pass target_next"),
        ("forward_kl", {"tail": "drop"}, "'drop' is not one of 'ghost', 'renormalise'"),
        ("forward_kl", {"reduction": "batchmean"}, "'batchmean'"),
        ("forward_kl", {"normalised": "no"}, "'no'"),
        ("forward_kl", {"temperature": 0.0}, "positive"),
        ("forward_kl", {"temperature": INF}, "finite"),
        ("forward_kl", {"temperature": NAN}, "finite"),
        ("forward_kl", {"chunk": 0}, "chunk=0"),
        ("jensen_shannon", {"beta": 1.0}, "between 0 and 1"),
        ("forward_kl", {"target_tail": torch.zeros(3)}, "target_tail has shape"),
        ("forward_kl", {"mask": torch.ones(2, 2).bool()}, "mask has shape"),
        ("forward_kl", {"logits": torch.zeros(5)}, r"\[B, T, V\]"),
        ("forward_kl", {"logits": torch.zeros(3, 5)}, "target_ids has shape"),
        ("forward_kl", {"target_logprobs": LOGPROBS[:, :1]}, "target_logprobs has shape"),
        ("forward_kl", {"target_ids": torch.tensor([[0, 5], [2, 3]])}, "id 5.*5 wide.*too small"),
        ("forward_kl", {"target_ids": torch.tensor([[0, -1], [2, 3]])}, "id -1"),
        ("forward_kl", {"target_ids": torch.tensor([[1, 1], [2, 3]])}, "twice"),
        ("forward_kl", {"target_logprobs": torch.tensor([[NAN, NAN], [-1, -2]])}, "NaN"),
        ("forward_kl", {"target_logprobs": torch.tensor([[INF, -1], [-1, -2]])}, "NaN or inf"),
        ("forward_kl", {"target_logprobs": torch.tensor([[2.0, -1], [-1, -2]])}, "sum to over 1.1"),
        ("forward_kl", {"tail": "target", "target_next": torch.tensor([0, 5])}, "target_next has id 5"),
        ("reverse_kl", {"tail": "ghost", "target_tail": torch.tensor([-1, -INF])}, "row 1"),
        ("reverse_kl", {"tail": "uniform", "target_tail": torch.tensor([-INF, -1])}, "row 0"),
    ],
)
def test_nonsense_is_refused(kind, change, message):
    given = {"logits": LOGITS, "target_ids": IDS, "target_logprobs": LOGPROBS, **change}
    with pytest.raises(InvalidInputError, match=f"(?s){message}"):
        getattr(losses, kind)(**given)


@pytest.mark.parametrize(
    "change",
    [
        {"logits": LOGITS.long()},
        {"target_ids": IDS.double()},
        {"target_ids": IDS > 1},
        {"target_logprobs": IDS},
        {"mask": torch.ones(2)},
        {"target_tail": torch.ones(2).long()},
        {"tail": "target", "target_next": torch.ones(2)},
    ],
)
def test_wrong_dtypes_are_refused(change):
    with pytest.raises(InvalidTypeError):
        losses.forward_kl(**{"logits": LOGITS, "target_ids": IDS, "target_logprobs": LOGPROBS, **change})


def test_what_does_not_count_may_hold_anything():
    ids, logprobs = torch.tensor([[0, 1], [7, 7]]), torch.tensor([[0.5, 0.2], [NAN, 2.0]]).log()
    mask = torch.tensor([True, False])
    masked = losses.forward_kl(LOGITS, ids, logprobs, mask=mask)
    assert masked == losses.forward_kl(LOGITS[:1], ids[:1], logprobs[:1])


def test_ratios_alone_are_enough_to_renormalise():
    ratios = torch.tensor([[8.0, 7.0], [3.0, 5.0]])
    for kind in KINDS[:2]:
        loss = getattr(losses, kind)
        settings = {"tail": "renormalise", "normalised": "candidates"}
        assert loss(LOGITS, IDS, ratios, **settings).item() == pytest.approx(
            loss(LOGITS, IDS, ratios.log_softmax(1), **settings).item()
        )


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"target_ids": None}, {}, "no 'target_ids'.*hf"),
        ({"target_logprobs": None}, {}, "remove_unused_columns"),
        ({"labels": None, "target_next": None}, {"alpha": 0.5}, "no 'target_next'"),
        ({}, {"alpha": 1.5}, "alpha=1.5"),
        ({}, {"alpha": NAN}, "alpha=nan"),
        ({}, {"kind": "mse"}, "'mse'"),
        ({}, {"reduction": "none"}, "'none'"),
        ({}, {"normalised": "candidates"}, "candidates"),
    ],
)
def test_distillation_loss_says_what_is_missing(change, settings, message):
    logits, batch = make_batch()
    batch = {name: value for name, value in batch.items() if name not in change}
    with pytest.raises(LogitStoreError, match=f"(?s){message}"):
        losses.distillation_loss(logits, batch, **settings)


def test_cross_entropy_refuses_tokens_beyond_the_logits():
    with pytest.raises(InvalidInputError, match="target_next has id 5"):
        losses.cross_entropy(LOGITS, torch.tensor([1, 5]))
