"""Train DINO (self-distillation with no labels, Caron et al. 2021) on the world's pictures.

``addiff world train dino`` writes the teacher, a `ViTModel`, to ``<out>/dino``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from addiff_env.tiny.recipes import common, data

WIDTH, PROTOTYPES = 96, 512
VIEWS = ((64, 0.5, 1.0), (64, 0.5, 1.0), (32, 0.25, 0.5), (32, 0.25, 0.5))  # side, smallest and largest share of area
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.04, 0.1


def build() -> ViTModel:
    """The untrained backbone: 64x64 pictures in patches of 8, four layers, 96 wide."""
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=3,
    )
    return ViTModel(config, add_pooling_layer=False)


class Student(nn.Module):
    """Backbone and projection head; ``center`` is the running mean of the teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build()
        self.project = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 64))
        self.register_buffer("center", torch.zeros(PROTOTYPES))

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Cosines (B, 512) to the prototypes of views (B, 3, side, side) in [0, 1]."""
        hidden = self.backbone(views * 2 - 1, interpolate_pos_encoding=views.shape[-1] != 64).last_hidden_state
        return F.normalize(self.project(hidden[:, 0]).float(), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def view(pictures: torch.Tensor, side: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """A random crop (B, 3, side, side) of ``low`` to ``high`` of the area, mirrored, recoloured and blurred."""
    batch = len(pictures)

    def uniform(a: float, b: float) -> torch.Tensor:
        return (a + (b - a) * torch.rand(batch, generator=generator)).to(pictures.device)

    scale = uniform(low, high).sqrt()
    x, y = uniform(-1, 1) * (1 - scale), uniform(-1, 1) * (1 - scale)
    mirrored, zero = scale * uniform(-1, 1).sign(), torch.zeros_like(scale)
    theta = torch.stack([torch.stack([mirrored, zero, x], -1), torch.stack([zero, scale, y], -1)], 1)  # (B, 2, 3)
    with torch.autocast(pictures.device.type, enabled=False):
        grid = F.affine_grid(theta, [batch, 3, side, side], align_corners=False)
        crop = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    shade = uniform(0.8, 1.2)[:, None, None, None]
    tint = 1 + 0.06 * torch.randn(batch, 3, 1, 1, generator=generator).to(pictures.device)
    mean = crop.mean((1, 2, 3), keepdim=True)
    crop = (crop - mean) * uniform(0.7, 1.3)[:, None, None, None] + mean * shade
    blurred = F.avg_pool2d(F.avg_pool2d(crop, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    amount = (uniform(-1, 1)).clamp(min=0)[:, None, None, None]
    return ((crop + amount * (blurred - crop)) * tint).clamp(0, 1)


def distil(student: Student, teacher: nn.Module, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cross-entropy of every student view against the teacher's two global views, but not against itself."""
    batch = len(views[0])
    with torch.no_grad():
        raw = teacher(torch.cat(views[:2])).float()
        target = ((raw - teacher.center) / TEACHER_TEMPERATURE).softmax(-1)
        teacher.center.lerp_(raw.mean(0), 0.1)
    globals_, locals_ = student(torch.cat(views[:2])), student(torch.cat(views[2:]))
    outputs = [*globals_.split(batch), *locals_.split(batch)]
    terms = [
        -(target[t * batch : (t + 1) * batch] * (output / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()
        for t in range(2)
        for s, output in enumerate(outputs)
        if s != t
    ]
    spread = -(target.mean(0) * target.mean(0).clamp(min=1e-9).log()).sum()  # log 512 = 6.24 when nothing collapsed
    peak = -(target * target.clamp(min=1e-9).log()).sum(-1).mean()
    return {"loss": torch.stack(terms).mean(), "entropy_of_mean": spread, "mean_entropy": peak}


@torch.no_grad()
def retrieval(backbone: ViTModel, pictures: torch.Tensor, generator: torch.Generator) -> float:
    """Share of pictures whose two views find each other among all of them (chance: one over their number)."""
    features = []
    for _ in range(2):
        hidden = backbone(view(pictures, *VIEWS[0], generator) * 2 - 1).last_hidden_state[:, 0]
        features.append(F.normalize(hidden.float(), dim=-1))
    nearest = (features[0] @ features[1].T).argmax(-1).cpu()
    return float((nearest == torch.arange(len(pictures))).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args = common.arguments("world train dino", __doc__ or "", argv, steps=250, batch=96, lr=1e-3, warm_start=0)
    pictures, _ = data.load(args.work)
    torch.manual_seed(args.seed)
    student = Student().to(args.device)
    if args.warm_start:
        kept = ViTModel.from_pretrained(args.out / "dino", dtype=torch.float32, add_pooling_layer=False)
        student.backbone.load_state_dict(kept.state_dict())
    teacher = common.EMA(student, 0.99)
    loop = common.Loop("dino", args, {"student": student, "ema_teacher": teacher.model}, args.lr)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = common.to_input(pictures[common.batch_indices(generator, len(pictures), args.batch)], args.device)
        return distil(student, teacher.model, [view(batch, *spec, generator) for spec in VIEWS])

    def after(step: int) -> None:
        progress = step / args.steps
        teacher.decay = 1 - 0.01 * (math.cos(math.pi * progress) + 1) / 2  # 0.99 to 1, as in the paper
        teacher.update(step)

    loop.run(loss_at, after)
    backbone = teacher.model.backbone
    found = retrieval(backbone, common.to_input(pictures[:512], args.device), torch.Generator().manual_seed(1))
    backbone.half().save_pretrained(args.out / "dino")
    common.edit_json(args.out / "dino" / "config.json", dtype="float32")  # fp16 on disk, float32 once loaded
    print(f"dino: {loop.step} steps in {loop.seconds:.0f} s, retrieval among 512: {found:.3f} -> {args.out / 'dino'}")
    return 0
