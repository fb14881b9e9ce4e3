"""What the tests of `show` share: datasets of a sequence whose texts are known, the demo, and what is drawn of them."""

import warnings
from importlib.resources import as_file, files

import numpy as np

import logitstore
from logitstore.convert import convert
from logitstore.tokenizer import Tokenizer
from logitstore_cli.show import chosen
from logitstore_cli.show_render import Look, lines

PIECES = {
    0: b"one", 1: b" two", 2: b" \xf0\x9f", 3: b"\x98\x80", 4: "\u05e9\u05dc\u05d5\u05dd".encode(), 5: b"\x1b[31mred\n\tx",
    6: "\u4eca\u65e5\u306e".encode(), 7: b" " * 100, 8: "\u202eabc\u0301".encode(), 9: b"[bold]m[/bold] :smile:",
}  # fmt: skip


def distributions(tokens, k):
    """Position t has the tokens after t in a row, so that the next one has rank 1 where tokens count up."""
    ids = (np.asarray(tokens, np.int64)[:, None] + 1 + np.arange(k)) % 50
    logprobs = np.tile(np.log(0.8 * 0.5 ** np.arange(1, k + 1)), (len(tokens), 1)).astype(np.float32)
    return ids, logprobs


def written(path, tokens, k=3, ids=None, logprobs=None, draws=None, pieces=PIECES, settings=None, **columns):
    if pieces is not None:
        (path / "t").mkdir()
        (path / "t" / "partial_vocabulary.json").write_bytes(Tokenizer.from_pieces(pieces).to_partial_json())
    made_ids, made_logprobs = distributions(tokens, k)
    ids = made_ids if ids is None else ids
    given = {"tokenizer": path / "t" if pieces is not None else None, "teacher": "t", "logit_width": 50}
    with logitstore.Writer(path / "d", values="float32", **given, **(settings or {})) as writer:
        if draws is not None:
            writer.add_draws(tokens, ids, draws, int(np.sum(draws[0])), **columns)
        else:
            writer.add(tokens, ids, made_logprobs if logprobs is None else logprobs, **{"id": "s", **columns})
    return logitstore.open(path / "d")


def plain(dataset, look=None, **options):
    identified = dataset.info.tokenizer is not None
    return [line.plain for line in lines(chosen(dataset, **options), look or Look(identified=identified))]


def demo_at(path):
    with (
        as_file(files("logitstore") / "demo" / "llama-server-completion.jsonl.zst") as capture,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        convert([capture], path, teacher="google/gemma-3-270m", logit_width=262_144)
    return path
