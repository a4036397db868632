"""Packages whose parts load when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a ``package`` that takes each name from its module, loaded then.

    Python's random numbers are afterwards what they were before.
    """

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        state = random.getstate()  # libraries that are loaded for the first time may draw from it: rich does, of httpx
        try:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        finally:
            random.setstate(state)

    return attribute
