"""The vocabulary that every other module shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np


class Action(IntEnum):
    """What the policy may do at each decision."""

    CONTINUE = 0  # one denoiser evaluation, one solver step
    STOP = 1  # finish the image from where the lane is
    REFINE = 2  # re-denoise the regions that came out badly


ACTIONS = tuple(action.name.lower() for action in Action)
SampleKey = tuple[str, int]  # (prompt, seed): one picture of a benchmark, by any method


@dataclass
class Generated:
    """A finished picture and what it cost."""

    prompt: str
    seed: int
    picture: np.ndarray  # uint8 (H, W, 3)
    actions: list[int] = field(default_factory=list)  # carried out, in order; empty where no decisions are taken
    nfe: int = 0
    forward_passes: int = 0
    net_flops: float = 0.0
    seconds: float = 0.0  # wall-clock, shared equally by the lanes of a batch
    reward: float = 0.0  # rewards of all decisions, summed; 0 where no decisions are taken
    note: str = ""  # what its method has to say of it
    price: float | None = None  # of one evaluation, where it was asked for at one
    quality: float = 0.0  # of the picture, as the environment's reward weighs it; 0 where nobody decided
    reward_score: float = 0.0  # the reward model's, of the picture; 0 where nobody looked
    fault: bool = False  # the model's numbers stopped being finite: the picture is its last finite prediction
    previews: list[np.ndarray] = field(default_factory=list)  # uint8 (H, W, 3), one before each decision, if asked for
    masks: list[np.ndarray] = field(default_factory=list)  # float32 (h, w), one a refinement, if asked for


@dataclass
class ResultRow:
    """One image of an evaluation, as written to ``rows.jsonl`` (one JSON object a line)."""

    method: str  # e.g. "ddim-50" or the agent's name
    prompt: str
    seed: int
    category: str
    backbone: str  # model id or path, with revision
    solver: str
    policy: str  # hash of the agent's weights, or the method's name
    dtype: str
    code_version: str
    actions: list[int] = field(default_factory=list)  # decisions taken, in order
    nfe: int = 0  # denoiser evaluations (a guidance pair is one)
    forward_passes: int = 0  # network passes (a guidance pair is two)
    net_flops: float = 0.0  # everything spent on this lane, floating-point operations
    seconds: float = 0.0  # wall-clock of this image's batch divided by the batch size
    scores: dict[str, float] = field(default_factory=dict)  # per metric
    reason: str = ""  # the method's note, and the words of metrics: why the checker or GenEval is not content
    image: str = ""  # path of the picture relative to the run folder, "" if not kept
    peak_memory: int = 0  # bytes: CUDA's peak allocation while the batch was made, else the process' peak; 0: unknown
    negative_prompt: str | None = None  # what guidance led away from; left out of the file where there was none
    price: float | None = None  # of an evaluation, that a policy acted by; left out likewise
    timed_seconds: float | None = None  # by the run's timings, see `Timings.onto`; never part of the file

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same measurement."""
        return (
            self.method,
            self.prompt,
            self.seed,
            self.backbone,
            self.solver,
            self.policy,
            self.dtype,
            self.code_version,
            *(() if self.negative_prompt is None else (self.negative_prompt,)),
        )
