"""`delib prompts check`: is a file of prompts fit for training or evaluation, before anything is spent on it?

In: a file of prompts, a spec, and perhaps another file that must stay apart. Out: a table for people. What is wrong
in itself is an error with its place; what a person should weigh (a category without a benign side, clauses that no
prompt tests, form that gives the behaviour away) is a note.
"""

import io
from collections import Counter, defaultdict
from pathlib import Path

from delib.errors import UserError
from delib.records import Prompt
from delib.spec import Spec
from delib.stages.distill import shingles
from delib.stages.prompts import content_id, load
from delib.stats import balanced_accuracy

SHARED_WORDS = 8
"""A run of this many words in a prompt of either file is a copy. Field practice for decontamination is 8 to 13."""
COSINE = 0.6
"""TF-IDF cosine at which two prompts count as one in other words; a choice."""
WORD = r"\w+"
"""What counts as a word: single letters and digits too, so that prompts of nothing else have some."""
FORM = 0.85
"""Balanced accuracy of a bag of words at which form gives the behaviour away; a choice."""


def text_of(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.messages)


def overlaps(prompts: list[Prompt], others: list[Prompt]) -> list[tuple[str, str, str]]:
    """Pairs of ids that are too near, each with the cause: a shared run of words, or the TF-IDF cosine."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    runs = {run: p.id for p in reversed(others) for run in shingles(text_of(p), SHARED_WORDS)}
    found = {}
    for prompt in prompts:
        shared = next((run for run in sorted(shingles(text_of(prompt), SHARED_WORDS)) if run in runs), None)
        if shared is not None:
            found[prompt.id, runs[shared]] = f"both hold {' '.join(shared)!r}"
    words = TfidfVectorizer(token_pattern=WORD).fit([text_of(p) for p in prompts + others])
    near = (words.transform(map(text_of, prompts)) @ words.transform(map(text_of, others)).T).toarray()
    for prompt, row in zip(prompts, near, strict=True):
        if row.max() >= COSINE:
            found.setdefault((prompt.id, others[int(row.argmax())].id), f"TF-IDF cosine {row.max():.2f}")
    return [(first, second, cause) for (first, second), cause in found.items()]


def form_baseline(train: list[Prompt], heldout: list[Prompt], spec: Spec) -> float | None:
    """Balanced accuracy of TF-IDF with logistic regression, fitted on `train`, on refuse against comply of `heldout`,
    everyday prompts left out. None where either file lacks a side."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fit, held = _sides(train, spec), _sides(heldout, spec)
    if len({side for _, side in fit}) < 2 or len({side for _, side in held}) < 2:
        return None
    words = TfidfVectorizer(token_pattern=WORD)
    model = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit([text for text, _ in fit], [side for _, side in fit])
    return balanced_accuracy([side for _, side in held], list(model.predict([text for text, _ in held])))


def _sides(prompts: list[Prompt], spec: Spec) -> list[tuple[str, bool]]:
    """Text, and whether it is to be refused, of the prompts with a category that are to be refused or complied with."""
    found = [(text_of(p), spec.required(p.clause, p.behaviour)) for p in prompts if p.category is not None]
    return [(text, behaviour == "refuse") for text, behaviour in found if behaviour in ("refuse", "comply")]


def check(file: Path, spec: Spec, against: Path | None) -> str:
    """The table and notes for people. Raises UserError with every problem: those of `load`, the same conversation
    twice, and prompts too near to one of `against`."""
    problems: list[str] = []
    prompts, others = (_load(path, spec, problems) if path else [] for path in (file, against))
    if problems:
        raise UserError(problems)
    seen: dict[str, str] = {}
    for prompt in prompts:
        content = content_id(prompt)
        if content in seen:
            problems.append(f"{file}: {prompt.id} is the same conversation as {seen[content]}; remove one of them")
        seen.setdefault(content, prompt.id)
    if others:
        problems += [
            f"{file}: {mine} is too near to {theirs} of {against} ({cause}); reword or remove one of them"
            for mine, theirs, cause in overlaps(prompts, others)
        ]
    if problems:
        raise UserError(problems)
    return _table(prompts, spec) + "".join(f"note: {note}\n" for note in _notes(prompts, others, spec, against))


def _load(path: Path, spec: Spec, problems: list[str]) -> list[Prompt]:
    try:
        return load(path, spec, "train")
    except UserError as error:
        problems.extend(error.problems)
        return []


def _table(prompts: list[Prompt], spec: Spec) -> str:
    from rich.console import Console
    from rich.table import Table

    counts = Counter((p.category, spec.required(p.clause, p.behaviour)) for p in prompts)
    table = Table("category", "comply", "refuse", "safe_complete", "no behaviour")
    for category in [*(c.name for c in spec.categories), None]:
        row = [counts[category, b] for b in ("comply", "refuse", "safe_complete", None)]
        if any(row):
            table.add_row(category or "none (everyday)", *(str(n or "") for n in row))
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue() + f"{len(prompts)} prompts\n"


def _notes(prompts: list[Prompt], others: list[Prompt], spec: Spec, against: Path | None) -> list[str]:
    notes = []
    asked: dict[str | None, set[str | None]] = defaultdict(set)
    for prompt in prompts:
        asked[prompt.category].add(spec.required(prompt.clause, prompt.behaviour))
    for category in spec.categories:
        if "refuse" in asked[category.name] and "comply" not in asked[category.name]:
            notes.append(
                f"{category.name}: nothing to comply with; without look-alikes a model learns to refuse it all"
            )
    used = {p.clause for p in prompts}
    unused = [i for i, clause in spec.clauses.items() if i not in used and clause.category is not None]
    if unused:
        notes.append(f"no prompt is decided by {', '.join(unused)}")
    unlabelled = sum(spec.required(p.clause, p.behaviour) is None for p in prompts)
    if unlabelled:
        notes.append(f"{unlabelled} prompts name neither clause nor behaviour; the compact judge can't grade those")
    score = form_baseline(prompts, others, spec) if others else None
    if score is not None:
        verdict = "form gives the behaviour away; vary it" if score > FORM else f"at most {FORM} is fine"
        notes.append(
            f"a bag of words fitted here tells refuse from comply in {against} with {score:.2f} balanced accuracy; "
            + verdict
        )
    return notes
