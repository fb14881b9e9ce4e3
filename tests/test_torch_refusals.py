"""What a trainer gets wrong most easily is refused before it trains, and the message says what to do."""

import json

import numpy as np
import pytest
import torch

import logitstore
from logitstore.torch import (
    HFCollator,
    LogitDataset,
    LogitLoader,
    Mixture,
    Packed,
    Shuffled,
    StreamingLogits,
    Teachers,
    losses,
)

pytestmark = pytest.mark.usefixtures("quiet")

WIDTH = 50


def make(path, *, scored=slice(None), loss_mask=None, **settings):
    """Six sequences of eight positions; only the scored ones have a distribution."""
    random = np.random.default_rng(0)
    with logitstore.Writer(path, **{"teacher": "t", "logit_width": WIDTH, **settings}) as writer:
        for number in range(6):
            count = np.zeros(8, np.int64)
            count[scored] = 4
            ids = np.concatenate([random.permutation(WIDTH)[:4] for _ in range(int(count.sum()) // 4)] or [np.empty(0)])
            logprobs = np.tile(np.log(np.float32([0.4, 0.3, 0.2, 0.1])), len(ids) // 4)
            writer.add(
                random.integers(0, WIDTH, 8),
                ids.astype(np.int64),
                logprobs,
                count=count,
                id=str(number),
                loss_mask=loss_mask,
            )
    return path


def batches(path, collate=None, **options):
    return LogitLoader(StreamingLogits(path, batch_size=3, **options), collate_fn=collate or HFCollator())


def refused(what, *words):
    with pytest.raises(logitstore.InvalidInputError) as caught:
        what()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("decode", ["cpu", "device"])
@pytest.mark.parametrize("tail", ["ghost", "uniform", "target"])
def test_a_tail_loss_on_a_dataset_that_is_normalised_over_its_candidates(tmp_path, tail, decode):
    path = make(tmp_path / "d", normalised="candidates")
    for k in (None, 2):
        batch = next(iter(batches(path, HFCollator(k=k), decode=decode)))
        logits = torch.randn(3, 8, WIDTH, requires_grad=True)
        refused(
            lambda batch=batch, logits=logits: losses.distillation_loss(logits, batch, tail=tail),
            "normalised over their candidates",
            "use tail='renormalise'",
        )
        losses.distillation_loss(logits, batch, tail="renormalise").backward()
        assert logits.grad.isfinite().all()


def tokenizer_of(folder, words):
    """A tokenizer of these words and all bytes."""
    vocabulary = {chr(0x100 + byte): byte for byte in range(256)} | {word: 256 + at for at, word in enumerate(words)}
    folder.mkdir()
    model = {"type": "BPE", "merges": [], "vocab": vocabulary}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return logitstore.Tokenizer.from_path(folder)


MAKERS = [LogitDataset, lambda path, **more: StreamingLogits(path, batch_size=2, **more)]


@pytest.mark.parametrize("make_it", MAKERS)
def test_a_student_with_too_small_a_vocabulary(tmp_path, make_it):
    path = make(tmp_path / "d")
    refused(lambda: make_it(path, vocabulary_size=20), "vocabulary of 20", "resize its embeddings")
    make_it(path, vocabulary_size=WIDTH)


@pytest.mark.parametrize("make_it", MAKERS)
def test_a_student_with_another_tokenizer(tmp_path, make_it):
    ours, theirs = (tokenizer_of(tmp_path / name, [name]) for name in ("ours", "theirs"))
    path = make(tmp_path / "d", tokenizer=ours, logit_width=ours.vocabulary_size)
    make_it(path, tokenizer=ours)
    make_it(path, tokenizer=ours.digest)
    refused(lambda: make_it(path, tokenizer=theirs), "ids mean other tokens", "Take a student with")
    with pytest.warns(logitstore.LogitStoreWarning, match="cannot be checked"):
        make_it(make(tmp_path / "e"), tokenizer=ours)


@pytest.mark.parametrize("make_it", MAKERS)
def test_what_is_no_dataset(tmp_path, make_it):
    with pytest.raises(logitstore.InvalidInputError, match="no column"):
        make_it(make(tmp_path / "d"), columns=["nonsense"])
    with pytest.raises(logitstore.DatasetNotFoundError):
        make_it(tmp_path / "elsewhere")
    with pytest.raises(logitstore.InvalidTypeError, match="neither a path"):
        make_it(5)


def test_a_student_with_too_small_a_vocabulary_that_nobody_checked(tmp_path):
    batch = next(iter(batches(make(tmp_path / "d"))))
    refused(
        lambda: losses.distillation_loss(torch.zeros(3, 8, 20), batch),
        "the student's logits are 20 wide",
        "with embeddings as wide as the dataset's logit_width",
    )


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"scored": slice(0, 0)}, {}, ["not recorded at any position", "choose the sequences"]),
        ({"scored": slice(5, 8)}, {"max_length": 5}, ["after the first 5 positions", "larger max_length"]),
        ({"scored": slice(0, 4), "loss_mask": [0] * 4 + [1] * 4}, {}, ["loss_mask is 0", "capture the trained ones"]),
    ],
)
@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_a_dataset_without_distributions_at_the_positions_that_are_trained_on(
    tmp_path, settings, options, words, decode
):
    path = make(tmp_path / "d", **settings)
    refused(lambda: next(iter(batches(path, HFCollator(**options), decode=decode))), *words)
    allowed = next(iter(batches(path, HFCollator(**options, allow_empty=True), decode=decode)))
    assert losses.distillation_loss(torch.randn(*allowed["input_ids"].shape, WIDTH), allowed).item() == 0


