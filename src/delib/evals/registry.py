"""What inspect_ai finds of delib: the module that the entry point names. Importing it registers the suites, the
attacks, the scorers and the `delib` provider, and loads neither torch nor scikit-learn.
"""

from collections.abc import Callable

from inspect_ai import Task

from delib.evals.building import attacked
from delib.evals.capability import bbq, gsm8k, ifeval, mmlu, short_facts
from delib.evals.provider import delib
from delib.evals.scorers import by_prompt, figures, policy_scorer, refusal_scorer, strong_reject_rubric
from delib.evals.solvers import encoding, jailbreak, many_shot, multi_turn, prefix_injection, role_play
from delib.evals.suites import (
    challenging_refusal,
    encodings,
    hard_refusal_style,
    multilingual,
    policy,
    policy_overrefusal,
    policy_retrieval,
    regulated_advice_style,
    self_harm_style,
    strong_reject,
    toxic_conversations,
    transformation,
    xstest,
)

SUITES: dict[str, Callable[..., Task]] = {
    "challenging_refusal": challenging_refusal,
    "toxic_conversations": toxic_conversations,
    "hard_refusal_style": hard_refusal_style,
    "self_harm_style": self_harm_style,
    "regulated_advice_style": regulated_advice_style,
    "strong_reject": strong_reject,
    "encodings": encodings,
    "xstest": xstest,
    "policy_overrefusal": policy_overrefusal,
    "transformation": transformation,
    "policy_retrieval": policy_retrieval,
    "multilingual": multilingual,
    "bbq": bbq,
    "short_facts": short_facts,
    "gsm8k": gsm8k,
    "mmlu": mmlu,
    "ifeval": ifeval,
    "policy": policy,
}
ATTACKS = (attacked, encoding, jailbreak, many_shot, multi_turn, prefix_injection, role_play)
SCORERS = (policy_scorer, refusal_scorer, strong_reject_rubric)
__all__ = ["ATTACKS", "SCORERS", "SUITES", "by_prompt", "delib", "figures"]
