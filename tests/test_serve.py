"""`delib serve`: a real server whose reasoning comes back in its own field, and every way of not starting one.

A grammar makes a model of random weights write what a trained one would.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import tiny
from delib import chat, recipe, serving, talk
from delib import spec as specs
from delib.errors import UserError
from delib.opener import Opener
from delib.records import Message, Prompt, Sample

WRITTEN = 'root ::= "<think>\\nK1 decides.\\n</think>\\n\\nI am sorry."'
OPENED = 'root ::= "K1 decides.\\n</think>\\n\\nI am sorry."'
THINKS = tiny.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
OWN = tiny.CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
)
assert THINKS != tiny.CHATML != OWN


def ask(address: str, **more) -> urllib.request.addinfourl:
    body = {"messages": [{"role": "user", "content": "Which share?"}], "max_tokens": 80, "temperature": 0} | more
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=300)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """With merges, without which llama.cpp takes no tokenizer."""
    folder = tmp_path_factory.mktemp("merged")
    tiny.save(folder, "llama", "gpt-2")
    return folder


@pytest.mark.parametrize(
    ("template", "grammar"), [(tiny.CHATML, WRITTEN), (OWN, WRITTEN), (THINKS, OPENED)], ids=["silent", "own", "opens"]
)
@pytest.mark.parametrize("tokens", [False, True], ids=["text", "tokens"])
def test_reasoning_has_its_own_field(tmp_path, template, grammar, tokens):
    """Under a template that is silent about reasoning, one that renders it, and one that opens it; the tags plain text,
    or special tokens, which vanish from plain decoding."""
    from transformers import AutoTokenizer

    tiny.save(tmp_path, "llama", "gpt-2", template=template)
    if tokens:
        words = AutoTokenizer.from_pretrained(tmp_path)
        words.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        words.save_pretrained(tmp_path)
    server = serving.start(str(tmp_path), "127.0.0.1", 0, 256)
    address = server.listening_address
    made = json.loads(ask(address, grammar=grammar).read())
    whole = made["choices"][0]["message"]
    assert whole["reasoning_content"].strip() == "K1 decides." and whole["content"] == "I am sorry."
    assert (made["usage"]["completion_tokens"] < 30) == tokens, "the tags were written as tokens, or letter by letter"
    cut = json.loads(ask(address, grammar=grammar, max_tokens=12).read())["choices"][0]["message"]
    assert "K1 decides.".startswith(cut["reasoning_content"].strip()) and not cut["content"]
    del server


def streamed(address: str) -> tuple[str, str]:
    """Reasoning and answer put together from a stream's parts."""
    parts = {"reasoning_content": "", "content": ""}
    for line in ask(address, grammar=WRITTEN, stream=True).read().decode().splitlines():
        if line.startswith("data: {"):
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            for name in parts:
                parts[name] += delta.get(name) or ""
    return parts["reasoning_content"].strip(), parts["content"]


def test_the_command_serves_streams_and_ends_with_ctrl_c(tiny_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from delib.cli import main; main()", "serve", str(tiny_model)]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c, env=os.environ
    )
    try:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        assert first == f"{tiny_model.name}: {address}/v1 (Ctrl-C ends it)\n" and second.startswith(f"curl {address}")
        assert streamed(address) == ("K1 decides.", "I am sorry.")
        with urllib.request.urlopen(f"{address}/v1/models", timeout=300) as reply:
            assert json.loads(reply.read())["data"][0]["id"] == tiny_model.name
        with pytest.raises(UserError, match=rf"--port {port}: .* in use .*name another"):
            serving.serve(str(tiny_model), "127.0.0.1", port, 256, "cpu")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_ends_a_chat_that_waits_for_a_line(tiny_model):
    process = subprocess.Popen(
        [sys.executable, "-c", "from delib.cli import main; main()", "chat", str(tiny_model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=_heed_ctrl_c,
    )
    try:
        assert process.stdout is not None and process.stdout.read(5) == b"you> "
        time.sleep(2)  # between the prompt and the reading of the line a signal interrupts nothing
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()


def _heed_ctrl_c() -> None:
    """A test runner in the background may ignore it, which its processes would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("nowhere.gguf", {}, "no such GGUF file"),
        ("/nowhere", {}, "no such model"),
        ("openai-api/mock/m", {}, "is served elsewhere already"),
        ("smollm2", {"host": "no.such.host.invalid"}, "name an address of this machine"),
        ("smollm2", {"host": "192.0.2.1"}, "name another, or another --host"),
        ("smollm2", {"device": "cuda"}, "pip install vllm"),
        ("google/gemma-3-1b-it", {"device": "cuda"}, "pip install vllm"),
    ],
)
def test_what_can_not_be_served_is_one_clear_error(model, options, told):
    """A model of an owner whose name is a provider's too is a hub id here."""
    given = {"host": "127.0.0.1", "port": 0, "context_tokens": 256, "device": "cpu"} | options
    with pytest.raises(UserError, match=told):
        serving.serve(model, **given)


def test_a_file_that_is_no_gguf_or_has_no_template_is_told(tmp_path, monkeypatch):
    from delib.models import gguf_file

    monkeypatch.setenv("DELIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no GGUF file"):
        serving.start(str(tmp_path / "no.gguf"), "127.0.0.1", 0, 256)
    tiny.save(tmp_path / "m", "llama", "gpt-2", template="")
    gguf_file.to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")
    with pytest.raises(UserError, match="holds no chat template"):
        serving.start(str(tmp_path / "m.gguf"), "127.0.0.1", 0, 256)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'm'))}: holds no chat template"):
        serving.start(str(tmp_path / "m"), "127.0.0.1", 0, 256)


