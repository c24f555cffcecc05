"""GGUF files against transformers: the same tokens, logits and greedy choices of tiny models of every family."""

import asyncio
import json
import re
import urllib.request
from contextlib import contextmanager

import pytest

import tiny
from delib.errors import UserError
from delib.models import embedded, gguf_file, opened
from delib.models.cache import Cache
from delib.models.calls import Ledger
from delib.recipe import LimitsSection, Recipe
from delib.records import Message

ROPE = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def rope(kind: str) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | ROPE[kind]}


@contextmanager
def served(file):
    """A function that asks a llama.cpp server, whose cache and attention do not round to 16 bits as they do else."""
    import xllamacpp

    params = embedded.parameters(file, 256, 1)
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    address = server.listening_address

    def ask(path: str, **body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())

    try:
        yield ask
    finally:
        del server


def furthest(file, folder, model) -> tuple[float, float]:
    """Over the texts: the largest difference of a log-probability at the next token, and how far the logit of a
    greedily chosen token lies below transformers' best, at worst, over 32 tokens."""
    import torch
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    # A token that is half a character is not told with its log-probabilities, and the end of the turn ends everything.
    banned = [[n, False] for t, n in words.get_vocab().items() if not t.isascii()] + [[1, False]]
    apart, below = 0.0, 0.0
    with served(file) as ask:
        for text in tiny.TEXTS:
            ids = words(text)["input_ids"]
            assert ask("/tokenize", content=text, add_special=True)["tokens"] == ids
            common = {"prompt": ids, "temperature": 0, "cache_prompt": False}
            one = ask("/completion", n_predict=1, n_probs=model.config.vocab_size, logit_bias=banned, **common)
            greedy = ask("/completion", n_predict=32, return_tokens=True, ignore_eos=True, **common)["tokens"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + greedy])).logits[0, len(ids) - 1 : -1]
            said = one["completion_probabilities"][0]["top_logprobs"]
            assert len(said) == model.config.vocab_size
            own = torch.log_softmax(logits[0], -1)
            apart = max([apart, *(abs(own[row["id"]].item() - row["logprob"]) for row in said)])
            logits[:, 1] = -torch.inf
            chosen = logits.gather(1, torch.tensor(greedy)[:, None])[:, 0]
            below = max(below, (logits.max(-1).values - chosen).max().item())
    return apart, below


@pytest.mark.parametrize(
    ("family", "split", "config"),
    [
        ("llama", "smollm", {"tie_word_embeddings": True}),
        ("llama", "gpt-2", {"attention_bias": True, "mlp_bias": True, "head_dim": 32} | rope("linear")),
        ("llama", "llama-bpe", rope("llama3")),
        ("qwen2", "qwen2", {"tie_word_embeddings": False}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True} | rope("yarn")),
        ("qwen3", "qwen2", {"tie_word_embeddings": True, "head_dim": 32}),
    ],
)
def test_llama_cpp_reckons_what_transformers_does(tmp_path, family, split, config):
    model = tiny.save(tmp_path, family, split, **config)
    assert gguf_file.to_gguf(tmp_path, tmp_path / "m.gguf", "f32") == []
    apart, below = furthest(tmp_path / "m.gguf", tmp_path, model)
    assert apart < 1e-3 and below < 1e-3


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float16")])
def test_16_bits_are_near(tmp_path, family, dtype):
    """Products of f16 weights round the other side too, so that ties may fall otherwise."""
    model = tiny.save(tmp_path, family, "qwen2", dtype=dtype)
    assert gguf_file.to_gguf(tmp_path, tmp_path / "m.gguf", "f16") == []
    apart, below = furthest(tmp_path / "m.gguf", tmp_path, model)
    assert apart < 0.1 and below < 0.2


@pytest.mark.parametrize(("quantisation", "most"), [("q8_0", 3.0), ("q4_0", 30.0)])
def test_blocks_of_32_are_quantised_and_the_rest_is_told(tmp_path, quantisation, most):
    from gguf import GGUFReader

    model = tiny.save(tmp_path, "llama", "gpt-2", intermediate_size=80)
    kept = gguf_file.to_gguf(tmp_path, tmp_path / "m.gguf", quantisation)
    assert kept == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"], "rows of 80 are no multiple of 32"
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == quantisation.upper()
    apart, _ = furthest(tmp_path / "m.gguf", tmp_path, model)
    assert 1e-3 < apart < most


