"""How well each scorer foretells the checker's verdict, on finished pictures and on previews along the way.

``addiff world auc`` denoises ``dev`` prompts with the environment's own schedule, decodes the clean
prediction at 20%, 40%, 60%, 80% and 100% of it, and prints the area under the ROC curve of every scorer for the verdict
on the *finished* picture. What the prompt alone tells a linear probe is listed beside them (`probe` states its limits).
Where all pictures have the same verdict there is no such area: n/a.
Where there is a verifier, `addiff_env.tiny.measures.calibration` then stops and refines pictures of the same prompts,
and a second table says whether its probabilities are the shares satisfied; ``--record`` keeps those pictures in a file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import addiff_env
from addiff_env.diffusion.backbones import Backbone, Prediction, denoise, initial_noise
from addiff_env.env.config import EnvConfig
from addiff_env.perception.encoders import ContrastiveEncoder, load_clip
from addiff_env.perception.scorers import LatentScorer, load_latent_text_reward, load_scorer
from addiff_env.stats import at_least_one, auc, auc_interval
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.measures.calibration import (
    Group,
    calibration_table,
    groups,
    load_or_record,
    paid_for_endings,
    probability,
    reliability,
)
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.world import WEIGHTS, latent_shape, load_world

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
LEAST = {1.0: 0.92, 0.6: 0.85}  # of the reward model
LEAST_OF_VERIFIER = {0.2: 0.82, 0.4: 0.91, 0.6: 0.94, 1.0: 0.95}
VERIFIER = "verifier, going on"
FOLDS, RIDGE = 5, 10.0  # of the text-only probe


def probe(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Out-of-fold ridge predictions (N,) of ``labels`` (N,) from ``features`` (N, D): what they alone tell, at least.

    A linear fit to a few hundred prompts with a fixed penalty: a better reader of the same text, or one that saw more
    verdicts, could tell more, so that a scorer's lead over this is an upper bound of what its eyes are worth. Folds are
    drawn over rows; prompts that occur more than once would be seen in training. NaN where a row is all there is.
    """
    if len(labels) < 2:
        return np.full(len(labels), math.nan)
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    predictions = np.zeros(len(labels))
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        mean, base = features[train].mean(0), labels[train].mean()
        centred = features[train] - mean
        gram = centred.T @ centred + RIDGE / features.shape[1] * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, centred.T @ (labels[train] - base))
        predictions[test] = (features[test] - mean) @ weights + base
    return predictions


