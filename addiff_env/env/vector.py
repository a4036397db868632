"""Denoising as a Markov decision process: the vector environment owns the dynamics, the single one is its view."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from addiff_env.diffusion.attention import attention_entropy
from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env.config import EnvConfig
from addiff_env.env.info import Info
from addiff_env.env.prompts import check_prompt, load_prompts
from addiff_env.env.refine import RefinableLanes
from addiff_env.env.reward import COLUMNS, RewardComponents, RewardConfig, quality, step_reward
from addiff_env.env.validation import as_list, at_least, check_seed, checked, plain, shown
from addiff_env.loading.isolation import isolated
from addiff_env.perception.features import (
    QUALITY,
    TIMESTEP_WIDTH,
    Latents,
    Look,
    Perception,
    look_precision,
    timestep_embedding,
)
from addiff_env.perception.previews import FullDecoder, make_previewer
from addiff_env.types import Action


class _JsonableSpec:
    """Gymnasium remembers the settings in the environment's spec as they were given; here JSON takes them."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """What the environment was made from; ``spec.to_json()`` works whatever types the settings came in."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = copy.copy(spec)
            spec.kwargs = {name: self._jsonable(name, value) for name, value in spec.kwargs.items()}
        self._spec = spec

    @staticmethod
    def _jsonable(name: str, value: Any) -> Any:
        return plain(_autoreset_mode(value)) if name == "autoreset_mode" else plain(value)


