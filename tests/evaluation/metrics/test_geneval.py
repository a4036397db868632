"""GenEval's rules: examples computed by hand, and an independent statement of the rules on random scenes."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.evaluation.metrics.detectors import (
    GENEVAL_CLASSES,
    BoxDetector,
    Detection,
    InstanceDetector,
    vocabulary,
)
from addiff_env.evaluation.metrics.geneval import (
    COLORS,
    RELATIONS,
    ClipColors,
    GenEvalRules,
    box_overlap,
    judge_picture,
    keep_detections,
    object_crop,
    relative_position,
    summarize,
)


def found(label, score=0.95, box=(0, 0, 10, 10), mask=None):
    return Detection(label, score, box, mask)


def single(label="cup", tag="single_object", **clause):
    return {"tag": tag, "include": [{"class": label, "count": 1, **clause}]}


# --------------------------------------------------------------------------- every tag by hand


def test_single_object_needs_more_than_the_threshold():
    assert judge_picture([found("cup", 0.31)], single()).correct
    assert not judge_picture([found("cup", 0.3)], single()).correct  # strictly above
    verdict = judge_picture([found("dog")], single())
    assert (verdict.correct, verdict.reason) == (False, "expected cup>=1, found 0")


def test_two_objects_need_both():
    metadata = {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
    assert judge_picture([found("cup"), found("dog")], metadata).correct
    assert judge_picture([found("cup"), found("dog"), found("cat")], metadata).correct  # others may be there
    assert not judge_picture([found("cup"), found("cup")], metadata).correct


def counting(number):
    exclude = [{"class": "cup", "count": number + 1}]
    return {"tag": "counting", "include": [{"class": "cup", "count": number}], "exclude": exclude}


@pytest.mark.parametrize(("sure", "unsure", "correct"), [(3, 0, True), (2, 1, False), (4, 0, False), (3, 5, True)])
def test_counting_is_exact_among_what_is_surer_than_090(sure, unsure, correct):
    detections = [found("cup", 0.91)] * sure + [found("cup", 0.9)] * unsure
    assert judge_picture(detections, counting(3)).correct is correct


def test_counting_says_what_it_found():
    assert judge_picture([found("cup")] * 4, counting(3)).reason == "expected cup<4, found 4"
    assert judge_picture([found("cup")] * 20, counting(3)).reason == "expected cup<4, found 16"  # at most 16 are kept


def named(colors):
    """A colour classifier that reads an object's colour off its left edge."""
    return lambda objects: [colors[int(o.box[0])] for o in objects]


def test_colors_are_asked_of_the_surest_object_only():
    metadata = single(tag="colors", color="red")
    two = [found("cup", 0.8, (0, 0, 5, 5)), found("cup", 0.9, (1, 0, 5, 5))]
    assert judge_picture(two, metadata, named({0: "blue", 1: "red"})).correct
    verdict = judge_picture(two, metadata, named({0: "red", 1: "blue"}))
    assert (verdict.correct, verdict.reason) == (False, "expected red cup>=1, found blue")


def test_color_attribution_needs_each_object_in_its_color():
    include = [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "black"}]
    metadata = {"tag": "color_attr", "include": include}
    pair = [found("cup", box=(0, 0, 5, 5)), found("dog", box=(1, 0, 5, 5))]
    assert judge_picture(pair, metadata, named({0: "red", 1: "black"})).correct
    assert not judge_picture(pair, metadata, named({0: "black", 1: "red"})).correct


def test_a_missing_or_wrong_classifier_is_an_error_and_no_verdict():
    with pytest.raises(ValueError, match="no colour classifier"):
        judge_picture([found("cup")], single(color="red"))
    with pytest.raises(ValueError, match="named 2 colours for 1 objects"):
        judge_picture([found("cup")], single(color="red"), lambda objects: ["red", "red"])


def position(relation):
    include = [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include}


@pytest.mark.parametrize(
    ("box", "holds"),
    [
        ((20, 0, 30, 10), {"right of"}),
        ((-20, 0, -10, 10), {"left of"}),
        ((0, 20, 10, 30), {"below"}),
        ((0, -20, 10, -10), {"above"}),
        ((20, 20, 30, 30), {"right of", "below"}),  # 18 of 20 along both: .64 of the length each
        ((2, 0, 12, 10), set()),  # offset 2 = .1 * (10 + 10): nothing remains
        ((2.1, 0, 12.1, 10), set()),  # .1 of 2.1 remains: .05 of the length
        ((4, 0, 14, 10), set()),  # 2 of 4 remain: exactly a half does not do
        ((4.1, 0, 14.1, 10), {"right of"}),  # 2.1 of 4.1
        ((0, 0, 10, 10), set()),
        ((20, 10, 30, 20), {"right of"}),  # offset (20, 10): (18, 8) / 22.4 = (.80, .36)
    ],
)
def test_positions_by_hand(box, holds):
    reference, seen = found("cup", box=(0, 0, 10, 10)), found("dog", box=box)
    assert relative_position(seen, reference) == holds
    for relation in RELATIONS:
        assert judge_picture([reference, seen], position(relation)).correct is (relation in holds)