def test_what_can_not_be_written_is_told_at_once_and_nothing_is(tmp_path):
    phi, llama = tmp_path / "phi", tmp_path / "llama"
    tiny.save(phi, "phi", "gpt-2")
    with pytest.raises(UserError, match="no GGUF of architecture phi; it is made of llama, qwen2, qwen3"):
        gguf_file.to_gguf(phi, phi / "m.gguf", "f16")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny.save(llama, "llama", "bert", hidden_act="gelu", rope_parameters=rope)
    with pytest.raises(UserError) as caught:
        gguf_file.to_gguf(llama, llama / "m.gguf", "f16")
    told = "\n".join(caught.value.problems)
    assert re.search("rotary embedding dynamic", told) and "activation gelu" in told and "its tokenizer" in told
    assert len(caught.value.problems) == 3 and not [*llama.glob("m.*"), *phi.glob("m.*")]


def test_the_first_token_is_not_written_twice_nor_where_training_had_none(tmp_path):
    """A tokenizer that begins every text with a token of its own, under a template that does so or does not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "it's 2024"}]
    for begins in (True, False):
        folder = tmp_path / str(begins)
        template = ("{{ bos_token }}" if begins else "User: ") + "{{ messages[0]['content'] }}\n"
        tiny.save(folder, "llama", "gpt-2", template=template)
        words = AutoTokenizer.from_pretrained(folder)
        words.backend_tokenizer.post_processor = TemplateProcessing(
            "<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
        )
        words.save_pretrained(folder)
        gguf_file.to_gguf(folder, folder / "m.gguf", "f16")
        trained = words.apply_chat_template(messages, tokenize=False)
        ids = words.encode(trained, add_special_tokens=False)
        with served(folder / "m.gguf") as ask:
            made = ask("/v1/chat/completions", messages=messages, max_tokens=1)
            assert made["usage"]["prompt_tokens"] == len(ids)


def test_a_model_in_this_process_may_take_its_time(tmp_path):
    """Its calls queue for the cores: sixteen long prompts may take longer than a server's silence should last."""
    tiny.save(tmp_path, "llama", "smollm")
    gguf_file.to_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    ledger, cache = Ledger(LimitsSection(timeout_seconds=0.001)), Cache(tmp_path / "calls.sqlite")

    async def ask():
        name = str(tmp_path / "m.gguf")
        async with opened.open_model(Recipe(), name, ledger, cache, context_tokens=128) as caller:
            return await caller.complete([Message(role="user", content="a")], max_tokens=64, temperature=1.0, seed=0)

    assert asyncio.run(ask()).usage["completion"] > 0


@pytest.mark.parametrize("by_file", [False, True])
def test_a_temperature_cuts_nothing_away(tmp_path, by_file):
    """At a high one, first tokens of 120 answers: of the 400 that there are, llama.cpp's own top-k leaves 40."""
    tiny.save(tmp_path, "llama", "smollm")
    gguf_file.to_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    asked = [Message(role="user", content="a")]

    async def ask():
        opening = (
            embedded.serve_gguf(tmp_path / "m.gguf", context_tokens=64, slots=4)
            if by_file
            else embedded.serve(tmp_path, name="m", quantisation="f32", context_tokens=64, slots=4)
        )
        async with opening as model:
            sent = model.sent(asked)
            calls = (model.attempt(sent, asked, max_tokens=1, temperature=90.0, seed=n) for n in range(120))
            return await asyncio.gather(*calls)

    assert len({made.text for made in asyncio.run(ask())}) > 45


def test_a_template_learns_of_think_tags_once_and_writes_the_same_prompts():
    from transformers import AutoTokenizer  # noqa: F401 - jinja as transformers runs it
    from transformers.utils.chat_template_utils import render_jinja_template

    told = gguf_file.parted(tiny.CHATML)
    assert told != tiny.CHATML and gguf_file.parted(told) == told
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def render(template: str, messages: list) -> str:
        [text], _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        return text

    assert render(told, talk) == render(tiny.CHATML, talk)
    thought = [talk[0], talk[1] | {"reasoning_content": "r"}, talk[2]]
    assert render(told, thought) == render(tiny.CHATML, talk), "an earlier turn's reasoning is left out"
    assert "<think>\nr\n</think>\n\nb" in render(told, thought[:2])
