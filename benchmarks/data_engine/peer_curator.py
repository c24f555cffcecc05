"""bespokelabs-curator: one LLM over the prompts, then one over three rows an answer, as its documentation does it.

The endpoint is given as a hosted vLLM server through its litellm backend. Rate limits are raised out of the way; its
own cache and its viewer are off by the environment. It makes one call of its own for each LLM, to read rate limits.
"""

import task
from bespokelabs import curator

GIVEN = task.arguments()


def backend() -> dict:
    return {
        "base_url": GIVEN.address,
        "max_concurrent_requests": GIVEN.concurrency,
        "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 10_000_000_000,
        "require_all_responses": True,
    }


class Teacher(curator.LLM):
    def prompt(self, row: dict) -> str:
        return task.teacher(row["prompt"])

    def parse(self, row: dict, response: str) -> dict:
        return {"prompt": row["prompt"], "answer": response}


class Judge(curator.LLM):
    def prompt(self, row: dict) -> str:
        return task.judge(row["prompt"], row["answer"], row["run"])

    def parse(self, row: dict, response: str) -> dict:
        return {"verdict": response}


def model(kind: type[curator.LLM]) -> curator.LLM:
    return kind(
        model_name="hosted_vllm/m",
        backend="litellm",
        backend_params=backend(),
        generation_params={"max_tokens": task.MAX_TOKENS},
    )


answers = model(Teacher)([{"prompt": prompt} for prompt in task.prompts(GIVEN.prompts)]).dataset
rows = [{"prompt": row["prompt"], "answer": row["answer"], "run": run} for row in answers for run in task.READINGS]
verdicts = model(Judge)(rows).dataset
task.report(GIVEN.prompts, answers["answer"], verdicts["verdict"])
