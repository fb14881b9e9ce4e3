"""Speed and memory of importers on real rows.

    python benchmarks/convert.py [GIGABYTES]

JSON lines are those of real servers beside the repository, repeated, and the Gemma 3 270M rows of WikiText-2 (else the
Shakespeare rows of the tests) in the shapes of vLLM and SGLang. One process, one thread, reading to a finished dataset;
the best of three. Memory is that of `logitstore convert` reading so many gigabytes (2) from standard input.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import logitstore
from logitstore.convert import convert

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


def sglang(window: Window) -> dict[str, Any]:
    """A reply of SGLang with nested triples."""
    tokens, ids, logprobs = window
    top = [
        [[v, i, None] for i, v in zip(*row, strict=True)]
        for row in zip(ids[:-1].tolist(), logprobs[:-1].tolist(), strict=True)
    ]
    own = [[None, tokens[0], None], *[[-1.0, token, None] for token in tokens[1:]]]
    return {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": [None, *top]}}


def sglang_b64(window: Window) -> dict[str, Any]:
    """A reply of SGLang with flat arrays in base64."""
    tokens, ids, logprobs = window
    meta = sglang((tokens[:1], ids[:1], logprobs[:1]))["meta_info"]
    meta = {"input_token_logprobs": [[None, tokens[0], None], *[[-1.0, token, None] for token in tokens[1:]]]}
    meta["input_top_logprobs_val_flat_b64"] = base64.b64encode(logprobs[:-1].astype("<f4").tobytes()).decode()
    meta["input_top_logprobs_val_flat_b64_dtype"] = "float32"
    meta["input_top_logprobs_idx_flat_b64"] = base64.b64encode(ids[:-1].astype("<i4").tobytes()).decode()
    meta["input_top_logprobs_idx_flat_b64_dtype"] = "int32"
    return {"meta_info": meta | {"input_top_logprobs_shape": [len(tokens) - 1, K], "input_top_logprobs_null_prefix": 1}}


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
        took = []
        for _ in range(3):
            start = time.perf_counter()
            done = convert([path], Path(folder) / "out", importer=importer, overwrite=True, workers=workers)
            took.append(time.perf_counter() - start)
        size, positions = path.stat().st_size, done.summary.positions
    print(f"{name:34} {size / min(took) / 1e6:6.1f} MB/s  {positions / min(took):9,.0f} positions/s", flush=True)


def distillkit() -> None:
    for folder in sorted((DATA / "distillkit").glob("*")):
        with tempfile.TemporaryDirectory() as out:
            took = []
            for _ in range(3):
                start = time.perf_counter()
                done = convert([folder], Path(out) / "out", importer="distillkit", overwrite=True)
                took.append(time.perf_counter() - start)
        print(f"distillkit {folder.name:23} {'':12} {done.summary.positions / min(took):9,.0f} positions/s", flush=True)


def memory(name: str, importer: str, lines: list[bytes], size: int) -> None:
    """Peak memory of the command on standard input of that size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "logitstore_cli", "convert", "-", f"{folder}/out", "--from", importer]
        with subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            pipe = run.stdin

            def feed() -> None:
                if pipe is not None:
                    with pipe:
                        pipe.writelines(repeated(lines, size))

            feeder = threading.Thread(target=feed)
            feeder.start()
            _, status, usage = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
            feeder.join()
        says = f"{size / 1e9:.1f} GB from standard input, exit {run.returncode}"
        print(f"{name:34} {says}: {usage.ru_maxrss / 1024:.0f} MiB", flush=True)


def main() -> None:
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 2) * 1e9)
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    shapes = {"vllm, prompt_logprobs": ("vllm", lines_of(vllm))}
    shapes["sglang, triples"] = ("sglang", lines_of(sglang))
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
