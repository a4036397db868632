"""Does the reward pay what it is worth? What the verifier says of pictures, beside what the checker finds.

`addiff_env.tiny.measures.auc` prints these tables: the verifier's mean probability and the share of satisfied pictures,
for stops after each number of steps, after refinements and within every category. *Foretold* is what it says of the
clean prediction that a lane stops at; *paid* what it says of the picture that comes of it, the terminal reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from addiff_env.env.config import EnvConfig
from addiff_env.perception.scorers import LatentScorer
from addiff_env.storage.inputs import fingerprint
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.recipes.endings import FreeLanes, Recorder, evaluations_spared
from addiff_env.tiny.recipes.generate import save_arrays

STOPS = (3, 4, 5, 7, 9)  # steps after which pictures are stopped at
TOLERANCE = 0.03  # between mean probability and success
REFINED = (0.4, 1.0)  # of the recorded trajectories that end satisfied and of those that fail, how many are refined
BATCH = 64
MADE_WITH = "made_with"  # of a file: the settings, as JSON


@dataclass(frozen=True)
class Group:
    """Some pictures: how many, the share that is satisfied, and the verifier's mean probabilities."""

    name: str
    n: int
    satisfied: float
    foretold: float | None  # None where nothing was foretold: the pictures ran to the end
    paid: float

    @property
    def passed(self) -> bool:
        """Whether both probabilities lie within `TOLERANCE` of the share."""
        known = (p for p in (self.foretold, self.paid) if p is not None)
        return all(abs(p - self.satisfied) <= TOLERANCE for p in known)


def record(config: EnvConfig, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What comes of a split's ``rows`` stopped after every step, and refined up to three times, as one table.

    Columns as `addiff_env.tiny.recipes.endings.Record` has them; rows, states and endings are numbered through.
    """
    parts: list[dict[str, np.ndarray]] = []
    finishes = [0.0] * (config.finish_steps - 1) + [1.0]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts, seeds = [row["prompt"] for row in part], [row["seed"] for row in part]
        rng = np.random.default_rng((0, start))
        lanes = FreeLanes(config, len(part))
        arrays = Recorder(lanes, prompts, seeds, rng, 0, finishes, REFINED).run().arrays()
        parts.append({"prompt": np.asarray(prompts), **arrays})
    return _numbered_through(parts)


def _numbered_through(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One table of several chunks' tables."""
    points_at = {"row": "prompt", "goes_on": "ending_row", "state": "state_row", "trajectory": "state_row"}
    before = dict.fromkeys(points_at, 0)
    for part in parts:
        for name in part:
            target = points_at.get(name.partition("_")[2])
            if target is not None:
                key = name.partition("_")[2]
                part[name] = np.where(part[name] >= 0, part[name] + before[key], -1)
        for key, target in points_at.items():
            before[key] += len(part[target])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load_or_record(path: Path | None, config: EnvConfig, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """`record`, kept in the file ``path`` if there is one.

    Raises:
        ValueError: the file holds other prompts, or was made with other settings or weights.
    """
    settings = {name: getattr(config, name) for name in ("num_inference_steps", "guidance_scale", "finish_steps")}
    settings |= {"weights": fingerprint(config.model)}
    if path is None or not path.exists():
        table = record(config, rows)
        if path is not None:
            save_arrays(path, table | {MADE_WITH: np.asarray(json.dumps(settings))}, compress=False)
        return table
    with np.load(path) as archive:
        table = dict(archive)
    held = json.loads(str(table.pop(MADE_WITH, "{}")))  # earlier releases kept none
    held.setdefault("num_inference_steps", int(table["state_step_index"].max()))
    if changed := [f"{name} {value}, not {settings[name]}" for name, value in held.items() if value != settings[name]]:
        raise ValueError(f"{path} was made with {'; '.join(changed)}: remove it to make it anew")
    if table["prompt"].tolist() != [row["prompt"] for row in rows]:
        raise ValueError(f"{path} holds the record of {len(table['prompt'])} other prompts: remove it to make it anew")
    return table


# --------------------------------------------------------------------------- what the verifier says of it


def foretell(
    scorer: LatentScorer,
    table: dict[str, np.ndarray],
    latents: str,
    rows: np.ndarray,
    timesteps: np.ndarray,
    evaluations: np.ndarray,
) -> np.ndarray:
    """Logits (N,) of ``table[latents]`` (N, C, h, w), whose prompts are ``rows``, after ``evaluations`` more."""
    scores = []
    for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 256)):
        prompts = [str(prompt) for prompt in table["prompt"][rows[part]]]
        asked = torch.from_numpy(evaluations[part])[:, None]
        x0 = torch.from_numpy(table[latents][part]).float()
        scores.append(scorer.score_latents(x0, prompts, torch.from_numpy(timesteps[part]), asked)[:, 0].cpu().numpy())
    return np.concatenate(scores)


