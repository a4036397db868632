"""The environment: denoising as a Markov decision process."""

from addiff_env.env.single import DiffusionDenoiseEnv
from addiff_env.env.vector import DiffusionDenoiseVectorEnv

__all__ = ["DiffusionDenoiseEnv", "DiffusionDenoiseVectorEnv"]
