"""`logitstore show`: how it is drawn, and what the command writes to a pipe and to a terminal."""

import html
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI
from show_rows import PIECES, demo_at, plain, written

from logitstore.look.words import SHADES
from logitstore_cli.show import as_data, chosen, look_of
from logitstore_cli.show_render import PART, RAMP, RAMP_16, Look, bar, beginning, ending, isolated, level, lines

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.filterwarnings("ignore::logitstore.LogitStoreWarning")]
PRINTED = re.compile("\x1b\\[[0-9;]*m")


def run(*arguments, status=0, **environment):
    command = [sys.executable, "-m", "logitstore_cli", "show", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, **environment}, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status, (done.returncode, out, err)
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_at(tmp_path_factory.mktemp("show") / "demo")


# How it is drawn


def test_nothing_untrusted_reaches_the_terminal(tmp_path):
    dataset = written(tmp_path, [5, 8, 9, 4, 7, 2, 3], k=10, id="a\x1b[2J\u202e")
    for look in (Look(), Look(100, blocks=True, ramp=RAMP)):
        text = "\n".join(plain(dataset, look, at=range(7)))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "sequence 'a\\x1b[2J\\u202e'" in text
        assert "\\x1b[31mred↵\n⇥x\\u202eabc\u0301[bold]m[/bold] :smile:" in text


def test_joiners_stay_in_text_and_are_escaped_in_candidates(tmp_path):
    family = "\N{MAN}\u200d\N{WOMAN}"
    text = plain(written(tmp_path, [1, 0, 1], pieces={0: family.encode(), 1: "\u00a0a".encode()}), at=[0, 1])
    assert text[2] == f"\u00a0a{family}\u00a0a"
    assert f"position 1 after '\u00a0a{family}'" in text
    assert any("  '\\xa0a'" in line for line in text)
    assert "  token '\N{MAN}\\u200d\N{WOMAN}'" in "\n".join(text)


def test_a_right_to_left_candidate_leaves_the_order_of_its_line_alone(tmp_path):
    word = "\u05e9\u05dc\u05d5\u05dd"
    assert isolated("'a'") == "'a'"
    assert isolated(f"'{word}'") == f"\u200e'{word}'\u200e"
    rows = [line for line in plain(written(tmp_path, [3, 4]), at=[0]) if re.match(r"  \d ", line)]
    assert rows[0].startswith(f"  1  \u200e'{word}'\u200e")
    assert len({cell_len(line[: line.index("%")]) for line in rows}) == 1


def test_columns_are_even_whatever_the_width_of_the_letters(tmp_path):
    dataset = written(tmp_path, [3], k=8)
    for width in (40, 80, 120):
        rows = [
            line for line in plain(dataset, Look(width, blocks=True), at=[0], candidates=8) if re.match(r"  \d ", line)
        ]
        assert len({cell_len(line[: line.index("%")]) for line in rows}) == 1
        assert max(map(cell_len, rows)) <= max(width, 70)


def test_partial_characters_can_be_seen_where_there_are_shades(tmp_path):
    dataset = written(tmp_path, [3, 2, 3], pieces=PIECES | {2: b"\xf0\x9f"})
    assert plain(dataset, Look(80, blocks=True, ramp=RAMP))[3] == "\ufffd▯\U0001f600".replace("\ufffd", "\ufffd\ufffd")
    assert plain(dataset)[2] == "\ufffd\ufffd\U0001f600"


def test_tokens_without_width_can_be_seen(tmp_path):
    pieces = {
        0: b"e",
        1: "\u0301".encode(),
        2: "\u200b".encode(),
        3: "\u00ad".encode(),
        4: "\u200d".encode(),
        5: b"x\xe2",
    }
    dataset = written(tmp_path, [0, 1, 2, 3, 4, 0], k=6, pieces=pieces)
    assert plain(dataset, Look(blocks=True))[2] == f"e\u0301{PART * 3}e"
    assert plain(dataset)[2] == "e\u0301\u200b\u00ad\u200de"
    text = "\n".join(plain(dataset, at=[0]))
    for label in ("\u25cc\u0301", "\\u200b", "\\xad", "\\u200d"):
        assert f"'{label}'" in text


def test_marks_do_not_pile_up(tmp_path):
    dataset = written(tmp_path, [0, 1, 0], pieces={0: ("a" + "\u0301" * 300).encode(), 1: b"b"})
    for look in (Look(), Look(blocks=True, ramp=RAMP)):
        assert max(map(len, re.findall("\u0301+", "\n".join(plain(dataset, look, at=[0, 1]))))) == 8


