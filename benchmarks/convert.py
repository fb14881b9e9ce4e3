"""Speed and memory of importers on real rows.

    python benchmarks/convert.py [GIGABYTES]

JSON lines are those of real servers beside the repository, repeated, and the Gemma 3 270M rows of WikiText-2 (else the
Shakespeare rows of the tests) in the shapes of vLLM and SGLang. One process, one thread, reading to a finished dataset;
the best of three. Memory is that of `logitstore convert` reading so many gigabytes (2) from standard input.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import logitstore
from logitstore.convert import Input, Options, Tally, convert, importers
from logitstore.convert.source import expand

ROOT: Final = Path(__file__).parent.parent
DATA: Final = ROOT.parent / "shared" / "data"
CAPTURES: Final = (
    DATA / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
K: Final = 64
TARGET_BYTES: Final = 60_000_000

Window = tuple[list[int], NDArray[np.int32], NDArray[np.float32]]


def windows() -> Iterator[Window]:
    """Tokens, ids and logprobs [T, K] of real sequences."""
    arrays = np.load(next(path for path in CAPTURES if path.exists()))
    ends = np.cumsum(arrays["lengths"])
    tokens, ids, logprobs = arrays["tokens"], arrays["ids"], arrays["logprobs"]
    for start, end in zip(ends - arrays["lengths"], ends, strict=True):
        yield tokens[start:end].tolist(), ids[start:end, :K], logprobs[start:end, :K]


def vllm(window: Window) -> dict[str, Any]:
    """A reply of vLLM's server with prompt_logprobs; the real token first."""
    tokens, ids, logprobs = window
    rows: list[dict[str, Any] | None] = [None]
    for actual, row, values in zip(tokens[1:], ids[:-1].tolist(), logprobs[:-1].tolist(), strict=True):
        entries = {
            str(i): {"logprob": v, "rank": r, "decoded_token": " word"}
            for r, (i, v) in enumerate(zip(row, values, strict=True), 1)
        }
        first = entries.pop(str(actual), {"logprob": values[-1] - 1.0, "rank": 412, "decoded_token": " rare"})
        rows.append({str(actual): first, **entries})
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": rows, "prompt_token_ids": tokens}]}


def own_tokens(window: Window) -> list[list[float | int | None]]:
    """Triples of the real tokens; one beyond the best k is a nat less likely than the last of them."""
    tokens, ids, logprobs = window
    listed = ids[:-1] == np.array(tokens[1:])[:, None]
    own = np.where(
        listed.any(axis=1), logprobs[:-1][np.arange(len(listed)), listed.argmax(axis=1)], logprobs[:-1, -1] - 1
    )
    return [[None, tokens[0], None], *[[v, token, None] for v, token in zip(own.tolist(), tokens[1:], strict=True)]]


def sglang(window: Window) -> dict[str, Any]:
    """A reply of SGLang with nested triples."""
    _, ids, logprobs = window
    rows = zip(logprobs[:-1].tolist(), ids[:-1].tolist(), strict=True)
    top = [[[v, i, None] for v, i in zip(*row, strict=True)] for row in rows]
    return {"meta_info": {"input_token_logprobs": own_tokens(window), "input_top_logprobs": [None, *top]}}


