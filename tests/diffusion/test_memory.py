"""What fits a model into a device: sliced decodes, cached prompts, offloaded networks, dtypes, compiled blocks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import addiff_env
from addiff_env.diffusion.backbones import BackboneOptions, FluxBackbone, StableDiffusionBackbone, load_backbone
from addiff_env.diffusion.backbones.open import open_pipeline
from addiff_env.diffusion.backbones.prompt_cache import PromptCache
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.env.footprint import LAYOUTS, footprint, made_in, memory_table, peak_allocation
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.loading.memory import bytes_per_pixel, in_slices
from addiff_env.loading.weights import resolve_dtype
from addiff_env.perception.previews import make_previewer

KINDS = ("sd", "sdxl", "flux")
GIB = 2**30
Kwargs = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("memory")
    return {kind: models.save(kind, root / kind) for kind in KINDS}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads share a sum among them in another way for each number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def rows_of(vae: Any, method: str = "decode") -> Iterator[list[int]]:
    """How many pictures each call of an autoencoder works on."""
    rows, original = [], getattr(vae, method)

    def spy(batch: torch.Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(batch))
        return original(batch, *args, **more)

    setattr(vae, method, spy)
    try:
        yield rows
    finally:
        delattr(vae, method)


def room_for(backbone: Any, pictures: float, pixels: int = 64 * 64) -> float:
    """A ``decode_memory`` for so many pictures."""
    return pictures * pixels * bytes_per_pixel(backbone.vae) / GIB


def load(folder: Path, **settings: Any) -> Any:
    return load_backbone(str(folder), attention_stride=2, **settings)


# ------------------------------------------------------------------ sliced decodes


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> Any:
    @cache
    def load_once(kind: str, channels_last: bool) -> Any:
        return load(folders[kind], channels_last=channels_last)

    return load_once


@given(st.integers(1, 18), st.integers(1, 7), st.sampled_from(KINDS), st.booleans(), st.sampled_from([16, 32]))
@hypothesis_settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(17, 1, "sd", True, 16)
def test_sliced_decodes_are_whole_ones_bit_for_bit(
    one_thread: None, backbones: Any, lanes: int, at_once: int, kind: str, channels_last: bool, side: int
) -> None:
    backbone = backbones(kind, channels_last)
    latents = torch.randn(lanes, *backbone.latent_shape(side, 48), generator=torch.Generator().manual_seed(lanes))
    made = []
    for pictures in (float("inf"), at_once + 0.5):
        backbone.decode_memory = room_for(backbone, pictures, side * 48)
        with rows_of(backbone.vae) as decoded, rows_of(backbone.vae, "encode") as encoded:
            made.append(backbone.decode(latents))
            made.append(backbone.encode_pictures(made[0]))
    backbone.decode_memory = None
    assert torch.equal(made[2], made[0]) and torch.equal(made[3], made[1])
    assert max(decoded) <= max(2, at_once) and max(encoded) <= max(2, at_once)  # the CPU takes two at least


def test_without_a_setting_small_pictures_are_decoded_together(folders: dict[str, Path]) -> None:
    backbone = load(folders["sd"])
    with rows_of(backbone.vae) as rows:
        backbone.decode(torch.zeros(64, *backbone.latent_shape(64, 64)))
    assert rows == [64]


def test_slices_are_what_one_call_gives_on_any_device() -> None:
    rows = torch.arange(7.0)
    seen: list[int] = []

    def call(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 2 * part

    assert torch.equal(in_slices(call, rows, 3), 2 * rows) and seen == [3, 3, 2]
    seen.clear()
    assert in_slices(call, rows.to("meta"), 3).shape == (7,) and seen == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_accounting_is_what_a_real_autoencoder_allocates(dtype: torch.dtype) -> None:
    """SD 1.5's and TAESD's layouts, run without numbers, every allocation counted."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with FakeTensorMode(), torch.no_grad():
        layout = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
        for build in (lambda: AutoencoderKL(**blocks, **layout), AutoencoderTiny):
            with made_in(dtype):
                vae: Any = build().eval()
            latents = torch.zeros(2, 4, 64, 64, dtype=dtype)
            peak = peak_allocation(lambda vae=vae, latents=latents: vae.decode(latents, return_dict=False))
            assert 0.98 < bytes_per_pixel(vae) * 2 * 512**2 / peak < 1.02


