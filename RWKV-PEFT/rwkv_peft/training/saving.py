"""The folder of a run, and what it trained, as files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rwkv_peft.checkpoint import save_base
from rwkv_peft.config import RunConfig
from rwkv_peft.config_file import write_yaml
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.adapter_io import AdapterInfo, adapter_tensors, save_adapter
from rwkv_peft.training.banner import say
from rwkv_peft.training.prepare import Prepared


def check_folder(folder: Path) -> None:
    """Raise ConfigError where `--proj_dir` cannot be made or written to; makes nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        found = f"{existing}, {'not writable' if existing.is_dir() else 'a file'}"
        raise ConfigError("proj_dir", found=found, expected="a folder to write to")


def open_folder(folder: Path, config: RunConfig, prepared: Prepared) -> None:
    """Make the run's folder, with its config, and the base where that was made here."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "metrics.jsonl").exists() and not config.data.epoch_begin:
            say(f"note: {folder} holds an earlier run; its metrics and epochs of the same number are replaced")
        write_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
    if prepared.new_base is not None:
        save_base(prepared.new_base, folder / "rwkv-init.pth")


def to_save(prepared: Prepared) -> Mapping[str, Tensor]:
    """What an epoch trained: the adapter, or the whole model where there is none."""
    return adapter_tensors(prepared.model) if prepared.has_adapter else prepared.model.state_dict(keep_vars=True)


def save_trained(
    folder: Path,
    epoch: int | str,
    config: RunConfig,
    prepared: Prepared,
    tokenizer: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write the tensors that `to_save` names as an adapter file, or as a model where there is no adapter."""
    peft = config.peft
    if not prepared.has_adapter:
        path = folder / f"rwkv-{epoch}.pth"
        save_base({name: tensor.to(prepared.model.dtype) for name, tensor in tensors.items()}, path)
        return path
    path = folder / f"rwkv-{epoch}.safetensors"
    info = AdapterInfo(
        method=peft.peft,
        options=peft.peft_config,
        targets=prepared.targets,
        quant=peft.quant,
        dtype=str(prepared.model.dtype).removeprefix("torch."),
        fingerprint=prepared.fingerprint,
        tokenizer=tokenizer,
    )
    save_adapter(path, tensors, info)
    return path
