"""The Stable-Baselines3 side, and the only place where it is imported. Its parts load when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addiff_env.loading.lazy import lazy_attributes

if TYPE_CHECKING:
    from addiff_env.sb3.callbacks import CollapseAlarm, CollapseWarning, EpisodeLog, RunningNormalisation, TargetNFE
    from addiff_env.sb3.episodes import PromptOrder, Stage, prompt_complexity
    from addiff_env.sb3.held_out import HeldOut
    from addiff_env.sb3.policies import DenoisePolicy, MaskableDenoisePolicy, PartNormExtractor, calibrate
    from addiff_env.sb3.vec_env import DenoiseVecEnv, make_lanes, make_vec_env, observation_parts

__all__ = [
    "CollapseAlarm",
    "CollapseWarning",
    "DenoisePolicy",
    "DenoiseVecEnv",
    "EpisodeLog",
    "HeldOut",
    "MaskableDenoisePolicy",
    "PartNormExtractor",
    "PromptOrder",
    "RunningNormalisation",
    "Stage",
    "TargetNFE",
    "calibrate",
    "make_lanes",
    "make_vec_env",
    "observation_parts",
    "prompt_complexity",
]
__getattr__ = lazy_attributes(
    __name__,
    {
        "CollapseAlarm": "callbacks",
        "CollapseWarning": "callbacks",
        "DenoisePolicy": "policies",
        "DenoiseVecEnv": "vec_env",
        "EpisodeLog": "callbacks",
        "HeldOut": "held_out",
        "MaskableDenoisePolicy": "policies",
        "PartNormExtractor": "policies",
        "PromptOrder": "episodes",
        "RunningNormalisation": "callbacks",
        "Stage": "episodes",
        "TargetNFE": "callbacks",
        "calibrate": "policies",
        "make_lanes": "vec_env",
        "make_vec_env": "vec_env",
        "observation_parts": "vec_env",
        "prompt_complexity": "episodes",
    },
)
