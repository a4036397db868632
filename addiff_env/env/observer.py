"""What is seen of the lanes: previews, their features and scores, and the observation made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from addiff_env.diffusion.attention import attention_entropy
from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env.config import EnvConfig
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.prices import position
from addiff_env.env.state import LaneState
from addiff_env.perception.features import (
    QUALITY,
    TIMESTEP_WIDTH,
    Features,
    Latents,
    Perception,
    look_precision,
    timestep_embedding,
)
from addiff_env.perception.previews import FullDecoder, Previewer, make_previewer


class Observer:
    """Looks at the ``lanes`` (L,) of a `LaneState`, and makes observations of all B.

    Attributes:
        perception: encoders and the reward model.
        previewer: what makes previews of clean predictions.
        flops_per_call: FLOPs per lane of ``preview``, ``look`` (preview and features), ``scorer`` (preview and the
            reward model alone) and ``reading`` (of the prompt).
    """

    def __init__(self, config: EnvConfig, denoiser: Denoiser) -> None:
        self.config, self.denoiser = config, denoiser
        self.backbone, self.schedule = denoiser.backbone, denoiser.schedule
        self.previewer: Previewer = make_previewer(config.preview, self.backbone, config.preview_model)
        device, precision = self.backbone.device, config.look_precision
        self.perception = Perception(
            config.clip,
            config.dino,
            config.scorer,
            device,
            look_precision(precision, device, self.backbone.dtype),
            config.reads,
            self.backbone.encode_pictures,
        )
        wanted = getattr(self.perception.scorer, "latent_shape", denoiser.latent_shape)
        if wanted != denoiser.latent_shape:
            raise ValueError(f"scorer {config.scorer!r} reads latents {wanted}, these are {denoiser.latent_shape}")
        self.flops_per_call = self._measure_flops()
        self._prices: tuple[np.ndarray, torch.Tensor] | None = None  # of the lanes, and where they stand in the range

    def _measure_flops(self) -> dict[str, float]:
        perception, size = self.perception, (self.config.height, self.config.width)
        preview = self.previewer.flops(self.denoiser.latent_shape)
        return {
            "preview": preview,
            "look": perception.flops(*size) + (preview if perception.reads_pictures else 0),
            "scorer": perception.scorer_flops(*size) + (0 if perception.reads_latents else preview),
            "reading": perception.text_flops(),
        }

    # ----------------------------------------------------------------- looking

    def start(self, state: LaneState, lanes: np.ndarray) -> None:
        """Read the prompts of ``lanes``."""
        if "clip_text" in self.config.reads:
            prompts = [state.prompt[lane] for lane in lanes]
            state.clip_text[state.index(lanes)] = self.perception.clip.text_features(prompts)
        state.net_flops[lanes] += self.flops_per_call["reading"]

    def look(self, state: LaneState, lanes: np.ndarray, first: Sequence[int] | np.ndarray = ()) -> None:
        """Decode and score ``lanes``: previews of running ones, final pictures of finished ones.

        Of those that are also in ``first`` nothing was seen before: nothing has changed since then.
        """
        for rows in self.denoiser.chunks(len(lanes)):
            self._look_at(state, lanes[rows], np.flatnonzero(np.isin(lanes[rows], first)))

    def _look_at(self, state: LaneState, lanes: np.ndarray, first: np.ndarray) -> None:
        index, finished = state.index(lanes), state.done[lanes]
        pictures = self._decode(state, lanes) if self.perception.reads_pictures or finished.any() else None
        sound = torch.ones(len(lanes), device=state.latents.device)
        if pictures is not None:
            sound = torch.isfinite(pictures).flatten(1).all(1)
            pictures = _finite(pictures)
        prompts, latents = [state.prompt[lane] for lane in lanes], self.latents_to_score(state, lanes)
        features = self.perception.look(pictures, prompts, True, latents)
        fresh = state.index(first)
        if len(first):
            state.features.put(index[fresh], features.at(fresh))
        before = state.features.at(index)
        state.previous_features.put(index, before)
        state.features.put(index, features)
        same = torch.ones_like(features.clip_score)
        if "dino" in self.config.reads:
            same = (before.dino * features.dino).sum(1).clamp(-1, 1)
            same[fresh] = 1
        numbers = torch.stack([features.clip_score, features.reward_score, same, sound]).double().cpu().numpy()
        state.clip_score[lanes], state.reward_score[lanes], state.similarity[lanes] = numbers[:3]
        known = np.isfinite(numbers).all(0)
        if len(rows := np.flatnonzero(~known)):
            self._keep_before(state, lanes[rows], before.at(state.index(rows)))
        state.fault[lanes[finished & ~(known & (numbers[3] == 1))]] = True
        # A finished lane pays for its decode only: nobody acts on the scores of a final picture.
        decode = self.denoiser.flops_per_call["decode"]
        state.net_flops[lanes] += np.where(finished, decode, self.flops_per_call["look"])
        if pictures is not None and finished.any():
            kept = to_uint8(pictures[state.index(np.flatnonzero(finished))])
            for lane, picture in zip(lanes[finished], kept, strict=True):
                state.pictures[lane] = picture

    def _keep_before(self, state: LaneState, lanes: np.ndarray, before: Features) -> None:
        """Leave what was seen of ``lanes`` as it was: an encoder's or the scorer's numbers are not finite."""
        index, kept = state.index(lanes), Features(*(value.nan_to_num(0, 0, 0) for value in vars(before).values()))
        state.features.put(index, kept)
        state.previous_features.put(index, kept)
        scores = torch.stack([kept.clip_score, kept.reward_score]).double().cpu().numpy()
        state.clip_score[lanes], state.reward_score[lanes] = scores
        state.similarity[lanes] = 1

    def latents_to_score(self, state: LaneState, lanes: np.ndarray) -> Latents | None:
        """What a scorer of latents is asked about ``lanes``; None for others."""
        if not self.perception.reads_latents:
            return None
        index, finished = state.index(lanes), state.done[lanes]
        at = np.minimum(state.step_index[lanes], self.config.num_inference_steps - 1)
        left = np.stack([np.full(len(lanes), self.config.finish_steps), self.schedule.num_inference_steps - at], 1)
        spared = np.maximum(0, self.schedule.num_inference_steps - state.step_index[lanes] - self.config.finish_steps)
        done = state.index(finished)
        return Latents(
            _choose(done, state.latents[index], state.x0[index]),
            torch.from_numpy(np.where(finished, 0, self.denoiser.timesteps[at])),  # on the host, where they are known
            state.index(np.where(finished[:, None], spared[:, None], left)),
        )

    def _decode(self, state: LaneState, lanes: np.ndarray) -> torch.Tensor:
        """Final pictures of finished ``lanes``, previews of the others if they are read: (L, 3, H, W) in [0, 1]."""
        index, finished = state.index(lanes), state.done[lanes]
        reads = self.perception.reads_pictures
        if isinstance(self.previewer, FullDecoder) and reads:
            latents = _choose(state.index(finished), state.latents[index], state.x0[index])
            return self.backbone.decode(latents)
        pictures = torch.zeros(len(lanes), 3, self.config.height, self.config.width, device=self.backbone.device)
        for rows, decode, latents in (
            (np.flatnonzero(finished), self.backbone.decode, state.latents),
            (np.flatnonzero(~finished & reads), self.previewer.decode, state.x0),
        ):
            if len(rows):
                pictures[state.index(rows)] = decode(latents[state.index(lanes[rows])])
        return pictures

    def blank(self, state: LaneState, lanes: np.ndarray) -> None:
        """Clear the features of ``lanes``: without warm-up there is no prediction yet."""
        index, perception = state.index(lanes), self.perception
        blank = Features.blank(len(lanes), perception.clip.width, perception.dino.width, self.backbone.device)
        state.features.put(index, blank)
        state.previous_features.put(index, blank)
        state.clip_score[lanes], state.reward_score[lanes], state.similarity[lanes] = 0, 0, 1

    def previews(self, state: LaneState, lanes: np.ndarray) -> np.ndarray:
        """Decoded latest clean predictions of ``lanes``: uint8 (L, H, W, 3)."""
        parts = [state.x0[state.index(lanes[rows])] for rows in self.denoiser.chunks(len(lanes))]
        pictures = [to_uint8(_finite(self.previewer.decode(x0))) for x0 in parts]
        return np.concatenate([np.zeros((0, self.config.height, self.config.width, 3), np.uint8), *pictures])

    # ----------------------------------------------------------------- the observation

    @property
    def parts(self) -> dict[str, int]:
        """Widths of the flat observation's parts, in order."""
        parts = self.perception.parts
        quality = {"quality": parts.pop("quality")}  # stays last: rules find their numbers there
        return {**parts, **({"price": 1} if self.config.price_range else {}), **quality}

    def space(self) -> gym.Space[Any]:
        """The space of one lane's observations."""
        bounds = self._bounds()
        if self.config.obs_mode == "flat":
            low, high = (np.concatenate([bounds[name][side] for name in self.parts]) for side in (0, 1))
            return gym.spaces.Box(low, high, dtype=np.float32)
        return gym.spaces.Dict(
            {name: gym.spaces.Box(low, high, dtype=np.float32) for name, (low, high) in bounds.items()}
        )

    def _bounds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        def symmetric(width: int, bound: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
            return np.full(width, -bound, np.float32), np.full(width, bound, np.float32)

        limit = self.perception.score_limit
        high = np.array([1, 2, limit, 2 * limit, 1, 1, 1, 1], np.float32)
        low = np.array([-1, -2, -limit, -2 * limit, -1, 0, 0, 0], np.float32)
        clip = self.perception.clip.width
        bounds = {
            "clip_image": symmetric(clip),
            "clip_text": symmetric(clip),
            "timestep": symmetric(TIMESTEP_WIDTH),
            **({"outlook": symmetric(1, limit)} if self.perception.reads_latents else {}),
            **({"price": symmetric(1)} if self.config.price_range else {}),
            "quality": (low, high),
        }
        if self.config.obs_mode == "dict":
            bounds["dino"] = symmetric(self.perception.dino.width)
            bounds["unet"] = symmetric(self.backbone.feature_width, 1e6)
        return bounds

    def observation(self, state: LaneState) -> Any:
        """What the policy sees of all lanes, in the form that ``obs_mode`` and ``obs_backend`` say."""
        at = np.minimum(state.step_index, self.config.num_inference_steps - 1)
        parts = {
            "clip_image": state.features.clip_image,
            "clip_text": state.clip_text,
            "timestep": timestep_embedding(self.schedule.timesteps[state.index(at)]),
            **({"outlook": state.features.outlook[:, None]} if self.perception.reads_latents else {}),
            **({"price": self._price_slot(state, self.config.price_range)} if self.config.price_range else {}),
            "quality": self._quality_slots(state),
        }
        if self.config.obs_mode == "dict":
            parts |= {"dino": state.features.dino, "unet": state.unet_features}
            result = {name: value.clone() for name, value in parts.items()}
            return result if self.config.obs_backend == "torch" else {k: v.cpu().numpy() for k, v in result.items()}
        flat = torch.cat(list(parts.values()), dim=1).float()
        return flat if self.config.obs_backend == "torch" else flat.cpu().numpy()

    def _price_slot(self, state: LaneState, price_range: Sequence[float]) -> torch.Tensor:
        """Where the lanes' prices stand in the range, (B, 1); sent to the device when they change."""
        if self._prices is None or not np.array_equal(self._prices[0], state.lane_price):
            slot = position(price_range, state.lane_price).astype(np.float32)[:, None]
            self._prices = state.lane_price.copy(), state.index(slot)
        return self._prices[1]

    def _quality_slots(self, state: LaneState) -> torch.Tensor:
        """The eight numbers of `QUALITY`, (B, 8)."""
        steps_done = state.step_index / self.config.num_inference_steps
        ratios = np.stack([state.similarity, steps_done, np.minimum(1.0, state.nfe / state.budget)])
        similarity, steps, nfe = state.index(ratios.astype(np.float32))
        features, before = state.features, state.previous_features
        slots = [
            features.clip_score.clamp(-1, 1),
            features.clip_score - before.clip_score,
            features.reward_score,
            features.reward_score - before.reward_score,
            similarity,
            steps,
            nfe,
            attention_entropy(state.maps, state.conditioning.content).clamp(0, 1),
        ]
        assert len(slots) == len(QUALITY)
        return torch.stack(slots, dim=1)


def observation_of(observation: Any, lane: int) -> Any:
    """One lane of a batched observation, copied."""
    if isinstance(observation, dict):
        return {name: observation_of(value, lane) for name, value in observation.items()}
    return observation[lane].clone() if isinstance(observation, torch.Tensor) else observation[lane].copy()


def _choose(rows: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """``yes`` in the chosen ``rows`` (B,) bool, ``no`` elsewhere; both (B, C, h, w)."""
    return torch.where(rows[:, None, None, None], yes, no)


def _finite(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures with grey in place of what a decoder let overflow."""
    return torch.nan_to_num(pictures, nan=0.5, posinf=1.0, neginf=0.0)