def foretold_of_states(scorer: LatentScorer, table: dict[str, np.ndarray], evaluations: np.ndarray) -> np.ndarray:
    """Logits (N,) of all states, with as many ``evaluations`` (N,) to come."""
    return foretell(scorer, table, "state_x0", table["state_row"], table["state_timestep"], evaluations)


def paid_for_endings(scorer: LatentScorer, table: dict[str, np.ndarray]) -> np.ndarray:
    """Logits (N,) of all endings, as the finished pictures that they are."""
    finished, spared = np.zeros(len(table["ending_row"]), np.int64), evaluations_spared(table)
    return foretell(scorer, table, "ending_final", table["ending_row"], finished, spared)


def probability(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def groups(scorer: LatentScorer, table: dict[str, np.ndarray], categories: Sequence[str]) -> list[Group]:
    """All endings by the step they were stopped after, by refinements, and by the prompts' ``categories``."""
    state, length = table["ending_state"], int(table["state_step_index"].max())
    ends = np.zeros(len(state), np.int64)  # of endings that were not stopped, the state that led there
    ends[table["state_goes_on"]] = np.arange(len(table["state_row"]))  # the last to be written is the last step's
    source = np.where(state >= 0, state, ends)
    step = np.where(state >= 0, table["state_step_index"][source], length)
    refines = table["state_refines"][source]
    paid = probability(paid_for_endings(scorer, table))
    foretold = np.full(len(state), np.nan)
    asked = np.zeros(len(table["state_row"]), np.int64)
    asked[state[state >= 0]] = table["ending_evaluations"][state >= 0]
    foretold[state >= 0] = probability(foretold_of_states(scorer, table, asked))[state[state >= 0]]
    satisfied, kind = table["ending_satisfied"], np.asarray(categories)[table["ending_row"]]
    plain = refines == 0
    chosen = {f"stopped after {k}": plain & (step == k) for k in STOPS if k < length}
    chosen |= {"ran to the end": plain & (step == length)}
    chosen |= {f"after {r} refinement{'s' * (r > 1)}": refines == r for r in (1, 2, 3)}
    chosen |= {category: kind == category for category in CATEGORIES}
    return [
        Group(name, int(rows.sum()), float(satisfied[rows].mean()), _mean(foretold[rows]), float(paid[rows].mean()))
        for name, rows in chosen.items()
        if rows.any()
    ]


def _mean(values: np.ndarray) -> float | None:
    """The mean of what is not NaN; None if there is nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def reliability(probabilities: np.ndarray, satisfied: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean probability, share satisfied and number of pictures in each of ten equal parts of [0, 1]."""
    which = np.minimum((probabilities * 10).astype(int), 9)
    return [
        (float(probabilities[which == b].mean()), float(satisfied[which == b].mean()), int((which == b).sum()))
        for b in range(10)
        if (which == b).any()
    ]


def calibration_table(rows: Sequence[Group]) -> str:
    """The groups in words."""
    lines = [f"{'pictures':<22}{'n':>7}{'satisfied':>11}{'foretold':>10}{'paid':>8}"]
    for row in rows:
        foretold = "" if row.foretold is None else f"{row.foretold:.3f}"
        verdict = "pass" if row.passed else "FAIL"
        lines.append(f"{row.name:<22}{row.n:>7}{row.satisfied:>11.3f}{foretold:>10}{row.paid:>8.3f}  {verdict}")
    return "\n".join(lines)
