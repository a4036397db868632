"""Reading cross-attention without changing the network, and masks from maps by hand."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from addiff_env.diffusion.attention import (
    MASKS,
    AttentionRecord,
    attention_entropy,
    capture_cross_attention,
    content_maps,
    cross_attention_layers,
    gaussian_blur,
    refinement_mask,
)

BLOCKS = ("down_blocks.1", "up_blocks.0")  # both run at 4x4 for 8x8 latents
SIZE = (4, 4)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    context = 5 * torch.randn(3, 7, 24, generator=generator)
    return latents, torch.tensor([900, 400, 10]), context


# ------------------------------------------------------------------ capture


def hooks_of(unet: UNet2DConditionModel) -> list[str]:
    return [name for name, module in unet.named_modules() for _ in module._forward_hooks]


def test_the_network_is_not_changed(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]) -> None:
    layers = cross_attention_layers(unet, BLOCKS)
    before = {name: module.processor for name, module in unet.named_modules() if hasattr(module, "processor")}
    plain = unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
    with capture_cross_attention(unet, layers, slice(0, 3)):
        captured = unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample  # to the last bit
        assert all(unet.get_submodule(name).processor is processor for name, processor in before.items())
    assert torch.equal(captured, plain)
    assert not hooks_of(unet)


def test_the_maps_are_diffusers_own(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]) -> None:
    layers, seen, hooks = cross_attention_layers(unet, BLOCKS), [], []

    def expect(module, args, kwargs):  # type: ignore[no-untyped-def]
        query = module.head_to_batch_dim(module.to_q(args[0]))
        key = module.head_to_batch_dim(module.to_k(kwargs["encoder_hidden_states"]))
        scores = module.get_attention_scores(query, key)  # (B * heads, queries, tokens)
        seen.append(scores.unflatten(0, (-1, module.heads)).mean(1))

    hooks = [unet.get_submodule(name).register_forward_pre_hook(expect, with_kwargs=True) for name in layers]
    with capture_cross_attention(unet, layers, slice(1, 3)) as record:
        unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2])
    for hook in hooks:
        hook.remove()
    maps = record.maps(*SIZE)  # (2, 7, 4, 4)
    expected = torch.stack(seen).mean(0)[1:3].transpose(1, 2).unflatten(2, SIZE)
    assert len(seen) == len(layers) == 3 and maps.shape == (2, 7, 4, 4)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 4, 4), rtol=0, atol=1e-5)


def test_maps_are_finite_where_the_model_upcasts_its_attention(unet: UNet2DConditionModel) -> None:
    """Scores beyond float16's range: Stable Diffusion 2.1 sets the flag because it has them."""
    attn = copy.deepcopy(unet.get_submodule(cross_attention_layers(unet, BLOCKS)[0])).half()
    attn.upcast_attention = True
    for layer in (attn.to_q, attn.to_k):
        layer.weight.fill_(16.0)
    holder = torch.nn.ModuleDict({"attn2": attn})
    with capture_cross_attention(holder, ["attn2"], slice(0, 1)) as record:
        attn.to_q(torch.full((1, 16, 32), 8.0).half())
        attn.to_k(torch.full((1, 7, 24), 8.0).half())
    maps = record.maps(*SIZE)
    assert torch.isfinite(maps).all()
    torch.testing.assert_close(maps.sum(1), torch.ones(1, *SIZE))


def test_nothing_is_left_behind_after_an_exception(unet: UNet2DConditionModel) -> None:
    layers = cross_attention_layers(unet, BLOCKS)
    with pytest.raises(KeyError), capture_cross_attention(unet, layers, slice(0, 1)):
        assert len(hooks_of(unet)) == 2 * len(layers)
        raise KeyError("on the way")
    assert not hooks_of(unet)


def test_nothing_to_capture_is_said(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"no cross-attention in down_blocks\.0"):
        cross_attention_layers(unet, ("down_blocks.0",))
    with pytest.raises(RuntimeError, match="no cross-attention layer ran"):
        AttentionRecord().maps(4, 4)


# ------------------------------------------------------------------ masks by hand

LEFT = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)  # columns
TOP = LEFT.T


