"""TRL's SFTTrainer with weighted tokens and, on a CPU, a plain head; and the batches it takes.

In: rows of `input_ids`, `labels` and `weights` (the stage makes them), packed ones with `seq_lengths`. With weights
of 1 loss and gradients are SFTTrainer's (tests/test_sft_parity.py), in one process or several.
"""

from typing import Any


def collator(tokenizer: Any, packed: bool = False) -> Any:
    """Batches of rows, padded at the right; the weights of padding are 0. `packed`: one row without padding, in which
    `position_ids` start anew with each example, so that none attends to another."""
    import torch
    from transformers import DataCollatorForSeq2Seq
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if packed:
        flat = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)

        def lay(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = dict(flat(rows))
            batch["weights"] = torch.tensor([[w for r in rows for w in r["weights"]]])
            return batch

        return lay

    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding=True)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]))
        width = batch["labels"].shape[1]
        fill = [[0.0] * (width - len(r["weights"])) for r in rows]
        right = tokenizer.padding_side == "right"
        batch["weights"] = torch.tensor(
            [r["weights"] + f if right else f + r["weights"] for r, f in zip(rows, fill, strict=True)]
        )
        return batch

    return collate


def trainer_class() -> type:
    """SFTTrainer with the loss projected by one plain matrix product, and with weights.

    TRL's fused head works in chunks to save memory, and on a CPU that costs more than the model's own forward
    (docs/results.md); on a GPU it is kept. The plain head is the model's own, given only the positions that bear a
    label, so that whatever a model does to its logits is done. The loss is cross-entropy over label-bearing positions,
    divided by their count over all processes and accumulated batches. With weights other than 1 it is the weighted
    mean over the same, so that the size of a step does not change with the weight.
    """
    import torch
    from trl import SFTTrainer

    class PlainHeadTrainer(SFTTrainer):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self.plain_head = self.accelerator.device.type == "cpu"
            self._asked: Any = None  # while the plain head computes: the positions whose logits are wanted
            self._weight: Any = None
            own: Any = self.model
            own.get_output_embeddings().register_forward_pre_hook(self._only_asked)

        def _only_asked(self, head: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return None if self._asked is None else (given[0][:, :-1][self._asked], *given[1:])

        def get_batch_samples(self, *given: Any, **more: Any) -> Any:
            batches, count = super().get_batch_samples(*given, **more)
            if batches:
                total = sum(b["weights"][:, 1:][b["labels"][:, 1:] != -100].sum() for b in batches)
                self._weight = self.accelerator.gather(total.to(self.accelerator.device)).sum()
            return batches, count

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            mode = "train" if model.training else "eval"
            labels = inputs["labels"][:, 1:]
            learned = labels != -100
            sent = {n: v for n, v in inputs.items() if n not in ("labels", "weights")} | {"use_cache": False}
            if self.aux_loss_enabled:
                sent["output_router_logits"] = True
            if self.plain_head:
                self._asked = learned
                try:
                    outputs = model(**sent)
                finally:
                    self._asked = None
                each = torch.nn.functional.cross_entropy(outputs.logits.float(), labels[learned], reduction="none")
                right = outputs.logits.argmax(-1) == labels[learned]
            else:
                outputs = model(**sent, labels=inputs["labels"], fused_lm_head=True)
                each, right = -outputs.log_probs[learned], outputs.is_top1[learned]
            weight = inputs["weights"][:, 1:][learned]
            alone = num_items_in_batch is None  # in evaluation; in training the counts are of all processes
            count = learned.sum() if alone else num_items_in_batch
            loss = (each * weight).sum() * count / (weight.sum() if alone else self._weight) / count
            if not alone and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
            if self.aux_loss_enabled:
                steps = 1 if alone else self.current_gradient_accumulation_steps
                loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            seen, hit = (self.accelerator.gather_for_metrics(n).sum() for n in (learned.sum(), right.sum()))
            self._metrics[mode]["mean_token_accuracy"].append((hit / seen.clamp(min=1)).item())
            return (loss, outputs) if return_outputs else loss

    return PlainHeadTrainer
