from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from addiff_env.tiny.prompts import CATEGORIES, sample_prompt
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer, world_words


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def padded(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids


def test_every_world_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in world_words():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_captions_are_one_token_a_word(tokenizer: CLIPTokenizer, rng: np.random.Generator) -> None:
    known = {f"{word}</w>" for word in world_words()}
    for category in CATEGORIES:
        for _ in range(50):
            caption = sample_prompt(rng, category).caption
            tokens = tokenizer.tokenize(caption)
            assert tokens == [f"{word}</w>" for word in caption.replace(",", " ,").split()]
            assert set(tokens) <= known and len(tokens) + 2 <= MAX_LENGTH


@pytest.mark.parametrize("text", ["zebra", "ünïcödé", "大きい", "🙂", "don't", "x²+1=5", "asdfghjkl"])
def test_other_words_are_spelled_out(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) > 2
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)  # unk is the end token, as in CLIP
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text


def test_clip_conventions(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == MAX_LENGTH
    assert tokenizer("A  Red STAR").input_ids == tokenizer("a red star").input_ids
    ids = padded(tokenizer, "a star")
    assert len(ids) == MAX_LENGTH and ids[3:] == [tokenizer.eos_token_id] * (MAX_LENGTH - 3)
    assert padded(tokenizer, "") == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (MAX_LENGTH - 1)


def test_overlong_prompts_are_cut(tokenizer: CLIPTokenizer) -> None:
    ids = padded(tokenizer, "a red star and " * 40)
    assert len(ids) == MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]


def test_save_and_load(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == MAX_LENGTH
    for text in ("a small red star, a ring and two crosses", "a zebra", "", "ünd"):
        assert padded(loaded, text) == padded(tokenizer, text)


def test_building_is_reproducible(tokenizer: CLIPTokenizer) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
