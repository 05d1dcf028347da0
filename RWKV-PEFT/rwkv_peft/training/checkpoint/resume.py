"""Going on from a checkpoint: which one, whether it is of this run, and where in the data it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.adapted_model import Start
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.binidx.identity import identity_of
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.training.checkpoint.file import FOLDER, Checkpoint, list_checkpoints, read_checkpoint, read_manifest
from rwkv_peft.training.checkpoint.optimizer_state import MASTER
from rwkv_peft.training.distributed.strategy import activation_dtype, world_size

NOT_COMPARED = {
    "data": (
        *("data_file", "data_type", "tokenizer", "text_key", "fields", "template", "val_data_file"),
        *("micro_bsz", "epoch_count", "magic_prime", "my_exit_tokens"),
    ),
    "peft": ("peft_config",),
}
"""Settings that may be others than the checkpoint's, or are compared in a form of their own."""


@dataclass(frozen=True)
class Position:
    """How far a run is. Between the last step of an epoch and the first of the next it is (epoch + 1, batch 0)."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done, --epoch_begin not counted."""
    batch: int = 0
    """Batches done of the epoch in progress, by each process."""


def find_checkpoint(resume: str, folder: Path) -> Checkpoint | None:
    """The checkpoint that `--resume` means, read and checked; None for a new run.

    Args:
        resume: "", auto, a checkpoint, or a run's folder.
        folder: `--proj_dir`.
    Raises:
        ConfigError: a new run where an earlier one could go on, or nothing at the path.
        CheckpointError: there are checkpoints, and none is good.
    """
    if resume in ("", "auto"):
        steps = list_checkpoints(folder / FOLDER)
        if not resume:
            _refuse_to_replace(folder, steps)
        elif not steps:
            say(f"resume  no checkpoint in {folder}: a new run")
        return _newest_good(folder, steps) if resume and steps else None
    checkpoint = _named(Path(resume))
    if checkpoint.path.parent.resolve() != (folder / FOLDER).resolve():
        _refuse_to_replace(folder, list_checkpoints(folder / FOLDER))
    return checkpoint


def _named(path: Path) -> Checkpoint:
    """A checkpoint, or the newest good one of a run's folder."""
    if path.is_file():
        return _found(read_checkpoint(path))
    for place in (path / FOLDER, path):
        if steps := list_checkpoints(place):
            return _newest_good(place, steps)
    what = "holds no checkpoint" if path.is_dir() else "no such file or folder"
    raise ConfigError("resume", what=what, found=path, expected="auto, a checkpoint, or the folder of a run")


def _newest_good(folder: Path, steps: Mapping[int, Path]) -> Checkpoint:
    for path in steps.values():
        try:
            return _found(read_checkpoint(path))
        except CheckpointError as error:
            say(f"resume  {error}")
    hint = "Nothing was changed. Move them away for a new run."
    raise CheckpointError(str(folder), f"none of its {len(steps)} checkpoints can be read", hint=hint)


def _found(checkpoint: Checkpoint) -> Checkpoint:
    at = checkpoint.manifest["position"]
    say(f"resume  {checkpoint.path}: after step {at['step']} of {checkpoint.manifest['total_steps']}")
    return checkpoint


def _refuse_to_replace(folder: Path, steps: Mapping[int, Path]) -> None:
    """Raise ConfigError where the folder's earlier run is not at its end."""
    if not steps:
        return
    step, path = next(iter(steps.items()))
    try:
        manifest = read_manifest(path)
        total, ended = manifest["total_steps"], manifest["ended_by_patience"]
    except CheckpointError:
        total = ended = None
    if total is None or (step < total and not ended):
        what = f"{folder} holds a run that can go on, after step {step} of {total or 'an unreadable checkpoint'}"
        raise ConfigError("proj_dir", what=what, hint="Go on with --resume auto, or name another --proj_dir.")


def nothing_left(config: RunConfig, checkpoint: Checkpoint | None) -> str | None:
    """Why a checkpoint is of a run that is at its end, where it is."""
    if checkpoint is None:
        return None
    ended = checkpoint.manifest["ended_by_patience"]
    if 0 < config.train.patience <= ended:
        return f"--patience {ended} has ended the run; a larger one would go on"
    if position_of(checkpoint).epoch >= config.data.epoch_count:
        return f"nothing is left of {config.data.epoch_count} epochs; a larger --epoch_count would go on"
    return None


