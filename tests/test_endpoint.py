"""The mock endpoint that other tests and the benchmarks stand on: its shape, its faults, its log."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "endpoint.py"
PASSING = {"429-after", "429", "500", "reset", "hang", "half", "not-json", "no-choices"}


@contextmanager
def endpoint(*options: str) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, SCRIPT, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.kill()
        process.communicate()


def body(text: str) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()


def asked(base_url: str, bodies: list[bytes]) -> list[tuple[str, Any]]:
    """What came of each body, all sent at once: status (and "after") or the error's name, and the JSON if any."""
    import aiohttp

    async def one(session: aiohttp.ClientSession, sent: bytes) -> tuple[str, Any]:
        try:
            async with session.post(f"{base_url}/chat/completions", data=sent) as response:
                mark = f"{response.status}" + (" after" if "Retry-After" in response.headers else "")
                return mark, json.loads(await response.read())
        except (aiohttp.ClientError, json.JSONDecodeError) as error:
            return type(error).__name__, None

    async def every() -> list[tuple[str, Any]]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(one(session, sent) for sent in bodies))

    return asyncio.run(every())


def got(base_url: str, path: str) -> Any:
    import aiohttp

    async def fetch() -> Any:
        async with aiohttp.ClientSession() as session, session.get(base_url.removesuffix("/v1") + path) as response:
            return await response.json()

    return asyncio.run(fetch())


def test_a_reply_has_openais_shape_and_follows_from_the_body() -> None:
    with endpoint() as url:
        (status, first), (_, again), (_, other) = asked(url, [body("a"), body("a"), body("b")])
        stats = got(url, "/stats")
        assert got(url, "/v1/models")["data"][0]["id"] == "m"
    assert status == "200" and first == again and first != other
    assert first["object"] == "chat.completion" and first["model"] == "m" and first["usage"]["completion_tokens"] > 0
    choice = first["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["role"] == "assistant"
    reasoning, answer = choice["message"]["content"].removeprefix("<think>\n").split("\n</think>\n\n")
    assert len(reasoning.split()) == 40 and len(answer.split()) == 60
    assert stats["calls"] == stats["successes"] == 3
    assert sorted(seen["asked"] for seen in stats["bodies"].values()) == [1, 2]


def test_a_judge_gets_a_verdict_and_reasoning_can_have_its_field() -> None:
    parts = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": 'give "correctness"'}]}]}
    with endpoint("--reasoning", "field") as url:
        replies = asked(url, [body('Reply with JSON: {"correctness": 0-10}'), json.dumps(parts).encode(), body("a")])
        (_, unseen), *_ = asked(url, [body('{"correctness": 0, "style": 0}')])
    assert {"correctness", "style"} < json.loads(unseen["choices"][0]["message"]["content"]).keys()
    judged, in_parts, taught = (reply["choices"][0]["message"] for _, reply in replies)
    for said in (judged, in_parts):
        verdict = json.loads(said["content"])
        criteria = [verdict[name] for name in ("correctness", "helpfulness", "compliance", "reasoning_quality")]
        assert all(type(grade) is int and 0 <= grade <= 10 for grade in criteria)
        assert verdict["behaviour"] in {"comply", "refuse", "partial", "safe_complete"} and verdict["reason"]
    assert len(taught["reasoning_content"].split()) == 40 and len(taught["content"].split()) == 60


def test_faults_follow_from_body_attempt_and_seed_and_pass(tmp_path: Path) -> None:
    bodies = [body(f"prompt {n}") for n in range(200)]
    logs = []
    for name, order in (("first", bodies), ("second", bodies[::-1])):
        log = tmp_path / name
        with endpoint("--faults", "0.3", "--seed", "1", "--hang", "0.05", "--log", str(log)) as url:
            tries = [asked(url, order) for _ in range(3)]
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
        assert all(status == "200" and reply["choices"] for status, reply in tries[2])
    kinds, again = ({(line["body"], line["attempt"]): line["kind"] for line in log} for log in logs)
    assert kinds == again and len(kinds) == len(logs[0]) == 600
    failing = [kind for (_, attempt), kind in kinds.items() if attempt == 1 and kind != "ok"]
    assert 40 < len(failing) < 80 and set(failing) == PASSING
    assert 0 < sum(kind != "ok" for (_, attempt), kind in kinds.items() if attempt == 2) < len(failing)
    heard = {status for status, _ in tries[0]}
    assert {"429", "429 after", "500", "JSONDecodeError", "ClientPayloadError"} <= heard
    assert {"ServerDisconnectedError", "ClientOSError"} <= heard


def test_lasting_faults_last_and_a_dead_endpoint_says_so() -> None:
    bodies = [body(f"prompt {n}") for n in range(100)]
    with endpoint("--lasting", "0.2") as url:
        tries = [[status for status, _ in asked(url, bodies)] for _ in range(4)]
    assert tries[0] == tries[1] == tries[2] == tries[3]
    assert 8 < sum(status != "200" for status in tries[0]) < 35 and set(tries[0]) == {"200", "400", "500"}
    with endpoint("--dead") as url:
        assert {status for status, _ in asked(url, bodies[:5])} == {"503"}


def test_concurrency_is_seen_and_a_call_whose_asker_left_is_not_finished(tmp_path: Path) -> None:
    import aiohttp

    log = tmp_path / "log"

    async def leave(url: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.1)) as session:
            try:
                await session.post(f"{url}/chat/completions", data=body("left"))
            except TimeoutError:
                await asyncio.sleep(0.3)

    with endpoint("--latency", "0.2", "--log", str(log)) as url:
        asked(url, [body(f"prompt {n}") for n in range(30)])
        stats = got(url, "/stats")
        asyncio.run(leave(url))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert stats["concurrent_max"] == 30 and stats["concurrent_mean"] > 20 and stats["seconds"] < 2
    assert [line["kind"] for line in lines] == ["ok"] * 30 + ["gone"]
