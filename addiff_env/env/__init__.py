"""The environment: denoising as a Markov decision process. Its parts load when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addiff_env.loading.lazy import lazy_attributes

if TYPE_CHECKING:
    from addiff_env.env.single import DiffusionDenoiseEnv
    from addiff_env.env.vector import DiffusionDenoiseVectorEnv

__all__ = ["DiffusionDenoiseEnv", "DiffusionDenoiseVectorEnv"]
__getattr__ = lazy_attributes(__name__, {"DiffusionDenoiseEnv": "single", "DiffusionDenoiseVectorEnv": "vector"})
