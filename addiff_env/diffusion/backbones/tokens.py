"""What a tokenizer makes of a prompt: which tokens are its own, and which words it cuts off or does not know."""

from __future__ import annotations

import re
from typing import Any

import torch


def content_tokens(tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Which ``tokens`` (L,) are the prompt's own, (L,) bool; an empty prompt keeps one, so that maps exist."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    special |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    content = torch.tensor([int(token) not in special for token in tokens])
    if not content.any():
        content[min(1, len(content) - 1)] = True
    return content


def truncated_words(tokenizer: Any, prompt: str, limit: int) -> str:
    """The end of ``prompt`` that does not fit into ``limit`` tokens, special ones included; "" if it fits."""
    special = tokenizer.num_special_tokens_to_add()
    pieces = tokenizer.tokenize(prompt, verbose=False)  # which else warns that a model would fail on so many
    if len(pieces) <= limit - special:
        return ""
    return tokenizer.convert_tokens_to_string(pieces[limit - special :]).replace("</w>", " ").strip()


def spelled_out_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of ``prompt`` that the tokenizer does not know: at least half of their pieces are single letters."""
    words = re.findall(r"[^\W\d_]{2,}", prompt)
    return [word for word in words if _is_spelled_out(tokenizer.tokenize(word))]


def _is_spelled_out(pieces: list[str]) -> bool:
    return 2 * sum(len(piece.removesuffix("</w>")) == 1 for piece in pieces) >= len(pieces)
