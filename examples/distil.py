"""A distillation that works, on a CPU: the same small student, once on hard labels, once on stored distributions.

    python examples/distil.py [--epochs 12] [--seeds 3] [CAPTURE.npz]

Teacher: Gemma 3 270M, whose top-k distributions on WikiText-2 (81 windows of 512 tokens) or, where these are not there,
on Shakespeare (5 windows, in tests/data) were stored before. Student: a transformer of some 3 million parameters that
knows the most frequent tokens of the teacher's vocabulary, and one token for all others: with 262,144 tokens, most of a
small student would be its embeddings. Both students begin alike, see the same sequences in the same order, and are
judged by the same number: the loss on the real next token of held-out text, at the epoch that is best on validation
text. What is printed is what came out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import logitstore
from logitstore.convert import convert
from logitstore.torch import HFCollator, LogitLoader, StreamingLogits, losses

ROOT = Path(__file__).parent.parent
CAPTURES = (
    ROOT.parent / "shared" / "data" / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
LENGTH = 128


@dataclass(frozen=True)
class Settings:
    """Of the student and its training."""

    vocabulary: int
    width: int
    layers: int
    epochs: int
    batch: int = 8
    rate: float = 1e-3
    dropout: float = 0.1


# Data


def reduced(source: Path, target: Path, vocabulary: int, train_rows: int) -> None:
    """Write a dataset of windows of `LENGTH` in which only the most frequent tokens of the training text are known.

    All other tokens are the last one, `vocabulary - 1`. What the teacher gives to them goes to the tail: the student's
    loss takes the tail as one class of everything that is no candidate.
    """
    full = logitstore.open(source)
    counts: NDArray[np.int64] = np.zeros(full.info.logit_width or 0, np.int64)
    for sequence in full[:train_rows]:
        counts += np.bincount(sequence.tokens, minlength=len(counts))
        np.add.at(counts, sequence.ids[sequence.logprobs > np.log(0.05)], 1)
    known = np.argsort(-counts, kind="stable")[: vocabulary - 1]
    table = np.full(len(counts), vocabulary - 1, np.int64)
    table[known] = np.arange(len(known))
    with logitstore.Writer(target, logit_width=vocabulary, teacher=full.info.teacher) as writer:
        for row, sequence in enumerate(full):
            for start in range(0, len(sequence) - 1, LENGTH):
                part = slice(start, min(start + LENGTH, len(sequence)))
                held = slice(sequence.offsets[part.start], sequence.offsets[part.stop])
                ids, logprobs = table[sequence.ids[held]], sequence.logprobs[held]
                kept = ids < vocabulary - 1
                position = np.repeat(np.arange(part.stop - part.start), sequence.count[part])
                count = np.bincount(position, kept, minlength=part.stop - part.start).astype(np.int64)
                name = f"{'train' if row < train_rows else 'other'}-{row}-{start}"
                writer.add(table[sequence.tokens[part]], ids[kept], logprobs[kept], count=count, id=name)


def is_train(name: str) -> bool:
    """Whether a window is of the training text."""
    return name.startswith("train-")


# Student


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a normalisation."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = max(1, width // 48)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] to the same."""
        b, t, width = x.shape
        split = self.attend(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(b, t, width)))
        return x + self.dropout(self.feed(self.norms[1](x)))


class Student(nn.Module):
    """A small causal language model with tied embeddings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(settings.vocabulary, settings.width)
        self.place = nn.Embedding(LENGTH, settings.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(settings.width, settings.dropout) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T] to logits [B, T, V]."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.norm(self.blocks(x)) @ self.embed.weight.T


# Training


def batches(dataset: Any, settings: Settings, seed: int, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one epoch: the same for every student of a seed."""
    stream = StreamingLogits(dataset, batch_size=settings.batch, seed=seed, shuffle="full")
    stream.set_epoch(epoch)
    yield from LogitLoader(stream, collate_fn=HFCollator())


