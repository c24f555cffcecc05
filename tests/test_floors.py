"""A module imports only from floors below its own; stages never import each other; torch is never imported on top."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "delib"
FLOORS = [
    {"errors", "records", "stats"},
    {"spec", "run", "recipe", "chat", "progress", "sources", "overlap"},
    {"models", "judges", "evals", "labelling"},
    {"stages"},
    {"opener", "life", "pack"},
    {"pipeline"},
    {"talk", "compare", "export", "plan"},
    {"cli"},
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
    "pyarrow",
}


def floor_of(room: str) -> int:
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms)


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
            if floor_of(target[1]) > floor_of(parts[0]):
                broken.append(f"{file.name} imports {name}")
            if parts[0] == target[1] == "stages" and len(target) > 2 and target[2] != parts[1]:
                broken.append(f"stage {parts[1]} imports {name}")
    assert broken == []


def test_heavy_libraries_are_imported_lazily():
    broken = [
        f"{file.name} imports {name} on top"
        for file in SOURCE.rglob("*.py")
        for name in imports_of(file, top_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert broken == []
