"""What an evaluation says: the table, the plot of quality against compute, the filmstrips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no display is needed

import matplotlib.pyplot as plt
import numpy as np

from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks import Item
from addiff_env.stats import wilson_interval
from addiff_env.types import ACTIONS, Action, ResultRow

INK, AGENT, FIXED = "#1f2430", "#d9480f", "#1c7ed6"


def by_method(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Rows grouped by method, in order of first appearance."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return groups


def action_shares(rows: Sequence[ResultRow]) -> np.ndarray | None:
    """Shares (3,) of the decisions taken, or None where nobody decided."""
    taken = [action for row in rows for action in row.actions]
    return np.bincount(taken, minlength=len(ACTIONS)) / len(taken) if taken else None


def summary_table(rows: Sequence[ResultRow], metric: str = "success") -> str:
    """A table with one line per method; ``metric`` with its 95% interval, in percent where it is 0 or 1."""
    categories = list(dict.fromkeys(row.category for row in rows))
    head = ["method", "n", metric, "95% interval", "NFE", "NFE sd", "GFLOPs", "s/image", "cont/stop/refine"]
    lines = [head + [_short(category) for category in categories]]
    for method, group in by_method(rows).items():
        lines.append(_table_line(method, group, categories, metric))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def scores_of(rows: Sequence[ResultRow], metric: str) -> list[float]:
    """The scores of the rows that have one."""
    return [row.scores[metric] for row in rows if metric in row.scores]


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval: Wilson's where every score is 0 or 1, else by the standard error; NaN of nothing."""
    if not scores:
        return (float("nan"),) * 3
    mean = float(np.mean(scores))
    if set(scores) <= {0.0, 1.0}:
        return mean, *wilson_interval(int(sum(scores)), len(scores))
    half = 1.96 * float(np.std(scores, ddof=1)) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return mean, mean - half, mean + half


def _short(category: str) -> str:
    return category.replace("_objects", "").replace("_object", "").replace("color_attribution", "attrib.")


def _table_line(method: str, group: list[ResultRow], categories: list[str], metric: str) -> list[str]:
    scores = scores_of(group, metric)
    share = set(scores) <= {0.0, 1.0}
    mean, low, high = (f"{100 * v:.1f}" if share else f"{v:.4g}" for v in mean_interval(scores))
    nfe = np.array([row.nfe for row in group])
    shares = action_shares(group)
    line = [
        method,
        str(len(scores)),
        mean,
        f"{low}-{high}",
        f"{nfe.mean():.1f}",
        f"{nfe.std():.1f}",
        f"{np.mean([row.net_flops for row in group]) / 1e9:.1f}",
        f"{np.mean([row.seconds for row in group]):.3f}",
        "-" if shares is None else "/".join(f"{100 * share:.0f}" for share in shares),
    ]
    for category in categories:
        members = scores_of([row for row in group if row.category == category], metric)
        line.append("-" if not members else f"{100 * np.mean(members):.0f}" if share else f"{np.mean(members):.3g}")
    return line


