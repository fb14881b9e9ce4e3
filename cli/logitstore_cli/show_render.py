"""What `logitstore show` prints, as lines of rich's text; their plain text is what a pipe gets.

Token text is untrusted: it goes through `readable` or comes escaped from `label`, and never through rich's markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final
from unicodedata import bidirectional, category

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from logitstore.look.measures import ENTROPIES
from logitstore.look.show import Candidate, Next, Piece, Position, Shown
from logitstore.look.words import SHADES
from logitstore.text import ELLIPSIS, readable, shortened
from logitstore_cli.output import quoted

RAMP: Final = tuple(
    Style(color=text, bgcolor=shade)
    for shade, text in (
        ("#ffffff", "#000000"), ("#e4f3ff", "#000000"), ("#c8e5ff", "#000000"), ("#9dceff", "#000000"),
        ("#6db0f4", "#000000"), ("#3f94e2", "#000000"), ("#0060b3", "#ffffff"), ("#002a66", "#ffffff"),
    )
)  # fmt: skip
"""From sure to unsure, by `SHADES`. Both colours are set: the text can be read whatever colours the terminal has."""

RAMP_16: Final = tuple(
    Style.parse(f"{text} on {shade}")
    for shade, text in (
        ("bright_white", "black"), ("white", "black"), ("bright_cyan", "black"), ("cyan", "black"),
        ("bright_blue", "bright_white"), ("blue", "bright_white"), ("magenta", "bright_white"), ("red", "bright_white"),
    )
)  # fmt: skip
"""The same where a terminal has only 16 colours, of which several shades of one would become the same."""

NEWLINE: Final = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
TAB: Final = "\N{RIGHTWARDS ARROW TO BAR}"
PART: Final = "\N{WHITE VERTICAL RECTANGLE}"
"""A token of which nothing shows: some bytes of a character that a later one completes, or one without width."""

QUALIFIED: Final = dict(zip(ENTROPIES, ("", "at least", "of the draws", "among the candidates"), strict=True))
"""What an entropy is that is not that of the whole vocabulary."""

BLOCKS: Final = " ▏▎▍▌▋▊▉█"
"""Nothing to eight eighths of a cell."""

# Terminals that know of right-to-left writing reorder a line by the letters in it: after a Hebrew candidate, the
# percentage would move to its left. A left-to-right mark on both sides of such a text ends its influence there. It is
# older and better supported than the isolates, takes no cell, and is only put where there is a letter that needs it.
_MARK: Final = "\N{LEFT-TO-RIGHT MARK}"
_RIGHT_TO_LEFT: Final = {"R", "AL", "AN"}

_ID: Final = 128  # characters of a sequence's id
_PIECE: Final = 200  # characters of a token in the text
_BEFORE: Final = 60  # cells of the text before a position
_LABEL: Final = 28  # cells of a candidate's text
_BAR: Final = 40  # cells of the longest bar
_NEXT: Final = "  <- next"


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw.

    Attributes:
        width: cells of a line; bars end there.
        blocks: draw bars of blocks, else of `#`, and mark tokens of which nothing shows.
        ramp: styles by uncertainty; empty: no shades.
        identified: the dataset has a tokenizer, so what stands for a token is its text and is quoted.
    """

    width: int = 80
    blocks: bool = False
    ramp: tuple[Style, ...] = ()
    identified: bool = True


def lines(shown: Shown, look: Look) -> Iterator[Text]:
    """Everything, line by line."""
    row = "" if shown.row is None else f" (row {shown.row:,})"
    name = isolated(quoted(shortened(shown.id, _ID)))
    yield Text.assemble("sequence ", (name, "bold"), f"{row}: {_counted(len(shown.tokens), 'token')}")
    if look.ramp and shown.tokens:
        yield _legend(shown, look)
    if shown.tokens:
        yield Text()
        yield from _text(shown, look)
    for position in shown.positions:
        yield Text()
        yield from _position(position, shown, look)
    if shown.found_more:
        yield Text()
        yield Text(f"{shown.found_more:,} more places of this text are not shown.")


