"""Small trainings from the configuration, and what kills them."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stable_baselines3.common.callbacks import BaseCallback

ROOT = Path(__file__).parents[1]


PROMPTS = ["a red circle", "a star", "a blue square and a green star", "a red star, a pink circle and a green cross"]


LITTLE = [
    "num_envs=3",
    "algorithm.n_steps=5",
    "algorithm.batch_size=15",
    "algorithm.n_epochs=2",
    "algorithm.total_timesteps=90",  # six rollouts
    "calibration_steps=3",
    "progress_bar=false",
    "logging.formats=[csv,tensorboard]",
    "logging.held_out_every=2",
    "logging.filmstrips=2",
    "prompts.held_out.number=2",
]


def configure(kwargs, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [*LITTLE, *overrides])
    OmegaConf.set_struct(cfg, False)
    kwargs = {name: value for name, value in kwargs.items() if name != "prompts"}
    return OmegaConf.merge(cfg, {"env": {"kwargs": kwargs}, "prompts": {"source": PROMPTS}})


class Killed(Exception):
    pass


class KillAt(BaseCallback):
    """Ends the process' work in the middle of a rollout, as far as a test can."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self):
        if self.num_timesteps >= self.timesteps:
            raise Killed
        return True
