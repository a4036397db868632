"""Every table that shows a score of GenEval or T2I-CompBench names the models that made it."""

import csv
import json
from dataclasses import replace

import pytest
from reports import ITEMS, Page, rows_of

from addiff_env.evaluation.metrics.models import (
    BY_SCRIPT,
    keep_imported,
    metric_models,
    model_notes,
    models_of,
    read_metric_models,
    run_models,
)
from addiff_env.evaluation.report.html import remake
from addiff_env.evaluation.report.pages import Run, fill_pages
from addiff_env.evaluation.run.rows import append_rows
from addiff_env.evaluation.run.run_folder import write_items, write_provenance

T2I = ["blip_vqa", "spatial", "spatial_3d", "numeracy", "non_spatial", "three_in_one"]


@pytest.mark.parametrize(
    ("setting", "score", "named"),
    [
        ("geneval", "geneval", ["facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"]),
        ("geneval:my/detr,colors=my/clip", "geneval", ["detector my/detr", "my/clip"]),
        ("geneval2", "soft_tifa_gm", ["Qwen/Qwen3-VL-8B-Instruct"]),
        ("geneval2:my/vlm", "soft_tifa_counting", ["my/vlm"]),
        ("blip_vqa", "blip_vqa", ["Salesforce/blip-vqa-capfilt-large"]),
        ("spatial:my/owl", "spatial", ["my/owl"]),
        ("spatial_3d:my/owl,depth=my/depth", "spatial_3d", ["my/owl", "my/depth"]),
        ("three_in_one:clip=clipscore:my", "three_in_one", ["Salesforce/blip", "google/owlv2", "clipscore:my"]),
        ("t2i_compbench:blip=my/blip", "blip_vqa", ["my/blip"]),
        ("t2i_compbench:blip=my/blip", "t2i_compbench", ["my/blip", "google/owlv2", "Intel/dpt", "ViT-B-32"]),
        ("clipscore:open_clip:ViT-H-14/laion", "clipscore", ["open_clip:ViT-H-14/laion"]),
    ],
)
def test_a_scores_models_are_those_of_its_setting_or_the_defaults(setting, score, named):
    words = models_of(score, metric_models([setting]))
    assert all(name in words for name in named), words


def test_scores_without_models_of_their_own_get_no_words():
    models = metric_models(["checker", "clip_score", "reward_score", "hpsv2.1", "geneval"])
    assert set(models) == {"geneval"} and model_notes(["success", "clip_score"], models) == []
    assert models_of("geneval_official", models) == BY_SCRIPT
    assert set(metric_models(["t2i_compbench"])) == {*T2I, "t2i_compbench"}
    with pytest.raises(ValueError, match="known options"):
        metric_models(["geneval:a,depth=b"])


def test_what_was_brought_in_is_not_credited_to_our_models(tmp_path):
    write_provenance(tmp_path, rows_of(), metric="geneval", metric_models=metric_models(["geneval"]))
    keep_imported(tmp_path, ["geneval", "mine"])
    assert read_metric_models(tmp_path) == {"geneval": BY_SCRIPT, "mine": BY_SCRIPT}
    assert json.loads((tmp_path / "provenance.json").read_text())["metric"] == "geneval"
    again = run_models(tmp_path, ["geneval", "blip_vqa"])
    assert again["geneval"] == BY_SCRIPT and "Salesforce" in again["blip_vqa"]
    keep_imported(tmp_path / "nowhere", ["x"])  # a run that was never reported has nothing to note it in


def test_an_earlier_run_is_read_by_its_configuration(tmp_path):
    assert read_metric_models(tmp_path) == {}
    for metrics, expected in (
        ("[geneval, checker]", {"geneval"}),
        ("blip_vqa", {"blip_vqa"}),
        ("null", set()),
    ):
        (tmp_path / "config.yaml").write_text(f"metrics: {metrics}\n")
        assert set(read_metric_models(tmp_path)) == expected


@pytest.fixture(scope="module", params=["geneval", "t2i_compbench"])
def reported(request, tmp_path_factory):
    """The score, a mark of its models, and a run that was reported with it."""
    folder, score = tmp_path_factory.mktemp("run"), request.param
    rows = [
        replace(
            row, scores={score: row.scores["success"], **({"blip_vqa": 0.5} if score != "geneval" else {})}, image=""
        )
        for row in rows_of()
    ]
    append_rows(folder / "rows.jsonl", rows)
    write_items(folder, ITEMS)
    write_provenance(folder, rows, benchmark="b", metric=score, metric_models=metric_models([f"{score}"]))
    (folder / "protocols.json").write_text(json.dumps({score: {"agent": {"colors": 0.5}}}))
    remake(folder, decide=False)
    return score, {"geneval": "facebook/mask2former-swin-small", "t2i_compbench": "Salesforce/blip"}[score], folder


def test_text_latex_and_csv_name_them(reported):
    score, mark, folder = reported
    assert f"{score} by " in (folder / "table.txt").read_text() and mark in (folder / "table.txt").read_text()
    captions = [line for line in (folder / "table.tex").read_text().splitlines() if line.startswith(r"\caption")]
    shows = [line for line in captions if "Verdicts" not in line]
    assert len(shows) == 3 and all(mark in line for line in shows)  # means, categories, protocol
    for name in ("table.csv", "table_whole.csv"):
        with (folder / name).open() as file:
            lines = [line for line in csv.DictReader(file) if line["metric"] == score]
        assert lines and all(mark in line["models"] for line in lines)
    with (folder / "table.csv").open() as file:
        assert {line["models"] for line in csv.DictReader(file) if line["metric"] == "nfe"} == {""}


def test_every_section_of_the_page_names_them(reported):
    score, mark, folder = reported
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    for section in ("methods", "metrics", "whole", "comparisons", "categories"):
        part = text[text.index(f'<section id="{section}">') :]
        assert mark in part[: part.index("</section>")], section


def test_pages_name_them(reported, tmp_path):
    score, mark, folder = reported
    run = Run("main", folder, "addiff evaluate", {})
    for part in ("table", "summary", "differences"):
        page = tmp_path / f"{part}.md"
        page.write_text(f"<!-- results: main/{part} -->\nold\n<!-- end: main/{part} -->\n")
        fill_pages([page], run)
        assert mark in page.read_text(), part