def isolated(text: str) -> str:
    """Text that leaves the order of what stands beside it alone."""
    turns = any(bidirectional(character) in _RIGHT_TO_LEFT for character in text)
    return f"{_MARK}{text}{_MARK}" if turns else text


def level(entropy: float) -> int:
    """The place of an entropy, in nats, in a ramp."""
    return sum(entropy >= start for start in SHADES)


def bar(share: float, cells: int, *, blocks: bool) -> str:
    """A bar of a share of so many cells; it has a length wherever the share is not 0."""
    if not blocks:
        return "#" * max(round(share * cells), share > 0)
    eighths = max(round(share * cells * 8), share > 0)
    return BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()


def ending(text: str, cells: int) -> str:
    """The end of a text, in so many cells."""
    if cell_len(text) <= cells:
        return text
    kept = _fitting(reversed(text), cells - 1)
    return ELLIPSIS + text[len(text) - kept :]


def beginning(text: str, cells: int) -> str:
    """The beginning of a text, in so many cells."""
    if cell_len(text) <= cells:
        return text
    return text[: _fitting(text, cells - 1)] + ELLIPSIS


def _fitting(characters: Iterable[str], cells: int) -> int:
    """How many of these characters have room in so many cells."""
    return sum(taken <= cells for taken in accumulate(map(cell_len, characters)))


def _legend(shown: Shown, look: Look) -> Text:
    edges = (0.0, *SHADES)
    marks = [(f" {start:g}{'+' if start == SHADES[-1] else ''} ", look.ramp[level(start)]) for start in edges]
    sources = {piece.entropy_from for piece in shown.tokens if piece.entropy_from is not None}
    where = "where not stored: " if ENTROPIES[0] in sources else ""
    qualified = "".join(f" ({where}{QUALIFIED[source]})" for source in sources - {ENTROPIES[0]})
    return Text.assemble(*marks, f" nats of uncertainty{qualified}", overflow="fold")


def _text(shown: Shown, look: Look) -> Iterator[Text]:
    """The text, a line for each of its own; chosen tokens are underlined."""
    chosen = {position.position for position in shown.positions}
    line = Text(overflow="fold")
    for place, piece in enumerate(shown.tokens):
        style = _shade(piece, look) + (Style(bold=True, underline=True) if look.ramp and place in chosen else Style())
        first, *others = _readable(piece.text, look).split("\n")
        line.append(first, style)
        for other in others:
            yield line
            line = Text(overflow="fold").append(other, style)
    if line.plain:
        yield line


def _shade(piece: Piece, look: Look) -> Style:
    return look.ramp[level(piece.entropy)] if look.ramp and piece.entropy is not None else Style()


def _readable(text: str, look: Look) -> str:
    """A token's text as it is shown: what ends a line is followed by a newline, and nothing else is a control."""
    if look.blocks and all(category(character) == "Cf" for character in text):
        return PART  # marks have no width either, but show on the letter before them
    text = readable(shortened(text, _PIECE), keep="\n\t")
    return text.replace("\t", TAB).replace("\n", f"{NEWLINE}\n")


