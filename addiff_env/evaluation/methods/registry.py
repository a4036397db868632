"""Methods by name: patterns such as ``best-of-{number}:{solver}-{steps}``, each with the function that makes them.

A further method is one more function with `method` above it; fields are converted to the types of its parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.diffusers_methods import (
    SCHEDULERS,
    AttendAndExcite,
    DiffusersSolver,
    MethodOptions,
    SelfAttentionGuidance,
    latent_consistency,
    sdxl_turbo,
)
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, RefineAlways, StopAt, ThresholdRule, TwoStepRule
from addiff_env.evaluation.methods.samplers import FixedSteps, WordCount
from addiff_env.evaluation.methods.search import BestOf, OracleStop
from addiff_env.evaluation.methods.steering import FK_SCALE, T_MAX, T_MIN, FeynmanKac, Restart, RolloverBudgetForcing

AUTO = ("threshold:auto", "random:auto", "words-auto", "best-of-auto")  # tuned to the agent on other prompts
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Setup:
    """What a method is made with; ``spec`` is its name as it was asked for."""

    spec: str
    env: DiffusionDenoiseVectorEnv
    agent: Agent | None
    options: MethodOptions
    benchmark: Sequence[Item]  # all items of the list
    run: str = "agent"  # what the agent's training run is called


@dataclass(frozen=True)
class Pattern:
    """Names of methods, and what makes them."""

    text: str
    make: Callable[..., Method]

    def fields(self, spec: str) -> dict[str, str] | None:
        """What stands in ``spec`` for each field, unconverted; None where the pattern does not fit.

        Text at the end takes whatever is left, any other field no colon and no at sign.
        """
        parts = _FIELD.split(self.text)  # literals and names in turn
        groups = [f"(?P<{name}>[^:@]+)" for name in parts[1::2]]
        if groups and not parts[-1] and get_type_hints(self.make)[parts[-2]] is str:
            groups[-1] = f"(?P<{parts[-2]}>.+)"
        literals = [re.escape(part) for part in parts[::2]]
        found = re.fullmatch("".join(a + b for a, b in zip(literals, [*groups, ""], strict=True)), spec)
        return found.groupdict() if found else None

    def convert(self, fields: dict[str, str]) -> dict[str, Any]:
        """Fields as the types that the function states.

        Raises:
            ValueError: one is no such number; says which.
        """
        types = get_type_hints(self.make)
        return {name: _CONVERTERS[types[name]](name, text) for name, text in fields.items()}


def _whole(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        if math.isfinite(number := float(text)):  # a policy that compares with NaN would do the same of every picture
            return number
    except ValueError:
        pass
    raise ValueError(f"{name} must be a number, got {text!r}")


_CONVERTERS: dict[Any, Callable[[str, str], Any]] = {int: _whole, float: _number, str: lambda name, text: text}
_PATTERNS: dict[str, Pattern] = {}


def method(*patterns: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function ``(setup, field, ...) -> Method`` for names of these patterns.

    Raises:
        ValueError: a pattern that is registered already.
    """

    def register(make: Callable[..., Method]) -> Callable[..., Method]:
        for text in patterns:
            if text in _PATTERNS:
                raise ValueError(f"the method {text!r} is registered already")
            _PATTERNS[text] = Pattern(text, make)
        return make

    return register


def known_methods() -> tuple[str, ...]:
    """The patterns of all methods."""
    return tuple(_PATTERNS)


def fitting(spec: str) -> tuple[Pattern, dict[str, str]]:
    """The pattern of ``spec``, of several the one with the fewest fields, and what stands in these.

    Raises:
        ValueError: there is none.
    """
    pairs = [(pattern, found) for pattern in _PATTERNS.values() if (found := pattern.fields(spec)) is not None]
    if not pairs:
        raise ValueError("no method has such a name")
    return min(pairs, key=lambda pair: len(pair[1]))  # "words-auto" is no number of words


def make_method(
    spec: str,
    env: DiffusionDenoiseVectorEnv,
    agent: Agent | None = None,
    options: MethodOptions = MethodOptions(),  # noqa: B008 (frozen)
    benchmark: Sequence[Item] = (),
    run: str = "agent",
) -> Method:
    """The method that ``spec`` names (`known_methods`), on the model and settings of ``env``.

    ``benchmark`` holds all items of the list, also those of other shards and beyond the limit; ``run`` is what the
    agent's training run is called, if one of several.

    Raises:
        ValueError: unknown, or its numbers do not parse; the message quotes it.
        FileNotFoundError, ImportError: weights or a package that it needs are missing; says what to get.
    """
    try:
        pattern, found = fitting(spec)
        return pattern.make(Setup(spec, env, agent, options, benchmark, run), **pattern.convert(found))
    except ValueError as error:
        known = ", ".join(known_methods())
        raise ValueError(f"cannot make the method {spec!r}: {error}; known: {known}") from error


def is_agent(spec: str) -> bool:
    """Whether ``spec`` names the agent, at a price or not."""
    return spec.partition("@")[0] == "agent"


def usual_price(agent: Any) -> float | None:
    """The price at which a policy acts unless one is named; None: it has no price input, as rules have none."""
    return getattr(agent, "middle_price", None)


