"""Train the reward model: which generated pictures satisfy their prompt, as the checker sees it.

``addiff world train reward`` needs `generate`'s previews and samples and writes ``<out>/reward``.
First it learns to read pictures (rendered scenes and previews against right and wrong captions), then what
the diffusion model gets wrong (its samples with the checker's results).
"""

from __future__ import annotations

import argparse
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from addiff_env.perception.scorers import PixelTextReward
from addiff_env.stats import auc
from addiff_env.tiny.prompts import parse_caption
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.recipes.pairs import Pairs, Samples
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

# Of the command line; ``generated_from``: share of the training after which generated pictures come in.
OPTIONS = {"steps": 1300, "batch": 96, "lr": 1.2e-3, "warm_start": 0, "generated_from": 0.5}
HELD_OUT = 6  # one in so many captions is held out, with all its samples
STAGE_WEIGHTS = (0.1, 0.2, 0.2, 0.5)  # how often each kept stage of a sample is drawn, the finished picture last
GENERATED_SHARE = 0.7  # of a batch, once generated pictures come in

Labelled = tuple[Pairs, torch.Tensor]


def _join(parts: list[Labelled]) -> Labelled:
    pairs_, labels = parts[0]
    for more, more_labels in parts[1:]:
        pairs_, labels = pairs_ + more, torch.cat([labels, more_labels])
    return pairs_, labels


def rendered_batch(scenes: Pairs, previews: Pairs, number: int, generator: torch.Generator) -> Labelled:
    """Scenes and previews, half with their own caption (label 1), the rest with a wrong one (0)."""
    clean = number // 3
    batch = scenes.take(common.batch_indices(generator, len(scenes.captions), clean))
    batch = batch + previews.take(common.batch_indices(generator, len(previews.captions), number - clean))
    labels = (torch.rand(number, generator=generator) < 0.5).float()
    wrong = pairs.negatives(batch.captions, generator)
    swapped = torch.rand(number, generator=generator) < 0.15
    counts = pairs.shape_counts(batch.captions)
    captions = list(batch.captions)
    for row in (labels == 0).nonzero().flatten().tolist():
        other = (row + 1) % number
        # Another picture's caption is surely wrong only if it asks for other shapes.
        is_swapped = bool(swapped[row]) and not torch.equal(counts[row], counts[other])
        captions[row] = batch.captions[other] if is_swapped else wrong[row]
    return Pairs(batch.pictures, captions, batch.objects), labels


def generated_batch(samples: Samples, train: int, number: int, generator: torch.Generator) -> Labelled:
    """Samples and their previews under the checker's verdict; a fifth of the satisfied get a wrong caption (0)."""
    index = common.batch_indices(generator, train, number)
    stage = torch.multinomial(torch.tensor(STAGE_WEIGHTS), number, replacement=True, generator=generator)
    captions, labels = [samples.captions[i] for i in index.tolist()], samples.satisfied[index].float()
    wrong = pairs.negatives(captions, generator)
    swap = (torch.rand(number, generator=generator) < 0.2) & (labels == 1)
    captions = [w if s else c for c, w, s in zip(captions, wrong, swap.tolist(), strict=True)]
    return Pairs(samples.pictures[index, stage], captions, samples.objects[index]), labels * ~swap


# --------------------------------------------------------------------------- evaluation


def hold_out(samples: Samples) -> tuple[Samples, int]:
    """The samples with those of held-out captions last, and the index of the first of them.

    A caption falls on one side with all its samples, so that the verdict cannot be remembered by its words.
    """
    held = [zlib.crc32(caption.encode()) % HELD_OUT == 0 for caption in samples.captions]
    order = torch.tensor(sorted(range(len(held)), key=held.__getitem__))
    return samples.take(order), len(held) - sum(held)


