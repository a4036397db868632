"""What every recipe shares: its command line, a resumable loop, the checkpoint file, the EMA."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from addiff_env.storage.files import replacing, write_whole
from addiff_env.tiny.world import WEIGHTS

CHECKPOINT_SECONDS = 120
SHARED = ("work", "out", "seed", "device")  # options that every recipe takes
MAY_DIFFER = ("work", "out", "device", "steps", "compile")  # between a training and its continuation


def arguments(verb: str, description: str, argv: Sequence[str] | None, **defaults: Any) -> argparse.Namespace:
    """Parse a recipe's command line: what all of them take, and one flag per default."""
    parser = argparse.ArgumentParser(
        prog=f"addiff {verb}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shared(parser)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args(argv)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options that every recipe takes."""
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="data, checkpoints and TensorBoard logs")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that receives the exported weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class Loop:
    """A training loop that survives a kill: state is saved atomically and batches depend on the step only.

    ``modules`` and ``optimizer`` are restored from ``<work>/<name>.pt`` when that file exists. The
    learning rate warms up linearly over ``warmup`` steps and then follows a cosine to zero.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, modules: dict[str, nn.Module], lr: float, warmup: int = 200
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.name, self.args, self.modules, self.warmup = name, args, modules, warmup
        trained = [p for key, m in modules.items() if not key.startswith("ema") for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(
            [p for p in trained if p.requires_grad], lr=lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.path = args.work / f"{name}.pt"
        self.step, self.seconds = 0, 0.0
        args.work.mkdir(parents=True, exist_ok=True)
        self._restore()
        self.writer = SummaryWriter(str(args.work / "tensorboard" / name), purge_step=self.step)

    def _lr_factor(self, step: int) -> float:
        progress = min(1.0, max(0.0, (step - self.warmup) / max(1, self.args.steps - self.warmup)))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _restore(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.args.device, weights_only=True)
        settings = self._settings()
        kept = state.get("settings", {}).items()  # earlier releases kept none
        changed = [f"{name} {value}, not {settings.get(name)}" for name, value in kept if value != settings.get(name)]
        if changed:
            raise ValueError(f"{self.path} was trained with {'; '.join(changed)}: remove it to start anew")
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"{self.name}: resumed at step {self.step} of {self.args.steps}", flush=True)

    def _settings(self) -> dict[str, Any]:
        """What the weights depend on."""
        return {name: value for name, value in vars(self.args).items() if name not in MAY_DIFFER}

    def save(self) -> None:
        """Write the checkpoint so that a kill at any moment leaves the old or the new one whole."""
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": self._settings(),
        }
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def run(self, loss_at: Callable[[torch.Generator], dict[str, torch.Tensor]], after: Any = None) -> None:
        """Train to ``args.steps``. ``loss_at`` gets the step's own CPU generator and returns named
        losses, of which ``loss`` is minimised; ``after(step)`` runs once the weights are updated.
        """
        device_type = torch.device(self.args.device).type
        started = saved = time.monotonic()
        before = self.seconds
        while self.step < self.args.steps:
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
            # PyTorch's fused attention is slow backwards on CPU (7 x its forward); the plain formula is not.
            with sdpa_kernel(SDPBackend.MATH), torch.autocast(device_type, torch.bfloat16):
                losses = loss_at(generator)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
            if torch.isfinite(norm):
                self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if after is not None:
                after(self.step)
            if self.step % 50 == 0:
                self._log(losses)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        self.writer.close()

    def _log(self, losses: dict[str, torch.Tensor]) -> None:
        values = {key: float(value.detach()) for key, value in losses.items()}
        for key, value in values.items():
            self.writer.add_scalar(f"{self.name}/{key}", value, self.step)
        if self.step % 200 == 0:
            text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"{self.name} {self.step}/{self.args.steps}  {self.seconds:.0f} s  {text}", flush=True)


class EMA:
    """Exponential moving average of ``module``'s weights with a warm-up; ``model`` is the average."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay = module, decay
        self.model = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Blend the current weights in; ``step`` counts from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        average, current = list(self.model.parameters()), list(self.module.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in current], weight)


def keep_result(args: argparse.Namespace, name: str, result: dict[str, float]) -> None:
    """Write what was measured of a model into ``<work>/<name>.json``, and print it."""
    write_whole(args.work / f"{name}.json", json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        print(f"  {key:20s} {value:.4f}")
    print(f"{name} -> {args.out / name}")


def edit_json(path: Path, **values: Any) -> None:
    """Set entries of a JSON file; None removes one."""
    content = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None or k not in values}
    write_whole(path, json.dumps(content, indent=2) + "\n")


def batch_indices(generator: torch.Generator, number: int, batch: int) -> torch.Tensor:
    """``batch`` random indices below ``number``, from the step's generator."""
    return torch.randint(number, (batch,), generator=generator)


def to_input(pictures: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
    """uint8 pictures (B, 64, 64, 3) to floats (B, 3, 64, 64) in [0, 1]."""
    return (pictures.to(device).permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