def first_price(specs: Iterable[str], agent: Agent) -> float | None:
    """The price of the first of ``specs`` that names the agent, or where none does the middle of its range.

    None: it has no price input.

    Raises:
        ValueError: no price, or one that the agent cannot act by.
    """
    named = next(filter(is_agent, specs), "agent")
    if named == "agent":
        return usual_price(agent)
    try:
        pattern, found = fitting(named)
        return agent.check_price(pattern.convert(found)["price"])
    except ValueError as error:
        raise ValueError(f"cannot make the method {named!r}: {error}") from error


# --------------------------------------------------------------------------- the methods


@method("agent")
def _agent(setup: Setup) -> Method:
    """At the one price it was trained for, or in the middle of its range."""
    agent = _required(setup.agent)
    return PolicyMethod(setup.env, agent, setup.run, usual_price(agent))


@method("agent@{price}")
def _agent_at(setup: Setup, price: float) -> Method:
    agent = _required(setup.agent)
    return PolicyMethod(setup.env, agent, setup.run, agent.check_price(price))


def _required(agent: Agent | None) -> Agent:
    if agent is None:
        raise ValueError("there is no agent")
    return agent


@method("ddim-{steps}", "dpmpp_2m-{steps}")
def _own_solver(setup: Setup, steps: int) -> Method:
    return FixedSteps(setup.env, steps, setup.spec.partition("-")[0])


@method("euler-{steps}")
def _euler(setup: Setup, steps: int) -> Method:
    return (_own_solver if setup.env.backbone.solver == "euler" else _scheduler)(setup, steps)


@method("unipc-{steps}", "pndm-{steps}")
def _scheduler(setup: Setup, steps: int) -> Method:
    name = setup.spec.partition("-")[0]
    return DiffusersSolver(setup.env, name, steps, SCHEDULERS[name])


@method("sag-{steps}")
def _sag(setup: Setup, steps: int) -> Method:
    return SelfAttentionGuidance(setup.env, steps)


@method("attend-and-excite-{steps}")
def _attend_and_excite(setup: Setup, steps: int) -> Method:
    return AttendAndExcite(setup.env, steps)


@method("lcm-{steps}")
def _lcm(setup: Setup, steps: int) -> Method:
    return latent_consistency(setup.env, steps, setup.options)


@method("sdxl-turbo-{steps}")
def _sdxl_turbo(setup: Setup, steps: int) -> Method:
    return sdxl_turbo(setup.env, steps, setup.options)


@method("best-of-{number}:{solver}-{steps}")
def _best_of(setup: Setup, number: int, solver: str, steps: int) -> Method:
    return BestOf(FixedSteps(setup.env, steps, solver), number)


@method("fk-{particles}:{solver}-{steps}", "fk-{particles}:{solver}-{steps}@{scale}")
def _feynman_kac(setup: Setup, particles: int, solver: str, steps: int, scale: float = FK_SCALE) -> Method:
    return FeynmanKac(setup.env, particles, solver, steps, scale)


@method("rbf-{max_nfe}:{solver}-{steps}")
def _rollover(setup: Setup, max_nfe: int, solver: str, steps: int) -> Method:
    return RolloverBudgetForcing(setup.env, max_nfe, solver, steps)


@method("restart-{max_nfe}:{solver}-{steps}", "restart-{max_nfe}:{solver}-{steps}@{t_min}:{t_max}")
def _restart(setup: Setup, max_nfe: int, solver: str, steps: int, t_min: float = T_MIN, t_max: float = T_MAX) -> Method:
    return Restart(setup.env, max_nfe, solver, steps, t_min, t_max)


@method("oracle-stop:{solver}-{steps}", "oracle-stop:{solver}-{steps}@{scorer}")
def _oracle_stop(setup: Setup, solver: str, steps: int, scorer: str = "") -> Method:
    return OracleStop(FixedSteps(setup.env, steps, solver), scorer or None)


@method("words-{mean_steps}")
def _words(setup: Setup, mean_steps: float) -> Method:
    return WordCount(setup.env, mean_steps, setup.benchmark)


@method("stop-{steps}")
def _stop(setup: Setup, steps: int) -> Method:
    return PolicyMethod(setup.env, StopAt(steps, setup.env.config.num_inference_steps), setup.spec)


@method("refine-always")
def _refine_always(setup: Setup) -> Method:
    return PolicyMethod(setup.env, RefineAlways(), setup.spec)


@method("threshold:{steps}:{score}")
def _threshold(setup: Setup, steps: int, score: float) -> Method:
    return PolicyMethod(setup.env, ThresholdRule(steps, score, setup.env.config.num_inference_steps), setup.spec)


@method("two-step:{early}:{turn}:{late}:{enough}")
def _two_step(setup: Setup, early: float, turn: int, late: float, enough: float) -> Method:
    env = setup.env
    if not env.perception.reads_latents:
        raise ValueError(f"it needs a scorer of latents, which foretells; this one is {env.config.scorer!r}")
    widths = list(env.parts.items())
    before = [name for name, _ in widths].index("outlook")
    outlook = sum(width for _, width in widths[:before])
    rule = TwoStepRule(early, turn, late, enough, env.config.num_inference_steps, outlook)
    return PolicyMethod(env, rule, setup.spec)


@method("random:{continue_share}:{stop_share}:{refine_share}")
def _random(setup: Setup, continue_share: float, stop_share: float, refine_share: float) -> Method:
    return PolicyMethod(setup.env, RandomPolicy([continue_share, stop_share, refine_share]), setup.spec)


@method(*AUTO)
def _untuned(setup: Setup) -> Method:
    raise ValueError("it is tuned to an agent first")
