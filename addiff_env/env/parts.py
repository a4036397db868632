"""The attributes of an environment's parts, readable on the environment itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from addiff_env.diffusion.backbones import Backbone, Conditioning
    from addiff_env.diffusion.samplers import Schedule
    from addiff_env.perception.features import Features, Perception
    from addiff_env.perception.previews import Previewer


class _Of:
    """An attribute that belongs to one of the owner's parts: read here, set there."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, cls: type | None = None) -> Any:
        return self if owner is None else getattr(getattr(owner, self.part), self.name)

    def __set__(self, owner: Any, value: Any) -> None:
        raise AttributeError(f"{self.name} belongs to the environment's {self.part}: it is read here, not set")


def _of(part: str) -> Any:
    return _Of(part)


class ReadableParts:
    """What a ``denoiser``, a ``state`` and an ``observer`` hold; see `Denoiser`, `LaneState` and `Observer`."""

    backbone: Backbone = _of("denoiser")
    schedule: Schedule = _of("denoiser")
    latent_shape: tuple[int, int, int] = _of("denoiser")
    passes_per_nfe: int = _of("denoiser")

    perception: Perception = _of("observer")
    previewer: Previewer = _of("observer")
    parts: dict[str, int] = _of("observer")

    latents: torch.Tensor = _of("state")
    x0: torch.Tensor = _of("state")
    has_previous: torch.Tensor = _of("state")
    maps: torch.Tensor = _of("state")
    refine_masks: torch.Tensor = _of("state")
    features: Features = _of("state")
    previous_features: Features = _of("state")
    conditioning: Conditioning = _of("state")
    generators: list[torch.Generator] = _of("state")
    prompt: list[str] = _of("state")
    negative_prompt: list[str | None] = _of("state")
    pictures: list[np.ndarray | None] = _of("state")
    seed: np.ndarray = _of("state")
    step_index: np.ndarray = _of("state")
    nfe: np.ndarray = _of("state")
    net_flops: np.ndarray = _of("state")
    refines: np.ndarray = _of("state")
    decisions: np.ndarray = _of("state")
    done: np.ndarray = _of("state")
    fault: np.ndarray = _of("state")
    clip_score: np.ndarray = _of("state")
    reward_score: np.ndarray = _of("state")
    similarity: np.ndarray = _of("state")
