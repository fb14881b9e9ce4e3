"""The collators: what stands where in a batch."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.shard.sequence import Sequence
from logitstore.torch import collate

WIDTH = 50


def sequence(tokens, rows, name="s", **fields):
    """A sequence of rows [(id, logprob), ...]; its tail is what they leave of 1."""
    count = np.array([len(row) for row in rows], np.uint32)
    flat = [pair for row in rows for pair in row]
    mass = np.array([sum(np.exp(lp) for _, lp in row) for row in rows])
    with np.errstate(divide="ignore"):
        tail = np.where(count > 0, np.log(np.maximum(1 - mass, 0)), np.nan)
    return Sequence.of({
        "id": name,
        "tokens": np.array(tokens, np.uint32),
        "count": count,
        "offsets": ragged.offsets(count),
        "ids": np.array([i for i, _ in flat], np.int32),
        "logprobs": np.array([lp for _, lp in flat], np.float32),
        "draws": None,
        "tail": tail.astype(np.float32),
        "target_logprob": None,
        "loss_mask": None,
        "columns": {},
    } | fields)  # fmt: skip


def drawn(seed, counts, name="s", **fields):
    """A random sequence with so many candidates at each position."""
    random = np.random.default_rng(seed)
    rows = []
    for count in counts:
        mass = -np.sort(-random.dirichlet(np.ones(count + 1))[:count])
        rows.append(list(zip(random.permutation(WIDTH)[:count].tolist(), np.log(mass), strict=True)))
    return sequence(random.integers(1, WIDTH, len(counts)), rows, name, **fields)


counts = st.lists(st.integers(0, 5), min_size=1, max_size=8)
batches = st.lists(
    st.one_of(counts, st.tuples(st.integers(1, 5), st.integers(1, 8)).map(lambda a: [a[0]] * a[1])),
    min_size=1,
    max_size=4,
)
settings = st.fixed_dictionaries({
    "k": st.none() | st.integers(1, 6),
    "max_length": st.none() | st.integers(1, 9),
    "pad_to_multiple_of": st.none() | st.integers(1, 5),
})  # fmt: skip


@given(batches, st.integers(0, 99), settings, st.booleans())
def test_hf_batch_says_of_each_position_what_the_sequence_says(batch, seed, settings, masked):
    random = np.random.default_rng(seed)
    sequences = [
        drawn(seed + i, c, f"s{i}", loss_mask=random.integers(-1, 2, len(c)).astype(np.int8) if masked else None)
        for i, c in enumerate(batch)
    ]
    out = collate.hf(pad_id=7, allow_empty=True, **settings)(sequences)
    out = {name: tensor.numpy() for name, tensor in out.items()}
    longest = max(min(len(s), settings["max_length"] or 99) for s in sequences)
    multiple = settings["pad_to_multiple_of"] or 1
    length, k = -(-longest // multiple) * multiple, out["target_ids"].shape[2]
    assert out["input_ids"].shape == (len(batch), length)
    assert settings["k"] in (None, k)
    for b, s in enumerate(sequences):
        mask = np.ones(len(s)) if s.loss_mask is None else s.loss_mask
        kept = min(len(s), settings["max_length"] or 99)
        for t in range(length):
            inside = t < kept
            n = min(int(s.count[t]), k) if inside else 0
            at = slice(s.offsets[t], s.offsets[t] + n) if inside else slice(0, 0)
            assert out["attention_mask"][b, t] == inside
            assert out["input_ids"][b, t] == (s.tokens[t] if inside else 7)
            assert out["target_ids"][b, t].tolist() == s.ids[at].tolist() + [0] * (k - n)
            assert out["target_logprobs"][b, t].tolist() == s.logprobs[at].tolist() + [-np.inf] * (k - n)
            assert out["target_mask"][b, t] == (n > 0 and mask[t] != 0)
            assert out["target_next"][b, t] == (s.tokens[t + 1] if inside and t + 1 < len(s) else -100)
            label = inside and t > 0 and mask[t - 1] != 0
            assert out["labels"][b, t] == (s.tokens[t] if label else -100)
            if n:  # the candidates and the tail are the whole distribution, also where k cuts some
                assert np.exp(out["target_logprobs"][b, t], dtype=float).sum() + np.exp(
                    out["target_tail"][b, t], dtype=float
                ) == pytest.approx(1, abs=1e-5)
            else:
                assert np.isnan(out["target_tail"][b, t])


def test_hf_types():
    out = collate.hf()([drawn(0, [3, 2])])
    types = {name: tensor.dtype for name, tensor in out.items()}
    assert types == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64, "target_ids": torch.int64,
        "target_logprobs": torch.float32, "target_tail": torch.float32, "target_mask": torch.bool,
        "target_next": torch.int64,
    }  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in out.values())


def test_a_tail_that_is_not_known_stays_so_when_candidates_are_cut():
    s = drawn(0, [4], tail=np.array([np.nan], np.float32))
    assert torch.isnan(collate.hf(k=2)([s])["target_tail"]).all()


def test_the_first_token_of_a_document_is_no_label_but_the_row_before_it_keeps_its_distribution():
    packed = drawn(1, [2, 2, 2, 2, 2], columns={
        "position_ids": np.array([0, 1, 2, 0, 1], np.int32), "document_ids": np.array([0, 0, 0, 1, 1], np.int32),
    })  # fmt: skip
    tokens = packed.tokens.tolist()
    out = collate.hf(pad_to_multiple_of=6)([packed])
    assert out["labels"].tolist() == [[-100, tokens[1], tokens[2], -100, tokens[4], -100]]
    assert out["target_next"].tolist() == [[tokens[1], tokens[2], -100, tokens[4], -100, -100]]
    assert out["target_mask"].tolist() == [[True] * 5 + [False]]
    assert out["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert out["document_ids"].tolist() == [[0, 0, 0, 1, 1, -1]]
    cut = collate.hf(max_length=3)([packed])
    assert cut["target_next"].tolist() == [[tokens[1], tokens[2], -100]]


def test_packed_and_plain_samples_go_together():
    packed = drawn(
        1, [2, 2], columns={"position_ids": np.zeros(2, np.int32), "document_ids": np.arange(2, dtype=np.int32)}
    )
    out = collate.hf()([packed, drawn(2, [2, 2, 2])])
    assert out["document_ids"].tolist() == [[0, 1, -1], [0, 0, 0]]
    assert out["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]


def test_axolotl_mask_pads_and_documents():
    columns = {"position_ids": np.array([0, 1, 0], np.int32), "document_ids": np.array([0, 0, 1], np.int32)}
    packed = drawn(3, [2, 0, 3], columns=columns, loss_mask=np.array([1, 1, 0], np.int8))
    out = collate.axolotl(pad_to_multiple_of=4)([packed])
    assert out["target_mask"].dtype == torch.int32
    assert out["target_mask"].tolist() == [[[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert out["attention_mask"].tolist() == [[1, 1, 2, 0]]
    assert out["position_ids"].tolist() == [[0, 1, 0, 0]]
    assert out["target_token_ids"][0, 0].tolist() == [*packed.ids[:2].tolist(), 0]
    assert out["target_logprobs"][0, 2].tolist() == packed.logprobs[2:].tolist()


def test_what_axolotls_trainer_does_to_pads_and_faint_candidates_is_finite():
    s = sequence([1, 2, 3], [[(4, -0.1), (5, -200.0)], [], [(4, -0.5)]])
    logprobs = collate.axolotl()([s])["target_logprobs"]
    again = logprobs.exp().log()
    assert torch.isfinite(again).all()
    assert again[0, 0, 0].item() == pytest.approx(-0.1)
    assert logprobs.exp()[0, 1].sum() < 1e-29


def test_trl_columns_are_about_the_tokens_of_the_completion():
    rows = [[], [(5, -0.5), (6, -1.5)], [(7, -0.2)], [(9, -0.3)]]
    one = sequence([1, 2, 5, 8], rows, target_logprob=np.array([np.nan, -0.5, -4.0, -1], np.float32))
    two = sequence([1, 2, 3, 6], [[], [], [(6, -0.1)], []])
    out = collate.trl()([one, two])
    assert out["labels"].tolist() == [[-100, -100, 5, 8], [-100, -100, -100, 6]]
    length = out["topk_logprobs"].shape[1]
    assert length == 2  # the completion begins at token 2
    inf = float("inf")
    assert torch.allclose(
        out["topk_logprobs"], torch.tensor([[[-0.5, -1.5], [-0.2, -inf]], [[-inf, -inf], [-0.1, -inf]]])
    )
    assert out["topk_token_ids"].tolist() == [[[5, 6], [7, 0]], [[0, 0], [6, 0]]]
    assert torch.allclose(out["actual_logprobs"], torch.tensor([[-0.5, -4.0], [-inf, -0.1]]))


def test_trl_says_nothing_of_the_token_after_a_document():
    columns = {"position_ids": np.array([0, 1, 0], np.int32), "document_ids": np.array([0, 0, 1], np.int32)}
    s = drawn(0, [2, 2, 2], columns=columns, target_logprob=np.full(3, -0.7, np.float32))
    actual = collate.trl()([s])["actual_logprobs"]
    assert torch.isfinite(actual).tolist() == [[True, False]]


def test_trl_rows_that_are_not_trained_on_are_pads():
    s = drawn(0, [2, 2, 2, 2], loss_mask=np.array([1, 0, 1, 1], np.int8))
    out = collate.trl()([s])
    assert torch.isinf(out["topk_logprobs"][0, 1]).all()
    assert out["topk_token_ids"][0, 1].tolist() == [0, 0]
    assert torch.isfinite(out["topk_logprobs"][0, [0, 2]]).all()


def test_distillkit_signal_has_no_id_twice_and_a_finite_loss():
    s = sequence([1, 2, 3, 4], [[(0, -0.2), (2, -2.0)], [(1, -0.3)], [], [(3, -0.1), (0, -3.0), (1, -4.0)]])
    out = collate.distillkit(vocab_size=WIDTH, pad_to_multiple_of=5)([s])
    signal = out["signal"]
    ids, values = signal["sparse_ids"], signal["sparse_values"]
    assert set(signal) == {
        "sparse_ids",
        "sparse_values",
        "log_values",
        "generation_temperature",
        "hidden_states",
        "vocab_size",
    }
    assert (signal["log_values"], signal["vocab_size"], signal["generation_temperature"]) == (True, WIDTH, 1.0)
    for row in ids.reshape(-1, 3).tolist():
        assert len(set(row)) == 3
    assert out["mask"].tolist() == [[True, True, False, True, False]]
    student = torch.randn(1, 5, WIDTH).log_softmax(-1).gather(-1, ids)
    assert torch.isfinite((values.exp() * (values - student)).sum())
    assert ids[0, 0, :2].tolist() == [0, 2]
    assert values[0, 3].tolist() == s.logprobs[3:].tolist()


def test_distillkit_refuses_a_vocabulary_that_is_too_small():
    with pytest.raises(InvalidInputError, match=r"vocab_size is 3.*tokenizer"):
        collate.distillkit(vocab_size=3)([sequence([1, 2], [[(5, -0.1)], []])])
    with pytest.raises(InvalidInputError, match="smaller k"):
        collate.distillkit(vocab_size=3, k=4)([sequence([1, 2], [[(1, -0.1)], []])])


def test_megatron_has_positions_first_and_shifted_labels():
    one, two = drawn(0, [2, 3, 1]), drawn(1, [1, 0])
    out = collate.megatron()([one, two])
    assert out["values"].shape == out["indices"].shape == (3, 2, 3)
    assert out["values"].is_contiguous()
    assert out["indices"].is_contiguous()
    assert out["indices"][0, 0].tolist() == [*one.ids[:2].tolist(), -1]
    assert out["indices"][0, 1].tolist() == [two.ids[0], -1, -1]
    assert out["values"][1, 0].tolist() == one.logprobs[2:5].tolist()
    assert out["values"][2, 1].tolist() == [-1000, -1000, -1000]
    assert out["labels"].tolist() == [[*one.tokens[1:].tolist(), 0], [two.tokens[1], 0, 0]]
    assert out["loss_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]  # the last row has no next token


@pytest.mark.parametrize(
    "make", [collate.hf, collate.axolotl, collate.trl, collate.megatron, lambda: collate.distillkit(vocab_size=WIDTH)]
)
def test_collators_pickle_and_agree_on_the_best_candidates(make):
    s = drawn(5, [3, 3, 3])
    collator = pickle.loads(pickle.dumps(make()))
    assert collator == make()
    out = collator([s])
    signal = out.get("signal", out)
    name = next(n for n in ("target_ids", "target_token_ids", "topk_token_ids", "sparse_ids", "indices") if n in signal)
    assert signal[name].reshape(-1, 3)[:2].tolist() == s.ids.reshape(-1, 3)[:2].tolist()


def test_a_batch_without_distributions_is_an_error_that_says_what_to_do():
    without = sequence([1, 2], [[], []], "plain")
    with pytest.raises(InvalidInputError, match=r"'plain'.*not recorded.*choose the sequences"):
        collate.hf()([without])
    prompt = sequence([1, 2], [[(1, -0.1)], []], loss_mask=np.array([0, 1], np.int8))
    with pytest.raises(InvalidInputError, match=r"loss_mask is 0.*another loss_mask"):
        collate.hf()([prompt])
    late = sequence([1, 2, 3], [[], [], [(1, -0.1)]])
    with pytest.raises(InvalidInputError, match=r"after the first 2 positions.*larger max_length"):
        collate.hf(max_length=2)([late])
    assert collate.hf()([late, without])["target_mask"].sum() == 1
    assert not collate.hf(allow_empty=True)([without])["target_mask"].any()


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInputError, match="no sequences"):
        collate.hf()([])
    with pytest.raises(InvalidTypeError, match="tuple"):
        collate.hf()([(1, 2)])
    for name in ("k", "max_length", "pad_to_multiple_of"):
        with pytest.raises(InvalidInputError, match=name):
            collate.hf(**{name: 0})


def test_a_column_that_was_not_selected_is_named(write):
    dataset = logitstore.open(write()).select(["tokens", "ids", "logprobs", "count"])
    with pytest.raises(logitstore.LogitStoreError, match=r"not selected"):
        collate.hf()([dataset[0]])


def test_as_collate_fn_of_a_dataloader_with_a_worker(write):
    dataset = logitstore.open(write(sequences=4, k=3))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate.hf(k=2), num_workers=1)
    batches = list(loader)
    assert [batch["target_ids"].shape for batch in batches] == [(2, 13, 2), (2, 15, 2)]
    ids, logprobs = dataset[3].dense(2)
    assert torch.equal(batches[1]["target_ids"][1], torch.from_numpy(ids))
    assert np.array_equal(batches[1]["target_logprobs"][1].numpy(), logprobs)
