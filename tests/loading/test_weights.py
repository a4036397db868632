"""No network runs on weights that its files do not hold: every kind of folder, with a tensor gone, changed or added."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderTiny
from models import BUILDERS, head, save
from safetensors.torch import load_file, save_file

import addiff_env
from addiff_env.agent import Agent, PolicyNet
from addiff_env.diffusion.backbones import load_backbone
from addiff_env.evaluation.metrics.detectors import GENEVAL_CLASSES, BoxDetector, InstanceDetector, WordDetector
from addiff_env.evaluation.metrics.geneval import ClipColors
from addiff_env.evaluation.metrics.t2i_compbench import BlipVqa, DepthEstimator
from addiff_env.loading.paths import resolve_model
from addiff_env.loading.weights import quiet_loading
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.previews import load_tiny_decoder
from addiff_env.perception.scorers import load_scorer
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

Open = Callable[[Path], Any]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
LABELS: dict[str, Any] = {
    "id2label": dict(enumerate(GENEVAL_CLASSES)),
    "label2id": {name: k for k, name in enumerate(GENEVAL_CLASSES)},
}

# ------------------------------------------------------------------ folders of every kind


def packaged(name: str, folder: Path) -> None:
    shutil.copytree(resolve_model(addiff_env.TINY[name]), folder)


def preview(folder: Path) -> None:
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)


def open_clip_model(folder: Path) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


def agent(folder: Path) -> None:
    parts = {"a": 2, "b": 1}
    Agent(PolicyNet(parts), {"observation": parts, "hidden": 128}).save(folder)


def mask2former(folder: Path) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, out_features=stages
    )
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    depths = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    config = Mask2FormerConfig(backbone_config=swin, **widths, **depths, dim_feedforward=16, **LABELS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def yolos(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(**SIZES, num_hidden_layers=1, image_size=[64, 64], num_detection_tokens=5, **LABELS)
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def blip(folder: Path) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    text = {**SIZES, "num_hidden_layers": 1, "encoder_hidden_size": 16, "vocab_size": len(words) + 2}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    special = {"bos_token_id": len(words), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text | special, vision_config=vision, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)


def owlvit(folder: Path) -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    tokenizer = build_tokenizer()
    text = {**SIZES, "num_hidden_layers": 1, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 64, "patch_size": 32}
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    OwlViTProcessor(OwlViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)


def dpt(folder: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    necks = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    config = DPTConfig(**SIZES, **necks, num_hidden_layers=4, image_size=32, patch_size=16)
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def pipeline(kind: str, folder: Path) -> None:
    BUILDERS[kind]().save_pretrained(folder)


def open_backbone(folder: Path) -> Any:
    return load_backbone(str(folder), attention_stride=2)


def aesthetic(folder: Path) -> None:
    folder.mkdir()
    head(folder / "head.safetensors")


def open_aesthetic(folder: Path) -> Any:
    return load_scorer(f"aesthetic:{folder / 'head.safetensors'},clip={addiff_env.TINY['clip']}")


KINDS: dict[str, tuple[Callable[[Path], None], Open]] = {
    **{kind: (partial(pipeline, kind), open_backbone) for kind in BUILDERS},
    "preview": (preview, lambda folder: load_tiny_decoder(str(folder), "cpu", "float32")),
    "clip": (partial(packaged, "clip"), lambda folder: load_clip(str(folder), "cpu")),
    "open_clip": (open_clip_model, lambda folder: load_clip(f"open_clip:local-dir:{folder}", "cpu")),
    "dino": (partial(packaged, "dino"), lambda folder: load_dino(str(folder), "cpu")),
    "reward": (partial(packaged, "scorer"), lambda folder: load_scorer(str(folder))),
    "pickscore": (partial(packaged, "clip"), lambda folder: load_scorer(f"pickscore:{folder}")),
    "aesthetic": (aesthetic, open_aesthetic),
    "colors": (partial(packaged, "clip"), lambda folder: ClipColors(str(folder))),
    "mask2former": (mask2former, lambda folder: InstanceDetector(str(folder))),
    "yolos": (yolos, lambda folder: BoxDetector(str(folder))),
    "blip": (blip, lambda folder: BlipVqa(str(folder))),
    "owlvit": (owlvit, lambda folder: WordDetector(str(folder))),
    "dpt": (dpt, lambda folder: DepthEstimator(str(folder))),
    "agent": (agent, Agent.load),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of each kind, made when it is first asked for."""
    root = tmp_path_factory.mktemp("sound")

    class Folders(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                KINDS[kind][0](root / kind)
            self[kind] = root / kind
            return self[kind]

    return Folders()


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """Rewrite a file of weights after ``edit``, which returns the name of the tensor it changed."""
    state = load_file(file)
    name = edit(state)
    save_file(state, file, {"format": "pt"})
    return name


def matrix(state: dict[str, torch.Tensor], place: float = 0.5) -> str:
    """The name of a weight somewhere in the network, which is not tied to another."""
    names = [
        name for name, value in state.items() if value.ndim > 1 and "embed" not in name and "predictions" not in name
    ]
    return names[int(place * len(names))]


def drop(state: dict[str, torch.Tensor]) -> str:
    name = matrix(state)
    del state[name]
    return name


def reshape(state: dict[str, torch.Tensor]) -> str:
    name = matrix(state)
    state[name] = torch.cat([state[name]] * 2)
    return name


def add(state: dict[str, torch.Tensor]) -> str:
    name = matrix(state)
    stranger = name.removesuffix("weight") + "stranger"
    state[stranger] = torch.ones(2)
    return stranger


def overflow(state: dict[str, torch.Tensor]) -> str:
    name = matrix(state)
    state[name].flatten()[-1] = float("inf")
    return name


def spoil(state: dict[str, torch.Tensor]) -> str:
    name = matrix(state)
    state[name].flatten()[0] = float("nan")
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_the_networks_are_refused(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """In every file of the folder in turn; the message names the tensor."""
    opened = KINDS[kind][1]
    opened(sound[kind])
    for number, file in enumerate(weights(sound[kind])):
        for edit in (drop, reshape, add):
            folder = tmp_path / f"{number}-{edit.__name__}"
            shutil.copytree(sound[kind], folder)
            name = change(folder / file.relative_to(sound[kind]), edit)
            with pytest.raises(ValueError) as error:
                opened(folder)
            told = str(error.value)
            known = 1 if kind == "mask2former" else 2  # a library renames its layers on their way
            last = [part for part in name.split(".") if not part.isdigit()][-known:]
            assert str(folder) in told and all(part in told for part in last), (edit, name, told)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """One number of one tensor of any file; the message names the tensor, as far as a library keeps its name."""
    for number, file in enumerate(weights(sound[kind])):
        edit = (overflow, spoil)[number % 2]
        shutil.copytree(sound[kind], folder := tmp_path / str(number))
        name = change(folder / file.relative_to(sound[kind]), edit)
        with pytest.raises(ValueError, match=str(folder)) as error:
            KINDS[kind][1](folder)
        if kind != "agent":  # whose configuration says which weights are its own
            assert "not finite" in str(error.value) and name.rpartition(".")[2] in str(error.value)


def test_an_agent_that_learnt_itself_to_pieces_is_refused(tmp_path: Path) -> None:
    parts = {"a": 2, "b": 1}
    net = PolicyNet(parts)
    next(net.parameters()).data[0] = float("nan")
    Agent(net, {"observation": parts, "hidden": 128}).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="agent.*not finite"):
        Agent.load(tmp_path / "agent")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_weights_are_refused(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    opened = KINDS[kind][1]
    for number, file in enumerate(weights(sound[kind])):
        for share in (0, 0.6):
            folder = tmp_path / f"{number}-{share}"
            shutil.copytree(sound[kind], folder)
            data = file.read_bytes()
            (folder / file.relative_to(sound[kind])).write_bytes(data[: int(share * len(data))])
            with pytest.raises(ValueError, match=str(folder)) as error:
                opened(folder)
            assert file.name in str(error.value)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [Path.unlink, cut])
def test_every_other_file_may_be_missing_or_cut(
    sound: dict[str, Path], tmp_path: Path, kind: str, spoiled: Callable[[Path], None]
) -> None:
    """The model is refused with its folder's name, or can do without; in a file that is cut, the file is named too."""
    for number, file in enumerate(set(sound[kind].rglob("*.*")) - set(weights(sound[kind]))):
        shutil.copytree(sound[kind], folder := tmp_path / str(number))
        spoiled(folder / file.relative_to(sound[kind]))
        try:
            opened = KINDS[kind][1](folder)
            if kind in BUILDERS:
                opened.encode(["a red circle"])
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            assert spoiled is Path.unlink or file.name in str(error)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "clip", "colors", "blip", "owlvit"])
def test_a_tokenizer_without_a_vocabulary_is_refused(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    shutil.copytree(sound[kind], folder := tmp_path / "folder")
    for file in folder.rglob("*"):
        if file.name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"):
            file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
        KINDS[kind][1](folder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("agent", "aesthetic", "open_clip")])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    with pytest.raises((ValueError, FileNotFoundError), match=r"model\.ckpt"):
        KINDS[kind][1](tmp_path / "model.ckpt")


