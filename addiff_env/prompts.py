"""Where an environment's prompts come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from addiff_env.loading import resolve_model


def check_prompt(prompt: Any) -> str:
    """Return ``prompt`` if it is a string.

    Raises:
        TypeError: it is not; the message shows it.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a string, got {type(prompt).__name__}: {prompt!r}")
    return prompt


def load_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts from a list, a ``.txt`` file (one a line) or a ``.jsonl`` file (field ``prompt``).

    A path may start with ``addiff_env:``, a folder of the package.

    Raises:
        FileNotFoundError: no such file; ValueError: no prompt in it, or a damaged line (with its number);
        TypeError: an entry that is not a string.
    """
    rows = _read(Path(resolve_model(prompts))) if isinstance(prompts, str) else list(prompts)
    if not rows:
        raise ValueError(f"no prompts in {prompts!r}")
    return [check_prompt(row) for row in rows]


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {str(path)!r}; prompts may be a list, a .txt or a .jsonl file")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    return [_json_prompt(line, number, path) for number, line in enumerate(lines, 1)]


def _json_prompt(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number}: expected an object with a 'prompt', got {line[:80]!r}") from error
