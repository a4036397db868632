"""Models whose licence has to be accepted first: whoever loads one is told what to do."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from addiff_env.diffusion.backbones.open import open_pipeline
from addiff_env.loading.weights import fetching, gated_advice, reason
from addiff_env.perception.encoders import load_clip
from addiff_env.perception.previews import load_tiny_decoder
from addiff_env.perception.scorers import load_scorer

ADVICE = r"accept its licence at .*`hf auth login`, or pass a local folder"


def refusal(kind: type[RepositoryNotFoundError] = GatedRepoError) -> Exception:
    """The Hub's refusal as diffusers and transformers hand it on."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    try:
        try:
            raise kind("403 Client Error", response=response)
        except RepositoryNotFoundError as error:
            raise OSError("owner/model is not a valid model identifier") from error
    except OSError as error:
        return error


def refuse(*args: Any, **more: Any) -> Any:
    raise refusal()


def fetched() -> None:
    with fetching("owner/model", "metric:<folder>"):
        refuse()


CALLS: list[tuple[Callable[[], Any], Any]] = [
    (lambda: open_pipeline("owner/model", None, torch.float32), (DiffusionPipeline, "download")),
    (lambda: load_tiny_decoder("owner/model", "cpu", "float32"), (AutoencoderTiny, "from_pretrained")),
    (lambda: load_clip("owner/model", "cpu"), ("transformers.CLIPModel.from_pretrained", None)),
    (lambda: load_scorer("imagereward", "cpu"), ("huggingface_hub.hf_hub_download", None)),
    (fetched, None),
]


@pytest.mark.parametrize(("call", "place"), CALLS, ids=["pipeline", "preview", "clip", "scorer", "fetching"])
def test_every_loader_says_what_to_do(call: Callable[[], Any], place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if place is not None:
        target, name = place
        monkeypatch.setattr(target, refuse) if name is None else monkeypatch.setattr(target, name, refuse)
    with pytest.raises(FileNotFoundError, match=ADVICE):
        call()


@pytest.mark.parametrize(("call", "place"), CALLS, ids=["pipeline", "preview", "clip", "scorer", "fetching"])
def test_an_id_that_nobody_has_is_named(call: Callable[[], Any], place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an advice to accept a licence: the Hub does not know it, or does not say."""

    def unknown(*args: Any, **more: Any) -> Any:
        raise refusal(RepositoryNotFoundError)

    monkeypatch.setitem(globals(), "refuse", unknown)
    if place is not None:
        target, name = place
        monkeypatch.setattr(target, unknown) if name is None else monkeypatch.setattr(target, name, unknown)
    with pytest.raises(FileNotFoundError, match="owner/model|ImageReward") as error:
        call()
    assert "licence" not in str(error.value) and "download" in str(error.value)


def test_the_page_is_named_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(FileNotFoundError, match="licence at https://huggingface.co/owner/model and run"):
        open_pipeline("owner/model", None, torch.float32)


def test_flux_is_known_to_be_gated_without_a_connection() -> None:
    with pytest.raises(FileNotFoundError, match="huggingface.co/black-forest-labs/FLUX.1-schnell.*hf auth login"):
        open_pipeline("black-forest-labs/FLUX.1-schnell", None, torch.float32)


def test_what_is_not_gated_is_not_said_to_be() -> None:
    assert gated_advice(refusal(RepositoryNotFoundError), "owner/model") == ""
    assert "gated" not in reason(OSError("no connection"))
    looped = OSError("one")
    looped.__cause__ = OSError("two")
    looped.__cause__.__cause__ = looped
    assert gated_advice(looped) == ""
