"""Train the verifier: from a clean prediction in latents, does the picture satisfy its prompt after so many more steps?

``addiff world train verifier`` needs `endings`' chunks and writes ``<out>/verifier``. What the recipe
asks is what was tried: every state with the evaluations that the grid had left, and with those that finished a stop.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import minimize

from addiff_env.diffusion.backbones import load_backbone
from addiff_env.perception.scorers import PixelTextReward
from addiff_env.perception.scorers.joint import WEIGHTS
from addiff_env.perception.scorers.latent_text import LatentTextReward
from addiff_env.stats import auc
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.recipes.endings import evaluations_spared
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

OPTIONS: dict[str, Any] = {"steps": 2000, "batch": 128, "lr": 1e-3, "layers": 4, "warm_start": "reward"}
OPTIONS |= {"stem_steps": 300, "dense": 1.0, "dtype": "auto"}  # of the command line
HELD_OUT = 12  # one in so many captions is held out, with all its trajectories
FINISHED_SHARE = 0.25  # of a batch: endings, looked at as finished pictures
STOPPED_SHARE = 0.4  # of a batch: states in which stopping was tried, too; what is left are states of all kinds
EARLY = 4  # evaluations that a stop spared, from which on it is early; there verdicts differ most, and are drawn twice
WRONG_CAPTIONS = 0.05  # of the satisfied endings in a batch; more make finished pictures look worse than they are
WARM_STARTS = ("reward", "verifier", "none")  # exported weights that training starts from
UNASKED = -1.0  # label of a question that was not tried


@dataclass
class Questions:
    """Clean predictions and what came of them: N rows, two questions each."""

    latents: torch.Tensor  # (N, C, h, w) float16
    captions: Sequence[str]
    timesteps: torch.Tensor  # (N,) where the row stands; 0: finished
    evaluations: torch.Tensor  # (N, 2) that led to the verdicts: going on, stopping
    labels: torch.Tensor  # (N, 2) 1 satisfied, 0 not, `UNASKED`
    objects: torch.Tensor  # (N, 6, 5), found where going on led

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: torch.Tensor) -> Questions:
        """The rows of ``index``."""
        captions = [self.captions[i] for i in index.tolist()]
        tensors = (getattr(self, name)[index] for name in ("latents", "timesteps", "evaluations", "labels", "objects"))
        latents, *others = tensors
        return Questions(latents, captions, *others)

    @classmethod
    def join(cls, parts: Sequence[Questions]) -> Questions:
        """One after the other."""
        names = ("latents", "timesteps", "evaluations", "labels", "objects")
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(captions=[caption for part in parts for caption in part.captions], **tensors)


def asked_of_states(chunk: dict[str, np.ndarray]) -> Questions:
    """One chunk's states; the second question is the stop that was tried in each, if any."""
    satisfied, state = chunk["ending_satisfied"].astype(np.float32), chunk["ending_state"]
    goes_on = chunk["state_goes_on"]
    evaluations = np.stack([chunk["grid"] - chunk["state_step_index"], np.zeros(len(goes_on), int)], 1)
    labels = np.stack([satisfied[goes_on], np.full(len(goes_on), UNASKED, np.float32)], 1)
    stops = np.flatnonzero(state >= 0)
    evaluations[state[stops], 1], labels[state[stops], 1] = chunk["ending_evaluations"][stops], satisfied[stops]
    return _questions(
        chunk,
        "state_x0",
        chunk["state_row"],
        chunk["state_timestep"],
        evaluations,
        labels,
        chunk["ending_objects"][goes_on],
    )


def asked_of_endings(chunk: dict[str, np.ndarray]) -> Questions:
    """One chunk's endings, as finished pictures: nothing is to come, but stops were spared some evaluations."""
    number = len(chunk["ending_row"])
    labels = np.stack([chunk["ending_satisfied"].astype(np.float32), np.full(number, UNASKED, np.float32)], 1)
    spared = np.stack([evaluations_spared(chunk), np.zeros(number, int)], 1)
    finished = np.zeros(number, int)
    return _questions(chunk, "ending_final", chunk["ending_row"], finished, spared, labels, chunk["ending_objects"])


def _questions(
    chunk: dict[str, np.ndarray],
    latents: str,
    rows: np.ndarray,
    timesteps: np.ndarray,
    evaluations: np.ndarray,
    labels: np.ndarray,
    objects: np.ndarray,
) -> Questions:
    captions = [str(prompt) for prompt in chunk["prompt"][rows]]
    return Questions(
        torch.from_numpy(chunk[latents]),
        captions,
        torch.from_numpy(np.array(timesteps)),
        torch.from_numpy(evaluations),
        torch.from_numpy(labels),
        torch.from_numpy(objects).float(),
    )


