"""Denoising as a Markov decision process: the vector environment owns the dynamics, the single one is its view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from addiff_env.attention import MASKS, attention_entropy, refinement_mask
from addiff_env.backbones import Conditioning, draw_noise, load_backbone, to_uint8
from addiff_env.perception import QUALITY, SCORE_LIMIT, TIMESTEP_WIDTH, Look, Perception, timestep_embedding
from addiff_env.prompts import check_prompt, load_prompts
from addiff_env.reward import COMPONENTS, RewardConfig, quality, step_reward
from addiff_env.samplers import SOLVERS, add_noise, ddim_between, ddim_step, make_schedule
from addiff_env.types import Action

_CHOICES = {
    "solver": SOLVERS,
    "refine_mode": ("rewind", "in_place"),
    "mask": MASKS,
    "obs_mode": ("flat", "dict"),
    "obs_backend": ("numpy", "torch"),
    "preview": ("vae",),
}
_LEAST = {  # smallest value of each numeric setting
    "num_inference_steps": 1,
    "guidance_scale": 0.0,
    "warmup_steps": 1,
    "finish_steps": 0,
    "max_nfe": 1,
    "max_refines": 0,
    "refine_k": 1,
    "observe_every": 1,
    "blur_sigma": 0.0,
    "batch_size": 1,
}


@dataclass(frozen=True)
class EnvConfig:
    """Every setting of the environment; all JSON-able. The class docstring of the environment explains them."""

    model: str
    clip: str
    dino: str
    scorer: str
    prompts: str | Sequence[str]
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    solver: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512
    warmup_steps: int = 3
    finish_steps: int = 0
    max_nfe: int | None = None
    max_refines: int | None = None
    refine_k: int = 2
    refine_mode: str = "rewind"
    mask: str = "low_attention"
    mask_threshold: float = 0.5
    blur_sigma: float = 1.0
    renoise: float | str = 0.85
    attention_stride: int = 4
    preview: str = "vae"
    observe_every: int = 1
    obs_mode: str = "flat"
    obs_backend: str = "numpy"
    reward: dict[str, float] | None = None
    render_mode: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value that is not allowed; the message shows it.
        """
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name, least in _LEAST.items():
            value, kind = getattr(self, name), (int, float) if isinstance(least, float) else int
            if value is not None and (not isinstance(value, kind) or not value >= least):
                what = "a number" if isinstance(least, float) else "an integer"
                raise ValueError(f"{name} must be {what} of at least {least}, got {value!r}")
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must lie in (0, 1), got {self.mask_threshold!r}")
        if self.warmup_steps >= self.num_inference_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below num_inference_steps ({self.num_inference_steps})"
            )
        if self.nfe_budget < self.warmup_steps + 1 + self.finish_steps:
            raise ValueError(f"max_nfe {self.max_nfe} leaves no decision after {self.warmup_steps} warm-up steps")
        if self.render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {self.render_mode!r}; known: rgb_array")
        renoise_timestep(self.renoise, 500, 1000)

    @property
    def nfe_budget(self) -> int:
        """Denoiser evaluations an episode may spend: ``max_nfe``, or twice ``num_inference_steps``."""
        return 2 * self.num_inference_steps if self.max_nfe is None else self.max_nfe


def renoise_timestep(renoise: float | str, current: int, total: int) -> int:
    """The training timestep that a refinement goes back to: a share of all ``total``, or of the ``current`` one.

    Raises:
        ValueError: not a share in (0, 1], nor ``"relative:<share>"``.
    """
    text = str(renoise)
    share_of, text = (current, text.removeprefix("relative:")) if text.startswith("relative:") else (total, text)
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ValueError(f"renoise must be a share in (0, 1] or 'relative:<share>', got {renoise!r}")
    return max(0, min(total - 1, round(share * share_of) - 1))


