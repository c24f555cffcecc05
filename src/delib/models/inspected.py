"""Any model that inspect_ai knows, by its name there (`anthropic/…`, `openai/…`, `google/…`, `hf/…`, `mockllm/…`).

Breadth comes from there: providers, their keys and their ways of telling reasoning. Limits, retries and the cache are
delib's own, so that all models share one set of them; inspect_ai's retries are off. A provider's client may try a
call once or twice more by itself before it tells that it failed (OpenAI's and Anthropic's do).
"""

from typing import Any

from pydantic_core import to_json

from delib.errors import StageError, UserError
from delib.models.calls import CallError, PassingError, RefusedError, Reply
from delib.records import Message


class Inspected:
    """One inspect_ai model."""

    def __init__(self, name: str, *, seconds: float) -> None:
        from inspect_ai._util.error import PrerequisiteError
        from inspect_ai.model import get_model

        self._seconds = seconds
        try:
            self._model: Any = get_model(name, memoize=False)
        except (PrerequisiteError, ValueError, ImportError) as error:
            raise UserError(f"{name}: inspect_ai can't open it ({_short(error)})") from error
        self.name, self.identity = name, f"inspect {name} {self._model.api.base_url or ''}"

    def sent(self, messages: list[Message]) -> str:
        return to_json([{"role": m.role, "content": m.content} for m in messages]).decode()

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        from inspect_ai.log._transcript import Transcript, init_transcript
        from inspect_ai.model import (
            ChatMessageAssistant,
            ChatMessageSystem,
            ChatMessageTool,
            ChatMessageUser,
            GenerateConfig,
        )

        kinds: dict[str, Any] = {
            "system": ChatMessageSystem,
            "user": ChatMessageUser,
            "assistant": ChatMessageAssistant,
            "tool": ChatMessageTool,
        }
        config = GenerateConfig(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            max_retries=0,
            attempt_timeout=round(self._seconds),
            adaptive_connections=False,
            max_connections=10_000,
        )
        # Outside an evaluation inspect_ai keeps every call in its transcript, which would grow with them.
        init_transcript(Transcript())
        turns = [kinds[m.role](content=m.content) for m in messages]
        try:
            output = await self._model.generate(turns, config=config)
        except Exception as error:  # each provider's library raises kinds of its own
            raise self._told(error) from error
        return _reply(output, self.name)

    def _told(self, error: Exception) -> Exception:
        """A provider's error as delib's. Whether it may pass is for the provider's own code to say."""
        from inspect_ai._util.error import PrerequisiteError
        from inspect_ai.model._model import AttemptTimeoutError

        cause = getattr(error, "last_attempt", None)
        if cause is not None and cause.exception() is not None:
            error = cause.exception()
        status = getattr(error, "status_code", None) or getattr(error, "status", None)
        if isinstance(error, PrerequisiteError) or status in (401, 402) or "insufficient_quota" in str(error):
            return StageError(f"{self.name}: {_short(error)}; mend it and run the same command again")
        if status in (403, 404):
            return RefusedError(_short(error))
        decision = self._model.api.should_retry(error)
        if decision or isinstance(error, AttemptTimeoutError):
            full = status == 429 or getattr(decision, "kind", None) == "rate_limit"
            return PassingError(_short(error), full=full, wait=getattr(decision, "retry_after", None))
        return CallError(f"{self.name}: {_short(error)}")

    async def close(self) -> None:
        await self._model.api.aclose()


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reply(output: Any, name: str) -> Reply:
    """Text and reasoning of the first choice. Redacted reasoning is none."""
    from inspect_ai.model import ContentReasoning, ContentText

    if output.error or not output.choices:
        raise CallError(f"{name}: {output.error or 'no choices in the reply'}")
    content = output.choices[0].message.content
    parts = content if isinstance(content, list) else [ContentText(text=content)]
    texts = [p.text for p in parts if isinstance(p, ContentText)]
    thoughts = [p.reasoning for p in parts if isinstance(p, ContentReasoning) and not p.redacted]
    used = output.usage
    usage = {"prompt": used.input_tokens, "completion": used.output_tokens} if used else {}
    ended = output.choices[0].stop_reason
    if ended == "content_filter":
        raise CallError(f"{name}: the provider's own filter cut the reply off")
    cut = ended in ("max_tokens", "model_length")
    if not (any(texts) or thoughts or cut):
        raise PassingError(f"an empty reply (stop_reason {ended})")
    return Reply("".join(texts), "\n".join(thoughts) or None, cut, usage)
