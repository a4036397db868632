"""Trained agents as safe bundles: a folder with ``agent.safetensors`` and ``agent.json``; no pickle."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import addiff_env
from addiff_env.agent.card import model_card
from addiff_env.agent.networks import PolicyNet, flat_observation
from addiff_env.agent.price_table import PriceTable
from addiff_env.env.config import EnvConfig
from addiff_env.env.prices import check_price, price_at, read_price_range
from addiff_env.env.validation import plain
from addiff_env.loading.isolation import exclusive, isolated
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import check_finite, gated_advice
from addiff_env.storage.files import replacing

if TYPE_CHECKING:
    from addiff_env.env.vector import DiffusionDenoiseVectorEnv

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "agent.safetensors", "agent.json", "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name on the Hub
# Kinds of files that may run code when they are opened; a bundle needs none of them.
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".zip")


def shareable(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle keeps of these: prompts and device are the trainer's, whoever acts with the agent has others."""
    return {name: value for name, value in env_kwargs.items() if name not in ("prompts", "device")}


def describe_backbone(lanes: DiffusionDenoiseVectorEnv) -> dict[str, Any]:
    """The model that the lanes denoise with, as a bundle names it."""
    return {"model": lanes.config.model, "revision": lanes.backbone.revision, "dtype": lanes.backbone.dtype_name}


