"""The lanes: where each picture stands between noise and end, and what was seen of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from addiff_env.diffusion.backbones import Backbone, Conditioning
from addiff_env.env.prices import OWN
from addiff_env.perception.features import Features

FORMAT_VERSION = 4  # of `LaneState.state_dict`


@dataclass
class LaneFields:
    """What is known of B lanes. Tensors are on the device, a lane per row; counts on the host, in arrays (B,)."""

    latents: torch.Tensor  # (B, C, h, w) in the network's dtype
    x0: torch.Tensor  # (B, C, h, w) latest clean predictions
    has_previous: torch.Tensor  # (B,) bool: whether x0 is history that a multistep solver may use
    nonfinite: torch.Tensor  # (B,) bool: a prediction was not finite
    maps: torch.Tensor  # (B, tokens, h', w') float32, cross-attention of the latest evaluation
    unet_features: torch.Tensor  # (B, channels) float32, of the latest evaluation
    refine_masks: torch.Tensor  # (B, 1, h, w) in [0, 1], 1 = renewed by the latest refinement
    clip_text: torch.Tensor  # (B, CLIP's width) of the prompts
    features: Features  # of the latest look
    previous_features: Features  # of the look before
    seed: np.ndarray
    step_index: np.ndarray  # solver steps done
    nfe: np.ndarray  # denoiser evaluations
    net_flops: np.ndarray
    refines: np.ndarray
    decisions: np.ndarray
    lane_price: np.ndarray  # of one evaluation, or `prices.OWN`
    budget: np.ndarray  # denoiser evaluations that the episode may spend
    done: np.ndarray  # bool: the lane has ended, or waits
    fault: np.ndarray  # bool: its numbers stopped being finite
    # What the latest look showed, on the host as well: one transfer a step serves reward and info.
    clip_score: np.ndarray
    reward_score: np.ndarray
    similarity: np.ndarray  # cosine of this and the preview before
    prompt: list[str]
    negative_prompt: list[str | None]
    pictures: list[np.ndarray | None]  # final pictures uint8 (H, W, 3) of lanes that have ended
    generators: list[torch.Generator]  # each lane's own noise
    conditioning: Conditioning = field(metadata={"saved": False})  # encoded again from the prompts


class LaneState(LaneFields):
    """Everything that changes while B lanes are denoised; `Denoiser`, `refine` and `Observer` write it."""

    @classmethod
    def empty(
        cls,
        num_envs: int,
        backbone: Backbone,
        latent_shape: tuple[int, int, int],
        clip_width: int = 0,
        dino_width: int = 0,
    ) -> LaneState:
        """Lanes that were not started yet; ``latent_shape`` is (C, h, w)."""
        n, device, stride = num_envs, backbone.device, backbone.attention_stride
        conditioning = backbone.encode_prompts([""] * n)
        side = [-(-cells // stride) for cells in latent_shape[1:]]
        latents = torch.zeros(n, *latent_shape, device=device, dtype=backbone.dtype)
        flags = torch.zeros(n, dtype=torch.bool, device=device)
        numbers, counts = np.zeros(n), np.zeros(n, np.int64)
        return cls(
            latents=latents,
            x0=torch.zeros_like(latents),
            has_previous=flags,
            nonfinite=flags.clone(),
            maps=torch.zeros(n, conditioning.content.shape[1], *side, device=device),
            unet_features=torch.zeros(n, backbone.feature_width, device=device),
            refine_masks=torch.zeros(n, 1, *latent_shape[1:], device=device),
            clip_text=torch.zeros(n, clip_width, device=device),
            features=Features.blank(n, clip_width, dino_width, device),
            previous_features=Features.blank(n, clip_width, dino_width, device),
            seed=counts,
            step_index=counts.copy(),
            nfe=counts.copy(),
            net_flops=numbers,
            refines=counts.copy(),
            decisions=counts.copy(),
            lane_price=np.full(n, OWN),
            budget=counts.copy(),
            done=np.ones(n, bool),  # no lane runs before its first start
            fault=np.zeros(n, bool),
            clip_score=numbers.copy(),
            reward_score=numbers.copy(),
            similarity=np.ones(n),
            prompt=[""] * n,
            negative_prompt=[None] * n,
            pictures=[None] * n,
            generators=[torch.Generator() for _ in range(n)],
            conditioning=conditioning,
        )

    @property
    def num_envs(self) -> int:
        """B, the number of lanes."""
        return len(self.done)

    def index(self, lanes: np.ndarray) -> torch.Tensor:
        """Host numbers on the device, without waiting for it."""
        return torch.as_tensor(lanes).to(self.latents.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the lanes go on: copies on the CPU, tensors, numbers and strings only."""
        return {"format_version": FORMAT_VERSION} | {name: _saved(getattr(self, name)) for name in _saved_names()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put the lanes where `state_dict` found them; what is refused changes nothing. Prompts are to be encoded anew.

        Raises:
            ValueError: the state has another format, or is that of other settings (number of lanes, size, model); the
            message shows both.
        """
        self.check(saved)
        for name in _saved_names():
            setattr(self, name, _restored(getattr(self, name), saved[name]))

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` refuses."""
        version = saved.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"the state has format_version {version!r}, this release reads {FORMAT_VERSION}")
        if missing := [name for name in _saved_names() if name not in saved]:
            raise ValueError(f"the state has no {', '.join(missing)}")
        for name in _saved_names():
            for part, wanted, got in _sizes(name, getattr(self, name), saved[name]):
                if wanted != got:
                    raise ValueError(f"the state is that of another environment: {part} is {got} there, {wanted} here")