def load_questions(work: Path) -> tuple[Questions, Questions]:
    """States and endings of all complete chunks that `endings` wrote.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted((work / "endings").glob("chunk_*.npz"))
    if not paths:
        place = work / "endings" / "chunk_*.npz"
        raise FileNotFoundError(f"{place}; run: addiff world train endings --work {work}")
    states, endings = [], []
    for path in paths:
        with np.load(path) as archive:
            chunk = {name: archive[name] for name in archive.files if name != "state_latents"}
        states.append(asked_of_states(chunk))
        endings.append(asked_of_endings(chunk))
    return Questions.join(states), Questions.join(endings)


def split(questions: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the rows to train on and of those held out: a caption falls on one side with all its pictures.

    Raises:
        ValueError: one side is empty.
    """
    held = torch.tensor([zlib.crc32(caption.encode()) % HELD_OUT == 0 for caption in questions.captions])
    if held.all() or not held.any():
        number = len(set(questions.captions))
        raise ValueError(f"{number} different captions are too few: none is left to train on, or to be held out")
    return (~held).nonzero().flatten(), held.nonzero().flatten()


# --------------------------------------------------------------------------- training


def draw(questions: Questions, rows: torch.Tensor, number: int, generator: torch.Generator) -> Questions:
    """``number`` random rows of ``rows``, in single precision."""
    drawn = questions.take(rows[common.batch_indices(generator, len(rows), number)])
    return replace(drawn, latents=drawn.latents.float())


