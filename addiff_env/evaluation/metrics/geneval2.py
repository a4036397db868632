"""GenEval 2's Soft-TIFA (Kamath et al. 2025, arXiv 2512.16853): how surely a model answers a prompt's questions right.

A vision-language model is asked each question of a prompt; an atom's score is the probability that it gives to the
right answer. The arithmetic mean over a prompt's atoms (``soft_tifa_am``) estimates atoms, the geometric mean
(``soft_tifa_gm``) whole prompts; both are averaged over the benchmark. Skills are reported over atoms, numbers of atoms
by the geometric mean. The wording of the request and the ways to write an answer that are counted as right are this
module's own; tables name the model, and numbers made with others than the benchmark's are not comparable with published
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.base import Scored
from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.weights import check_tokenizer, fetching, load_network, quiet_loading

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
REQUEST = "{question} Answer in one word."
LEAST = 1e-12  # of a probability in the geometric mean, which a single zero would make zero
AM, GM, PREFIX = "soft_tifa_am", "soft_tifa_gm", "soft_tifa_"
_DIGITS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))


class VisionLanguageModel:
    """The probability of an answer by a chat model for pictures of the `transformers` library.

    Args:
        model: hub id or folder of one that `AutoModelForImageTextToText` opens, with a chat template.
        device: where it runs; on a GPU in the precision of its weights, elsewhere in float32.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is damaged, or of another kind.
    """

    def __init__(self, model: str = MODEL, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name, self.device = model, device
        dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
        with fetching(model, "geneval2:<folder>") as folder, quiet_loading():
            self.processor = AutoProcessor.from_pretrained(folder)
            check_tokenizer(self.processor.tokenizer, folder)
            self.model = load_network(AutoModelForImageTextToText, folder, dtype=dtype).eval().to(device)

    @frozen_call
    def probability(self, picture: Image.Image, question: str, answer: str) -> float:
        """P(answer | picture, question): the sum over its `forms`, each the product over its tokens."""
        content = [{"type": "image", "image": picture}, {"type": "text", "text": REQUEST.format(question=question)}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        encoded = [self.processor.tokenizer.encode(form, add_special_tokens=False) for form in forms(answer)]
        following = cache(partial(self._following, inputs))  # spellings mostly differ in one token
        found = (following(tokens[:-1])[range(len(tokens)), list(tokens)] for tokens in exclusive(encoded))
        return min(sum(float(picked.sum().exp()) for picked in found), 1.0)  # in this order NaN stays NaN

    def _following(self, inputs: Mapping[str, torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities (1 + tokens, vocabulary) of what follows the inputs, and each of these tokens."""
        known = inputs["input_ids"].shape[1]
        return self.model(**_continued(inputs, tokens)).logits[0, known - 1 :].double().log_softmax(1)


def _continued(inputs: Mapping[str, torch.Tensor], tokens: Sequence[int]) -> dict[str, Any]:
    """The inputs with text tokens behind them; whatever has a value for each token is continued."""
    length, more = inputs["input_ids"].shape, {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}

    def extended(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.shape != length:
            return value
        further = torch.tensor([more.get(name, [0] * len(tokens))], dtype=value.dtype, device=value.device)
        return torch.cat([value, further], 1)

    return {name: extended(name, value) for name, value in inputs.items()}


def forms(answer: str) -> list[str]:
    """Ways to write an answer: as given, with and without a capital, a number also in digits."""
    written = [answer, answer.lower(), answer.capitalize(), _DIGITS.get(answer.lower(), answer)]
    return list(dict.fromkeys(written))


def exclusive(continuations: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Those that no other one begins: of two the longer would be counted twice. Empty ones are none."""
    known = list(dict.fromkeys(tuple(tokens) for tokens in continuations if len(tokens)))
    return [one for one in known if not any(other != one and one[: len(other)] == other for other in known)]


class SoftTifa:
    """Both means of a picture's atoms, and the arithmetic mean of each skill.

    Args:
        model: P(answer | picture, question).
    """

    name = "geneval2"

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model

    def columns(self, item: Item) -> tuple[str, ...]:
        """Of prompts of GenEval 2: both means, and the prompt's skills."""
        if not is_geneval2(item):
            return ()
        return (GM, AM, *(PREFIX + skill for skill in dict.fromkeys(item.metadata["skills"])))

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[Scored]:
        """Scores in [0, 1] (NaN where the model gives none), and words on the atoms that are more likely missing."""
        return [self._scored(Image.fromarray(picture), item) for picture, item in zip(pictures, items, strict=True)]

    def _scored(self, picture: Image.Image, item: Item) -> Scored:
        atoms = [self.model.probability(picture, question, answer) for question, answer in item.metadata["vqa_list"]]
        if any(map(math.isnan, atoms)):
            return dict.fromkeys(self.columns(item), math.nan), ""
        lacking = [
            f"{question} {answer}: {p:.2f}"
            for (question, answer), p in zip(item.metadata["vqa_list"], atoms, strict=True)
            if p < 0.5
        ]
        return soft_tifa(atoms, item.metadata["skills"]), "; ".join(lacking)


def is_geneval2(item: Item) -> bool:
    """Whether an item has GenEval 2's questions."""
    return "vqa_list" in item.metadata and "skills" in item.metadata


def soft_tifa(atoms: Sequence[float], skills: Sequence[str]) -> dict[str, float]:
    """A picture's scores from the probabilities of its atoms.

    Raises:
        ValueError: no atoms, another number of skills, or a probability outside [0, 1].
    """
    if not atoms or len(atoms) != len(skills) or not all(0 <= p <= 1 for p in atoms):
        raise ValueError(f"expected a probability for each of {len(skills)} atoms, got {list(atoms)}")
    geometric = math.exp(float(np.mean([math.log(max(p, LEAST)) for p in atoms])))
    by_skill = {
        PREFIX + skill: float(np.mean([p for p, own in zip(atoms, skills, strict=True) if own == skill]))
        for skill in dict.fromkeys(skills)
    }
    return {GM: geometric, AM: float(np.mean(atoms)), **by_skill}


def summarize(scores: Sequence[tuple[str, Mapping[str, float]]], skills: Sequence[Sequence[str]]) -> dict[str, float]:
    """What the benchmark reports of a method's pictures.

    ``overall`` is the mean of the geometric means, `AM` that of the arithmetic ones; skills are means over atoms;
    categories (numbers of atoms) are means of geometric means.

    Args:
        scores: category and scores (`soft_tifa`) of every picture.
        skills: of every picture's atoms.
    """
    found = {
        "overall": float(np.mean([own[GM] for _, own in scores])),
        AM: float(np.mean([own[AM] for _, own in scores])),
    }
    for skill in dict.fromkeys(skill for own in skills for skill in own):
        name = PREFIX + skill
        pairs = [(own[name], asked.count(skill)) for (_, own), asked in zip(scores, skills, strict=True) if name in own]
        if pairs:
            found[skill] = sum(value * number for value, number in pairs) / sum(number for _, number in pairs)
    for category in sorted({category for category, _ in scores}, key=lambda name: (len(name), name)):
        found[category] = float(np.mean([own[GM] for name, own in scores if name == category]))
    return found


def open_geneval2(rest: str, device: str) -> SoftTifa:
    """The metric with the model named behind its colon, by default `MODEL`; raises as `VisionLanguageModel`."""
    return SoftTifa(VisionLanguageModel(rest or MODEL, device))
