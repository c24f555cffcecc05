"""The errors a person can act on.

`UserError` is a person's mistake: it holds every problem found, each naming the place and the mend, and is raised
before any compute (exit 2). `StageError` is a stage that could not go on, with its first causes (exit 1).
Everything else is a bug of ours and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input. `problems` lists all of them, one line each: place, what is wrong, the mend."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StageError(Exception):
    """A stage stopped: too many samples failed, or the machine failed it (a full disk). Finished work stands."""
