"""The suites, as inspect_ai tasks: `inspect eval delib/xstest --model …`, or `delib eval --suite xstest --model …`.

Each takes `data`, a file in the published layout or `hub:OWNER/NAME`; without it the shipped set is used, and then the
task is called NAME_shipped and so are its figures, since they are about other prompts than the published ones.
Generation is greedy. All of them take `solver`, an attack that stands before the call to the model. Suites that need no
judge are in capability.py.
"""

from collections.abc import Callable
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Scorer

from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.evals import loaders
from delib.evals.building import MAX_TOKENS, Attack, Attacks, build, told
from delib.evals.robust import AT_WORST
from delib.evals.scorers import policy_scorer, refusal_scorer, strong_reject_rubric
from delib.models import opened
from delib.opener import FITTED
from delib.records import Prompt
from delib.spec import Spec
from delib.stats import RESAMPLES

SPEC = "starter:spec.md"
SHIFTED_RESAMPLES = 10_000
"""Bootstrap resamples out of distribution, as in the paper."""
Load = Callable[[Spec], list[Sample]]


def _judged(
    name: str,
    data: str | None,
    load: Load,
    headline: str,
    judge: str,
    second_judge: str | None,
    spec: str,
    max_tokens: int,
    solver: Attack,
    *,
    refusals: bool = False,
    grader: str | None = None,
    attacks: Attacks = None,
    resamples: int = RESAMPLES,
) -> Task:
    """A suite that a judge grades. `refusals`: refusal is told in three ways too. `grader`: reads StrongREJECT's
    rubric."""
    with told():
        policy = specs.load(recipes.path_of(spec))
        _check_models(judge=judge, second_judge=second_judge, grader=grader)

    def scorers() -> list[Scorer]:
        found = [policy_scorer(spec, judge, second_judge)]
        found += [refusal_scorer(spec, judge, grader)] if refusals else []
        return found + ([strong_reject_rubric(spec, grader)] if grader else [])

    def labelled() -> list[Sample]:
        found = load(policy)
        bare = sum(p.get("behaviour") is None and p.get("clause") is None for s in found for p in [_prompt(s)])
        fitted = [j for j in (judge, second_judge) if j in FITTED]
        if bare and fitted:
            raise UserError(
                f"{name}: nobody has labelled {bare} of these prompts, and the {fitted[0]} judge grades labelled ones "
                "alone; name a model as judge, such as -T judge=openai-api/SERVICE/MODEL"
            )
        return found

    about = {"spec": spec, "spec_hash": policy.hash, "judge": judge, "second_judge": second_judge, "grader": grader}
    return build(
        name,
        data,
        labelled,
        scorers,
        headline,
        max_tokens,
        solver,
        attacks=attacks,
        resamples=resamples,
        shipped=data is None,
        about=about,
    )


def _prompt(sample: Sample) -> dict[str, Any]:
    return dict((sample.metadata or {})["prompt"])


def _check_models(**names: str | None) -> None:
    problems = []
    for option, name in names.items():
        if name is None or (name in FITTED and option != "grader"):
            continue
        try:
            opened.check(name)
        except UserError as error:
            known = "" if option == "grader" else f"; {' and '.join(FITTED)} are there, or name a model"
            problems += [f"{option}={name}: {problem}{known}" for problem in error.problems]
    if problems:
        raise UserError(problems)


def _kept(keep: Callable[[Prompt], bool], file: str = "heldout.jsonl") -> Load:
    return lambda spec: loaders.starter(keep, spec, file)


def _disallowed(prompt: Prompt) -> bool:
    return prompt.source == "disallowed"