def test_shades_follow_the_entropy(tmp_path):
    dataset = written(tmp_path, [0, 1, 0], entropy=[0.1, 9, 1.6])
    text = list(lines(chosen(dataset, at=[1]), Look(80, blocks=True, ramp=RAMP)))[3]
    assert [text.plain[span.start : span.end] for span in text.spans] == ["one", " two", "one"]
    shades = [span.style.bgcolor for span in text.spans]
    assert shades == [RAMP[0].bgcolor, RAMP[-1].bgcolor, RAMP[3].bgcolor]
    assert [span.style.underline for span in text.spans] == [None, True, None]
    assert [level(entropy) for entropy in (0, *SHADES, 99)] == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def luminance(color, theme):
    channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color.get_truecolor(theme)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


@pytest.mark.parametrize("theme", [DEFAULT_TERMINAL_THEME, MONOKAI], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ramp", "system"), [(RAMP, ColorSystem.TRUECOLOR), (RAMP, ColorSystem.EIGHT_BIT), (RAMP_16, ColorSystem.STANDARD)]
)
def test_shades_can_be_read_and_told_apart(ramp, system, theme):
    assert len(ramp) == len(SHADES) + 1
    assert len({style.bgcolor.downgrade(system) for style in ramp}) == len(ramp)
    for style in ramp:
        both = sorted(luminance(color.downgrade(system), theme) for color in (style.color, style.bgcolor))
        assert isinstance(style.bgcolor, Color)
        assert (both[1] + 0.05) / (both[0] + 0.05) > (4.5 if system is not ColorSystem.STANDARD else 3), style


def test_bars():
    assert [bar(share, 8, blocks=False) for share in (0, 0.001, 0.5, 1)] == ["", "#", "####", "########"]
    assert [bar(share, 2, blocks=True) for share in (0, 0.001, 0.25, 0.53, 1)] == ["", "▏", "▌", "█", "██"]


def test_texts_are_cut_by_cells():
    assert ending("今日の天気", 5) == "…天気"
    assert beginning("今日の天気", 5) == "今日…"
    assert ending("abc", 3) == beginning("abc", 3) == "abc"
    assert beginning("   a   b", 6) == "   a …"


def test_a_console_says_how_to_draw():
    def look(**settings):
        environment = settings.pop("environment", {})
        return look_of(Console(file=io.StringIO(), width=90, _environ=environment, legacy_windows=False, **settings))

    assert look() == Look()
    assert look(force_terminal=True, color_system="truecolor") == Look(90, blocks=True, ramp=RAMP)
    assert look(force_terminal=True, color_system="standard").ramp == RAMP_16
    assert look(force_terminal=True, color_system="256", environment={"NO_COLOR": "1"}) == Look(90, blocks=True)
    assert look(force_terminal=True, color_system=None) == Look(90, blocks=True)


# The command


def test_a_pipe_gets_plain_text(demo):
    out, err = run(demo, "--find", "favorite color is", "-k", 3)
    assert err == ""
    assert out == (
        "sequence '0' (row 0): 49 tokens\n"
        "\n"
        "<bos>My favorite color is yellow.↵\n"
        "↵\n"
        "I love the color yellow, it\u2019s the color of peace and love. I think that color is so beautiful. I love that color.↵\n"
        "↵\n"
        "I love the color yellow because it represents love. It\u2019s so beautiful\n"
        "\n"
        "position 0 after '<bos>My favorite color is'\n"
        "  a placeholder for the prompt: 64 candidates, entropy at least 3.21 nats\n"
        "  1  ' blue'           12.32 %  #######################################\n"
        "  2  ' red'             9.60 %  ##############################\n"
        "  3  ' the'             6.81 %  ######################\n"
        "  6  ' yellow'          4.98 %  <- next\n"
        "     everything else   66.47 %\n"
    )
    assert run(demo, "--find", "favorite color is", "-k", 3, COLUMNS="30")[0] == out


