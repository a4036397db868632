"""A trained policy: its network, and the bundle of files it is kept in."""

from addiff_env.agent.bundle import CARD, CONFIG, FORMAT_VERSION, WEIGHTS, Agent, describe_backbone, shareable
from addiff_env.agent.networks import CALIBRATION_SHARES, PART_NORM, PartNorm, PolicyNet, flat_observation

__all__ = [
    "CALIBRATION_SHARES",
    "CARD",
    "CONFIG",
    "FORMAT_VERSION",
    "PART_NORM",
    "WEIGHTS",
    "Agent",
    "PartNorm",
    "PolicyNet",
    "describe_backbone",
    "flat_observation",
    "shareable",
]
