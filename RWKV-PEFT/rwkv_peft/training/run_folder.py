"""The folder of a run (`--proj_dir`) and the weights saved in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from rwkv_peft.base_model import save_base, time_states
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.config.yaml_file import write_yaml
from rwkv_peft.console import say
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.files import atomic_write, remove_leftovers
from rwkv_peft.peft.adapter_file import AdapterInfo, adapter_tensors, save_adapter
from rwkv_peft.training.checkpoint.file import FOLDER, remove_all
from rwkv_peft.training.model_setup import Prepared


def check_folder(folder: Path) -> None:
    """Raise ConfigError if `--proj_dir` cannot be created or written to. Creates nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        found = f"{existing}, {'not writable' if existing.is_dir() else 'a file'}"
        raise ConfigError("proj_dir", found=found, expected="a folder to write to")


def open_folder(folder: Path, config: RunConfig, prepared: Prepared, checkpoint: Path | None) -> None:
    """Create the run's folder and write config.yaml, and the base if it was created here.

    The files of an earlier run are replaced, unless the run resumes from a `checkpoint` in the same folder.
    """
    checkpoints = folder / FOLDER
    resumes_here = checkpoint is not None and checkpoint.parent.resolve() == checkpoints.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "metrics.jsonl").exists() and not (resumes_here or config.data.epoch_begin):
            lost = "its metrics, checkpoints and weights of epochs with the same numbers will be overwritten"
            say(f"note: {folder} contains an earlier run; {lost}")
        if checkpoint is not None and not resumes_here:
            _copy_history(checkpoint, folder)
        if not resumes_here:
            remove_all(checkpoints)
        remove_leftovers(folder, "*")
        remove_leftovers(checkpoints, "*", locked=True)
        with atomic_write(folder / "config.yaml") as temporary:
            write_yaml(config, temporary)
    except (OSError, CheckpointError) as error:
        raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
    if prepared.new_base is not None:
        save_base(prepared.new_base, folder / "rwkv-init.pth")


def _copy_history(checkpoint: Path, folder: Path) -> None:
    """Copy the metrics and the best weights of the run that a checkpoint belongs to, if its run folder still exists."""
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    if checkpoint.parent.name == FOLDER:
        run = checkpoint.parent.parent
        for path in [run / "metrics.jsonl", *run.glob("rwkv-best.*")]:
            if path.exists():
                shutil.copyfile(path, folder / path.name)


def to_save(prepared: Prepared) -> Mapping[str, Tensor]:
    """Return the tensors that are saved after an epoch: the adapter, the tuned state, or the whole model."""
    if prepared.has_adapter:
        return adapter_tensors(prepared.model)
    if prepared.tunes_state:
        return time_states(dict(prepared.model.named_parameters()))
    return prepared.model.state_dict(keep_vars=True)


def trained_path(folder: Path, epoch: int | str, prepared: Prepared) -> Path:
    """Return the path that `save_trained` writes to."""
    return folder / f"rwkv-{epoch}{'.safetensors' if prepared.has_adapter else '.pth'}"


def save_trained(
    folder: Path,
    epoch: int | str,
    config: RunConfig,
    prepared: Prepared,
    tokenizer: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the tensors that `to_save` returns: as an adapter file, or as a `.pth` without an adapter.

    A full model is stored in the dtype of its activations, a tuned state in the dtype it was trained in.
    """
    peft, path = config.peft, trained_path(folder, epoch, prepared)
    if not prepared.has_adapter:
        dtype = None if prepared.tunes_state else prepared.model.dtype
        save_base({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        return
    info = AdapterInfo(
        method=peft.method.name,
        options=asdict(peft.method),
        targets=prepared.targets,
        quant=peft.quant,
        dtype=str(prepared.model.dtype).removeprefix("torch."),
        fingerprint=prepared.fingerprint,
        tokenizer=tokenizer,
    )
    save_adapter(path, tensors, info)
