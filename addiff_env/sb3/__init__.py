"""The Stable-Baselines3 side: VecEnv adapter, policies, callbacks, checkpoints, training. Only here is SB3 imported."""

from addiff_env.sb3.callbacks import (
    CollapseAlarm,
    CollapseWarning,
    EpisodeLog,
    HeldOut,
    RunningNormalisation,
    TargetNFE,
)
from addiff_env.sb3.episodes import PromptOrder, Stage, prompt_complexity
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