def plot_quality_against_compute(rows: Sequence[ResultRow], path: Path, metric: str = "success") -> None:
    """``metric`` with 95% intervals against mean net FLOPs and mean NFE; fixed steps form a line."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), sharey=True, layout="constrained")
    groups = by_method(rows)
    measures = (("net GFLOPs per image", lambda r: r.net_flops / 1e9), ("NFE per image", lambda r: r.nfe))
    for axis, (label, cost) in zip(axes, measures, strict=True):
        fixed = {name: group for name, group in groups.items() if name.startswith("ddim-")}
        others = {name: group for name, group in groups.items() if name not in fixed}
        _draw_points(axis, fixed, cost, FIXED, "o-", metric)
        _draw_points(axis, others, cost, AGENT, "*", metric)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("prompts satisfied (%)" if metric == "success" else metric)
    figure.suptitle(f"Quality against compute, {len(next(iter(groups.values())))} held-out prompts, 95% intervals")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_points(axis, groups: dict[str, list[ResultRow]], cost, color: str, style: str, metric: str) -> None:
    groups = {name: group for name, group in groups.items() if scores_of(group, metric)}
    if not groups:
        return
    x = [float(np.mean([cost(row) for row in group])) for group in groups.values()]
    scale = 100 if metric == "success" else 1
    bounds = [mean_interval(scores_of(group, metric)) for group in groups.values()]
    y = [scale * mean for mean, _, _ in bounds]
    error = [[scale * (mean - low) for mean, low, _ in bounds], [scale * (high - mean) for mean, _, high in bounds]]
    axis.errorbar(x, y, yerr=error, fmt=style, color=color, capsize=3, markersize=13 if "*" in style else 6)
    for name, px, py in zip(groups, x, y, strict=True):
        axis.annotate(name, (px, py), textcoords="offset points", xytext=(7, 7), fontsize=9, color=color)


# --------------------------------------------------------------------------- filmstrips


def record_trajectory(env: DiffusionDenoiseVectorEnv, act, item: Item) -> list[dict]:
    """Run one item on a one-lane environment; a frame per decision, and the final picture.

    A frame has ``picture`` uint8 (H, W, 3), ``action`` (None at the end), ``mask`` float (h, w) or None,
    ``nfe``, ``step`` and ``reward_score``.
    """
    observation, info = env.reset(options={"prompt": [item.prompt], "seed": [item.seed]})
    frames, ended = [], False
    while not ended:
        action = act(observation, info["action_mask"])
        frame = _frame(env.preview_images()[0], info)
        observation, _, terminated, _, info = env.step(action)
        frame["action"] = int(info["action_taken"][0])
        frame["mask"] = env.refine_mask[0] if frame["action"] == Action.REFINE else None
        frames.append(frame)
        ended = bool(terminated[0])
    return [*frames, _frame(env.final_image(0), info)]


def _frame(picture: np.ndarray, info: dict) -> dict:
    scores = {"nfe": int(info["nfe"][0]), "step": int(info["step_index"][0]), "score": float(info["reward_score"][0])}
    return {"picture": picture, "action": None, "mask": None, **scores}


def overlay(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture uint8 (H, W, 3) with what the mask (h, w) in [0, 1] leaves alone darkened, and its edge drawn."""
    repeat = (picture.shape[0] // mask.shape[0], picture.shape[1] // mask.shape[1])
    weight = np.kron(mask, np.ones(repeat))[..., None]
    tinted = picture * (0.35 + 0.65 * weight)
    inside = weight[..., 0] > 0.5
    edge = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    tinted[edge] = (255, 255, 255)
    return tinted.clip(0, 255).astype(np.uint8)


def plot_filmstrips(strips: Sequence[tuple[Item, str, list[dict]]], path: Path) -> None:
    """One row per (item, verdict, frames): previews with the action taken, masks overlaid, the final picture."""
    columns = max(len(frames) for _, _, frames in strips)
    figure, axes = plt.subplots(
        len(strips), columns, figsize=(1.25 * columns, 1.75 * len(strips)), squeeze=False, layout="constrained"
    )
    for row, (item, verdict, frames) in enumerate(strips):
        for axis in axes[row]:
            axis.axis("off")
        for column, frame in enumerate(frames):
            _draw_frame(axes[row, column], frame)
        first = axes[row, 0]
        title = first.text(0, 1.34, f"{item.prompt!r}: {verdict}", transform=first.transAxes, fontsize=9, color=INK)
        title.set_in_layout(False)  # a long prompt must not widen its column
    figure.suptitle(" ", fontsize=14)  # room for the first title, which stands outside the layout
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_frame(axis, frame: dict) -> None:
    picture = frame["picture"] if frame["mask"] is None else overlay(frame["picture"], frame["mask"])
    axis.imshow(picture, interpolation="nearest")
    action = frame["action"]
    label = "final" if action is None else ACTIONS[action]
    color = AGENT if action == Action.REFINE else INK
    axis.set_title(f"{label}\nNFE {frame['nfe']}  v {frame['score']:+.1f}", fontsize=6.5, color=color)
