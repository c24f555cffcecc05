"""The one subclass of TRL's GRPOTrainer (1.16), for what its public arguments do not reach: speed that changes nothing,
and importance weights for rollouts that are not vLLM's.

In: the levers. Out: a trainer class. With every lever off it is GRPOTrainer bit by bit; with `skip`, `trim`, `share`
and `project` on, loss and gradients are the same up to the rounding of float32 (tests/test_grpo.py holds both, and the
signatures of what is overridden). It is for what a recipe can ask for: TRL's `dapo` loss, which divides by the tokens
of the whole generation, counted before any row is left out; one generation an optimiser step; no tools, no images.
What TRL does by itself and is only tested here: a completion whose reward is None has advantage 0 and is in neither
mean nor spread of its group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

from delib.training import writing

ROWS = 8
"""Rows of like length that go through the model together on a CPU: enough to keep its cores busy."""


class Levers(NamedTuple):
    """`skip`: rows that cannot move a weight (advantage 0, or cut off and masked) take no forward and no backward. The
    metrics `entropy` and `clip_ratio/…` are then about the other rows. Off by itself where such a row would count: with
    a KL penalty or a router's loss.
    `trim`: rows of like length go together, without the padding of the others; models with rotary positions only.
    `share`: a prompt goes through the model once for all its completions, where `generate` writes them and, with
    `trim`, in the loss, whose gradients lead back through its keys and values. In one process, for models with rotary
    positions whose layers attend to all tokens before and keep their activations, and where the prompts, padded to one
    width, are fewer tokens so.
    `write`: on a CPU, in float32 and in one process `generate` goes faster and draws from the same distribution
    (`writing.py`), but not the same completions from the same seed.
    `project`: only completion tokens are projected to the vocabulary (TRL projects all positions on a CPU).
    `correct`: truncated importance weights π_trained/π_rollout for each token where a `rollout_func` returned
    log-probabilities, at most `vllm_importance_sampling_clip_max`, and logged under TRL's names. TRL takes an extra
    forward for this, and only for vLLM; here the loss's own serves.
    """

    skip: bool = False
    trim: bool = False
    share: bool = False
    write: bool = False
    project: bool = False
    correct: bool = False


EXACT = Levers(skip=True, trim=True, share=True, write=True, project=True)


def trainer_class(levers: Levers) -> type:
    import torch
    from accelerate import DistributedType
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from trl import GRPOTrainer
    from trl.trainer import utils

    class LeveredTrainer(GRPOTrainer):
        model: Any
        _made: Any = None

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            compute_aux_loss: bool = False,
            **images: Any,
        ) -> Any:
            if self._made is not None:
                made, self._made = self._made, None
                return made
            compact = levers.project and input_ids.device.type == "cpu"
            with patch.object(utils, "_use_triton", lambda _: True) if compact else _nothing():
                if not levers.trim or compute_aux_loss or not _rotary(self.model):
                    return super()._get_per_token_logps_and_entropies(
                        model,
                        input_ids,
                        attention_mask,
                        logits_to_keep,
                        batch_size,
                        compute_entropy,
                        compute_aux_loss,
                        **images,
                    )
                given = (model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
                if levers.share and (
                    prompts := self._distinct(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
                ):
                    return self._shared(*given, *prompts)
                return self._trimmed(*given)

        def _trimmed(
            self, model: Any, input_ids: Any, attention_mask: Any, keep: int, batch_size: int | None, entropy: bool
        ) -> Any:
            """As the method above, over rows sorted by length; what is cut away is zero, as TRL leaves it."""
            count, width = input_ids.shape
            size = min(ROWS if input_ids.device.type == "cpu" else count, batch_size or count)
            order = attention_mask.sum(1).argsort(stable=True)
            found = [input_ids.new_zeros((count, keep), dtype=torch.float32) for _ in range(1 + entropy)]
            for start in range(0, count, size):
                rows = order[start : start + size]
                used = attention_mask[rows].any(0).nonzero()
                first, end = int(used[0]), max(int(used[-1]) + 1, width - keep + 1)
                logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                    model,
                    input_ids[rows, first:end],
                    attention_mask[rows, first:end],
                    end - (width - keep),
                    None,
                    entropy,
                )
                for n, part in enumerate((logps, entropies)[: len(found)]):
                    at = (rows[:, None], torch.arange(part.shape[1], device=rows.device)[None])
                    found[n] = found[n].index_put(at, part)
            return found[0], found[1] if entropy else None, None

        def _distinct(self, prompts: Any, mask: Any) -> tuple[Any, Any] | None:
            """A row of each prompt, and for each row which of them is its own; None where nothing is to be shared."""
            config, width = self.model.config, int(mask.any(0).sum())
            if (
                self.accelerator.distributed_type != DistributedType.NO
                or self.model.is_activation_checkpointing
                or getattr(config.get_text_config(), "output_router_logits", False)  # it counts by the whole mask
                or not _rotary(self.model)
                or width < 2
                or any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)
            ):
                return None
            _, of = torch.unique(prompts * mask - (1 - mask), dim=0, return_inverse=True)
            rows = torch.stack([(of == n).nonzero()[0, 0] for n in range(int(of.max()) + 1)])
            return (rows, of) if len(rows) * width < int(mask.sum()) else None

        def _read(self, model: Any, prompts: Any, mask: Any, positions: Any = None) -> Callable[[Any], Any]:
            """The keys and values of all of the prompts but the last token, which foretells the completion's first; for
            rows that each name their prompt."""
            with self.accelerator.autocast():
                decoder = self.accelerator.unwrap_model(model).get_decoder()
                cache = decoder(
                    input_ids=prompts[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True
                ).past_key_values
            return lambda of: DynamicCache([(layer.keys[of], layer.values[of]) for layer in cache.layers])

        def _shared(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            keep: int,
            batch_size: int | None,
            entropy: bool,
            distinct: Any,
            of: Any,
        ) -> Any:
            """As `_trimmed`, over rows sorted by the length of their completions, each prompt read once."""
            count, width = len(input_ids), input_ids.size(1) - keep
            size = min(ROWS if input_ids.device.type == "cpu" else count, batch_size or count)
            first = int(attention_mask[:, :width].any(0).nonzero()[0])
            of_rows = self._read(model, input_ids[distinct, first:width], attention_mask[distinct, first:width])
            order = attention_mask[:, width:].sum(1).argsort(stable=True)
            found = [input_ids.new_zeros((count, keep), dtype=torch.float32) for _ in range(1 + entropy)]
            for start in range(0, count, size):
                rows = order[start : start + size]
                used = attention_mask[rows, width:].any(0).nonzero()
                end = width + (int(used[-1]) + 1 if len(used) else 1)
                labels = input_ids[rows, width - 1 : end].masked_fill(attention_mask[rows, width - 1 : end] == 0, -100)
                with self.accelerator.autocast():
                    made = model(
                        input_ids=input_ids[rows, width - 1 : end],
                        attention_mask=attention_mask[rows, first:end],
                        past_key_values=of_rows(of[rows]),
                        labels=labels,
                        fused_lm_head=True,
                    )
                at = (rows[:, None], torch.arange(end - width, device=rows.device)[None])
                for n, part in enumerate((made.log_probs, made.entropy)[: len(found)]):
                    found[n] = found[n].index_put(at, part)
            return found[0], found[1] if entropy else None, None

        def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, *more: Any) -> Any:
            """As TRL's, where its model writes by `generate`: each prompt read once, and what writes faster."""
            written, settings = self.model.generate, self.model.generation_config
            takes = settings.use_cache is not False and settings.cache_implementation is None
            takes = takes and (settings.num_beams or 1) == (settings.num_return_sequences or 1) == 1

            def after_prompts(input_ids: Any, attention_mask: Any, **how: Any) -> Any:
                alone = self.accelerator.distributed_type == DistributedType.NO
                plain = alone and self.accelerator.mixed_precision == "no"
                faster = levers.write and plain and input_ids.device.type == "cpu"
                if levers.share and takes and (prompts := self._distinct(input_ids, attention_mask)):
                    rows, of = prompts
                    positions = (attention_mask[rows].cumsum(1) - 1).clamp(min=0)[:, :-1]  # as `generate` counts
                    read = self._read(self.model, input_ids[rows], attention_mask[rows], positions)(of)
                    if faster:
                        room = self.max_completion_length or 0
                        read.layers = [writing.with_room(layer.keys, layer.values, room) for layer in read.layers]
                    how["past_key_values"] = read
                with writing.faster(self.model, len(input_ids)) if faster else _nothing():
                    return written(input_ids=input_ids, attention_mask=attention_mask, **how)

            with patch.object(self.model, "generate", after_prompts):
                return super()._generate_single_turn(prompt_ids, images, fields, *more)  # type: ignore[no-untyped-call]

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            if levers.skip and self.beta == 0.0 and not self.aux_loss_enabled:
                counted = (inputs["advantages"] != 0) & inputs["completion_mask"].any(1)
                if self.accelerator.num_processes > 1:
                    counted = self._as_many_everywhere(counted)
                elif not counted.any():
                    return self._no_loss()
                inputs = {
                    name: value[counted] if torch.is_tensor(value) and value.dim() else value
                    for name, value in inputs.items()
                }
            if levers.correct and inputs.get("sampling_per_token_logps") is not None:
                inputs = self._corrected(model, inputs)
            return super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]

        def _as_many_everywhere(self, counted: Any) -> Any:
            """The rows that count, and of the others so many that each process has as many rows, at least one: they
            pass the model equally often, and gather metrics and gradients of one shape."""
            most = max(int(self.accelerator.gather(counted.sum()).max()), 1)
            others = (~counted).nonzero().flatten()
            return counted.index_fill(0, others[: most - int(counted.sum())], True)

        def _no_loss(self) -> Any:
            """Zero, with a gradient of zeros for each weight: the optimiser's moments decay as after TRL's own step."""
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.stack([p.flatten()[0].float() for p in trained]).sum() * 0.0

        def _corrected(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            """The inputs with advantages of shape (rows, tokens), each weighted by its token's importance. No weight is
            below 0, so that it passes through the clipped minimum of the loss."""
            self._made = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                inputs["completion_ids"].size(1),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
            )
            ratio = self._importance(
                self._made[0].detach(), inputs["sampling_per_token_logps"], inputs["completion_mask"]
            )
            return inputs | {"advantages": inputs["advantages"].unsqueeze(1) * ratio}

        def _importance(self, trained: Any, sampled: Any, mask: Any) -> Any:
            """π_trained/π_rollout, (rows, tokens), truncated. A token whose log-probability is not known (NaN) weighs
            1."""
            ratio = torch.nan_to_num((trained - sampled) * mask, nan=0.0).exp()
            ratio = ratio.clamp(max=self.vllm_importance_sampling_clip_max)
            log = self._metrics["train"]
            for name, values in (
                ("sampling/sampling_logp_difference", (trained - sampled).abs()[mask.bool() & ~torch.isnan(sampled)]),
                ("sampling/importance_sampling_ratio", ratio[mask.bool()]),
            ):
                if not values.numel():
                    values = values.new_full((1,), float("nan"))
                found = self.accelerator.gather(torch.stack([values.min(), values.mean(), values.max()])[None])
                log[f"{name}/min"].append(utils.nanmin(found[:, 0]).item())
                log[f"{name}/mean"].append(found[:, 1].nanmean().item())
                log[f"{name}/max"].append(utils.nanmax(found[:, 2]).item())
            return ratio

    return LeveredTrainer


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _rotary(model: Any) -> bool:
    """Whether attention knows only how far apart tokens are, so that padding at the left may go: rotary positions that
    do not depend on the length of the row."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))] if isinstance(rope, dict) else []
    return bool(kinds) and not any(k.get("rope_type") in ("dynamic", "longrope") for k in kinds)
