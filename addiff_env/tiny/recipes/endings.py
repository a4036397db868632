"""Record how the diffusion model's pictures come about and how they end: what the verifier learns from.

``addiff world train endings`` denoises training prompts with the environment's own dynamics. Every
trajectory is recorded step by step; some of its states are stopped at, some refined, and every picture that comes out
of it is judged by the exact checker. ``<work>/endings/chunk_*.npz`` hold the record (see `Record`); a killed run
continues at the first missing chunk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import addiff_env
from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env.config import EnvConfig
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.refine import make_masks, refine
from addiff_env.env.state import LaneState
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompt_splits import sample_train_prompt
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.recipes.generate import hold_configuration, missing_chunks, save_arrays, unet_fingerprint

FIRST_SEED = 700_000_000  # far from the evaluation splits' seeds and from those of `generate`
MASKS = ("neglected_token", "full", "low_attention")
MASK_SHARES = (0.5, 0.25, 0.25)
REFINE_SHARES = (0.35, 0.75)  # of the trajectories that end satisfied, and of those that fail, that are refined
MAX_REFINES = 3
GRIDS = {10: 0.6, 8: 0.2, 7: 0.2}  # num_inference_steps and the share of chunks recorded on each
FIRST_DECISION = {10: 3, 8: 2, 7: 2}  # the step after which a policy first decides
FINISHES = {10: (0.05, 0.7, 0.2, 0.05), 8: (0.05, 0.45, 0.45, 0.05), 7: (0.05, 0.45, 0.45, 0.05)}  # of 1, 2, 3, 4 steps
STATE = ("latents", "x0", "maps")  # of a lane, what a refinement starts from


class FreeLanes:
    """Lanes without a policy, looks or a budget: a lane may be stopped, and go on from there all the same.

    Args:
        config: whose model, grid, guidance, finish and refinements apply.
        num_envs: how many lanes.
    """

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        self.config, self.num_envs = config, num_envs
        self.mask_kinds = [config.mask] * num_envs
        self.denoiser = Denoiser.load(config)
        self.backbone, self.schedule = self.denoiser.backbone, self.denoiser.schedule
        self.state = LaneState.empty(num_envs, self.backbone, self.denoiser.latent_shape)

    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Put every lane at the beginning of the schedule."""
        self.denoiser.start(self.state, np.arange(self.num_envs), prompts, seeds)

    def step(self, lanes: np.ndarray) -> None:
        """One solver step of ``lanes``."""
        self.denoiser.step(self.state, lanes)

    def stopped(self, lanes: np.ndarray, finish_steps: int | None = None) -> torch.Tensor:
        """Final latents (L, C, h, w) that stopping ``lanes`` here would give; the lanes stay as they are."""
        before = self.state.state_dict()
        self.denoiser.finish(self.state, lanes, finish_steps)
        latents = self.latents(lanes)
        self.state.load_state_dict(before)
        return latents

    def latents(self, lanes: np.ndarray) -> torch.Tensor:
        """The present latents (L, C, h, w) of ``lanes``, copied."""
        return self.state.latents[self.state.index(lanes)].clone()

    def refine(self, lanes: np.ndarray, step_index: np.ndarray, state: dict[str, torch.Tensor]) -> None:
        """Take ``lanes`` back to a ``state`` of theirs at ``step_index`` (L,), and refine them there."""
        index = self.state.index(lanes)
        for name, value in state.items():
            getattr(self.state, name)[index] = value
        self.state.step_index[lanes], self.state.done[lanes] = step_index, False
        refine(self.denoiser, self.state, lanes, self._make_masks(lanes))

    def _make_masks(self, lanes: np.ndarray) -> torch.Tensor:
        """Each lane's mask (L, 1, h, w) of its own kind."""
        masks = torch.empty_like(self.state.refine_masks[: len(lanes)])
        kinds = np.array(self.mask_kinds)[lanes]
        for kind in set(kinds):
            rows = np.flatnonzero(kinds == kind)
            masks[self.state.index(rows)] = make_masks(self.denoiser, self.state, lanes[rows], kind)
        return masks


@dataclass
class Record:
    """What happened to a chunk of prompts, as two tables.

    A row of ``states`` is a lane after a step: ``row`` of its prompt, ``trajectory`` in the chunk, ``step_index``, the
    ``timestep`` it stands at (0: the end), ``refines`` so far, the ``mask`` of the latest (its number among the
    recorder's, -1) and the step of the trajectory before at which that one was left (``left_at``, -1), ``nfe``, ``x0``
    and ``latents`` (C, h, w), and the ending that going on leads to (``goes_on``). A row of ``endings`` is a picture:
    ``row``, the ``state`` it was stopped in (-1: it ran to the end), the ``evaluations`` that followed, its ``final``
    latents (C, h, w), the checker's ``satisfied`` and ``score``, and the ``objects`` (6, 5).
    """

    states: list[dict[str, Any]] = field(default_factory=list)
    endings: list[dict[str, Any]] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """Both tables by column, ``state_<name>`` and ``ending_<name>``; latents in half precision."""
        columns = {}
        for table, rows in (("state", self.states), ("ending", self.endings)):
            for name in rows[0]:
                values = np.stack([row[name] for row in rows])
                columns[f"{table}_{name}"] = values.astype(np.float16) if values.dtype.kind == "f" else values
        return columns


