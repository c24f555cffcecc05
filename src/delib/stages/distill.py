"""Stage 4, distill: the spec is taken out; what is left is what the model learns to write by itself.

In: filtered Samples. Out: Examples (prompt without the spec → reasoning + answer), everyday prompts mixed in up to a
share, in turn from each behaviour. Fails when text of the spec stands in an example's messages; drops reasoning that
points at text that is gone ("the policy above").
"""

import itertools
import random
import re
from collections.abc import Iterable

from delib.errors import StageError
from delib.judges.reading import points_at_gone_text
from delib.records import Example, Manifest, Sample
from delib.run import StageFolder
from delib.spec import Spec

LEAK_WORDS = 12
"""Spec text of this many words in a row in an example's messages is a leak; shorter runs are common speech."""


def shingles(text: str, size: int = LEAK_WORDS) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def leaks(examples: list[Example], spec: Spec) -> list[str]:
    """The prompt ids of examples whose messages hold text of the spec."""
    policy = shingles(spec.text)
    return [e.prompt_id for e in examples if any(shingles(m.content) & policy for m in e.messages)]


def run(samples: Iterable[Sample], spec: Spec, folder: StageFolder, *, plain_share: float, seed: int) -> Manifest:
    """Write the Examples. Of the samples only those that were kept are held."""
    seen = 0
    kept: list[Sample] = []
    for sample in samples:
        seen += 1
        if sample.kept and sample.completion is not None:
            # What was sent and what the judge said are long, and of no use here.
            bare = sample.completion.model_copy(update={"sent": ""})
            kept.append(sample.model_copy(update={"completion": bare, "verdicts": []}))
    sound = [s for s in kept if not points_at_gone_text(s.completion.reasoning or "")]  # type: ignore[union-attr]
    plain = [s for s in sound if s.prompt.category is None]
    policy = [s for s in sound if s.prompt.category is not None]
    order = random.Random(seed)
    order.shuffle(plain)
    order.shuffle(policy)
    if policy:
        plain = plain[: round(len(policy) * plain_share / (1 - plain_share))]
    chosen = _in_turn(policy + plain)
    examples = [
        Example(prompt_id=s.prompt.id, messages=s.prompt.messages, reasoning=c.reasoning, answer=c.answer)
        for s in chosen
        if (c := s.completion) is not None and c.reasoning is not None
    ]
    if not examples:
        raise StageError("distill: no sample was kept, so there is nothing to train on; look at filter's drop reasons")
    leaked = leaks(examples, spec)
    if leaked:
        raise StageError(f"distill: text of the spec stands in the messages of {', '.join(leaked[:5])}; it must not")
    folder.replace(examples)
    counts = {
        "in": seen,
        "out": len(examples),
        "dropped": len(kept) - len(examples),
        "gone_text": len(kept) - len(sound),
        "plain": sum(s.prompt.category is None for s in chosen),
    }
    return Manifest(stage="distill", recipe="", inputs={}, outputs={}, counts=counts)


def _in_turn(samples: list[Sample]) -> list[Sample]:
    """One in turn from each behaviour, everyday prompts apart, so that the first n hold as much refusing as helping on
    the policy's own subjects while there is enough of each; the shortest completions, which cost the least, first."""
    piles: dict[tuple[str, bool], list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: len(s.completion.text) if s.completion else 0):
        piles.setdefault((str(sample.prompt.behaviour), sample.prompt.category is None), []).append(sample)
    return [sample for turn in itertools.zip_longest(*piles.values()) for sample in turn if sample is not None]