def test_json_says_everything(demo):
    content = json.loads(run(demo, "--row", -11, "--at", -1, "--at", 3, "--json")[0])
    assert (content["id"], content["row"], len(content["tokens"])) == ("1", 1, 49)
    assert set(content["tokens"][0]) == {"id", "text", "entropy", "entropy_from", "next_rank", "next_logprob"}
    assert content["tokens"][-1]["entropy"] is None
    assert [position["position"] for position in content["positions"]] == [3, 48]
    first = content["positions"][0]
    total = sum(candidate["probability"] for candidate in first["candidates"]) + first["everything_else"]
    assert total + (
        0 if any(c["is_next"] for c in first["candidates"]) else first["next"]["probability"]
    ) == pytest.approx(1, abs=0.01)
    assert content["positions"][1]["next"] is None
    assert json.loads(run(demo, "--id", "1", "--json")[0])["row"] == 1


def test_json_obeys_no_control_of_its_text(tmp_path):
    dataset = written(tmp_path, [0, 1], pieces={0: "\x1b[0m\x9b\u202e".encode(), 1: "é".encode()})
    out, _ = run(dataset.path, "--json")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert json.loads(out)["tokens"][0]["text"] == "\x1b[0m\x9b\u202e"
    assert "é" in out


def test_data_of_what_is_shown_is_finite(tmp_path):
    dataset = written(tmp_path, [0, 1, 2], entropy=[np.nan, np.nan, np.nan])
    assert "NaN" not in json.dumps(as_data(chosen(dataset)))


def test_errors_and_usage(demo):
    for arguments, says in (
        (["--find", "no such text"], "the text 'no such text' is not in the sequence '0'"),
        (["--at", 49], "there is no position 49: the sequence '0' has the positions 0 to 48"),
        (["--row", 12], "row 12"),
        (["--id", "nobody"], "no sequence has the id 'nobody'"),
    ):
        out, err = run(demo, *arguments, status=1)
        assert (out, err.count("\n")) == ("", 1)
        assert says in err
    for arguments in (["--row", 1, "--id", "1"], ["--find", ""], ["-k", 0], ["--at", "x"]):
        assert "Usage: logitstore show" in run(demo, *arguments, status=2)[1]
    assert "Example: logitstore show" in run("--help")[0]


def in_terminal(*arguments, **environment):
    """What the command writes to a terminal of 80 columns."""
    pty = pytest.importorskip("pty", reason="a terminal is made by the operating system")
    main, other = pty.openpty()
    command = [sys.executable, "-m", "logitstore_cli", "show", *map(str, arguments)]
    settings = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "COLORTERM"}
    }
    with subprocess.Popen(command, stdout=other, env=inherited | settings) as process:
        os.close(other)
        written = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            written += piece
    os.close(main)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_gets_shades_and_blocks_and_no_other_control(tmp_path):
    dataset = written(tmp_path, [5, 8, 9, 4, 7, 2, 3])
    text = in_terminal(dataset.path, "--at", 0)
    assert "48;5;" in text
    assert "█" in text
    assert "nats of uncertainty (at least)" in text
    assert "\x1b" not in PRINTED.sub("", text)
    assert max(cell_len(line) for line in PRINTED.sub("", text).splitlines()) <= 80
    assert "48;2;" in in_terminal(dataset.path, COLORTERM="truecolor")
    assert set(PRINTED.findall(in_terminal(dataset.path, NO_COLOR="1"))) <= {"\x1b[1m", "\x1b[0m"}
    assert "\x1b" not in in_terminal(dataset.path, TERM="dumb")


def test_a_pipe_of_any_encoding_and_with_forced_colours(demo):
    out, _ = run(demo, "--at", 0, PYTHONIOENCODING="ascii")
    assert out.isascii()
    assert "####" in out
    assert "48;5;" in run(demo, "--at", 0, FORCE_COLOR="1", TERM="xterm-256color")[0]


# The picture


def words(svg):
    """All that is written in a picture, and the lengths of its bars."""
    written = "".join(re.findall("<text[^>]*>([^<]*)</text>", svg))
    return " ".join(html.unescape(written).split()), re.findall(
        '<rect class="[^"]*" .* width="([^"]*)" height="19"/>', svg
    )


def test_the_picture_of_the_readme_is_what_the_command_shows(tmp_path):
    pictures = runpy.run_path(str(ROOT / "examples" / "pictures.py"))
    pictures["main"](tmp_path / "a")
    pictures["main"](tmp_path / "b")
    made = (tmp_path / "a" / "show.svg").read_text(encoding="utf-8")
    assert made == (tmp_path / "b" / "show.svg").read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:|//)[^\s\"]*", made) == ["http://www.w3.org/2000/svg"]
    assert "' yellow' 4.98 % <- next" in words(made)[0]
    assert words(made) == words((ROOT / "docs" / "show.svg").read_text(encoding="utf-8"))
