"""Which model judges and what it may cost, from environment variables."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JudgeSettings:
    """Which model to ask and what it may cost. Holds no key."""

    model: str
    usd_per_million_input: float  # price of input tokens
    usd_per_million_output: float
    base_url: str | None = None  # None: the client's own default
    key_variable: str = "ADDIFF_JUDGE_API_KEY"  # environment variable that holds the key
    max_usd: float = 10.0  # ceiling of all calls that the cache knows of, those of earlier runs included
    image_tokens: int = 1500  # assumed per picture until an answer tells what was billed
    answer_tokens: int = 300  # most tokens of an answer
    temperature: float | None = 0.0  # None: not sent, as models that think before they answer allow their own only
    # After 408, 409, 429, 5xx, a lost connection, a timeout or what is no completion, with exponential back-off.
    retries: int = 6
    malformed_retries: int = 2  # after an answer that is not what was asked for
    timeout: float = 120.0  # seconds per call

    def __post_init__(self) -> None:
        for name in ("usd_per_million_input", "usd_per_million_output", "max_usd", "image_tokens", "answer_tokens"):
            if not getattr(self, name) >= 0:  # NaN too: no cost would ever exceed a ceiling that is none
                raise ValueError(f"{name} of {self.model} must be at least 0, got {getattr(self, name)}")

    @classmethod
    def from_environment(cls, name: str = "", **overrides: Any) -> JudgeSettings:
        """Read ``ADDIFF_JUDGE_{MODEL,USD_IN,USD_OUT,BASE_URL,MAX_USD,ANSWER_TOKENS,IMAGE_TOKENS,TEMPERATURE}``.

        With a name they are ``ADDIFF_JUDGE_<NAME>_...``. ``USD_IN`` and ``USD_OUT`` are dollars per million tokens; a
        model that thinks before it answers needs more ``ANSWER_TOKENS`` than the default, and mostly ``TEMPERATURE``
        none. ``IMAGE_TOKENS`` are what the model bills for a picture, for the first estimate. The key stays in
        ``..._API_KEY``.

        Raises:
            ValueError: a variable that is missing or no number of at least 0, by name.
        """
        prefix = f"ADDIFF_JUDGE_{name.upper()}_" if name else "ADDIFF_JUDGE_"
        required = [f"{prefix}{part}" for part in ("MODEL", "USD_IN", "USD_OUT", "API_KEY")]
        absent = [variable for variable in required if not os.environ.get(variable)]
        if absent:
            raise ValueError(f"a judge needs the environment variables {', '.join(absent)}")
        values: dict[str, Any] = {
            "model": os.environ[f"{prefix}MODEL"],
            "usd_per_million_input": _number(f"{prefix}USD_IN"),
            "usd_per_million_output": _number(f"{prefix}USD_OUT"),
            "base_url": os.environ.get(f"{prefix}BASE_URL"),
            "key_variable": f"{prefix}API_KEY",
        }
        if os.environ.get(f"{prefix}MAX_USD"):
            values["max_usd"] = _number(f"{prefix}MAX_USD")
        for part in ("ANSWER_TOKENS", "IMAGE_TOKENS"):
            if os.environ.get(f"{prefix}{part}"):
                values[part.lower()] = int(_number(f"{prefix}{part}"))
        if temperature := os.environ.get(f"{prefix}TEMPERATURE"):
            values["temperature"] = None if temperature.lower() == "none" else _number(f"{prefix}TEMPERATURE")
        return cls(**{**values, **overrides})


def _number(variable: str) -> float:
    try:
        if 0 <= (value := float(os.environ[variable])) < math.inf:
            return value
    except ValueError:
        pass
    raise ValueError(f"{variable} must be a number of at least 0, got {os.environ[variable]!r}")
