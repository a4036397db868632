"""How far two computations of the same thing may lie apart: their last digits depend on the processor's kernels."""

import torch


def assert_same_but_for_rounding(ours: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    """Compare to ``share`` of the size of ``expected``: an element is a sum of others, and rounds on their scale."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=share * max(1.0, float(expected.abs().max())))
