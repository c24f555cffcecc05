"""`delib serve`: one model as an OpenAI-compatible server, its reasoning in a field of its own, until Ctrl-C.

On a CPU llama.cpp serves model folders (as the GGUF that evaluate makes and caches) and GGUF files; on a GPU it is
`vllm serve`, which was never run here. What an answer's `reasoning_content` holds is what `chat.py` parts, an answer
cut off in its reasoning included: its `content` is empty. vLLM's field is called `reasoning`, and an answer without
think tags stands in it as a whole.
"""

import errno
import importlib.util
import json
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Literal

from delib.chat import CLOSE, OPEN
from delib.errors import StageError, UserError
from delib.models import embedded, gguf_file, opened, weights
from delib.opener import recipe_of

SLOTS = 4
"""Requests that are answered side by side; further ones wait."""


def serve(model: str, host: str, port: int, context_tokens: int, device: Literal["cpu", "cuda"]) -> None:
    """Serve until Ctrl-C. `context_tokens`: room for prompt and completion of one request.

    Raises UserError, before a model is loaded, for a model that can't be served and for an address that can't be had.
    """
    if not opened.on_hub(model):
        if opened.is_hosted(model):
            raise UserError(f"{model}: is served elsewhere already; name a checkpoint folder, a hub id or a GGUF file")
        opened.check(model)
    _check_free(host, port)
    if device == "cuda":
        _vllm(model, host, port, context_tokens)
        return
    server = start(model, host, port, context_tokens)
    try:
        print(told(server.listening_address, name_of(model)), flush=True)
        threading.Event().wait()
    finally:
        del server


def name_of(model: str) -> str:
    """What clients call it: RUN-STAGE for a run's checkpoint, else the name of the file or folder, or the hub id."""
    place = Path(model).resolve()
    if not place.exists():
        return model
    if place.name == "checkpoint":
        return f"{place.parents[1].name}-{place.parent.name}"
    return place.stem if place.is_file() else place.name  # a folder's may hold dots


def _check_free(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; name an address of this machine") from None
    except OSError as error:
        mend = "name another" if error.errno == errno.EADDRINUSE else "name another, or another --host"
        raise UserError(f"--port {port}: {error.strerror} on {host}; {mend}") from None


def start(model: str, host: str, port: int, context_tokens: int) -> Any:
    """A running llama.cpp server, which ends with the object."""
    import gguf
    import xllamacpp

    if model.endswith(".gguf"):
        file = Path(model)
    else:
        file = embedded.gguf_of(weights.resolve(model), recipe_of(model).evaluate.quantisation)
    try:
        fields = gguf.GGUFReader(file).fields
    except ValueError as error:
        raise UserError(f"{file}: no GGUF file ({error}); name another") from None
    template, family = fields.get("tokenizer.chat_template"), fields.get("general.architecture")
    length = fields.get(f"{family.contents()}.context_length") if family is not None else None
    if template is None or length is None:
        problems = []
        if template is None:
            problems.append(f"{model}: holds no chat template, so that nothing can be asked of it; name another")
        if length is None:
            problems.append(f"{model}: does not tell its context length, which llama.cpp must know; name another")
        raise UserError(problems)
    params = embedded.parameters(file, min(context_tokens, int(length.contents())), SLOTS)
    params.hostnames, params.port, params.model_alias = [host], port, {name_of(model)}
    params.cache_ram_mib = embedded.PAST
    params.use_jinja = True
    params.chat_template = gguf_file.parted(str(template.contents()))
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_DEEPSEEK
    try:
        return embedded.started(params)
    except RuntimeError as error:
        raise UserError(f"{model}: llama.cpp does not take it, or has no room for it ({error})") from error


def _vllm(model: str, host: str, port: int, context_tokens: int) -> None:
    command = shutil.which("vllm")
    if command is None or importlib.util.find_spec("vllm") is None:
        raise UserError("--device cuda: serving on a GPU is vLLM's; 'pip install vllm', or leave --device out")
    if model.endswith(".gguf"):
        raise UserError(f"{model}: on a GPU a model folder is served; name the folder, or leave --device out")
    from transformers import AutoTokenizer

    folder = weights.resolve(model)
    made_for = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    room = min(context_tokens, made_for or context_tokens)
    if not {OPEN, CLOSE} <= set(AutoTokenizer.from_pretrained(folder).get_vocab()):
        raise UserError(
            f"{model}: {OPEN} and {CLOSE} are no tokens of it, and vLLM parts reasoning by tokens; leave --device out"
        )
    line = [command, "serve", str(folder), "--host", host, "--port", str(port), "--served-model-name", name_of(model)]
    print(told(f"http://{host}:{port}", name_of(model)), flush=True)
    code = subprocess.call([*line, "--max-model-len", str(room), "--reasoning-parser", "deepseek_r1"])
    if code != 0:
        raise StageError(f"vllm ended with exit code {code}; its own lines above say why")


def told(address: str, name: str) -> str:
    """The address, and a line to try it with."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "How do I boil an egg?"}]})
    return (
        f"{name}: {address}/v1 (Ctrl-C ends it)\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
