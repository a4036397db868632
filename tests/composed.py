"""Hydra's configurations, composed as the commands do."""

import copy
from functools import cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from addiff_env.loading.paths import configs_folder


def rllib_config(*overrides: str, name: str = "train_rllib", **kwargs: object) -> DictConfig:
    """The trainer's configuration with these overrides, and these settings of the environment."""
    cfg = copy.deepcopy(_composed(name, overrides))
    with open_dict(cfg):
        cfg.env.kwargs.update(kwargs)
    return cfg


@cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        return compose(name, list(overrides))