def maps_of(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (1, tokens, 4, 4) and content (1, tokens); the first token is not content."""
    maps = torch.stack([torch.full(SIZE, 0.99), *rows])[None]
    content = torch.ones(1, len(maps[0]), dtype=torch.bool)
    content[0, 0] = False
    return maps, content


def mask_of(kind: str, *rows: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    return refinement_mask(kind, *maps_of(*rows), SIZE, threshold, 0.0)[0, 0]


def test_low_attention_picks_the_half_that_no_word_looks_at() -> None:
    assert torch.equal(mask_of("low_attention", 0.8 * LEFT + 0.1), 1 - LEFT)
    both = mask_of("low_attention", 0.9 * LEFT * TOP + 0.01, 0.5 * LEFT * (1 - TOP) + 0.01)
    assert torch.equal(both, 1 - LEFT)  # a word with little attention in all counts as much as the other


def test_low_attention_follows_the_threshold() -> None:
    ramp = torch.arange(16.0).view(SIZE) / 16
    for threshold, share in ((0.25, 4), (0.5, 8), (0.75, 12)):
        mask = mask_of("low_attention", ramp, threshold=threshold)
        assert mask.sum() == share and torch.equal(mask.flatten()[:share], torch.ones(share))


def test_neglected_token_picks_where_the_weakest_word_points() -> None:
    strong, weak = 0.9 * TOP + 0.05, 0.2 * LEFT + 0.01
    assert torch.equal(mask_of("neglected_token", strong, weak), LEFT)
    assert torch.equal(mask_of("neglected_token", weak, strong), LEFT)
    ramp = torch.arange(16.0).view(SIZE) / 100
    for threshold, share in ((0.25, 4), (0.75, 12)):
        mask = mask_of("neglected_token", strong, ramp, threshold=threshold)
        assert mask.sum() == share and torch.equal(mask.flatten()[-share:], torch.ones(share))


def test_lanes_have_their_own_masks() -> None:
    first, second = maps_of(0.8 * LEFT + 0.1), maps_of(0.8 * TOP + 0.1)
    both = refinement_mask(
        "low_attention", torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), SIZE, 0.5, 0.0
    )
    assert torch.equal(both[:, 0], torch.stack([1 - LEFT, 1 - TOP]))


def test_full_and_grid() -> None:
    maps, content = maps_of(LEFT)
    assert torch.equal(refinement_mask("full", maps, content, (8, 8)), torch.ones(1, 1, 8, 8))
    grid = refinement_mask("grid", maps, content, (8, 8), 0.5, 0.0)[0, 0]
    cells = torch.arange(4).repeat_interleave(2)
    assert torch.equal(grid, ((cells[:, None] + cells[None]) % 2).float())


def test_random_depends_on_its_noise_only() -> None:
    noise = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    maps, content = torch.rand(2, 3, *SIZE), torch.ones(2, 3, dtype=torch.bool)
    one = refinement_mask("random", maps, content, (8, 8), 0.5, 0.0, noise)
    assert torch.equal(one, refinement_mask("random", maps / 2, content, (8, 8), 0.5, 0.0, noise))
    assert not torch.equal(one[0], one[1])
    assert one.flatten(1).mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    with pytest.raises(ValueError, match="'random' needs noise"):
        refinement_mask("random", maps, content, (8, 8))


@given(
    st.sampled_from(MASKS),
    st.integers(0, 2**31),
    st.sampled_from([(8, 8), (4, 4), (16, 12)]),
    st.floats(0.05, 0.95),
    st.sampled_from([0.0, 0.7, 2.0]),
)
@hypothesis_settings(max_examples=60)
def test_every_mask_is_a_share(kind: str, seed: int, size: tuple[int, int], threshold: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 5, *SIZE, generator=generator).softmax(1)
    content = torch.tensor([[False, True, True, False, False], [False, True, False, False, False]])
    noise = torch.randn(2, 1, *SIZE, generator=generator)
    mask = refinement_mask(kind, maps, content, size, threshold, sigma, noise)
    assert mask.shape == (2, 1, *size) and mask.dtype == torch.float32
    assert mask.min() >= 0 and mask.max() <= 1 + 1e-6
    of_objects = kind in ("neglected_object", "unattended")  # there may be none, or they are everywhere
    assert of_objects or (mask.amax((1, 2, 3)) > 0).all()


def test_unknown_mask_is_quoted() -> None:
    with pytest.raises(ValueError, match="unknown mask 'salience'.*low_attention"):
        refinement_mask("salience", *maps_of(LEFT), SIZE)


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 3.0])
def test_blur_conserves(sigma: float) -> None:
    constant = torch.full((2, 1, 8, 8), 0.3)
    torch.testing.assert_close(gaussian_blur(constant, sigma), constant)
    spot = torch.zeros(1, 1, 31, 31)
    spot[0, 0, 15, 15] = 1
    blurred = gaussian_blur(spot, sigma)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(blurred, blurred.flip(2)) and torch.allclose(blurred, blurred.transpose(2, 3))
    if sigma == 0:
        assert torch.equal(blurred, spot)
    elif sigma >= 1:  # a kernel narrower than a cell is not sampled well; else the variance is sigma squared
        axis = torch.arange(31.0) - 15
        assert (blurred.sum((0, 1, 2)) * axis**2).sum() == pytest.approx(sigma**2, rel=0.05)


def test_content_maps_scale_words_alike() -> None:
    maps, content = maps_of(0.5 * LEFT, 0.01 * TOP)
    assert torch.allclose(content_maps(maps, content), torch.stack([torch.zeros(SIZE), LEFT, TOP])[None])


def test_entropy_by_hand() -> None:
    point = torch.zeros(SIZE)
    point[1, 2] = 1
    even = torch.full(SIZE, 0.2)
    assert attention_entropy(*maps_of(point)).item() == pytest.approx(0, abs=1e-6)
    assert attention_entropy(*maps_of(even)).item() == pytest.approx(1, abs=1e-6)
    assert attention_entropy(*maps_of(point, even)).item() == pytest.approx(0.5, abs=1e-6)
    half = torch.log(torch.tensor(8.0)) / torch.log(torch.tensor(16.0))
    assert attention_entropy(*maps_of(LEFT)).item() == pytest.approx(half.item(), abs=1e-6)
