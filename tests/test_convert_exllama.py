"""`exllama`: results of the dynamic generator, as files, lines and objects; and logits of model_diff.py."""

import copy
import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import logitstore
from logitstore.convert import Input, convert
from logitstore.convert.exllama import IMPORTER, add

pytestmark = pytest.mark.usefixtures("quiet")

RESULT = {
    "token_ids": [[7, 2, 4]],
    "token_probs": [[0.5, 0.25, 0.125]],
    "top_k_tokens": [[[7, 8, 9], [1, 2, 3], [5, 4, 6]]],
    "top_k_probs": [[[0.5, 0.25, 0.25], [0.5, 0.25, 0.0], [0.25, 0.125, 0.125]]],
}
LINE = RESULT | {"prompt_token_ids": [[10, 11]], "full_completion": "abc", "prompt": "x", "identifier": "job-1"}


def arrays(said=LINE):
    kinds = {name: np.int64 if "token_ids" in name or name == "top_k_tokens" else np.float32 for name in said}
    return {name: np.array(value, kinds[name]) for name, value in said.items() if isinstance(value, list)}


def lines(*said):
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in said)


def read(tmp_path, *said, **options):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines(*said))
    return read_files(tmp_path, [path], **options)


def read_files(tmp_path, paths, **options):
    done = convert(paths, tmp_path / "out", **{"values": "float32", "importer": "exllama"} | options)
    return logitstore.open(tmp_path / "out"), done.notes


def check_result(sequence, prompt=(10, 11)):
    """What RESULT says, by hand: row 1, the last of the prompt, is what token 7 was drawn from."""
    before = len(prompt) - 1
    assert sequence.tokens.tolist() == [*prompt, 7, 2, 4]
    assert sequence.count.tolist() == [0] * before + [3, 2, 3, 0]
    assert sequence.ids.tolist() == [7, 8, 9, 1, 2, 5, 4, 6]
    wanted = np.log([0.5, 0.25, 0.25, 2 / 3, 1 / 3, 0.5, 0.25, 0.25])
    assert sequence.logprobs.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    own = sequence.target_logprob[before : before + 3].tolist()
    assert own == pytest.approx(np.log([0.5, 1 / 3, 0.25]).tolist(), abs=1e-6)
    assert sequence.target_rank[before : before + 3].tolist() == [1, 2, 2]


def test_entry_j_is_of_the_generated_token_j(tmp_path):
    dataset, notes = read(tmp_path, LINE)
    check_result(dataset[0])
    assert dataset[0].loss_mask.tolist() == [0, 1, 1, 1, 0]
    assert dataset[0].id == "job-1"
    assert dataset[0].columns == {"prompt": "x", "text": "abc"}
    assert dataset.info.normalised == "candidates"
    assert any("after the samplers" in note for note in notes)
    assert any("the generated token j was drawn from" in note for note in notes)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_of_one_result(tmp_path, kind):
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.{kind}")
        if kind == "npz":
            np.savez_compressed(paths[-1], **arrays(), eos=np.array(True))
        else:
            save_file(arrays(), paths[-1])
    dataset, _ = read_files(tmp_path, paths)
    assert [s.id for s in dataset] == ["0", "1"]
    for sequence in dataset:
        check_result(sequence)


def test_lists_without_the_batch(tmp_path):
    dataset, _ = read(tmp_path, {n: v[0] if isinstance(v, list) else v for n, v in LINE.items()})
    check_result(dataset[0])


def test_without_a_prompt_a_placeholder_stands_for_it(tmp_path):
    dataset, notes = read(tmp_path, RESULT, RESULT)
    check_result(dataset[0], (0,))
    assert not dataset[0].loss_mask.any()
    assert any("In 2 of the results there is no prompt" in note for note in notes)


