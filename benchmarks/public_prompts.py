"""Public benchmark prompts as files that `delib eval` takes. The sets are read from where you keep them.

    python benchmarks/public_prompts.py FOLDER OUT

FOLDER holds the published files, each in a folder of its own: `jailbreakbench/jailbreakbench_raw.csv` (100 harmful)
and `jailbreakbench/benign_behaviors.csv` (100 benign), `harmbench_val/harmbench_behaviors_text_val.csv`,
`cyberseceval/mitre_frr.json`, `gsm8k/test_first400.jsonl`. OUT gets a JSON-lines file a set. `source` says whether the
starter's policy has a clause for the subject (`inside`) or not (`outside`): the policy knows nothing of disinformation,
gambling or copyright, so that a model which follows it need not refuse those. Copyright rows of HarmBench are left out.
Of the cyber set, whose prompts are all benign, 150 are drawn with a fixed seed, and of GSM8K's questions, everyday ones
with a known answer (`source` plain), 100.
"""

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

OUTSIDE = {"Disinformation", "Economic harm", "misinformation_disinformation"}
"""Categories, by the sets' own names, for which the starter's policy has no clause."""
CYBER = 150
SUMS = 100


def row(ident: str, text: str, behaviour: str, category: str) -> dict[str, Any]:
    place = "outside" if category in OUTSIDE else "inside"
    return {
        "id": ident,
        "messages": [{"role": "user", "content": text}],
        "behaviour": behaviour,
        "source": f"{place}-{behaviour}",
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return [{k.lower(): v for k, v in found.items()} for found in csv.DictReader(lines)]


def jailbreakbench(folder: Path) -> list[dict[str, Any]]:
    """Harmful ones to refuse, their benign twins to comply with."""
    made = []
    for kind, behaviour, file in (
        ("harmful", "refuse", "jailbreakbench_raw.csv"),
        ("benign", "comply", "benign_behaviors.csv"),
    ):
        for number, found in enumerate(read_csv(folder / "jailbreakbench" / file)):
            made.append(row(f"jbb-{kind}-{number:03}", found["goal"], behaviour, found["category"]))
    return made


def harmbench(folder: Path) -> list[dict[str, Any]]:
    """The text behaviours of the validation split, context before the request."""
    found = read_csv(folder / "harmbench_val" / "harmbench_behaviors_text_val.csv")
    return [
        row(
            f"harmbench-{r['behaviorid']}",
            "\n\n".join(filter(None, (r["contextstring"], r["behavior"]))),
            "refuse",
            r["semanticcategory"],
        )
        for r in found
        if r["functionalcategory"] != "copyright"
    ]


def cyber(folder: Path) -> list[dict[str, Any]]:
    """Benign requests on security, to comply with."""
    found = json.loads((folder / "cyberseceval" / "mitre_frr.json").read_text(encoding="utf-8"))
    drawn = sorted(random.Random(0).sample(range(len(found)), CYBER))
    return [row(f"cyber-{n:03}", found[n]["mutated_prompt"], "comply", "cyber") for n in drawn]


def gsm8k(folder: Path) -> list[dict[str, Any]]:
    """School sums; the number after `####` has to stand in the answer, with or without commas, wherever it stands."""
    found = [json.loads(x) for x in (folder / "gsm8k" / "test_first400.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = sorted(random.Random(0).sample(range(len(found)), SUMS))
    sums = {n: int(found[n]["answer"].rpartition("####")[2].replace(",", "")) for n in drawn}
    return [
        {
            "id": f"gsm8k-{n:03}",
            "messages": [{"role": "user", "content": found[n]["question"]}],
            "behaviour": "comply",
            "source": "plain",
            "expected": sorted({str(number), f"{number:,}"}),
        }
        for n, number in sums.items()
    ]


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, read in (
        ("jailbreakbench", jailbreakbench),
        ("harmbench", harmbench),
        ("cyber", cyber),
        ("gsm8k", gsm8k),
    ):
        rows = read(folder)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        print(f"{out / name}.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
