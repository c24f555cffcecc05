"""The GRPO trainer beside TRL's on recorded completions and rewards: tiny models, float32, 20 optimiser steps."""

import inspect
import random
import re
from typing import Any

import pytest

import tiny
from conftest import TEMPLATE
from delib import chat
from delib.records import Message
from delib.training import writing
from delib.training.grpo import EXACT, Levers, trainer_class

STEPS, PROMPTS, GROUP, MOST = 20, 3, 4, 24
TEMPLATES = (
    TEMPLATE,
    "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m['role'] }}|{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant|<think>\n{% endif %}",
)


class Recorded:
    """Prompts by three chat templates, completions of mixed lengths, some cut off, and rewards: groups that agree, rows
    without a reward, one whole step without any difference."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.prompts, self.completions, self.rewards, self.logprobs = [], [], [], []
        for step in range(STEPS):
            for place in range(PROMPTS):
                tokenizer.chat_template = TEMPLATES[place]
                text = "Why " * draw.randint(1, 9) + "so?"
                self.prompts.append(chat.render(tokenizer, [Message(role="user", content=text)]))
                same = step == 7 or draw.random() < 0.4
                for _ in range(GROUP):
                    length = draw.randint(1, MOST)
                    ended = length < MOST and draw.random() < 0.9
                    ids = [draw.randint(2, 257) for _ in range(length)] + [1] * ended
                    self.completions.append(ids)
                    self.rewards.append(0.5 if same else None if draw.random() < 0.1 else draw.random())
                    self.logprobs.append([-5.5 + draw.uniform(-0.4, 0.4) for _ in ids])
        tokenizer.chat_template = TEMPLATE
        self.tokenizer = tokenizer

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        start = trainer.state.global_step * PROMPTS * GROUP
        part = slice(start, start + PROMPTS * GROUP)
        ids = [self.tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        return {"prompt_ids": ids, "completion_ids": self.completions[part], "logprobs": self.logprobs[part]}

    def reward(self, completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float | None]:
        start = trainer_state.global_step * PROMPTS * GROUP
        return self.rewards[start : start + len(completion_ids)]


def trained(kind: type, recorded: Recorded, tiny_model, folder, steps: int = STEPS, change: Any = None, **more: Any):
    """Losses, and each step's gradients as the optimiser got them, by name."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig

    losses, gradients = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    class Kept(kind):
        def compute_loss(self, *given, **named):
            losses.append(super().compute_loss(*given, **named))
            return losses[-1]

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, more.pop("dtype", "float32")))
    arguments = {
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MOST,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "temperature": 0.8,
        "mask_truncated_completions": True,
        "shuffle_dataset": False,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = Kept(
        model=model,
        args=GRPOConfig(output_dir=str(folder), **(arguments | more)),
        train_dataset=Dataset.from_list([{"prompt": p} for p in recorded.prompts]),
        processing_class=recorded.tokenizer,
        reward_funcs=recorded.reward,
        rollout_func=recorded.rollout,
        callbacks=[Watch()],
    )
    if change is not None:
        change(trainer)
    trainer.train()
    return [loss.item() for loss in losses], gradients, trainer


def furthest(ours: list[dict], theirs: list[dict]) -> float:
    """The largest relative distance of a parameter's gradient in any step."""
    most = 0.0
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            size = gradient.norm().item()
            apart = (found[name] - gradient).norm().item()
            most = max(most, apart / size if size else apart)
    return most


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: a second thread only waits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recorded(tiny_model):
    from transformers import AutoTokenizer

    return Recorded(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def plain(recorded, tiny_model, tmp_path_factory):
    from trl import GRPOTrainer

    return trained(GRPOTrainer, recorded, tiny_model, tmp_path_factory.mktemp("plain"))


def test_with_every_lever_off_it_is_trls_trainer_bit_by_bit(plain, recorded, tiny_model, tmp_path):
    losses, gradients, trainer = trained(trainer_class(Levers()), recorded, tiny_model, tmp_path)
    assert losses == plain[0]
    assert furthest(gradients, plain[1]) == 0.0
    ours, theirs = trainer.model.state_dict(), plain[2].model.state_dict()
    assert all(ours[name].equal(value) for name, value in theirs.items())
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    for mine, other in zip(trainer.state.log_history, plain[2].state.log_history, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def close(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-8)
    assert furthest(found[1], expected[1]) < 1e-5


def test_with_exact_levers_on_losses_and_gradients_are_trls(plain, recorded, tiny_model, tmp_path):
    passes = []
    found = trained(trainer_class(EXACT), recorded, tiny_model, tmp_path / "a", change=counting(passes))
    close(found, plain)
    assert found[0][7] == 0.0 and not any(g.any() for g in found[1][7].values()), "the step without any difference"
    unshared, seen = [], found[2].state.num_input_tokens_seen
    left = trained(
        trainer_class(EXACT._replace(share=False)), recorded, tiny_model, tmp_path / "b", change=counting(unshared)
    )
    close(left, plain)
    assert sum(passes) < 0.7 * sum(unshared) < 0.7 * 0.75 * seen, "padding goes, and of each prompt all but one copy"


def counting(passes: list[int]) -> Any:
    """Notes how many tokens go through the layers."""

    def change(trainer: Any) -> None:
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda _, given, made: passes.append(given[0].numel())
        )

    return change


def test_an_adapter_learns_the_same_from_shared_prompts(recorded, tiny_model, tmp_path):
    from peft import LoraConfig

    def adapted(levers: Levers, folder: str) -> Any:
        kind = trainer_class(levers)

        class Adapted(kind):
            def __init__(self, **given: Any) -> None:
                super().__init__(**given, peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))

        passes: list[int] = []
        return trained(Adapted, recorded, tiny_model, tmp_path / folder, steps=3, change=counting(passes)), sum(passes)

    found, few = adapted(EXACT, "a")
    expected, many = adapted(Levers(), "b")
    close(found, expected)
    assert few < 0.6 * many


def test_completions_are_written_after_shared_prompts_as_without(recorded, tmp_path, monkeypatch):
    """Greedy, prompts of several lengths, large weights, so that places count: the same tokens, each prompt read once,
    and what writes faster used where it may be."""
    from accelerate import DistributedType

    tiny.save(tmp_path / "model", "llama", "gpt-2")
    used = []
    for name in ("faster", "with_room"):
        inner = getattr(writing, name)
        monkeypatch.setattr(writing, name, lambda *given, inner=inner, name=name: used.append(name) or inner(*given))

    def written(share: bool, write: bool = False, several: bool = False, bf16: bool = False, **settings: Any) -> Any:
        passes, made = [], []

        class Writing(trainer_class(Levers(share=share, write=write))):
            def train(self) -> None:
                counting(passes)(self)
                self.model.generation_config.update(**settings)
                sent = [recorded.tokenizer.encode(p, add_special_tokens=False) for p in recorded.prompts[:PROMPTS]]
                assert len({len(ids) for ids in sent}) > 1
                used.clear()
                with pytest.MonkeyPatch.context() as patched:
                    if several:
                        patched.setattr(self.accelerator.state, "distributed_type", DistributedType.MULTI_CPU)
                    made.extend(self._generate_single_turn([s for s in sent for _ in range(GROUP)], None, {}, GROUP)[0])

        how = {"generation_kwargs": {"do_sample": False}, "bf16": bf16}
        trained(Writing, recorded, tmp_path / "model", tmp_path / f"{share}-{write}", **how)
        return made, passes, set(used)

    (found, read, shared), (expected, all_read, plain) = written(True), written(False)
    assert found == expected and any(expected)
    assert all_read[0] == PROMPTS * GROUP * (read[0] // PROMPTS + 1)
    assert not shared and not plain
    assert written(True, write=True) == (found, read, {"faster", "with_room"})
    assert written(False, write=True) == (found, all_read, {"faster"})
    assert written(True, write=True, several=True) == (found, all_read, set())
    assert written(False, write=True, bf16=True) == written(False, bf16=True)  # mixed precision
    for settings in ({"use_cache": False}, {"cache_implementation": "static"}):  # a model's own; none can be given
        assert written(True, write=True, **settings) == (expected, written(False, **settings)[1], {"faster"})
    assert written(True, write=True, num_beams=2)[0] == written(False, num_beams=2)[0]


def test_what_a_prompt_must_have_to_be_shared(recorded, tiny_model, tmp_path, monkeypatch):
    """Two tokens, since its last foretells the completion; more rows than prompts; weights that are all here."""
    import torch
    from accelerate import DistributedType

    seen = []

    class Asking(trainer_class(EXACT)):
        def train(self) -> None:
            def asked(prompts: Any, mask: Any) -> Any:
                found = self._distinct(torch.tensor(prompts), torch.tensor(mask))
                seen.append(found and tuple(part.tolist() for part in found))

            asked([[5, 7], [6, 7], [5, 7]], [[1, 1], [1, 1], [1, 1]])
            asked([[5, 7], [6, 7]], [[1, 1], [1, 1]])
            asked([[5, 7], [6, 7]], [[0, 1], [0, 1]])
            monkeypatch.setattr(self.accelerator.state, "distributed_type", DistributedType.FSDP)
            asked([[5, 7], [6, 7], [5, 7]], [[1, 1], [1, 1], [1, 1]])

    trained(Asking, recorded, tiny_model, tmp_path)
    assert seen == [([0, 1], [0, 1, 0]), None, None, None]


def test_layers_that_see_a_window_share_nothing(recorded, tmp_path):
    """Mistral's, with a window shorter than the prompts: the gradients are TRL's still."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from trl import GRPOTrainer

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    MistralForCausalLM(
        MistralConfig(vocab_size=len(recorded.tokenizer), num_key_value_heads=2, sliding_window=8, **shape)
    ).save_pretrained(tmp_path / "model")
    expected = trained(GRPOTrainer, recorded, tmp_path / "model", tmp_path / "a", steps=2)
    close(trained(trainer_class(EXACT), recorded, tmp_path / "model", tmp_path / "b", steps=2), expected)


def test_experts_that_count_their_tokens_share_nothing(recorded, tmp_path):
    """Mixtral's, told to return what its router says, which TRL's forward then counts over whole rows."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from trl import GRPOTrainer

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.0}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=len(recorded.tokenizer), num_key_value_heads=2, **shape, **experts)
    ).save_pretrained(tmp_path / "model")
    expected = trained(GRPOTrainer, recorded, tmp_path / "model", tmp_path / "a", steps=2)
    close(trained(trainer_class(EXACT), recorded, tmp_path / "model", tmp_path / "b", steps=2), expected)


