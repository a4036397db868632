"""Which prompt and seed each new training episode takes: a seeded stream, a curriculum, seeds that have baselines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gymnasium.utils import seeding

from addiff_env.env.prices import draw_price
from addiff_env.env.validation import check_seed

_SEPARATORS = re.compile(
    r",\s*(?:and\s+)?|\b(?:and|with|beside|behind|above|below|under|over|near|inside|in front of|on top of|next to"
    r"|(?:to the )?(?:left|right) of|on|in)\b"
)
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTS = {word: number for number, word in enumerate(_NUMBERS, 2)}
COMPLEXITIES = ("1", "2", "3+")


def prompt_complexity(prompt: str) -> int:
    """How many things a prompt asks for: its phrases between commas, conjunctions and places, counts included.

    >>> [prompt_complexity(p) for p in ("a red cube", "three dogs", "a cat on a mat", "a cup, a fork and two spoons")]
    [1, 3, 2, 4]
    """
    phrases = [phrase.split() for phrase in _SEPARATORS.split(prompt.lower())]
    counts = [max((_COUNTS.get(word, 1) for word in phrase), default=0) for phrase in phrases]
    return max(1, sum(counts))


def complexity_group(prompt: str) -> str:
    """The prompt's group among `COMPLEXITIES`."""
    return COMPLEXITIES[min(prompt_complexity(prompt), len(COMPLEXITIES)) - 1]


@dataclass(frozen=True)
class Stage:
    """Until this share of the training, only prompts of at most this complexity are drawn."""

    until: float  # share of all timesteps, in (0, 1]
    most: int | None  # complexity; None: every prompt
    name: str = ""


class PromptOrder:
    """Draws (prompt, seed) pairs; `progress` (share of the training done) chooses the stage of the curriculum.

    Args:
        prompts: what to draw from, each as likely.
        stages: in ascending order; after the last one every prompt is drawn.
        seeds: the seeds a prompt may take; None: any of 2**31.
        price_range: the environment's, which draws a price by the seed: of ``seeds``, a few, it is drawn here instead.

    Raises:
        ValueError: stages out of order, or one that leaves no prompt.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        stages: Sequence[Stage] = (),
        seeds: Callable[[str], Sequence[int]] | None = None,
        price_range: Sequence[float] | None = None,
    ) -> None:
        ends = [stage.until for stage in stages]
        if ends != sorted(ends) or not all(0 < end <= 1 for end in ends):
            raise ValueError(f"curriculum stages must end at ascending shares in (0, 1], got {ends}")
        self.stages = [*stages, Stage(1.0, None, "full")]
        self._pools = [_choose(prompts, stage) for stage in self.stages]
        self._seeds, self._price_range = seeds, price_range
        self._rng = seeding.np_random(None)[0]
        self.progress = 0.0

    @property
    def stage(self) -> int:
        """Index of the present stage."""
        return next((k for k, stage in enumerate(self.stages) if self.progress < stage.until), len(self.stages) - 1)

    def seed(self, seed: int | None) -> None:
        """Start the stream anew; ValueError: no seed."""
        self._rng = seeding.np_random(None if seed is None else check_seed(seed))[0]

    def draw(self) -> tuple[str, int]:
        """The next episode's prompt and seed."""
        pool = self._pools[self.stage]
        prompt = pool[int(self._rng.integers(len(pool)))]
        if self._seeds is None:
            return prompt, int(self._rng.integers(2**31))
        known = self._seeds(prompt)
        return prompt, int(known[int(self._rng.integers(len(known)))])

    def draw_price(self) -> float | None:
        """The next episode's price of an evaluation; None where the environment says it."""
        if self._price_range is None or self._seeds is None:
            return None
        return draw_price(self._price_range, self._rng)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: numbers and strings only."""
        return {"stream": self._rng.bit_generator.state, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._rng.bit_generator.state = state["stream"]
        self.progress = state["progress"]


def _choose(prompts: Sequence[str], stage: Stage) -> list[str]:
    most = stage.most
    chosen = [prompt for prompt in prompts if most is None or prompt_complexity(prompt) <= most]
    if not chosen:
        raise ValueError(f"curriculum stage {stage.name!r}: none of {len(prompts)} prompts has complexity <= {most}")
    return chosen