def hard(student: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy with the real next token."""
    logits = student(batch["input_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["target_next"].flatten(), ignore_index=-100)


def soft(student: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL divergence from the stored distributions."""
    return losses.forward_kl(
        student(batch["input_ids"]),
        batch["target_ids"],
        batch["target_logprobs"],
        target_tail=batch["target_tail"],
        mask=batch["target_mask"],
        tail="ghost",
    )


def judged(student: nn.Module, held: list[dict[str, torch.Tensor]]) -> float:
    """Mean cross-entropy with the real next token, nats, over some batches."""
    student.eval()
    with torch.no_grad():
        sums = [(hard(student, each).item(), int((each["target_next"] != -100).sum())) for each in held]
    student.train()
    return sum(value * n for value, n in sums) / sum(n for _, n in sums)


def trained(
    kind: str, train: Any, held: dict[str, list[dict[str, torch.Tensor]]], settings: Settings, seed: int
) -> tuple[float, int]:
    """The loss on the test text at the best epoch on the validation text, and that epoch."""
    torch.manual_seed(seed)
    student = Student(settings)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.rate, weight_decay=0.1)
    loss_of = {"hard labels": hard, "distributions": soft}[kind]
    best, test, at = float("inf"), float("inf"), 0
    for epoch in range(settings.epochs):
        for batch in batches(train, settings, seed, epoch):
            loss = loss_of(student, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        if (validation := judged(student, held["validation"])) < best:
            best, test, at = validation, judged(student, held["test"]), epoch + 1
    return test, at


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description="Distil a small student, and compare it with hard labels.")
    parser.add_argument("capture", nargs="?", type=Path, help="npz as the importer `arrays` reads it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    settings = Settings(given.vocabulary, given.width, given.layers, given.epochs)
    capture = given.capture or next(path for path in CAPTURES if path.exists())
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = convert(
            [capture], Path(folder) / "full", values="float32", logit_width=262_144, teacher="google/gemma-3-270m"
        )
        rows = done.summary.sequences
        train_rows = rows - 2 * max(1, rows // 10)
        reduced(Path(folder) / "full", Path(folder) / "small", settings.vocabulary, train_rows)
        report(logitstore.open(Path(folder) / "small"), settings, given.seeds, capture.name)
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes")


def report(dataset: Any, settings: Settings, seeds: int, name: str) -> None:
    """Train both kinds for all seeds, and print the losses."""
    split = sum(is_train(sequence.id) for sequence in dataset.select(["tokens"]))
    train, rest = dataset[:split], list(dataset[split:])
    half = len(rest) // 2
    put = HFCollator()
    held = {"validation": [put(rest[:half])], "test": [put(rest[half:])]}
    positions = sum(len(sequence) for sequence in train.select(["tokens"]))
    unknown = float((held["test"][0]["target_next"] == settings.vocabulary - 1).float().mean())
    size = sum(parameter.numel() for parameter in Student(settings).parameters())
    print(f"{name}: {positions:,} training positions; {seeds} seeds")
    print(
        f"student: {size:,} parameters, {settings.vocabulary:,} tokens; {unknown:.1%} of the test text is none of them"
    )
    results: dict[str, list[float]] = {}
    for kind in ("hard labels", "distributions"):
        runs = [trained(kind, train, held, settings, seed) for seed in range(seeds)]
        results[kind] = [loss for loss, _ in runs]
        listed = ", ".join(f"{loss:.3f} (epoch {epoch})" for loss, epoch in runs)
        mean, spread = np.mean(results[kind]), np.std(results[kind], ddof=1) if seeds > 1 else float("nan")
        print(f"{kind:14} held-out loss {mean:.3f} ± {spread:.3f} nats: {listed}", flush=True)
    gain = np.array(results["hard labels"]) - np.array(results["distributions"])
    print(f"distributions are better by {gain.mean():+.3f} nats, in {int((gain > 0).sum())} of {seeds} seeds")


if __name__ == "__main__":
    main()