@pytest.mark.parametrize("family", ["llama", None])
def test_a_file_that_tells_no_context_length_is_told_with_all_else(tmp_path, family):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", family or "llama")
    if family is None:
        del writer.kv_data[0]["general.architecture"]
    writer.add_name("m")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="does not tell its context length") as caught:
        serving.start(str(tmp_path / "m.gguf"), "127.0.0.1", 0, 256)
    assert len(caught.value.problems) == 2 and "holds no chat template" in caught.value.problems[0]


def test_a_changed_tokenizer_config_or_template_makes_the_cached_file_anew(tmp_path, monkeypatch):
    import gguf

    from delib.models import embedded

    monkeypatch.setenv("DELIB_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path, "llama", "gpt-2")
    made = [embedded.gguf_of(tmp_path, "f16")]
    assert embedded.gguf_of(tmp_path, "f16") == made[0]
    template = tmp_path / "chat_template.jinja"
    template.write_text(OWN, encoding="utf-8")
    made.append(embedded.gguf_of(tmp_path, "f16"))
    assert gguf.GGUFReader(made[1]).fields["tokenizer.chat_template"].contents() == OWN
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
        made.append(embedded.gguf_of(tmp_path, "f16"))
    assert len(set(made)) == 4


def test_an_arm_has_room_for_all_that_evaluate_allows_and_a_cut_by_room_is_no_answer(tmp_path):
    """What ends for want of room is a failure that tells of it: counted as cut off it would be the model's."""
    folder = tmp_path / "model"
    tiny.save(folder, "llama", "smollm", max_position_embeddings=8192, eos_token_id=None)
    shutil.copy(folder / "config.json", folder / "vocab.gguf")  # marks what the server can run
    found = recipe.load(recipe.QUICKSTART, ["evaluate.max_tokens=1500", "evaluate.quantisation=f32"])
    opener = Opener(found, specs.load(recipe.path_of(found.spec)))

    async def answered(text):
        prompt = Prompt(id="a", messages=[Message(role="user", content=text)], split="heldout")
        sample = Sample(prompt=prompt, excerpt_id="e", completion=None)
        told = []
        async with opener.working("sft", folder) as work:
            await work(sample, told.append)
        return told[0]

    whole = asyncio.run(answered("Why?"))
    assert whole.completion.finish != "stop" and whole.completion.usage["completion"] == 1500
    short = asyncio.run(answered("9" * 1400))
    assert short.completion is None
    assert "of room ended before an answer of at most 1500 did, after a prompt of 14" in short.failure
    long = asyncio.run(answered("9" * 2600))
    assert "after a prompt of 26" in long.failure and "set engine to transformers" in long.failure


def test_on_a_gpu_vllm_is_asked(tmp_path, tiny_model, monkeypatch):
    """The command line alone: vLLM was never run here."""
    called = tmp_path / "called"
    fake = tmp_path / "vllm"
    fake.write_text(f'#!/bin/sh\necho "$@" > {called}\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="are no tokens of it"):
        serving.serve(str(tiny_model), "127.0.0.1", 0, 256, "cuda")
    folder = with_tags(tiny_model, tmp_path / "tagged")
    serving.serve(str(folder), "127.0.0.1", 0, 256, "cuda")
    line = called.read_text(encoding="utf-8").split()
    assert line[:2] == ["serve", str(folder)] and line[-2:] == ["--reasoning-parser", "deepseek_r1"]
    assert line[line.index("--max-model-len") + 1] == "256"
    most = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    serving.serve(str(folder), "127.0.0.1", 0, 10 * most, "cuda")
    line = called.read_text(encoding="utf-8").split()
    assert line[line.index("--max-model-len") + 1] == str(most), "vLLM takes no more than the model was made for"


def with_tags(model: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<think>", "</think>"])
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hidden", [False, True])
def test_chat_hides_the_reasoning_and_begins_with_the_system_message(monkeypatch, capsys, hidden):
    asked = []

    class Model:
        async def complete(self, messages, **given):
            asked.append([(m.role, m.content) for m in messages])
            return chat.completion("<think>\nK1 decides.\n</think>\n\nI am sorry.", sent="", model="m", cut=False)

    @asynccontextmanager
    async def opened(self, name, context_tokens, slots):
        assert slots == 1, "room for one call at once is all that a conversation needs"
        yield Model()

    lines = iter(["Which share?", "Why?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(talk.Opener, "any", opened)
    talk.chat("smollm2", 16, hide_reasoning=hidden, system="You work for a bank.")
    said = capsys.readouterr().out
    assert said.count("I am sorry.") == 2 and said.count("K1 decides.") == (0 if hidden else 2)
    system, first, answer, second = asked[1]
    assert system == ("system", "You work for a bank.") and first == ("user", "Which share?")
    assert answer == ("assistant", "I am sorry.") and second == ("user", "Why?")


def test_a_folder_is_called_by_its_whole_name(tmp_path):
    (tmp_path / "Qwen2.5-0.5B").mkdir()
    (tmp_path / "runs.v1" / "sft" / "checkpoint").mkdir(parents=True)
    (tmp_path / "m.q8.gguf").write_bytes(b"")
    assert serving.name_of(str(tmp_path / "Qwen2.5-0.5B")) == "Qwen2.5-0.5B"
    assert serving.name_of(str(tmp_path / "runs.v1" / "sft" / "checkpoint")) == "runs.v1-sft"
    assert serving.name_of(str(tmp_path / "m.q8.gguf")) == "m.q8" and serving.name_of("owner/name.1") == "owner/name.1"


def test_a_folder_is_no_file_for_figures(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        talk.evaluate_file("smollm2", tmp_path / "prompts.jsonl", tmp_path, None)
