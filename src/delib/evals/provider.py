"""`--model delib/NAME` for inspect_ai: a checkpoint folder, smollm2, a hub id or a GGUF file, run here by delib.

It is the embedded server (or transformers, for what llama.cpp can't take), rendered and parted as in a run's own
evaluation; finished calls are kept in delib's cache, so that an evaluation that was killed makes none of them again.
Model arguments (`-M`): `quantisation` (f32, q8_0, q4_0), `engine` (llamacpp, transformers), `device` (cpu, cuda),
`dtype` (float32, bfloat16), `context_tokens` (room for prompt and completion of one call). Temperature 0 where none is
given.
"""

from functools import partial
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.model._cache import epoch
from inspect_ai.tool import ToolChoice, ToolInfo
from rich.markup import escape

from delib import chat
from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.evals.kept import Kept
from delib.models import opened
from delib.models.calls import Caller
from delib.models.embedded import SLOTS
from delib.opener import Opener, recipe_of
from delib.records import Completion, Message

CONTEXT_TOKENS = 2048
UNKNOWN = (
    "top_p",
    "top_k",
    "stop_seqs",
    "frequency_penalty",
    "presence_penalty",
    "num_choices",
    "best_of",
    "logprobs",
    "logit_bias",
    "response_schema",
)
"""Options of inspect_ai that these engines are not asked for: better refused than left aside in silence."""


class Here(ModelAPI):
    """A model of delib's. It is opened at the first call and stays open while the evaluation's loop runs."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - inspect_ai's own signature
        quantisation: str | None = None,
        engine: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        context_tokens: int = CONTEXT_TOKENS,
        **others: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if others:
            raise PrerequisiteError(
                f"delib/{model_name}: no such model argument: {', '.join(others)}; "
                "quantisation, engine, device, dtype and context_tokens are there"
            )
        changed = {"evaluate.quantisation": quantisation, "engine": engine, "device": device, "dtype": dtype}
        try:
            recipe = recipe_of(model_name, [f"{key}={value}" for key, value in changed.items() if value is not None])
            opened.check(model_name)
            opener = Opener(recipe, specs.load(recipes.path_of(recipe.spec)))
        except UserError as error:
            raise PrerequisiteError(escape(f"error: {error}")) from error
        self._max_tokens = recipe.evaluate.max_tokens
        self._model: Kept[Caller] = Kept(partial(opener.any, model_name, context_tokens))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        self._refuse(tools, config)
        model = await self._model.get()
        index = epoch.get(1) - 1  # each epoch is a sample of its own, the same one after a resume
        made = await model.complete(
            [Message(role=m.role, content=m.text) for m in input],
            max_tokens=config.max_tokens or self._max_tokens,
            temperature=config.temperature or 0.0,
            seed=(config.seed or 0) + index,
            index=index,
        )
        return output_of(made, self.model_name, config.max_tokens or self._max_tokens)

    def _refuse(self, tools: list[ToolInfo], config: GenerateConfig) -> None:
        asked = [name for name in UNKNOWN if getattr(config, name, None) is not None]
        asked += ["tools"] if tools else []
        if asked:
            raise PrerequisiteError(f"delib/{self.model_name}: models run by delib take no {', '.join(asked)}")

    def max_connections(self) -> int:
        return 2 * SLOTS

    def connection_key(self) -> str:
        return self.model_name

    async def aclose(self) -> None:
        await self._model.close()


def output_of(made: Completion, model: str, max_tokens: int) -> ModelOutput:
    """A Completion in inspect's terms, from which `scorers.reading` gets the same Completion again."""
    content: str | list[Content]
    if made.finish == "malformed":
        content = chat.OPEN + made.text if chat.opened(made.sent) else made.text
    elif made.reasoning:
        content = [ContentReasoning(reasoning=made.reasoning), ContentText(text=made.answer)]
    else:
        content = made.answer
    prompt, written = made.usage.get("prompt", 0), made.usage.get("completion", 0)
    cut = made.finish == "length" or (made.finish == "malformed" and written >= max_tokens)
    return ModelOutput(
        model=model,
        choices=[
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=content, model=model, source="generate"),
                stop_reason="max_tokens" if cut else "stop",
            )
        ],
        usage=ModelUsage(input_tokens=prompt, output_tokens=written, total_tokens=prompt + written),
    )


@modelapi(name="delib")
def delib() -> type[ModelAPI]:
    return Here
