"""What is wrong with a model's files, as far as their lengths, headers and lists tell. No weight is read.

Libraries often say what they could not read without saying which file it was in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = ".index.json"  # ends the names of the files that list a network's shards
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # weights, configurations and vocabularies


def wrong_at(place: str | Path) -> str:
    """What is wrong with the model that should be in a folder, for the end of a message: "" where nothing is seen."""
    path = Path(place)
    if path.is_file():
        return "; that is a file, not a model's folder"
    if not path.is_dir():
        return ""
    files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.suffix in _SUFFIXES)
    broken = [f"{file.relative_to(path)}: {why}" for file in files if (why := damage(file))]
    return "; " + "; ".join(broken) if broken else ""


def damage(file: Path) -> str:
    """What is wrong with a file of a model; "" where nothing is seen."""
    size = file.stat().st_size
    if size == 0:
        return "it is empty"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return ""
        except SafetensorError as error:
            return f"it is cut off, or no safetensors file ({size:,} bytes): {error}"
    if file.suffix != ".json":
        return ""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"it is no JSON: {error}"
    return _wrong_index(file, content) if file.name.endswith(INDEX) else ""


def _wrong_index(file: Path, content: Any) -> str:
    shards = shards_of(content)
    if not shards:
        return "it lists no weights"
    absent = [shard for shard in shards if not (file.parent / shard).is_file()]
    return f"it lists {', '.join(absent)}: not there" if absent else ""


def shards_of(content: Any) -> list[str]:
    """The files that an index lists; none where it is not one."""
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    return sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