def check_whole(saved: Mapping[str, Any], num_inference_steps: int) -> None:
    """Refuse an environment's state without its own part, or whose lanes stand beyond the end of this schedule.

    Raises:
        ValueError: the message names what is missing, or shows both numbers of steps.
    """
    if missing := [name for name in ("stream", "started") if name not in saved]:
        raise ValueError(f"the state has no {', '.join(missing)}: it is not that of an environment")
    running, at = ~saved["done"].numpy(), saved["step_index"].numpy()
    if (beyond := at[running & (at >= num_inference_steps)]).size:
        raise ValueError(
            f"the state is that of another environment: running lanes have made {beyond.tolist()} steps there, "
            f"num_inference_steps is {num_inference_steps} here"
        )


def _saved_names() -> Iterator[str]:
    return (f.name for f in fields(LaneFields) if f.metadata.get("saved", True))


def _saved(value: Any) -> Any:
    """A copy of a field's value that ``torch.load(weights_only=True)`` reads back."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, list):
        return [_saved(item) for item in value]
    if is_dataclass(value):
        return {name: _saved(item) for name, item in vars(value).items()}
    return None if value is None else str(value)


def _restored(current: Any, saved: Any) -> Any:
    """What `_saved` was made of; tensors, arrays and generators are filled where they are."""
    if isinstance(current, list):
        return [_restored(*pair) for pair in zip(current, saved, strict=True)]
    if is_dataclass(current):
        for name, value in vars(current).items():
            _restored(value, saved[name])
    elif isinstance(current, torch.Generator):
        current.set_state(saved)
    elif isinstance(current, torch.Tensor):
        current.copy_(saved)
    elif isinstance(current, np.ndarray) and saved is not None:
        current[:] = saved.numpy()
    else:  # a text, or a picture that the lane has on one side only
        return saved.numpy().copy() if isinstance(saved, torch.Tensor) else saved
    return current


def _sizes(name: str, current: Any, saved: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The name and both sizes of every array in a field."""
    if isinstance(current, list):
        yield name, (len(current),), (len(saved),)
    elif is_dataclass(current):
        for part, value in vars(current).items():
            yield from _sizes(f"{name}.{part}", value, saved[part])
    else:
        yield name, tuple(current.shape), tuple(saved.shape)
