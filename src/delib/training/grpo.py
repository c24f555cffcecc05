"""The one subclass of TRL's GRPOTrainer (1.16), for what its public arguments do not reach: speed that changes nothing,
and importance weights for rollouts that are not vLLM's.

In: the levers. Out: a trainer class. With every lever off it is GRPOTrainer bit by bit; with `skip`, `trim` and
`project` on, loss and gradients are the same up to the rounding of float32 (tests/test_grpo.py holds both, and the
signatures of what is overridden). What TRL does by itself and is only tested here: a completion whose reward is None
has advantage 0 and is in neither mean nor spread of its group.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

ROWS = 8
"""Rows of like length that go through the model together on a CPU: enough to keep its cores busy."""
PER_ROW = ("grpo", "sapo", "luspo", "dr_grpo")
"""Loss types of TRL that divide by the count of rows; `bnpo` divides by the batch's tokens, the others by those of the
generation, which are counted before any row is left out."""


class Levers(NamedTuple):
    """`skip`: rows that cannot move a weight (advantage 0, or cut off and masked) take no forward and no backward. The
    metrics `entropy` and `clip_ratio/…` are then about the other rows. Off by itself where such a row would count: with
    a KL penalty, an entropy bonus, a router loss, or a quantile of entropies over the batch.
    `trim`: rows of like length go together, without the padding of the others; models with rotary positions only.
    `project`: only completion tokens are projected to the vocabulary (TRL projects all positions on a CPU).
    `correct`: truncated importance weights π_old/π_rollout where a `rollout_func` returned log-probabilities, by the
    trainer's `vllm_importance_sampling_*` settings, and logged under TRL's names. TRL takes an extra forward for this;
    here the loss's own serves, where generations and optimiser steps are aligned.
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
            plain = not compute_aux_loss and all(value is None for value in images.values())
            compact = levers.project and input_ids.device.type == "cpu"
            with patch.object(utils, "_use_triton", lambda _: True) if compact else _nothing():
                if not (levers.trim and plain and _rotary(self.model)):
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
            # Ranks must pass the model equally often where it is sharded, so only a lone process takes more passes.
            small = input_ids.device.type == "cpu" and self.accelerator.num_processes == 1
            size = min(ROWS if small else count, batch_size or count)
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
            scale = 1.0
            if levers.skip and self._may_skip(inputs):
                mask = self._mask(inputs)
                count, tokens = len(mask), mask.sum().clamp(min=1.0)
                advantages = inputs["advantages"].reshape(count, -1)
                counted = (advantages != 0).any(1) & mask.any(1)
                if not counted.any():
                    if self.accelerator.num_processes == 1:
                        return self._no_loss()
                    counted[0] = True  # the other ranks wait for this one's part in their gradients
                inputs = {
                    name: value[counted] if torch.is_tensor(value) and value.dim() else value
                    for name, value in inputs.items()
                }
                if self.loss_type in PER_ROW:
                    scale = float(counted.sum()) / count
                elif self.loss_type == "bnpo":
                    scale = self._mask(inputs).sum().clamp(min=1.0) / tokens
            if levers.correct and inputs.get("sampling_per_token_logps") is not None:
                inputs = self._corrected(model, inputs)
            loss: Any = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
            return loss * scale

        def _may_skip(self, inputs: dict[str, Any]) -> bool:
            return bool(
                self.model.training
                and self.beta == 0.0
                and not self._entropy_bonus_enabled
                and not self.aux_loss_enabled
                and self.top_entropy_quantile == 1.0
                and "pixel_values" not in inputs
            )

        def _mask(self, inputs: dict[str, Any]) -> Any:
            mask = inputs["completion_mask"]
            return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

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
            old = inputs.get("old_per_token_logps")
            old = self._made[0].detach() if old is None else old
            ratio = self._importance(old, inputs["sampling_per_token_logps"], self._mask(inputs))
            if self.loss_type == "vespo":  # it weighs sequences by itself
                return inputs | {"importance_sampling_ratio": ratio}
            return inputs | {"advantages": inputs["advantages"].reshape(len(ratio), -1) * ratio}

        def _importance(self, old: Any, sampled: Any, mask: Any) -> Any:
            """π_old/π_rollout by TRL's four modes: (rows, tokens), or (rows, 1) for a whole sequence. A token whose
            log-probability is not known (NaN) weighs 1."""
            mode, low, high = (
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
            )
            apart = torch.nan_to_num((old - sampled) * mask, nan=0.0)
            whole = mode.startswith("sequence")
            ratio = (apart.sum(-1, keepdim=True) if whole else apart).exp()
            if mode.endswith("truncate"):
                ratio = ratio.clamp(min=low, max=high)
            else:
                outside = torch.zeros_like(ratio, dtype=torch.bool)
                outside |= ratio < low if low is not None else False
                outside |= ratio > high if high is not None else False
                ratio = ratio.masked_fill(outside, 0.0)
            known = mask.bool() & ~torch.isnan(sampled)
            log = self._metrics["train" if self.model.training else "eval"]
            for name, values in (
                ("sampling/sampling_logp_difference", (old - sampled).abs()[known]),
                ("sampling/importance_sampling_ratio", ratio.flatten() if whole else ratio[mask.bool()]),
            ):
                if values.numel():
                    log[f"{name}/min"].append(values.min().item())
                    log[f"{name}/mean"].append(values.mean().item())
                    log[f"{name}/max"].append(values.max().item())
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
