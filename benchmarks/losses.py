"""Time and peak memory of the losses from sparse targets beside `F.cross_entropy` on the same logits, on the CPU.

    python benchmarks/losses.py [POSITIONS]

2,048 positions (or POSITIONS) of 262,144 logits, 64 candidates; forward and backward. Each figure comes from a process
of its own, in pairs in turn: the time is the median of three calls, the memory the peak above what was there before,
which is the logits. Ratios are of pairs; medians of the rounds are printed. bfloat16 logits are compared with
`F.cross_entropy(logits.float(), ...)`, as trainers compute it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from logitstore.torch import losses

WIDTH: Final = 262_144
K: Final = 64
CALLS: Final = 3
ROUNDS: Final = 3

OTHERS: Final = (
    "forward_kl renormalise",
    "forward_kl target",
    "reverse_kl ghost",
    "jensen_shannon ghost",
    "total_variation ghost",
    "forward_kl uniform",
    "jensen_shannon uniform",
)

Figures = dict[str, float]


def loss_of(name: str, logits: Tensor, targets: dict[str, Any]) -> Tensor:
    if name == "cross_entropy":
        return functional.cross_entropy(logits.float(), targets["target_next"])
    kind, tail = name.split()
    loss: Callable[..., Tensor] = getattr(losses, kind)
    return loss(logits, **targets, tail=tail)


def memory(name: str) -> float:
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in status if line.startswith(name)).split()[1])


def measure(name: str, dtype: str, positions: int) -> Figures:
    torch.manual_seed(0)
    # A few rows many times over: values do not matter for the time, and drawing all of them takes long.
    logits = torch.randn(64, WIDTH, dtype=torch.float32).to(getattr(torch, dtype)).repeat(positions // 64, 1)
    step = WIDTH // K
    targets = {
        "target_ids": torch.arange(K) * step + torch.randint(0, step, (positions, K)),
        "target_logprobs": torch.randn(positions, K).log_softmax(1) - 0.05,
        "target_tail": torch.full((positions,), 0.05).expm1().log(),
        "target_next": torch.randint(0, WIDTH, (positions,)),
    }
    logits.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = memory("VmRSS"), []
    for _ in range(CALLS):
        logits.grad = None
        start = time.perf_counter()
        loss_of(name, logits, targets).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": memory("VmHWM") - before, "logits": float(logits.nbytes)}


def apart(name: str, dtype: str, positions: int) -> Figures:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, dtype, str(positions)]
    figures: Figures = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return figures


def compare(name: str, dtype: str, positions: int, rounds: int) -> None:
    pairs = [(apart(name, dtype, positions), apart("cross_entropy", dtype, positions)) for _ in range(rounds)]

    def median(pick: Callable[[Figures, Figures], float]) -> float:
        return statistics.median(pick(ours, theirs) for ours, theirs in pairs)

    print(
        f"{dtype:9} {name:24}"
        f" {median(lambda ours, _: ours['seconds']):6.2f} s of {median(lambda _, theirs: theirs['seconds']):6.2f} s,"
        f" ratio {median(lambda ours, theirs: ours['seconds'] / theirs['seconds']):4.2f};"
        f" {median(lambda ours, _: ours['bytes']) / 1e9:5.2f} GB of {median(lambda _, t: t['bytes']) / 1e9:5.2f} GB,"
        f" ratio {median(lambda ours, theirs: ours['bytes'] / theirs['bytes']):4.2f},"
        f" with the logits {median(lambda o, t: (o['bytes'] + o['logits']) / (t['bytes'] + t['logits'])):4.2f}",
        flush=True,
    )


def main(positions: int) -> None:
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(
        f"{positions} positions, {WIDTH} logits, {K} candidates, {threads} threads, load before {load:.1f}", flush=True
    )
    for dtype in ("float32", "bfloat16"):
        compare("forward_kl ghost", dtype, positions, ROUNDS)
    for name in OTHERS:
        compare(name, "float32", positions, 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