class DiffusionDenoiseVectorEnv(VectorEnv):
    """Denoise ``num_envs`` pictures at once; at each step a policy decides, lane by lane, how to go on.

    ## Description
    A lane is one prompt and one seed being denoised by a frozen text-to-image model. ``reset`` draws
    both, makes the initial noise from the lane's own generator and runs ``warmup_steps`` mandatory
    steps. Lanes at different points of the schedule share one denoiser call; no lane's result depends on
    which others it travels with.

    ## Action space
    ``Discrete(3)`` per lane: 0 *continue*: one denoiser evaluation and one solver step. 1 *stop*:
    the latest clean prediction becomes the picture (after ``finish_steps`` coarse steps, if any).
    2 *refine*: noise the clean prediction again and re-denoise it inside a mask taken from
    cross-attention, for ``refine_k`` evaluations. A refinement beyond ``max_refines`` is carried out as
    *continue* (``info["action_taken"]`` says so, ``info["action_mask"]`` tells beforehand). An action
    that the budget cannot pay finishes the picture instead.

    ## Observation space
    ``Box(float32)``, the parts one after another (``obs_mode="dict"`` gives them by name, with ``dino``
    and ``unet`` besides):

    | part | width | bounds | meaning |
    |---|---|---|---|
    | clip_image | CLIP's | [-1, 1] | unit features of the preview |
    | clip_text | CLIP's | [-1, 1] | unit features of the prompt |
    | timestep | 128 | [-1, 1] | sinusoidal embedding of the lane's timestep |
    | clip_score | 1 | [-1, 1] | cosine of picture and prompt |
    | clip_delta | 1 | [-2, 2] | its change since the look before |
    | reward_score | 1 | [-30, 30] | the reward model's score |
    | reward_delta | 1 | [-60, 60] | its change since the look before |
    | dino_similarity | 1 | [-1, 1] | cosine of this and the preview before |
    | step_ratio | 1 | [0, 1] | solver steps done / num_inference_steps |
    | nfe_ratio | 1 | [0, 1] | NFE / budget |
    | attention_entropy | 1 | [0, 1] | mean entropy of the content tokens' maps |

    ## Rewards
    See `addiff_env.reward`; ``info["reward"]`` carries every component.

    ## Start, end
    ``reset(options={"prompt": [...], "seed": [...], "latents": ...})`` names the lanes' prompts
    (B strings), seeds (B ints) or initial latents (B, C, h, w), as diffusers' pipelines take them;
    what is left out is drawn. An episode is ``terminated`` by *stop*, by the last solver step, or when the
    budget is spent; ``truncated`` is left to wrappers. With ``AutoresetMode.DISABLED`` an ended lane waits, at no cost,
    until ``reset(options={"reset_mask": ...})`` names it.

    ## Info
    ``prompt, seed, step_index, nfe, forward_passes, net_flops, action_mask, action_taken, clip_score,
    reward_score, reward``; one array over lanes each.

    ## Arguments
    The fields of `EnvConfig` (``model, revision, device, dtype, solver, num_inference_steps, ...``), and
    ``num_envs``; ``autoreset_mode`` is one of `gymnasium.vector.AutoresetMode`.

    >>> import gymnasium as gym
    >>> envs = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=4)  # doctest: +SKIP
    >>> obs, info = envs.reset(options={"prompt": ["a red circle"] * 4, "seed": [0, 1, 2, 3]})  # doctest: +SKIP

    ## Version history
    v0: first version.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self, num_envs: int = 1, autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP, **settings: Any
    ) -> None:
        known = [f.name for f in fields(EnvConfig)]
        for name in settings:
            if name not in known:
                raise TypeError(f"unknown argument {name!r}; known: num_envs, autoreset_mode, {', '.join(known)}")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.config = EnvConfig(**settings)
        self.num_envs, self.render_mode = num_envs, self.config.render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._load()
        self._make_spaces()
        self._make_lanes()

    # ----------------------------------------------------------------- construction

    def _load(self) -> None:
        c = self.config
        self.prompts = load_prompts(c.prompts)
        self.reward_config = RewardConfig.from_dict(c.reward)
        self.backbone = load_backbone(c.model, c.revision, c.device, c.dtype, c.attention_stride)
        factor = self.backbone.spatial_factor
        if c.height % factor or c.width % factor:
            raise ValueError(f"height and width must be divisible by {factor}, got {c.height} x {c.width}")
        self.schedule = make_schedule(self.backbone.scheduler_config, c.num_inference_steps, c.device)
        self._grid = self.schedule.timesteps.cpu().numpy()
        self.perception = Perception(c.clip, c.dino, c.scorer, self.backbone.device)
        self.latent_shape = (self.backbone.latent_channels, c.height // factor, c.width // factor)
        self.price = {name: self.backbone.flops(name, self.latent_shape) for name in ("denoiser", "decode", "text")}
        self.price["look"] = self.price["decode"] + self.perception.flops(c.height, c.width)
        self.passes_per_nfe = 2 if c.guidance_scale > 1 else 1

    def _make_spaces(self) -> None:
        parts = self._part_bounds()
        if self.config.obs_mode == "flat":
            names = ("clip_image", "clip_text", "timestep", "quality")
            low, high = (np.concatenate([parts[name][side] for name in names]) for side in (0, 1))
            self.single_observation_space: gym.Space[Any] = gym.spaces.Box(low, high, dtype=np.float32)
        else:
            boxes: dict[str, gym.Space[Any]] = {
                name: gym.spaces.Box(low, high, dtype=np.float32) for name, (low, high) in parts.items()
            }
            self.single_observation_space = gym.spaces.Dict(boxes)
        self.single_action_space = gym.spaces.Discrete(len(Action))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _part_bounds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        def symmetric(width: int, bound: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
            return np.full(width, -bound, np.float32), np.full(width, bound, np.float32)

        high = np.array([1, 2, SCORE_LIMIT, 2 * SCORE_LIMIT, 1, 1, 1, 1], np.float32)
        low = np.array([-1, -2, -SCORE_LIMIT, -2 * SCORE_LIMIT, -1, 0, 0, 0], np.float32)
        clip = self.perception.clip.width
        bounds = {
            "clip_image": symmetric(clip),
            "clip_text": symmetric(clip),
            "timestep": symmetric(TIMESTEP_WIDTH),
            "quality": (low, high),
        }
        if self.config.obs_mode == "dict":
            bounds["dino"] = symmetric(self.perception.dino.width)
            bounds["unet"] = symmetric(self.backbone.feature_width, 1e6)
        return bounds

    def _make_lanes(self) -> None:
        n, device = self.num_envs, self.backbone.device
        conditioning = self.backbone.encode_prompts([""] * n)
        grid = (
            self.latent_shape[1] // self.config.attention_stride,
            self.latent_shape[2] // self.config.attention_stride,
        )
        self.latents = torch.zeros(n, *self.latent_shape, device=device, dtype=self.backbone.dtype)
        self.x0 = torch.zeros_like(self.latents)
        self.conditioning: Conditioning = conditioning
        self.maps = torch.zeros(n, conditioning.content.shape[1], *grid, device=device)
        self.unet_features = torch.zeros(n, self.backbone.feature_width, device=device)
        self.refine_masks = torch.zeros(n, 1, *self.latent_shape[1:], device=device)
        widths = (self.perception.clip.width, self.perception.dino.width)
        self.seen, self.seen_before = (Look.blank(n, *widths, device) for _ in range(2))
        self.clip_text = torch.zeros(n, widths[0], device=device)
        self.pictures: list[np.ndarray | None] = [None] * n  # final pictures of terminated lanes
        self.generators = [torch.Generator() for _ in range(n)]
        self.prompt, self.seed = [""] * n, np.zeros(n, np.int64)
        self.step_index, self.nfe, self.refines = (np.zeros(n, np.int64) for _ in range(3))
        self.net_flops, self.similarity = np.zeros(n), np.ones(n)
        self.decisions = np.zeros(n, np.int64)
        self.done = np.ones(n, bool)  # no lane runs before its first reset
        self._started = False

    # ----------------------------------------------------------------- reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes in all lanes, or in those of ``options["reset_mask"]`` (B,) bool.

        Raises:
            TypeError, ValueError: a prompt that is no string, or the wrong number of prompts, seeds,
            latents or seeds; the message shows the value.
        """
        options = dict(options or {})
        lanes = self._lanes_to_reset(options.pop("reset_mask", None))
        if seed is not None:
            single = seed if isinstance(seed, (int, np.integer)) else seed[0]
            super().reset(seed=None if single is None else int(single))
        self._reset_lanes(lanes, options)
        self._started = True
        return self._observation(), self._info(np.full(self.num_envs, -1), self._zero_reward())

    def _lanes_to_reset(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.arange(self.num_envs)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(f"reset_mask must be {self.num_envs} booleans, at least one True, got {mask!r}")
        return np.flatnonzero(mask)

    def _reset_lanes(self, lanes: np.ndarray, options: dict[str, Any]) -> None:
        given = self._read_options(options, len(lanes))
        for row, lane in enumerate(lanes):
            drawn = self.prompts[int(self.np_random.integers(len(self.prompts)))]
            drawn_seed = int(self.np_random.integers(2**31))
            self.prompt[lane] = given["prompt"][row] if "prompt" in given else drawn
            self.seed[lane] = given["seed"][row] if "seed" in given else drawn_seed
            self.generators[lane].manual_seed(int(self.seed[lane]))
            self.latents[lane] = given["latents"][row] if "latents" in given else self._noise(lane)
            self.pictures[lane] = None
        index = self._index(lanes)
        texts = [self.prompt[lane] for lane in lanes]
        self.conditioning.put(index, self.backbone.encode_prompts(texts))
        self.clip_text[index] = self.perception.clip.text_features(texts)
        for counter in (self.step_index, self.nfe, self.refines, self.decisions):
            counter[lanes] = 0
        self.net_flops[lanes] = 2 * self.price["text"]  # the prompt and the empty prompt of guidance
        self.refine_masks[index] = 0
        self.done[lanes] = False
        for _ in range(self.config.warmup_steps):
            self._continue(lanes)
        self._look(lanes, first=True)

    def _read_options(self, options: dict[str, Any], number: int) -> dict[str, Any]:
        unknown = set(options) - {"prompt", "seed", "latents"}
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: prompt, seed, latents, reset_mask")
        for name, value in options.items():
            if isinstance(value, (str, int)) or not hasattr(value, "__len__"):
                raise TypeError(f"the vector environment takes one {name} per lane, got {value!r}")
            if len(value) != number:
                raise ValueError(f"{len(value)} {name} values for {number} lanes: {str(value)[:200]}")
        if "prompt" in options:
            options["prompt"] = [check_prompt(prompt) for prompt in options["prompt"]]
        for value in options.get("seed", ()):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63:
                raise ValueError(f"a seed must be a non-negative integer, got {value!r}")
        if "latents" in options:
            options["latents"] = torch.as_tensor(options["latents"]).to(self.latents)
            if options["latents"].shape[1:] != self.latents.shape[1:]:
                raise ValueError(f"latents must be (B, {self.latent_shape}), got {tuple(options['latents'].shape)}")
        return options

    def _noise(self, lane: int) -> torch.Tensor:
        """Fresh noise (C, h, w) from the lane's own generator."""
        return draw_noise(self.backbone, self.latent_shape, self.generators[lane])

    def _index(self, lanes: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(lanes, device=self.backbone.device)

    # ----------------------------------------------------------------- step

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Carry out one action (B,) per lane.

        Raises:
            gymnasium.error.ResetNeeded: no reset yet, or (autoreset disabled) every lane has ended.
            ValueError: not B integers in {0, 1, 2}.
        """
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = self._check_actions(actions)
        ended = np.flatnonzero(self.done)
        lanes = np.flatnonzero(~self.done)
        if len(ended) and self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._reset_lanes(ended, {})
        elif len(lanes) == 0:
            raise gym.error.ResetNeeded("every lane has ended: call reset() before step()")
        taken, reward = self._act(lanes, actions)
        terminated = self.done.copy()
        observation, info = self._observation(), self._info(taken, reward)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and terminated.any():
            observation, info = self._reset_finished(np.flatnonzero(terminated), observation, info)
        return observation, reward["total"], terminated, np.zeros(self.num_envs, bool), info

    def _check_actions(self, actions: Any) -> np.ndarray:
        array = np.asarray(actions.cpu() if isinstance(actions, torch.Tensor) else actions)
        if array.shape != (self.num_envs,):
            raise ValueError(f"expected {self.num_envs} actions, got {actions!r}")
        if not np.issubdtype(array.dtype, np.integer) or not np.isin(array, list(Action)).all():
            raise ValueError(f"actions must be integers in {{0, 1, 2}}, got {actions!r}")
        return array.astype(np.int64)

    def _act(self, lanes: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Apply the actions of ``lanes``; returns what was carried out (B,; -1 for the others) and the reward."""
        taken = self._admissible(lanes, actions)
        phi, spent = self._phi(), self.nfe.copy()
        self._continue(lanes[taken[lanes] == Action.CONTINUE])
        self._refine(lanes[taken[lanes] == Action.REFINE])
        self._finish(lanes[taken[lanes] == Action.STOP])
        self.decisions[lanes] += 1
        broke = lanes[~self.done[lanes] & (self.nfe[lanes] + 1 + self.config.finish_steps > self.config.nfe_budget)]
        self._finish(broke)
        looked = self.done[lanes] | (self.decisions[lanes] % self.config.observe_every == 0)
        self._look(lanes[looked])
        similarity = np.ones(self.num_envs)  # without a new look there is no new picture to compare
        similarity[lanes[looked]] = self.similarity[lanes[looked]]
        parts = step_reward(self.reward_config, phi, self._phi(), similarity, self.nfe - spent, self.done)
        idle = np.ones(self.num_envs, bool)
        idle[lanes] = False
        return taken, {name: np.where(idle, 0.0, value) for name, value in parts.items()}

    def _admissible(self, lanes: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """What will be carried out: a capped refinement becomes continue, an unaffordable action becomes stop."""
        taken = np.full(self.num_envs, -1)
        taken[lanes] = actions[lanes]
        refine = taken == Action.REFINE
        poor = self.nfe + self.config.refine_k + self.config.finish_steps > self.config.nfe_budget
        capped = self.refines >= self._refine_cap
        return np.where(refine & capped, Action.CONTINUE, np.where(refine & poor, Action.STOP, taken))

    @property
    def _refine_cap(self) -> float:
        return float("inf") if self.config.max_refines is None else self.config.max_refines

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool; continue and stop always are."""
        masks = np.ones((self.num_envs, len(Action)), bool)
        affordable = self.nfe + self.config.refine_k + self.config.finish_steps <= self.config.nfe_budget
        masks[:, Action.REFINE] = affordable & (self.refines < self._refine_cap) & (self.step_index > 0)
        return masks

    # ----------------------------------------------------------------- dynamics

    def _evaluate(self, lanes: np.ndarray, timesteps: torch.Tensor, alphas: torch.Tensor) -> None:
        """One denoiser evaluation of ``lanes`` at their ``timesteps`` and signal powers; sets x0 and the maps."""
        size = self.config.batch_size
        for start in range(0, len(lanes), size):
            part, rows = self._index(lanes[start : start + size]), slice(start, start + size)
            prediction = self.backbone.predict(
                self.latents[part], timesteps[rows], alphas[rows], self.conditioning[part], self.config.guidance_scale
            )
            self.x0[part], self.maps[part], self.unet_features[part] = (
                prediction.x0,
                prediction.maps,
                prediction.features,
            )
        self.nfe[lanes] += 1
        self.net_flops[lanes] += self.passes_per_nfe * self.price["denoiser"]

    def _continue(self, lanes: np.ndarray) -> None:
        """One solver step of ``lanes`` along the grid; a lane that reaches its end is finished."""
        if len(lanes) == 0:
            return
        index, at = self._index(lanes), self._index(self.step_index[lanes])
        self._evaluate(lanes, self.schedule.timesteps[at], self.schedule.alpha_from[at])
        self.latents[index] = ddim_step(self.schedule, self.latents[index], self.x0[index], at)
        self.step_index[lanes] += 1
        ended = self.step_index[lanes] == self.config.num_inference_steps
        self._end(lanes[ended])

    def _finish(self, lanes: np.ndarray) -> None:
        """Make the picture from where ``lanes`` are: decode x0, or take ``finish_steps`` coarse steps first."""
        if len(lanes) == 0:
            return
        index, steps = self._index(lanes), self.config.finish_steps
        if steps == 0:
            self.latents[index] = self.x0[index]
        start = self.schedule.timesteps[self._index(self.step_index[lanes])]
        for j in range(steps):
            self._coarse_step(lanes, start, j, steps)
        self._end(lanes)

    def _coarse_step(self, lanes: np.ndarray, start: torch.Tensor, j: int, steps: int) -> None:
        """The j-th of ``steps`` equal solver steps from timestep ``start`` (B,) to zero."""
        index = self._index(lanes)
        here, there = (start * (steps - j)) // steps, (start * (steps - j - 1)) // steps
        alpha_here = self.schedule.alphas_cumprod[here]
        final = torch.ones_like(alpha_here)
        alpha_there = final if j + 1 == steps else self.schedule.alphas_cumprod[there]
        self._evaluate(lanes, here, alpha_here)
        self.latents[index] = ddim_between(self.latents[index], self.x0[index], alpha_here, alpha_there)

    def _end(self, lanes: np.ndarray) -> None:
        """Mark ``lanes`` as terminated; their latents are final."""
        self.done[lanes] = True

    # ----------------------------------------------------------------- RegionRefine

    def _refine(self, lanes: np.ndarray) -> None:
        if len(lanes) == 0:
            return
        self.refine_masks[self._index(lanes)] = self._make_masks(lanes)
        self.refines[lanes] += 1
        if self.config.refine_mode == "rewind":
            self._rewind(lanes)
        else:
            self._refine_in_place(lanes)

    def _make_masks(self, lanes: np.ndarray) -> torch.Tensor:
        """Refinement masks (L, 1, h, w) of ``lanes`` from the latest evaluation's attention."""
        c, index, noise = self.config, self._index(lanes), None
        if c.mask == "random":
            side = self.maps.shape[-2:]
            noise = torch.stack([torch.randn(1, *side, generator=self.generators[lane]) for lane in lanes])
            noise = noise.to(self.backbone.device)
        return refinement_mask(
            c.mask,
            self.maps[index],
            self.conditioning.content[index],
            (self.latent_shape[1], self.latent_shape[2]),
            c.mask_threshold,
            c.blur_sigma,
            noise,
        )

    def _renoise_timesteps(self, lanes: np.ndarray) -> np.ndarray:
        total = len(self.schedule.alphas_cumprod)
        current = self._grid[np.minimum(self.step_index[lanes], len(self._grid) - 1)]
        return np.array([renoise_timestep(self.config.renoise, int(t), total) for t in current])

    def _rewind(self, lanes: np.ndarray) -> None:
        """Go back to the grid point nearest the re-noise level and step on, the outside held to its old x0."""
        index = self._index(lanes)
        nearest = np.abs(self._grid[None] - self._renoise_timesteps(lanes)[:, None]).argmin(1)
        nearest = np.minimum(nearest, self.step_index[lanes])  # a refinement never skips steps
        self.step_index[lanes] = nearest
        old = self.x0[index].clone()
        noise = torch.stack([self._noise(lane) for lane in lanes])
        at = self._index(nearest)
        self.latents[index] = add_noise(old, noise, self.schedule.alpha_from[at])
        running = np.ones(len(lanes), bool)
        for _ in range(self.config.refine_k):
            self._continue(lanes[running])
            # Before the next evaluation the outside is brought to that evaluation's own noise level.
            rows = np.flatnonzero(running)
            self._hold_outside(lanes[rows], old[self._index(rows)], noise[self._index(rows)])
            running &= ~self.done[lanes]

    def _hold_outside(self, lanes: np.ndarray, old: torch.Tensor, noise: torch.Tensor) -> None:
        """Set the latents outside the mask to ``old`` x0 noised to the lane's present level."""
        index = self._index(lanes)
        level = self.schedule.alpha_to[self._index(self.step_index[lanes] - 1)]
        mask = self.refine_masks[index].to(self.latents.dtype)
        held = add_noise(old, noise, level)
        self.latents[index] = mask * self.latents[index] + (1 - mask) * held
        self.x0[index] = mask * self.x0[index] + (1 - mask) * old

    def _refine_in_place(self, lanes: np.ndarray) -> None:
        """Renew x0 inside the mask from the re-noise level down in k coarse steps, then noise it back."""
        index, steps = self._index(lanes), self.config.refine_k
        old = self.x0[index].clone()
        start = self._index(self._renoise_timesteps(lanes))
        noise = torch.stack([self._noise(lane) for lane in lanes])
        mask = self.refine_masks[index].to(self.latents.dtype)
        self.latents[index] = add_noise(old, noise, self.schedule.alphas_cumprod[start])
        for j in range(steps):
            self._coarse_step(lanes, start, j, steps)
            if j + 1 < steps:
                level = self.schedule.alphas_cumprod[(start * (steps - j - 1)) // steps]
                self.latents[index] = mask * self.latents[index] + (1 - mask) * add_noise(old, noise, level)
        self.x0[index] = mask * self.x0[index] + (1 - mask) * old
        current = self._index(self.step_index[lanes])
        self.latents[index] = add_noise(self.x0[index], noise, self.schedule.alpha_from[current])

    # ----------------------------------------------------------------- looking

    def _look(self, lanes: np.ndarray, first: bool = False) -> None:
        """Decode and score ``lanes``: previews of running ones, final pictures of finished ones."""
        if len(lanes) == 0:
            return
        index = self._index(lanes)
        finished = self.done[lanes]
        shown = torch.where(self._index(finished)[:, None, None, None], self.latents[index], self.x0[index])
        pictures = self.backbone.decode(shown)
        look = self.perception.look(pictures, [self.prompt[lane] for lane in lanes])
        if not first:
            before = Look(*(getattr(self.seen, name)[index] for name in vars(self.seen)))
            self.seen_before.put(index, before)
            self.similarity[lanes] = (before.dino * look.dino).sum(1).clamp(-1, 1).cpu().numpy()
        else:
            self.seen_before.put(index, look)
            self.similarity[lanes] = 1.0
        self.seen.put(index, look)
        # A finished lane pays for its decode only: nobody acts on the scores of a final picture.
        self.net_flops[lanes] += np.where(finished, self.price["decode"], self.price["look"])
        for row in np.flatnonzero(finished):
            self.pictures[lanes[row]] = to_uint8(pictures[row : row + 1])[0]

    def _phi(self) -> np.ndarray:
        """Quality (B,) of what was last seen."""
        clip, reward = (value.double().cpu().numpy() for value in (self.seen.clip_score, self.seen.reward_score))
        return quality(clip, reward, self.reward_config)

    # ----------------------------------------------------------------- what the outside sees

    def _observation(self) -> Any:
        at = np.minimum(self.step_index, self.config.num_inference_steps - 1)
        parts = {
            "clip_image": self.seen.clip_image,
            "clip_text": self.clip_text,
            "timestep": timestep_embedding(self.schedule.timesteps[self._index(at)]),
            "quality": self._quality_slots(),
        }
        if self.config.obs_mode == "dict":
            parts |= {"dino": self.seen.dino, "unet": self.unet_features}
            result = {name: value.clone() for name, value in parts.items()}
            return result if self.config.obs_backend == "torch" else {k: v.cpu().numpy() for k, v in result.items()}
        flat = torch.cat(list(parts.values()), dim=1).float()
        return flat if self.config.obs_backend == "torch" else flat.cpu().numpy()

    def _quality_slots(self) -> torch.Tensor:
        """The eight numbers of `QUALITY`, (B, 8)."""
        ratios = np.stack(
            [
                self.similarity,
                self.step_index / self.config.num_inference_steps,
                np.minimum(1.0, self.nfe / self.config.nfe_budget),
            ]
        )
        similarity, steps, nfe = torch.as_tensor(ratios, dtype=torch.float32, device=self.backbone.device)
        slots = [
            self.seen.clip_score.clamp(-1, 1),
            self.seen.clip_score - self.seen_before.clip_score,
            self.seen.reward_score,
            self.seen.reward_score - self.seen_before.reward_score,
            similarity,
            steps,
            nfe,
            attention_entropy(self.maps, self.conditioning.content).clamp(0, 1),
        ]
        assert len(slots) == len(QUALITY)
        return torch.stack(slots, dim=1)

    def _zero_reward(self) -> dict[str, np.ndarray]:
        return {name: np.zeros(self.num_envs) for name in (*COMPONENTS, "total")}

    def _info(self, taken: np.ndarray, reward: dict[str, np.ndarray]) -> dict[str, Any]:
        values: dict[str, Any] = {
            "prompt": np.array(self.prompt, dtype=object),
            "seed": self.seed.copy(),
            "step_index": self.step_index.copy(),
            "nfe": self.nfe.copy(),
            "forward_passes": self.nfe * self.passes_per_nfe,
            "net_flops": self.net_flops.copy(),
            "action_mask": self.action_masks(),
            "action_taken": taken,
            "clip_score": self.seen.clip_score.cpu().numpy().copy(),
            "reward_score": self.seen.reward_score.cpu().numpy().copy(),
            "reward": reward,
        }
        present = {f"_{name}": np.ones(self.num_envs, bool) for name in values}
        return values | present

    def _reset_finished(self, lanes: np.ndarray, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """SAME_STEP: restart ``lanes`` now; the last observation and info move to ``final_obs`` and ``final_info``."""
        ended = np.zeros(self.num_envs, bool)
        ended[lanes] = True
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in lanes:
            final_obs[lane] = _row(observation, lane)
        self._reset_lanes(lanes, {})
        fresh = self._info(info["action_taken"], info["reward"])
        last = info | {name: ended for name in info if name.startswith("_")}
        final = {"final_obs": final_obs, "_final_obs": ended, "final_info": last, "_final_info": ended}
        return self._observation(), fresh | final

    def preview_images(self) -> np.ndarray:
        """Decoded latest clean predictions of all lanes: uint8 (B, H, W, 3)."""
        return to_uint8(self.backbone.decode(self.x0))

    def final_image(self, lane: int) -> np.ndarray:
        """The final picture of a terminated lane: uint8 (H, W, 3).

        Raises:
            RuntimeError: that lane has not ended.
        """
        picture = self.pictures[lane]
        if picture is None:
            raise RuntimeError(f"lane {lane} has not ended, so it has no final picture")
        return picture

    @property
    def refine_mask(self) -> np.ndarray:
        """Mask of each lane's latest refinement, float32 (B, h, w) in [0, 1]; zeros if there was none."""
        return self.refine_masks[:, 0].float().cpu().numpy().copy()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Each lane's final picture, or its preview before the end: uint8 (H, W, 3) each."""
        if self.render_mode is None:
            return None
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before render()")
        previews = self.preview_images()
        final = self.pictures
        return tuple(p if f is None else f for p, f in zip(previews, final, strict=True))


class DiffusionDenoiseEnv(gym.Env):
    """One lane of `DiffusionDenoiseVectorEnv`, whose docstring is the specification.

    Arguments are the same but for ``num_envs`` and ``autoreset_mode``; ``reset(options={"prompt": str, "seed": int,
    "latents": (C, h, w) or (1, C, h, w)})``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, **settings: Any) -> None:
        self.vector = DiffusionDenoiseVectorEnv(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **settings)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode

    @property
    def config(self) -> EnvConfig:
        """The settings."""
        return self.vector.config

    @property
    def latents(self) -> torch.Tensor:
        """The live latents (1, C, h, w) on the device."""
        return self.vector.latents

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see `DiffusionDenoiseVectorEnv.reset`."""
        super().reset(seed=seed)
        self.vector._np_random = self.np_random  # one stream of random numbers, the one users can seed
        options = {name: self._one(name, value) for name, value in (options or {}).items()}
        observation, info = self.vector.reset(options=options)
        return _row(observation, 0), _single_info(info)

    def _one(self, name: str, value: Any) -> Any:
        if name == "latents":
            latents = torch.as_tensor(value)
            return latents if latents.ndim == 4 else latents[None]
        return [check_prompt(value) if name == "prompt" else value]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Carry out one action.

        Raises:
            gymnasium.error.ResetNeeded: no episode is running; ValueError: not 0, 1 or 2.
        """
        observation, reward, terminated, truncated, info = self.vector.step(np.asarray([action]))
        return _row(observation, 0), float(reward[0]), bool(terminated[0]), bool(truncated[0]), _single_info(info)

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (3,) bool."""
        return self.vector.action_masks()[0]

    def final_image(self) -> np.ndarray:
        """The final picture, uint8 (H, W, 3); RuntimeError before the end."""
        return self.vector.final_image(0)

    def render(self) -> np.ndarray | None:
        """The final picture, or the preview before the end: uint8 (H, W, 3)."""
        pictures = self.vector.render()
        return None if pictures is None else pictures[0]


def _row(observation: Any, lane: int) -> Any:
    """One lane of a batched observation, copied."""
    if isinstance(observation, dict):
        return {name: _row(value, lane) for name, value in observation.items()}
    return observation[lane].clone() if isinstance(observation, torch.Tensor) else observation[lane].copy()


def _single_info(info: dict[str, Any]) -> dict[str, Any]:
    """The info of lane 0, without the vector form's presence masks."""
    single = {}
    for name, value in info.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict):
            single[name] = {key: float(item[0]) for key, item in value.items()}
        else:
            single[name] = value[0].item() if isinstance(value[0], np.generic) else value[0]
    return single