def test_allocations_are_counted_while_they_last() -> None:
    weight = torch.zeros(1000)

    def call() -> torch.Tensor:
        first = weight.view(10, 100) + 1  # 4,000 bytes
        second = first * 2  # and as many
        del first
        return torch.cat([second, second])  # 12,000 with it

    assert peak_allocation(call) == 12_000


@pytest.mark.slow
def test_the_table_of_expected_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD 1.5 has 860 million weights in its U-Net, 123 in its text encoder and 84 in its autoencoder."""
    monkeypatch.setattr("addiff_env.env.footprint._LOOKERS", ())
    one, four = (footprint("AdDiffusion-SD15-v0", "float16", lanes) for lanes in (1, 4))
    assert one.networks == pytest.approx(2 * (859.5e6 + 123.1e6 + 83.7e6), rel=2e-3) and one.networks == four.networks
    assert one.denoiser < four.denoiser < 4 * one.denoiser + 1e6 and one.peak < four.peak
    assert one.decode * 2 == footprint("AdDiffusion-SD15-v0", "float32", 1).decode == 3 * 256 * 4 * 512**2
    monkeypatch.setattr("addiff_env.env.footprint.LAYOUTS", {one.env_id: LAYOUTS[one.env_id]})
    lines = memory_table([1, 4], ["float16"]).splitlines()
    assert len(lines) == 4 and all(line.count("|") == 9 for line in lines)
    with pytest.raises(ValueError, match="'AdDiffusion-Tiny-v0'"):
        footprint("AdDiffusion-Tiny-v0", "float16", 1)


@pytest.fixture
def kwargs(request: pytest.FixtureRequest, tiny_kwargs: Kwargs, folders: dict[str, Path]) -> Kwargs:
    kind = getattr(request, "param", "sd")
    own = {"solver": "euler", "guidance_scale": 0.0} if kind == "flux" else {"guidance_scale": 4.0}
    steps = {"dtype": "float32", "num_inference_steps": 4, "warmup_steps": 1, "max_nfe": 8, "attention_stride": 2}
    return {**addiff_env.TINY, **tiny_kwargs, **steps, **own, "model": str(folders[kind])}


def vector(kwargs: Kwargs, num_envs: int = 3, **more: Any) -> DiffusionDenoiseVectorEnv:
    return DiffusionDenoiseVectorEnv(num_envs, AutoresetMode.DISABLED, **{**kwargs, **more})


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize("method", ["ddim-2", "best-of-3:ddim-2", "oracle-stop:ddim-2", "unipc-2", "stop-2"])
def test_the_ceiling_holds_for_every_method(kwargs: Kwargs, method: str) -> None:
    """The denoiser keeps to ``batch_size``, of however many tries a picture is the best, and the decoder to its own."""
    ceiling = 2.5 * 64 * 64 * 96 / GIB  # `bytes_per_pixel` of the small autoencoder
    env = vector(kwargs, 5, decode_memory=ceiling, batch_size=2)
    unet: list[int] = []
    hook = env.backbone.unet.register_forward_pre_hook(lambda module, args: unet.append(len(args[0])))  # type: ignore[attr-defined]
    try:
        with rows_of(env.backbone.vae) as rows:
            items = [Item("a red circle", seed, "colors") for seed in range(5)]
            made = [pair for group in make_method(method, env).make(items) for pair in group]
    finally:
        hook.remove()
    assert len(made) == 5 and max(rows) <= 2 and max(unet) <= 4


def test_previews_are_sliced_too(kwargs: Kwargs, tmp_path: Path) -> None:
    small: Kwargs = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    AutoencoderTiny(**small, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3).save_pretrained(tmp_path / "t")
    backbone = load(Path(kwargs["model"]), decode_memory=room_for(load(Path(kwargs["model"])), 2.5))
    previewer: Any = make_previewer("taesd", backbone, str(tmp_path / "t"))
    with rows_of(previewer.vae) as rows:
        assert previewer.decode(torch.zeros(7, *backbone.latent_shape(64, 64))).shape == (7, 3, 64, 64)
    assert rows == [2, 2, 2, 2]  # the last with its neighbour


# ------------------------------------------------------------------ half precision


def test_only_xls_autoencoder_becomes_float32_under_float16(folders: dict[str, Path]) -> None:
    """A file without ``force_upcast`` has it True by AutoencoderKL's default; diffusers' SD pipeline ignores it."""
    for kind in ("sd", "sdxl"):
        for path in (folders[kind] / "vae/config.json",):
            assert '"force_upcast": true' in path.read_text()
    assert load(folders["sdxl"], dtype="float16").vae.dtype == torch.float32
    assert load(folders["sdxl"], dtype="bfloat16").vae.dtype == torch.bfloat16
    backbone = load(folders["sd"], dtype="float16", channels_last=False)
    assert backbone.vae.dtype == torch.float16
    pipeline = DiffusionPipeline.from_pretrained(folders["sd"], dtype=torch.float16, use_safetensors=True)
    latents = torch.randn(2, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        theirs = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal(backbone.decode(latents), (theirs.float() / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "float16"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_auto_is_what_the_gpu_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    asked: list[Any] = []

    def report(device: Any = None) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", report)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # emulated counts for PyTorch
    assert resolve_dtype("auto", "cuda:1") == expected
    assert asked == ["cuda:1"]  # of several cards that which is used
    assert resolve_dtype("float32", "cuda") == "float32"


# ------------------------------------------------------------------ encoded prompts


class Encoding:
    """Stands in for a text's encoding."""

    def __init__(self, text: str, nbytes: int = 10, device: str = "meta") -> None:
        self.text, self.nbytes, self.device = text, nbytes, device

    def to(self, device: torch.device) -> "Encoding":
        return Encoding(self.text, self.nbytes, device.type)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_the_cache_of_prompts_keeps_to_its_bounds(asked: list[int], near: int, far: int) -> None:
    cache: PromptCache[Encoding] = PromptCache(torch.device("meta"), near, far)
    encoded: list[str] = []

    def encode(text: str) -> Encoding:
        encoded.append(text)
        return Encoding(text)

    for number in asked:
        found = cache.get(str(number), encode)
        assert found.text == str(number) and found.device == "meta"
        assert cache.device_bytes <= max(near, 10) and len(cache) * 10 <= max(near, 10) + max(far, 10)
    if near + far >= 110:
        assert len(encoded) == len(set(asked))


