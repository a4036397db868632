"""`AdaptivePipeline`: prompts in, pictures out, with a trained agent deciding each picture's steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent, flat_observation
from addiff_env.env.prices import check_price
from addiff_env.env.prompts import check_prompt
from addiff_env.env.reward import quality
from addiff_env.env.validation import as_list, check_seed
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.types import Generated

# What a picture's note says where the environment reports a fault.
FAULT = "the model's numbers stopped being finite: the picture is its last finite prediction, or grey"


def make_agent_env(agent: Agent, num_envs: int, **overrides: Any) -> DiffusionDenoiseVectorEnv:
    """The environment an agent was trained on, with lanes that wait when they have ended.

    Raises:
        ValueError: as `Agent.environment` and the environment.
    """
    name, kwargs = agent.environment
    modes: dict[str, Any] = {"num_envs": num_envs, "autoreset_mode": AutoresetMode.DISABLED}
    modes["max_episode_steps"] = None  # a limit of the training's: here every picture is finished
    envs = gym.make_vec(name, **modes | kwargs | overrides).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


@dataclass
class _Episode:
    """A running lane: what it makes, and which of the looks that the environment charged were made use of."""

    index: int
    made: Generated
    fresh: bool  # the latest look has not been read yet
    read: int = 0
    unread: int = 0

    def decide(self, sees: bool) -> None:
        """Whoever decides reads the latest look, or does not."""
        if sees and self.fresh:
            self.read, self.fresh = self.read + 1, False

    def look(self) -> None:
        """The environment looks again."""
        self.unread, self.fresh = self.unread + self.fresh, True


class AdaptivePipeline:
    """An agent on its environment, most likely action first; anything with an agent's ``act`` and ``flops`` will do.

    Net FLOPs are what the environment charges, and the policy's own. Whoever has ``sees(obs) -> (B,) bool`` (the
    rules of `addiff_env.evaluation.methods.rule_policies`) pays for the looks that it reads only, and of those for
    preview and reward model only, as a program of that rule alone would; its seconds are still those of looking at
    everything. ``negative_prompt`` is what guidance leads away from in pictures that are not asked for with another
    one; None: as the environment's setting says.

    Raises:
        TypeError: an environment of another kind, e.g. of one lane.
        ValueError: lanes that restart by themselves or are cut short, an agent that sees other observations than
            ``env`` makes or was trained for another range of prices, or a negative prompt for a model without guidance.

    >>> pipeline = AdaptivePipeline.from_pretrained("addiff_env:tiny/weights/agent")  # doctest: +SKIP
    >>> pictures = pipeline(["a red circle", "two blue stars"], seeds=[0, 1])  # doctest: +SKIP
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, agent: Any, negative_prompt: str | None = None) -> None:
        if not isinstance(env, DiffusionDenoiseVectorEnv):
            raise TypeError(f"the pipeline needs a DiffusionDenoiseVectorEnv (make_agent_env makes one), got {env!r}")
        if env.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(f"the pipeline needs lanes that wait (autoreset DISABLED), got {env.autoreset_mode}")
        if env.max_episode_steps is not None:
            raise ValueError(f"the pipeline finishes every picture: no max_episode_steps, got {env.max_episode_steps}")
        if isinstance(agent, Agent):
            agent.require_layout(env.parts)
            agent.require_prices(env.config.price_range)
        if negative_prompt is not None:
            env.backbone.check_negative_prompt(check_prompt(negative_prompt), env.config.guidance_scale)
        self.env, self.agent, self.negative_prompt = env, agent, negative_prompt
        self._turn = threading.Lock()  # the lanes are one call's at a time

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_envs: int = 16, **overrides: Any) -> AdaptivePipeline:
        """Load an agent (a folder, or ``owner/name`` on the Hub) and make its environment with ``num_envs`` lanes.

        ``overrides`` change the environment's settings.

        Raises:
            FileNotFoundError, ValueError: as `Agent.from_pretrained` and the environment.
        """
        agent = Agent.from_pretrained(folder)
        return cls(make_agent_env(agent, num_envs, **overrides), agent)

    def __call__(
        self,
        prompts: str | Iterable[str],
        seeds: int | Iterable[int] | np.random.Generator | None = None,
        negative_prompt: str | Iterable[str | None] | None = None,
        price: float | None = None,
        target_nfe: float | None = None,
    ) -> list[Generated]:
        """Make one picture per prompt, in order.

        Args:
            prompts: one, or any number of them.
            seeds: as many, each in [0, 2**63); None: drawn at random, as a `numpy.random.Generator` draws them, too.
            negative_prompt: one for all pictures, or one per prompt; None: the pipeline's own.
            price: of one evaluation, which an agent with a price input acts by.
            target_nfe: mean evaluations a picture, instead of the price that was measured to give them.

        Several threads may call: each waits for its turn.

        Raises:
            ValueError: different numbers of prompts, seeds and negative prompts, what is no seed, or a negative prompt
                for a model without guidance; an agent with a price input and not exactly one of ``price`` and
                ``target_nfe``, either of them for one without, or a value beyond the agent's range.
            TypeError: a prompt that is no string.
        """
        texts = [check_prompt(prompt) for prompt in _items(prompts)]
        if seeds is None:
            seeds = np.random.default_rng()
        if isinstance(seeds, np.random.Generator):
            seeds = seeds.integers(2**31, size=len(texts))
        numbers = [check_seed(seed) for seed in _items(seeds)]
        if len(texts) != len(numbers):
            raise ValueError(f"{len(texts)} prompts but {len(numbers)} seeds: each prompt needs its own")
        with self._turn:
            groups = self.stream(texts, numbers, negative_prompt, price, target_nfe)
            results = dict(pair for group in groups for pair in group)
        return [results[index] for index in range(len(texts))]

    def stream(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str | Iterable[str | None] | None = None,
        price: float | None = None,
        target_nfe: float | None = None,
    ) -> Iterator[list[tuple[int, Generated]]]:
        """Yield groups of (index, picture) as they finish; a lane that ends takes the next prompt at once.

        Raises:
            ValueError, TypeError: as a call.
        """
        env, price = self.env, self._price(price, target_nfe)
        waiting = list(enumerate(zip(prompts, seeds, self._negatives(negative_prompt, len(prompts)), strict=True)))
        running: dict[int, _Episode] = {}  # by lane
        free = list(range(env.num_envs))
        while waiting or running:
            if waiting and free:
                observation, info = self._start(free[: len(waiting)], waiting, running, price)
            began = time.perf_counter()
            active = sorted(running)
            actions = np.zeros(env.num_envs, np.int64)
            seen = flat_observation(observation, env.parts)[active]
            actions[active] = self._decide(seen, info["action_mask"][active], [running[lane] for lane in active])
            observation, reward, terminated, _, info = env.step(actions)
            share = (time.perf_counter() - began) / len(active)
            for lane in active:
                made = running[lane].made
                if info["action_taken"][lane] >= 0:  # else there was nothing left to decide
                    made.actions.append(int(info["action_taken"][lane]))
                made.reward += float(reward[lane])
                made.seconds += share
                if not terminated[lane] and len(made.actions) % env.config.observe_every == 0:
                    running[lane].look()
            ended = [lane for lane in active if terminated[lane]]
            free = [lane for lane in range(env.num_envs) if lane not in running or lane in ended]
            yield [self._finish(running.pop(lane), lane, info) for lane in ended]

    def _price(self, price: float | None, target_nfe: float | None) -> float | None:
        """What an evaluation costs; None: what the environment says, which a policy without a price input ignores."""
        if isinstance(self.agent, Agent):
            if (price, target_nfe) == (None, None) and self.agent.price_range is None:
                return None
            self.agent.require_price_input()
            if (price is None) == (target_nfe is None):
                raise ValueError(f"name price or target_nfe, one of the two, got {price!r} and {target_nfe!r}")
            price = self.agent.price_for(target_nfe) if price is None else price
        elif target_nfe is not None:
            raise ValueError(f"target_nfe needs an agent with a price input, got target_nfe={target_nfe!r}")
        return None if price is None else check_price(price, self.env.config.price_range)

    def _negatives(self, given: str | Iterable[str | None] | None, number: int) -> list[str | None]:
        """A negative prompt per picture, None where it is the environment's; a wrong one is refused before any work."""
        texts = [given] * number if given is None or isinstance(given, str) else list(given)
        if len(texts) != number:
            raise ValueError(f"{number} prompts but {len(texts)} negative prompts")
        for text in filter(lambda text: text is not None, texts):
            self.env.backbone.check_negative_prompt(check_prompt(text), self.env.config.guidance_scale)
        return [self.negative_prompt if text is None else text for text in texts]

    def _decide(self, observation: Any, action_mask: np.ndarray, episodes: list[_Episode]) -> np.ndarray:
        """Actions of the running lanes; who draws at random is told whose turn it is, so that lanes do not mix."""
        if self._selective:
            for episode, sees in zip(episodes, self.agent.sees(observation), strict=True):
                episode.decide(bool(sees))
        draw = getattr(self.agent, "act_in", None)
        if draw is None:
            return self.agent.act(observation, action_mask)
        return draw(observation, action_mask, [episode.made for episode in episodes])

    def _start(
        self,
        lanes: list[int],
        waiting: list[tuple[int, tuple[str, int, str | None]]],
        running: dict[int, _Episode],
        price: float | None,
    ) -> tuple[Any, dict[str, Any]]:
        began = time.perf_counter()
        taken = [waiting.pop(0) for _ in lanes]
        mask = np.isin(np.arange(self.env.num_envs), lanes)
        asked, seeds, negatives = (list(column) for column in zip(*(what for _, what in taken), strict=True))
        options = {"prompt": asked, "seed": seeds, "negative_prompt": negatives, "price": price, "reset_mask": mask}
        result = self.env.reset(options=options)
        share = (time.perf_counter() - began) / len(lanes)
        for lane, (index, (prompt, seed, _)) in zip(lanes, taken, strict=True):
            made = Generated(prompt, seed, np.zeros(0, np.uint8), seconds=share, price=price)
            running[lane] = _Episode(index, made, fresh=self.env.config.warmup_steps > 0)
        return result

    def _finish(self, episode: _Episode, lane: int, info: dict[str, Any]) -> tuple[int, Generated]:
        made = episode.made
        made.picture = self.env.final_image(lane)
        scores = self.env.clip_score[[lane]], self.env.reward_score[[lane]]
        made.quality = float(quality(*scores, self.env.reward_config)[0])
        if info["fault"][lane]:
            made.note = FAULT
        made.nfe, made.forward_passes = int(info["nfe"][lane]), int(info["forward_passes"][lane])
        made.net_flops = float(info["net_flops"][lane]) + len(made.actions) * self.agent.flops
        if self._selective:
            made.net_flops -= self._refund(episode)
        return episode.index, made

    @property
    def _selective(self) -> bool:
        """Whether the policy says which looks it reads."""
        return hasattr(self.agent, "sees")

    @cached_property
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

    def _refund(self, episode: _Episode) -> float:
        spared = self._spared
        text = spared["others' text" if episode.read else "text"]
        return (episode.unread + episode.fresh) * spared["look"] + episode.read * spared["rest"] + text


def _items(values: Any) -> list[Any]:
    """What an iterable or an array yields; a single thing stands for itself."""
    found = as_list(values)
    if found is None:
        found = list(values) if isinstance(values, Iterator) else [values]
    return found
