"""The same promises on a GPU: parity and lanes in half precision, and no latents on the way to the host."""

from typing import Any

import gymnasium as gym
import models
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from addiff_env import cli
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.perception.preprocessing import OPENAI_CLIP, Preprocess, resize_as_pillow
from addiff_env.storage.commands import override

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # diffusers' own
PROMPTS, SEEDS = ["a red circle", "two blue squares", "a star above a green ring"], [1, 2, 3]
# Largest absolute difference of final latents to the CPU's float32 ones, over a short schedule.
TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 2e-1}
Kwargs = dict[str, Any]


@pytest.fixture(autouse=True)
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32: cuDNN's convolutions are in TF32 otherwise, of ten bits, and differ with the batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def kwargs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_kwargs: Kwargs) -> Kwargs:
    folder = models.save(request.param, tmp_path_factory.mktemp("gpu") / request.param)
    own = {"solver": "euler", "guidance_scale": 0.0} if request.param == "flux" else {"guidance_scale": 4.0}
    steps = {"num_inference_steps": 6, "warmup_steps": 2, "max_nfe": 14, "attention_stride": 2}
    return {**tiny_kwargs, **steps, **own, "model": str(folder)}


def vector(kwargs: Kwargs, num_envs: int = 3, **more: Any) -> DiffusionDenoiseVectorEnv:
    made = gym.make_vec(
        "AdDiffusion-Tiny-v0", num_envs, autoreset_mode=AutoresetMode.DISABLED, **{**kwargs, **more}
    ).unwrapped
    assert isinstance(made, DiffusionDenoiseVectorEnv)
    return made


def run(envs: DiffusionDenoiseVectorEnv, actions: list[int]) -> torch.Tensor:
    n = envs.num_envs
    envs.reset(options={"prompt": PROMPTS[:n], "seed": SEEDS[:n]})
    for action in actions:
        if not envs.done.all():
            envs.step(np.full(n, action))
    return envs.latents.float().cpu()


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_the_gpu_gives_the_cpus_latents(kwargs: Kwargs, dtype: str) -> None:
    finals = []
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        envs = vector(kwargs, device=device, dtype=precision)
        # Half-precision noise is drawn differently, so both start from the same latents.
        noise = torch.randn(3, *envs.latent_shape, generator=torch.Generator().manual_seed(0))
        envs.reset(options={"prompt": PROMPTS, "seed": SEEDS, "latents": noise})
        while not envs.done.all():
            envs.step(np.zeros(3, int))
        finals.append(envs.latents.float().cpu())
    difference = (finals[1] - finals[0]).abs().max()
    assert torch.isfinite(finals[1]).all() and difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lanes_equal_single_runs_on_the_gpu(kwargs: Kwargs, dtype: str) -> None:
    plan = [0, 2, 0, 2, 0, 0]
    together = run(vector(kwargs, device="cuda", dtype=dtype, mask="random"), plan)
    alone = vector(kwargs, 1, device="cuda", dtype=dtype, mask="random")
    for lane in range(3):
        alone.reset(options={"prompt": [PROMPTS[lane]], "seed": [SEEDS[lane]]})
        for action in plan:
            if not alone.done.all():
                alone.step(np.array([action]))
        difference = (together[lane] - alone.latents[0].float().cpu()).abs().max()
        assert difference <= TOLERANCE[dtype]


