"""Which way a model's name goes, and the model behind it, ready to be called.

- `openai-api/SERVICE/MODEL`, and `vllm/MODEL` with VLLM_BASE_URL set: the endpoint itself (`endpoint.py`);
- another name whose first part is a provider of inspect_ai (`anthropic/…`, `hf/…`): through inspect_ai;
- `….gguf`: an embedded llama.cpp server with the template in the file;
- `smollm2`, a model folder, a hub id: here, by the recipe's engine.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from pathlib import Path

from delib.errors import UserError
from delib.models import embedded, local, weights
from delib.models.calls import Backend, Caller, Finished, Ledger
from delib.models.endpoint import Endpoint, address_of
from delib.recipe import Recipe

RUN_HERE = {"hf", "vllm", "sglang", "nnterp", "transformer_lens", "llama-cpp-python", "ollama", "none"}
"""Providers of inspect_ai that load weights or start a server when they are opened."""

OWNERS = {"google", "openai"}
"""Providers of inspect_ai whose names are owners of open weights on the hub as well."""


@lru_cache(maxsize=1)
def providers() -> frozenset[str]:
    """The first parts of the model names that inspect_ai takes."""
    from inspect_ai._util.registry import registry_find, registry_unqualified_name
    from inspect_ai.model import get_model  # noqa: F401 - registers the providers

    return frozenset(registry_unqualified_name(found) for found in registry_find(lambda info: info.type == "modelapi"))


def is_hosted(name: str) -> bool:
    """Whether a model of this name is called and not loaded from a folder."""
    first, slash, _ = name.partition("/")
    if not slash or not first or first.startswith(".") or Path(name).exists():
        return False
    return first in ("openai-api", "vllm") or first in providers()


def on_hub(name: str) -> bool:
    """Whether a name that stands for weights is a hub id, though as a model to be called it would be a provider's."""
    return name.count("/") == 1 and name.partition("/")[0] in OWNERS and not Path(name).exists()


def check(name: str) -> None:
    """Raises UserError for a name that can't be opened, before any compute. Nothing is fetched or loaded."""
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such GGUF file; check the path")
    elif is_hosted(name):
        if address_of(name) is None and name.partition("/")[0] not in RUN_HERE:
            from delib.models.inspected import Inspected

            Inspected(name, seconds=60)
    elif name != weights.SMOLLM2 and (name.startswith(("/", ".")) or name.count("/") != 1 or Path(name).is_dir()):
        weights.resolve(name)  # a hub id is fetched when it is needed


@asynccontextmanager
async def open_model(
    recipe: Recipe,
    name: str,
    ledger: Ledger,
    cache: Finished | None,
    *,
    context_tokens: int,
    slots: int = embedded.SLOTS,
) -> AsyncIterator[Caller]:
    """A model by its name. `context_tokens`: the most that prompt and completion of one call may have. `slots`: the
    most calls that a llama.cpp server here has room for at once."""
    if name.endswith(".gguf"):
        check(name)
        # Twice as many places as calls: each keeps the beginning of another kind of call (teacher's, judge's), which is
        # most of it, and llama.cpp takes the free place whose beginning is most alike.
        slots = min(slots, 2 * ledger.limits.concurrency)
        async with embedded.serve_gguf(Path(name), context_tokens=context_tokens, slots=slots) as served:
            try:
                yield Caller(served, cache, ledger, slots)
            finally:
                ledger.write()
    elif is_hosted(name):
        caller = Caller(_hosted(name, ledger.limits.timeout_seconds), cache, ledger)
        try:
            yield caller
        finally:
            await caller.close()
    else:
        folder = weights.resolve(name)
        async with open_folder(recipe, folder, name, context_tokens, slots) as backend:
            try:
                yield Caller(backend, cache, ledger, slots)
            finally:
                ledger.write()


def _hosted(name: str, seconds: float) -> Backend:
    direct = address_of(name)
    if direct is not None:
        return Endpoint(name, *direct, seconds=seconds)
    from delib.models.inspected import Inspected

    return Inspected(name, seconds=seconds)


def open_folder(
    recipe: Recipe, folder: Path, name: str, context_tokens: int, slots: int = embedded.SLOTS
) -> AbstractAsyncContextManager[embedded.EmbeddedModel | local.LocalModel]:
    """The model in a folder, by the recipe's engine; what llama.cpp can't take runs on transformers."""
    if recipe.engine == "llamacpp" and weights.can_serve(folder):
        return embedded.serve(
            folder, name=name, quantisation=recipe.evaluate.quantisation, context_tokens=context_tokens, slots=slots
        )
    return local.load(folder, name=name, device=recipe.device, dtype=recipe.dtype)
