"""A module imports only from floors below its own; stages never import each other; torch is never imported on top."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "delib"
FLOORS = [
    {"errors", "records", "stats"},
    {"spec", "run", "recipe", "chat", "progress", "sources", "overlap", "rendering", "storage"},
    {"models", "judges", "evals", "labelling", "authoring", "training", "made_with", "coverage"},
    {"stages"},
    {"opener", "on_ray", "remote", "life", "pack", "wiring", "reference", "view", "view_lives"},
    {"preflight"},
    {"evals.building", "evals.capability", "evals.loaders", "evals.provider", "evals.registry", "evals.scorers"}
    | {"evals.suites"},
    {"pipeline"},
    {"talk", "compare", "export", "plan", "measure", "doctor", "order", "launch"},
    {"ablate", "export_model", "model_card", "paper", "pareto", "serving", "tables", "diff", "calls_left", "changes"}
    | {"capacity"},
    {"completing"},
    {"cli", "cli_figures", "cli_folders", "cli_groups", "cli_help"},
]
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "datasets",
    "sklearn",
    "scipy",
    "xllamacpp",
    "gguf",
    "matplotlib",
    "aiohttp",
    "inspect_ai",
    "anyio",
    "datasketch",
    "peft",
    "pyarrow",
    "ray",
}


INSPECT = {rooms for floor in FLOORS for rooms in floor if rooms.startswith("evals.")} | {"evals.solvers"}
"""What inspect_ai imports by the entry point: it may import inspect_ai on top, and nobody else may import it so."""


def floor_of(place: list[str]) -> int:
    """The floor of a module or, where it has none of its own, of its room."""
    module = ".".join(place[:2])
    return next(n for own in (module, place[0]) for n, rooms in enumerate(FLOORS) if own in rooms)


def imports_of(file: Path, top_only: bool) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return found


def test_floors_hold():
    broken = []
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if parts[0] in ("__init__",):
            continue
        for name in imports_of(file, top_only=False):
            target = name.split(".")
            if target[0] != "delib" or len(target) < 2 or target[1].startswith("__"):
                continue
            if floor_of(target[1:]) > floor_of(list(parts)):
                broken.append(f"{file.name} imports {name}")
            if parts[0] == target[1] == "stages" and len(target) > 2 and target[2] != parts[1]:
                broken.append(f"stage {parts[1]} imports {name}")
    assert broken == []


def test_heavy_libraries_are_imported_lazily():
    broken = []
    for file in SOURCE.rglob("*.py"):
        own = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        for name in imports_of(file, top_only=True):
            top, _, rest = name.partition(".")
            heavy = top in HEAVY or (top == "delib" and ".".join(rest.split(".")[:2]) in INSPECT)
            if heavy and not (own in INSPECT and top in ("inspect_ai", "delib")):
                broken.append(f"{file.name} imports {name} on top")
    assert broken == []
