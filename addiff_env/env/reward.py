"""The reward, as pure functions: r = shaping + instability + efficiency + terminal + fault.

Shaping is potential-based (Ng, Harada & Russell 1999), so it guides learning and pays nothing for mere
continuing; instability is a penalty only; every further evaluation costs.

Three things may move while a policy is trained, each between rollouts and never inside one: the scales that turn
scores into qualities (`RunningScores`), the price of an evaluation (`DualVariable`), and, fixed per (prompt, seed),
the baseline that the terminal quality is counted from (`relative_to_baseline`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import numpy as np

from addiff_env.env.validation import above, at_least, at_most, check_fields, one_of, shown

COMPONENTS = ("shaping", "instability", "efficiency", "terminal", "fault")
COLUMNS = (*COMPONENTS, "total")  # of `RewardComponents`
EFFICIENCY_UNITS = ("nfe", "step_flops")
Weight = Annotated[float, at_least(0)]  # a negative one would reward what it is meant to cost
Spread = Annotated[float, above(0)]


@dataclass(frozen=True)
class RewardConfig:
    """Weights and fixed scales of the reward.

    A score s enters as its quality sigmoid((s - mean) / std) in (0, 1), so that weights compare
    between scorers. For a verifier that predicts a logit, mean 0 and std 1 give its probability.

    Raises:
        ValueError: a value that is not a finite number, a spread that is not positive, a gamma outside (0, 1], an
            unknown unit, or a negative weight, which would reward what it is meant to cost; the message shows it.
    """

    clip_weight: Weight = 0.2  # of the CLIP score, in the potential and in the terminal quality
    reward_weight: Weight = 0.8  # of the reward model's score, likewise
    clip_mean: float = 0.25  # CLIP cosine that counts as quality 0.5
    clip_std: Spread = 0.05  # spread of the CLIP cosine
    reward_mean: float | None = None  # reward-model score that counts as quality 0.5; None: the scorer's own mean
    reward_std: Spread | None = None  # spread of the reward model's score; None: the scorer's own
    shaping: Weight = 1.0  # weight of gamma * Phi(s') - Phi(s)
    gamma: Annotated[float, above(0), at_most(1)] = 1.0  # discount that shaping assumes; must equal the learner's
    instability: Weight = 0.02  # weight of the penalty 1 - DINO similarity of successive previews
    efficiency: Weight = 0.01  # c_nfe: cost of one efficiency_unit
    # What efficiency is charged for: "nfe", denoiser evaluations; "step_flops", everything that is spent on the lane
    # (evaluations, looks, the final decode) in units of one denoiser step's FLOPs.
    efficiency_unit: Annotated[str, one_of(*EFFICIENCY_UNITS)] = "nfe"
    terminal: Weight = 1.0  # weight of the final image's quality
    fault: Weight = 1.0  # penalty of a lane whose numbers stopped being finite; it gets no terminal quality

    def __post_init__(self) -> None:
        check_fields(self, "reward setting {!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> RewardConfig:
        """Build from a mapping of weights; what is left out keeps its default.

        Raises:
            ValueError: no mapping, an unknown name, or a value that the class refuses.
        """
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"reward must be a mapping of its settings, got {shown(values)}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown reward setting {name!r}; known: {', '.join(known)}")
        return cls(**values)

    def check_reads(self, reads: Collection[str]) -> None:
        """Refuse to pay for what is not looked at; ``reads`` names parts of a look, as the environment's setting does.

        Raises:
            ValueError: a part that is left out has a weight; the message shows both.
        """
        for part, weight in (("clip_image", "clip_weight"), ("reward", "reward_weight"), ("dino", "instability")):
            if part not in reads and (value := getattr(self, weight)):
                raise ValueError(f"reads leaves out {part!r}, but the reward has {weight} {value}: set it to 0")

    def for_scorer(self, mean: float, std: float) -> RewardConfig:
        """The same with a scorer's own scale where none was set: scorers differ, from cosines to ratings up to 10."""
        chosen = (
            mean if self.reward_mean is None else self.reward_mean,
            std if self.reward_std is None else self.reward_std,
        )
        return replace(self, reward_mean=chosen[0], reward_std=chosen[1])

    @property
    def reward_scale(self) -> tuple[float, float]:
        """Mean and spread of the reward model's score.

        Raises:
            ValueError: they are left to the scorer, and it was not named yet.
        """
        if self.reward_mean is None or self.reward_std is None:
            raise ValueError("reward_mean and reward_std are the scorer's own: call for_scorer first")
        return self.reward_mean, self.reward_std


