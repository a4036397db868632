"""Looks in half precision: close to strict ones, and nothing of them is left with those who share the encoders."""

from typing import Any

import pytest
import torch

import addiff_env
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.perception.features import Perception, look_precision

PROMPTS = ["a red circle", "two blue squares", "a star above a green ring"]


def perception(tiny_kwargs: dict[str, Any], precision: torch.dtype | None, **more: Any) -> Perception:
    places = {**addiff_env.TINY, **tiny_kwargs, **more}
    return Perception(places["clip"], places["dino"], places["scorer"], torch.device("cpu"), precision)


@pytest.mark.parametrize("scorer", [None, "clipscore"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(tiny_kwargs: dict[str, Any], dtype: torch.dtype, scorer: str | None) -> None:
    more = {} if scorer is None else {"scorer": f"clipscore:{addiff_env.TINY['clip']}"}
    half, strict = perception(tiny_kwargs, dtype, **more), perception(tiny_kwargs, None, **more)
    assert half.clip is strict.clip
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, second = half.look(pictures, PROMPTS), strict.look(pictures, PROMPTS)
    for name, value in vars(first).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(second, name), rtol=0.02, atol=0.05)
    assert not torch.equal(first.clip_image, second.clip_image)
    texts = strict.clip.text_features(PROMPTS)
    del half, strict, first, second
    fresh = perception(tiny_kwargs, None, **more)
    assert torch.equal(texts, fresh.clip.text_features(PROMPTS))  # read in float32, whoever read them


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "expected"),
    [
        ("auto", "cuda", torch.float16, torch.float16),
        ("auto", "cuda:1", torch.bfloat16, torch.bfloat16),
        ("auto", "cuda", torch.float32, None),
        ("float32", "cuda", torch.float16, None),
        ("auto", "cpu", torch.bfloat16, None),
    ],
)
def test_auto_is_half_on_gpus_only(setting: str, device: str, dtype: torch.dtype, expected: Any) -> None:
    assert look_precision(setting, torch.device(device), dtype) == expected


def test_unknown_precisions_are_refused(small_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="look_precision.*'float8'"):
        DiffusionDenoiseVectorEnv(1, **{**addiff_env.TINY, **small_kwargs, "look_precision": "float8"})
