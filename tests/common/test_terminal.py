"""Control characters of users and models never reach the terminal."""

import unicodedata

import pytest

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser
from kd_common.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve – 日本語 👩‍💻 \u200fעברית", "plain, naïve – 日本語 👩‍💻 \u200fעברית"),
        ("a\tb\nc\r\nd", "a\tb\nc\r\nd"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b2J", r"\x9b2J"),  # the control sequence introducer in one character
        ("a\x00\x08\x7fb", r"a\x00\x08\x7fb"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_every_control_character_but_tab_and_line_end():
    controls = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cs")]
    assert [character for character in controls if printable(character) == character] == ["\t", "\n"]


def test_errors_show_what_a_user_gave_without_obeying_it(capsys):
    def refused():
        raise UserError("no such file: \x1b[2J\x1b[31mgone")

    with pytest.raises(SystemExit):
        run_command(refused)
    parser = CommandParser()
    parser.add_argument("--count", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", "\x1b[2Jx"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--\x1b[2Jcount", "3"])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert shown.count(r"\x1b[2J") == 3
