"""The embedded world's tokenizer: a CLIP tokenizer whose merges cover exactly the world's words.

Other words are not lost: byte-level BPE spells them out.
"""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from addiff_env.tiny.prompts import COLORS, NUMBERS, RELATIONS, SHAPES, SIZES, ObjectSpec

MAX_LENGTH = 32  # tokens of a prompt, with the two special ones


def world_words() -> list[str]:
    """Every word (and the comma) that captions of the world use, sorted."""
    phrases = [ObjectSpec(shape, count=count).phrase() for shape in SHAPES for count in (1, 2)]
    words = {"a", "an", "and", ",", *COLORS, *SIZES, *NUMBERS}
    for phrase in [*phrases, *RELATIONS]:
        words.update(phrase.split())
    return sorted(words)


def build_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer; the result depends on `world_words` alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = _learn_merges(alphabet)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def _learn_merges(alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merge each word's letters until the word is one token, in an order no word disturbs."""
    vocab = {token: index for index, token in enumerate([*alphabet, *[c + "</w>" for c in alphabet]])}
    merges: list[tuple[str, str]] = []
    for word in world_words():
        pieces = _apply([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            # Merging from the end keeps every new merge specific to this word's suffix.
            merges.append((pieces[-2], pieces[-1]))
            vocab.setdefault(pieces[-2] + pieces[-1], len(vocab))
            pieces = [*pieces[:-2], pieces[-2] + pieces[-1]]
    return vocab, merges


def _apply(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (left, right):
                pieces = [*pieces[:index], left + right, *pieces[index + 2 :]]
            index += 1
    return pieces