def test_micro_batches_have_the_denominator_of_their_generation(recorded, tiny_model, tmp_path):
    from trl import GRPOTrainer

    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps": 6}
    expected = trained(GRPOTrainer, recorded, tiny_model, tmp_path / "a", **split)
    found = trained(trainer_class(EXACT), recorded, tiny_model, tmp_path / "b", **split)
    close(found, expected)


def test_a_penalty_on_every_token_keeps_every_row(recorded, tiny_model, tmp_path):
    from trl import GRPOTrainer

    expected = trained(GRPOTrainer, recorded, tiny_model, tmp_path / "a", steps=3, beta=0.1)
    found = trained(trainer_class(EXACT), recorded, tiny_model, tmp_path / "b", steps=3, beta=0.1)
    close(found, expected)


def test_a_planted_mistake_of_one_token_is_seen(plain, recorded, tiny_model, tmp_path):
    class Wrong(trainer_class(EXACT)):
        def _compute_loss(self, model, inputs):
            mask = inputs["completion_mask"].clone()
            row = int((inputs["advantages"] != 0).nonzero()[0]) if inputs["advantages"].any() else 0
            mask[row, 0] = 0
            return super()._compute_loss(model, inputs | {"completion_mask": mask})

    found = trained(Wrong, recorded, tiny_model, tmp_path, steps=3)
    assert furthest(found[1], plain[1][:3]) > 1e-3
    with pytest.raises(AssertionError):
        close(found, (plain[0][:3], plain[1][:3]))