def sglang_b64(window: Window) -> dict[str, Any]:
    """A reply of SGLang with flat arrays in base64."""
    tokens, ids, logprobs = window
    flat = {"val": ("float32", logprobs[:-1].astype("<f4")), "idx": ("int32", ids[:-1].astype("<i4"))}
    meta: dict[str, Any] = {"input_token_logprobs": own_tokens(window)}
    for name, (dtype, values) in flat.items():
        meta[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(values.tobytes()).decode()
        meta[f"input_top_logprobs_{name}_flat_b64_dtype"] = dtype
    return {"meta_info": meta | {"input_top_logprobs_shape": [len(tokens) - 1, K], "input_top_logprobs_null_prefix": 1}}


def columns(window: Window) -> dict[str, Any]:
    """A row of plain lists."""
    tokens, ids, logprobs = window
    return {"tokens": tokens, "ids": ids.tolist(), "logprobs": logprobs.tolist()}


def lines_of(shape: Callable[[Window], dict[str, Any]]) -> list[bytes]:
    """Real rows in a server's shape, one reply a line."""
    return [json.dumps(shape(window)).encode() + b"\n" for window in windows()]


def replies(name: str) -> list[bytes]:
    """Lines of a real capture; each repetition gets an id of its own."""
    return (DATA / name).read_bytes().splitlines(keepends=True)


def repeated(lines: list[bytes], size: int) -> Iterator[bytes]:
    """The lines again and again, until there are so many bytes; ids of replies are made different."""
    done = number = 0
    while done < size:
        for line in lines:
            yield line.replace(b'"id": "chatcmpl-', b'"id": "%d-' % number)
            done, number = done + len(line), number + 1


def speed(name: str, importer: str, lines: list[bytes], workers: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        with path.open("wb") as file:
            file.writelines(repeated(lines, TARGET_BYTES))
        said: Any = {"value_kind": "logprob", "alignment": "next"} if importer == "columns" else {}
        took = []
        for _ in range(3):
            start = time.perf_counter()
            done = convert([path], Path(folder) / "out", importer=importer, overwrite=True, workers=workers, **said)
            took.append(time.perf_counter() - start)
        size, positions = path.stat().st_size, done.summary.positions
    print(f"{name:34} {size / min(took) / 1e6:6.1f} MB/s  {positions / min(took):9,.0f} positions/s", flush=True)


def distillkit() -> None:
    """Unpacking and decoding the real files, as far as the arguments of a writer."""
    importer = importers()["distillkit"]
    for folder in sorted((DATA / "distillkit").glob("*")):
        files = expand([folder], importer.patterns)
        took, positions = [], 0
        for _ in range(5):
            opened = importer.read([Input(path) for path in files], Options())
            pieces = list(opened.pieces)
            start = time.perf_counter()
            items = [i for piece in pieces for record in piece.records() for i in opened.parse(record, Tally())]
            took.append(time.perf_counter() - start)
            positions = sum(len(item.arguments["tokens"]) for item in items)
        print(
            f"distillkit, {folder.name:22} {'':12} {positions / min(took):9,.0f} positions/s, not written", flush=True
        )


def memory(name: str, importer: str, lines: list[bytes], size: int) -> None:
    """Peak memory of the command on standard input of that size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "logitstore_cli", "convert", "-", f"{folder}/out", "--from", importer]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            peak = 0
            if run.stdin is not None:
                for number, line in enumerate(repeated(lines, size)):
                    run.stdin.write(line)
                    if number % 64 == 0:  # the child's own peak; that of wait4 has the parent's in it
                        status = Path(f"/proc/{run.pid}/status").read_text()
                        peak = int(status.split("VmHWM:")[1].split()[0])
                run.stdin.close()
            code = run.wait()
        says = f"{size / 1e9:.1f} GB from standard input, exit {code}"
        print(f"{name:34} {says}: {peak * 1024 / 1e6:.0f} MB", flush=True)


def main() -> None:
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 2) * 1e9)
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    shapes = {"vllm, prompt_logprobs": ("vllm", lines_of(vllm))}
    shapes["sglang, triples"] = ("sglang", lines_of(sglang))
    shapes["columns, JSON lines"] = ("columns", lines_of(columns))
    shapes["sglang, base64"] = ("sglang", lines_of(sglang_b64))
    if DATA.exists():
        shapes["llama-server"] = ("llama-server", replies("llama-server-completion.jsonl"))
        shapes["openai, chat"] = ("openai", replies("openai-chat.jsonl"))
        shapes["openai, completions"] = ("openai", replies("openai-completions.jsonl"))
    else:
        print("the real servers' replies are not there: skipped")
    for name, (importer, lines) in shapes.items():
        speed(name, importer, lines)
    speed("vllm, 2 workers", *shapes["vllm, prompt_logprobs"], workers=2)
    if DATA.exists():
        distillkit()
    for name in ("vllm, prompt_logprobs", "llama-server"):
        if name in shapes:
            memory(name, *shapes[name], size)


if __name__ == "__main__":
    main()
