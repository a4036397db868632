"""A policy on an environment's lanes: a lane that ends takes the next request at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from scipy.special import softmax

from addiff_env.agent import Agent, flat_observation
from addiff_env.env.prices import check_price
from addiff_env.env.reward import quality
from addiff_env.env.validation import preset_of
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.types import Action, Generated

# What a picture's note says where the environment reports a fault.
FAULT = "the model's numbers stopped being finite: the picture is its last finite prediction, or grey"


def make_agent_env(
    agent: Agent, num_envs: int, env_id: str | None = None, **overrides: Any
) -> DiffusionDenoiseVectorEnv:
    """The environment an agent was trained on (or ``env_id``), with lanes that wait when they have ended.

    Raises:
        ValueError: an id that is not registered; and as `Agent.environment` and the environment.
    """
    name, kwargs = agent.environment
    require_registered(env_id)
    modes: dict[str, Any] = {"num_envs": num_envs, "autoreset_mode": AutoresetMode.DISABLED}
    modes["max_episode_steps"] = None  # a limit of the training's: here every picture is finished
    envs = gym.make_vec(env_id or name, **modes | kwargs | overrides).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


def require_registered(env_id: str | None) -> None:
    """Check that there is an environment of this id; None passes. Raises as `preset_of`."""
    if env_id is not None:
        preset_of(env_id)


@dataclass(frozen=True)
class Request:
    """One picture to make; ``index`` is what it is called by."""

    index: int
    prompt: str
    seed: int
    negative_prompt: str | None = None  # None: the environment's
    price: float | None = None  # of an evaluation; None: the environment's
    max_nfe: int | None = None  # None: the environment's
    latents: torch.Tensor | None = None  # (C, h, w) initial noise; None: drawn from the seed


@dataclass
class Episode:
    """A running lane: what it makes, and which of the looks that the environment charged were made use of."""

    request: Request
    made: Generated
    fresh: bool = False  # the latest look has not been read yet
    stopping: bool = False  # somebody asked that it stops at its next decision
    probabilities: np.ndarray | None = None  # (3,) of the actions at the latest decision, where they are asked for
    read: int = 0
    unread: int = 0

    def decide(self, sees: bool) -> None:
        """Whoever decides reads the latest look, or does not."""
        if sees and self.fresh:
            self.read, self.fresh = self.read + 1, False

    def look(self) -> None:
        """The environment looks again."""
        self.unread, self.fresh = self.unread + self.fresh, True


@dataclass(frozen=True)
class LaneStep:
    """What one step did to one lane, for whoever watches."""

    env: DiffusionDenoiseVectorEnv
    lane: int
    episode: Episode
    action: int | None  # as carried out; None: a mandatory step, or nothing was left to decide
    step_index: int  # solver steps done
    timestep: int  # of the schedule, that the lane's next evaluation is at; 0 at the end
    nfe: int
    reward_score: float  # of the latest look
    finished: bool
    probabilities: np.ndarray | None  # (3,) of the actions, where they were asked for and the policy has any

    @property
    def latents(self) -> torch.Tensor:
        """A copy of the latents (C, h, w), on the device."""
        return self.env.latents[self.lane].clone()

    @property
    def x0(self) -> torch.Tensor:
        """A copy of the latest clean prediction (C, h, w), on the device."""
        return self.env.x0[self.lane].clone()

    @property
    def mask(self) -> np.ndarray:
        """The latest refinement's mask, float32 (h, w) in [0, 1]; zeros if there was none."""
        return self.env.refine_masks[self.lane, 0].float().cpu().numpy().copy()

    @property
    def preview(self) -> np.ndarray:
        """The final picture of a finished lane, else the preview: uint8 (H, W, 3)."""
        return self.env.final_image(self.lane) if self.finished else self.env.preview_images([self.lane])[0]


def require_fit(env: Any, policy: Any) -> None:
    """Check that ``policy`` can make pictures on the lanes of ``env``.

    Raises:
        TypeError: an environment of another kind, e.g. of one lane.
        ValueError: lanes that restart by themselves or are cut short, or an agent that sees other observations than
            ``env`` makes or was trained for another range of prices.
    """
    if not isinstance(env, DiffusionDenoiseVectorEnv):
        raise TypeError(f"the pipeline needs a DiffusionDenoiseVectorEnv (make_agent_env makes one), got {env!r}")
    if env.autoreset_mode != AutoresetMode.DISABLED:
        raise ValueError(f"the pipeline needs lanes that wait (autoreset DISABLED), got {env.autoreset_mode}")
    if env.max_episode_steps is not None:
        raise ValueError(f"the pipeline finishes every picture: no max_episode_steps, got {env.max_episode_steps}")
    if isinstance(policy, Agent):
        policy.require_layout(env.parts)
        policy.require_prices(env.config.price_range)