def twice(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``rows``, and once more those that are ``chosen`` (N,) among all."""
    return torch.cat([rows, rows[chosen[rows]]])


def mislabel(batch: Questions, generator: torch.Generator) -> Questions:
    """Finished pictures, some of the satisfied ones under a caption that they do not satisfy."""
    wrong = pairs.negatives(list(batch.captions), generator)
    swap = (torch.rand(len(batch), generator=generator) < WRONG_CAPTIONS) & (batch.labels[:, 0] == 1)
    captions = [w if s else c for c, w, s in zip(batch.captions, wrong, swap.tolist(), strict=True)]
    labels = batch.labels.clone()
    labels[swap, 0] = 0
    return replace(batch, captions=captions, labels=labels)


def success_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, 2) over the questions that were tried."""
    tried = labels != UNASKED
    return F.binary_cross_entropy_with_logits(logits[tried], labels[tried])


def go_on_from_verifier(folder: Path, model: LatentTextReward) -> None:
    """Take over the weights of an exported verifier; an older one lends its only stem to finished pictures."""
    held = load_file(folder / WEIGHTS)
    own = {f"finished_{name}": value for name, value in held.items() if name.startswith("stem.")}
    model.load_state_dict(own | held, strict=False)


def go_on_from_reward(args: argparse.Namespace, model: LatentTextReward, endings: Questions) -> None:
    """Take over from the reward model what reads tokens and words, and teach the stem to see latents as its own does.

    The stem learns from finished pictures: its tokens are to be those that the reward model sees in what is decoded.
    """
    reward = PixelTextReward.from_pretrained(args.out / "reward").to(args.device, memory_format=torch.channels_last)
    held, own = reward.state_dict(), model.state_dict()
    taken = [name for name in own if name in held and held[name].shape == own[name].shape and "stem" not in name]
    model.load_state_dict({name: held[name] for name in taken}, strict=False)
    backbone = load_backbone(str(args.out / "pipeline"), device=args.device, dtype=args.dtype)
    schedule = argparse.Namespace(**vars(args) | {"steps": args.stem_steps})
    loop = common.Loop("verifier-stem", schedule, {"stem": model.stem}, 2e-3)
    rows = split(endings)[0]

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = draw(endings, rows, 64, generator)
        with torch.no_grad():
            pictures = backbone.decode(batch.latents.to(args.device, backbone.dtype))
            wanted = reward.stem(pictures * 2 - 1).float()
        got = model.stem(_to_input(batch.latents, args.device)).float()
        return {"loss": F.mse_loss(got, wanted) / wanted.var()}

    loop.run(loss_at)
    model.finished_stem.load_state_dict(model.stem.state_dict())


def train(args: argparse.Namespace, states: Questions, endings: Questions) -> common.EMA:
    """Run the loop; returns the averaged model."""
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    model = LatentTextReward(len(tokenizer), MAX_LENGTH, layers=args.layers)
    model = model.to(args.device, memory_format=torch.channels_last)
    if args.warm_start == "reward":
        go_on_from_reward(args, model, endings)
    elif args.warm_start == "verifier":
        go_on_from_verifier(args.out / "verifier", model)
    model.tokenizer = tokenizer
    width = model.config["width"]
    detector, grounder = pairs.Detector(width).to(args.device), pairs.Grounder(width).to(args.device)
    ema = common.EMA(model, 0.998)
    modules = {"model": model, "detector": detector, "grounder": grounder, "ema": ema.model}
    loop = common.Loop("verifier", args, modules, args.lr)
    state_rows, ending_rows = split(states)[0], split(endings)[0]
    stopped_rows = state_rows[states.labels[state_rows, 1] != UNASKED]
    stopped_rows = twice(stopped_rows, states.evaluations[:, 0] - states.evaluations[:, 1] >= EARLY)
    ending_rows = twice(ending_rows, endings.evaluations[:, 0] >= EARLY)
    finished, stopped = (round(share * args.batch) for share in (FINISHED_SHARE, STOPPED_SHARE))

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        along = draw(states, state_rows, args.batch - finished - stopped, generator)
        stops = draw(states, stopped_rows, stopped, generator)
        done = mislabel(draw(endings, ending_rows, finished, generator), generator)
        batch = Questions.join([along, stops, done])
        ids, mask = (tokens.to(args.device) for tokens in model.tokenize(list(batch.captions)))
        features = model.see(_to_input(batch.latents, args.device), batch.timesteps.to(args.device))
        mixed = model.mix(features, ids, mask)
        logits = model.read_out(mixed, batch.timesteps.to(args.device), batch.evaluations.to(args.device)).float()
        labels = batch.labels.to(args.device)
        success = success_loss(logits, labels)
        detection = detector.loss(features, pairs.grid_targets(batch.objects).to(args.device))
        known = pairs.word_targets(list(batch.captions), batch.objects, ids.shape[1]).to(args.device)
        grounding = grounder.loss(mixed[:, -ids.shape[1] :], known)
        losses = {"success": success, "detection": detection, "grounding": grounding}
        return {"loss": success + args.dense * (0.3 * detection + 0.5 * grounding), **losses}

    loop.run(loss_at, ema.update)
    print(f"verifier: {loop.step} steps in {loop.seconds:.0f} s", flush=True)
    return ema


def _to_input(latents: torch.Tensor, device: str) -> torch.Tensor:
    return latents.to(device).contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- calibration and report


def logits_of(model: LatentTextReward, questions: Questions) -> torch.Tensor:
    """Logits (N, 2) of all questions."""
    parts = []
    for rows in torch.arange(len(questions)).split(256):
        part = questions.take(rows)
        parts.append(
            model.score_latents(part.latents.float(), list(part.captions), part.timesteps, part.evaluations).cpu()
        )
    return torch.cat(parts)


def calibrate(logits: torch.Tensor, labels: torch.Tensor, finished: torch.Tensor) -> tuple[float, float, float]:
    """Scale of logits (N,), bias of unfinished and of ``finished`` pictures that make them likeliest (Platt 1999)."""
    x, y, done = (values.double().numpy() for values in (logits, labels, finished))

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * x + np.where(done, parameters[2], parameters[1])
        return float((np.logaddexp(0, z) - y * z).mean())

    scale, bias, finished_bias = minimize(loss, (1.0, 0.0, 0.0), method="BFGS").x
    return float(scale), float(bias), float(finished_bias)


def report(logits: torch.Tensor, questions: Questions) -> dict[str, float]:
    """AUC and calibration of held-out questions by what was asked."""
    first = questions.labels[:, 0]
    result = {"held_out": float(len(first)), "satisfied": float(first.mean())}
    for column, name in ((0, "go_on"), (1, "stop")):
        for timestep in sorted(set(questions.timesteps.tolist())):
            rows = (questions.timesteps == timestep) & (questions.labels[:, column] != UNASKED)
            if rows.sum() < 20:
                continue
            scores, labels = logits[rows, column].numpy(), questions.labels[rows, column].numpy()
            key = f"{name}_{timestep}"
            result[f"auc_{key}"] = auc(scores, labels)
            result[f"excess_{key}"] = float((1 / (1 + np.exp(-scores))).mean() - labels.mean())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Train, calibrate and export; returns the exit status."""
    args = common.arguments("world train verifier", __doc__ or "", argv, **OPTIONS)
    if args.warm_start not in WARM_STARTS:
        raise ValueError(f"--warm-start takes one of {', '.join(WARM_STARTS)}, got {args.warm_start!r}")
    states, endings = load_questions(args.work)
    print(f"{len(states)} states, {len(endings)} endings of {len(set(states.captions))} prompts", flush=True)
    model = train(args, states, endings).model
    held = Questions.join([states.take(split(states)[1]), endings.take(split(endings)[1])])
    logits, tried = logits_of(model, held), held.labels != UNASKED
    finished = (held.timesteps == 0)[:, None].expand_as(tried)
    scale, bias, finished_bias = calibrate(logits[tried], held.labels[tried], finished[tried])
    model.config |= {"scale": scale, "bias": bias, "finished_bias": finished_bias}
    result = report(scale * logits + torch.where(finished, finished_bias, bias), held)
    model.save_pretrained(args.out / "verifier", build_tokenizer())
    common.keep_result(args, "verifier", result)
    return 0
