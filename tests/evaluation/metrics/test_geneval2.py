"""GenEval 2: the list, Soft-TIFA by hand, and a vision-language model with random weights against its own logits."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.metrics.base import score_pictures
from addiff_env.evaluation.metrics.geneval2 import (
    AM,
    GM,
    REQUEST,
    SoftTifa,
    VisionLanguageModel,
    exclusive,
    forms,
    soft_tifa,
    summarize,
)
from addiff_env.evaluation.metrics.registry import protocol_scores
from addiff_env.types import ResultRow

LINES = [
    {
        "prompt": "seven green pigs",
        "atom_count": 3,
        "vqa_list": [["How many pigs are there?", "seven"], ["Are the pigs green?", "Yes"], ["Any pigs?", "Yes"]],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a cow behind two cars",
        "atom_count": 4,
        "vqa_list": [
            ["How many cows?", "one"], ["Any cows?", "Yes"], ["Is the cow behind the cars?", "Yes"],
            ["How many cars?", "two"], ["Any cars?", "Yes"],
        ],
        "skills": ["count", "object", "position", "count", "object"],
    },
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    (tmp_path / "geneval2").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "geneval2" / "geneval2_data.jsonl").write_text(text)
    return load_benchmark("geneval2", root=tmp_path, any_length=True)


def test_the_list_gives_atoms_as_complexity(items: list[Item]) -> None:
    assert [(item.category, item.num_requirements, item.complexity) for item in items] == [
        ("3 atoms", 3, "simple"),
        ("4 atoms", 4, "full"),
    ]
    assert items[0].metadata["skills"] == LINES[0]["skills"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skills": ["count"]}, "geneval2_data.jsonl:2: no GenEval 2 questions"),
        ({"vqa_list": [["only a question"]]}, "no GenEval 2 questions"),
        ({"vqa_list": []}, "no GenEval 2 questions"),
        ({"atom_count": "three"}, "expected a number of atoms, got 'three'"),
        ({"atom_count": 0}, "expected a number of atoms, got 0"),
    ],
)
def test_damaged_lines_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "geneval2").mkdir()
    lines = [json.dumps(LINES[0]), json.dumps({**LINES[1], **change})]
    (tmp_path / "geneval2" / "geneval2_data.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        load_benchmark("geneval2", root=tmp_path, any_length=True)


@pytest.mark.skipif(not os.environ.get("ADDIFF_DATA"), reason="needs the published list in ADDIFF_DATA")
def test_the_published_list_is_whole() -> None:
    found = load_benchmark("geneval2")
    assert len(found) == 800 and {item.num_requirements for item in found} == set(range(3, 11))


# --------------------------------------------------------------------------- means


def test_means_by_hand() -> None:
    found = soft_tifa([0.9, 0.1, 0.8, 0.5, 1.0], LINES[1]["skills"])  # type: ignore[arg-type]
    assert found[AM] == pytest.approx((0.9 + 0.1 + 0.8 + 0.5 + 1.0) / 5)
    assert found[GM] == pytest.approx((0.9 * 0.1 * 0.8 * 0.5 * 1.0) ** (1 / 5))
    assert found["soft_tifa_count"] == pytest.approx((0.9 + 0.5) / 2)
    assert found["soft_tifa_object"] == pytest.approx((0.1 + 1.0) / 2) and found["soft_tifa_position"] == 0.8


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_geometric_mean_is_never_above_the_arithmetic_one(atoms: list[float]) -> None:
    found = soft_tifa(atoms, ["object"] * len(atoms))
    assert 0 <= found[GM] <= found[AM] + 1e-9 <= 1 + 2e-9


@pytest.mark.parametrize("atoms", [[], [0.5], [0.5, 1.2], [math.nan, 0.5]])
def test_what_is_no_probability_is_refused(atoms: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a probability for each of 2 atoms"):
        soft_tifa(atoms, ["count", "object"])


def test_skills_are_means_over_atoms_and_atom_counts_over_prompts(items: list[Item]) -> None:
    probabilities = [[0.2, 0.4, 0.6], [1.0, 0.5, 0.5, 0.7, 0.1]]
    scores = [soft_tifa(own, item.metadata["skills"]) for own, item in zip(probabilities, items, strict=True)]
    rows = [
        ResultRow("agent", item.prompt, item.seed, item.category, "b", "s", "p", "float32", "1", scores=own)
        for item, own in zip(items, scores, strict=True)
    ]
    found = protocol_scores(rows, items)["geneval2"]["agent"]
    assert found["count"] == pytest.approx((0.2 + 1.0 + 0.7) / 3)  # three atoms of two pictures
    assert found["object"] == pytest.approx((0.6 + 0.5 + 0.1) / 3) and found["position"] == 0.5
    assert found["3 atoms"] == pytest.approx(0.048 ** (1 / 3)) and found["overall"] == pytest.approx(
        (scores[0][GM] + scores[1][GM]) / 2
    )
    assert found[AM] == pytest.approx((0.4 + 2.8 / 5) / 2)
    assert list(found) == list(summarize([(i.category, s) for i, s in zip(items, scores, strict=True)],
                                         [i.metadata["skills"] for i in items]))  # fmt: skip


def test_ways_to_write_an_answer() -> None:
    assert forms("Yes") == ["Yes", "yes"] and forms("seven") == ["seven", "Seven", "7"]
    assert exclusive([[1, 2], [1, 2], [3], [1, 2, 4], [], [2]]) == [(1, 2), (3,), (2,)]


# --------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL with few and random weights, and its processor; letters are tokens, *seven* is one as well."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    words = [*SPECIAL, "[UNK]", "seven", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex("seven|."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<|im_end|>", additional_special_tokens=SPECIAL
    )
    sizes: dict[str, Any] = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, size=pixels), fast, Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE
    )
    ids = {name: words.index(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(words), "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 16, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("vlm")
    model = Qwen3VLForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel(str(folder))


def by_hand(model: VisionLanguageModel, picture: Image.Image, question: str, text: str) -> float:
    """The product of next-token probabilities, a forward pass of the whole written text for each token."""
    spoken = f"<|im_start|><|vision_start|><|image_pad|><|vision_end|>{REQUEST.format(question=question)}<|im_end|>"
    product, written = 1.0, spoken + "<|im_start|>"
    for piece in ["seven"] if text == "seven" else list(text):
        inputs = model.processor(text=[written], images=[picture], return_tensors="pt")
        with torch.no_grad():
            logits = model.model(**inputs).logits[0, -1].double()
        product *= float(logits.softmax(0)[model.processor.tokenizer.convert_tokens_to_ids(piece)])
        written += piece
    return product


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_probabilities_of_answers_by_hand(model: VisionLanguageModel) -> None:
    picture = Image.fromarray(noise(0))
    for answer, ways in (("Yes", ("Yes", "yes")), ("seven", ("seven", "Seven", "7"))):
        expected = sum(by_hand(model, picture, "How many pigs?", way) for way in ways)
        found = model.probability(picture, "How many pigs?", answer)
        assert found == pytest.approx(expected, rel=1e-4) and 0 < found < 1
    other = model.probability(Image.fromarray(noise(1)), "How many pigs?", "seven")
    assert other != pytest.approx(found, rel=1e-3)  # the picture is looked at


def test_a_model_whose_numbers_break_down_measures_nothing(
    model: VisionLanguageModel, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = lambda inputs, tokens: torch.full((1 + len(tokens), 10_000), math.nan)  # noqa: E731
    monkeypatch.setattr(model, "_following", broken)
    assert math.isnan(model.probability(Image.fromarray(noise(0)), "How many pigs?", "seven"))  # and not 1
    for scores, words in score_pictures([SoftTifa(model)], np.stack([noise(0), noise(1)]), items):
        assert scores == {} and "no finite soft_tifa_gm (nan)" in words


def test_a_skill_that_no_picture_tells_leaves_the_others(items: list[Item]) -> None:
    own = {GM: 0.5, AM: 0.5, "soft_tifa_object": 0.5}  # of a picture that got no finite score of its other skills
    found = summarize([("3 atoms", own)], [items[0].metadata["skills"]])
    assert found["object"] == 0.5 and "count" not in found


def test_a_pictures_scores_are_means_of_its_answers(model: VisionLanguageModel, items: list[Item]) -> None:
    metric, pictures = SoftTifa(model), np.stack([noise(0), noise(1)])
    for (scores, words), picture, item in zip(metric.score(pictures, items), pictures, items, strict=True):
        asked = item.metadata["vqa_list"]
        atoms = [model.probability(Image.fromarray(picture), question, answer) for question, answer in asked]
        assert scores == soft_tifa(atoms, item.metadata["skills"]) and set(scores) == set(metric.columns(item))
        assert words.count(": ") == sum(p < 0.5 for p in atoms)
    assert metric.columns(Item("p", 0, "c")) == ()


def test_a_model_that_is_not_there_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="geneval2:<folder>"):
        VisionLanguageModel(str(tmp_path / "none"))
