"""What a trainer gets wrong most easily is refused before it trains, and the message says what to do."""

import numpy as np
import pytest
import torch

import logitstore
from logitstore.torch import HFCollator, LogitDataset, LogitLoader, StreamingLogits, losses

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


@pytest.mark.parametrize("make_it", [LogitDataset, lambda path, **more: StreamingLogits(path, batch_size=2, **more)])
def test_a_student_with_too_small_a_vocabulary_or_another_tokenizer(tmp_path, make_it, shared):
    path = make(tmp_path / "d")
    refused(lambda: make_it(path, vocabulary_size=20), "vocabulary of 20", "resize its embeddings")
    tokenizer = logitstore.Tokenizer.from_path(next(shared("tokenizers").glob("*/tokenizer.json")))
    other = make(tmp_path / "e", tokenizer=tokenizer, logit_width=tokenizer.vocabulary_size)
    refused(lambda: make_it(other, tokenizer="0" * 64), "ids mean other tokens", "Take a student with")


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
