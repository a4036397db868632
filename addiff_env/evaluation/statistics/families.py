"""What methods' names say: which solver, best-of-N, training run or control a row belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

FIXED_STEP_SOLVERS = ("ddim", "dpmpp_2m", "euler", "unipc", "pndm")  # the model's own inference; others change it
BEST_OF = "best-of-N"  # the family of best-of-N at every N
SEARCHES = {"fk": "Feynman-Kac steering", "rbf": "rollover budget forcing", "restart": "restart sampling"}
LOOKING_RULES = ("threshold:", "two-step:")
RULES = (*LOOKING_RULES, "words-", "stop-", "refine-always", "random:")  # how hand-made rules' names begin
FULL_IMAGE, CONTINUED = "agent, mask=full", "agent, continued"  # H4's controls, by method name
_AGENT = re.compile(r"(?P<run>agent(-s\d+)?)(@(?P<price>[^,]+))?")
Groups = Mapping[str, Sequence[str]]  # a name and the methods that are its training runs


def members_of(fronts: Groups) -> list[str]:
    """Every method of the groups, once, in order."""
    return list(dict.fromkeys(name for members in fronts.values() for name in members))


def solver_fronts(methods: Iterable[str]) -> dict[str, list[str]]:
    """Fixed-step methods by solver (`FIXED_STEP_SOLVERS`), from names such as ``ddim-50``; other names are left out."""
    fronts: dict[str, list[str]] = {}
    for name in methods:
        solver, _, steps = name.rpartition("-")
        if solver in FIXED_STEP_SOLVERS and steps.isdigit():
            fronts.setdefault(solver, []).append(name)
    return fronts


def at_price(run: str, price: float | None) -> str:
    """What a training run's rows at a price of an evaluation are called: ``agent@0.004``; None: it has no price."""
    return run if price is None else f"{run}@{price!r}"


def run_and_price(method: str) -> tuple[str, str] | None:
    """Training run and price (empty: without) that an agent's method name says; None of other methods."""
    match = _AGENT.fullmatch(method)
    return None if match is None else (match["run"], match["price"] or "")


def agent_runs(methods: Iterable[str]) -> list[str]:
    """Training runs of the agent among method names: ``agent``, or ``agent-s0``, ``agent-s1``, ...

    Of an agent at several prices (``agent@0.004``) those at the one that is named first: verdicts are about that one.
    """
    return next(iter(agent_runs_by_price(methods).values()), [])


def agent_runs_by_price(methods: Iterable[str]) -> dict[str, list[str]]:
    """Training runs of the agent at each price, as the names say it (empty: without): ``{"0.004": [...]}``."""
    found: dict[str, list[str]] = {}
    for name in methods:
        if agent := run_and_price(name):
            found.setdefault(agent[1], []).append(name)
    return found


def agent_fronts(methods: Iterable[str]) -> dict[str, list[str]]:
    """Training runs of the agent with their methods, one a price: ``{"agent": ["agent@0.002", "agent@0.004"]}``."""
    fronts: dict[str, list[str]] = {}
    for name in methods:
        if agent := run_and_price(name):
            fronts.setdefault(agent[0], []).append(name)
    return fronts


def solver_families(methods: Sequence[str]) -> dict[str, list[str]]:
    """`solver_fronts`, and best-of-N and every kind of search as families of their own."""
    return solver_fronts(methods) | search_families(methods)


def search_families(methods: Iterable[str]) -> dict[str, list[str]]:
    """Best-of-N and inference-time search (`SEARCHES`) by family, from names such as ``fk-4:ddim-10``."""
    kinds = {"best-of": BEST_OF, **SEARCHES}
    found: dict[str, list[str]] = {}
    for name in methods:
        kind, dash, _ = name.partition(":")[0].rpartition("-")
        if dash and ":" in name and kind in kinds:
            found.setdefault(kinds[kind], []).append(name)
    return found


def hand_made_rules(methods: Iterable[str]) -> list[str]:
    """Rules that decide without having learned anything, see `RULES`."""
    return [name for name in methods if name.startswith(RULES)]


def control_names(agent: str) -> tuple[str, str]:
    """H4's controls of an agent's rows, by method name."""
    return FULL_IMAGE.replace("agent", agent, 1), CONTINUED.replace("agent", agent, 1)
