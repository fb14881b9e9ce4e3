"""What the tests of `view` share: a dataset of texts that are hard to show, and the elements of a page."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np

import logitstore
from logitstore.tokenizer import Tokenizer

HOSTILE = {
    0: b"plain ", 1: b"<script>alert(1)</script>", 2: b"</style>", 3: b"-->", 4: b"<!--", 5: b"\xf0\x9f", 6: b"\x98\x80", 7: b"\n",
    8: b"\t", 9: "\u05e9\u05dc\u05d5\u05dd".encode(), 10: "\u202e".encode(), 11: b"x" * 9000, 12: b"\x1b[31m", 13: b"&amp;<b>", 14: b"</script>",
    15: b"\xff", 16: b"", 17: "\u2028".encode(),
}  # fmt: skip


def candidates(tokens, k, width, seed=0):
    """(ids, logprobs) for each token, with some mass left."""
    random = np.random.default_rng(seed)
    ids = random.permuted(np.tile(np.arange(width), (len(tokens), 1)), axis=1)[:, :k]
    logits = -np.sort(-random.normal(0, 2, (len(tokens), k)), axis=1)
    return ids, (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1).astype(np.float32)


def hostile_dataset(path):
    tokens = np.array([*HOSTILE, 19, 0])
    with logitstore.Writer(path, tokenizer=Tokenizer.from_pieces(HOSTILE), logit_width=20, teacher="t") as writer:
        writer.add(tokens, *candidates(tokens, 12, 20), id="<script>alert(2)</script>&")
        writer.add([], np.zeros((0, 4), int), np.zeros((0, 4), np.float32), id="empty")
        writer.add([0, 9], *candidates([0, 9], 4, 20), id="/a b?c=d&e#\N{SNOWMAN}%2F")
    return logitstore.open(path)


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts and style sheets."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append("")
            self.open = tag

    def handle_endtag(self, tag):
        self.open = None if tag == self.open else self.open

    def handle_data(self, data):
        if self.open:
            self.inside[-1] += data
