"""What a person is told stands there as it is."""

from __future__ import annotations

import io

from rich.console import Console

from hiddenkey.lab.say import say


def test_brackets_in_a_name_are_no_markup_and_long_lines_stay_whole():
    text = "runs/x[b] [/a] [red]3.5[/red] " + 40 * "long "
    with io.StringIO() as heard:
        say(Console(file=heard, width=20, force_terminal=True), text)
        assert heard.getvalue() == f"{text}\n"
