"""What an action, or a mandatory step of the warm-up, does to the lanes; no reward and no Gymnasium here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from addiff_env.env.config import EnvConfig
from addiff_env.env.decisions import admissible, spent
from addiff_env.env.denoiser import Denoiser, Evaluation, Work, ask
from addiff_env.env.observer import Observer
from addiff_env.env.refine import refining
from addiff_env.env.state import LaneState
from addiff_env.types import Action


def is_warming(denoiser: Denoiser, state: LaneState) -> np.ndarray:
    """Which lanes (B,) bool run and have mandatory steps before their first decision."""
    return ~state.done & (state.decisions == 0) & (state.step_index < denoiser.config.warmup_steps)


def warm_up(denoiser: Denoiser, observer: Observer, state: LaneState, lanes: np.ndarray) -> None:
    """Run the mandatory steps of ``lanes`` that were just started, and look at them."""
    steps = denoiser.config.warmup_steps
    for step in range(steps):
        denoiser.step(state, lanes, capture=step == steps - 1)
    denoiser.settle_nonfinite(state, lanes)  # an episode begins all the same: its first step ends it
    if steps:
        observer.look(state, lanes, first=lanes)
    else:
        observer.blank(state, lanes)


class UnderWay:
    """The actions that lanes are in the middle of, where actions `overlap`; else there are none between two steps.

    An action of several evaluations (refine, stop) then makes one of them in each step, in one batch with whatever the
    other lanes do, so that the batch stays as full as there are lanes.

    Attributes:
        overlap: whether actions go on over several steps.
        action: (B,) what each lane is in the middle of, -1: nothing.
    """

    def __init__(self, num_envs: int, overlap: bool = False) -> None:
        self.overlap, self.action = overlap, np.full(num_envs, -1)
        self._asked: dict[Work, Evaluation] = {}

    @property
    def busy(self) -> np.ndarray:
        """Which lanes (B,) bool are in the middle of an action."""
        return self.action >= 0

    def require_free(self, lanes: np.ndarray) -> None:
        """Check that nothing is done to ``lanes`` at the moment; RuntimeError: something is."""
        if (busy := lanes[self.busy[lanes]]).size:
            raise RuntimeError(f"lanes {busy.tolist()} are in the middle of an action: step until they have ended it")

    def go_on(self, denoiser: Denoiser, state: LaneState, taken: np.ndarray, works: Sequence[Work]) -> np.ndarray:
        """Begin what is ``taken`` (B,), by ``works``, and make one evaluation of everything under way.

        Returns what was carried out (B,): the action of the lanes that are done with it, -1 for the others.
        """
        self.action = np.where(taken >= 0, taken, self.action)
        self._asked = denoiser.advance(state, self._asked | ask(works))
        going_on = np.zeros(len(taken), bool)
        for evaluation in self._asked.values():
            going_on[evaluation.lanes] = True
        ended, self.action = np.where(going_on, -1, self.action), np.where(going_on, self.action, -1)
        return ended


def transition(
    denoiser: Denoiser,
    observer: Observer,
    state: LaneState,
    lanes: np.ndarray,
    actions: np.ndarray,
    under_way: UnderWay,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Carry out the ``actions`` (B,) of those ``lanes`` that decide; the others of them make a step of their warm-up.

    Where actions overlap, lanes in the middle of one go on with it, and ``under_way`` remembers what is not done yet.

    Returns:
        What was carried out (B,), -1 where nothing was (to its end); which lanes acted; which of these were looked at.
    """
    config, warming = denoiser.config, is_warming(denoiser, state)
    warming, acting = lanes[warming[lanes]], lanes[~warming[lanes]]
    deciding = acting[~under_way.busy[acting]]
    going = deciding[~state.fault[deciding]]  # who broke down in its warm-up has nothing left to decide
    taken = admissible(config, state, going, actions)
    state.decisions[deciding] += 1
    works = (
        denoiser.stepping(state, np.union1d(going[taken[going] == Action.CONTINUE], warming)),
        refining(denoiser, state, going[taken[going] == Action.REFINE]),
        denoiser.finishing(state, going[taken[going] == Action.STOP]),
    )
    if under_way.overlap:
        whole = [_with_finish(denoiser, state, work, warming) for work in works]
        taken = under_way.go_on(denoiser, state, taken, whole)
        ended = acting[~under_way.busy[acting]]
    else:
        denoiser.carry_out(state, *works)
        denoiser.finish(state, _exhausted(config, state, going))
        ended = acting
    warm = warming[state.step_index[warming] == config.warmup_steps]
    denoiser.settle_nonfinite(state, np.union1d(ended, warm))
    state.done[ended[state.fault[ended]]] = True
    looked = ended[state.done[ended] | (state.decisions[ended] % config.observe_every == 0)]
    observer.look(state, np.union1d(looked, warm), first=warm)
    return taken, acting, looked


def _exhausted(config: EnvConfig, state: LaneState, lanes: np.ndarray) -> np.ndarray:
    """Those of ``lanes`` that run and whose budget has no room for another step."""
    return lanes[~state.done[lanes] & spent(config, state)[lanes]]


def _with_finish(denoiser: Denoiser, state: LaneState, work: Work, warming: np.ndarray) -> Work:
    """``work``, and the end of those of its lanes, but for the ``warming``, whose budget it has exhausted."""
    left = yield from work
    exhausted = _exhausted(denoiser.config, state, np.setdiff1d(left, warming))
    yield from denoiser.finishing(state, exhausted)
    return np.setdiff1d(left, exhausted)
