"""An evaluation that was broken off, by a kill or by too many failed calls: the log to go on from.

In: the task that is asked for again, and the folder of logs. Out: the log, and how many of its samples stand.
"""

import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def find(log_dir: Path, task: Any, model: str, options: dict[str, Any], limit: int | None) -> tuple[Path, int] | None:
    """The log of the last try at this very evaluation, where it was not finished, and how many samples are.

    The same: task, model, options, limit and all that the task tells of itself, so the contents of data and spec too.
    Samples that a killed process had finished and not yet written to its log are put there first.
    """
    from inspect_ai.log import RecoveryNotAvailable, read_eval_log_sample_summaries, recover_eval_log

    found = _last(log_dir, (task.name, model, options, limit, task.metadata))
    if found is None or found[1] == "success":
        return None
    file = found[0]
    with suppress(RecoveryNotAvailable), TemporaryDirectory(dir=log_dir) as apart:  # beside no log that can't be read
        whole = Path(apart) / file.name
        recover_eval_log(str(file), output=str(whole), cleanup=False)
        whole.replace(file)
    done = sum(one.completed and one.error is None for one in read_eval_log_sample_summaries(file))
    return (file, done) if done else None


def _last(log_dir: Path, same: tuple[Any, ...]) -> tuple[Path, str] | None:
    from inspect_ai.log import read_eval_log

    for file in sorted(log_dir.glob("*.eval"), key=lambda file: file.stat().st_mtime_ns, reverse=True):
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # a torn log is none to go on from
            log = read_eval_log(file, header_only=True)
            told = log.eval
            if (told.task, told.model, told.task_args_passed, told.config.limit, told.metadata) == same:
                return file, log.status
    return None