COMPUTED = "encoder.layers.0.position_ids", "x.norm.num_batches_tracked", "b.attention.self.relative_position_index"


@pytest.mark.parametrize("kind", ["sd", "clip", "colors", "mask2former", "owlvit"])
def test_what_libraries_compute_themselves_may_lie_in_the_file(
    sound: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    shutil.copytree(sound[kind], tmp_path / "folder")
    for file in weights(tmp_path / "folder"):
        change(file, lambda state: state.update({name: torch.arange(3) for name in COMPUTED}))
    KINDS[kind][1](tmp_path / "folder")


def test_depth_models_lack_what_the_published_ones_lack(sound: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sound["dpt"], tmp_path / "folder")
    (file,) = weights(tmp_path / "folder")
    state = {name: value for name, value in load_file(file).items() if "layers.0.residual_layer1" not in name}
    save_file(state, file, {"format": "pt"})
    DepthEstimator(str(tmp_path / "folder"))


def test_weights_in_several_files_are_whole(tmp_path: Path) -> None:
    pipeline("flux", tmp_path / "flux")
    sharded = tmp_path / "flux" / "transformer"
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    for part, kind in (("transformer", FluxTransformer2DModel), ("text_encoder_2", T5EncoderModel)):
        model = kind.from_pretrained(tmp_path / "flux" / part)
        shutil.rmtree(tmp_path / "flux" / part)
        model.save_pretrained(tmp_path / "flux" / part, max_shard_size="40KB")
        assert len(weights(tmp_path / "flux" / part)) > 1
    open_backbone(tmp_path / "flux")
    index = next(sharded.glob("*.index.json"))
    listed = json.loads(index.read_text())
    name, file = sorted(listed["weight_map"].items())[5]
    change(sharded / file, lambda state: state.pop(name))
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        open_backbone(tmp_path / "flux")


def test_only_known_noise_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with quiet_loading():
            log.warning("Expected types for vae: (A,), got B.")
            log.warning("This checkpoint is not what it seems.")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"This checkpoint is not what it seems."}