def test_the_trainer_refuses_a_model_that_is_too_narrow(tmp_path):
    transformers = pytest.importorskip("transformers", reason="DistillationTrainer is a trainer of transformers")
    from logitstore.torch.trainer import DistillationTrainer

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=3, report_to=[], use_cpu=True)
    for data in (StreamingLogits(make(tmp_path / "d"), batch_size=3), LogitDataset(tmp_path / "d")):
        refused(
            lambda data=data: DistillationTrainer(model, arguments, train_dataset=data), "vocabulary of 20", "resize"
        )


def test_a_batch_without_its_mask_or_still_encoded(tmp_path):
    path = make(tmp_path / "d", loss_mask=[0] * 4 + [1] * 4)
    batch = next(iter(batches(path)))
    logits = torch.randn(3, 8, WIDTH)
    without = {name: value for name, value in batch.items() if name != "target_mask"}
    refused(lambda: losses.distillation_loss(logits, without), "no 'target_mask'", "remove_unused_columns=False")
    encoded = HFCollator()(list(logitstore.open(path).with_decoding("device")))
    with pytest.raises(logitstore.InvalidTypeError, match="decode_batch, or load it with LogitLoader"):
        losses.distillation_loss(torch.randn(6, 8, WIDTH), encoded)
    with pytest.raises(logitstore.InvalidTypeError, match=r"pass the tensor, such as model\(\.\.\.\)\.logits"):
        losses.distillation_loss(object(), batch)


def test_a_label_that_a_token_may_have():
    refused(lambda: HFCollator(ignore_index=0), "ignore_index is 0", "below 0")


@pytest.mark.parametrize("name", ["document_ids", "position_ids"])
@pytest.mark.parametrize("value", ["doc-17", 17, [5, 6, 7], [0.5] * 8])
def test_columns_of_the_user_with_the_names_of_packing(tmp_path, name, value):
    with logitstore.Writer(tmp_path / "d", teacher="t", logit_width=WIDTH) as writer:
        ids, logprobs = np.tile([3, 4], (8, 1)), np.tile(np.float32([-1, -2]), (8, 1))
        writer.add(range(8), ids, logprobs, **{"document_ids": [0] * 8, name: value})
    dataset = logitstore.open(tmp_path / "d")
    refused(lambda: HFCollator()([dataset[0]]), f"the column {name} belongs to packed samples", "Select the columns")
    HFCollator()([dataset.select(["tokens", "count", "ids", "logprobs", "tail", "loss_mask"])[0]])


def test_what_cannot_be_packed_or_mixed(tmp_path):
    path = make(tmp_path / "d")
    dataset = logitstore.open(path)
    with pytest.raises(logitstore.InvalidTypeError, match="order of its own already"):
        Packed(Mixture([path], [1]), 20)
    with pytest.raises(logitstore.InvalidTypeError, match="pack sequences that are decoded"):
        Packed(dataset.with_decoding("device"), 20)
    with pytest.raises(logitstore.InvalidTypeError, match="is one teacher; give a list"):
        Teachers(str(path))
    other = make(tmp_path / "e", values="float32")
    refused(lambda: [*Teachers([Packed(path, 9), Packed(other, 9)])], "pack the mixture: Packed(Teachers(...))")
    with logitstore.Writer(tmp_path / "drawn", teacher="t", logit_width=WIDTH) as writer:
        writer.add_draws([1, 2], [[3, 4], [5, 6]], [[2, 1], [1, 2]], [3, 3])
    drawn = logitstore.open(tmp_path / "drawn").select(["tokens", "count", "ids", "logprobs", "tail"])
    refused(lambda: Teachers([drawn, drawn]), "teacher 0 holds draws", "Use a capture of the top candidates")


def test_temperatures_that_differ_are_warned_of_through_what_wraps_them(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", temperature=2.0)
    for mixed in (
        lambda: Mixture([one, two], [1, 1]),
        lambda: Teachers([Teachers([one]), two]),
        lambda: Mixture([Shuffled(Packed(one, 9)), two], [1, 1]),
    ):
        with pytest.warns(logitstore.LogitStoreWarning, match=r"temperatures \(1\.0, 2\.0\)"):
            mixed()