def test_half_precision_and_tokens_beyond_the_top(tmp_path):
    made = arrays()
    made["token_ids"] = np.array([[7, 2, 40]])
    made["token_probs"] = np.array([[0.5, 0.25, 0.0625]])
    save_file(
        {n: v.astype(np.float16) if v.dtype.kind == "f" else v for n, v in made.items()}, tmp_path / "a.safetensors"
    )
    (sequence,) = read_files(tmp_path, [tmp_path / "a.safetensors"])[0]
    assert 40 not in sequence.ids
    assert sequence.target_rank.tolist() == [0, 1, 2, 0, 0]
    assert sequence.target_logprob[3] == pytest.approx(math.log(0.0625 / 0.5), abs=1e-6)


def test_entries_shifted_by_one_are_refused(tmp_path):
    random = np.random.default_rng(0)
    n = 30
    probabilities = -np.sort(-random.dirichlet(np.ones(6), n), axis=1)[:, :4]
    ids = np.array([random.permutation(100)[:4] for _ in range(n)])
    picked = random.integers(0, 4, n)
    said = {
        "token_ids": [ids[range(n), picked].tolist()],
        "token_probs": [probabilities[range(n), picked].tolist()],
        "top_k_tokens": [ids.tolist()],
        "top_k_probs": [probabilities.tolist()],
    }
    read(tmp_path, said)
    for names in (("top_k_tokens", "top_k_probs"), ("top_k_tokens",)):
        shifted = said | {name: [said[name][0][1:] + said[name][0][:1]] for name in names}
        with pytest.raises(logitstore.SourceError, match=r"in.jsonl, line 1: at \d+ of 30 entries, .* token_probs"):
            read(tmp_path, shifted, overwrite=True)


def logits_result(seed=0, n=5, vocabulary=50):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (1, n, vocabulary)).astype(np.float32)
    return {
        "token_ids": logits.argmax(-1) if seed % 2 else random.integers(0, vocabulary, (1, n)),
        "logits": logits,
        "prompt_token_ids": np.array([[10, 11, 12]]),
    }


def check_logits(sequence, said, k, offset=2):
    logits = np.asarray(said["logits"][0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids, found = sequence.dense(k)
    tokens = sequence.tokens.tolist()
    for j in range(len(logits)):
        order = np.argsort(-logits[j], kind="stable")[:k]
        assert ids[offset + j].tolist() == order.tolist()
        assert found[offset + j] == pytest.approx(logprobs[j][order], abs=1e-5)
        assert sequence.logsumexp[offset + j] == pytest.approx(np.log(np.exp(logits[j]).sum()), abs=1e-5)
        if offset + j + 1 < len(tokens):
            own = tokens[offset + j + 1]
            assert sequence.target_logprob[offset + j] == pytest.approx(logprobs[j][own], abs=1e-5)
            assert sequence.target_rank[offset + j] == 1 + (logits[j] > logits[j][own]).sum()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
@pytest.mark.parametrize("block", [2**22, 120])
def test_logits_are_preferred_and_normalised_over_the_vocabulary(tmp_path, kind, block, monkeypatch):
    monkeypatch.setattr("logitstore.convert.dense_logits._BLOCK", block)
    said = logits_result() | {"top_k_tokens": np.zeros((1, 5, 2), int), "top_k_probs": np.zeros((1, 5, 2), np.float32)}
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, **said)
    elif kind == "safetensors":
        save_file(said, path)
    else:
        path.write_bytes(lines({name: value.tolist() for name, value in said.items()}))
    dataset, notes = read_files(tmp_path, [path], top_k=7)
    (sequence,) = dataset
    assert sequence.tokens.tolist() == [10, 11, 12, *said["token_ids"][0]]
    assert sequence.count.tolist() == [0, 0, *[7] * 5, 0]
    check_logits(sequence, said, 7)
    assert (dataset.info.normalised, dataset.info.logit_width) == ("vocabulary", 50)
    assert any("logits before the samplers" in note for note in notes)


def test_bfloat16_logits_stay_exact(tmp_path):
    logits = torch.randn(1, 5, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"token_ids": torch.zeros(1, 5, dtype=torch.long), "logits": logits}, tmp_path / "a.safetensors")
    dataset, _ = read_files(tmp_path, [tmp_path / "a.safetensors"], values=None, top_k=9)
    assert dataset.info.totals.encodings == {"bfloat16": 1}
    check_logits(dataset[0], {"logits": logits.float().numpy()}, 9, offset=0)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_model_diff(tmp_path, more, dtype):
    logits = np.random.default_rng(0).normal(0, 3, (2, 4, 30)).astype(dtype)
    save_file({"logits": logits}, tmp_path / "a.safetensors")
    tokens = np.arange(2 * (4 + more)).reshape(2, -1)
    save_file({"tensor.0": tokens[:1], "tensor.1": tokens[1:]}, tmp_path / "ids.safetensors")
    dataset, notes = read_files(tmp_path, [tmp_path / "a.safetensors"], tokens=tmp_path / "ids.safetensors", top_k=5)
    for sequence, own, rows in zip(dataset, tokens, logits, strict=True):
        assert sequence.tokens.tolist() == own.tolist()
        assert sequence.count.tolist() == [5] * 4 + [0] * more
        check_logits(sequence, {"logits": rows[None]}, 5, offset=0)
    assert any("predicts the token at t + 1" in note for note in notes)


