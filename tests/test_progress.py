"""What a log is told of long work, where no bar can be drawn."""

from types import SimpleNamespace

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


def test_how_the_work_stands_is_told_beside_it_and_slow_items_by_their_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=False, width=200))
    with progress.bar("sft", 20) as ticker:
        for step in range(4):
            now[0] += 40
            ticker.note(f"loss {2 - step / 10:.3f}")
            ticker.step()
    told = capsys.readouterr().err
    assert "sft, loss 1.900: 2 of 20, about 12 min left" in told
    rates = [str(progress._Rate().render(SimpleNamespace(speed=speed))) for speed in (None, 1 / 40, 3.0)]
    assert rates == ["", "40.0 s each", "3.0/s"]
