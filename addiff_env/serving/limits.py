"""What a visitor of the page may ask for: checked here, and refused in words that a page can show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from addiff_env.agent import Agent
from addiff_env.env.prompts import check_prompt
from addiff_env.pipeline import AdaptivePipeline

MAX_SEED = 2**53 - 1  # what a browser's numbers hold exactly
PROMPT_LENGTH = 500  # characters
LEAST_STEPS_OFFERED = 50  # the fixed number of steps can be chosen up to this, or twice the environment's


@dataclass(frozen=True)
class Budget:
    """What the slider sets: the argument ``name`` of the pipeline, between two values, both included."""

    name: str
    label: str
    info: str
    low: float
    high: float
    step: float
    start: float

    @classmethod
    def of(cls, pipe: AdaptivePipeline) -> Budget:
        """What the pipeline's agent can be asked for, as far as it was measured.

        With a table of prices that is the mean NFE, with a price input alone the price, else the most evaluations.
        """
        agent, config = pipe.agent, pipe.env.config
        prices = agent.price_range if isinstance(agent, Agent) else None
        if prices is None:
            least, most = config.warmup_steps + 1 + config.finish_steps, config.nfe_budget
            info = "The picture is finished when they are spent."
            return cls("max_nfe", "Budget: most evaluations", info, least, most, 1, most)
        if agent.price_table is None:
            low, high = prices
            info = "The dearer an evaluation is, the fewer the agent takes."
            return cls("price", "Budget: price of an evaluation", info, low, high, (high - low) / 100, low)
        low, high = _inside(*agent.price_table.limits("nfe"))
        info = "Mean over many prompts, as measured for this agent; an easy prompt takes fewer, a hard one more."
        return cls("target_nfe", "Budget: mean evaluations a picture", info, low, high, 0.1, round((low + high) / 2, 1))

    def arguments(self, value: float) -> dict[str, Any]:
        """``value`` as the pipeline takes it."""
        return {self.name: int(value) if self.name == "max_nfe" else float(value)}


def _inside(low: float, high: float) -> tuple[float, float]:
    """The range in whole tenths; one that holds none of them stays what it is."""
    tenths = math.ceil(low * 10) / 10, math.floor(high * 10) / 10
    return tenths if tenths[0] <= tenths[1] else (low, high)


@dataclass(frozen=True)
class Limits:
    """Bounds of a request."""

    budget: Budget
    default_steps: int  # of the comparison with a fixed number
    most_steps: int
    prompt_length: int = PROMPT_LENGTH

    @classmethod
    def of(cls, pipe: AdaptivePipeline, default_steps: int | None = None, prompt_length: int = PROMPT_LENGTH) -> Limits:
        """Those of a pipeline; ``default_steps``: None is the environment's number.

        Raises:
            ValueError: ``default_steps`` beyond what can be chosen.
        """
        own = pipe.env.config.num_inference_steps
        most = max(LEAST_STEPS_OFFERED, 2 * own)
        chosen = _whole("The fixed number of steps", own if default_steps is None else default_steps, 1, most)
        return cls(Budget.of(pipe), chosen, most, prompt_length)


@dataclass(frozen=True)
class PictureRequest:
    """A picture that a visitor asks for, within the limits."""

    prompt: str
    seed: int
    budget: float
    steps: int | None  # of the comparison; None: none is wanted


def read_request(limits: Limits, prompt: Any, seed: Any, budget: Any, compare: Any, steps: Any) -> PictureRequest:
    """A request as the browser sends it.

    Raises:
        ValueError: what is wrong with it, for the visitor to read.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("Type a prompt first, or choose a preset.")
    if len(prompt) > limits.prompt_length:
        raise ValueError(f"The prompt has {len(prompt)} characters; at most {limits.prompt_length} are taken.")
    text = check_prompt(prompt.strip(), "The prompt")
    number = _whole("The seed", seed, 0, MAX_SEED)
    wanted = limits.budget
    amount = (_whole if wanted.name == "max_nfe" else _between)("The budget", budget, wanted.low, wanted.high)
    chosen = _whole("The fixed number of steps", steps, 1, limits.most_steps) if compare else None
    return PictureRequest(text, number, amount, chosen)


def _between(name: str, value: Any, low: float, high: float) -> float:
    if not _is_between(value, low, high):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}.")
    return value


def _whole(name: str, value: Any, low: float, high: float) -> int:
    if not _is_between(value, low, high) or value != int(value):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {_shown(value)}.")
    return int(value)


def _is_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]
