"""The limit: an asyncio loop over aiohttp that keeps nothing but the texts. No cache, no retries, no records."""

import asyncio
import json

import aiohttp
import task


async def main() -> None:
    given = task.arguments()
    prompts = task.prompts(given.prompts)
    places = asyncio.Semaphore(given.concurrency)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer mock"}

    async def asked(session: aiohttp.ClientSession, text: str) -> str:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": task.MAX_TOKENS}
        async with places, session.post(f"{given.address}/chat/completions", data=json.dumps(body).encode()) as reply:
            return str(json.loads(await reply.read())["choices"][0]["message"]["content"])

    async def one(session: aiohttp.ClientSession, prompt: str) -> tuple[str, list[str]]:
        answer = await asked(session, task.teacher(prompt))
        runs = (asked(session, task.judge(prompt, answer, run)) for run in task.READINGS)
        return answer, await asyncio.gather(*runs)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        done = await asyncio.gather(*(one(session, prompt) for prompt in prompts))
    task.report(given.prompts, (answer for answer, _ in done), (verdict for _, runs in done for verdict in runs))


asyncio.run(main())
