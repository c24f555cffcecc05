"""What a log is told of long work, where no bar can be drawn."""

import pytest
from rich.console import Console

from delib import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_a_line_a_minute_and_a_terminal_its_bar(monkeypatch, capsys, terminal):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=terminal, width=200))
    with progress.bar("filter", 60, done=10) as ticker:
        for _ in range(10):
            now[0] += 25
            ticker.step()
    told = [line for line in capsys.readouterr().err.splitlines() if "of 60" in line]
    assert told == (
        []
        if terminal
        else ["filter: 13 of 60", "filter: 16 of 60, about 18 min left", "filter: 19 of 60, about 17 min left"]
    )