@task
def challenging_refusal(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Requests to refuse: not_unsafe. `data`: a column of requests (HarmBench, AdvBench, JailbreakBench)."""
    load: Load = (lambda s: loaders.requests(data, "refuse", s)) if data else _kept(_disallowed)
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("challenging_refusal", data, load, "not_unsafe", *options, refusals=True)


@task
def toxic_conversations(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Whole conversations that turn toxic: not_unsafe. `data`: WildChat's columns; nobody has labelled these, so the
    judge must be a model."""
    load: Load = (lambda s: loaders.wildchat(data)) if data else _kept(lambda p: True, "evals/toxic.jsonl")
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("toxic_conversations", data, load, "not_unsafe", *options)


@task
def hard_refusal_style(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Requests to refuse: whether the refusal has the spec's style. `data`: as for challenging_refusal."""
    load: Load = (lambda s: loaders.requests(data, "refuse", s)) if data else _kept(_disallowed)
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("hard_refusal_style", data, load, "hard_refusal_style", *options)


@task
def self_harm_style(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """People at risk: whether the safe completion has the spec's style. `data`: delib's own layout."""
    load = _own_or(data, lambda p: p.behaviour == "safe_complete" and p.category == "self-harm")
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("self_harm_style", data, load, "safe_completion_style", *options)


@task
def regulated_advice_style(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Personal medical, legal and financial questions: the safe completion's style. `data`: delib's own layout."""
    load = _own_or(data, lambda p: p.behaviour == "safe_complete" and p.category == "regulated advice")
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("regulated_advice_style", data, load, "safe_completion_style", *options)


def _own_or(data: str | None, keep: Callable[[Prompt], bool], file: str = "heldout.jsonl") -> Load:
    return (lambda spec: loaders.own(data, spec)) if data else _kept(keep, file)


@task
def strong_reject(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    grader: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
    attacks: Attacks = None,
) -> Task:
    """Forbidden requests, plain, under an attack (`solver`), or each under many (`attacks`: all, or names): not_unsafe,
    refusal in three ways, and with a `grader` (a model; without one the judge, if it is a model) StrongREJECT's rubric;
    under many attacks goodness@0.1 and all_resisted, by prompt. `data`: StrongREJECT's columns."""
    load: Load = (lambda s: loaders.strong_reject(data)) if data else _kept(_disallowed)
    grader = grader or (None if judge in FITTED else judge)
    options = (judge, second_judge, spec, max_tokens, solver)
    headline = ("goodness" if grader else "not_unsafe") + (AT_WORST if attacks else "")
    return _judged("strong_reject", data, load, headline, *options, refusals=True, grader=grader, attacks=attacks)


@task
def encodings(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
    attacks: Attacks = "encodings",
) -> Task:
    """Requests to refuse in each of many encodings: all_resisted, a prompt counting only if every one is resisted. Out
    of distribution. `data`: as for challenging_refusal. `attacks`: fewer of them, or other ones."""
    load: Load = (lambda s: loaders.requests(data, "refuse", s)) if data else _kept(_disallowed)
    options = (judge, second_judge, spec, max_tokens, solver)
    many = attacks or "encodings"
    return _judged("encodings", data, load, "all_resisted", *options, attacks=many, resamples=SHIFTED_RESAMPLES)


@task
def xstest(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    grader: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Benign prompts that look dangerous and dangerous ones that look like them: not_overrefuse, not_unsafe, refusal in
    three ways. `data`: XSTest's columns."""
    load: Load = (
        (lambda s: loaders.xstest(data)) if data else _kept(lambda p: p.source == "paraphrase", "shifted.jsonl")
    )
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("xstest", data, load, "not_overrefuse", *options, refusals=True, grader=grader)


@task
def policy_overrefusal(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Benign prompts near each category of the policy: not_overrefuse. `data`: a column of requests to comply with."""
    load: Load = (lambda s: loaders.requests(data, "comply", s)) if data else _kept(lambda p: p.source == "lookalike")
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("policy_overrefusal", data, load, "not_overrefuse", *options)


@task
def transformation(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """The user's own text to translate, sort or shorten: not_overrefuse. `data`: a column of requests."""
    load: Load = (lambda s: loaders.requests(data, "comply", s)) if data else _transformations
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("transformation", data, load, "not_overrefuse", *options)


def _transformations(spec: Spec) -> list[Sample]:
    return loaders.starter(lambda p: p.source == "transformation", spec, "heldout.jsonl", "evals/transformation.jsonl")


@task
def policy_retrieval(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Whether the reasoning names the category, and the clause, that decide; by behaviour. `data`: delib's own
    layout."""
    load = _own_or(data, lambda p: p.category is not None)
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("policy_retrieval", data, load, "policy_retrieval_refuse", *options)


@task
def multilingual(
    data: str | None = None,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Requests to refuse and their benign twins in other languages: out of distribution. `data`: delib's own layout."""
    load = _own_or(data, lambda p: p.source == "language", "shifted.jsonl")
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("multilingual", data, load, "not_unsafe", *options, resamples=SHIFTED_RESAMPLES)


@task
def policy(
    prompts: str,
    judge: str = "compact",
    second_judge: str | None = None,
    spec: str = SPEC,
    max_tokens: int = MAX_TOKENS,
    solver: Attack = None,
) -> Task:
    """Any prompts in delib's own layout against any spec: all figures that they are about."""
    options = (judge, second_judge, spec, max_tokens, solver)
    return _judged("policy", prompts, lambda s: loaders.own(prompts, s), "not_unsafe", *options)
