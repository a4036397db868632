"""Trajectories as pictures: what the policy saw at each decision, what it did, where it refined, what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from addiff_env.stats import spread
from addiff_env.types import ACTIONS, Action

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from addiff_env.env.vector import DiffusionDenoiseVectorEnv

INK, ACCENT = "#1f2430", "#d9480f"
MOST_COLUMNS = 16  # frames drawn of one trajectory

Frame = dict[str, Any]
Act = Callable[[Any, np.ndarray], np.ndarray]


def record_trajectories(
    env: DiffusionDenoiseVectorEnv,
    act: Act,
    prompts: Sequence[str],
    seeds: Sequence[int],
    shown: Sequence[int] | None = None,
    price: float | None = None,
) -> list[list[Frame]]:
    """Run every lane once and keep a frame per decision, and the final picture, of those ``shown`` (None: all).

    A frame has ``picture`` uint8 (H, W, 3), ``action`` as carried out (None at the end), ``mask`` float (h, w) in
    [0, 1] or None, and ``nfe``, ``step`` and ``score`` (the reward model's) as they were when it was decided.

    Args:
        env: one lane per prompt, which wait when they have ended (autoreset DISABLED).
        act: observation and action masks (B, 3) to actions (B,).
        prompts: one per lane.
        seeds: of the initial noise, one per lane.
        shown: the lanes to record.
        price: of an evaluation; None: as the environment has it.
    """
    observation, info = env.reset(options={"prompt": list(prompts), "seed": list(seeds), "price": price})
    lanes = range(env.num_envs) if shown is None else shown
    strips: dict[int, list[Frame]] = {lane: [] for lane in lanes}
    running = ~env.done
    while running.any():
        watched = [lane for lane in lanes if running[lane]]
        previews = env.preview_images() if watched else ()
        for lane in watched:
            strips[lane].append(_frame(previews[lane], info, lane))
        observation, _, terminated, _, info = env.step(act(observation, info["action_mask"]))
        for lane in watched:
            if info["action_taken"][lane] < 0:  # it broke down in its warm-up: nothing was decided
                strips[lane].pop()
            else:
                action = int(info["action_taken"][lane])
                strips[lane][-1] |= {
                    "action": action,
                    "mask": env.refine_mask[lane] if action == Action.REFINE else None,
                }
        running = ~terminated
    return [[*strips[lane], _frame(env.final_image(lane), info, lane)] for lane in lanes]


def _frame(picture: np.ndarray, info: dict[str, Any], lane: int) -> Frame:
    numbers = {"nfe": int(info["nfe"][lane]), "step": int(info["step_index"][lane])}
    return {"picture": picture, "action": None, "mask": None, **numbers, "score": float(info["reward_score"][lane])}


def overlay(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture uint8 (H, W, 3) with what the mask (h, w) in [0, 1] leaves alone darkened, and its edge drawn."""
    repeat = (picture.shape[0] // mask.shape[0], picture.shape[1] // mask.shape[1])
    weight = np.kron(mask, np.ones(repeat))[..., None]
    tinted = picture * (0.35 + 0.65 * weight)
    inside = weight[..., 0] > 0.5
    edge = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    tinted[edge] = (255, 255, 255)
    return tinted.clip(0, 255).astype(np.uint8)


def thinned(frames: Sequence[Frame], most: int = MOST_COLUMNS) -> list[Frame]:
    """At most ``most`` frames, in order: the final one, then decisions other than continue, then evenly spaced ones."""
    last = len(frames) - 1
    decided = [k for k in range(last) if frames[k]["action"] != Action.CONTINUE]
    others = [k for k in range(last) if frames[k]["action"] == Action.CONTINUE]
    chosen = spread(decided, most - 1)
    return [frames[k] for k in sorted([*chosen, *spread(others, most - 1 - len(chosen)), last])]


def filmstrip_figure(strips: Sequence[tuple[str, Sequence[Frame]]]) -> Figure:
    """One row per trajectory under its title: previews with the action taken, masks overlaid, the final picture.

    Raises:
        ValueError: no trajectory, or one without frames.
    """
    if not strips or not all(frames for _, frames in strips):
        raise ValueError(f"expected at least one frame per strip, got strips of {[len(f) for _, f in strips]}")
    rows = [(title, thinned(frames)) for title, frames in strips]
    columns = max(len(frames) for _, frames in rows)
    figure = Figure(figsize=(1.25 * columns, 1.75 * len(rows)), layout="constrained", dpi=110)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, frames) in enumerate(rows):
        for axis in axes[row]:
            axis.axis("off")
        for column, frame in enumerate(frames):
            _draw(axes[row, column], frame)
        first = axes[row, 0]
        words = first.text(0, 1.34, title, transform=first.transAxes, fontsize=9, color=INK, parse_math=False)
        words.set_in_layout(False)  # a long prompt must not widen its column
    figure.suptitle(" ", fontsize=14)  # room for the first title, which stands outside the layout
    return figure


def _draw(axis: Axes, frame: Frame) -> None:
    picture = frame["picture"] if frame["mask"] is None else overlay(frame["picture"], frame["mask"])
    axis.imshow(picture, interpolation="nearest")
    action = frame["action"]
    label = "final" if action is None else ACTIONS[action]
    color = ACCENT if action == Action.REFINE else INK
    axis.set_title(f"{label}\nNFE {frame['nfe']}  v {frame['score']:+.1f}", fontsize=6.5, color=color)
