"""Lanes that replay recorded attempts in place of a denoiser: thousands of decisions a second.

What a policy sees of a lane, what stopping there would give and what going on would give were recorded
(``addiff world train attempts``). A refinement leads to another attempt at the same picture, whichever of them was
refined when the one before ended as this one would (satisfied, or not); of a picture that has none, to one of another.
How early a lane was left does not enter, so that this is a model of the environment, not the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logit

from addiff_env.env.config import EnvConfig
from addiff_env.env.prices import position
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.perception.features import QUALITY, timestep_embedding
from addiff_env.storage.files import read_json
from addiff_env.storage.inputs import fingerprint
from addiff_env.tiny.measures.optimal_stopping import REFINE_K, Walks
from addiff_env.types import Action

ENVIRONMENT = (  # settings that decide what was recorded
    *("solver", "eta", "num_inference_steps", "guidance_scale", "height", "width", "warmup_steps", "finish_steps"),
    *("refine_k", "refine_mode", "mask", "mask_threshold", "blur_sigma", "renoise", "negative_prompt"),
)
EDGE = 1e-9  # recorded probabilities are this far from 0 and 1


class Successors:
    """Which attempts may follow one that is refined, by the attempt's number.

    Raises:
        ValueError: nothing was refined.
    """

    def __init__(self, walks: Walks) -> None:
        again = np.flatnonzero(walks.source >= 0)
        if len(again) == 0:
            raise ValueError(f"none of {len(walks)} recorded attempts was refined: record more")
        after = {int(number): bool(walks.ended[walks.source[number]]) for number in again}  # how the one before ended
        own: dict[tuple[int, bool], list[int]] = {}
        for number, end in after.items():
            own.setdefault((int(walks.row[number]), end), []).append(number)
        first = {end: [n for n in after if after[n] == end and walks.refines[n] == 1] for end in (False, True)}
        rows = []
        for number, (row, ended) in enumerate(zip(walks.row.tolist(), walks.ended.tolist(), strict=True)):
            others = [other for other in own.get((row, ended), []) if other != number]
            rows.append(np.array(others or first[ended] or again))
        self.count = np.array([len(row) for row in rows])
        self._first, self._flat = np.cumsum(self.count) - self.count, np.concatenate(rows)

    def draw(self, attempts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One that follows each of ``attempts`` (N,)."""
        return self._flat[self._first[attempts] + rng.integers(self.count[attempts])]