def test_model_diff_needs_the_tokens_of_its_last_batch(tmp_path):
    save_file({"logits": np.zeros((1, 4, 30), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(logitstore.InvalidInputError, match="--tokens FILE"):
        read_files(tmp_path, [tmp_path / "a.safetensors"])
    for shape, says in (((2, 4), "its last batch"), ((1, 6), "row 0: its tokens are 6"), ((1, 3), "its tokens are 3")):
        np.save(tmp_path / "t.npy", np.zeros(shape, int))
        with pytest.raises(logitstore.SourceError, match=says):
            read_files(tmp_path, [tmp_path / "a.safetensors"], tokens=tmp_path / "t.npy", overwrite=True)
    with pytest.raises(logitstore.InvalidInputError, match="hold their tokens"):
        read(tmp_path, LINE, tokens=tmp_path / "t.npy", overwrite=True)


def write(path, *results, **settings):
    with logitstore.Writer(path, values="float32", **settings) as writer:
        for result, arguments in results:
            add(writer, result, **arguments)
    return logitstore.open(path)


@pytest.mark.parametrize("kind", ["torch", "numpy", "lists"])
def test_add_takes_what_the_generator_gives(tmp_path, kind):
    made = arrays(RESULT)
    if kind == "torch":
        made = {n: torch.from_numpy(v).requires_grad_(v.dtype.kind == "f") for n, v in made.items()}
        made["token_probs"] = made["token_probs"].bfloat16()
    made = RESULT if kind == "lists" else made
    result = {"job": object(), "stage": "streaming", "eos": True, "text": "abc", "held": {"text": ""}, **made}
    (sequence,) = write(
        tmp_path / "d",
        (result, {"prompt_ids": [10, 11], "id": "a", "note": "n"}),
        normalised="candidates",
    )
    check_result(sequence)
    assert (sequence.id, sequence.columns) == ("a", {"note": "n"})
    (sequence,) = write(tmp_path / "e", (result, {}), normalised="candidates")
    check_result(sequence, (0,))
    assert not sequence.loss_mask.any()


def test_add_joins_what_is_still_held(tmp_path):
    """With a stop token the generator keeps it, and its distribution, under `held`."""
    made = arrays(RESULT)
    result = {n: v[:, :2] for n, v in made.items()} | {"held": {n: torch.from_numpy(v[:, 2:]) for n, v in made.items()}}
    (sequence,) = write(tmp_path / "d", (result, {"prompt_ids": np.array([[10, 11]])}), normalised="candidates")
    check_result(sequence)


def test_add_of_logits(tmp_path):
    said = logits_result(1)
    result = {n: torch.from_numpy(v) for n, v in said.items()}
    for dtype in (torch.float32, torch.bfloat16):
        result["logits"] = result["logits"].to(dtype)
        dataset = write(tmp_path / str(dtype), (result, {"top_k": 7}))
        check_logits(dataset[0], {"logits": result["logits"].float().numpy()}, 7)


def test_add_refuses_a_writer_of_the_other_normalisation(tmp_path):
    for result, settings, says in (
        (RESULT, {}, "normalised='candidates'"),
        (logits_result(), {"normalised": "candidates"}, "normalised='vocabulary'"),
    ):
        with pytest.raises(logitstore.InvalidInputError, match=says):
            write(tmp_path / "d", (result, {}), overwrite=True, **settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": None}, "there are no token_ids"),
        ({"top_k_probs": None}, "neither top_k_probs nor logits; capture with return_top_tokens"),
        ({"top_k_tokens": None}, "no top_k_tokens beside"),
        ({"top_k_probs": RESULT["top_k_probs"][0][0]}, "top_k_probs is float64"),
        ({"top_k_probs": [[[1, 2]]]}, r"top_k_tokens is \[3, 3\] and top_k_probs \[1, 2\]"),
        ({"top_k_probs": [[[0.5, 0.25, 0.25], [0.5, 0.25], [0.5]]]}, "different lengths"),
        ({"top_k_probs": [[[0.5, 0.5, 0.5]] * 3]}, "entry 0: top_k_probs sum to 1.5"),
        ({"top_k_probs": [[[0.5, -0.25, 0.5]] * 3]}, "-0.25 is no probability"),
        ({"top_k_probs": [[[0.5, None, 0.5]] * 3]}, "list of numbers in top_k_probs"),
        ({"top_k_tokens": [[[7, 7, 8]] * 3]}, "the id 7 stands there twice"),
        ({"top_k_tokens": [[[-1, 7, 8]] * 3]}, "is not at least 0"),
        ({"top_k_tokens": [[[2**80, 7, 8]] * 3]}, "top_k_tokens"),
        ({"top_k_tokens": [[[1.5, 7, 8]] * 3]}, "list of numbers in top_k_tokens"),
        ({"token_ids": [[7, 2]]}, "for 2 token_ids"),
        ({"token_ids": [[7, 2, 4], [7, 2, 4]]}, "of one result"),
        ({"token_ids": 7}, "token_ids is no list"),
        ({"token_probs": [[0.5]]}, r"token_probs is \[1\] for 3 token_ids"),
        ({"token_probs": [[0.5, 2.0, 0.1]]}, "2.0 is no probability"),
        ({"prompt_token_ids": [["a"]]}, "list of numbers in prompt_token_ids"),
        ({"identifier": {}}, "identifier"),
        ({"logits": [[[1.0, 2.0]] * 3]}, "results with logits stand beside others"),
    ],
)
def test_results_that_cannot_be_are_refused(tmp_path, change, says):
    said = {name: value for name, value in (LINE | change).items() if value is not None}
    with pytest.raises((logitstore.SourceError, logitstore.InvalidInputError), match=says) as caught:
        read(tmp_path, LINE | {"identifier": "good"}, said)
    assert "in.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize(
    "line", [b"[]", b"{", b'{"token_ids": [[NaN]]}', b"\xff", b"[" * 100000, b'{"token_ids": ' + b"[" * 100000]
)
def test_lines_that_are_no_results_are_refused(tmp_path, line):
    with pytest.raises(logitstore.SourceError, match=r"in\.jsonl, line 1"):
        read(tmp_path, line)


def test_files_that_cannot_be_are_refused(tmp_path):
    for name, change, says in (
        ("a", {"token_ids": np.zeros((1, 3))}, "token_ids is float64"),
        ("b", {"top_k_probs": np.zeros((1, 3, 3), int)}, "top_k_probs is int64"),
        ("c", {"logits": np.zeros((1, 3, 9), np.uint8)}, "logits are uint8"),
        ("d", {"logits": np.zeros((1, 2, 9), np.float32)}, r"logits is \[2, 9\] for 3 token_ids"),
        ("e", {"logits": np.full((1, 3, 9), np.nan, np.float32)}, "logits, row 0: the highest is nan"),
        ("f", {"logits": np.zeros((1, 3, 0), np.float32)}, "logits are"),
        ("k", {"logits": np.zeros((), np.float32)}, "logits are"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(arrays() | change, path)
        with pytest.raises(logitstore.SourceError, match=says) as caught:
            read_files(tmp_path, [path], overwrite=True)
        assert path.name in str(caught.value)
    np.savez(tmp_path / "g.npz", token_ids=np.array([{}], object), top_k_probs=np.zeros(3))
    np.savez(tmp_path / "h.npz", x=np.zeros(3))
    (tmp_path / "i.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "j.safetensors").write_bytes(b"")
    for name in ("g.npz", "h.npz", "i.npz", "j.safetensors"):
        with pytest.raises(logitstore.SourceError, match=name):
            read_files(tmp_path, [tmp_path / name], overwrite=True)


def nodes(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from nodes(value, (*path, key))


def test_mutated_lines_give_items_or_an_error(tmp_path):
    random = np.random.default_rng(0)
    values = [None, "x", -1, 1.5, [], {}, True, math.nan, 1e400, 2**70, [[]], [[[[1]]]]]
    places = [path for path in nodes(LINE) if path]
    for number in range(400):
        said = copy.deepcopy(LINE)
        *parents, last = places[int(random.integers(len(places)))]
        target = said
        for key in parents:
            target = target[key]
        if number % 5:
            target[last] = values[int(random.integers(len(values)))]
        else:
            del target[last]
        text = json.dumps(said).encode()
        text = text[: int(random.integers(len(text)))] if number % 7 == 0 else text
        try:
            read(tmp_path, text, overwrite=True)
        except (logitstore.SourceError, logitstore.InvalidInputError):
            continue


def test_compressed_lines_workers_and_skipping(tmp_path):
    many = [LINE | {"identifier": i} for i in range(40)]
    many[7] = {"token_ids": 3}
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(*many)))
    shards = []
    for workers in (0, 2):
        dataset, _ = read_files(tmp_path, [tmp_path / "a.jsonl.zst"], on_error="skip", workers=workers, overwrite=True)
        assert [s.id for s in dataset] == [str(i) for i in range(40) if i != 7]
        shards.append(next((tmp_path / "out" / "data").rglob("*.arrow")).read_bytes())
    assert shards[0] == shards[1]


def test_recognition(tmp_path):
    save_file(arrays(), tmp_path / "a.safetensors")
    save_file(logits_result(), tmp_path / "b.safetensors")
    save_file({"logits": np.zeros((1, 2, 3), np.float32)}, tmp_path / "c.safetensors")
    np.savez(tmp_path / "d.npz", **arrays())
    (tmp_path / "e.jsonl").write_bytes(lines(LINE))
    for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.npz", "e.jsonl"):
        assert IMPORTER.recognises(Input(tmp_path / name)), name
    flat = {"tokens": np.zeros(2, int), "lengths": np.array([2]), "logits": np.zeros((2, 3), np.float32)}
    dwq = {"logits": np.zeros((1, 2, 3), ml_dtypes.bfloat16).view(np.uint16), "indices": np.zeros((1, 2, 3), np.uint32)}
    save_file(flat, tmp_path / "n0.safetensors")
    save_file(dwq, tmp_path / "n1.safetensors")
    np.savez(tmp_path / "n2.npz", **flat)
    neighbours = [
        {"completion_probabilities": [], "tokens": [1]},
        {"choices": [{"logprobs": {"content": []}}]},
        {"prompt_token_ids": [1], "token_ids": [2], "prompt_logprobs": [None]},
        {"output_ids": [1], "meta_info": {"output_token_logprobs": [[-1.0, 1, None]]}},
        {"details": {"tokens": [], "top_tokens": []}, "generated_text": ""},
        {"tokens": [1], "topk_logits": [[0.0]], "topk_token_ids": [[1]], "log_sum_exp_logits": [1.0]},
        {"input_ids": [1], "topk_logprobs": [[0.0]], "topk_token_ids": [[1]], "actual_logprobs": [0.0]},
        {"text": '"token_ids": [], "top_k_tokens": [], "top_k_probs": []'},
    ]
    for number, said in enumerate(neighbours):
        (tmp_path / f"n{number}.jsonl").write_bytes(lines(said))
    for path in tmp_path.glob("n*"):
        assert not IMPORTER.recognises(Input(path)), path.name
