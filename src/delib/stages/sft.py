"""Stage 5, SFT: TRL's SFTTrainer on the distilled examples; the loss is on reasoning and answer only.

In: Examples and a model folder. Out: `checkpoint/` (safetensors) and the curve in the manifest. Resumes from the
last trainer checkpoint. Departures from the published method: the paper does not disclose sizes; here small models
may keep their first layers frozen, and no separate capability data is mixed in beside the plain prompts.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from delib import chat
from delib.models import weights
from delib.recipe import Recipe
from delib.records import Example, Manifest
from delib.run import StageFolder

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def tokenise(example: Example, tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
    """Token ids and labels of one example: labels are -100 over the prompt, so only what the model writes is learned.

    Prompt and completion are tokenised apart, as at generation time, and the end-of-turn token closes the completion.
    """
    prompt = tokenizer.encode(chat.render(tokenizer, example.messages), add_special_tokens=False)
    text = chat.join(example.reasoning, example.answer)
    completion = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    ids = (prompt + completion)[:max_tokens]
    labels = ([-100] * len(prompt) + completion)[:max_tokens]
    return {"input_ids": ids, "labels": labels}


def trainer_class() -> type:
    """SFTTrainer with the loss projected by one plain matrix product.

    TRL's fused head works in chunks to save memory, and on a CPU that costs more than the model's own forward
    (docs/results.md). The loss is the same: cross-entropy over label-bearing positions, divided by their count.
    """
    import torch
    from trl import SFTTrainer

    class PlainHeadTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            learned = labels != -100
            core = self.accelerator.unwrap_model(model)
            hidden = core.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            logits = core.lm_head(hidden.last_hidden_state[:, :-1][learned])
            total = torch.nn.functional.cross_entropy(logits.float(), labels[learned], reduction="sum")
            count = learned.sum() if num_items_in_batch is None else num_items_in_batch
            self._metrics["train"]["mean_token_accuracy"].append(
                (logits.argmax(-1) == labels[learned]).float().mean().item()
            )
            loss = total / count
            return (loss, hidden) if return_outputs else loss

    return PlainHeadTrainer


def run(recipe: Recipe, examples: list[Example], base: Path, folder: StageFolder) -> Manifest:
    """Train, and leave the model in `checkpoint/`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
    from trl import SFTConfig

    section = recipe.sft
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenise(e, tokenizer, section.max_tokens) for e in examples]
    tokens = sum(len(r["input_ids"]) for r in rows)
    # The last trainable layers start from the same weights after a kill: the trainer's checkpoint holds them all.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, recipe.dtype))
    weights.freeze(model, section.frozen_layers)
    steps = -(-len(rows) // section.batch_size) * section.epochs
    scratch = folder.path / "trainer"
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=section.epochs,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.dtype == "bfloat16",
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=1,
        save_strategy="steps",
        save_steps=section.checkpoint_steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=recipe.device != "cpu",
        disable_tqdm=False,
    )
    trainer = trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding=True),
    )
    last = weights.last_checkpoint(scratch)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    weights.save(model, tokenizer, base, folder.path / "checkpoint")
    curve = [h for h in trainer.state.log_history if "loss" in h]
    shutil.rmtree(scratch, ignore_errors=True)
    counts = {"in": len(examples), "out": len(rows), "steps": trainer.state.global_step}
    detail = {
        "curve": [{"step": h["step"], "loss": h["loss"], "accuracy": h.get("mean_token_accuracy")} for h in curve],
        "resumed_from": last.name if last else None,
    }
    return Manifest(
        stage="sft", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens * section.epochs, detail=detail
    )