def price_of(
    env: DiffusionDenoiseVectorEnv, policy: Any, price: float | None = None, target_nfe: float | None = None
) -> float | None:
    """What an evaluation costs; None: what the environment says, which a policy without a price input ignores.

    Without either of the two an agent with a price input acts by the middle of its range.

    Raises:
        ValueError: both of the two, either of them for an agent without a price input, or a value beyond its range.
    """
    if isinstance(policy, Agent):
        if (price, target_nfe) == (None, None):
            return policy.middle_price
        policy.require_price_input()
        if price is not None and target_nfe is not None:
            raise ValueError(f"name price or target_nfe, one of the two, got {price!r} and {target_nfe!r}")
        price = policy.price_for(target_nfe) if price is None else price
    elif target_nfe is not None:
        raise ValueError(f"target_nfe needs an agent with a price input, got target_nfe={target_nfe!r}")
    return None if price is None else check_price(price, env.config.price_range)


class LaneScheduler:
    """Runs a policy, most likely action first, on any number of requests.

    Args:
        env: with lanes that wait when they have ended.
        policy: an agent, or anything with its ``act`` and ``flops``.
        full_batches: lanes that start make their mandatory steps in one batch with those that run, and evaluations of
            different actions share batches, also over several steps (`DiffusionDenoiseVectorEnv.share_batches`).
            Pictures are the same up to rounding, and the batch stays full.
        watch: sees every step of every lane; True asks that this lane stops at its next decision.
        previews, masks: keep a preview before each decision, and the mask of each refinement.
        probabilities: tell ``watch`` the probabilities of the actions.

    Raises:
        TypeError, ValueError: as `require_fit`.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        policy: Any,
        full_batches: bool = False,
        watch: Callable[[LaneStep], bool] | None = None,
        previews: bool = False,
        masks: bool = False,
        probabilities: bool = False,
    ) -> None:
        require_fit(env, policy)
        self.env, self.policy, self.full_batches, self.watch = env, policy, full_batches, watch
        self.previews, self.masks = previews, masks
        self.probabilities = probabilities and hasattr(policy, "logits")

    def run(self, requests: Iterable[Request]) -> Iterator[list[tuple[int, Generated]]]:
        """Yield groups of (index, picture) as they finish; requests are taken as lanes become free, in their order.

        Where the caller stops taking them, or anything fails, no lane is left running.
        """
        waiting, running = iter(requests), dict[int, Episode]()  # by lane
        observation, info = None, None
        self._park()
        self.env.share_batches(self.full_batches, overlap=self.full_batches)
        try:
            while True:
                free = [lane for lane in range(self.env.num_envs) if lane not in running]
                if taken := list(islice(waiting, len(free))):
                    observation, info = self._start(free, taken, running)
                if not running:
                    return
                observation, info, ended = self._step(observation, info, running)
                if ended:
                    yield ended
        finally:
            if "denoiser" in vars(self.env):  # else it was closed meanwhile
                self.env.share_batches(False)
            self._park()

    def _park(self) -> None:
        if "state" in vars(self.env):
            self.env.park(np.arange(self.env.num_envs))

    # ----------------------------------------------------------------- one step

    def _start(self, free: list[int], taken: list[Request], running: dict[int, Episode]) -> tuple[Any, Any]:
        """Start ``taken`` in lanes that are ``free``: first those whose noise is drawn, then the others."""
        result, free = (None, None), list(free)
        for brings in (False, True):
            part = [request for request in taken if (request.latents is not None) == brings]
            if part:
                lanes = sorted(free.pop(0) for _ in part)
                result = self._reset(lanes, part, running)
        return result

    def _reset(self, lanes: list[int], requests: list[Request], running: dict[int, Episode]) -> tuple[Any, Any]:
        began = time.perf_counter()
        columns = ("prompt", "seed", "negative_prompt", "price", "max_nfe")
        options: dict[str, Any] = {name: [getattr(request, name) for request in requests] for name in columns}
        latents = [request.latents.cpu() for request in requests if request.latents is not None]
        options |= {"latents": torch.stack(latents)} if latents else {}
        mask = np.isin(np.arange(self.env.num_envs), lanes)
        result = self.env.reset(options=options | {"reset_mask": mask, "defer_warmup": self.full_batches})
        share = (time.perf_counter() - began) / len(lanes)
        for lane, request in zip(lanes, requests, strict=True):
            made = Generated(request.prompt, request.seed, np.zeros(0, np.uint8), seconds=share, price=request.price)
            running[lane] = Episode(request, made)
        deciding = self.env.deciding
        self._decision_ahead([lane for lane in lanes if deciding[lane]], running)
        return result

    def _step(
        self, observation: Any, info: Any, running: dict[int, Episode]
    ) -> tuple[Any, Any, list[tuple[int, Generated]]]:
        env, began, active = self.env, time.perf_counter(), sorted(running)
        warming, heeding = env.warming, env.deciding
        deciding = [lane for lane in active if heeding[lane]]
        actions = np.zeros(env.num_envs, np.int64)
        if deciding:
            seen = flat_observation(observation, env.parts)[deciding]
            mask, episodes = info["action_mask"][deciding], [running[lane] for lane in deciding]
            actions[deciding] = self._decide(seen, mask, episodes)
        observation, reward, terminated, _, info = env.step(actions)
        share = (time.perf_counter() - began) / len(active)
        for lane in active:
            self._account(running[lane].made, lane, float(reward[lane]), share, info)
        heeding, busy = env.deciding, env.busy
        ahead, settled = [lane for lane in active if heeding[lane]], [lane for lane in active if not busy[lane]]
        for lane in ahead:
            if not warming[lane] and len(running[lane].made.actions) % env.config.observe_every == 0:
                running[lane].look()
        self._decision_ahead(ahead, running, warming)
        self._tell(settled, running, info, terminated)
        ended = [lane for lane in active if terminated[lane]]
        return observation, info, [self._finish(running.pop(lane), lane, info) for lane in ended]

    def _account(self, made: Generated, lane: int, reward: float, seconds: float, info: Any) -> None:
        """Note what the lane did, and what it took."""
        action = int(info["action_taken"][lane])
        if action >= 0:  # else there was nothing left to decide
            made.actions.append(action)
        if self.masks and action == Action.REFINE:
            made.masks.append(self.env.refine_masks[lane, 0].float().cpu().numpy().copy())
        made.reward += reward
        made.seconds += seconds

    def _decision_ahead(self, lanes: list[int], running: dict[int, Episode], warming: np.ndarray | None = None) -> None:
        """``lanes`` are about to decide; those that were ``warming`` (None: all) were looked at for the first time."""
        for lane in lanes:
            if warming is None or warming[lane]:
                running[lane].fresh = self.env.config.warmup_steps > 0
        if self.previews and lanes:
            for lane, preview in zip(lanes, self.env.preview_images(lanes), strict=True):
                running[lane].made.previews.append(preview)

    def _decide(self, observation: Any, action_mask: np.ndarray, episodes: Sequence[Episode]) -> np.ndarray:
        """Actions of the lanes that decide; who draws at random is told whose turn it is, so that lanes do not mix."""
        if self._selective:
            for episode, sees in zip(episodes, self.policy.sees(observation), strict=True):
                episode.decide(bool(sees))
        if self.probabilities:
            logits = np.where(action_mask.astype(bool), self.policy.logits(observation), -np.inf)
            for episode, probabilities in zip(episodes, softmax(logits, axis=1), strict=True):
                episode.probabilities = probabilities
        draw = getattr(self.policy, "act_in", None)
        if draw is None:
            actions = self.policy.act(observation, action_mask)
        else:
            actions = draw(observation, action_mask, [episode.made for episode in episodes])
        return np.where([episode.stopping for episode in episodes], int(Action.STOP), actions)

    def _tell(
        self,
        lanes: list[int],
        running: dict[int, Episode],
        info: Any,
        finished: np.ndarray,
    ) -> None:
        """Let the watcher see what was done to ``lanes``, which are in the middle of nothing."""
        if self.watch is None:
            return
        grid = self.env.denoiser.timesteps
        for lane in lanes:
            action, at = int(info["action_taken"][lane]), int(info["step_index"][lane])
            step = LaneStep(
                self.env,
                lane,
                running[lane],
                action if action >= 0 else None,
                at,
                0 if finished[lane] or at >= len(grid) else int(grid[at]),
                int(info["nfe"][lane]),
                float(info["reward_score"][lane]),
                bool(finished[lane]),
                None if action < 0 else running[lane].probabilities,
            )
            running[lane].stopping |= self.watch(step)

    # ----------------------------------------------------------------- the end

    def _finish(self, episode: Episode, lane: int, info: Any) -> tuple[int, Generated]:
        made = episode.made
        made.picture, made.fault = self.env.final_image(lane), bool(info["fault"][lane])
        made.note = FAULT if made.fault else ""
        scores = self.env.clip_score[[lane]], self.env.reward_score[[lane]]
        made.quality = float(quality(*scores, self.env.reward_config)[0])
        made.reward_score = float(info["reward_score"][lane])
        made.nfe, made.forward_passes = int(info["nfe"][lane]), int(info["forward_passes"][lane])
        made.net_flops = float(info["net_flops"][lane]) + len(made.actions) * self.policy.flops
        if self._selective:
            made.net_flops -= self._refund(episode)
        return episode.request.index, made

    @property
    def _selective(self) -> bool:
        """Whether the policy says which looks it reads."""
        return hasattr(self.policy, "sees")

    @property
    def _spared(self) -> dict[str, float]:
        """FLOPs of what is charged and not used: a look, the rest of one that was read, texts."""
        flops, perception = self.env.flops_per_call, self.env.perception
        text = perception.text_flops()
        words = perception.scorer_text_flops()
        return {
            "look": flops["look"],
            "rest": flops["look"] - flops["scorer"],
            "text": text,
            "others' text": text - words,
        }

    def _refund(self, episode: Episode) -> float:
        spared = self._spared
        text = spared["others' text" if episode.read else "text"]
        return (episode.unread + episode.fresh) * spared["look"] + episode.read * spared["rest"] + text
