"""The one subclass of TRL's GRPOTrainer (1.16), for what its public arguments do not reach: speed that changes nothing,
and importance weights for rollouts that are not vLLM's.

In: the levers. Out: a trainer class. With every lever off it is GRPOTrainer bit by bit; with `skip`, `trim` and
`project` on, loss and gradients are the same up to the rounding of float32 (tests/test_grpo.py holds both, and the
signatures of what is overridden). It is for what a recipe can ask for: TRL's `dapo` loss, which divides by the tokens
of the whole generation, counted before any row is left out; one generation an optimiser step; no tools, no images.
What TRL does by itself and is only tested here: a completion whose reward is None has advantage 0 and is in neither
mean nor spread of its group.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

ROWS = 8
"""Rows of like length that go through the model together on a CPU: enough to keep its cores busy."""


class Levers(NamedTuple):
    """`skip`: rows that cannot move a weight (advantage 0, or cut off and masked) take no forward and no backward. The
    metrics `entropy` and `clip_ratio/…` are then about the other rows. Off by itself where such a row would count: with
    a KL penalty or a router's loss.
    `trim`: rows of like length go together, without the padding of the others; models with rotary positions only.
    `project`: only completion tokens are projected to the vocabulary (TRL projects all positions on a CPU).
    `correct`: truncated importance weights π_trained/π_rollout for each token where a `rollout_func` returned
    log-probabilities, at most `vllm_importance_sampling_clip_max`, and logged under TRL's names. TRL takes an extra
    forward for this, and only for vLLM; here the loss's own serves.
    """

    skip: bool = False
    trim: bool = False
    project: bool = False
    correct: bool = False


EXACT = Levers(skip=True, trim=True, project=True)


def trainer_class(levers: Levers) -> type:
    import torch
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
                return self._trimmed(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)

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
