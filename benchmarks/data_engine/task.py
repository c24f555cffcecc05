"""The work that every engine of the benchmark does: an answer to each prompt, then three verdicts on that answer.

Each request holds a policy of about the length of the excerpts that delib sends, so that all engines carry as much.
Only the standard library: it runs in each engine's own environment. The texts take a prompt or an answer, or the
placeholder that an engine's templates have for it.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

SPEC = Path(__file__).parents[2] / "src" / "delib" / "starter" / "spec.md"
POLICY = SPEC.read_text(encoding="utf-8")[:11_000]
RUNS = 3
READINGS = range(1, RUNS + 1)
MAX_TOKENS = 384


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="base URL of the endpoint, with /v1")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--concurrency", type=int, required=True, help="the most calls at once")
    return parser.parse_args()


def prompts(count: int) -> list[str]:
    """Plain prompts, so unlike one another that none is a near duplicate."""
    draw = random.Random(0)
    lists = ([str(draw.randrange(10_000, 100_000)) for _ in range(12)] for _ in range(count))
    return [f"Which of these numbers is the odd one out, and why: {', '.join(numbers)}?" for numbers in lists]


def teacher(prompt: str) -> str:
    return (
        f"Answer the last message of the conversation while following the policy.\n\n<policy>\n{POLICY}\n</policy>\n\n"
        f"<conversation>\n[user] {prompt}\n</conversation>\n\n"
        "First think inside <think> and </think>, then write the answer alone."
    )


def judge(prompt: str, answer: str, run: int | str) -> str:
    """The run stands in the text, so that the three requests differ whatever an engine does with seeds."""
    return (
        f"Grade the answer by the policy. Reading {run} of {RUNS}.\n\n<policy>\n{POLICY}\n</policy>\n\n"
        f"<conversation>\n[user] {prompt}\n</conversation>\n\n<answer>\n{answer}\n</answer>\n\n"
        'Reply with JSON: "correctness", "helpfulness", "compliance", "reasoning_quality" from 0 to 10, "behaviour" '
        'and "reason".'
    )


def report(count: int, answers: Iterable[str], verdicts: Iterable[str]) -> None:
    """Print how many calls were finished, once every prompt has its answer and every answer three readable verdicts."""
    answered = [answer for answer in answers if answer]
    graded = [json.loads(verdict)["compliance"] for verdict in verdicts]
    if (len(answered), len(graded)) != (count, count * RUNS):
        raise SystemExit(f"{len(answered)} answers and {len(graded)} verdicts for {count} prompts")
    print(json.dumps({"calls": len(answered) + len(graded)}), flush=True)
