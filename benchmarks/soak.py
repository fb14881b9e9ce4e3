"""Many writers that are killed again and again: nothing is lost, nothing is doubled.

A million short sequences in 16 parts, by processes that are killed at random and resumed; then the commit, the deep
validation, and a comparison of every sequence with what was given. Prints what it took, and ends with an error when
anything differs.

Run: python benchmarks/soak.py [--sequences 1000000] [--parts 16] [--at-once 4] [--seed 0]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import logitstore

WIDTH, BLOCK = 262_144, 1000
SETTINGS: dict[str, Any] = {
    "logit_width": WIDTH,
    "teacher": "soak",
    "values": "grid",  # which these values are on; looking for bfloat16 logits would take most of the time
    "shard_bytes": 2 * 2**20,
    "chunk_candidates": 2**13,
}


def name_of(block: int, place: int, part: int, of: int) -> str:
    """The id of a sequence of a block of a part."""
    return f"s{(block * BLOCK + place) * of + part}"


def rows(number: int, part: int, of: int) -> list[tuple[str, NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """A block of a part's sequences, always the same: (id, tokens, count, ids, logprobs) of up to 5 positions."""
    chance = np.random.default_rng([number, part])
    lengths = chance.integers(1, 6, BLOCK)
    tokens = np.split(chance.integers(0, WIDTH, int(lengths.sum())), np.cumsum(lengths)[:-1])
    counts = np.split(chance.integers(0, 5, int(lengths.sum())), np.cumsum(lengths)[:-1])
    sizes = np.array([count.sum() for count in counts])
    n = int(sizes.sum())
    ids = np.split(chance.integers(0, WIDTH // 8, n) * 8 + np.arange(n) % 8, np.cumsum(sizes)[:-1])
    logprobs = np.split(-2 - chance.integers(0, 200, n) / 32, np.cumsum(sizes)[:-1])
    names = [name_of(number, place, part, of) for place in range(BLOCK)]
    return list(zip(names, tokens, counts, ids, logprobs, strict=True))


def write(path: Path, part: int, of: int, blocks: int) -> None:
    """One writer, from the beginning or from where it was killed."""
    warnings.simplefilter("ignore")
    with logitstore.Writer(path, part=f"{part}/{of}", resume=True, **SETTINGS) as writer:
        for number in range(blocks):
            if name_of(number, BLOCK - 1, part, of) in writer:
                continue
            for name, tokens, count, ids, logprobs in rows(number, part, of):
                if name not in writer:
                    writer.add(tokens, ids, logprobs, count=count, id=name)


def check(path: Path, of: int, blocks: int) -> None:
    """Compare every sequence with what was given: same order, same values."""
    dataset = iter(logitstore.open(path))
    for part in range(of):
        for number in range(blocks):
            for name, tokens, count, ids, logprobs in rows(number, part, of):
                found = next(dataset)
                order = np.lexsort((ids, -logprobs, np.repeat(np.arange(len(count)), count)))
                same = (
                    found.id == name
                    and np.array_equal(found.tokens, tokens)
                    and np.array_equal(found.count, count)
                    and np.array_equal(found.ids, ids[order])
                    and np.allclose(found.logprobs, logprobs[order], rtol=0, atol=1 / 64)
                )
                if not same:
                    raise SystemExit(f"sequence {name} is not what was given: {found}")
    if next(dataset, None) is not None:
        raise SystemExit("there are sequences that were not given")


def soak(path: Path, sequences: int, of: int, at_once: int, seed: int) -> None:
    """Write, kill, resume, commit, validate, compare."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logitstore"])
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    blocks = -(-sequences // of // BLOCK)
    waiting, kills, start = list(range(of)), 0, time.monotonic()
    running: dict[int, BaseProcess] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            part = waiting.pop(0)
            running[part] = context.Process(target=write, args=(path, part, of, blocks))
            running[part].start()
        time.sleep(chance.uniform(0, 4))
        if running:
            victim = running[chance.choice(list(running))]
            if victim.is_alive() and victim.pid is not None:
                victim.kill()
                victim.join()
                kills += victim.exitcode == -signal.SIGKILL
        for part, process in list(running.items()):
            if process.exitcode is not None:
                del running[part]
                if process.exitcode == -signal.SIGKILL:
                    waiting.append(part)
                elif process.exitcode:
                    raise SystemExit(f"the writer of part {part} failed")
    written = time.monotonic()
    logitstore.commit(path)
    committed = time.monotonic()
    findings = [finding for finding in logitstore.validate(path, deep=True) if finding.severity == "error"]
    if findings:
        raise SystemExit(f"not valid: {findings[:3]}")
    validated = time.monotonic()
    check(path, of, blocks)
    totals = logitstore.open(path).info.totals
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    held = f"{totals.positions:,} positions, {totals.shards:,} shards, {totals.bytes:,} bytes"
    print(f"{totals.sequences:,} sequences, {held}")
    print(f"{of} parts, {at_once} at once; {kills} kills; nothing lost, nothing doubled")
    times = f"committed in {committed - written:.1f} s, validated in {validated - committed:.0f} s"
    print(f"written in {written - start:.0f} s, {times}")
    print(f"peak memory: {children:.0f} MiB of a writer, {own:.0f} MiB of commit, validation and comparison")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="logitstore-soak-"))
    try:
        soak(work / "dataset", given.sequences, given.parts, given.at_once, given.seed)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