def test_those_used_last_stay_on_the_device() -> None:
    cache: PromptCache[Encoding] = PromptCache(torch.device("meta"), 30, 1000)
    first = {text: cache.get(text, Encoding) for text in "abc"}
    cache.get("a", Encoding)
    cache.get("d", Encoding)  # for which b has to leave
    assert cache.get("a", Encoding) is first["a"] and cache.get("c", Encoding) is first["c"]
    assert cache.get("b", lambda text: pytest.fail("encoded again")).device == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_encoded_once(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load(folders[kind])
    texts: list[str] = []
    embed = backbone._embed
    monkeypatch.setattr(backbone, "_embed", lambda text, *ids: texts.append(text) or embed(text, *ids))
    negative = None if kind == "flux" else "two blue squares"
    for _ in range(2):
        backbone.encode_prompts(["a red circle", "", "two blue squares", "a red circle"], negative)
        backbone.encode_prompts(["a red circle", "a star"])
    assert sorted(texts) == ["", "a red circle", "a star", "two blue squares"]
    held = [encoding for tier in (backbone._prompts._near,) for encoding in tier.kept.values()]
    assert all(encoding.negative is None for encoding in held)  # the empty prompt is not kept with every other


# ------------------------------------------------------------------ compiling


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("kind", ["sd", pytest.param("flux", marks=pytest.mark.slow)])
def test_compiled_networks_serve_any_number_of_lanes(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs for one lane and for several; no block is given up because others of its kind were compiled before."""
    counter, compile_ = CompileCounter(), torch.compile

    def with_counter(model: Any = None, **options: Any) -> Any:
        return compile_(model, **{**options, "backend": counter})

    with_counter.__signature__ = inspect.signature(compile_)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "compile", with_counter)
    torch._dynamo.reset()
    backbone, plain = load(folders[kind], compile=True), load(folders[kind])
    shape = backbone.latent_shape(64, 64)
    schedule = backbone.schedule(4, shape)
    graphs: list[int] = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for lanes in (8, 7, 5, 3, 1, 8, 1):
            latents = torch.randn(lanes, *shape, generator=torch.Generator().manual_seed(0))
            at = torch.zeros(lanes, dtype=torch.long)
            inputs = (latents, schedule.timesteps[at], schedule.current.at(at))
            results = [
                b.predict(*inputs, b.encode_prompts(["a red circle"] * lanes), 4.0).x0 for b in (backbone, plain)
            ]
            torch.testing.assert_close(*results, rtol=0, atol=1e-4)
            torch.testing.assert_close(backbone.decode(latents), plain.decode(latents), rtol=0, atol=1e-4)
            graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] > 0 and graphs[3] == graphs[1] and graphs[-1] == graphs[4]


# ------------------------------------------------------------------ offloaded networks

BUILD: dict[str, Callable[..., Any]] = {
    "sd": StableDiffusionBackbone,
    "sdxl": StableDiffusionBackbone,
    "flux": FluxBackbone,
}


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_networks_compute_the_same(folders: dict[str, Path], kind: str, offload: str) -> None:
    """The hooks, with the CPU in the accelerator's place: text, prediction with its attention, pictures both ways."""
    plain = load(folders[kind])
    pipeline = open_pipeline(str(folders[kind]), None, torch.float32)
    hooked = BUILD[kind](pipeline, BackboneOptions("m", attention_stride=2, offload=offload))
    shape = plain.latent_shape(64, 64)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    schedule, at = plain.schedule(4, shape), torch.tensor([0, 1])
    results = []
    for backbone in (plain, hooked):
        conditioning = backbone.encode_prompts(["a red circle", "two blue squares"])
        now = backbone.predict(latents, schedule.timesteps[at], schedule.current.at(at), conditioning, 4.0)
        pictures = backbone.decode(latents)
        found = [conditioning.embeddings, now.x0, now.maps, now.features, pictures, backbone.encode_pictures(pictures)]
        costs = [backbone.flops(part, shape) for part in ("denoiser", "decode", "text")]
        results.append((found, costs))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[1][0], results[0][0], strict=True))
    assert results[0][1] == results[1][1]


