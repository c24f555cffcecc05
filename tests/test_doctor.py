"""`delib doctor`: what it finds of a machine, of endpoints and of GPUs, and that no secret is told."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from delib import doctor
from delib import recipe as recipes
from delib.judges import encoder
from delib.models import opened, weights

SECRET = "sk-verysecret-0123456789"


@contextmanager
def serving(status: int, body: bytes = b"", seconds: float = 0, times: int = 1) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that gives one reply to everything, its body so many times over; its address, and the paths and keys
    that it was asked with."""
    asked: list[str] = []
    late = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
            late.wait(seconds)
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            for _ in range(times):
                try:
                    self.wfile.write(body)
                except OSError:  # the other side has closed
                    return

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        late.set()
        server.shutdown()
        server.server_close()


def listing(*names: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()


def about(found: list[doctor.Finding], what: str) -> list[doctor.Finding]:
    return [finding for finding in found if finding.about == what]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any key or address."""
    for name in list(doctor.os.environ):
        if doctor.SECRET.search(name):
            monkeypatch.delenv(name)


def test_a_package_that_does_not_fit_is_told_with_its_mend(monkeypatch):
    real = metadata.version
    found = {"trl": "0.9.0", "inspect-ai": None, "xllamacpp": "2999.1"}

    def version(name: str) -> str:
        if name in found and found[name] is None:
            raise metadata.PackageNotFoundError(name)
        return found.get(name) or real(name)

    before = doctor.environment()
    assert {f.level for f in before} == {"ok"}
    assert {"Python", "delib", *doctor.SHOWN} <= {f.about for f in before}
    monkeypatch.setattr(metadata, "version", version)
    after = doctor.environment()
    [trl], [inspect], [served] = about(after, "trl"), about(after, "inspect-ai"), about(after, "xllamacpp")
    assert trl.level == "problem" and "0.9.0; delib needs ==1.16.0; pip install 'trl==1.16.0'" in trl.text
    assert inspect.level == "problem" and "not installed; pip install 'inspect-ai>=" in inspect.text
    assert served == doctor.Finding("ok", "xllamacpp", "2999.1")


@pytest.mark.parametrize(
    ("status", "body", "key", "level", "said"),
    [
        (200, listing("other", "m"), SECRET, "ok", "answers, and lists it"),
        (200, listing("a\x1b[31m", "b"), None, "note", "does not list m; it lists a[31m, b"),
        (200, b"<html>", None, "note", "lists no models (200)"),
        (200, b'{"data": [1]}', None, "note", "lists no models (200)"),
        (404, b"", None, "note", "lists no models (404)"),
        (302, b"", SECRET, "note", "lists no models (302)"),
        (401, b"", SECRET, "problem", "the key was refused (401); set MY_LAB_API_KEY"),
        (401, b"", None, "problem", "it wants a key (401)"),
        (503, b"", None, "problem", "it answers 503"),
    ],
)
def test_an_endpoint_is_asked_for_its_models_and_nothing_else(monkeypatch, bare, status, body, key, level, said):
    with serving(status, body) as (address, asked):
        monkeypatch.setenv("MY_LAB_BASE_URL", address)
        if key:
            monkeypatch.setenv("MY_LAB_API_KEY", key)
        found = doctor.reached("openai-api/my-lab/m")
    assert found.level == level and said in found.text
    assert asked == [f"GET /v1/models {f'Bearer {key}' if key else None}"]


def test_an_endpoint_that_hardly_ends_is_read_no_further_than_a_list_may_be_long(monkeypatch, bare):
    names = [f"model-{n}" for n in range(400)]
    rows = [{"id": name, "description": "d" * 1500} for name in [*names, "m"]]
    with serving(200, json.dumps({"data": rows}).encode()) as (address, _):
        monkeypatch.setenv("MOCK_BASE_URL", address)
        assert doctor.reached("openai-api/mock/m").level == "ok", "half a MiB is a list"
    monkeypatch.setattr(doctor, "SECONDS", 20)
    with serving(200, b"x" * 2**16, times=1024) as (address, _):
        monkeypatch.setenv("MOCK_BASE_URL", address)
        found = doctor.reached("openai-api/mock/m")
    assert found.level == "note" and "lists more than 4 MiB; whether it has this one" in found.text


def test_an_endpoint_that_is_not_there_or_hangs_is_a_problem(monkeypatch, bare):
    with serving(200) as (address, _):
        pass
    monkeypatch.setenv("MOCK_BASE_URL", address)
    dead = doctor.reached("openai-api/mock/m")
    assert dead.level == "problem" and "nothing answers" in dead.text and "mend MOCK_BASE_URL" in dead.text
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    with serving(200, seconds=10) as (address, _):
        slow = asyncio.run(doctor.asked("openai-api/mock/m", address, None, "m", "MOCK"))
    assert slow.level == "problem" and "no reply within 0.2 s" in slow.text


def test_no_secret_is_told(monkeypatch, bare, tmp_path):
    values = {
        "OPENAI_API_KEY": SECRET,
        "MOCK_API_KEY": f"{SECRET[::-1]}\n",
        "HF_TOKEN": "hf_alsosecret",
        "MOCK_BASE_URL": "ftp://user:hunter22@host/v1",
        "FAR_BASE_URL": "http://user:hunter33@127.0.0.1:9/v1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "judge: openai-api/mock/m\ngenerate: {teacher: openai-api/far/m}\nevaluate: {second_judge: openai-api/none/m}\n"
    )
    found = doctor.examine(recipe)
    told = doctor.report(found)
    for part in (SECRET, SECRET[::-1], "hf_alsosecret", "hunter22", "hunter33"):
        assert part not in told
    assert about(found, "keys")[0].text == "set: OPENAI_API_KEY, HF_TOKEN, FAR_BASE_URL, MOCK_API_KEY, MOCK_BASE_URL"
    assert "ANTHROPIC_API_KEY" in about(found, "keys")[1].text
    assert [f.level for f in about(found, "MOCK_API_KEY")] == ["problem"]
    assert "MOCK_BASE_URL must begin with http://" in about(found, "judge")[0].text
    assert "nothing answers" in about(found, "generate.teacher")[0].text
    assert "set NONE_BASE_URL" in about(found, "evaluate.second_judge")[0].text
    assert doctor.hidden(f"a provider that says {SECRET} aloud") == "a provider that says [OPENAI_API_KEY] aloud"


def missing() -> frozenset[str]:
    raise ModuleNotFoundError("No module named 'inspect_ai'", name="inspect_ai")


def test_a_recipe_is_looked_at_whole(bare, tmp_path, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: ./nothing\ngenerate: {teacher: ./none.gguf}\njudge: nobody/has-this\n")
    found = {f.about: f for f in doctor.needed(recipes.load(recipe))}
    assert found["model"].level == "problem" and "no such model" in found["model"].text
    assert found["generate.teacher"].level == "problem" and "no such GGUF file" in found["generate.teacher"].text
    assert found["judge"].level == "note" and "not in the hub's cache" in found["judge"].text
    recipe.write_text("model: google/gemma-none\n")
    student = {f.about: f for f in doctor.needed(recipes.load(recipe))}["model"]
    assert student.level == "note" and "not in the hub's cache" in student.text, "what is trained is no provider's"
    monkeypatch.setattr(opened, "providers", missing)
    recipe.write_text("judge: anthropic/x\n")
    lost = {f.about: f for f in doctor.needed(recipes.load(recipe))}["judge"]
    assert lost.level == "problem" and "inspect_ai is missing" in lost.text
    recipe.write_text("sft: {epochs: 0}\ncolour: red\n")
    wrong = [f for f in doctor.examine(recipe) if f.about == "recipe"]
    assert [f.level for f in wrong] == ["problem", "problem"]


def test_training_is_held_against_the_smallest_gpu(monkeypatch, tiny_model, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tiny_model}\ndevice: cuda\nsft: {{max_tokens: 4096, batch_size: 64}}\n")
    loaded = recipes.load(recipe)
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    assert [f.level for f in doctor.fit(loaded)] == ["problem"]
    config = doctor._config(str(tiny_model))
    needs = sum(doctor.footprint.estimate(loaded, config, "sft")) / 2**30
    levels = []
    for size in (needs * 2, needs * 1.05, needs * 0.5):
        monkeypatch.setattr(doctor, "gpus", lambda size=size: [("big", 1e6), ("small", size)])
        levels.append(doctor.fit(loaded)[0].level)
    assert levels == ["ok", "note", "problem"]
    assert doctor.fit(recipes.load(recipe, ["device=cpu"])) == []
    monkeypatch.setattr(doctor, "_config", lambda _: transformers.T5Config())
    assert [(f.level, f.text) for f in doctor.fit(loaded)] == [
        ("note", "not estimated; model: t5 is no causal language model; name one that is")
    ] * 2
    monkeypatch.setattr(doctor, "_config", lambda _: config)
    monkeypatch.setattr(doctor, "gpus", lambda: [("big", 1e6)])
    (tmp_path / "two.yaml").write_text("num_processes: 2\ndistributed_type: MULTI_GPU\n")
    several = doctor.fit(recipes.load(recipe, ["accelerate=two.yaml"]))
    assert [f.about for f in several if f.level == "problem"] == ["accelerate"]


def test_what_is_missing_in_the_cache_is_a_note_and_a_full_disk_too(monkeypatch, tmp_path):
    monkeypatch.setenv("DELIB_CACHE", str(tmp_path))
    assert [f.level for f in doctor.pulled()] == ["note", "note"]
    for folder, last in doctor.PULLED.values():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / last).touch()
    assert [f.level for f in doctor.pulled()] == ["ok", "ok"]
    assert weights.pull_smollm2() == tmp_path / doctor.PULLED["smollm2"][0], "the cache's layout is that of the code"
    assert encoder.pull() == tmp_path / doctor.PULLED["sentence encoder"][0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "free_megabytes", lambda place: doctor.NEEDED_MEGABYTES - 1)
    assert [f.level for f in doctor.disk()] == ["ok", "note"]
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: Path(place) != tmp_path)
    assert [f.level for f in doctor.disk()] == ["problem", "problem"]


def test_the_command_ends_with_2_when_there_is_something_to_mend(monkeypatch, tmp_path):
    from delib.cli import app

    monkeypatch.setattr(doctor, "examine", lambda recipe, overrides: [doctor.Finding("note", "a", "b")])
    sound = CliRunner().invoke(app, ["doctor"])
    assert sound.exit_code == 0 and sound.stdout == "note     a b\nNo problems.\n"
    monkeypatch.setattr(doctor, "examine", lambda recipe, overrides: [doctor.Finding("problem", "a", "b")])
    broken = CliRunner().invoke(app, ["doctor", "quickstart"])
    assert broken.exit_code == 2 and broken.stdout.endswith("1 problem to mend.\n")
