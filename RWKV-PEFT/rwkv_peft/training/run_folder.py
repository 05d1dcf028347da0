"""The folder of a run, and what it trained, as files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rwkv_peft.base_model import save_base, time_states, write_atomically
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.config.yaml_file import write_yaml
from rwkv_peft.console import say
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.peft.adapter_file import AdapterInfo, adapter_tensors, save_adapter
from rwkv_peft.training.checkpoint.file import FOLDER, remove_all, remove_leftovers
from rwkv_peft.training.model_setup import Prepared


def check_folder(folder: Path) -> None:
    """Raise ConfigError where `--proj_dir` cannot be made or written to; makes nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        found = f"{existing}, {'not writable' if existing.is_dir() else 'a file'}"
        raise ConfigError("proj_dir", found=found, expected="a folder to write to")


def open_folder(folder: Path, config: RunConfig, prepared: Prepared, checkpoint: Path | None) -> None:
    """Make the run's folder, with its config, and the base where that was made here.

    What an earlier run left there is replaced, unless the run goes on from a `checkpoint` of it.
    """
    checkpoints = folder / FOLDER
    goes_on = checkpoint is not None and checkpoint.parent.resolve() == checkpoints.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "metrics.jsonl").exists() and not (goes_on or config.data.epoch_begin):
            lost = "its metrics, checkpoints, and epochs of the same number are replaced"
            say(f"note: {folder} holds an earlier run; {lost}")
        if checkpoint is not None and not goes_on:
            _take_over(checkpoint, folder)
        if not goes_on:
            remove_all(checkpoints)
        remove_leftovers(checkpoints)
        write_atomically(folder / "config.yaml", lambda temporary: write_yaml(config, temporary))
    except (OSError, CheckpointError) as error:
        raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
    if prepared.new_base is not None:
        save_base(prepared.new_base, folder / "rwkv-init.pth")


def _take_over(checkpoint: Path, folder: Path) -> None:
    """Copy the metrics and the best adapter of the run that a checkpoint is of; none where it lies alone."""
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    if checkpoint.parent.name == FOLDER:
        run = checkpoint.parent.parent
        for path in [run / "metrics.jsonl", *run.glob("rwkv-best.*")]:
            if path.exists():
                shutil.copyfile(path, folder / path.name)


def to_save(prepared: Prepared) -> Mapping[str, Tensor]:
    """What an epoch trained: the adapter, the tuned state, or else the whole model."""
    if prepared.has_adapter:
        return adapter_tensors(prepared.model)
    if prepared.tunes_state:
        return time_states(dict(prepared.model.named_parameters()))
    return prepared.model.state_dict(keep_vars=True)


def trained_path(folder: Path, epoch: int | str, prepared: Prepared) -> Path:
    """Where `save_trained` writes."""
    return folder / f"rwkv-{epoch}{'.safetensors' if prepared.has_adapter else '.pth'}"


def save_trained(
    folder: Path,
    epoch: int | str,
    config: RunConfig,
    prepared: Prepared,
    tokenizer: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the tensors that `to_save` names as an adapter file, or as a `.pth` where there is no adapter.

    A model is stored in its activations' dtype, a tuned state as it trained.
    """
    peft, path = config.peft, trained_path(folder, epoch, prepared)
    if not prepared.has_adapter:
        dtype = None if prepared.tunes_state else prepared.model.dtype
        save_base({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        return
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
