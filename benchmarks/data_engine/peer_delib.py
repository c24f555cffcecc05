"""delib: `delib run RECIPE --to filter` with the endpoint as teacher and as judge, in a folder and cache of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import task

CATEGORY = "violence"  # of the starter spec: its excerpt has 10,500 characters

given = task.arguments()
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    rows = [
        {"messages": [{"role": "user", "content": prompt}], "category": CATEGORY}
        for prompt in task.prompts(given.prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "benchmark",
        "prompts": {"train": "prompts.jsonl"},
        "generate": {"teacher": "openai-api/mock/m", "samples": 1, "max_tokens": task.MAX_TOKENS},
        "judge": "openai-api/mock/m",
        "filter": {"runs": task.RUNS},
        "limits": {"concurrency": given.concurrency},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    environment = os.environ | {
        "DELIB_CACHE": str(folder / "cache"),
        "MOCK_BASE_URL": given.address,
        "MOCK_API_KEY": "mock",
    }
    delib = Path(sys.executable).parent / "delib"
    command = [str(delib), "run", str(folder / "recipe.yaml"), "--to", "filter", "--out", str(folder / "run")]
    run = subprocess.run(command, env=environment, cwd=folder, stdout=sys.stderr)
    if run.returncode:
        raise SystemExit(run.returncode)

    def samples() -> Iterator[dict[str, Any]]:
        """One by one: what is held here would count as delib's memory."""
        with (folder / "run" / "filter" / "records.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    verdicts = (json.dumps(v["criteria"]) for sample in samples() for v in sample["verdicts"] if v["criteria"])
    task.report(given.prompts, (sample["completion"]["answer"] for sample in samples()), verdicts)
