"""Rollouts by the embedded llama.cpp server, with the current weights, quantised: on some CPUs faster than `generate`.

In: the weights in training. Out: completions with the log-probabilities of their tokens under what sampled them, at the
sampling temperature and without any truncation (no top-k, no min-p), so that importance weights can tell how far the
quantised weights are from the trained ones (`grpo.py`). Each completion has a seed of its own; which ones decode side
by side changes the last bits of the logits, so that a seed does not fix a completion.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from delib.errors import StageError, UserError
from delib.models import embedded
from delib.models.calls import together
from delib.models.gguf_file import FAMILIES, to_gguf
from delib.training import processes
from delib.training.reward import Run
from delib.training.rollouts import Ids, Journal, Rollout, encoded, result

QUANTISATION = "q8_0"


class LiveGguf:
    """A GGUF file that follows the weights in training: written whole once, then only the trained tensors, in place.

    Writing the metadata (the vocabulary above all) takes ten times as long as quantising the weights. Raises UserError
    for a model that has no GGUF.
    """

    def __init__(self, start: Path, model: Any, target: Path) -> None:
        import gguf

        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        to_gguf(start, target, QUANTISATION)
        found = {t.name: (int(t.data_offset), int(t.n_bytes), t.tensor_type) for t in gguf.GGUFReader(target).tensors}
        config = model.config
        family = config.model_type
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[FAMILIES[family]], config.num_hidden_layers)
        self.places = {
            name: found[str(names.get_name(name, try_suffixes=(".weight", ".bias")))]
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        # As to_gguf writes them: llama.cpp's rotary embedding of this family takes neighbouring rows as a pair.
        self.paired = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if family != "llama":
            self.paired = {}

    def follow(self, model: Any) -> None:
        """Write the trained tensors as they are now. No server may hold the file."""
        import gguf

        with self.target.open("r+b") as handle:
            for name, value in model.named_parameters():
                if name not in self.places:
                    continue
                array = value.detach().float().cpu().numpy()
                heads = self.paired.get(name.split(".")[-2])
                if heads is not None:
                    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                    array = split.swapaxes(1, 2).reshape(array.shape)
                offset, size, kind = self.places[name]
                data = gguf.quants.quantize(array, kind).tobytes()
                assert len(data) == size, name
                handle.seek(offset)
                handle.write(data)


def seed_of(seed: int, step: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}|{place}".encode()).digest()[:4], "big")


def by_server(
    tokenizer: Any,
    ids_of: Ids,
    journal: Journal,
    file: LiveGguf | None,
    run: Run,
    grade: Callable[[int, int, str, str, list[int]], Any],
    *,
    ends: set[int],
    context_tokens: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Callable[[list[str], Any], dict[str, Any]]:
    """A rollout function that starts a server with the weights of the step. `grade(step, place, prompt_id, sent, ids)`,
    a coroutine, is begun for each completion as it ends, while others are still written. In several processes the one
    that leads has the file, writes for all, and tells the others.

    llama.cpp knows more tokens that end a turn than the model declares, by their text (`<|endoftext|>`). What it ends
    on is an end, as in evaluate: such tokens are added to `ends` and to the trainer's.
    """
    asked = {
        "n_predict": max_tokens,
        "temperature": temperature,
        "samplers": ["temperature"],
        "n_probs": 1,
        "post_sampling_probs": True,
        "return_tokens": True,
        "cache_prompt": True,
    }

    async def write(
        address: str | None, step: int, rows: Sequence[tuple[int, str, str, list[int]]], stored: list[Rollout | None]
    ) -> list[Rollout]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None)
        # No connection is used twice: the server closes idle ones, and a judge may hold this loop for longer than that.
        connector = aiohttp.TCPConnector(limit=embedded.SLOTS, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def one(place: int, name: str, sent: str, ids: list[int]) -> Rollout:
                made = stored[place]
                if made is None:
                    body = asked | {"prompt": ids, "seed": seed_of(seed, step, place)}
                    try:
                        async with session.post(f"{address}/completion", json=body) as reply:
                            if reply.status != 200:
                                raise StageError(f"rollouts: {reply.status} {(await reply.text())[:300]}")
                            data = await reply.json()
                    except aiohttp.ClientError as error:
                        raise StageError(
                            f"rollouts: the embedded server gave no answer ({type(error).__name__}: {error}); "
                            "the same command goes on from here"
                        ) from error
                    tokens = data["tokens"]
                    logprobs = aligned(tokens, data.get("completion_probabilities", []))
                    # llama.cpp knows one end-of-turn token by the file, the trainer all that the model declares.
                    size = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
                    made = Rollout(
                        step=step,
                        place=place,
                        prompt_id=name,
                        ids=tokens[:size],
                        logprobs=logprobs[:size],
                        ended=data["stop_type"] == "eos" and size == len(tokens),
                    )
                    journal.add(made)
                if made.ended:
                    ends.add(made.ids[-1])
                await grade(step, place, name, sent, made.ids)
                return made

            return await together(*(one(*row) for row in rows))

    def written(step: int, prompts: list[str], file: LiveGguf, trainer: Any) -> list[Rollout]:
        names, sent = ids_of(step), encoded(tokenizer, prompts)
        stored = journal.of(step, names)
        rows = [(n, *row) for n, row in enumerate(zip(names, prompts, sent, strict=True))]
        server, address = None, None
        if not all(stored):
            file.follow(trainer.accelerator.unwrap_model(trainer.model))
            slots = min(embedded.SLOTS, len(prompts))
            try:
                server = embedded.started(embedded.parameters(file.target, context_tokens, slots))
            except RuntimeError as error:
                raise UserError(
                    f"rl.rollouts: llama.cpp does not take this model, or has no room for it ({error}); "
                    "set rl.rollouts to transformers"
                ) from error
            address = server.listening_address
        try:
            made: list[Rollout] = run(write(address, step, rows, stored))
            return made
        finally:
            del server

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        every = processes.gathered(prompts)
        made = processes.spread(written(trainer.state.global_step, every, file, trainer) if file else None)
        ends.update(r.ids[-1] for r in made if r.ended)
        trainer.eos_token_ids = sorted(ends)
        return result(encoded(tokenizer, prompts), processes.part(made))

    return rollout


def aligned(tokens: Sequence[int], found: Sequence[dict[str, Any]]) -> list[float | None]:
    """The log-probability of each token. The server tells none for a token that ends within a character, and that one
    is before the token that completes it: hence from the end. None: not told; such a token's importance is 1."""
    made: list[float | None] = [None] * len(tokens)
    rest = list(found)
    for place in range(len(tokens) - 1, -1, -1):
        if rest and rest[-1]["id"] == tokens[place]:
            chance = float(rest.pop()["prob"])
            made[place] = math.log(chance) if chance > 0 else None
    return made
