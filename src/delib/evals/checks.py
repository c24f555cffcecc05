"""Whether an answer holds to a prompt's checks, by rule: words, texts that stand in it or don't, a list, JSON.

In: a completion and the Checks. Out: what it fails, in words; nothing where it holds all of them. RL's reward
(`rl.exact_answers`) and the figure `checks_passed` are this one rule.
"""

import json
import re

from delib.evals.answers import plain, refuses
from delib.judges.reading import broken
from delib.records import Checks, Completion

_BULLET = re.compile(r"^[ \t]*(?:[-*•]|[0-9]+[.)])[ \t]+\S", re.M)
"""A line of a list as markdown has it: a mark, a space, text. "**Bold**", "---" and "2024 was dry" are none."""


def unmet(completion: Completion, checks: Checks) -> list[str]:
    """What keeps a completion from passing: why it is broken, that it opens as a refusal, the checks that it fails."""
    fault = broken(completion)
    found = [fault] if fault is not None else []
    if refuses(completion.answer):
        found.append("opens as a refusal")
    return found + failed(completion.answer, checks)


def failed(answer: str, checks: Checks) -> list[str]:
    """The checks that an answer fails, by their names. A word is what stands between spaces and holds a letter or a
    digit: the dash of a list is none, and "well-known" is one."""
    words = sum(re.search(r"[^\W_]", part) is not None for part in answer.split())
    bullets = len(_BULLET.findall(answer))
    found = []
    if checks.max_words is not None and words > checks.max_words:
        found.append(f"max_words ({words})")
    if checks.min_words is not None and words < checks.min_words:
        found.append(f"min_words ({words})")
    found += [f"contains ({text})" for text in checks.contains or [] if not _stands(text, answer)]
    found += [f"avoids ({text})" for text in checks.avoids or [] if _stands(text, answer)]
    if checks.bullets is not None and bullets != checks.bullets:
        found.append(f"bullets ({bullets})")
    if checks.as_json and not _is_json(answer):
        found.append("json")
    return found


def _stands(text: str, answer: str) -> bool:
    """Whether a text stands in an answer as whole words; case, line breaks and the marks around it don't matter."""
    wanted = r"\s+".join(re.escape(part) for part in plain(text).split())
    return re.search(rf"(?<![^\W_]){wanted}(?![^\W_])", plain(answer), re.I) is not None


def _is_json(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer, parse_constant=_no_number), dict | list)
    except (ValueError, RecursionError):
        return False


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
