"""An OpenAI-compatible endpoint, by the shortest way: aiohttp, one request a call.

`openai-api/SERVICE/MODEL` reads the address from SERVICE_BASE_URL and the key from SERVICE_API_KEY, `vllm/MODEL` from
VLLM_BASE_URL and VLLM_API_KEY, as inspect_ai does; all other providers go through inspect_ai itself (`inspected.py`),
which takes more time a call (docs/results.md). Keys are sent and never written or shown.
"""

import json
import os
from typing import Any

from pydantic_core import to_json

from delib.errors import StageError, UserError
from delib.models.calls import CallError, FinalError, PassingError, RefusedError, Reply
from delib.records import Message

HOPELESS = {401: "the key was refused", 402: "nothing is left to pay with"}
"""Statuses that every further call would get as well."""
REFUSED = {403: "it may not be used", 404: "no such model or address"}
SPENT = "insufficient_quota"
"""The code of a 429 that no waiting mends."""
PASSING = {408, 409, 425, 429}
"""Client errors that may pass, beside all of 500 and more."""


def address_of(name: str) -> tuple[str, str | None, str] | None:
    """Base address, key and the endpoint's own model name of a model that is called directly; None for others.

    Raises UserError when the address is not set.
    """
    provider, _, rest = name.partition("/")
    if provider == "vllm":
        service, model = "vllm", rest
        if "VLLM_BASE_URL" not in os.environ:
            return None  # inspect_ai starts a server of its own
    elif provider == "openai-api":
        service, _, model = rest.partition("/")
        if not model:
            raise UserError(f"{name}: write openai-api/SERVICE/MODEL")
    else:
        return None
    variable = service.upper().replace("-", "_")
    address = os.environ.get(f"{variable}_BASE_URL")
    if not address:
        raise UserError(f"{name}: set {variable}_BASE_URL to the endpoint's address, such as http://localhost:8000/v1")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{name}: {variable}_BASE_URL is {address!r}; it must begin with http:// or https://")
    return address.rstrip("/"), os.environ.get(f"{variable}_API_KEY"), model


class Endpoint:
    """One model at one address. `seconds`: how long one try may take; None for as long as it takes."""

    def __init__(
        self,
        name: str,
        address: str,
        key: str | None,
        model: str,
        *,
        seconds: float | None,
        identity: str | None = None,
    ) -> None:
        self.name, self.identity = name, identity or f"{address} {model}"
        self._address, self._model, self._seconds = f"{address}/chat/completions", model, seconds
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._session: Any = None
        self._closed = False

    def sent(self, messages: list[Message]) -> str:
        return to_json([{"role": m.role, "content": m.content} for m in messages]).decode()

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        import aiohttp

        rest = {"model": self._model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        body = b'{"messages":%b,%b' % (sent.encode(), to_json(rest)[1:])
        try:
            async with self._open().post(self._address, data=body, headers=self._headers) as reply:
                status, text = reply.status, await reply.read()
                wait = reply.headers.get("Retry-After")
        except TimeoutError:
            raise PassingError(f"no reply within {self._seconds:g} s" if self._seconds else "timed out") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        if status != 200:
            self._refused(status, text, wait)
        return _parse(text, self.name)

    def _refused(self, status: int, text: bytes, wait: str | None) -> None:
        cause = f"{status} {_message(text)}"
        if status in HOPELESS or (status == 429 and SPENT.encode() in text):
            why = HOPELESS.get(status, HOPELESS[402])
            raise StageError(f"{self.name}: {why} ({cause}); mend it and run the same command again")
        if status in REFUSED:
            raise RefusedError(f"{REFUSED[status]} ({cause})")
        if status in PASSING or status >= 500:
            raise PassingError(cause, full=status == 429, wait=_seconds(wait))
        raise FinalError(f"{self.name}: {cause}")

    def _open(self) -> Any:
        """The one session, opened in the loop of the first call."""
        import aiohttp

        if self._closed:
            raise FinalError(f"{self.name}: stopped before this call")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._seconds), connector=aiohttp.TCPConnector(limit=0)
            )
        return self._session

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()


def _parse(text: bytes, name: str) -> Reply:
    """The first choice. A reply that cannot be read, or holds nothing, may be a broken one, and is asked for again."""
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        usage = data.get("usage") or {}
        counts = {"prompt": usage.get("prompt_tokens"), "completion": usage.get("completion_tokens")}
        counted = {part: count for part, count in counts.items() if isinstance(count, int)}
        ended = choice.get("finish_reason")
        if not isinstance(content, str) or not isinstance(reasoning, str | None):
            raise TypeError("content or reasoning is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PassingError(f"unreadable reply ({type(error).__name__}: {error})") from error
    if ended == "content_filter":
        raise CallError(f"{name}: the endpoint's own filter cut the reply off")
    if ended == "error" or not (content or reasoning or ended == "length"):
        raise PassingError(f"an empty or broken reply (finish_reason {ended})")
    return Reply(content, reasoning, ended == "length", counted)


def _message(text: bytes) -> str:
    """What an error reply says, shortened."""
    try:
        found = json.loads(text)["error"]
        said = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        said = text.decode("utf-8", "replace")
    return " ".join(str(said).split())[:300]


def _seconds(wait: str | None) -> float | None:
    """A Retry-After in seconds; a date or nonsense counts as none."""
    try:
        return max(0.0, float(wait)) if wait is not None else None
    except ValueError:
        return None