def position_of(checkpoint: Checkpoint | None) -> Position:
    """Where a run begins."""
    return Position(**checkpoint.manifest["position"]) if checkpoint else Position()


def start_of(checkpoint: Checkpoint) -> Start:
    """The trained values and the initial factors, as a warm start takes them."""
    prefix = f"{MASTER}/"
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    trained = {name.removeprefix(prefix): checkpoint.tensors[name] for name in names}
    return Start(str(checkpoint.path), trained, checkpoint.manifest["tokenizer"])


# ---------------------------------------------------------------------------------- is it of this run


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is computed, as JSON gives them back."""
    sections = {name: asdict(getattr(config, name)) for name in ("model", "peft", "data", "optim")}
    sections["derived"] = {
        "precision": str(activation_dtype(config.train)).removeprefix("torch."),
        "micro_bsz": config.data.micro_bsz * world_size(config.train),
        "magic_prime": config.data.walks,
        "tf32": config.train.precision == "tf32",
        "train_type": config.train.train_type,
        "chunk_ctx": config.train.slice_tokens,
        "infctx_bptt": config.train.infctx_bptt if config.train.slice_tokens else None,
    }
    return json.loads(json.dumps(sections))


def check_settings(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for the first setting that would compute something else than the checkpoint's run."""
    now, then = settings_of(config), checkpoint.manifest["settings"]
    options, before = now["peft"]["peft_config"], then["peft"]["peft_config"]
    pairs = [("peft", now["peft"]["peft"], then["peft"]["peft"])]
    flag = f"{config.peft.peft}_config"
    pairs += [(f"{flag} {key}", value, before.get(key)) for key, value in options.items() if key != "load"]
    for section in ("model", "peft", "data", "optim"):
        names = [name for name in now[section] if name not in NOT_COMPARED.get(section, ())]
        pairs += [(name, now[section][name], then[section].get(name)) for name in names]
    pairs += [(name, value, then["derived"].get(name)) for name, value in now["derived"].items()]
    for name, found, expected in pairs:
        if found != expected:
            note = " over all devices" if name == "micro_bsz" else ""
            what = f"is not that of {checkpoint.path}"
            raise ConfigError(name, what=what, found=f"{_shown(found)}{note}", expected=_shown(expected))
    _check_epochs(config, checkpoint, then["data"]["epoch_count"])


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _check_epochs(config: RunConfig, checkpoint: Checkpoint, before: int) -> None:
    """More epochs may be asked for; the schedule is then the longer run's from here on."""
    count = config.data.epoch_count
    if count < before:
        what = f"is less than that of {checkpoint.path}"
        raise ConfigError("epoch_count", what=what, found=count, expected=f"{before} or more")
    falls = config.optim.lr_schedule != "constant" and config.optim.lr_init != config.optim.lr_final
    if count > before and falls:
        say(f"note    --epoch_count {count}, before {before}: the learning rate goes on as in a run of {count} epochs")


def inputs_of(fingerprint: Mapping[str, Any], data: BinidxDataModule) -> dict[str, Any]:
    """What tells the base and the data of a run from others."""
    return {"base": fingerprint, "data": [{**identity_of(part.samples), "share": part.share} for part in data.parts]}


def check_inputs(inputs: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise ConfigError where base or data are not the checkpoint's; files may have moved."""
    then = checkpoint.manifest["inputs"]
    if json.loads(json.dumps(inputs["base"])) != then["base"]:
        raise ConfigError("load_model", what=f"is another base than that of {checkpoint.path}")
    if inputs["data"] != then["data"]:
        now = [[part["documents"], part["tokens"], part["share"]] for part in inputs["data"]]
        before = [[part["documents"], part["tokens"], part["share"]] for part in then["data"]]
        same = now == before
        raise ConfigError(
            "data_file",
            what=f"is other data than that of {checkpoint.path}",
            found="as many tokens, but not the same" if same else f"documents, tokens, share {now}",
            expected=None if same else before,
        )
