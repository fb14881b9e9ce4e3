"""The trainer: it learns the stored distributions, keeps the order of the data, and resumes at the exact sample."""

import warnings

import pytest
import torch

import logitstore
from logitstore.torch import HFCollator, LogitDataset, StreamingLogits

transformers = pytest.importorskip("transformers", reason="DistillationTrainer is a trainer of transformers")
pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore"),  # transformers, accelerate and torch warn of each other
]


class Recording(HFCollator):
    """Notes the ids of what it is given."""

    def __call__(self, samples):
        seen.append([sample.id for sample in samples])
        return super().__call__(samples)


seen = []


@pytest.fixture(autouse=True)
def forget():
    seen.clear()


def model(width=1000):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=width, n_positions=64, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(path, **more):
    return transformers.TrainingArguments(
        str(path), per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
        learning_rate=3e-3, lr_scheduler_type="constant", save_strategy="no", seed=1, **more,
    )  # fmt: skip


def trainer(path, dataset, *, stream=True, batch=4, **more):
    from logitstore.torch.trainer import DistillationTrainer

    data = StreamingLogits(dataset, batch_size=batch, seed=5) if stream else LogitDataset(dataset)
    options = more.pop("loss_options", {"kind": "forward_kl", "tail": "ghost"})
    return DistillationTrainer(
        model(), arguments(path, **more), train_dataset=data, data_collator=Recording(), loss_options=options
    )


def losses_of(made):
    return [each["loss"] for each in made.state.log_history if "loss" in each]


@pytest.mark.parametrize("stream", [True, False])
def test_it_learns_the_distributions(tmp_path, write, stream):
    made = trainer(tmp_path / "out", write(sequences=12, positions=20), stream=stream, num_train_epochs=12)
    made.train()
    found = losses_of(made)
    assert len(found) == 36
    assert found[-1] < 0.8 * found[0]


def test_the_order_is_that_of_the_stream(tmp_path, write):
    path = write(sequences=12, positions=20)
    trainer(tmp_path / "out", path, num_train_epochs=2).train()
    stream = StreamingLogits(path, batch_size=4, seed=5, epochs=2)
    ids = [sample.id for sample in stream]
    assert [name for batch in seen for name in batch] == ids


def test_it_resumes_at_the_exact_sample_with_the_same_result(tmp_path, write):
    path = write(sequences=24, positions=20)
    straight = trainer(tmp_path / "a", path, max_steps=9)
    straight.train()
    order, whole = list(seen), losses_of(straight)
    seen.clear()
    trainer(tmp_path / "b", path, max_steps=9, save_steps=4).args  # noqa: B018 - arguments are checked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = trainer(tmp_path / "b", path, max_steps=4)
        first.args.save_strategy, first.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, 4
        first.train()
        assert (tmp_path / "b" / "checkpoint-4" / "logitstore_loader.json").is_file()
        second = trainer(tmp_path / "b", path, max_steps=9)
        second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert seen == order
    assert losses_of(second)[-5:] == pytest.approx(whole[-5:], rel=1e-4)


def test_a_batch_size_that_differs_is_refused(tmp_path, write):
    with pytest.raises(logitstore.InvalidInputError, match="batch_size=2, but the trainer's arguments say 4"):
        trainer(tmp_path / "out", write(), batch=2)


def test_loss_options_are_those_of_the_loss(tmp_path, write):
    made = trainer(tmp_path / "out", write(), loss_options={"tail": "nope"}, max_steps=1)
    with pytest.raises(logitstore.InvalidInputError, match="'nope'"):
        made.train()


def test_packed_documents_do_not_see_each_other(tmp_path, write):
    from logitstore.torch import Packed
    from logitstore.torch.trainer import DistillationTrainer

    config = transformers.LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2)  # fmt: skip
    student = transformers.LlamaForCausalLM(config).eval()
    stream = StreamingLogits(Packed(write(sequences=6), 40), batch_size=4)
    made = DistillationTrainer(student, arguments(tmp_path / "out"), train_dataset=stream)
    batch = HFCollator()(list(stream)[:4])
    _, outputs = made.compute_loss(student, dict(batch), return_outputs=True)
    for row, documents in enumerate(batch["document_ids"]):
        for document in range(int(documents.max()) + 1):
            at = documents == document
            alone = student(batch["input_ids"][row][at][None]).logits[0]
            torch.testing.assert_close(outputs.logits[row][at], alone, rtol=1e-4, atol=1e-5)
