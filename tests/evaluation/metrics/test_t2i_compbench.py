"""T2I-CompBench: rules by hand and against a second statement of them; prompts; small models with random weights."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.detectors import Detection, WordDetector
from addiff_env.evaluation.metrics.phrases import _FINITE, _VERBS, NUMBERS, singular
from addiff_env.evaluation.metrics.t2i_compbench import BlipVqa, DepthEstimator, T2IMetric, detect, open_t2i
from addiff_env.evaluation.metrics.t2i_rules import (
    RELATIONS,
    complex_demand,
    depth_demand,
    depth_relation_score,
    depth_score,
    numeracy_demand,
    numeracy_score,
    objects_of,
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
    (kept,) = detect(lambda shown, words: seen, picture, [], threshold=0.3)
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


# --------------------------------------------------------------------------- depth

NEAR = np.tile(np.linspace(0, 1, 100), (50, 1))  # (50, 100): nearer to the right


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [  # seen from the first box
        ("in front of", (20, 0, 60, 50), (10, 0, 50, 50), 1.0),  # nearer, IoU .6
        ("behind", (20, 0, 60, 50), (10, 0, 50, 50), 0.0),
        ("behind", (10, 0, 50, 50), (20, 0, 60, 50), 1.0),
        ("hidden", (10, 0, 50, 50), (20, 0, 60, 50), 1.0),
        ("in front of", (30, 0, 70, 50), (10, 0, 50, 50), (20 / 60) / 0.5),  # IoU 1/3
        ("in front of", (60, 0, 90, 50), (10, 0, 50, 50), 0.0),  # nearer, but covers nothing
        ("in front of", (20, -9, 60, 50), (10, 0, 50, 50), 1.0),  # a box may reach outside the picture
        ("behind", (20, 60, 60, 90), (20, 60, 60, 90), 0.0),  # or lie there
        (None, (20, 0, 60, 50), (10, 0, 50, 50), 0.0),
    ],
)
def test_depth_relations_by_hand(relation: str | None, a: tuple[int, ...], b: tuple[int, ...], score: float) -> None:
    assert depth_relation_score(relation, a, b, NEAR) == pytest.approx(score)


def plain_depth_score(names: tuple[str, str], relation: str, seen: list[Detection], near: np.ndarray) -> float:
    """The rules stated a second time, as a loop over labels and boxes."""
    labels = [one.label for one in seen]
    present = [any(name in label for label in labels) for name in names]
    if not any(present):
        return 0.0
    if not all(present):
        name = names[present.index(True)]
        return 0.25 * next(one.score for one in seen if name in one.label)
    last: dict[int, int] = {}
    for i, label in enumerate(labels):
        last |= {k: i for k in (0, 1) if names[k] in label}
        if len(last) == 2:
            break
    a, b = seen[last[0]], seen[last[1]]
    wide = max(0, min(a.box[2], b.box[2]) - max(a.box[0], b.box[0]))
    high = max(0, min(a.box[3], b.box[3]) - max(a.box[1], b.box[1]))
    areas = sum((one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in (a, b))
    iou = wide * high / (areas - wide * high)
    means = [near[int(o.box[1]) : int(o.box[3]), int(o.box[0]) : int(o.box[2])].mean() for o in (a, b)]
    right = means[0] > means[1] if relation == "in front of" else means[0] < means[1]
    return 0.25 * a.score + 0.25 * b.score + 0.5 * right * min(1, iou / 0.5)


corners = st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 50), st.integers(1, 25))
sightings = st.builds(
    lambda label, c, score: found(label, (c[0], c[1], c[0] + c[2], c[1] + c[3]), score),
    st.sampled_from(["cat", "dog", "teddy cat", "cup"]),
    corners,
    st.floats(0.1, 1.0),
)


@given(st.lists(sightings, max_size=5), st.sampled_from(["in front of", "behind", "hidden"]))
def test_depth_scores_equal_a_second_statement(seen: list[Detection], relation: str) -> None:
    expected = plain_depth_score(("cat", "dog"), relation, seen, NEAR)
    assert depth_score(seen, ("cat", "dog"), relation, NEAR) == pytest.approx(expected)


def test_depth_of_a_prompt_that_names_nothing() -> None:
    assert depth_score([found("cat")], None, "behind", NEAR) == 0.0


# --------------------------------------------------------------------------- prompts


def test_demands_by_hand() -> None:
    assert depth_demand("a phone hidden by a man") == (("phone", "person"), "hidden")
    assert depth_demand("a dog in front of a desk") == (("dog", "desk"), "in front of")
    assert depth_demand("a girl behind a cow") == (("person", "cow"), "behind")
    # The script of places renames persons alone, that of numbers others too.
    assert spatial_demand("a ship near a painting") == (("ship", "painting"), "near")
    assert numeracy_demand("two ships and a painting") == [("boat", 2), ("picture", 1)]
    assert complex_demand("The television was next to the goldfish.") == (("television", "goldfish"), "next to")
    assert spatial_demand("a girl on the left of a traffic light") == (("person", "light"), "on the left of")
    assert spatial_demand("a horse on side of a bicycle") == (("horse", "bicycle"), "on side of")
    assert spatial_demand("a horse") == (None, None)
    assert numeracy_demand("two dogs, a traffic light and six girls") == [
        ("dog", 2),
        ("traffic light", 1),
        ("person", 6),
    ]
    assert numeracy_demand("four bottles cluttered the shelf") == [("bottle", 4)]
    assert numeracy_demand("four microwaves") == [("microwave", 4)]
    assert complex_demand("The red apple was next to the oval plate.") == (("apple", "plate"), "next to")
    assert complex_demand("The striped rug was on top of the wooden floor.") == (("rug", "floor"), "on top of")
    assert complex_demand("The dog ran.") == (None, None)
    assert questions("a red apple and a wooden desk") == ["a red apple?", "a wooden desk?"]


@pytest.mark.parametrize(
    ("prompt", "demand"),
    [
        ("eight sofas provided comfortable seating", [("sofa", 8)]),
        ("two cars stuck on the road", [("car", 2)]),
        ("four chairs and one giraffe provided seating at the zoo", [("chair", 4), ("giraffe", 1)]),
        ("three ships sailed alongside one swan", [("boat", 3), ("swan", 1)]),
        # An article counts in the list that the prompt opens with, not in the scene.
        ("three lemons and one banana were used for a recipe", [("lemon", 3), ("banana", 1)]),
        ("an egg, a painting, and two fish sang a lively tune", [("egg", 1), ("picture", 1), ("fish", 2)]),
        ("six people gathered for a picnic", [("person", 6)]),
        ("one kite flew over three bees", [("kite", 1), ("bee", 3)]),
    ],
)
def test_what_prompts_count(prompt: str, demand: list[tuple[str, int]]) -> None:
    assert numeracy_demand(prompt) == demand


public = pytest.mark.skipif(not os.environ.get("ADDIFF_DATA"), reason="ADDIFF_DATA names no folder of benchmark lists")


@public
def test_every_public_prompt_demands_something() -> None:
    folder = Path(os.environ["ADDIFF_DATA"], "t2i_compbench")
    names = ("spatial", "3d_spatial", "numeracy", "color")
    prompts = {name: (folder / f"{name}_val.txt").read_text().splitlines() for name in names}
    demands = [spatial_demand(prompt) for prompt in prompts["spatial"]]
    demands += [depth_demand(prompt) for prompt in prompts["3d_spatial"]]
    assert not any("hidden" in objects for objects, _ in demands if objects)
    assert all(objects and relation for objects, relation in demands)
    assert sum(bool(numeracy_demand(prompt)) for prompt in prompts["numeracy"]) == len(prompts["numeracy"])
    assert all(questions(prompt) for prompt in prompts["color"])


NAMED_OTHERWISE = {
    "person": "people boy boys girl girls man men woman women",
    "boat": "ship ships",
    "tv": "television televisions",
    "fish": "goldfish",
    "picture": "painting paintings",
    "knife": "knives",
    "mouse": "mice",
}


@public
def test_public_numeracy_prompts_demand_what_they_name() -> None:
    prompts = Path(os.environ["ADDIFF_DATA"], "t2i_compbench/numeracy_val.txt").read_text().splitlines()
    for prompt in prompts:
        words = prompt.replace(",", "").split()
        demand = numeracy_demand(prompt)
        assert len(demand) >= sum(word in NUMBERS for word in words), prompt
        for name, _ in demand:
            forms = {name, f"{name}s", f"{name}es", f"{name[:-1]}ies", *NAMED_OTHERWISE.get(name, "").split()}
            assert forms & set(words) and singular(name) == name, (prompt, name)
            assert not set(name.split()) & (_VERBS | set(_FINITE.split())), (prompt, name)
            assert not name.endswith(("ed", "ing")), (prompt, name)


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
    assert isinstance(made.detector, WordDetector)
    picture = rng.integers(0, 255, (48, 80, 3), np.uint8)
    seen = made.detector(Image.fromarray(picture), ["circle", "star"])
    assert len(seen) == 4 and {one.label for one in seen} <= {"circle", "star"}  # one for each patch
    assert [one.score for one in seen] == sorted((one.score for one in seen), reverse=True)
    assert made.detector(Image.fromarray(picture), []) == []


def test_objects_that_a_detector_of_fixed_classes_does_not_know_are_named(tmp_path: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    names = {0: "cat", 1: "goldfish"}
    config = DetrConfig(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
                        backbone=None, id2label=names, **size, **heads)  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(tmp_path)
    items = [Item("a cat on the left of a sofa", 0, "spatial"), Item("two fish and three wallets", 1, "numeracy")]
    with pytest.warns(UserWarning, match=r"knows 2 classes, not 2 of the 4 objects .*\(e.g. sofa, wallet\)"):
        open_t2i("t2i_compbench", f"detector={tmp_path}", "cpu", items)
    open_t2i("spatial", str(tmp_path), "cpu", [Item("a cat near a goldfish", 0, "spatial")])  # a warning is an error


def test_a_pictures_score_depends_on_its_own_prompt_alone() -> None:
    asked = []

    def detector(picture: Image.Image, words: Any) -> list[Detection]:
        asked.append(list(words))
        return []

    items = [Item("a cat near a dog", 0, "spatial"), Item("two dogs and one cup", 1, "numeracy")]
    metric("t2i_compbench", detector=detector).score(np.concatenate([PICTURE, PICTURE]), items)
    assert asked == [["cat", "dog"], ["dog", "cup"]]


def test_depth_is_estimated(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import DepthAnythingConfig, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    necks = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    config = DPTConfig(**sizes, **necks, intermediate_size=16, image_size=32, patch_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    nearness = DepthEstimator(str(tmp_path))(Image.fromarray(rng.integers(0, 255, (40, 80, 3), np.uint8)))
    assert nearness.shape == (479, 958) and (nearness.min(), nearness.max()) == (0, 1)
    DepthAnythingConfig(depth_estimation_type="metric").save_pretrained(tmp_path)  # of which the largest is farthest
    with pytest.raises(ValueError, match=r"\(depth_anything\) is no DPT or Depth Anything of relative depth"):
        DepthEstimator(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="/nowhere/dpt.*spatial_3d:depth=<folder>"):
        DepthEstimator("/nowhere/dpt")


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
    def detector(picture: Image.Image, words: Any) -> list[Detection]:
        cup = found("cup", (10, 0, 110, 100), 1.0)
        return [found("apple", (0, 0, 100, 100), 1.0), found("plate", (300, 0, 400, 100), 1.0), cup]

    parts: dict[str, Any] = {"blip": Answers(), "detector": detector, "clip": Cosine()}
    parts["depth"] = lambda picture: np.tile(np.linspace(0, 1, 479), (479, 1))
    return T2IMetric(name, **parts | more)


PICTURE = np.zeros((1, 479, 479, 3), np.uint8)


@pytest.mark.parametrize(
    ("category", "prompt", "own", "score"),
    [
        ("color", "a red apple", "blip_vqa", 0.5),
        ("spatial", "an apple on the left of a plate", "spatial", 1.0),
        ("3d_spatial", "an apple behind a cup", "spatial_3d", 1.0),
        ("3d_spatial", "an apple in front of a cup", "spatial_3d", 0.5),
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
    others = {"blip_vqa", "spatial", "spatial_3d", "numeracy", "non_spatial", "three_in_one"} - {own}
    assert all(metric(other).columns(item) == () for other in others)
    assert metric("t2i_compbench").columns(Item("a cup", 0, "another")) == ()


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
    kinds = ((spatial, "spatial"), (action, "action"), (both, "both"))
    items = [Item(p + ".", 0, "complex", metadata={"relations": kind}) for p, kind in kinds]  # as the loader has them
    stated = [metric("three_in_one").score(PICTURE, [item])[0][0]["three_in_one"] for item in items]
    assert stated == pytest.approx(values)


def test_guessing_the_relations_of_complex_prompts_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blip: Path
) -> None:
    monkeypatch.setattr("addiff_env.evaluation.metrics.t2i_compbench.load_scorer", lambda *_: Cosine())
    monkeypatch.setattr("addiff_env.evaluation.metrics.t2i_compbench._open_detector", lambda *_: {"detector": None})
    guessed, stated = Item("x", 0, "complex"), Item("y", 0, "complex", metadata={"relations": "both"})
    with pytest.warns(UserWarning, match="1 pictures of category 'complex'.*complex_val_action.txt"):
        open_t2i("three_in_one", f"blip={small_blip}", "cpu", [guessed, stated])
    open_t2i("three_in_one", f"blip={small_blip}", "cpu", [stated])  # no warning, which would be an error
    for kind in ("spatial", "action"):
        (tmp_path / f"complex_val_{kind}.txt").write_text("X.\n")
    open_t2i("three_in_one", f"blip={small_blip},lists={tmp_path}", "cpu", [guessed])


@pytest.mark.parametrize(
    ("prompt", "category", "objects"),
    [
        ("a cat near a dog", "spatial", ["cat", "dog"]),
        ("a cat hidden by a man", "3d_spatial", ["cat", "person"]),
        ("two dogs and one cup", "numeracy", ["dog", "cup"]),
        ("The apple was next to the plate.", "complex", ["apple", "plate"]),
        ("The dog ran.", "complex", []),
        ("a red car", "color", []),
    ],
)
def test_the_objects_of_a_prompt(prompt: str, category: str, objects: list[str]) -> None:
    assert objects_of(Item(prompt, 0, category)) == objects