class Recorder:
    """Runs one chunk's trajectories and writes them down.

    Args:
        lanes: as many as prompts.
        captions, seeds: the prompts and their seeds.
        rng: what is stopped, refined and how.
        stops: how many states of a trajectory are stopped at; 0 means all that a policy may stop at.
        finishes: shares of stops that are finished by 1, 2, ... steps.
        refined: of the trajectories that end satisfied and of those that fail, the shares that are refined.
        most_refines: refinements in a row; None: `MAX_REFINES`.
        masks: kinds of mask and their shares of the refinements; None: `MASKS`.
    """

    def __init__(
        self,
        lanes: FreeLanes,
        captions: Sequence[str],
        seeds: Sequence[int],
        rng: np.random.Generator,
        stops: int,
        finishes: Sequence[float],
        refined: tuple[float, float] = REFINE_SHARES,
        most_refines: int | None = None,
        masks: Mapping[str, float] | None = None,
    ) -> None:
        self.lanes, self.captions, self.rng, self.stops, self.finishes = lanes, captions, rng, stops, finishes
        self.refined = refined
        self.most_refines = MAX_REFINES if most_refines is None else most_refines
        self.masks = dict(zip(MASKS, MASK_SHARES, strict=True)) if masks is None else dict(masks)
        self.record = Record()
        self.length, first = lanes.config.num_inference_steps, lanes.config.warmup_steps
        self.timesteps = np.append(lanes.schedule.timesteps.cpu().numpy(), 0)
        self.decisions = np.arange(first, self.length)  # steps after which a policy decides
        self.trajectories = 0
        self.mask, self.left_at = np.full(len(captions), -1), np.full(len(captions), -1)
        lanes.start(captions, seeds)

    def run(self) -> Record:
        """All trajectories: the plain one of every prompt, then refinements in a row of some."""
        running = np.arange(len(self.captions))
        ends = self._to_the_end(running)
        for _ in range(self.most_refines):
            satisfied = np.array([self.record.endings[ending]["satisfied"] for ending in ends])
            running = running[self.rng.random(len(running)) < np.where(satisfied, *self.refined)]
            if len(running) == 0:
                break
            self._refine(running)
            ends = self._to_the_end(running)
        return self.record

    def _to_the_end(self, running: np.ndarray) -> np.ndarray:
        """Step ``running`` lanes to the end of the schedule; returns which ending each reached."""
        self.kept: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
        reached = self.lanes.state.step_index[running[0]]
        decisions = self.decisions[self.decisions >= reached]
        self.leave_at = self.rng.choice(decisions, len(self.captions))  # where a lane will be refined, if it is
        stop_at = self._draw_stops()
        number, first_state = self.trajectories, len(self.record.states)
        if reached:  # what a refinement left is a state, too
            self._observe(running, stop_at, number)
        while not self.lanes.state.done[running].all():
            self.lanes.step(running)
            self._observe(running, stop_at, number)
        nowhere, none = np.full(len(running), -1), np.zeros(len(running), int)
        ends = self._judge(running, self.lanes.latents(running), nowhere, none)
        by_lane = dict(zip(running, ends, strict=True))
        for state in self.record.states[first_state:]:
            state["goes_on"] = by_lane[state["row"]]
        self.trajectories += len(self.captions)
        return ends

    def _draw_stops(self) -> np.ndarray:
        """By how many steps a lane is finished after each of its steps, (B, steps + 1); 0: it is not stopped."""
        batch = len(self.captions)
        number = self.stops or len(self.decisions)
        chosen = self.rng.random((batch, len(self.decisions))).argsort(1).argsort(1) < number
        finishes = self.rng.choice(len(self.finishes), chosen.shape, p=self.finishes) + 1
        drawn = np.zeros((batch, self.length + 1), int)
        drawn[:, self.decisions] = chosen * finishes
        return drawn

    def _observe(self, running: np.ndarray, stop_at: np.ndarray, trajectory: int) -> None:
        """Write down where ``running`` lanes (all at one step) stand, and what stopping some of them gives."""
        at, first = int(self.lanes.state.step_index[running[0]]), len(self.record.states)
        x0, latents = (getattr(self.lanes.state, name).float().cpu().numpy().copy() for name in ("x0", "latents"))
        for lane in running:
            self.record.states.append(
                {
                    "row": lane,
                    "trajectory": trajectory + lane,
                    "step_index": at,
                    "timestep": self.timesteps[at],
                    "refines": self.lanes.state.refines[lane],
                    "mask": self.mask[lane],
                    "left_at": self.left_at[lane],
                    "nfe": self.lanes.state.nfe[lane],
                    "x0": x0[lane],
                    "latents": latents[lane],
                }
            )
            if self.leave_at[lane] == at:
                self.kept[lane] = at, {name: getattr(self.lanes.state, name)[lane].clone() for name in STATE}
        for steps in range(1, len(self.finishes) + 1):
            rows = np.flatnonzero(stop_at[running, at] == steps)
            if len(rows):
                lanes = running[rows]
                self._judge(lanes, self.lanes.stopped(lanes, steps), first + rows, np.full(len(lanes), steps))

    def _judge(
        self, lanes: np.ndarray, latents: torch.Tensor, states: np.ndarray, evaluations: np.ndarray
    ) -> np.ndarray:
        """Decode and judge the final ``latents`` of ``lanes``; returns the endings' numbers (L,)."""
        first = len(self.record.endings)
        pictures = to_uint8(self.lanes.backbone.decode(latents))
        for row, (lane, picture) in enumerate(zip(lanes, pictures, strict=True)):
            result = check_picture(picture, self.captions[lane])
            self.record.endings.append(
                {
                    "row": lane,
                    "state": states[row],
                    "evaluations": evaluations[row],
                    "final": latents[row].float().cpu().numpy(),
                    "satisfied": result.satisfied,
                    "score": float(result.score),
                    "objects": pairs.describe(result.objects),
                }
            )
        return np.arange(first, len(self.record.endings))

    def _refine(self, running: np.ndarray) -> None:
        """Refine ``running`` lanes, each where it was kept and with a mask of its own kind."""
        kinds, shares = list(self.masks), list(self.masks.values())
        self.mask[running] = self.rng.choice(len(kinds), len(running), p=shares)
        self.lanes.mask_kinds = [kinds[kind] for kind in self.mask]
        kept = [self.kept[lane] for lane in running]
        state = {name: torch.stack([held[name] for _, held in kept]) for name in STATE}
        self.left_at[running] = [at for at, _ in kept]
        self.lanes.refine(running, self.left_at[running], state)