def _position(position: Position, shown: Shown, look: Look) -> Iterator[Text]:
    before = readable(position.before, keep="\n\t").replace("\t", TAB).replace("\n", NEWLINE)
    head = f"position {position.position}"
    room = min(_BEFORE, look.width - len(head) - len(" after ''"))
    context = isolated(f"'{ending(before, max(room, _BEFORE // 4))}'")
    yield Text.assemble((head, "bold"), f" after {context}")
    placeholder = shown.begins_with_placeholder and position.position == 0
    token = "a placeholder for the prompt" if placeholder else f"token {_named(position.text, look)}"
    yield Text(f"  {token}: {_facts(position, shown)}")
    yield from _bars(position, shown, look)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _facts(position: Position, shown: Shown) -> str:
    """What is known of a distribution as a whole."""
    if position.count == 0:
        return "no distribution"
    if position.impossible:
        return "its numbers are impossible: see logitstore validate --deep"
    facts = [_counted(position.count, "candidate")]
    if position.draws is not None:
        facts = [f"sampled: {_counted(position.draws, 'draw')} of {_counted(position.count, 'token')}"]
    if position.entropy is not None and position.entropy_from is not None:
        qualified = f"entropy {QUALIFIED[position.entropy_from]}".rstrip()
        facts.append(f"{qualified} {position.entropy:.2f} nats")
    if shown.normalised == "candidates":
        facts.append("only their ratios are known: percentages are shares of the candidates")
    return ", ".join(facts)


def _named(text: str, look: Look) -> str:
    return isolated(f"'{beginning(text, _LABEL - 2)}'") if look.identified else text


def _bars(position: Position, shown: Shown, look: Look) -> Iterator[Text]:
    """The candidates; the real next token where it is none of those; everything else."""
    table = _table(position, shown, look)
    best = position.candidates[0].probability if position.candidates else 0.0
    for candidate in position.candidates:
        line = table.line(str(candidate.rank), _named(candidate.text, look), candidate.probability).append("  ")
        share = candidate.probability / best if best > 0 else 0.0
        line.append(bar(share, table.bar, blocks=look.blocks), _bar_style(candidate, look))
        yield line.append(_NEXT, _next_style(look)) if candidate.is_next else line
    following = position.next
    if following is not None and not any(candidate.is_next for candidate in position.candidates):
        line = table.line(_rank(following, position), _named(following.text, look), following.probability)
        line.append(_NEXT, _next_style(look))
        outside = position.count > 0 and not following.is_candidate and not position.impossible
        yield line.append(f", not among the {_counted(position.count, 'candidate')}") if outside else line
    if position.everything_else:  # neither unknown nor nothing
        yield table.line("", _rest(position, shown), position.everything_else)


@dataclass(frozen=True, slots=True)
class _Table:
    """Cells of the columns of a position."""

    rank: int
    label: int
    bar: int

    def line(self, rank: str, label: str, probability: float | None) -> Text:
        percent = " " * len("100.00 %") if probability is None else f"{_percent(probability):>6} %"
        return Text(f"  {rank:>{self.rank}}  {label}{' ' * (self.label - cell_len(label))}  {percent}")


def _percent(probability: float) -> str:
    return "<0.01" if 0 < probability < 0.00005 else f"{100 * probability:.2f}"


def _table(position: Position, shown: Shown, look: Look) -> _Table:
    following = [position.next] if position.next is not None else []
    labels = [_named(each.text, look) for each in position.candidates] + [_named(each.text, look) for each in following]
    ranks = [str(each.rank) for each in position.candidates] + [_rank(each, position) for each in following]
    rank, label = max(map(len, ranks), default=0), max(map(cell_len, [*labels, _rest(position, shown)]))
    taken = rank + label + len("      100.00 %  ") + len(_NEXT)
    return _Table(rank, label, max(_BAR // 4, min(_BAR, look.width - taken)))


def _rest(position: Position, shown: Shown) -> str:
    of_candidates = shown.normalised == "candidates" or position.draws is not None
    return "other candidates" if of_candidates else "everything else"


def _rank(following: Next, position: Position) -> str:
    """The rank of the next token; a question mark where it is unknown though there is a distribution."""
    if following.rank is not None:
        return f"{following.rank:,}"
    return "?" if position.count else ""


def _next_style(look: Look) -> str:
    return "bold" if look.blocks else ""


def _bar_style(candidate: Candidate, look: Look) -> str:
    if not look.blocks:
        return ""
    return "green" if candidate.is_next else "cyan"