class RecordedLanes:
    """``num_envs`` lanes in the attempts of ``walks``, with the settings, budget and observation of ``env``.

    Attributes:
        plain: the attempts that are no refinements, one of each picture.
        attempt, at, nfe: (B,) where each lane stands: its attempt, the steps done, the evaluations spent.
        price: (B,) of an evaluation; the caller sets it.

    Raises:
        ValueError: attempts without refinements, or a setting of the environment that they do not show.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, walks: Walks, num_envs: int) -> None:
        self.env, self.config, self.walks, self.num_envs = env, env.config, walks, num_envs
        self._check()
        self.successors, self.plain = Successors(walks), np.flatnonzero(walks.source < 0)
        self._begins = (~np.isnan(walks.stop)).argmax(1)  # the step of an attempt's first decision
        self._stop, self._go_on = (logit(p.clip(EDGE, 1 - EDGE)) for p in (walks.stop, walks.go_on))
        self._timesteps = timestep_embedding(torch.as_tensor(env.denoiser.timesteps)).float().cpu().numpy()
        self.attempt, self.at, self.nfe = (np.zeros(num_envs, np.int64) for _ in range(3))
        self.price = np.zeros(num_envs)
        self.before = np.zeros(num_envs)  # the score of the look before
        self.begin(np.arange(num_envs), np.resize(self.plain, num_envs))

    def _check(self) -> None:
        unit = self.env.reward_config.efficiency_unit
        shown: dict[str, tuple[Any, Any]] = {
            "max_refines": (self.config.max_refines, None),
            "observe_every": (self.config.observe_every, 1),
            "reward.efficiency_unit": (unit, "nfe"),
        }
        for name, (value, only) in shown.items():
            if value != only:
                raise ValueError(f"{name}={value}: recorded attempts take {only} alone")

    def begin(self, lanes: np.ndarray, attempts: np.ndarray) -> None:
        """Put ``lanes`` (L,) at the first decision of plain ``attempts`` (L,)."""
        self.attempt[lanes] = attempts
        self.at[lanes] = self.nfe[lanes] = self.walks.first
        self.before[lanes] = self.score[lanes]

    @property
    def score(self) -> np.ndarray:
        """The verifier's logit (B,) of stopping."""
        return np.asarray(self._stop[self.attempt, self.at])

    @property
    def outlook(self) -> np.ndarray:
        """That (B,) of going on to the end of the schedule."""
        return np.asarray(self._go_on[self.attempt, self.at])

    def act(self, actions: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Carry out ``actions`` (B,); ended lanes stay where they are, and are to `begin` anew.

        Returns:
            What was carried out (B,), whether the pictures satisfy (B,) bool, and which lanes ended (B,) bool.
        """
        walks, finish, self.before = self.walks, self.config.finish_steps, self.score
        allowed = self.action_masks()[:, Action.REFINE]
        taken = np.where((actions == Action.REFINE) & ~allowed, Action.STOP, actions)
        stopped, refined = taken == Action.STOP, np.flatnonzero(taken == Action.REFINE)
        ended = (taken == Action.CONTINUE) & (self.at == walks.steps - 1)
        satisfied = ended & walks.ended[self.attempt]
        self.at[(taken == Action.CONTINUE) & ~ended] += 1
        self.nfe += np.select([stopped, taken == Action.REFINE], [finish, REFINE_K], 1)
        self.attempt[refined] = self.successors.draw(self.attempt[refined], rng)
        self.at[refined] = self._begins[self.attempt[refined]]
        spent = ~stopped & ~ended & (self.nfe + 1 + finish > self.config.nfe_budget)
        self.nfe[spent] += finish
        finished = stopped | spent
        satisfied |= finished & (walks.stopped[self.attempt, self.at] == 1)
        return taken, satisfied, finished | ended

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool."""
        masks = np.ones((self.num_envs, len(Action)), bool)
        masks[:, Action.REFINE] = self.nfe + REFINE_K + self.config.finish_steps <= self.config.nfe_budget
        return masks

    def observation(self, blur: np.ndarray | float = 0.0) -> np.ndarray:
        """The flat observation (B, width), 0 where nothing was recorded (the prompt's features, attention's entropy).

        ``blur`` (3, B) is added to score, its change and outlook.
        """
        added = np.broadcast_to(blur, (3, self.num_envs))
        known = {
            "reward_score": self.score + added[0],
            "reward_delta": self.score - self.before + added[1],
            "dino_similarity": np.ones(self.num_envs),
            "step_ratio": self.at / self.walks.steps,
            "nfe_ratio": np.minimum(1.0, self.nfe / self.config.nfe_budget),
        }
        parts = {
            "timestep": self._timesteps[self.at],
            "outlook": (self.outlook + added[2])[:, None],
            "quality": np.stack([known.get(name, np.zeros(self.num_envs)) for name in QUALITY], 1),
        }
        if self.config.price_range is not None:
            parts["price"] = position(self.config.price_range, self.price)[:, None]
        blank = ((name, np.zeros((self.num_envs, width))) for name, width in self.env.parts.items())
        return np.concatenate([parts.get(name, nothing) for name, nothing in blank], 1).astype(np.float32)


def environment_of(config: EnvConfig) -> dict[str, Any]:
    """The settings that a record is made with, and the contents of model and verifier."""
    weights = {name: fingerprint(getattr(config, name)) for name in ("model", "scorer")}
    return {name: getattr(config, name) for name in ENVIRONMENT} | weights


def load_walks(folder: Path, config: EnvConfig) -> tuple[Walks, np.ndarray]:
    """All attempts that ``addiff world train attempts`` recorded in ``folder``, rows numbered through, and the prompts.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they were recorded with other settings or weights than ``config``'s; the message names them.
    """
    chunks: list[Walks] = []
    prompts: list[np.ndarray] = []
    paths = sorted(folder.glob("chunk_*.npz"))
    if not paths:
        raise FileNotFoundError(f"no attempts in {folder}; record them with: addiff world train attempts")
    recorded, ours = read_json(folder / "config.json").get("environment"), environment_of(config)
    if recorded is None:
        raise ValueError(f"{folder} holds no attempts, but what another recipe made")
    if changed := [
        f"{name} {recorded.get(name)}, not {value}" for name, value in ours.items() if recorded.get(name) != value
    ]:
        raise ValueError(f"the attempts in {folder} were recorded with {'; '.join(changed)}")
    for path in paths:
        with np.load(path) as archive:
            held = {name: archive[name] for name in archive.files}
        prompts.append(held.pop("prompt"))
        del held["seed"]
        chunks.append(Walks(**{name: value if value.ndim else value.item() for name, value in held.items()}))
    return Walks.joined(chunks, [len(part) for part in prompts]), np.concatenate(prompts)