def test_no_latents_travel_to_the_host(kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a step copies to the host is a few numbers a lane: scores and fault flags."""
    envs = vector(kwargs, device="cuda", dtype="float16", obs_backend="torch")
    envs.reset(options={"prompt": PROMPTS, "seed": SEEDS})
    copied: list[int] = []
    original = torch.Tensor.cpu

    def spy(self: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        copied.append(self.numel())
        return original(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "cpu", spy)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as synchronised:
            observation, *_ = envs.step(np.zeros(3, int))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert observation.is_cuda
    assert max(copied, default=0) <= 3 * envs.num_envs
    assert len(synchronised) <= 20


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_networks_make_the_same_on_the_gpu(kwargs: Kwargs, offload: str) -> None:
    """And leave the device: with ``sequential`` no weight of denoiser or text encoder stays there."""
    plan = [0, 2, 0, 0]
    resident = run(vector(kwargs, device="cuda", dtype="float32"), plan)
    envs = vector(kwargs, device="cuda", dtype="float32", offload=offload)
    torch.testing.assert_close(run(envs, plan), resident, rtol=0, atol=1e-4)
    network = getattr(envs.backbone, "unet", None) or envs.backbone.transformer  # type: ignore[attr-defined]
    envs.backbone.decode(envs.latents)  # the decoder comes, the denoiser goes
    assert not any(weight.is_cuda for weight in network.parameters())


@pytest.mark.parametrize("ceiling", [None, 0.0])
def test_slices_of_a_decode_are_the_whole_on_the_gpu(kwargs: Kwargs, ceiling: float | None) -> None:
    envs = vector(kwargs, device="cuda", dtype="float32", decode_memory=ceiling)
    latents = torch.randn(7, *envs.latent_shape, generator=torch.Generator().manual_seed(0)).cuda()
    whole = envs.backbone._decode(latents)
    torch.testing.assert_close(envs.backbone.decode(latents), whole, rtol=0, atol=1e-3)


def test_looks_are_in_half_precision_unless_told(kwargs: Kwargs) -> None:
    scores = []
    for precision in ("auto", "float32"):
        envs = vector(kwargs, device="cuda", dtype="float16", look_precision=precision)
        pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
        scores.append(envs.perception.look(pictures, PROMPTS).reward_score)
        assert scores[-1].dtype == torch.float32
    assert not torch.equal(*scores)
    torch.testing.assert_close(*scores, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(("side", "target"), [(1024, 224), (512, 256), (64, 224)])
def test_pictures_are_resized_as_on_the_cpu(precision: str, side: int, target: int) -> None:
    """Bit for bit, in whatever precision matrices are multiplied, and within autocast."""
    pictures = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0))
    prepare, before = Preprocess(target, *OPENAI_CLIP), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cuda", torch.float16):
            resized = resize_as_pillow(pictures.cuda(), target, target, "bicubic")
            prepared = prepare(pictures.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(resized.cpu(), resize_as_pillow(pictures, target, target, "bicubic"))
    torch.testing.assert_close(prepared.cpu(), prepare(pictures), rtol=0, atol=1e-6)


def test_networks_are_in_the_dtype_asked_for(kwargs: Kwargs) -> None:
    """All of them but SDXL's decoder, which overflows in float16; ``auto`` is what the card multiplies fast."""
    half = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    assert vector(kwargs, 1, device="auto", dtype="auto").backbone.dtype_name == half
    backbone: Any = vector(kwargs, 1, device="cuda", dtype="float16").backbone
    network = getattr(backbone, "unet", None) or backbone.transformer
    is_xl = getattr(backbone, "is_xl", False)
    assert network.dtype == torch.float16 and backbone.vae.dtype == (torch.float32 if is_xl else torch.float16)
    assert network.device.type == backbone.vae.device.type == "cuda"


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_blocks_say_the_same_at_any_number_of_lanes(kwargs: Kwargs) -> None:
    plan = [0, 0]
    for lanes in (3, 2):
        plain = run(vector(kwargs, lanes, device="cuda", dtype="float32"), plan)
        compiled = run(vector(kwargs, lanes, device="cuda", dtype="float32", compile=True), plan)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=TOLERANCE["float32"])


def test_a_lane_that_breaks_down_ends_alone(kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = vector(kwargs, device="cuda", dtype="float16")
    envs.reset(options={"prompt": PROMPTS, "seed": SEEDS})
    predict = envs.backbone.predict

    def broken(*args: Any, **more: Any) -> Any:
        now = predict(*args, **more)
        now.x0[1] = torch.nan
        return now

    monkeypatch.setattr(envs.backbone, "predict", broken)
    observation, reward, terminated, _, info = envs.step(np.zeros(3, int))
    assert info["fault"].tolist() == terminated.tolist() == [False, True, False]
    assert np.isfinite(observation).all() and np.isfinite(reward).all()


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_the_selftest_and_the_doctor_have_nothing_to_say(
    kwargs: Kwargs, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [override(name, value) for name, value in {**kwargs, "device": "cuda", "dtype": dtype}.items()]
    assert cli.main(["doctor", *words]) == 0, capsys.readouterr().out
    assert cli.main(["selftest", "num_envs=16", *words]) == 0, capsys.readouterr().out