def test_other_rollouts_are_weighted_as_trl_weights_vllms(recorded, tiny_model, tmp_path):
    """TRL's own path for vLLM, with a vLLM that only has to sync, against ours; in float64, since the two multiply in
    another order, and a loss whose terms cancel shows the last bits of float32."""
    from trl import GRPOTrainer

    class Synced:
        def sync_weights(self):
            pass

    def through_vllm(trainer):
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Synced(), -1

    how = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2, "steps": 5}
    how |= {"dtype": "float64"}
    expected = trained(GRPOTrainer, recorded, tiny_model, tmp_path / "a", change=through_vllm, **how)
    found = trained(trainer_class(EXACT._replace(correct=True)), recorded, tiny_model, tmp_path / "b", **how)
    close(found, expected)
    left = trained(trainer_class(EXACT), recorded, tiny_model, tmp_path / "c", **how)
    assert furthest(left[1], expected[1]) > 1e-3, "without the weights it is another gradient"
    name = "sampling/importance_sampling_ratio/mean"
    assert all(name in h for h in expected[2].state.log_history[:-1])
    assert sum(0.8 < h.get(name, 0) < 1.2 for h in found[2].state.log_history) >= 4


def test_what_is_not_graded_leaves_its_group(recorded, tiny_model, tmp_path):
    """One failed judge call: advantage 0 for that row, and for its siblings what they have without it."""
    import torch
    from trl import GRPOTrainer

    seen = []

    class Watching(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            seen.append(made["advantages"].tolist())
            return made

    given = [0.2, None, 0.6, 1.0] + [0.1, 0.4, 0.4, 0.4] + [None] * 4

    def change(trainer):
        trainer.reward_funcs[0] = lambda **_: given

    trained(Watching, recorded, tiny_model, tmp_path, steps=1, change=change)
    siblings = torch.tensor([0.2, 0.6, 1.0])
    expected = ((siblings - siblings.mean()) / (siblings.std() + 1e-4)).tolist()
    assert seen[0][1] == 0.0
    assert [seen[0][0], *seen[0][2:4]] == pytest.approx(expected, rel=1e-5)
    assert seen[0][4] != 0.0 and seen[0][8:] == [0.0] * 4


HELD = {
    "_get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, "
    "compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
    "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
    "mm_token_type_ids=None, image_position_ids=None)",
    "_compute_loss": "(self, model, inputs)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
}


def test_what_is_overridden_is_there_in_trl_with_this_signature():
    from trl import GRPOTrainer
    from trl.trainer import utils

    for name, signature in HELD.items():
        found = str(inspect.signature(getattr(GRPOTrainer, name)))
        assert re.sub(r" -> .*", "", found) == signature, name
    kind = trainer_class(EXACT)
    own = {n for n in vars(kind) if callable(getattr(kind, n)) and hasattr(GRPOTrainer, n) and not n.startswith("__")}
    assert own == set(HELD)
    assert callable(utils._use_triton)