class Agent:
    """A trained policy with everything needed to run it again.

    ``config`` holds ``env`` (``id`` and ``kwargs``), ``observation`` (part widths, in order), ``hidden``,
    ``reward``, a ``training`` summary and, once measured, ``results`` (benchmark -> metric -> value) and ``prices``
    (`addiff_env.agent.price_table.PriceTable`).
    """

    def __init__(self, policy: PolicyNet, config: dict[str, Any]) -> None:
        self.policy, self.config = policy.eval(), config

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """Id and keyword arguments of the environment it was trained on.

        Raises:
            ValueError: none is named, an id that is not registered, or arguments that are not the environment's.
                Gymnasium imports what stands before a colon in an id, and a bundle must not choose what is run.
        """
        spec = self.config.get("env") or {}
        name = spec.get("id")
        if not isinstance(name, str) or name not in gym.registry:
            known = ", ".join(sorted(addiff_env.PRESETS))
            raise ValueError(f"this agent acts on {name!r}, which is no registered environment; known: {known}")
        kwargs = spec.get("kwargs", {})
        if unknown := sorted(set(kwargs) - {field.name for field in fields(EnvConfig)}):
            raise ValueError(f"this agent's environment has settings that there are not: {', '.join(unknown)}")
        return name, dict(kwargs)

    @property
    def price_range(self) -> tuple[float, float] | None:
        """The prices of an evaluation that the agent was trained for; None: it has no price input."""
        if "price" not in self.policy.norm.parts:
            return None
        name, kwargs = self.environment
        return read_price_range((gym.spec(name).kwargs | kwargs).get("price_range"))

    @property
    def middle_price(self) -> float | None:
        """The geometric mean of `price_range`: where the agent is judged unless a price is named."""
        return None if self.price_range is None else float(f"{price_at(self.price_range, 0):.6g}")

    @property
    def price_table(self) -> PriceTable | None:
        """What was measured at which price, if anything was; ValueError: it is damaged."""
        kept = self.config.get("prices")
        return None if kept is None else PriceTable.read(kept)

    def price_for(self, target_nfe: float | None = None, target_flops: float | None = None) -> float:
        """The price at which pictures take ``target_nfe`` evaluations, or ``target_flops`` net FLOPs, on average.

        Interpolated between the prices of `price_table`, which holds for the agent's own environment.

        Raises:
            ValueError: not exactly one target; an agent without a price input, or without a table; or a target beyond
                what was measured: the message names the range.
        """
        if (target_nfe is None) == (target_flops is None):
            raise ValueError(f"name target_nfe or target_flops, got {target_nfe!r} and {target_flops!r}")
        self.require_price_input()
        table = self.price_table
        if table is None:
            raise ValueError("this agent has no table of prices yet; measure it with: addiff agent table FOLDER")
        if target_nfe is not None:
            return table.price_for("target_nfe", "nfe", target_nfe)
        return table.price_for("target_flops", "net_flops", target_flops)

    def check_price(self, price: Any) -> float:
        """A price of an evaluation that the agent can act by; ValueError: it cannot act by any, or by this one."""
        self.require_price_input()
        return check_price(price, self.price_range)

    def require_price_input(self) -> None:
        """Check that the agent acts by the price of an evaluation; ValueError: it does not."""
        if self.price_range is None:
            raise ValueError(
                f"the agent {self.fingerprint} has no price input: it was trained for one price; "
                "train one with: addiff train reward.price_range=[lo,hi]"
            )

    @property
    def flops(self) -> float:
        """Floating-point operations of one decision."""
        return float(sum(2 * m.in_features * m.out_features for m in self.policy.modules() if isinstance(m, nn.Linear)))

    @property
    def fingerprint(self) -> str:
        """The first 12 hex digits of the SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.policy.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @isolated()
    def act(
        self,
        obs: Any,
        action_mask: Any = None,
        deterministic: bool = True,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Choose actions (B,) int64 for observations (B, width), or a dictionary of their parts.

        ``action_mask`` (B, 3), bool or 0 and 1, rules some out.

        Raises:
            ValueError: observations of another width, masks of another shape; not deterministic and no ``rng``.
        """
        logits = self.logits(obs)
        if action_mask is not None:
            mask = np.asarray(plain(action_mask))
            if mask.shape != logits.shape:
                raise ValueError(f"action_mask must be {logits.shape}, got {mask.shape}")
            logits = np.where(mask, logits, -np.inf)
        if deterministic:
            return logits.argmax(1)
        if rng is None:
            raise ValueError("sampling actions needs rng=numpy.random.default_rng(seed)")
        return (logits + rng.gumbel(size=logits.shape)).argmax(1)

    @isolated()
    def logits(self, obs: Any) -> np.ndarray:
        """Unnormalised log-probabilities (B, 3) of the actions, for observations as `act` takes them."""
        observations = torch.as_tensor(flat_observation(obs, self.policy.norm.parts), dtype=torch.float32)
        width = sum(self.policy.norm.parts.values())
        if observations.ndim != 2 or observations.shape[1] != width:
            layout = self.config["observation"]
            raise ValueError(f"this agent sees {width} numbers ({layout}), got {tuple(observations.shape)}")
        return self.policy(observations.to(self.policy.head.weight)).cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Write the bundle; one that an interruption left half new is refused by `load`."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.policy.state_dict().items()}
        head = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint}
        with replacing(folder / CONFIG, durable=True) as config, replacing(folder / WEIGHTS, durable=True) as tensors:
            tensors.write_bytes(save(weights))  # save_file would let nobody but its owner read it
            config.write_text(json.dumps(plain(head | self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Agent:
        """Read a bundle; ``folder`` may start with ``addiff_env:``, a folder of the package.

        Raises:
            FileNotFoundError: a file is missing; ValueError: unknown format version, damaged weights,
            weights that do not fit the description, are not those it was saved with or are not finite, or a file beside
            them that could run code.
        """
        named, folder = looked_at(folder), Path(resolve_model(folder))
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {named}; train an agent with: addiff train")
        _refuse_pickles(folder)
        config = _read_config(folder / CONFIG)
        described = config.pop("fingerprint", None)
        try:
            with exclusive():
                policy = PolicyNet(config["observation"], config["hidden"])
                policy.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged or does not fit its agent.json: {error}") from error
        agent = cls(policy, config)
        if described not in (None, agent.fingerprint):
            raise ValueError(f"{folder}: {CONFIG} describes weights {described}, {WEIGHTS} holds {agent.fingerprint}")
        check_finite(policy.state_dict(), folder / WEIGHTS)
        return agent

    def require_layout(self, parts: dict[str, int]) -> None:
        """Check that observations made of ``parts`` (widths, in order) are what this agent was trained on.

        Raises:
            ValueError: they are not; every differing part is named.
        """
        ours = self.policy.norm.parts
        if list(ours.items()) == list(parts.items()):
            return
        names = list(dict.fromkeys([*ours, *parts]))
        differing = [f"{n}: {ours.get(n, 'none')} in the agent, {parts.get(n, 'none')} here" for n in names]
        differing = [text for n, text in zip(names, differing, strict=True) if ours.get(n) != parts.get(n)]
        what = "; ".join(differing) or f"the order is {list(ours)} in the agent, {list(parts)} here"
        raise ValueError(f"the agent sees other observations than this environment makes ({what})")

    def require_prices(self, price_range: Sequence[float] | None) -> None:
        """Check that an environment's range of prices, in which the observation places a price, is this agent's.

        Raises:
            ValueError: it is another one; the message shows both.
        """
        if price_range is not None and self.price_range is not None and tuple(price_range) != self.price_range:
            raise ValueError(
                f"the agent was trained for price_range {list(self.price_range)}, the environment has "
                f"{list(price_range)}: it would take each price for another one"
            )

    # ----------------------------------------------------------------- sharing

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, token: str | None = None) -> Agent:
        """Load a bundle from a folder (as `load`) or, by ``owner/name``, from the Hugging Face Hub.

        Nothing but weights, description and card is downloaded, and nothing is unpickled.

        Raises:
            FileNotFoundError: neither such a folder nor such a repository; ValueError: as `load`.
        """
        if Path(name).expanduser().is_dir() or not _REPOSITORY.fullmatch(str(name)):
            return cls.load(name)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            files = [WEIGHTS, CONFIG, CARD]
            folder = snapshot_download(str(name), revision=revision, token=token, allow_patterns=files)
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"no agent {looked_at(name)}, neither as a folder (make one: addiff train) nor on the Hub: {error}"
                + gated_advice(error, str(name))
            ) from error
        return cls.load(folder)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        api: Any = None,
    ) -> str:
        """Upload the bundle and its model card to ``owner/name`` on the Hugging Face Hub; returns the commit's address.

        Args:
            repo_id: the repository, made if there is none.
            private: who may see a new repository; None: the owner's default.
            revision: branch; None: the main one.
            token: None: the one of ``hf auth login``.
            api: a `huggingface_hub.HfApi`, if not the default one.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            (Path(folder) / CARD).write_text(self.model_card(repo_id), encoding="utf-8")
            message = f"Upload agent {self.fingerprint}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        return str(getattr(commit, "commit_url", commit))

    def model_card(self, repo_id: str = "owner/name") -> str:
        """Markdown for the Hub: what the agent does, how to run it, what was measured."""
        return model_card(self, repo_id)


def _refuse_pickles(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLED)
    if found:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(found)}: files of this kind can run code when opened, and an agent "
            f"bundle needs only {WEIGHTS} and {CONFIG}; remove them if you trust the rest"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object, got {str(config)[:80]!r}")
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"observation", "hidden"} - set(config):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    layout = config["observation"]
    widths = [*layout.values(), config["hidden"]] if isinstance(layout, dict) and layout else [None]
    if not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths):
        raise ValueError(
            f"{path}: observation must map parts to widths and hidden be a width, positive integers, "
            f"got {str(layout)[:80]} and {config['hidden']!r}"
        )
    return config
