"""Denoising as a Markov decision process: the vector environment owns its lanes, the single one is its view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from addiff_env.env import reset_options
from addiff_env.env.config import EnvConfig, check_names
from addiff_env.env.decisions import action_masks, read_actions
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.info import Info, final_info, step_info
from addiff_env.env.observer import Observer, observation_of
from addiff_env.env.parts import ReadableParts
from addiff_env.env.prices import charged, check_saved, start_prices
from addiff_env.env.prompts import load_prompts
from addiff_env.env.reward import COLUMNS, RewardConfig, quality, step_reward
from addiff_env.env.spec import JsonableSpec, read_autoreset_mode, step_limit
from addiff_env.env.state import LaneState, check_whole
from addiff_env.env.transition import UnderWay, is_warming, transition, warm_up
from addiff_env.env.validation import at_least, checked
from addiff_env.loading.isolation import isolated
from addiff_env.types import Action


class DiffusionDenoiseVectorEnv(JsonableSpec, ReadableParts, VectorEnv):
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
    | price | 1 | [-1, 1] | only with ``price_range``: where the log of the lane's price stands between its ends |
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
    See `addiff_env.env.reward`; ``info["reward_components"]`` carries every component. With ``price_range=[lo, hi]`` an
    evaluation costs what each episode draws, log-uniformly by its seed alone, instead of the reward's ``efficiency``.

    ## Start, end
    ``reset(options={"prompt": [...], "seed": [...], "latents": ...})`` names the lanes' prompts (B strings), seeds
    (B ints) or initial latents (B, C, h, w), as diffusers' pipelines take them; what is left out is drawn.
    ``"price"`` (one number or B; None: not named) is what an evaluation costs, within ``price_range`` where it is set.
    ``"negative_prompt"`` (B strings; None: the setting's) is what guidance leads away from; ``"max_nfe"`` (one number
    or B; None: the setting's) is the budget. With ``"reset_mask"`` (B,) bool they are those of the lanes that start.
    With ``"defer_warmup": True`` these make their mandatory steps within the next calls of ``step``, in one batch with
    the other lanes: until then they are `warming`, whatever their action, and their observation is blank.

    An episode is ``terminated`` by *stop*, by the last solver step, or when the budget is spent; it is ``truncated``
    after ``max_episode_steps`` decisions, if these are limited. With ``AutoresetMode.DISABLED`` an ended lane waits, at
    no cost, until ``reset(options={"reset_mask": ...})`` names it.

    ## Info
    ``prompt, seed, price, step_index, nfe, forward_passes, net_flops, action_mask, action_taken, clip_score,
    reward_score, fault, reward_components``; one array over lanes each. ``reward_components`` (B, 6) is a
    `addiff_env.env.reward.RewardComponents`: ``info["reward_components"]["terminal"]`` (B,). ``action_mask`` (B, 3) is
    1 where an action is admissible (int8, for ``action_space.sample(tuple(info["action_mask"]))``; `action_masks`:
    bool). ``action_taken`` is -1 where nothing was carried out. ``fault`` says that the lane's numbers stopped being
    finite: it ends with its last finite prediction (grey where the decoder's numbers did) and pays the ``fault``
    penalty; after a warm-up its first step does so. A look that is not finite is passed over, the last one a fault.

    Everything is a number but for ``prompt``, which ``info["prompt"]`` gives and iterating passes over: TorchRL,
    `NumpyToTorch` and Gymnasium's vector environments of single ones collect what is iterated over
    (`addiff_env.env.info.Info`). ``text_info=True`` lists it with the rest.

    ## Arguments
    The fields of `EnvConfig` (``model, revision, device, dtype, solver, num_inference_steps, ...``), and
    ``num_envs``; ``autoreset_mode`` is one of `gymnasium.vector.AutoresetMode`, or its name or value;
    ``max_episode_steps`` limits a lane's decisions (None or -1: no limit), which `gymnasium.make_vec` passes on where
    the id has such a limit.

    Those that fit a model into memory: ``batch_size``, lanes of one denoiser call; ``decode_memory``, GiB that a
    decode's activations may take, by which it is sliced (None: half of a GPU's free memory, elsewhere 4); ``offload``,
    networks that wait on the host: ``none``, ``model`` (all but the one at work), ``sequential`` (all but the layer).
    ``negative_prompt`` is what guidance leads away from, in lanes that are not given their own (None: as diffusers'
    pipeline without one); it needs ``guidance_scale`` above 1, and a model other than Flux.
    ``look_precision`` is that of encoders and scorer: ``auto``, on GPUs the model's half precision, or ``float32``.

    >>> import gymnasium as gym
    >>> envs = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=4)  # doctest: +SKIP
    >>> obs, info = envs.reset(options={"prompt": ["a red circle"] * 4, "seed": [0, 1, 2, 3]})  # doctest: +SKIP

    ## Threads, torch's global modes
    Environments of one process share their frozen models. Each may be stepped in a thread of its own and gives what
    it gives alone, bit for bit; one environment belongs to one thread at a time. A shared model serves one thread after
    the other, so threads save nothing of the denoiser's own time: lanes of one vector environment do. While a model is
    loaded, no environment steps. The caller's default dtype and device, autocast, inference mode and gradient mode
    change no result (`addiff_env.loading.isolation`); what changes arithmetic (TF32, threads of an operation) is his.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @isolated()
    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        **settings: Any,
    ) -> None:
        check_names(settings, own=("num_envs", "autoreset_mode", "max_episode_steps"))
        self.num_envs = checked("num_envs", num_envs, Annotated[int, at_least(1)])
        self.autoreset_mode = read_autoreset_mode(autoreset_mode)
        self.max_episode_steps = step_limit(max_episode_steps)
        self.config = EnvConfig(**settings)
        self.render_mode = self.config.render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._load()
        self.single_observation_space = self.observer.space()
        self.single_action_space = gym.spaces.Discrete(len(Action))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._started = False

    def _load(self) -> None:
        c, reward = self.config, RewardConfig.from_dict(self.config.reward)
        self.prompts = load_prompts(c.prompts)
        self.denoiser = Denoiser.load(c)
        self.observer = Observer(c, self.denoiser)
        perception = self.observer.perception
        reward.check_reads(perception.reads)
        self.reward_config = reward.for_scorer(perception.scorer.mean, perception.scorer.std)
        flops = self.denoiser.flops_per_call | self.observer.flops_per_call
        self.flops_per_call = flops | {"start": flops["start"] + flops.pop("reading")}
        sizes = self.denoiser.latent_shape, perception.clip.width, perception.dino.width
        self.state = LaneState.empty(self.num_envs, self.denoiser.backbone, *sizes)
        self.state.lane_price[:] = start_prices(self.seed.tolist(), None, c.price_range)
        self.state.budget[:] = c.nfe_budget
        self.under_way = UnderWay(self.num_envs)

    def set_reward(self, config: RewardConfig) -> None:
        """Pay by other weights and scales from the next step on."""
        self.reward_config = config

    @isolated()
    def state_dict(self) -> dict[str, Any]:
        """All lanes (`LaneState.state_dict`), and the stream that new episodes are drawn from.

        `load_state_dict` of an environment with the same settings then continues exactly as this one would. What can be
        computed again (encoded prompts) is left out. RuntimeError: a lane is in the middle of an action.
        """
        self.under_way.require_free(np.arange(self.num_envs))
        return self.state.state_dict() | {"stream": self.np_random.bit_generator.state, "started": self._started}

    @isolated()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; raises as `LaneState.load_state_dict`, `check_saved` and `check_whole`."""
        self.state.check(state)
        check_saved(state["lane_price"].numpy(), self.config.price_range)
        check_whole(state, self.config.num_inference_steps)
        self.state.load_state_dict(state)
        self.under_way = UnderWay(self.num_envs, self.under_way.overlap)
        self.denoiser.encode(self.state, np.arange(self.num_envs))
        self.np_random.bit_generator.state = state["stream"]
        self._started = state["started"]

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the models; the last environment that held them frees their memory."""
        for name in ("denoiser", "observer"):
            self.__dict__.pop(name, None)
        self._started, self.under_way = False, UnderWay(self.num_envs)

    # ----------------------------------------------------------------- reset

    @isolated()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Start new episodes in all lanes, or in those of ``options["reset_mask"]`` (B,) bool.

        Raises:
            TypeError, ValueError: a prompt that is no string, a seed that is no whole number, latents of another shape
            or not finite, a price that is none, or the wrong number of any of them; the message shows the value.
        """
        if "denoiser" not in self.__dict__:
            raise gym.error.ClosedEnvironmentError("reset() of an environment that was closed")
        options = reset_options.as_mapping(options)
        lanes = reset_options.lanes_to_reset(options.pop("reset_mask", None), self.num_envs)
        given = reset_options.read_options(options, len(lanes), self.denoiser)
        self._reset_lanes(lanes, given, self._seed(seed))
        self._started = True
        nothing = {name: np.zeros(self.num_envs) for name in COLUMNS}
        return self.observer.observation(self.state), self._info(np.full(self.num_envs, -1), nothing)

    def _seed(self, seed: int | Sequence[int | None] | None) -> list[np.random.Generator] | None:
        """Seed the environment's stream; a sequence gives each lane draws of its own."""
        if seed is None:
            return None
        seeds = reset_options.lane_seeds(seed, self.num_envs)
        if isinstance(seeds, int):
            self._np_random, self._np_random_seed = seeding.np_random(seeds)
            return None
        if any(value is not None for value in seeds):
            self._np_random = np.random.default_rng([0 if one is None else one + 1 for one in seeds])  # of later ones
        return reset_options.lane_streams(seeds, self.np_random)

    def _reset_lanes(
        self, lanes: np.ndarray, given: dict[str, Any], streams: list[np.random.Generator] | None = None
    ) -> None:
        """Start ``lanes``; ``given`` is what `read_options` made of the options."""
        self.under_way.require_free(lanes)
        prompts, seeds = [], []
        for row, lane in enumerate(lanes):
            stream = self.np_random if streams is None else streams[lane]
            drawn = self.prompts[int(stream.integers(len(self.prompts)))], int(stream.integers(2**31))
            prompts.append(given["prompt"][row] if "prompt" in given else drawn[0])
            seeds.append(given["seed"][row] if "seed" in given else drawn[1])
        self.state.lane_price[lanes] = start_prices(seeds, given.get("price"), self.config.price_range)
        self.state.budget[lanes] = given.get("max_nfe", self.config.nfe_budget)
        self.denoiser.start(self.state, lanes, prompts, seeds, given.get("latents"), given.get("negative_prompt"))
        self.observer.start(self.state, lanes)
        if given.get("defer_warmup"):
            self.observer.blank(self.state, lanes)
        else:
            warm_up(self.denoiser, self.observer, self.state, lanes)

    # ----------------------------------------------------------------- step

    @isolated()
    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Info]:
        """Carry out one action (B,) per lane.

        Raises:
            gymnasium.error.ResetNeeded: no reset yet, or (autoreset disabled) every lane has ended.
            ValueError: not B integers in {0, 1, 2}.
        """
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = read_actions(actions, self.num_envs)
        waiting = self.done | self._out_of_steps()
        ended, lanes = np.flatnonzero(waiting), np.flatnonzero(~waiting)
        if len(ended) and self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._reset_lanes(ended, {})
        elif len(lanes) == 0:
            raise gym.error.ResetNeeded("every lane has ended: call reset() before step()")
        taken, reward = self._act(lanes, actions)
        terminated, truncated = self.done.copy(), self._out_of_steps()
        observation, info = self.observer.observation(self.state), self._info(taken, reward)
        finished = np.flatnonzero(terminated | truncated)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and len(finished):
            observation, info = self._reset_finished(finished, observation, info)
        return observation, reward["total"], terminated, truncated, info

    def park(self, lanes: Any) -> None:
        """Let ``lanes`` (indices, or a mask (B,) bool) wait, at no cost, until ``reset`` names them.

        Raises:
            ValueError: lanes that restart by themselves (autoreset other than DISABLED), or that there are not.
            RuntimeError: lanes in the middle of an action, see `share_batches`.
        """
        if self.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(f"lanes wait with autoreset_mode DISABLED only, got {self.autoreset_mode}")
        numbers = reset_options.lane_numbers(lanes, self.num_envs)
        self.under_way.require_free(numbers)
        self.state.done[numbers] = True

    def share_batches(self, shared: bool = True, overlap: bool = False) -> None:
        """Evaluate lanes of different actions in one batch from now on: the same pictures, up to rounding, sooner.

        With ``overlap`` (ValueError: alone), an action of several evaluations makes one a step, beside those of others:
        `deciding` tells whose actions the next step heeds; ``info["action_taken"]`` and a new look come in the step
        that ends the action. What is under way when this is called is given up.
        """
        if overlap and not shared:
            raise ValueError("actions overlap in shared batches only, got shared False and overlap True")
        self.denoiser.joint, self.under_way = shared, UnderWay(self.num_envs, overlap)

    def _out_of_steps(self) -> np.ndarray:
        """Which lanes (B,) bool have made all the decisions that an episode may have."""
        if self.max_episode_steps is None:
            return np.zeros(self.num_envs, bool)
        return (self.decisions >= self.max_episode_steps) & ~self.under_way.busy

    def _act(self, lanes: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Apply the actions of ``lanes``; returns what was carried out (B,; -1 for the others) and the reward."""
        state, potential, cost = self.state, self._potential(), self._cost()
        taken, acting, looked = transition(self.denoiser, self.observer, state, lanes, actions, self.under_way)
        similarity = np.ones(self.num_envs)  # without a new look there is no new picture to compare
        similarity[looked] = state.similarity[looked]
        paid = self._cost() - cost
        after, ended = self._potential(), (state.done, state.fault)
        parts = step_reward(self.reward_config, potential, after, similarity, paid, *ended, self.price)
        idle = ~np.isin(np.arange(self.num_envs), acting)
        return taken, {name: np.where(idle, 0.0, value) for name, value in parts.items()}

    def _potential(self) -> np.ndarray:
        """Quality (B,) of what was last seen, the reward's potential."""
        return quality(self.clip_score, self.reward_score, self.reward_config)

    def _cost(self) -> np.ndarray:
        """What each lane (B,) has cost so far, in the reward's ``efficiency_unit``."""
        if self.reward_config.efficiency_unit == "nfe":
            return self.nfe.copy()
        return self.net_flops / (self.passes_per_nfe * self.flops_per_call["denoiser"])

    @property
    def price(self) -> np.ndarray:
        """What an evaluation costs in each lane (B,)."""
        return charged(self.state.lane_price, self.reward_config.efficiency)

    @property
    def warming(self) -> np.ndarray:
        """Which lanes (B,) bool have mandatory steps before their first decision, after ``defer_warmup``."""
        return is_warming(self.denoiser, self.state)

    @property
    def deciding(self) -> np.ndarray:
        """Which lanes (B,) bool heed their action in the next step: not those that wait, are warming or are busy."""
        return ~(self.done | self._out_of_steps() | self.warming | self.under_way.busy)

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool; continue always is, stop once there is a prediction."""
        return action_masks(self.config, self.state)

    def _info(self, taken: np.ndarray, reward: dict[str, np.ndarray]) -> Info:
        return step_info(self.state, self.config, self.price, self.passes_per_nfe, taken, reward)

    def _reset_finished(self, lanes: np.ndarray, observation: Any, info: Info) -> tuple[Any, Info]:
        """SAME_STEP: restart ``lanes`` now; the last observation and info move to ``final_obs`` and ``final_info``."""
        ended = np.isin(np.arange(self.num_envs), lanes)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in lanes:
            final_obs[lane] = observation_of(observation, lane)
        self._reset_lanes(lanes, {})
        fresh = self._info(info["action_taken"].copy(), {name: info["reward_components"][name] for name in COLUMNS})
        return self.observer.observation(self.state), fresh | final_info(info, final_obs, ended)

    @isolated()
    def preview_images(self, lanes: Any = None) -> np.ndarray:
        """Decoded latest clean predictions of ``lanes`` (indices, or a mask; None: all): uint8 (L, H, W, 3)."""
        lanes = np.arange(self.num_envs) if lanes is None else lanes
        return self.observer.previews(self.state, reset_options.lane_numbers(lanes, self.num_envs))

    def final_image(self, lane: int) -> np.ndarray:
        """The final picture of a terminated lane: uint8 (H, W, 3).

        Raises:
            RuntimeError: that lane has not ended. ValueError: there is no such lane.
        """
        picture = self.pictures[reset_options.lane_numbers([lane], self.num_envs)[0]]
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
        return tuple((p if f is None else f).copy() for p, f in zip(previews, self.pictures, strict=True))
