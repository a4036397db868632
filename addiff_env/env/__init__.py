"""The environment: denoising as a Markov decision process. Its parts load when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addiff_env.env.single import DiffusionDenoiseEnv
    from addiff_env.env.vector import DiffusionDenoiseVectorEnv

__all__ = ["DiffusionDenoiseEnv", "DiffusionDenoiseVectorEnv"]
_MODULES = {"DiffusionDenoiseEnv": "single", "DiffusionDenoiseVectorEnv": "vector"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
