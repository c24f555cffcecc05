"""The reference of a recipe's keys, made from `recipe.py`: each field's docstring, type, bounds and default.

Out: parts (the keys of the top, then a part a section), as markdown for docs/recipe.md or as text for the terminal.
"""

import re
import shutil
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from delib.errors import UserError
from delib.recipe import RECIPES, Recipe, Section
from delib.rendering import environment

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "pattern": "matching `{}`"}
WIDEST = 100
"""Columns of the text for the terminal, at most."""


class Key(NamedTuple):
    """`name` is dotted, as --set takes it; `default` is YAML, None where the key is required."""

    name: str
    kind: str
    default: str | None
    about: str


class Part(NamedTuple):
    """The keys of one section; the top has no name."""

    name: str
    about: str
    keys: list[Key]


def parts() -> list[Part]:
    """The whole reference, in the recipe's order; a section within a section comes after it."""
    return _parts("", Recipe)


def _parts(name: str, section: type[Section]) -> list[Part]:
    dot = f"{name}." if name else ""
    keys, inner = [], []
    for field, info in section.model_fields.items():
        found = _section(info.annotation)
        if found is None or info.description:
            keys.append(_key(f"{dot}{field}", info))
        if found is not None:
            within = ".MODEL" if get_origin(info.annotation) is dict else ""
            inner += _parts(f"{dot}{field}{within}", found)
    return [Part(name, _line(section.__doc__), keys), *inner]


def _section(annotation: Any) -> type[Section] | None:
    """The section that a type is, or may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for found in map(_section, get_args(annotation)) if found is not None), None)


def _key(name: str, info: FieldInfo) -> Key:
    limits = [
        BOUNDS[rule].format(getattr(bound, rule))
        for bound in info.metadata
        for rule in BOUNDS
        if getattr(bound, rule, None) is not None
    ]
    if any(getattr(bound, "min_length", None) for bound in info.metadata):
        limits.append("not empty")
    default = None if info.is_required() else _yaml(info.get_default(call_default_factory=True))
    return Key(name, ", ".join([_kind(info.annotation), *limits]), default, _line(info.description))


def _kind(annotation: Any) -> str:
    """A type in words. Raises KeyError for one that has none yet."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(", ".join(f"`{value}`" for value in inner).rsplit(", ", 1))
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if NoneType in inner:
        return " or ".join([*(_kind(part) for part in inner if part is not NoneType), "null"])
    if _section(annotation) is not None:
        return "a section for each name" if origin is dict else "section"
    return WORDS[annotation]


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("\n").removesuffix("\n...")


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def shipped() -> list[tuple[str, str]]:
    """The shipped recipes: name, and what each one's first lines say of it."""
    found = []
    for file in sorted(RECIPES.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if re.search(r"^name:", text, re.MULTILINE):  # else it is a config of accelerate
            said = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
            found.append((file.stem, _line(" ".join(said))))
    return found


def markdown() -> str:
    """The page docs/recipe.md."""
    return _rendered("recipe.md", parts=parts(), shipped=shipped())


def text(name: str | None = None) -> str:
    """The reference for the terminal, or of it one section or key. Raises UserError when there is none such."""
    found = parts()
    if name is not None:
        within = [part._replace(keys=[k for k in part.keys if f"{k.name}.".startswith(f"{name}.")]) for part in found]
        found = [part for part in within if part.keys]
    if not found:
        named = ", ".join(part.name for part in parts() if part.name and "." not in part.name)
        raise UserError(f"recipe {name}: no such key; name a section ({named}) or a key, such as sft.epochs")
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    return _rendered("recipe.txt", parts=found, width=width)


def _rendered(template: str, **values: Any) -> str:
    templates = environment()
    templates.filters["cell"] = _cell
    return templates.get_template(template).render(**values)


def _cell(words: str) -> str:
    """Words for a cell of a markdown table, in which pages of the docs are links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", words.replace("|", "\\|"))
