"""Masks that follow objects: of maps by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage

from addiff_env.diffusion.attention import refinement_mask
from addiff_env.diffusion.objects import PLACED, object_mask

SIDE = 12
KINDS = ("neglected_object", "unattended")


def spot(rows: slice, columns: slice, peak: float, floor: float = 0.001) -> torch.Tensor:
    """A map with one even object."""
    found = torch.full((SIDE, SIDE), floor)
    found[rows, columns] = peak
    return found


LEFT, RIGHT, LOW = (slice(1, 4), slice(1, 4)), (slice(1, 4), slice(8, 11)), (slice(8, 11), slice(4, 8))
EVEN = torch.full((SIDE, SIDE), 0.3)


def masks_of(*words: torch.Tensor, threshold: float = 0.5, size: int = SIDE, background: bool = False) -> torch.Tensor:
    """The mask (h, w) of one lane, whose first token is not content and points everywhere."""
    maps = torch.stack([torch.full((SIDE, SIDE), 0.9), *words])[None]
    content = torch.ones(1, len(maps[0]), dtype=torch.bool)
    content[0, 0] = False
    return object_mask(maps, content, (size, size), threshold, background)[0, 0]


def area(*parts: tuple[slice, slice], grow: int = 0) -> torch.Tensor:
    """Cells of the parts, grown."""
    found = np.zeros((SIDE, SIDE), bool)
    for part in parts:
        found[part] = True
    grown = ndimage.maximum_filter(found, 2 * grow + 1, mode="constant") if grow else found
    return torch.from_numpy(grown).float()


def test_the_neglected_object_is_renewed_whole_and_grown_by_a_cell() -> None:
    words = spot(*LEFT, 0.3), spot(*RIGHT, 0.3), spot(*LOW, 0.1)
    assert torch.equal(masks_of(*words), area(LOW, grow=1))
    assert torch.equal(masks_of(*words, background=True), 1 - area(LEFT, RIGHT, grow=1))


def test_words_of_one_object_support_each_other() -> None:
    weak = spot(*LOW, 0.1), spot(*LOW, 0.06)  # .16 of .30 together
    assert torch.equal(masks_of(spot(*LEFT, 0.3), *weak), torch.zeros(SIDE, SIDE))
    apart = spot(*LOW, 0.1), spot(*RIGHT, 0.06)
    assert torch.equal(masks_of(spot(*LEFT, 0.3), *apart), area(LOW, RIGHT, grow=1))


def test_the_threshold_is_a_share_of_the_best_supported_object() -> None:
    words = spot(*LEFT, 0.4), spot(*RIGHT, 0.3), spot(*LOW, 0.1)
    for threshold, neglected in ((0.2, ()), (0.3, (LOW,)), (0.7, (LOW,)), (0.8, (LOW, RIGHT))):
        assert torch.equal(masks_of(*words, threshold=threshold), area(*neglected, grow=1))


def test_a_neighbour_that_is_attended_is_not_cut_into() -> None:
    beside = slice(1, 4), slice(4, 7)  # touches the object on the left
    mask = masks_of(spot(*LEFT, 0.3), spot(*beside, 0.1))
    assert torch.equal(mask, area(beside, grow=1) * (1 - area(LEFT)))


def test_an_object_is_the_part_around_the_peak_down_to_its_half() -> None:
    word = spot(*LOW, 0.1)
    word[9, 5] = 0.12
    word[LEFT] = 0.07  # another part above the half, not connected
    word[7, 4:8] = 0.05  # connected, below the half
    word[11, 8] = 0.06  # connected by a corner alone
    expected = area(LOW, (slice(11, 12), slice(8, 9)), grow=1)
    assert torch.equal(masks_of(spot(*RIGHT, 0.3), word), expected)


def test_a_word_that_points_nowhere_is_left_out() -> None:
    spread = EVEN.clone()
    spread[11, 0] = (PLACED - 0.1) * 0.3
    words = spot(*LEFT, 0.3), spot(*RIGHT, 0.3)
    assert torch.equal(masks_of(*words, spread), torch.zeros(SIDE, SIDE))
    spread[11, 0] = (PLACED + 0.1) * 0.3  # its support is the largest now
    assert torch.equal(masks_of(*words, spread, threshold=0.3), torch.zeros(SIDE, SIDE))
    assert torch.equal(masks_of(*words, spread, threshold=0.9), area(LEFT, RIGHT, grow=1))


@pytest.mark.parametrize("words", [(EVEN,), (EVEN, EVEN), (torch.zeros(SIDE, SIDE),), ()])
@pytest.mark.parametrize("background", [False, True])
def test_without_a_placed_word_everything_is_renewed(words: tuple[torch.Tensor, ...], background: bool) -> None:
    assert torch.equal(masks_of(*words, background=background), torch.ones(SIDE, SIDE))


def test_where_nothing_is_neglected_nothing_is_renewed_but_the_background() -> None:
    for words in ((spot(*LEFT, 0.01),), (spot(*LEFT, 0.3), spot(*RIGHT, 0.29)), (spot(*LEFT, 0.3),) * 2):
        assert torch.equal(masks_of(*words), torch.zeros(SIDE, SIDE))
    assert torch.equal(masks_of(spot(*LEFT, 0.01), background=True), 1 - area(LEFT, grow=1))


def test_it_grows_with_the_latents() -> None:
    words = spot(*LEFT, 0.3), spot(*LOW, 0.1)
    mask = masks_of(*words, size=8 * SIDE)
    rows, columns = (torch.nonzero(mask.amax(dim)).flatten() for dim in (1, 0))
    assert (rows.min(), rows.max()) == (8 * 8 - 4, 8 * 11 + 3)  # half a cell of the maps on each side
    assert (columns.min(), columns.max()) == (8 * 4 - 4, 8 * 8 + 3)


lane = st.integers(0, 2**31)


def drawn(seed: int, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (1, tokens, 8, 8) that sum to 1 over tokens, some sharp, and content (1, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    scale = 4 * torch.rand(1, tokens, 1, 1, generator=generator)
    maps = (scale * torch.randn(1, tokens, 8, 8, generator=generator)).softmax(1)
    return maps, torch.rand(1, tokens, generator=generator) < 0.7


@given(st.lists(lane, min_size=2, max_size=4), st.sampled_from(KINDS), st.floats(0.05, 0.95), st.sampled_from([8, 20]))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_lane_depends_on_itself_alone(seeds: list[int], kind: str, threshold: float, size: int) -> None:
    lanes = [drawn(seed) for seed in seeds]
    together = refinement_mask(
        kind, torch.cat([m for m, _ in lanes]), torch.cat([c for _, c in lanes]), (size, size), threshold, 0.0
    )
    for mask, (maps, content) in zip(together, lanes, strict=True):
        alone = refinement_mask(kind, maps, content, (size, size), threshold, 0.0)
        assert torch.equal(mask, alone[0])


@given(lane, st.floats(0.05, 0.95))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_two_kinds_share_no_object(seed: int, threshold: float) -> None:
    maps, content = drawn(seed)
    neglected, unattended = (
        refinement_mask(kind, maps, content, (8, 8), threshold, 0.0)[0, 0].bool() for kind in KINDS
    )
    assert set(neglected.unique().tolist()) | set(unattended.unique().tolist()) <= {False, True}
    # The order of tokens, and those that are not content, do not matter.
    order = torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(seed))
    again = object_mask(maps[:, order], content[:, order], (8, 8), threshold, False)
    assert torch.equal(again[0, 0].bool(), neglected)
    others = torch.where(content[:, :, None, None], maps, torch.rand_like(maps))
    assert torch.equal(object_mask(others, content, (8, 8), threshold, False)[0, 0].bool(), neglected)
    if (neglected & unattended).all():  # no word is placed
        return
    own = maps[0, content[0]]
    placed = own[own.amax((1, 2)) >= PLACED * own.mean((1, 2))].flatten(1).argmax(1)
    assert not (neglected | unattended).flatten()[placed].all()  # the best supported object is kept
