"""Scorers: frozen models (picture, prompt) -> score, all behind one protocol and opened by `load_scorer`.

| setting | model | source |
|---|---|---|
| ``imagereward[:<file>]`` | ImageReward: BLIP ViT-L with a linear head | Xu et al. 2023 |
| ``hps[:<file>]`` | HPS v2.1: open_clip's ViT-H-14, fine-tuned | Wu et al. 2023 |
| ``pickscore[:<folder>]`` | PickScore: CLIP ViT-H-14, fine-tuned | Kirstain et al. 2023 |
| ``aesthetic[:<file>]`` | LAION's aesthetic predictor on CLIP ViT-L/14 | Schuhmann 2022 |
| ``clipscore:<CLIP setting>`` | cosine of picture and prompt | Hessel et al. 2021 |
| ``<folder>`` | `PixelTextReward`, the embedded world's reward model | |
| ``<folder>`` | `LatentTextReward`, its verifier, which reads clean predictions without decoding them | |

Behind the path follow options, separated by commas: ``imagereward:ImageReward.pt,tokenizer=<folder or Hub id>``,
``aesthetic:<file>,clip=<CLIP setting>``, ``pickscore:<folder>,processor=<folder or Hub id>``.
"""

from __future__ import annotations

from addiff_env.perception.scorers.base import LatentScorer, Scorer, ScorerOfLatents, reads_latents
from addiff_env.perception.scorers.clip_based import Aesthetic, CLIPScore, HPSv2, PickScore
from addiff_env.perception.scorers.image_reward import ImageReward
from addiff_env.perception.scorers.latent_text import LatentTextReward, load_latent_text_reward
from addiff_env.perception.scorers.load import load_scorer
from addiff_env.perception.scorers.pixel_text import PixelTextReward, load_pixel_text_reward

__all__ = [
    "Aesthetic",
    "CLIPScore",
    "HPSv2",
    "ImageReward",
    "LatentScorer",
    "LatentTextReward",
    "PickScore",
    "PixelTextReward",
    "Scorer",
    "ScorerOfLatents",
    "load_latent_text_reward",
    "load_pixel_text_reward",
    "load_scorer",
    "reads_latents",
]