class DiffusionDenoiseVectorEnv(_JsonableSpec, RefinableLanes, VectorEnv):
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
    | outlook | 1 | [-limit, limit] | only with a scorer of latents: its score of going on to the schedule's end |
    | clip_score | 1 | [-1, 1] | cosine of picture and prompt |
    | clip_delta | 1 | [-2, 2] | its change since the look before |
    | reward_score | 1 | [-limit, limit] | the scorer's score; ``limit`` is its own: 30 for a logit, 1 for a cosine |
    | reward_delta | 1 | [-2 limit, 2 limit] | its change since the look before |
    | dino_similarity | 1 | [-1, 1] | cosine of this and the preview before |
    | step_ratio | 1 | [0, 1] | solver steps done / num_inference_steps |
    | nfe_ratio | 1 | [0, 1] | NFE / budget |
    | attention_entropy | 1 | [0, 1] | mean entropy of the content tokens' maps |

    ``reads`` names what is looked at: ``clip_image``, ``clip_text``, ``dino``, ``reward``. The slots of what is left
    out are 0 (dino_similarity: 1), and it costs nothing. A scorer of latents (`addiff_env.scorers.LatentScorer`) scores
    what *stopping* here would give and needs no picture: with ``reads=["clip_text", "reward"]`` nothing is decoded.

    ## Rewards
    See `addiff_env.env.reward`; ``info["reward_components"]`` carries every component.

    ## Start, end
    ``reset(options={"prompt": [...], "seed": [...], "latents": ...})`` names the lanes' prompts (B strings), seeds
    (B ints) or initial latents (B, C, h, w), as diffusers' pipelines take them; what is left out is drawn.
    ``"negative_prompt"`` (B strings; None: the setting's) is what guidance leads away from. With
    ``"reset_mask"`` (B,) bool they are those of the lanes that start. An episode is ``terminated`` by *stop*, by
    the last solver step, or when the budget is spent; it is ``truncated`` after ``max_episode_steps`` decisions, if
    these are limited. With ``AutoresetMode.DISABLED`` an ended lane waits, at no cost, until
    ``reset(options={"reset_mask": ...})`` names it.

    ## Info
    ``prompt, seed, step_index, nfe, forward_passes, net_flops, action_mask, action_taken, clip_score,
    reward_score, fault, reward_components``; one array over lanes each. ``reward_components`` (B, 6) is a
    `addiff_env.env.reward.RewardComponents`: ``info["reward_components"]["terminal"]`` (B,).
    ``action_mask`` (B, 3) int8 is 1 where an action is admissible: ``action_space.sample(tuple(info["action_mask"]))``
    draws such actions, and `action_masks` has the same as bool. ``action_taken`` is -1 where nothing was carried out.
    ``fault`` says that the lane's numbers stopped being finite: it is terminated with its last finite prediction and
    pays the reward's ``fault`` penalty. Where that happens in the warm-up, ``reset`` says so in ``fault``, and the
    lane's first step ends it so, whatever the action. Everything is a number but for ``prompt``, which
    ``info["prompt"]`` gives and iterating passes over: TorchRL, `NumpyToTorch` and Gymnasium's vector environments of
    single ones collect what is iterated over (`addiff_env.env.info.Info`). ``text_info=True`` lists it with the rest.

    ## Arguments
    The fields of `EnvConfig` (``model, revision, device, dtype, solver, num_inference_steps, ...``), and
    ``num_envs``; ``autoreset_mode`` is one of `gymnasium.vector.AutoresetMode`, or its name or value;
    ``max_episode_steps`` limits a lane's decisions (None or -1: no limit), which `gymnasium.make_vec` passes on where
    the id has such a limit.

    Those that fit a model into memory:
    ``batch_size``, lanes of one denoiser call; ``decode_memory``, GiB that a decode's activations may take, by which it
    is sliced (None: half of a GPU's free memory, elsewhere 4; at least one picture is decoded at a time); ``offload``,
    networks that wait on the host: ``none``, ``model`` (all but the one at work), ``sequential`` (all but the layer at
    work; slowest). ``negative_prompt`` is what guidance leads away from, in lanes that are not given their own (None:
    as diffusers' pipeline without one); it needs ``guidance_scale`` above 1, and a model other than Flux.
    ``look_precision`` is what encoders and scorer look in: ``auto``, on GPUs the model's half precision, or
    ``float32``, which on tensor cores may take as long as a step.

    >>> import gymnasium as gym
    >>> envs = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=4)  # doctest: +SKIP
    >>> obs, info = envs.reset(options={"prompt": ["a red circle"] * 4, "seed": [0, 1, 2, 3]})  # doctest: +SKIP

    ## Threads, torch's global modes
    Environments of one process share their frozen models. Each may be stepped in a thread of its own and gives what
    it gives alone, bit for bit; one environment belongs to one thread at a time. A shared model serves one thread after
    the other, so threads save nothing of the denoiser's own time: lanes of one vector environment do. While a model is
    loaded, no environment steps. The caller's default dtype and device, autocast, inference mode and gradient mode
    change no result (`addiff_env.loading.isolation`); what changes arithmetic itself (TF32, threads of an operation) is
    his.

    ## Version history
    v0: first version.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    _tensors = (*RefinableLanes._tensors, "clip_text")
    _arrays = (*RefinableLanes._arrays, "clip_score", "reward_score", "similarity", "fault", "decisions")

    @isolated()
    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        **settings: Any,
    ) -> None:
        known = [f.name for f in fields(EnvConfig)]
        for name in settings:
            if name not in known:
                own = "num_envs, autoreset_mode, max_episode_steps"
                raise TypeError(f"unexpected keyword argument {name!r}; known: {own}, {', '.join(known)}")
        self.num_envs = checked("num_envs", num_envs, Annotated[int, at_least(1)])
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.max_episode_steps = _step_limit(max_episode_steps)
        self.config = EnvConfig(**settings)
        self.render_mode = self.config.render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._load()
        self._make_spaces()
        self._make_lanes()

    # ----------------------------------------------------------------- construction

    def _load(self) -> None:
        c = self.config
        self.prompts = load_prompts(c.prompts)
        self.reward_config = RewardConfig.from_dict(c.reward)
        self._set_up()
        self.previewer = make_previewer(c.preview, self.backbone, c.preview_model)
        precision = look_precision(c.look_precision, self.backbone.device, self.backbone.dtype)
        self.perception = Perception(
            c.clip, c.dino, c.scorer, self.backbone.device, precision, c.reads, self.backbone.encode_pictures
        )
        self._check_readings()
        self.reward_config = self.reward_config.for_scorer(self.perception.scorer.mean, self.perception.scorer.std)
        look = self.perception.flops(c.height, c.width)
        self.price["preview"] = self.previewer.flops(self.latent_shape)
        self.price["look"] = look + (self.price["preview"] if self.perception.reads_pictures else 0)
        self.price["verdict"] = self.perception.verdict_flops(c.height, c.width)
        self.price["verdict"] += 0 if self.perception.reads_latents else self.price["preview"]
        self.price["start"] += self.perception.text_flops()

    def _check_readings(self) -> None:
        """Refuse a reward that pays for what is not read, and a scorer of other latents."""
        for part, weight in (("clip_image", "clip_weight"), ("reward", "reward_weight"), ("dino", "instability")):
            if part not in self.perception.reads and (value := getattr(self.reward_config, weight)):
                raise ValueError(f"reads leaves out {part!r}, but the reward has {weight} {value}: set it to 0")
        wanted = getattr(self.perception.scorer, "latent_shape", self.latent_shape)
        if wanted != self.latent_shape:
            raise ValueError(f"scorer {self.config.scorer!r} reads latents {wanted}, these are {self.latent_shape}")

    def _make_spaces(self) -> None:
        parts = self._part_bounds()
        if self.config.obs_mode == "flat":
            names = self.perception.parts
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

        limit = self.perception.score_limit
        high = np.array([1, 2, limit, 2 * limit, 1, 1, 1, 1], np.float32)
        low = np.array([-1, -2, -limit, -2 * limit, -1, 0, 0, 0], np.float32)
        clip = self.perception.clip.width
        bounds = {
            "clip_image": symmetric(clip),
            "clip_text": symmetric(clip),
            "timestep": symmetric(TIMESTEP_WIDTH),
            **({"outlook": symmetric(1, limit)} if self.perception.reads_latents else {}),
            "quality": (low, high),
        }
        if self.config.obs_mode == "dict":
            bounds["dino"] = symmetric(self.perception.dino.width)
            bounds["unet"] = symmetric(self.backbone.feature_width, 1e6)
        return bounds

    def _make_lanes(self) -> None:
        super()._make_lanes()
        n, device = self.num_envs, self.backbone.device
        widths = (self.perception.clip.width, self.perception.dino.width)
        self.seen, self.seen_before = (Look.blank(n, *widths, device) for _ in range(2))
        self.clip_text = torch.zeros(n, widths[0], device=device)
        self.pictures: list[np.ndarray | None] = [None] * n  # final pictures of terminated lanes
        # What the last look showed, on the host: one transfer a step serves reward and info.
        self.clip_score, self.reward_score, self.similarity = np.zeros(n), np.zeros(n), np.ones(n)
        self.fault, self.decisions = np.zeros(n, bool), np.zeros(n, np.int64)
        self._started = False

    @isolated()
    def state_dict(self) -> dict[str, Any]:
        """All lanes, what was seen of them, and the stream that new episodes are drawn from; see `Lanes.state_dict`."""
        looks = {
            name: {key: value.cpu().clone() for key, value in vars(getattr(self, name)).items()}
            for name in ("seen", "seen_before")
        }
        pictures = [None if picture is None else torch.from_numpy(picture.copy()) for picture in self.pictures]
        stream = self.np_random.bit_generator.state
        return super().state_dict() | looks | {"pictures": pictures, "stream": stream, "started": self._started}

    @isolated()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; raises as `Lanes.load_state_dict`."""
        super().load_state_dict(state)
        every = self._index(np.arange(self.num_envs))
        for name in ("seen", "seen_before"):
            look: Look = getattr(self, name)
            look.put(every, Look(**{key: value.to(self.backbone.device) for key, value in state[name].items()}))
        self.pictures = [None if picture is None else picture.numpy().copy() for picture in state["pictures"]]
        self.np_random.bit_generator.state = state["stream"]
        self._started = state["started"]

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the models; the last environment that held them frees their memory."""
        for name in ("backbone", "perception", "previewer"):
            self.__dict__.pop(name, None)
        self._started = False

    # ----------------------------------------------------------------- reset

    @isolated()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes in all lanes, or in those of ``options["reset_mask"]`` (B,) bool.

        Raises:
            TypeError, ValueError: a prompt that is no string, a seed that is no whole number, latents of another shape
            or not finite, or the wrong number of any of them; the message shows the value.
        """
        if "backbone" not in self.__dict__:
            raise gym.error.ClosedEnvironmentError("reset() of an environment that was closed")
        options = _as_mapping(options)
        lanes = self._lanes_to_reset(options.pop("reset_mask", None))
        given = self._read_options(options, len(lanes))
        self._reset_lanes(lanes, given, self._seed(seed))
        self._started = True
        return self._observation(), self._info(np.full(self.num_envs, -1), self._zero_reward())

    def _seed(self, seed: int | Sequence[int | None] | None) -> list[np.random.Generator] | None:
        """Seed the environment's stream; a sequence gives each lane its own draws, as single environments would have.

        Raises:
            ValueError: no seed, or not one per lane; the message shows the value.
        """
        if seed is None:
            return None
        values = plain(seed)
        if not isinstance(values, list):
            self._np_random, self._np_random_seed = seeding.np_random(check_seed(seed))
            return None
        if len(values) != self.num_envs:
            raise ValueError(f"{len(values)} seeds for {self.num_envs} lanes: {shown(seed)}")
        seeds = [None if value is None else check_seed(value) for value in values]
        if any(value is not None for value in seeds):
            entropy = [0 if value is None else value + 1 for value in seeds]
            self._np_random = np.random.default_rng(entropy)  # of later episodes
        return [self.np_random if value is None else seeding.np_random(value)[0] for value in seeds]

    def _lanes_to_reset(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.arange(self.num_envs)
        mask = np.asarray(plain(mask))
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(f"reset_mask must be {self.num_envs} booleans, at least one True, got {mask!r}")
        return np.flatnonzero(mask)

    def _reset_lanes(
        self, lanes: np.ndarray, given: dict[str, Any], streams: list[np.random.Generator] | None = None
    ) -> None:
        """Start ``lanes``; ``given`` is what `_read_options` made of the options."""
        prompts, seeds = [], []
        for row, lane in enumerate(lanes):
            stream = self.np_random if streams is None else streams[lane]
            drawn = self.prompts[int(stream.integers(len(self.prompts)))], int(stream.integers(2**31))
            prompts.append(given["prompt"][row] if "prompt" in given else drawn[0])
            seeds.append(given["seed"][row] if "seed" in given else drawn[1])
            self.pictures[lane] = None
        self._start_lanes(lanes, prompts, seeds, given.get("latents"), given.get("negative_prompt"))
        index = self._index(lanes)
        if "clip_text" in self.config.reads:
            self.clip_text[index] = self.perception.clip.text_features(prompts)
        self.refine_masks[index] = 0
        self.refines[lanes], self.decisions[lanes], self.fault[lanes] = 0, 0, False
        for step in range(self.config.warmup_steps):
            self._continue(lanes, capture=step == self.config.warmup_steps - 1)
        self._mark_faulty(lanes)  # an episode begins all the same: its first step ends it
        if self.config.warmup_steps:
            self._look(lanes, first=True)
        else:
            self._look_at_nothing(lanes)

    def _read_options(self, options: dict[str, Any], number: int) -> dict[str, Any]:
        unknown = set(options) - {"prompt", "negative_prompt", "seed", "latents"}
        if unknown:
            known = "prompt, negative_prompt, seed, latents, reset_mask"
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: {known}")
        given: dict[str, Any] = {}
        for name, value in options.items():
            rows = value if name == "latents" and _depth(value) > 1 else as_list(value)
            if rows is None:
                raise TypeError(f"the vector environment takes one {name} per lane, got {shown(value)}")
            if len(rows) != number:
                raise ValueError(f"{len(rows)} {name} values for {number} lanes: {str(value)[:200]}")
            given[name] = rows
        for name, check in (
            ("prompt", check_prompt),
            ("negative_prompt", self._check_negative_prompt),
            ("seed", check_seed),
        ):
            if name in given:
                given[name] = [check(value) for value in given[name]]
        if "latents" in given:
            given["latents"] = self._read_latents(given["latents"])
        return given

    def _check_negative_prompt(self, value: Any) -> str | None:
        if value is None:
            return None
        self.backbone.check_negative_prompt(check_prompt(value), self.config.guidance_scale)
        return value

    def _read_latents(self, values: Any) -> torch.Tensor:
        """Initial latents (B, C, h, w) on the device, of a tensor, an array or a sequence of lanes."""
        try:
            rows = values if hasattr(values, "shape") else torch.stack([torch.as_tensor(row) for row in values])
            rows = torch.as_tensor(rows)
            if rows.is_complex() or rows.dtype == torch.bool:
                raise TypeError(f"they are {rows.dtype}")
            latents = rows.to(self.latents)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"latents must be numbers (B, C, h, w), got {str(values)[:200]}: {error}") from error
        if latents.shape[1:] != self.latents.shape[1:]:
            raise ValueError(f"latents must be (B, {self.latent_shape}), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError(f"latents must be finite, {int((~latents.isfinite()).sum())} of their values are not")
        return latents

    # ----------------------------------------------------------------- step

    @isolated()
    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Carry out one action (B,) per lane.

        Raises:
            gymnasium.error.ResetNeeded: no reset yet, or (autoreset disabled) every lane has ended.
            ValueError: not B integers in {0, 1, 2}.
        """
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = self._check_actions(actions)
        waiting = self.done | self._out_of_steps()
        ended, lanes = np.flatnonzero(waiting), np.flatnonzero(~waiting)
        if len(ended) and self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._reset_lanes(ended, {})
        elif len(lanes) == 0:
            raise gym.error.ResetNeeded("every lane has ended: call reset() before step()")
        taken, reward = self._act(lanes, actions)
        terminated, truncated = self.done.copy(), self._out_of_steps()
        observation, info = self._observation(), self._info(taken, reward)
        finished = np.flatnonzero(terminated | truncated)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and len(finished):
            observation, info = self._reset_finished(finished, observation, info)
        return observation, reward["total"], terminated, truncated, info

    def _out_of_steps(self) -> np.ndarray:
        """Which lanes (B,) bool have made all the decisions that an episode may have."""
        if self.max_episode_steps is None:
            return np.zeros(self.num_envs, bool)
        return self.decisions >= self.max_episode_steps

    def _check_actions(self, actions: Any) -> np.ndarray:
        try:
            array = np.asarray(actions.cpu() if isinstance(actions, torch.Tensor) else actions)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"expected {self.num_envs} actions, got {actions!r}: {error}") from error
        if array.shape != (self.num_envs,):
            raise ValueError(f"expected {self.num_envs} actions, got {actions!r}")
        if not np.issubdtype(array.dtype, np.integer) or not np.isin(array, list(Action)).all():
            raise ValueError(f"actions must be integers in {{0, 1, 2}}, got {actions!r}")
        return array.astype(np.int64)

    def _act(self, lanes: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Apply the actions of ``lanes``; returns what was carried out (B,; -1 for the others) and the reward."""
        phi, spent = self._phi(), self._spent()
        going = lanes[~self.fault[lanes]]  # who broke down in its warm-up has nothing left to decide
        taken = self._admissible(going, actions)
        self._continue(going[taken[going] == Action.CONTINUE])
        self._refine(going[taken[going] == Action.REFINE])
        self._finish(going[taken[going] == Action.STOP])
        self.decisions[lanes] += 1
        broke = going[~self.done[going] & (self.nfe[going] + 1 + self.config.finish_steps > self.config.nfe_budget)]
        self._finish(broke)
        self._mark_faulty(lanes)
        self.done[lanes[self.fault[lanes]]] = True
        looked = self.done[lanes] | (self.decisions[lanes] % self.config.observe_every == 0)
        self._look(lanes[looked])
        similarity = np.ones(self.num_envs)  # without a new look there is no new picture to compare
        similarity[lanes[looked]] = self.similarity[lanes[looked]]
        cost = self._spent() - spent
        parts = step_reward(self.reward_config, phi, self._phi(), similarity, cost, self.done, self.fault)
        idle = np.ones(self.num_envs, bool)
        idle[lanes] = False
        return taken, {name: np.where(idle, 0.0, value) for name, value in parts.items()}

    def _spent(self) -> np.ndarray:
        """What each lane (B,) has cost so far, in the reward's ``efficiency_unit``."""
        if self.reward_config.efficiency_unit == "nfe":
            return self.nfe.copy()
        return self.net_flops / (self.passes_per_nfe * self.price["denoiser"])

    def _mark_faulty(self, lanes: np.ndarray) -> None:
        """Mark those of ``lanes`` whose numbers stopped being finite; what they show is their last finite x0."""
        faulty = lanes[self.faults[self._index(lanes)].cpu().numpy()]
        if len(faulty) == 0:
            return
        index = self._index(faulty)
        self.latents[index] = self.x0[index]
        self.fault[faulty] = True

    def _admissible(self, lanes: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """What will be carried out: a capped refinement becomes continue, an unaffordable action becomes stop.

        Before the first evaluation there is nothing to stop with or to refine: every action continues.
        """
        taken = np.full(self.num_envs, -1)
        taken[lanes] = np.where(self.nfe[lanes] == 0, Action.CONTINUE, actions[lanes])
        refine = taken == Action.REFINE
        poor = self.nfe + self.config.refine_k + self.config.finish_steps > self.config.nfe_budget
        capped = self.refines >= self._refine_cap
        return np.where(refine & capped, Action.CONTINUE, np.where(refine & poor, Action.STOP, taken))

    @property
    def _refine_cap(self) -> float:
        return float("inf") if self.config.max_refines is None else self.config.max_refines

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool; continue always is, stop once there is a prediction."""
        masks = np.ones((self.num_envs, len(Action)), bool)
        masks[:, Action.STOP] = self.nfe > 0
        affordable = self.nfe + self.config.refine_k + self.config.finish_steps <= self.config.nfe_budget
        masks[:, Action.REFINE] = affordable & (self.refines < self._refine_cap) & (self.nfe > 0)
        return masks

    # ----------------------------------------------------------------- looking

    def _look(self, lanes: np.ndarray, first: bool = False) -> None:
        """Decode and score ``lanes``: previews of running ones, final pictures of finished ones."""
        for rows in self._chunks(len(lanes)):
            self._look_at(lanes[rows], first)

    def _look_at(self, lanes: np.ndarray, first: bool) -> None:
        index, finished = self._index(lanes), self.done[lanes]
        pictures = self._decode(lanes) if self.perception.reads_pictures or finished.any() else None
        look = self.perception.look(
            pictures, [self.prompt[lane] for lane in lanes], True, self._latents_to_score(lanes)
        )
        before = look if first else Look(*(getattr(self.seen, name)[index] for name in vars(self.seen)))
        self.seen_before.put(index, before)
        self.seen.put(index, look)
        comparable = not first and "dino" in self.config.reads
        same = (before.dino * look.dino).sum(1).clamp(-1, 1) if comparable else torch.ones_like(look.clip_score)
        numbers = torch.stack([look.clip_score, look.reward_score, same]).double().cpu().numpy()
        self.clip_score[lanes], self.reward_score[lanes], self.similarity[lanes] = numbers
        # A finished lane pays for its decode only: nobody acts on the scores of a final picture.
        self.net_flops[lanes] += np.where(finished, self.price["decode"], self.price["look"])
        if pictures is not None and finished.any():
            kept = to_uint8(pictures[self._index(np.flatnonzero(finished))])
            for lane, picture in zip(lanes[finished], kept, strict=True):
                self.pictures[lane] = picture

    def _latents_to_score(self, lanes: np.ndarray) -> Latents | None:
        """What a scorer of latents is asked about ``lanes``; None for others."""
        if not self.perception.reads_latents:
            return None
        index, finished = self._index(lanes), self.done[lanes]
        at = np.minimum(self.step_index[lanes], self.config.num_inference_steps - 1)
        left = np.stack([np.full(len(lanes), self.config.finish_steps), self.schedule.num_inference_steps - at], 1)
        done = self._index(finished)
        return Latents(
            _choose(done, self.latents[index], self.x0[index]),
            torch.where(done, 0, self.schedule.timesteps[self._index(at)]),
            self._index(np.where(finished[:, None], 0, left)),
        )

    def _decode(self, lanes: np.ndarray) -> torch.Tensor:
        """Final pictures of finished ``lanes``, previews of the others if they are read: (L, 3, H, W) in [0, 1]."""
        index, finished = self._index(lanes), self.done[lanes]
        reads = self.perception.reads_pictures
        if isinstance(self.previewer, FullDecoder) and reads:
            return _finite(self.backbone.decode(_choose(self._index(finished), self.latents[index], self.x0[index])))
        pictures = torch.zeros(len(lanes), 3, self.config.height, self.config.width, device=self.backbone.device)
        for rows, decode, latents in (
            (np.flatnonzero(finished), self.backbone.decode, self.latents),
            (np.flatnonzero(~finished & reads), self.previewer.decode, self.x0),
        ):
            if len(rows):
                pictures[self._index(rows)] = decode(latents[self._index(lanes[rows])])
        return _finite(pictures)

    def _look_at_nothing(self, lanes: np.ndarray) -> None:
        """Blank what is seen of ``lanes``: without warm-up there is no prediction yet."""
        index = self._index(lanes)
        blank = Look.blank(len(lanes), self.perception.clip.width, self.perception.dino.width, self.backbone.device)
        self.seen.put(index, blank)
        self.seen_before.put(index, blank)
        self.clip_score[lanes], self.reward_score[lanes], self.similarity[lanes] = 0, 0, 1

    def _phi(self) -> np.ndarray:
        """Quality (B,) of what was last seen."""
        return quality(self.clip_score, self.reward_score, self.reward_config)

    # ----------------------------------------------------------------- what the outside sees

    def _observation(self) -> Any:
        at = np.minimum(self.step_index, self.config.num_inference_steps - 1)
        parts = {
            "clip_image": self.seen.clip_image,
            "clip_text": self.clip_text,
            "timestep": timestep_embedding(self.schedule.timesteps[self._index(at)]),
            **({"outlook": self.seen.outlook[:, None]} if self.perception.reads_latents else {}),
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
        similarity, steps, nfe = self._index(ratios.astype(np.float32))
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
        return {name: np.zeros(self.num_envs) for name in COLUMNS}

    def _info(self, taken: np.ndarray, reward: dict[str, np.ndarray]) -> Info:
        values: dict[str, Any] = {
            "seed": self.seed.copy(),
            "step_index": self.step_index.copy(),
            "nfe": self.nfe.copy(),
            "forward_passes": self.nfe * self.passes_per_nfe,
            "net_flops": self.net_flops.copy(),
            "action_mask": self.action_masks().astype(np.int8),  # what a space's sample(mask) wants
            "action_taken": taken,
            "clip_score": self.clip_score.copy(),
            "reward_score": self.reward_score.copy(),
            "fault": self.fault.copy(),
            "reward_components": RewardComponents.stack(reward),
        }
        texts: dict[str, Any] = {"prompt": np.array(self.prompt, dtype=object)}
        listed, hidden = (values | texts, {}) if self.config.text_info else (values, texts)
        return Info.of(self._with_presence(listed), self._with_presence(hidden))

    def _with_presence(self, values: dict[str, Any]) -> dict[str, Any]:
        """``values``, each with the mask (B,) of the lanes that have it: all."""
        return values | {f"_{name}": np.ones(self.num_envs, bool) for name in values}

    def _reset_finished(self, lanes: np.ndarray, observation: Any, info: Info) -> tuple[Any, Info]:
        """SAME_STEP: restart ``lanes`` now; the last observation and info move to ``final_obs`` and ``final_info``."""
        ended = np.zeros(self.num_envs, bool)
        ended[lanes] = True
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in lanes:
            final_obs[lane] = _row(observation, lane)
        self._reset_lanes(lanes, {})
        fresh = self._info(info["action_taken"].copy(), {name: info["reward_components"][name] for name in COLUMNS})
        last = info.copy()
        for values in (last, last.texts):
            values.update({name: ended for name in values if name.startswith("_")})
        final = {"final_obs": final_obs, "_final_obs": ended, "final_info": last, "_final_info": ended}
        return self._observation(), fresh | final

    @isolated()
    def preview_images(self) -> np.ndarray:
        """Decoded latest clean predictions of all lanes: uint8 (B, H, W, 3)."""
        chunks = [to_uint8(_finite(self.previewer.decode(self.x0[rows]))) for rows in self._chunks(self.num_envs)]
        return np.concatenate(chunks)

    def final_image(self, lane: int) -> np.ndarray:
        """The final picture of a terminated lane: uint8 (H, W, 3).

        Raises:
            RuntimeError: that lane has not ended.
        """
        picture = self.pictures[lane]
        if picture is None:
            raise RuntimeError(f"lane {lane} has not ended, so it has no final picture")
        return picture.copy()

    @property
    def refine_mask(self) -> np.ndarray:
        """Mask of each lane's latest refinement, float32 (B, h, w) in [0, 1]; zeros if there was none."""
        return self.refine_masks[:, 0].float().cpu().numpy().copy()

    @isolated()
    def render(self) -> tuple[np.ndarray, ...] | None:
        """Each lane's final picture, or its preview before the end: uint8 (H, W, 3) each."""
        if self.render_mode is None:
            return None
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before render()")
        previews = self.preview_images()
        final = self.pictures
        return tuple((p if f is None else f).copy() for p, f in zip(previews, final, strict=True))


def _as_mapping(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"reset options must be a mapping, got {options!r}")
    return dict(options or {})


def _autoreset_mode(value: Any) -> AutoresetMode:
    """The mode that ``value`` is, or is the name or the value of.

    Raises:
        ValueError: none.
    """
    for mode in AutoresetMode:
        if plain(value) in (mode.value, mode.name):
            return mode
    known = ", ".join(mode.name for mode in AutoresetMode)
    raise ValueError(f"autoreset_mode must be one of {known}, got {shown(value)}")


def _step_limit(value: Any) -> int | None:
    """Decisions that an episode may have; None: any number, which Gymnasium's ``make`` also says by -1."""
    limit = checked("max_episode_steps", value, int | None)
    if limit in (None, -1):
        return None
    return checked("max_episode_steps", limit, Annotated[int, at_least(1)])


def _depth(value: Any) -> int:
    """How many dimensions an array, a tensor or nested sequences have."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    return 1 + _depth(value[0]) if isinstance(value, (list, tuple)) and value else 0


def _choose(rows: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """``yes`` in the chosen ``rows`` (B,) bool, ``no`` elsewhere; both (B, C, h, w)."""
    return torch.where(rows[:, None, None, None], yes, no)


def _finite(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures with grey in place of what a decoder let overflow."""
    return torch.nan_to_num(pictures, nan=0.5, posinf=1.0, neginf=0.0)


def _row(observation: Any, lane: int) -> Any:
    """One lane of a batched observation, copied."""
    if isinstance(observation, dict):
        return {name: _row(value, lane) for name, value in observation.items()}
    return observation[lane].clone() if isinstance(observation, torch.Tensor) else observation[lane].copy()


def _single_info(info: Info) -> Info:
    """The info of lane 0, without the vector form's presence masks."""
    return Info.of(_first_lane(info), _first_lane(info.texts))


def _first_lane(values: dict[str, Any]) -> dict[str, Any]:
    firsts = {name: value[0] for name, value in values.items() if not name.startswith("_")}
    return {name: first.item() if isinstance(first, np.generic) else first for name, first in firsts.items()}
