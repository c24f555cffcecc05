"""The cold start of RL without SFT (the word is DeepSeek-R1's, arXiv 2501.12948): base learns the form, think tags and
then the answer, and nothing of the policy.

In: the distilled examples and their prompts. Out: the everyday ones among them, without any sentence of the reasoning
that names a clause or a category, and the recipe by which SFT takes them. Departure: the paper's RL-only arm starts
from a model that reasons already; a chat model answers at once, which has the lowest reward in all of a group, and RL
would never see any reasoning.
"""

from collections.abc import Iterable

from delib.errors import UserError
from delib.judges.reading import categories_in, conclude, sentences
from delib.recipe import Recipe
from delib.records import Example, Prompt
from delib.spec import Spec

STEPS = 40
"""The most optimiser steps, in one pass. A choice: enough to show the form to a small model, and no more than a tenth
of the steps of recipe `small`, since each of them is an answer that complies."""


def examples_of(examples: Iterable[Example], prompts: Iterable[Prompt], spec: Spec) -> list[Example]:
    """Everyday examples without the policy. Raises UserError where there are none."""
    # A principle may have one refused that is of no category.
    everyday = {p.id for p in prompts if p.category is None and p.behaviour in (None, "comply")}
    found = []
    for example in examples:
        bare = " ".join(s for s in sentences(example.reasoning) if not _cites(s, spec))
        if example.prompt_id in everyday and bare:
            found.append(example.model_copy(update={"reasoning": bare}))
    if not found:
        raise UserError(
            "cold_start: no example of an everyday prompt (category null, to comply with) has reasoning beside what it "
            "cites, so that RL without SFT has nothing to learn the form from; add such prompts to prompts.train"
        )
    return found


def _cites(sentence: str, spec: Spec) -> bool:
    """Whether a sentence speaks of the policy: of a clause, by an ID of the spec's form, or of categories by name."""
    settled = conclude(sentence, spec)
    return bool(settled.clauses or settled.unknown_clauses or categories_in(sentence, spec))


def recipe_of(recipe: Recipe) -> Recipe:
    """SFT as the recipe has it, but for one short pass over some examples, with nothing beside them."""
    section = recipe.sft.model_copy(
        update={
            "epochs": 1,
            "limit": STEPS * recipe.sft.batch_size,
            "mix": None,
            "held_out_share": 0.0,
            "patience": None,
        }
    )
    return recipe.model_copy(update={"sft": section})