def test_one_network_at_a_time_is_on_the_device(folders: dict[str, Path]) -> None:
    pipeline = open_pipeline(str(folders["flux"]), None, torch.float32)
    backbone = FluxBackbone(pipeline, BackboneOptions("m", attention_stride=2, offload="model"))
    networks = (backbone.clip, backbone.t5, backbone.transformer, backbone.vae)
    where: dict[int, str] = {id(network): "cpu" for network in networks}
    for network in networks:
        own = network.to

        def move(device: Any, network: Any = network, own: Any = own) -> Any:
            where[id(network)] = str(device)
            return own("cpu")

        network.to = move
    resident = backbone.vae._hf_hook.resident
    resident.device = "there"
    latents = torch.zeros(1, *backbone.latent_shape(64, 64))
    for _ in range(2):  # in an order that no pipeline has
        for call, expected in (
            (lambda: backbone.decode(latents), backbone.vae),
            (lambda: backbone.t5(torch.zeros(1, 4, dtype=torch.long)), backbone.t5),
            (lambda: backbone.decode(latents), backbone.vae),
            (lambda: backbone.clip(torch.zeros(1, 4, dtype=torch.long)), backbone.clip),
        ):
            call()
            assert [id(n) for n in networks if where[id(n)] == "there"] == [id(expected)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": "model"}, "'model' needs an accelerator.*'cpu'"),
        ({"offload": "sequential"}, "'sequential' needs an accelerator"),
        ({"offload": "disk"}, "offload must be one of none, model, sequential, got 'disk'"),
        ({"decode_memory": -1.0}, "decode_memory.*-1"),
        ({"decode_memory": float("nan")}, "decode_memory.*nan"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(kwargs: Kwargs, settings: Kwargs, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vector(kwargs, **settings)


def test_an_environment_with_a_ceiling_makes_the_same_pictures(one_thread: None, kwargs: Kwargs) -> None:
    finals = []
    for ceiling in (None, 0.0):
        env = vector(kwargs, decode_memory=ceiling)
        env.reset(options={"prompt": ["a red circle"] * 3, "seed": [1, 2, 3]})
        env.step(np.full(3, 1))
        finals.append([env.final_image(lane) for lane in range(3)])
    assert all((a == b).all() for a, b in zip(*finals, strict=True))
