"""T2I-CompBench: rules by hand and against a second statement of them; prompts; small models with random weights."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.evaluation.benchmarks import Item
from addiff_env.evaluation.geneval import Detection
from addiff_env.evaluation.t2i import (
    RELATIONS,
    BlipVqa,
    T2IMetric,
    WordDetector,
    complex_demand,
    detect,
    numeracy_demand,
    numeracy_score,
    objects_of,
    open_t2i,
    questions,
    relation_score,
    spatial_demand,
    spatial_score,
)


def found(label: str, box: tuple[float, ...] = (0, 0, 10, 10), score: float = 0.9) -> Detection:
    return Detection(label, score, box)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- spatial


@pytest.mark.parametrize(
    ("relation", "box", "score"),
    [
        ("on the left of", (100, 0, 110, 10), 1.0),  # seen from the first object at (0, 0, 10, 10)
        ("on the right of", (100, 0, 110, 10), 0.0),
        ("on the right of", (-100, 0, -90, 10), 1.0),
        ("on the top of", (0, 100, 10, 110), 1.0),
        ("on the bottom of", (0, -100, 10, -90), 1.0),
        ("on the bottom of", (0, 100, 10, 110), 0.0),
        ("on the left of", (50, 60, 60, 70), 0.0),  # further down than sideways
        ("on the left of", (5, 0, 15, 10), 0.1 / (50 / 150)),  # half of each overlaps: IoU 1/3
        ("next to", (100, 400, 110, 410), 1.0),  # near along one axis
        ("near", (300, 400, 310, 410), 150 / 400),
        ("on top of", (0, 100, 10, 110), 0.0),  # as in the script, which knows "on the top of" only
        (None, (0, 100, 10, 110), 0.0),
    ],
)
def test_relations_by_hand(relation: str | None, box: tuple[float, ...], score: float) -> None:
    assert relation_score(relation, (0, 0, 10, 10), box) == pytest.approx(score)


def plain_relation(locality: str, a: dict[str, float], b: dict[str, float]) -> float:
    """The rules once more, axis by axis."""
    dx = (b["x1"] + b["x2"]) / 2 - (a["x1"] + a["x2"]) / 2
    dy = (b["y1"] + b["y2"]) / 2 - (a["y1"] + a["y2"]) / 2
    if locality in ("next to", "on side of", "near"):
        if abs(dx) < 150 or abs(dy) < 150:
            return 1
        return 150 / max(abs(dx), abs(dy))
    width = min(a["x2"], b["x2"]) - max(a["x1"], b["x1"])
    height = min(a["y2"], b["y2"]) - max(a["y1"], b["y1"])
    both = max(0, width) * max(0, height)
    areas = sum((box["x2"] - box["x1"]) * (box["y2"] - box["y1"]) for box in (a, b))
    iou = both / (areas - both)
    sides = {"on the right of": (-dx, dy), "on the left of": (dx, dy), "on the bottom of": (-dy, dx)}
    sides["on the top of"] = (dy, dx)
    if locality not in sides:
        return 0
    along, across = sides[locality]
    if along <= 0 or along <= abs(across):
        return 0
    return 1 if iou < 0.1 else 0.1 / iou


edges = st.integers(0, 479)
boxes = st.tuples(edges, edges, st.integers(1, 200), st.integers(1, 200))


@given(st.sampled_from(RELATIONS), boxes, boxes)
def test_relations_equal_a_second_statement(relation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    one, other = ((x, y, x + w, y + h) for x, y, w, h in (a, b))
    named = [dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)) for box in (one, other)]
    assert relation_score(relation, one, other) == pytest.approx(plain_relation(relation, *named))


def test_spatial_scores_by_hand() -> None:
    cat, dog = found("cat", score=0.8), found("dog", (100, 0, 110, 10), 0.6)
    wanted = ("cat", "dog")
    assert spatial_score([cat, dog], wanted, "on the left of") == pytest.approx(0.25 * 1.4 + 0.5)
    assert spatial_score([cat, dog], wanted, "on the right of") == 0  # .35 is below a half
    assert spatial_score([cat], wanted, "on the left of") == 0
    assert spatial_score([found("cat", score=1.0), found("dog", (5, 0, 15, 10), 1.0)], wanted, "on top of") == 0.5
    assert spatial_score([cat, dog], None, "near") == 0
    far = found("dog", (-100, 0, -90, 10), 0.5)
    assert spatial_score([cat, dog, far], wanted, "on the right of") == 0  # the surest dog counts


def test_boxes_are_measured_in_the_scripts_pixels() -> None:
    picture = np.zeros((958, 1000, 3), np.uint8)
    seen = [found("cat", (100, 200, 300, 400)), found("dog", score=0.2)]
    (kept,) = detect(lambda shown: seen, picture, threshold=0.3)  # type: ignore[arg-type]
    assert kept.label == "cat" and kept.box == pytest.approx((50, 100, 150, 200))


# --------------------------------------------------------------------------- numeracy


def apart(label: str, number: int) -> list[Detection]:
    return [found(label, (20 * k, 0, 20 * k + 10, 10)) for k in range(number)]


@pytest.mark.parametrize(
    ("seen", "score"),
    [
        (apart("dog", 2) + apart("cat", 1), 1.0),
        (apart("dog", 3) + apart("cat", 1), 0.75),  # one dog too many
        (apart("dog", 1), 0.25),
        (apart("cat", 1), 0.5),
        ([], 0.0),
        (apart("dog", 2) * 2 + apart("cat", 1), 1.0),  # the same boxes again are the same dogs
        (apart("hot dog", 2) + apart("cat", 1), 1.0),  # a label that contains the word counts as it
    ],
)
def test_numeracy_scores_by_hand(seen: list[Detection], score: float) -> None:
    assert numeracy_score(seen, [("dog", 2), ("cat", 1)]) == pytest.approx(score)


def test_a_box_inside_another_of_its_kind_is_the_same_object() -> None:
    inside = [found("dog", (0, 0, 100, 100)), found("dog", (10, 10, 20, 20))]
    assert numeracy_score(inside, [("dog", 1)]) == 1.0
    half = [found("dog", (0, 0, 100, 100)), found("dog", (50, 0, 150, 100))]
    assert numeracy_score(half, [("dog", 2)]) == 1.0
    with pytest.raises(ValueError, match="at least one object"):
        numeracy_score([], [])


# --------------------------------------------------------------------------- prompts


def test_demands_by_hand() -> None:
    assert spatial_demand("a girl on the left of a traffic light") == (("person", "light"), "on the left of")
    assert spatial_demand("a horse on side of a bicycle") == (("horse", "bicycle"), "on side of")
    assert spatial_demand("a horse") == (None, None)
    assert numeracy_demand("two dogs, a traffic light and six girls") == [
        ("dog", 2),
        ("traffic light", 1),
        ("person", 6),
    ]
    assert numeracy_demand("four bottles cluttered the shelf") == [("bottle", 4)]
    assert complex_demand("The red apple was next to the oval plate.") == (("apple", "plate"), "next to")
    assert complex_demand("The striped rug was on top of the wooden floor.") == (("rug", "floor"), "on top of")
    assert complex_demand("The dog ran.") == (None, None)
    assert questions("a red apple and a wooden desk") == ["a red apple?", "a wooden desk?"]


@pytest.mark.skipif(not os.environ.get("ADDIFF_DATA"), reason="ADDIFF_DATA names no folder of benchmark lists")
def test_every_public_prompt_demands_something() -> None:
    folder = Path(os.environ["ADDIFF_DATA"], "t2i_compbench")
    prompts = {name: (folder / f"{name}_val.txt").read_text().splitlines() for name in ("spatial", "numeracy", "color")}
    demands = [spatial_demand(prompt) for prompt in prompts["spatial"]]
    assert all(objects and relation for objects, relation in demands)
    assert sum(bool(numeracy_demand(prompt)) for prompt in prompts["numeracy"]) == len(prompts["numeracy"])
    assert all(questions(prompt) for prompt in prompts["color"])


# --------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def small_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "apple", "desk", "?"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 2, "encoder_hidden_size": 16, "vocab_size": len(words) + 2}
    special = {"bos_token_id": len(words), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=text | special, vision_config=vision, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForQuestionAnswering(config).eval()
        for value in model.parameters():
            value.data.normal_(std=0.3)
    model.save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def test_blip_vqa_is_the_product_of_first_token_probabilities(small_blip: Path, rng: np.random.Generator) -> None:
    scorer = BlipVqa(str(small_blip))
    picture = Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8))
    asked = ["a red apple?", "a desk?"]
    ours = scorer.probabilities(picture, asked)
    for question, value in zip(asked, ours, strict=True):
        inputs = scorer.processor(images=picture, text=question, return_tensors="pt")
        inputs["input_ids"][:, 0] = scorer.model.config.text_config.bos_token_id + 1
        out = scorer.model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, num_beams=1)
        read = scorer.model.text_encoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=scorer.model.vision_model(inputs["pixel_values"])[0],
        )[0]
        begin = torch.tensor([[scorer.model.decoder_start_token_id]])
        logits = scorer.model.text_decoder(input_ids=begin, encoder_hidden_states=read).logits[0, 0]
        assert int(out[0, 1]) == int(logits.argmax())  # what transformers itself would answer with
        yes, no = logits[5].exp().item(), logits[6].exp().item()
        assert value == pytest.approx(yes / (yes + no), abs=1e-5)
    assert len({round(value, 4) for value in ours}) == 2
    assert scorer(picture, "a red apple and a desk") == pytest.approx(ours[0] * ours[1])
    assert scorer(picture, "of") == 1.0


def test_missing_models_say_what_to_pass() -> None:
    items = [Item("a red apple", 0, "color"), Item("a cat near a dog", 1, "spatial")]
    with pytest.raises(FileNotFoundError, match="/nowhere/blip.*blip_vqa:<folder>"):
        open_t2i("blip_vqa", "/nowhere/blip", "cpu", items)
    with pytest.raises(FileNotFoundError, match="/nowhere/owl"):
        open_t2i("spatial", "/nowhere/owl", "cpu", items)
    with pytest.raises(ValueError, match="'model=x'.*known options: blip, detector"):
        open_t2i("t2i_compbench", "model=x", "cpu", items)


def test_words_are_detected(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, "hidden_size": 16}
    layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 64, "patch_size": 32, "hidden_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OwlViTConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=16)
        OwlViTForObjectDetection(config).save_pretrained(tmp_path)
    processor = OwlViTProcessor(OwlViTImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    processor.save_pretrained(tmp_path)
    made = open_t2i("spatial", f"{tmp_path},threshold=0.0", "cpu", [Item("a circle near a star", 0, "spatial")])
    assert isinstance(made.detector, WordDetector) and made.detector.words == ["circle", "star"]
    seen = made.detector(Image.fromarray(rng.integers(0, 255, (48, 80, 3), np.uint8)))
    assert len(seen) == 4 and {one.label for one in seen} <= {"circle", "star"}  # one for each patch
    assert [one.score for one in seen] == sorted((one.score for one in seen), reverse=True)


# --------------------------------------------------------------------------- the metrics


class Answers:
    """BLIP that is always this sure."""

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        return 0.5


class Cosine:
    limit = 1.0
    seen: list[str] = []

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.seen.append(prompts[0])
        return torch.full((len(pictures),), 0.3)


def metric(name: str, **more: Any) -> T2IMetric:
    def detector(picture: Image.Image) -> list[Detection]:
        return [found("apple", (0, 0, 100, 100), 1.0), found("plate", (300, 0, 400, 100), 1.0)]

    parts: dict[str, Any] = {"blip": Answers(), "detector": detector, "clip": Cosine()}
    return T2IMetric(name, **parts | more)


PICTURE = np.zeros((1, 479, 479, 3), np.uint8)


@pytest.mark.parametrize(
    ("category", "prompt", "own", "score"),
    [
        ("color", "a red apple", "blip_vqa", 0.5),
        ("spatial", "an apple on the left of a plate", "spatial", 1.0),
        ("numeracy", "one apple and two plates", "numeracy", 0.75),
        ("non_spatial", "A man is reading.", "non_spatial", 0.3),
        ("complex", "The red apple was on side of the oval plate.", "three_in_one", (0.5 + 1.0) / 2),
        ("complex", "The red dog chased a ball.", "three_in_one", (0.5 + 0.3) / 2),
    ],
)
def test_every_category_has_its_own_metric(category: str, prompt: str, own: str, score: float) -> None:
    item = Item(prompt, 0, category)
    for name in (own, "t2i_compbench"):
        ((values, _),) = metric(name).score(PICTURE, [item])
        assert values == pytest.approx(dict.fromkeys({own, name}, score))
        assert set(metric(name).columns(item)) == set(values)
    others = {"blip_vqa", "spatial", "numeracy", "non_spatial", "three_in_one"} - {own}
    assert all(metric(other).columns(item) == () for other in others)
    assert metric("t2i_compbench").columns(Item("a cup behind a cat", 0, "3d_spatial")) == ()


def test_the_benchmarks_lists_say_which_relations_a_prompt_has(tmp_path: Path) -> None:
    spatial, action, both = ("the red apple lay near the plate", "the dog barked near the cat", "an apple near a plate")
    (tmp_path / "complex_val_spatial.txt").write_text(f"{spatial.capitalize()}.\n")
    (tmp_path / "complex_val_action.txt").write_text(f"{action.capitalize()}.\n")
    item = Item("x", 0, "shape")  # so that only the lists are opened
    lists = open_t2i("non_spatial", f"lists={tmp_path}", "cpu", [item]).lists
    made = metric("three_in_one", lists=lists)
    values = [made.score(PICTURE, [Item(p + ".", 0, "complex")])[0][0]["three_in_one"] for p in (spatial, action, both)]
    assert values == pytest.approx([(0.5 + 1.0) / 2, (0.5 + 0.3) / 2, (0.5 + 1.0 + 0.3) / 3])
    assert Cosine.seen[-1] == "an apple near a plate ." and "red" not in " ".join(Cosine.seen[-2:])


def test_objects_are_collected() -> None:
    items = [
        Item("a cat near a dog", 0, "spatial"),
        Item("two dogs and one cup", 1, "numeracy"),
        Item("The apple was next to the plate.", 2, "complex"),
        Item("a red car", 3, "color"),
    ]
    assert objects_of(items) == ["cat", "dog", "cup", "apple", "plate"]
    assert json.dumps(objects_of([])) == "[]"