def evaluations_spared(table: dict[str, np.ndarray]) -> np.ndarray:
    """How many evaluations of the grid each ending's picture was spared by its stop, (N,); 0: it ran to the end."""
    state, steps = table["ending_state"], int(table["state_step_index"].max())
    left = steps - table["state_step_index"][state].astype(np.int64) - table["ending_evaluations"]
    return np.where(state >= 0, np.maximum(0, left), 0)


def chunk_grid(chunk: int) -> int:
    """The grid that a chunk is recorded on: each its share of `GRIDS`, in turn."""
    pattern = [grid for grid, share in GRIDS.items() for _ in range(round(5 * share))]  # 10, 10, 10, 8, 7
    return pattern[chunk % len(pattern)]


def make_chunk(args: argparse.Namespace, lanes: FreeLanes, chunk: int) -> dict[str, Any]:
    """The record of one chunk's prompts, which, with their seeds, depend on its number only; categories in turn."""
    rng = np.random.default_rng((args.seed, chunk, FIRST_SEED))
    captions = [sample_train_prompt(rng, CATEGORIES[lane % len(CATEGORIES)]).caption for lane in range(args.batch)]
    seeds = [FIRST_SEED + chunk * args.batch + lane for lane in range(args.batch)]
    grid = lanes.config.num_inference_steps
    stops = 0 if chunk % args.dense_every == 0 else args.stops
    record = Recorder(lanes, captions, seeds, rng, stops, FINISHES[grid]).run()
    return {"grid": np.asarray(grid), "prompt": np.asarray(captions), "seed": np.asarray(seeds), **record.arrays()}


def main(argv: Sequence[str] | None = None) -> int:
    """Record what is missing; returns the exit status."""
    args = common.arguments(
        "world train endings", __doc__ or "", argv, number=8_192, batch=64, stops=3, dense_every=4, dtype="auto"
    )
    pairs.needs(args, "pipeline/vae", "pipeline/unet")
    model = {"model": str(args.out / "pipeline"), "device": args.device, "dtype": args.dtype}
    lanes = {}
    for grid, warmup in FIRST_DECISION.items():
        config = EnvConfig(**addiff_env.TINY | model | {"num_inference_steps": grid, "warmup_steps": warmup})
        lanes[grid] = FreeLanes(config, args.batch)
    folder = args.work / "endings"
    settings = {name: getattr(args, name) for name in ("batch", "stops", "dense_every", "seed")}
    hold_configuration(folder, settings | {"unet_sha256": unet_fingerprint(args)})
    started = time.monotonic()
    for chunk, path in missing_chunks(folder, -(-args.number // args.batch)):
        arrays = make_chunk(args, lanes[chunk_grid(chunk)], chunk)
        save_arrays(path, arrays, compress=False)
        rate = arrays["ending_satisfied"].mean()
        print(f"chunk {chunk}  {time.monotonic() - started:.0f} s  satisfied {rate:.3f}", flush=True)
    return 0