def category_baseline(samples: Samples, train: int) -> np.ndarray:
    """What the text alone says: every held-out prompt's category's success rate among the training samples."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    categories = [parse_caption(caption).category for caption in samples.captions]
    for category, satisfied in zip(categories[:train], samples.satisfied[:train].tolist(), strict=True):
        outcomes[category].append(satisfied)
    rates = {category: float(np.mean(values)) for category, values in outcomes.items()}
    return np.asarray([rates.get(category, 0.5) for category in categories[train:]])


def held_out_scores(model: PixelTextReward, samples: Samples, train: int, stage: int) -> np.ndarray:
    """Logits of the held-out samples as they looked at ``stage``."""
    scores = []
    for rows in torch.arange(train, len(samples.captions)).split(256):
        pictures = common.to_input(samples.pictures[rows, stage], model.readout.device)
        scores.append(model.score(pictures, [samples.captions[i] for i in rows.tolist()]).cpu())
    return torch.cat(scores).numpy()


def report(model: PixelTextReward, samples: Samples, train: int) -> dict[str, float]:
    """AUC at every kept stage and of the text-only baseline, and the final logits' statistics."""
    labels = samples.satisfied[train:].numpy()
    result = {"held_out": float(len(labels)), "satisfied": float(labels.mean())}
    for stage, share in enumerate(samples.shares):
        scores = held_out_scores(model, samples, train, stage)
        result[f"auc_at_{share:.0%}"] = auc(scores, labels)
    result["auc_category_only"] = auc(category_baseline(samples, train), labels)
    result |= {"score_mean": float(scores.mean()), "score_std": float(scores.std())}  # of the last, finished, stage
    return result


# --------------------------------------------------------------------------- training


def train(args: argparse.Namespace, scenes: Pairs, previews: Pairs, samples: Samples, first_held: int) -> common.EMA:
    """Run the loop; returns the averaged model."""
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    model = PixelTextReward(len(tokenizer), MAX_LENGTH).to(args.device, memory_format=torch.channels_last)
    model.tokenizer = tokenizer
    if args.warm_start:
        model.load_state_dict(PixelTextReward.from_pretrained(args.out / "reward").state_dict())
    width = model.config["width"]
    detector, grounder = pairs.Detector(width).to(args.device), pairs.Grounder(width).to(args.device)
    ema = common.EMA(model, 0.998)
    modules = {"model": model, "detector": detector, "grounder": grounder, "ema": ema.model}
    loop = common.Loop("reward", args, modules, args.lr)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        generated = round(GENERATED_SHARE * args.batch) if loop.step >= args.generated_from * args.steps else 0
        parts = [rendered_batch(scenes, previews, args.batch - generated, generator)]
        if generated:
            parts.append(generated_batch(samples, first_held, generated, generator))
        batch, labels = _join(parts)
        batch, labels = pairs.shift_and_mirror(batch, generator), labels.to(args.device)
        ids, mask = model.tokenize(batch.captions)
        features = model.see(common.to_input(batch.pictures, args.device))
        mixed = model.mix(features, ids.to(args.device), mask.to(args.device))
        logits = model.head(mixed[:, 0]).squeeze(-1).float()
        success = F.binary_cross_entropy_with_logits(logits, labels)
        detection = detector.loss(features, pairs.grid_targets(batch.objects).to(args.device))
        known = pairs.word_targets(batch.captions, batch.objects, ids.shape[1]).to(args.device)
        grounding = grounder.loss(mixed[:, -ids.shape[1] :], known)
        right = ((logits > 0) == (labels > 0.5)).float().mean()
        losses = {"success": success, "detection": detection, "grounding": grounding, "right": right}
        return {"loss": success + 0.3 * detection + 0.5 * grounding, **losses}

    loop.run(loss_at, ema.update)
    print(f"reward: {loop.step} steps in {loop.seconds:.0f} s", flush=True)
    return ema


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args = common.arguments("world train reward", __doc__ or "", argv, **OPTIONS)
    scenes = pairs.load_scenes(args.work, args.seed)
    previews, samples = pairs.load_previews(args.work, scenes), pairs.load_samples(args.work)
    samples, first_held = hold_out(samples)
    model = train(args, scenes, previews, samples, first_held).model
    result = report(model, samples, first_held)
    model.config |= {"score_mean": result["score_mean"], "score_std": max(result["score_std"], 1e-3)}
    model.save_pretrained(args.out / "reward", build_tokenizer())
    common.keep_result(args, "reward", result)
    return 0