# ------------------------------------------------------------------ LoRAs


@pytest.fixture(scope="module")
def loras(sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA of each kind of model, as diffusers saves them; of text encoders, too, where diffusers does."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    made = {}
    for kind, network in (("sd", "unet"), ("sdxl", "unet"), ("flux", "transformer")):
        loaded = DiffusionPipeline.from_pretrained(sound[kind], safety_checker=None)
        layers = {}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for part, targets in ((network, ["to_q", "to_v"]), ("text_encoder", ["q_proj"])):
                model = getattr(loaded, part)
                model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
                layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        made[kind] = tmp_path_factory.mktemp(f"lora-{kind}")
        type(loaded).save_lora_weights(made[kind], **layers)
        assert len(load_file(next(made[kind].iterdir()))) == sum(map(len, layers.values()))
    return made


def with_lora(model: Path, lora: Path, **more: Any) -> Any:
    return load_backbone(str(model), attention_stride=2, lora=str(lora), **more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_a_lora_that_fits_is_taken(sound: dict[str, Path], loras: dict[str, Path], kind: str, dtype: str) -> None:
    plain = open_backbone(sound[kind])
    for lora in (loras[kind], next(loras[kind].iterdir())):
        changed = with_lora(sound[kind], lora, dtype=dtype)
        for name in ("unet",) if kind != "flux" else ("transformer",):
            pairs = zip(getattr(plain, name).parameters(), getattr(changed, name).parameters(), strict=True)
            assert not all(torch.equal(one.to(other.dtype), other) for one, other in pairs)


def renamed(state: dict[str, torch.Tensor], share: float, how: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """A LoRA in which the first ``share`` of layers have other names."""
    stems = sorted({name.split(".lora")[0] for name in state})
    chosen = stems[: max(1, round(share * len(stems)))]
    return {how(name) if name.split(".lora")[0] in chosen else name: value for name, value in state.items()}


OTHERS: dict[str, Callable[[str], str]] = {
    "layer": lambda name: name.replace("blocks.", "blocks.7", 1).replace("layers.", "layers.7", 1),
    "network": lambda name: "prior." + name.partition(".")[2],
    "no prefix": lambda name: name.partition(".")[2],
}


@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_lora_of_which_something_does_not_apply_is_refused(
    sound: dict[str, Path], loras: dict[str, Path], tmp_path: Path, kind: str, share: float, how: str
) -> None:
    state = renamed(load_file(next(loras[kind].iterdir())), share, OTHERS[how])
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors"):
        with_lora(sound[kind], tmp_path / "lora.safetensors")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_lora_layer_is_refused(
    sound: dict[str, Path], loras: dict[str, Path], tmp_path: Path, half: str
) -> None:
    state = load_file(next(loras["sd"].iterdir()))
    name = sorted(name for name in state if half in name and name.startswith("unet."))[0]
    del state[name]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError) as error:
        with_lora(sound["sd"], tmp_path / "lora.safetensors")
    assert name.removeprefix("unet.").partition(".lora")[0] in str(error.value)


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("what", ["no tensors", "first matrices", "second matrices", "a stranger", "another layer's"])
def test_what_no_lora_holds_is_refused_and_named(
    sound: dict[str, Path], loras: dict[str, Path], tmp_path: Path, kind: str, what: str
) -> None:
    state = load_file(next(loras[kind].iterdir()))
    name = ""
    if what == "no tensors":
        state = {}
    elif what.endswith("matrices"):
        kept, gone = ("lora_A", "lora_B") if what.startswith("first") else ("lora_B", "lora_A")
        name = next(name for name in sorted(state) if gone in name)
        state = {name: value for name, value in state.items() if kept in name}
    elif what == "a stranger":
        state[name := "some.weight"] = torch.ones(2)
    else:
        part = "text_encoder.encoder.layers.99.q_proj" if kind == "sd" else "transformer.blocks.99.to_q"
        name = f"{part}.lora_A.weight"
        state |= {name: torch.ones(2, 8), f"{part}.lora_B.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors") as error:
        with_lora(sound[kind], tmp_path / "lora.safetensors")
    assert name in str(error.value)


def test_another_models_lora_is_refused_and_named(sound: dict[str, Path], loras: dict[str, Path]) -> None:
    for kind, other in (("sd", "flux"), ("flux", "sd"), ("sd", "sdxl")):
        with pytest.raises(ValueError, match=str(loras[other])):
            with_lora(sound[kind], loras[other])


def test_a_lora_of_other_files_is_refused(sound: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    lora = next(loras["sd"].iterdir())
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:900])
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "none.safetensors")
    state = load_file(lora)
    state[sorted(state)[0]].fill_(float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    for name in ("cut", "none", "nan"):
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            with_lora(sound["sd"], tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("matrices", [("lora_A", "lora.down"), ("lora_B", "lora.up")])
def test_a_lora_that_changes_nothing_is_refused(
    sound: dict[str, Path], loras: dict[str, Path], tmp_path: Path, kind: str, matrices: tuple[str, str]
) -> None:
    """Training begins with B = 0; one layer that was trained is enough."""
    state = load_file(next(loras[kind].iterdir()))
    names = [name for name in state if any(word in name for word in matrices)]
    assert names
    blank = {name: torch.zeros_like(value) if name in names else value for name, value in state.items()}
    save_file(blank, tmp_path / "blank.safetensors")
    with pytest.raises(ValueError, match="blank.safetensors.*it changes nothing"):
        with_lora(sound[kind], tmp_path / "blank.safetensors")
    save_file(blank | {names[0]: state[names[0]]}, tmp_path / "one.safetensors")
    with_lora(sound[kind], tmp_path / "one.safetensors")


def test_a_model_that_was_refused_can_be_loaded_afterwards(sound: dict[str, Path], tmp_path: Path) -> None:
    folder = save("sd", tmp_path / "sd")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    change(file, drop)
    with pytest.raises(ValueError):
        open_backbone(folder)
    file.write_bytes(whole)
    assert not any(value.is_meta for value in open_backbone(folder).unet.parameters())
