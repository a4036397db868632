"""RLlib's PPO on Ray, for several GPUs or nodes: every env runner holds its own diffusion model on its own GPU.

    addiff train-rllib rllib.num_env_runners=2
    addiff train-rllib env=sd15 rllib.num_env_runners=8

The agent that `evaluate.py` reads is in the run's folder, under ``agent``. Ray pins an older Gymnasium than this
package is tested with: give it an environment of its own (``pip install 'addiff-env[rllib]'``). ``slurm/ray.sbatch``
brings Ray up inside a SLURM allocation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addiff_env.rllib.lanes import make_lanes
    from addiff_env.rllib.training import train

__all__ = ["make_lanes", "train"]
_MODULES = {"make_lanes": "lanes", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
