"""The rows of the paper's Tables 1, 2 and 3 (arXiv 2412.16339v2) with its figures, and by which suite, or figure of a
run, each is measured here. `tables.py` lays them out.
"""

from typing import NamedTuple

JUDGE = "judge not told"


class Line(NamedTuple):
    """One row. `suite` and `figures`: where a log has it, the first figure that is there. `arm`: where a run has it, a
    figure and the part it is of. `published`: whether the paper's prompts are public, so that a file may be them."""

    name: str
    suite: str
    figures: tuple[str, ...]
    arm: tuple[str, dict[str, str] | None] | None
    paper: tuple[str, ...]
    prompts: str
    published: bool = False
    judge: str = JUDGE


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


STYLE = "safe_completion_style"
TABLES = (
    Table(
        "Table 1: safety",
        ("GPT-4o", "o1-preview", "o1", "o3-mini"),
        (
            Line(
                "challenging refusal, not_unsafe",
                "challenging_refusal",
                ("not_unsafe",),
                ("not_unsafe", {"source": "disallowed"}),
                ("0.80", "0.934", "0.90", "0.94"),
                "not public",
            ),
            Line(
                "toxic conversations, not_unsafe",
                "toxic_conversations",
                ("not_unsafe",),
                None,
                ("0.98", "0.98", "0.99", "0.98"),
                "WildChat, toxic ones",
                True,
            ),
            Line(
                "hard-refusal style",
                "hard_refusal_style",
                ("hard_refusal_style",),
                ("hard_refusal_style", {"source": "disallowed"}),
                ("0.72", "0.69", "0.79", "0.78"),
                "not public",
            ),
            Line(
                "self-harm safe-completion style",
                "self_harm_style",
                (STYLE,),
                (STYLE, {"category": "self-harm"}),
                ("0.04", "0.01", "0.92", "0.87"),
                "not public",
            ),
            Line(
                "regulated-advice style",
                "regulated_advice_style",
                (STYLE,),
                (STYLE, {"category": "regulated advice"}),
                ("0.28", "0.04", "0.65", "0.35"),
                "not public",
            ),
            Line(
                "StrongREJECT",
                "strong_reject",
                ("goodness@0.1", "not_unsafe@0.1"),
                None,
                ("0.37", "0.66", "0.88", "0.75"),
                "goodness@0.1; StrongREJECT, 60 prompts × 35 jailbreaks",
                True,
                "its grader, and people",
            ),
            Line(
                "XSTest, not_overrefuse",
                "xstest",
                ("not_overrefuse",),
                None,
                ("0.88", "0.976", "0.93", "0.90"),
                "XSTest",
                True,
            ),
            Line(
                "transformation exception, not_overrefuse",
                "transformation",
                ("not_overrefuse",),
                ("not_overrefuse", {"source": "transformation"}),
                ("0.28", "0.72", "0.89", "0.89"),
                "not public",
            ),
            Line(
                "policy over-refusal, not_overrefuse",
                "policy_overrefusal",
                ("not_overrefuse",),
                ("not_overrefuse", {"source": "lookalike"}),
                ("0.69", "0.87", "0.84", "0.83"),
                "not public",
            ),
        ),
    ),
    Table(
        "Table 2: policy retrieval from the reasoning",
        ("without training", "with all of it"),
        tuple(
            Line(
                name,
                "policy_retrieval",
                (figure,),
                (figure, None),
                paper,
                "not public",
                judge="sentences of the reasoning that speak of policies",
            )
            for name, figure, paper in (
                ("hard refusal", "policy_retrieval_refuse", ("0.27", "0.75")),
                ("safe completion", "policy_retrieval_safe_complete", ("0.21", "0.91")),
                ("comply", "policy_retrieval_comply", ("0.09", "0.54")),
            )
        ),
    ),
    Table(
        "Table 3: out of distribution",
        ("without training", "trained on plain English"),
        (
            Line(
                "encodings, all resisted",
                "encodings",
                ("all_resisted",),
                None,
                ("0.65±0.06", "0.97±0.02"),
                "not public, 250 prompts",
            ),
            Line(
                "other languages, not_unsafe",
                "multilingual",
                ("not_unsafe",),
                None,
                ("0.44±0.01", "0.69±0.01"),
                "not public",
            ),
        ),
    ),
)
