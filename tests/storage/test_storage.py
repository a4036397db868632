"""Folders and files that several processes work in, names of files, and what is said of damaged ones."""

import os
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from processes import everything, held

from addiff_env.storage.files import (
    FolderBusyError,
    claim,
    claim_file,
    file_name,
    read_json,
    read_text,
    read_yaml,
    replacing,
    write_whole,
)
from addiff_env.storage.pictures import open_picture, read_picture

PARSER = OverridesParser.create()
ROOT = Path(__file__).resolve().parents[2]


def test_a_second_program_is_refused_by_name_and_leaves_everything_as_it_was(tmp_path):
    with held("claim", tmp_path, "evaluate.py") as process:
        before = everything(tmp_path)
        with pytest.raises(FolderBusyError) as error, claim(tmp_path, "a training"):
            pass
        for word in (str(tmp_path), "evaluate.py", str(process.pid), os.uname().nodename):
            assert word in str(error.value)
        assert everything(tmp_path) == before
    with claim(tmp_path, "a training"):  # a killed process lets go
        with pytest.raises(FolderBusyError, match="a training"), claim(tmp_path, "evaluate.py"):
            pass
    assert [path.name for path in tmp_path.iterdir() if "held" in path.name] == []  # nor does anything stay behind


def test_members_of_one_group_work_side_by_side_and_each_of_them_once(tmp_path):
    with held("claim", tmp_path, "evaluate.py", "shards of 8", "3"):
        with claim(tmp_path, "evaluate.py", "shards of 8", "4"), claim(tmp_path, "evaluate.py", "shards of 8", "30"):
            pass
        for others in (("shards of 8", "3"), ("shards of 4", "1"), ("shards of 80", "3"), ()):
            with pytest.raises(FolderBusyError, match="evaluate.py"), claim(tmp_path, "evaluate.py", *others):
                pass


def test_a_file_is_held_without_its_folder(tmp_path):
    with held("claim_file", tmp_path / "b.jsonl", "baseline_cache"):
        with pytest.raises(FolderBusyError, match=r"b\.jsonl"), claim_file(tmp_path / "b.jsonl", "baseline_cache"):
            pass
        with claim_file(tmp_path / "c.jsonl", "baseline_cache"), claim(tmp_path, "a training"):
            pass


def test_a_job_that_was_queued_again_waits_for_its_predecessor(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held("claim", tmp_path, "a training", seconds=1.5), claim(tmp_path, "a training"):
        pass


def test_a_folder_that_was_removed_meanwhile_hides_no_error(tmp_path):
    with pytest.raises(KeyError, match="its own"), claim(tmp_path / "run", "a training"):
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        (tmp_path / "run").rmdir()
        raise KeyError("its own")


# --------------------------------------------------------------------------- names


@settings(max_examples=50)
@given(st.lists(st.text(max_size=300), min_size=2, max_size=5, unique=True))
@example(["best-of-2:ddim-5", "best-of-2_ddim-5", "a/b", "a_b", "..", "", ".hidden", "-x", "CON", "日本語の" * 60])
@example([file_name("a b"), "a b"])
def test_any_text_becomes_one_short_name_and_different_texts_different_ones(texts):
    names = [file_name(text) for text in texts]
    assert len(set(names)) == len(texts) and names == [file_name(text) for text in texts]
    for name in names:
        assert 0 < len(name.encode()) <= 143 and Path(name).name == name and name[0] not in ".-"
        override = PARSER.parse_override(f"agent=runs/{name}/agent")
        assert override.value() == f"runs/{name}/agent"


@pytest.mark.parametrize("name", ["ddim-10", "dpmpp_2m-20", "seed-0", "words-2.5"])
def test_plain_names_stay(name):
    assert file_name(name) == name


# --------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"a": NaN', b"\x00" * 9])
def test_damaged_json_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "kept.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"kept\.json"):
        read_json(tmp_path / "kept.json")


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"a: {b", b"\t- x", b"a: 1\na: 2: 3"])
def test_damaged_yaml_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "space.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"space\.yaml"):
        read_yaml(tmp_path / "space.yaml")


def picture_bytes(tmp_path):
    path = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 20, 60, 1500])
def test_a_damaged_picture_is_refused_with_its_name(tmp_path, keep):
    (tmp_path / "cut.png").write_bytes(picture_bytes(tmp_path)[:keep])
    with pytest.raises(ValueError, match=r"cut\.png"):
        open_picture(tmp_path / "cut.png")


@pytest.mark.parametrize("read", [read_json, read_yaml, read_text, read_picture])
def test_what_cannot_be_read_at_all_is_named(tmp_path, read):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder"):
        read(tmp_path / "folder.png")
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent.png")


def test_whole_files_read_as_they_were_written(tmp_path):
    write_whole(tmp_path / "a.json", '{"prompt": "\u2028é"}')
    assert read_json(tmp_path / "a.json") == {"prompt": "\u2028é"}
    write_whole(tmp_path / "a.yaml", "a: {b: 1}")
    assert read_yaml(tmp_path / "a.yaml") == OmegaConf.create({"a": {"b": 1}})
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_file_that_is_written_anew_stays_as_it_was_where_that_fails(tmp_path):
    path = tmp_path / "kept.bin"
    for number in range(2):
        with replacing(path) as partial:
            partial.write_bytes(b"%d" % number)
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"1" and list(tmp_path.iterdir()) == [path]
