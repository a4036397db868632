"""What an environment loads: the files of every model that its settings name. Nothing is loaded or fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from addiff_env.diffusion.backbones.open import PIPELINE_OPTIONS
from addiff_env.env.config import EnvConfig
from addiff_env.loading.presence import Group, Needed, finder, folder_of
from addiff_env.perception.encoders import OPEN_CLIP, parse_open_clip
from addiff_env.perception.scorers.clip_based import (
    AESTHETIC_CLIP,
    AESTHETIC_SOURCE,
    HPS_SOURCE,
    PICKSCORE,
    PICKSCORE_PROCESSOR,
)
from addiff_env.perception.scorers.image_reward import SOURCE as IMAGE_REWARD
from addiff_env.perception.scorers.image_reward import TOKENIZER as BERT
from addiff_env.perception.scorers.load import LOADERS, read_options
from addiff_env.storage.commands import command_line

INDEX = "model_index.json"
CONFIG: Group = ("config.json",)
PREPROCESSOR: Group = ("preprocessor_config.json", "processor_config.json")
TOKENIZER: Group = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
SAFE_DIFFUSERS: Group = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
SAFE_TRANSFORMERS: Group = ("model.safetensors", "model.safetensors.index.json")
TRANSFORMERS: Group = (*SAFE_TRANSFORMERS, "pytorch_model.bin", "pytorch_model.bin.index.json")
CHECKPOINTS = {"imagereward": IMAGE_REWARD, "hps": HPS_SOURCE, "aesthetic": AESTHETIC_SOURCE}


def required(config: EnvConfig) -> list[Needed]:
    """Everything that an environment of this configuration loads, in the order in which it does.

    Raises:
        ValueError: a setting of CLIP or of the scorer that cannot be read.
    """
    found = [pipeline(config.model, config.revision)]
    if config.lora is not None:
        found.append(_lora(config.lora))
    if config.preview == "taesd" and config.preview_model:
        found.append(_repository("preview_model", config.preview_model, CONFIG, SAFE_DIFFUSERS))
    found += clip("clip", config.clip)
    found.append(dino(config.dino))
    found += scorer(config.scorer)
    if isinstance(config.prompts, str):
        found.append(Needed("prompts", config.prompts))
    return list(dict.fromkeys(found))


def _repository(setting: str, place: str, *files: Group) -> Needed:
    """Of a folder or Hub id; what is fetched is the first name of every group."""
    return Needed(setting, place, files, fetch=command_line("hf", "download", place, *(group[0] for group in files)))


def pipeline(model: str, revision: str | None = None) -> Needed:
    """A diffusers pipeline: what its index lists, or the index where that is not there yet."""
    index = finder(model, revision)(INDEX)
    parts = _parts(index) if index is not None else ()
    named = "" if revision is None else f", revision={json.dumps(revision)}"
    code = (
        f"from diffusers import DiffusionPipeline; DiffusionPipeline.download({json.dumps(model)}{named}, {_OPTIONS})"
    )
    return Needed("model", model, ((INDEX,), *parts), revision, command_line("python", "-c", code))


_OPTIONS = ", ".join(f"{name}={value!r}" for name, value in PIPELINE_OPTIONS.items())  # as we load it


def _parts(index: Path) -> Iterator[Group]:
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError):  # told as a damaged file
        return
    for name, entry in entries:
        if name in PIPELINE_OPTIONS or not isinstance(entry, list) or not all(isinstance(word, str) for word in entry):
            continue  # settings, and parts that the pipeline goes without
        for group in _part_files(*entry):
            yield tuple(f"{name}/{file}" for file in group)


def _part_files(library: str, kind: str) -> tuple[Group, ...]:
    if kind.endswith("Scheduler"):
        return (("scheduler_config.json",),)
    if "Tokenizer" in kind:
        return (TOKENIZER,)
    if kind.endswith(("Processor", "FeatureExtractor")):
        return (PREPROCESSOR,)
    return (CONFIG, SAFE_DIFFUSERS if library == "diffusers" else SAFE_TRANSFORMERS)


def _lora(lora: str) -> Needed:
    """A file, or a folder or repository with one; diffusers takes any of a folder's."""
    if lora.endswith(".safetensors"):
        return Needed("lora", lora)
    folder = folder_of(lora)
    names = sorted(file.name for file in folder.glob("*.safetensors")) if folder else []
    return _repository("lora", lora, (*names, "pytorch_lora_weights.safetensors"))


def clip(setting: str, model: str) -> list[Needed]:
    """A CLIP of any form that `addiff_env.perception.encoders` lists; ValueError as there."""
    if not model.startswith(OPEN_CLIP):
        return [_repository(setting, model, CONFIG, TRANSFORMERS, TOKENIZER, PREPROCESSOR)]
    from open_clip import get_pretrained_cfg
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    weights: Group = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    try:
        architecture, tag = parse_open_clip(model.removeprefix(OPEN_CLIP))
    except FileNotFoundError:  # the file or folder that the setting names
        return [Needed(setting, model.removeprefix(OPEN_CLIP).removeprefix("local-dir:").rpartition("@")[2])]
    if tag is None:
        return [_repository(setting, architecture.partition(":")[2], (HF_CONFIG_NAME,), weights)]
    if Path(tag).is_file():
        return [Needed(setting, tag)]
    repository, _, file = get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")
    files = weights if not file else (file.rpartition(".")[0] + ".safetensors", file)
    return [_repository(setting, repository, files)]


def dino(model: str) -> Needed:
    """A DINO; a folder may be without a preprocessor's configuration."""
    further = (PREPROCESSOR,) if folder_of(model) is None else ()
    return _repository("dino", model, CONFIG, TRANSFORMERS, *further)


def scorer(setting: str) -> list[Needed]:
    """A scorer of any form that `addiff_env.perception.scorers` lists; ValueError for what cannot be read."""
    name, _, rest = setting.partition(":")
    if name == "clipscore":
        return clip("scorer", rest)
    if name not in LOADERS:
        return [Needed("scorer", setting, (CONFIG, SAFE_TRANSFORMERS))]
    path, options = read_options(setting, rest)
    if name == "pickscore":
        processor = options.get("processor") or path or PICKSCORE_PROCESSOR
        return [
            _repository("scorer", path or PICKSCORE, CONFIG, TRANSFORMERS),
            _repository("scorer", processor, TOKENIZER, PREPROCESSOR),
        ]
    source = CHECKPOINTS[name]
    file = (source.file,)
    is_file = path is not None and folder_of(path) is None
    found = [Needed("scorer", str(path)) if is_file else _repository("scorer", path or source.repository, file)]
    if name == "imagereward":
        found.append(_repository("scorer", options.get("tokenizer", BERT), ("tokenizer.json", "vocab.txt")))
    if name == "aesthetic":
        found += clip("scorer", options.get("clip", AESTHETIC_CLIP))
    return found