def test_position_uses_extents_along_each_axis():
    # Wide objects: .1 * (100 + 100) = 20 of the offset of 30 is discounted sideways, nothing but 2 downwards.
    wide, other = found("a", box=(0, 0, 100, 10)), found("b", box=(30, 12, 130, 22))
    assert relative_position(other, wide) == set()  # (10, 10) / 32.3 = (.31, .31)
    assert relative_position(found("b", box=(30, 42, 130, 52)), wide) == {"below"}  # (10, 40) / 51.6


def test_position_of_a_missing_target():
    verdict = judge_picture([found("dog")], position("above"))
    assert verdict.reason == "expected cup>=1, found 0; no target for dog to be above"
    with pytest.raises(ValueError, match="expected a relation"):
        judge_picture([found("cup"), found("dog")], position("behind"))
    forward = {"tag": "position", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}
    with pytest.raises(ValueError, match="earlier clause"):
        judge_picture([found("cup")], forward)


def test_every_object_must_stand_right_to_every_target():
    include = [{"class": "cup", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    cups = [found("cup", box=(0, 0, 10, 10)), found("cup", 0.9, box=(60, 0, 70, 10))]
    metadata = {"tag": "position", "include": include}
    assert not judge_picture([*cups, found("dog", box=(30, 0, 40, 10))], metadata).correct
    assert judge_picture([*cups, found("dog", box=(90, 0, 99, 10))], metadata).correct


def test_overlap_counts_border_pixels():
    assert box_overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert box_overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert box_overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0.0
    assert box_overlap((5, 5, 0, 0), (5, 5, 0, 0)) == 0.0


def test_overlapping_boxes_are_one_object_where_asked():
    cups = [found("cup", 0.99), found("cup", 0.98, (1, 0, 11, 10)), found("cup", 0.97, (40, 0, 50, 10))]
    assert len(keep_detections(cups, "counting")["cup"]) == 3
    kept = keep_detections(cups, "counting", GenEvalRules(max_overlap=0.5))["cup"]
    assert [c.score for c in kept] == [0.99, 0.97]


def test_summary_is_the_mean_over_tags():
    results = [("colors", True)] * 3 + [("colors", False)] + [("position", False)] * 9 + [("position", True)]
    assert summarize(results) == pytest.approx({"colors": 0.75, "position": 0.1, "overall": 0.425})
    with pytest.raises(ValueError, match="no GenEval results"):
        summarize([])


# --------------------------------------------------------------------------- the rules, stated a second time


def plain_verdict(detections, metadata, colors):
    """The published rules in plain arithmetic, one object at a time."""
    least = 0.9 if metadata["tag"] == "counting" else 0.3

    def visible(label):
        objects = [d for d in detections if d.label == label and d.score > least]
        return sorted(objects, key=lambda d: -d.score)[:16]

    good = []
    for clause in metadata["include"]:
        objects = visible(clause["class"])[: clause["count"]]
        fine = len(objects) == clause["count"]
        if fine and "color" in clause:
            fine = all(colors[d] == clause["color"] for d in objects)
        if fine and "position" in clause:
            relation, index = clause["position"]
            targets = good[index]
            fine = targets is not None and all(plain_relation(d, t, relation) for d in objects for t in targets)
        good.append(objects if fine else None)
    too_many = any(len(visible(c["class"])) >= c["count"] for c in metadata.get("exclude", []))
    return None not in good and not too_many


def plain_relation(a, b, relation):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    dx, dy = (ax0 + ax1) / 2 - (bx0 + bx1) / 2, (ay0 + ay1) / 2 - (by0 + by1) / 2
    if relation in ("left of", "right of"):
        along, reach = dx, 0.1 * (abs(ax1 - ax0) + abs(bx1 - bx0))
    else:
        along, reach = dy, 0.1 * (abs(ay1 - ay0) + abs(by1 - by0))
    if relation in ("left of", "above"):
        along = -along
    return along > 0 and along - reach > 0.5 * math.hypot(dx, dy)


LABELS = ("cup", "dog")
EDGES = st.integers(0, 30)


@st.composite
def scenes(draw):
    scores = draw(st.lists(st.integers(1, 999), max_size=10, unique=True))
    scene = []
    for score in scores:
        x, y, w, h = draw(EDGES), draw(EDGES), draw(st.integers(1, 13)), draw(st.integers(1, 13))
        label = draw(st.sampled_from(LABELS))
        scene.append(Detection(label, max(score, draw(st.sampled_from([1, 950]))) / 1000, (x, y, x + w, y + h)))
    distinct = {d.score: d for d in scene}  # ties have no order that the rules promise
    return list(distinct.values())


@st.composite
def demands(draw):
    tag = draw(st.sampled_from(["single_object", "two_object", "counting", "colors", "position", "color_attr"]))
    include = [{"class": label, "count": draw(st.integers(1, 3))} for label in draw(st.permutations(LABELS))]
    for clause in include:
        if tag in ("colors", "color_attr"):
            clause["color"] = draw(st.sampled_from(["red", "blue"]))
    if tag == "position":
        include[1]["position"] = [draw(st.sampled_from(RELATIONS)), 0]
    metadata = {"tag": tag, "include": include}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return metadata


@given(scenes(), demands(), st.integers(0, 2**20))
def test_verdicts_equal_a_second_statement_of_the_rules(scene, metadata, bits):
    colors = {d: ("red", "blue")[bits >> k & 1] for k, d in enumerate(scene)}
    verdict = judge_picture(scene, metadata, lambda objects: [colors[d] for d in objects])
    assert verdict.correct is plain_verdict(scene, metadata, colors)
    assert bool(verdict.reason) is not verdict.correct


@given(scenes(), st.sampled_from(["counting", "colors"]), st.randoms(use_true_random=False))
def test_the_order_of_detections_does_not_matter(scene, tag, order):
    shuffled = scene[:]
    order.shuffle(shuffled)
    assert keep_detections(shuffled, tag) == keep_detections(scene, tag)


@given(scenes())
def test_opposite_relations_mirror_each_other(scene):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for a in scene[:4]:
        for b in scene[:4]:
            assert {opposite[r] for r in relative_position(a, b)} == relative_position(b, a)


# --------------------------------------------------------------------------- pictures and models


def test_crops_grey_out_what_is_not_the_object():
    picture = Image.new("RGB", (8, 6), (255, 0, 0))
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    crop = np.asarray(object_crop(picture, found("cup", box=(1, 1, 5, 4), mask=mask), (153, 153, 153)))
    assert crop.shape == (3, 4, 3)
    assert (crop[:, 0] == 153).all() and (crop[:, 1:] == (255, 0, 0)).all()
    whole = np.asarray(object_crop(picture, found("cup", box=(0, 0, 8, 6)), (0, 0, 0)))
    assert (whole == (255, 0, 0)).all()
    with pytest.raises(ValueError, match=r"mask of \(6, 8\) for a picture of \(8, 8\)"):
        object_crop(picture.resize((8, 8)), found("cup", mask=mask), (0, 0, 0))


def test_the_vocabulary_is_coco_under_genevals_names():
    assert len(GENEVAL_CLASSES) == len(set(GENEVAL_CLASSES)) == 80
    coco = {
        k: {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}.get(name, name)
        for k, name in enumerate(GENEVAL_CLASSES)
    }
    names = vocabulary({**coco, 99: "N/A"})
    assert tuple(names.values()) == GENEVAL_CLASSES and 99 not in names
    del coco[0]
    with pytest.raises(ValueError, match=r"1 of GenEval's classes: \['person'\]"):
        vocabulary(coco)


COCO_BY_PASCAL_VOC = (  # the label set of the Mask2Former COCO-instance and RT-DETR checkpoints
    "person,bicycle,car,motorbike,aeroplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,sofa,"
    "pottedplant,bed,diningtable,toilet,tvmonitor,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)


@pytest.mark.parametrize("other", [{}, {"hair drier": "hair dryer", "cell phone": "cellphone"}])
def test_the_vocabulary_knows_what_checkpoints_call_its_classes(other):
    labels = [other.get(name, name) for name in COCO_BY_PASCAL_VOC.split(",")]
    assert tuple(vocabulary(dict(enumerate(labels))).values()) == GENEVAL_CLASSES


@pytest.mark.skipif(not os.environ.get("ADDIFF_DATA"), reason="ADDIFF_DATA names no folder of benchmark lists")
def test_the_vocabulary_is_the_published_one():
    published = Path(os.environ["ADDIFF_DATA"], "geneval/object_names.txt").read_text().split("\n")
    assert tuple(filter(None, published)) == GENEVAL_CLASSES


@pytest.fixture(scope="module")
def small_detector(tmp_path_factory):
    """A Mask2Former folder with few and random weights."""
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        num_labels=80, id2label=dict(enumerate(GENEVAL_CLASSES)),
        label2id={name: k for k, name in enumerate(GENEVAL_CLASSES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_the_instance_detector_gives_boxes_around_its_masks(small_detector, rng):
    picture = Image.fromarray(rng.integers(0, 255, (48, 80, 3), np.uint8))
    detect = InstanceDetector(str(small_detector))
    detections = detect(picture)
    assert detections and detect.name == str(small_detector)
    assert [d.score for d in detections] == sorted((d.score for d in detections), reverse=True)
    for d in detections:
        rows, columns = np.nonzero(d.mask)
        assert d.mask.shape == (48, 80) and d.label in GENEVAL_CLASSES and 0 <= d.score <= 1
        assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert object_crop(picture, d, (0, 0, 0)).size == (d.box[2] - d.box[0], d.box[3] - d.box[1])


def test_the_instance_detector_agrees_with_its_processor_at_the_size_that_that_works_at(small_detector, rng):
    import torch

    picture = Image.fromarray(rng.integers(0, 255, (384, 384, 3), np.uint8))
    detect = InstanceDetector(str(small_detector))
    with torch.inference_mode():
        outputs = detect.model(**detect.processor(images=picture, return_tensors="pt"))
    (theirs,) = detect.processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    pairs = zip(theirs["segments_info"], theirs["segmentation"].numpy(), strict=True)
    expected = {(GENEVAL_CLASSES[info["label_id"]], mask.astype(bool).tobytes()): info["score"] for info, mask in pairs}
    assert {(d.label, d.mask.tobytes()): d.score for d in detect(picture)} == pytest.approx(expected, abs=2e-6)


def test_masks_are_cut_out_at_the_size_of_the_picture(small_detector):
    import torch

    detect = InstanceDetector(str(small_detector))
    masks = torch.tensor([[-1.0, -1.0, 2.0, 2.0]] * 4)[None, None]
    classes = torch.full((1, 1, 81), -20.0)
    classes[0, 0, :2] = torch.tensor([1.0, 0.0])
    detect.model = lambda **_: SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    (only,) = detect(Image.new("RGB", (1000, 600)))
    # By hand: from -1 at column 375 to 2 at column 625 the logits pass 0 at 458.33; column k has its centre at k + 0.5.
    assert only.label == GENEVAL_CLASSES[0] and only.box == (458, 0, 1000, 600)
    column = np.arange(458, 1000) + 0.5
    certainty = (1 / (1 + np.exp(-np.minimum(-1 + 3 * (column - 375) / 250, 2)))).mean()
    assert only.score == pytest.approx(certainty / (1 + np.exp(-1)), abs=1e-5)
    masks.fill_(-1)
    assert detect(Image.new("RGB", (1000, 600))) == []  # an empty mask is no object


def test_the_box_detector_gives_boxes_in_the_picture(tmp_path, rng):
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 64],
        num_detection_tokens=5, num_labels=80, id2label=dict(enumerate(GENEVAL_CLASSES)),
        label2id={name: k for k, name in enumerate(GENEVAL_CLASSES)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    detections = BoxDetector(str(tmp_path))(Image.fromarray(rng.integers(0, 255, (48, 80, 3), np.uint8)))
    assert len(detections) == 5 and all(d.label in GENEVAL_CLASSES and d.mask is None for d in detections)
    assert [d.score for d in detections] == sorted((d.score for d in detections), reverse=True)
    for d in detections:
        left, top, right, bottom = d.box
        assert 0 < right - left <= 80.1 and 0 < bottom - top <= 48.1  # in the picture's own pixels


def test_clip_names_colors_by_the_nearest_text(tiny_kwargs):
    # The packaged CLIP knows the embedded world's colours, though not the words "photo" and "object".
    folder = tiny_kwargs.get("clip") or str(Path(__file__).parents[3] / "addiff_env/tiny/weights/clip")
    colors = ClipColors(folder)
    picture = Image.new("RGB", (64, 64), (235, 235, 235))
    picture.paste((220, 30, 30), (16, 16, 48, 48))
    objects = [found("square", box=(0, 0, 64, 64)), found("square", 0.9, box=(8, 8, 56, 56))]
    named_colors = colors.of(picture)(objects)
    assert len(named_colors) == 2 and set(named_colors) <= set(COLORS)
    assert colors._class_features("square").norm(dim=-1).tolist() == pytest.approx([1.0] * len(COLORS), abs=1e-5)