@torch.no_grad()
def look(
    backbone: Backbone,
    scorers: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    guidance: float,
    steps: int,
    verifiers: Mapping[str, LatentScorer] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores (5, N) of every scorer at `SHARES` of the schedule, and the verdicts (N,) on the finished pictures.

    ``verifiers`` read the clean predictions, and are asked about the evaluations that are left.
    """
    shape, schedule = latent_shape(backbone), backbone.schedule(steps, latent_shape(backbone))
    at = [max(1, round(share * steps)) - 1 for share in SHARES]
    prompts = [row["prompt"] for row in rows]
    stages: list[torch.Tensor] = []
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # x0, timesteps, evaluations left

    def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
        stages.extend([backbone.decode(now.x0)] * at.count(index))
        following = schedule.timesteps[min(index + 1, steps - 1)] * (index + 1 < steps)
        left = torch.full((len(rows), 1), steps - index - 1, device=backbone.device)
        asked.extend([(now.x0, following.expand(len(rows)), left)] * at.count(index))

    noise = initial_noise(backbone, shape, [row["seed"] for row in rows])
    final = denoise(backbone, schedule, prompts, noise, guidance, watch)
    stages[-1], asked[-1] = backbone.decode(final), (final, *asked[-1][1:])
    pictures = stages[-1].permute(0, 2, 3, 1).cpu().numpy().clip(0, 1)
    satisfied = np.array([check_picture(p, prompt).satisfied for p, prompt in zip(pictures, prompts, strict=True)])
    scores = {
        name: np.stack([score(stage, prompts).cpu().numpy() for stage in stages]) for name, score in scorers.items()
    }
    for name, verifier in (verifiers or {}).items():
        answers = [verifier.score_latents(x0, prompts, timesteps, left)[:, 0] for x0, timesteps, left in asked]
        scores[name] = torch.stack(answers).cpu().numpy()
    return scores, satisfied


def scorers_of(weights: Path, clip: ContrastiveEncoder, device: str) -> dict[str, Any]:
    """The embedded world's scorers by name: (pictures, prompts) to scores (B,)."""
    reward = load_scorer(str(weights / "reward"), device)
    return {
        "CLIP": lambda pictures, prompts: (clip.image_features(pictures) * clip.text_features(prompts)).sum(1),
        "reward model": reward.score,
        # In the aesthetic scorer's place: the same model, told nothing of the prompt.
        "reward model, no prompt": lambda pictures, prompts: reward.score(pictures, [""] * len(prompts)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """AUCs with intervals of every scorer at every share, and of the prompt alone."""
    rows = balanced(load_split(args.split), args.number)
    backbone = load_world(args.weights, args.device, args.dtype)
    clip = load_clip(str(args.weights / "clip"), args.device)
    scorers, parts = scorers_of(args.weights, clip, args.device), []
    verifier = verifier_of(args)
    verifiers = {} if verifier is None else {VERIFIER: verifier}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        parts.append(look(backbone, scorers, part, addiff_env.TINY["guidance_scale"], args.steps, verifiers))
    labels = np.concatenate([satisfied for _, satisfied in parts])
    texts = clip.text_features([row["prompt"] for row in rows]).double().cpu().numpy()
    predicted = probe(texts, labels.astype(float))
    found: dict[str, Any] = {}
    for name in (*scorers, *verifiers):
        scores = np.concatenate([each[name] for each, _ in parts], axis=1)  # (5, N)
        found[name] = {f"{share:g}": entry(scores[k], labels) for k, share in enumerate(SHARES)}
    found["prompt alone (CLIP text, ridge)"] = {f"{share:g}": entry(predicted, labels) for share in SHARES}
    result = {"split": args.split, "number": len(rows), "satisfied": float(labels.mean()), "auc": found}
    if verifier is not None:
        result |= calibrated(args, verifier, rows)
    return result


def verifier_of(args: argparse.Namespace) -> LatentScorer | None:
    """The verifier among the measured weights, if there is one."""
    folder = args.weights / "verifier"
    return load_latent_text_reward(str(folder), args.device) if folder.is_dir() else None


def calibrated(args: argparse.Namespace, verifier: LatentScorer, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the verifier says of stops, refinements and categories, and of all pictures by what it says."""
    settings = {"model": str(args.weights / "pipeline"), "device": args.device, "dtype": args.dtype}
    config = EnvConfig(**addiff_env.TINY | settings | {"num_inference_steps": args.steps})
    kept = load_or_record(args.record, config, rows)
    found = groups(verifier, kept, [row["category"] for row in rows])
    by_chance = reliability(probability(paid_for_endings(verifier, kept)), kept["ending_satisfied"])
    return {"calibration": [asdict(group) for group in found], "reliability": by_chance}


def entry(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """One AUC with its interval; None where there is none."""
    numbers = zip(("auc", "low", "high"), (auc(scores, labels), *auc_interval(scores, labels)), strict=True)
    return {name: None if math.isnan(number) else number for name, number in numbers}


def bars(result: dict[str, Any]) -> dict[str, tuple[float | None, float]]:
    """What was measured (None: all pictures have the same verdict) and the least of it, by the bar's name."""
    wanted = {"reward model": LEAST, VERIFIER: LEAST_OF_VERIFIER}
    return {
        f"{name} at {share:.0%}": (result["auc"][name][f"{share:g}"]["auc"], least)
        for name, shares in wanted.items()
        if name in result["auc"]
        for share, least in shares.items()
    }


def passes(result: dict[str, Any]) -> bool:
    """Whether every bar is met, the calibration's included."""
    met = [value is not None and value >= least for value, least in bars(result).values()]
    return all(met + [Group(**group).passed for group in result.get("calibration", [])])


def table(result: dict[str, Any]) -> str:
    """The result in words."""
    satisfied = f"{100 * result['satisfied']:.1f}% satisfied"
    head = f"{result['number']} {result['split']} prompts, {satisfied}; AUC for that verdict"
    lines = [head, f"{'at share of the schedule':<34}" + "".join(f"{f'{share:.0%}':>18}" for share in SHARES)]
    for name, shares in result["auc"].items():
        cells = map(_cell, shares.values())
        lines.append(f"{name:<34}" + "".join(f"{cell:>18}" for cell in cells))
    for name, (value, least) in bars(result).items():
        words = f"n/a, wanted {least}: n/a (all pictures have the same verdict)"
        if value is not None:
            words = f"{value:.3f}, wanted {least}: {'pass' if value >= least else 'FAIL'}"
        lines.append(f"{name}: {words}")
    if "calibration" in result:
        lines += ["", calibration_table([Group(**group) for group in result["calibration"]])]
        lines += ["", "finished pictures by what is paid for them: mean, satisfied, number"]
        lines += [f"{paid:.3f}  {satisfied:.3f}  {number:>5}" for paid, satisfied, number in result["reliability"]]
    return "\n".join(lines)


def _cell(found: dict[str, float | None]) -> str:
    return "n/a" if found["auc"] is None else f"{found['auc']:.3f} ({found['low']:.2f}-{found['high']:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status: 1 unless the reward model and the verifier meet their bars."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world auc", description=__doc__, formatter_class=defaults)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--number", type=at_least_one, default=512, help="prompts, categories in turn")
    parser.add_argument("--steps", type=at_least_one, default=addiff_env.TINY["num_inference_steps"])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--record", type=Path, help="file that keeps the stopped and refined pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    result = measure(args)
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0 if passes(result) else 1