class RewardComponents(np.ndarray):
    """Rewards (..., 6) float64, whose columns are `COLUMNS` and have names: ``components["terminal"]`` (...).

    An array and not a dictionary, because Gymnasium's wrappers and TorchRL take arrays only in ``info``.
    """

    @classmethod
    def stack(cls, parts: Mapping[str, np.ndarray]) -> RewardComponents:
        """The components (B,) each of `step_reward` in one array (B, 6)."""
        return np.stack([parts[name] for name in COLUMNS], axis=-1).view(cls)

    def __getitem__(self, key: Any) -> Any:
        """A column by its name, or whatever an array's index gives."""
        if isinstance(key, str):
            return np.asarray(self)[..., COLUMNS.index(key)]
        return super().__getitem__(key)


def quality(clip_score: np.ndarray, reward_score: np.ndarray, config: RewardConfig) -> np.ndarray:
    """Weighted quality (B,) of pictures from their scores (B,); the potential Phi of a state."""
    clip = _sigmoid((clip_score - config.clip_mean) / config.clip_std)
    mean, std = config.reward_scale
    reward = _sigmoid((reward_score - mean) / std)
    return config.clip_weight * clip + config.reward_weight * reward


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def step_reward(
    config: RewardConfig,
    phi: np.ndarray,
    next_phi: np.ndarray,
    similarity: np.ndarray,
    cost: np.ndarray,
    terminated: np.ndarray,
    fault: np.ndarray | None = None,
    price: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Components and ``total`` of one transition of B lanes, each (B,) float64.

    ``phi`` and ``next_phi`` are the qualities of the preview before and of the preview (or the final
    image) after; ``similarity`` the DINO cosine between the two; ``cost`` what was just paid, in
    ``efficiency_unit``, each at its lane's ``price`` (B,) (None: ``config.efficiency``).
    The potential of a terminal state is 0, as the theorem requires. ``fault`` (B,) bool marks lanes that broke down.
    """
    broken = np.zeros_like(terminated) if fault is None else fault
    after = np.where(terminated, 0.0, next_phi)
    parts = {
        "shaping": config.shaping * (config.gamma * after - phi),
        "instability": -config.instability * (1 - similarity),
        "efficiency": -(config.efficiency if price is None else price) * cost.astype(np.float64),
        "terminal": np.where(terminated & ~broken, config.terminal * next_phi, 0.0),
        "fault": np.where(broken, -config.fault, 0.0),
    }
    return parts | {"total": sum(parts.values())}


def relative_to_baseline(
    config: RewardConfig, parts: dict[str, np.ndarray], baseline: np.ndarray, terminated: np.ndarray
) -> dict[str, np.ndarray]:
    """``parts`` of `step_reward` with the terminal quality counted from ``baseline`` (B,), as a new mapping.

    The baseline is a constant of the lane's prompt and seed and is taken off however the lane ended, also by a fault:
    without a discount every policy's return moves by the same amount, so the best policy stays the best, and a prompt's
    difficulty no longer looks like the policy's merit. With gamma < 1 it would be taken off gamma^t times, at the end
    of an episode of t decisions: less for the policy that ends later, which would pay for mere continuing.

    Raises:
        ValueError: a discount (gamma other than 1), or a terminated lane has no finite baseline.
    """
    check_undiscounted(config)
    if not np.isfinite(baseline[terminated]).all():
        raise ValueError(f"baselines of terminated lanes must be finite, got {baseline[terminated]}")
    less = np.where(terminated, config.terminal * np.nan_to_num(baseline), 0.0)
    return parts | {"terminal": parts["terminal"] - less, "total": parts["total"] - less}


def check_undiscounted(config: RewardConfig) -> None:
    """Refuse what `relative_to_baseline` cannot do.

    Raises:
        ValueError: gamma is not 1.
    """
    if config.gamma != 1:
        raise ValueError(
            f"baselines need gamma 1, got {config.gamma!r}: taken off at the end and discounted, they would pay for "
            "longer episodes; set the discount to 1 or reward.baselines to null"
        )


@dataclass
class RunningScale:
    """Mean and spread of everything seen, without keeping it (Welford 1962; batches as in Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, values: np.ndarray) -> None:
        """Take in ``values`` (n,); those that are not finite are left out."""
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values) == 0:
            return
        total, distance = self.count + len(values), float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + distance**2 * self.count * len(values) / total
        self.mean += distance * len(values) / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before two values were seen."""
        return float(np.sqrt(self.squares / self.count)) if self.count > 1 else 0.0


class RunningScores:
    """Scales of both scores learned from what a policy's pictures scored, instead of the configured ones.

    Between two calls of `apply` the scales stand still, so within a rollout shaping telescopes exactly. Where an
    episode spans a change, the potential of one state has two values and a remainder is left, which shrinks as
    1 / count (Devlin & Kudenko 2012 on potentials that move).
    """

    least_count = 64  # scores seen before their spread is trusted
    least_std = 1e-3  # a score that hardly varies is not blown up

    def __init__(self) -> None:
        self.clip, self.reward = RunningScale(), RunningScale()

    def update(self, clip_score: np.ndarray, reward_score: np.ndarray) -> None:
        """Take in the scores (n,) of pictures."""
        self.clip.update(clip_score)
        self.reward.update(reward_score)

    def apply(self, config: RewardConfig) -> RewardConfig:
        """``config`` with the scales learned so far; its own while too little was seen."""
        for name, scale in (("clip", self.clip), ("reward", self.reward)):
            if scale.count >= self.least_count:
                std = max(scale.std, self.least_std)
                learned: dict[str, Any] = {f"{name}_mean": scale.mean, f"{name}_std": std}
                config = replace(config, **learned)
        return config

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"clip": dict(vars(self.clip)), "reward": dict(vars(self.reward))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.clip, self.reward = RunningScale(**state["clip"]), RunningScale(**state["reward"])


@dataclass
class DualVariable:
    """The price of an evaluation that makes the mean NFE meet a target: Lagrange multiplier of a constrained MDP.

    Maximising quality subject to E[NFE] <= target is relaxed to quality - c * NFE (Altman 1999), and c follows the
    violated constraint upwards on a slower clock than the policy (Tessler, Mankowitz & Mannor 2019, eq. 9). The ascent
    is done on log c, c <- c * exp(rate * (NFE / target - 1)): c stays positive and ``rate`` has no unit.

    Raises:
        ValueError: a target, rate or price that is not positive, or a price beyond its bounds.
    """

    target_nfe: float  # mean denoiser evaluations per picture
    value: float = 0.01  # c, reward per evaluation
    rate: float = 0.3  # relative change of c per update while the mean NFE is twice the target
    least: float = 1e-6
    most: float = 1.0

    def __post_init__(self) -> None:
        for name in ("target_nfe", "value", "rate", "least", "most"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"the dual variable's {name} must be a positive number, got {getattr(self, name)!r}")
        if not self.least <= self.value <= self.most:
            raise ValueError(
                f"the dual variable's value must lie in [{self.least:g}, {self.most:g}], got {self.value!r}"
            )

    @property
    def at_bound(self) -> bool:
        """Whether c has come to where it can only turn back."""
        return not self.least < self.value < self.most

    def update(self, mean_nfe: float) -> float:
        """Move c once, by the mean NFE of the episodes just ended; returns it."""
        step = self.rate * (mean_nfe / self.target_nfe - 1)
        self.value = float(np.clip(self.value * np.exp(step), self.least, self.most))
        return self.value
