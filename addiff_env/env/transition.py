"""What an action, or a mandatory step of the warm-up, does to the lanes; no reward and no Gymnasium here."""

from __future__ import annotations

import numpy as np

from addiff_env.env.decisions import admissible, spent
from addiff_env.env.denoiser import Denoiser
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


def transition(
    denoiser: Denoiser, observer: Observer, state: LaneState, lanes: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Carry out the ``actions`` (B,) of those ``lanes`` that decide; the others of them make a step of their warm-up.

    Returns:
        What was carried out (B,), -1 where nobody decided; which lanes decided; which of these were looked at.
    """
    config, warming = denoiser.config, is_warming(denoiser, state)
    warming, lanes = lanes[warming[lanes]], lanes[~warming[lanes]]
    going = lanes[~state.fault[lanes]]  # who broke down in its warm-up has nothing left to decide
    taken = admissible(config, state, going, actions)
    denoiser.carry_out(
        state,
        denoiser.stepping(state, np.union1d(going[taken[going] == Action.CONTINUE], warming)),
        refining(denoiser, state, going[taken[going] == Action.REFINE]),
        denoiser.finishing(state, going[taken[going] == Action.STOP]),
    )
    state.decisions[lanes] += 1
    denoiser.finish(state, going[~state.done[going] & spent(config, state)[going]])
    warm = warming[state.step_index[warming] == config.warmup_steps]
    denoiser.settle_nonfinite(state, np.union1d(lanes, warm))
    state.done[lanes[state.fault[lanes]]] = True
    looked = lanes[state.done[lanes] | (state.decisions[lanes] % config.observe_every == 0)]
    observer.look(state, np.union1d(looked, warm), first=warm)
    return taken, lanes, looked
