"""What training cost in knowledge: multiple-choice questions, answered by the likelihood of each option's text.

    python benchmarks/capability.py FILE MODEL [MODEL ...]

FILE is a CSV with the columns `prompt` (a question, an empty line, then four lines "A. …" to "D. …") and `answer` (the
letter), such as MMLU in that layout. A MODEL is what `delib eval --model` takes; the first is the one the others are
compared with, question by question. The score of an option is its log-likelihood after "Question: … Answer:" for each
of its characters, with no chat template and no reasoning: chance is 0.25, and a model that reads letters at chance can
still be above it. 300 questions are drawn with a fixed seed.
"""

import csv
import random
import re
import sys
from pathlib import Path

from delib.models.weights import resolve
from delib.progress import bar
from delib.stats import bootstrap, paired

QUESTIONS = 300
LAYOUT = re.compile(r"(.*)\n\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)", re.S)


def drawn(path: Path) -> list[tuple[str, list[str], int]]:
    """Question, its four options, and which of them is right."""
    with path.open(encoding="utf-8", newline="") as lines:
        found = [(LAYOUT.fullmatch(r["prompt"].strip()), r["answer"].strip()) for r in csv.DictReader(lines)]
    rows = [(m.group(1), list(m.groups()[1:]), "ABCD".index(right)) for m, right in found if m]
    return random.Random(0).sample(rows, min(QUESTIONS, len(rows)))


def answered(name: str, rows: list[tuple[str, list[str], int]]) -> list[float]:
    """1 for each question whose right option is the likeliest, else 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = []
    with bar(name, len(rows)) as ticker, torch.inference_mode():
        for question, options, answer in rows:
            asked = tokenizer.encode(f"Question: {question}\nAnswer:")
            whole = [tokenizer.encode(f"Question: {question}\nAnswer: {option}") for option in options]
            said = [ids[len(asked) :] for ids in whole]
            width = max(map(len, whole))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in whole])
            likely = model(input_ids=ids).logits[:, len(asked) - 1 : -1].log_softmax(-1)
            scores = [
                sum(likely[n, k, token].item() for k, token in enumerate(tokens)) / len(options[n])
                for n, tokens in enumerate(said)
            ]
            right.append(float(scores.index(max(scores)) == answer))
            ticker.step()
    return right


def main(path: Path, models: list[str]) -> None:
    rows = drawn(path)
    first: list[float] = []
    for name in models:
        right = answered(name, rows)
        value, low, high = bootstrap(right)
        print(f"{name}: {value:.3f} ({low:.3f} to {high:.3f}), {len(rows)} questions")
        if first:
            value, low, high = paired(first, right)
            print(f"  against {models[0]}: {value:+.3f} ({low:+.3f} to {high:+.3f})")
        first = first or right


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
