"""RLlib's PPO on Ray, for several GPUs or nodes: every env runner holds its own diffusion model on its own GPU.

    addiff train-rllib rllib.num_env_runners=2
    addiff train-rllib env=sd15 rllib.num_env_runners=8

The agent that `evaluate.py` reads is in the run's folder, under ``agent``. Ray pins an older Gymnasium than this
package is tested with: give it an environment of its own (``pip install 'addiff-env[rllib]'``). ``slurm/ray.sbatch``
brings Ray up inside a SLURM allocation.

Its parts load when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from addiff_env.loading.lazy import lazy_attributes

if TYPE_CHECKING:
    from addiff_env.rllib.lanes import make_lanes
    from addiff_env.rllib.training import train

__all__ = ["make_lanes", "train"]
__getattr__ = lazy_attributes(__name__, {"make_lanes": "lanes", "train": "training"})
