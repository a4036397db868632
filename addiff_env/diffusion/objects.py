"""What attention sees as one thing: the objects that words point to, and which of them are neglected."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

PLACED = 2.2  # least peak of a word's map in units of its mean; below, the word points nowhere ("a", "and")
HALF = 0.5  # share of a map's peak down to which its object reaches
_NEIGHBOURS = np.ones((3, 3), bool)  # of a cell, diagonal ones included


def object_mask(
    maps: torch.Tensor, content: torch.Tensor, size: tuple[int, int], threshold: float, background: bool
) -> torch.Tensor:
    """Where to re-denoise so that no object is cut: (B, 1, h, w), 1 or 0, at ``size`` = (h, w).

    With A_t the map of content token t, bilinearly enlarged to ``size``, and p_t its peak: t is *placed* if p_t is at
    least `PLACED` means of A_t, and its object O_t is the connected part of {A_t >= `HALF` p_t} around the peak. The
    object's support s_t is the sum of p_u over all placed u with their peak in O_t, or t's peak in O_u: colour and
    shape of one thing support each other. t is neglected if s_t < ``threshold`` max s. With N and K the unions of the
    neglected and of the other objects, and G growing by half a cell of the maps (a cell of ``size`` at the least),

        mask = G(N) minus K, or with the background: everything minus G(K).

    Where no token is placed (even maps, no content) everything is renewed. Where none is neglected (a single placed
    token, or all alike) there is nothing to renew but the background.

    Args:
        maps: attention (B, tokens, h', w'); read on the host.
        content: which tokens are the prompt's own (B, tokens), bool.
        size: of the latents.
        threshold: in (0, 1).
        background: whether it is renewed, too.
    """
    sides = zip(size, maps.shape[2:], strict=True)
    steps = max(1, round(max(side / cell for side, cell in sides) / 2))
    enlarged = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False).cpu().numpy()
    renewed = [
        _renewed(words[kept], threshold, background, steps)
        for words, kept in zip(enlarged, content.cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(renewed)[:, None]).to(maps.device, torch.float32)


def _renewed(words: np.ndarray, threshold: float, background: bool, steps: int) -> np.ndarray:
    """One lane's cells (h, w), from its content tokens' maps (T, h, w)."""
    peaks = words.max((1, 2))
    words = words[(peaks > 0) & (peaks >= PLACED * words.mean((1, 2)))]
    if len(words) == 0:
        return np.ones(words.shape[1:], bool)
    objects, neglected = _objects(words, threshold)
    kept = objects[~neglected].any(0)
    if background:
        return ~ndimage.binary_dilation(kept, _NEIGHBOURS, iterations=steps)
    return ndimage.binary_dilation(objects[neglected].any(0), _NEIGHBOURS, iterations=steps) & ~kept


def _objects(words: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Each placed word's object (T, h, w), and which are neglected (T,)."""
    at = words.reshape(len(words), -1).argmax(1)
    rows, columns = np.unravel_index(at, words.shape[1:])
    peaks = words[np.arange(len(words)), rows, columns]
    labels = [ndimage.label(word >= HALF * peak, _NEIGHBOURS)[0] for word, peak in zip(words, peaks, strict=True)]
    objects = np.stack([found == found[y, x] for found, y, x in zip(labels, rows, columns, strict=True)])
    holds = objects[:, rows, columns]  # (T, T): whether the peak of word u lies in the object of word t
    support = (holds | holds.T) @ peaks
    return objects, support < threshold * support.max()
