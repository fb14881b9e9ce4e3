"""Prints the worked example of spec/README.md from the code; `--write` puts it there. A test keeps the two equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from logitstore.encoding.cells import encode_cell
from logitstore.encoding.codes import encode_ids, token_order
from logitstore.encoding.values import Encoding, encode_draws, encode_values
from logitstore.shard.chunk import encode_tail

SPEC = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- examples: begin -->\n", "<!-- examples: end -->\n"


def row(name: str, values: Any, kind: str) -> str:
    """One line of a table: the values of a cell and its bytes."""
    array = np.ascontiguousarray(values)
    cell = encode_cell(array).hex(" ")
    numbers = ", ".join(str(v) for v in array.tolist())
    return f"| `{name}` | {kind} | {numbers or '(none)'} | `{cell or '(empty)'}` |\n"


def examples() -> str:
    """The whole block of examples as Markdown."""
    head = "| cell | type | values | bytes |\n|---|---|---|---|\n"
    tokens = np.array([2, 7, 5], np.uint32)
    count = np.array([3, 0, 2], np.uint32)
    ids = np.array([7, 4, 9, 5, 7], np.uint32)
    logprobs = np.array([-0.5, -1.25, -3.0, -0.0625, -4.0], np.float32)
    everything = np.concatenate([ids, tokens], dtype=np.intp)
    order = token_order(everything)
    codes = encode_ids(everything, order)
    id_codes, token_codes = codes[: len(ids)], codes[len(ids) :]
    out = "Three positions, tokens 2, 7, 5. Position 0 has the candidates 7 (-0.5), 4 (-1.25), 9 (-3.0); position 1\n"
    out += (
        "has none; position 2 has 5 (-0.0625), 7 (-4.0). In this chunk the ids 5 and 7 occur twice or more: 7 three\n"
    )
    out += f"times, 5 twice. The token order is {order.tolist()}, M' = {len(order)}.\n\n"
    out += head
    out += row("order", order, "u32")
    out += row("tokens", token_codes, "u32")
    out += row("count", count, "u32")
    out += row("ids", id_codes, "u32")
    grid = encode_values(logprobs, count, "grid", 1 / 32)
    out += row("top", grid.top, "f32") + row("gaps", grid.gaps, "u16")
    mass = np.array([np.exp(logprobs[:3].astype(float)).sum(), 0, np.exp(logprobs[3:].astype(float)).sum()])
    tail = np.log1p(-mass)
    tail[1] = np.nan
    out += row("tail", encode_tail(tail), "u16")
    out += (
        "\nThis is encoding 0, `grid`, at resolution 1/32: -0.5 - (24 + 56)/32 = -3.0. The same under the others:\n\n"
    )
    out += "| encoding | cell | type | values | bytes |\n|---|---|---|---|---|\n"
    for name in ("float16", "float32"):
        out += _pair(name, encode_values(logprobs, count, name, 1 / 32))
    logits = np.array([17.5, 16.75, 15.0, 3.0, -0.9375], np.float32)
    logsumexp = np.array([18.0, np.nan, 3.0625], np.float32)
    values = encode_values(logprobs, count, "bfloat16", 1 / 32, logits=logits, logsumexp=logsumexp)
    out += _pair("bfloat16", values)
    out += "| `bfloat16` " + row("logsumexp", logsumexp, "f32")
    draws = np.array([31, 15, 4, 46, 4], np.uint32)
    steps, total, rest = encode_draws(id_codes, draws, count)
    out += f"| `draws` ({int(Encoding.DRAWS)}) " + row("ids", steps, "u32")
    out += "| `draws` " + row("top", total, "u32") + "| `draws` " + row("gaps", rest, "u32")
    out += "\nThe bfloat16 logits are 17.5, 16.75, 15.0 (logsumexp 18.0) and 3.0, -0.9375 (logsumexp 3.0625). Under\n"
    out += "`draws`, 50 draws fell on 7 (31), 4 (15), 9 (4), and on 5 (46), 7 (4).\n"
    return out


def _pair(name: str, values: Any) -> str:
    kind = {2: "u16", 4: "u32"}
    out = f"| `{name}` ({int(values.encoding)}) " + row("top", values.top, kind[values.top.dtype.itemsize])
    return out + f"| `{name}` " + row("gaps", values.gaps, kind[values.gaps.dtype.itemsize])


def main() -> None:
    """Print the block, or write it into the specification."""
    if "--write" not in sys.argv:
        print(examples(), end="")
        return
    text = SPEC.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    SPEC.write_text(before + BEGIN + examples() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
