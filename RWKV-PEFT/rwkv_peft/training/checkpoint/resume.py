"""Resuming: which checkpoint to take, whether it belongs to this run, and its position in the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.adapted_model import Start
from rwkv_peft.config.sections import PeftConfig, RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.binidx.identity import identity_of
from rwkv_peft.data.training_data import TrainingData
from rwkv_peft.devices import activation_dtype, world_size
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.training.checkpoint.file import FOLDER, Checkpoint, list_checkpoints, read_checkpoint, read_manifest
from rwkv_peft.training.checkpoint.optimizer_state import MODEL

COMPARED = ("model", "peft", "data", "optim")
"""Sections of the settings that decide what is computed."""

COMPARED_ELSEWHERE = {"data": ("micro_bsz", "epoch_count", "magic_prime"), "peft": ("peft", "peft_config")}
"""Settings that are compared in another form, by `check_settings`."""

MAY_DIFFER = {
    "data": (
        *("data_file", "data_type", "tokenizer", "text_key", "fields", "template"),
        *("val_data_file", "my_exit_tokens"),
    )
}
"""Settings that may differ from the checkpoint's. `check_inputs` compares the content of the data instead."""


@dataclass(frozen=True)
class Position:
    """How far a run has come. After the last step of an epoch, `epoch` is one more and `batch` is 0."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done, not counting --epoch_begin."""
    batch: int = 0
    """Micro-batches done by each process in the epoch in progress."""


def check_resume_path(resume: str) -> None:
    """Raise ConfigError if `--resume` is neither auto nor an existing path. Reads no checkpoint."""
    if resume not in ("", "auto") and not Path(resume).exists():
        expected = "auto, a checkpoint file, or a run's folder"
        raise ConfigError("resume", what="no such file or folder", found=resume, expected=expected)


def find_checkpoint(resume: str, folder: Path) -> Checkpoint | None:
    """Decide which checkpoint `--resume` means; read and verify it. None starts a new run.

    Args:
        resume: "", auto, a checkpoint file, or a run's folder.
        folder: `--proj_dir`.
    Raises:
        ConfigError: a new run would overwrite one that can be resumed, or the path has no checkpoint.
        CheckpointError: there are checkpoints, but none is valid.
    """
    if resume in ("", "auto"):
        steps = list_checkpoints(folder / FOLDER)
        if not resume:
            _refuse_to_overwrite(folder, steps)
        elif not steps:
            say(f"resume  no checkpoint in {folder}: starting a new run")
        return _newest_valid(folder, steps) if resume and steps else None
    checkpoint = _checkpoint_at(Path(resume))
    if checkpoint.path.parent.resolve() != (folder / FOLDER).resolve():
        _refuse_to_overwrite(folder, list_checkpoints(folder / FOLDER))
    return checkpoint


def _checkpoint_at(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the newest valid checkpoint of a run's folder."""
    if path.is_file():
        return _announced(read_checkpoint(path))
    for place in (path / FOLDER, path):
        if steps := list_checkpoints(place):
            return _newest_valid(place, steps)
    what = "has no checkpoints" if path.is_dir() else "no such file or folder"
    raise ConfigError("resume", what=what, found=path, expected="auto, a checkpoint file, or a run's folder")


def _newest_valid(folder: Path, steps: Mapping[int, Path]) -> Checkpoint:
    """Read the newest checkpoint that is not damaged; damaged ones are reported."""
    for path in steps.values():
        try:
            return _announced(read_checkpoint(path))
        except CheckpointError as error:
            say(f"resume  {error}")
    hint = "Nothing was changed. Move them away to start a new run."
    raise CheckpointError(str(folder), f"none of its {len(steps)} checkpoints can be read", hint=hint)


def _announced(checkpoint: Checkpoint) -> Checkpoint:
    position = checkpoint.manifest["position"]
    say(f"resume  {checkpoint.path}: after step {position['step']} of {checkpoint.manifest['total_steps']}")
    return checkpoint


def _refuse_to_overwrite(folder: Path, steps: Mapping[int, Path]) -> None:
    """Raise ConfigError if the folder has a run that is not finished."""
    if not steps:
        return
    step, path = next(iter(steps.items()))
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        what = f"{folder} has a run whose newest checkpoint, of step {step}, cannot be read"
        hint = "Resume it from an older checkpoint with --resume auto, or choose another --proj_dir."
        raise ConfigError("proj_dir", what=what, hint=hint) from error
    total = manifest["total_steps"]
    if step < total and not manifest["ended_by_patience"]:
        what = f"{folder} has an unfinished run, after step {step} of {total}"
        raise ConfigError("proj_dir", what=what, hint="Resume it with --resume auto, or choose another --proj_dir.")


def reason_finished(config: RunConfig, checkpoint: Checkpoint | None) -> str | None:
    """Return why there is nothing left to train, or None."""
    if checkpoint is None:
        return None
    ended = checkpoint.manifest["ended_by_patience"]
    if 0 < config.train.patience <= ended:
        return f"nothing left to train: --patience {ended} ended the run; a larger value continues it"
    count = config.data.epoch_count
    if position_of(checkpoint).epoch >= count:
        done = f"all {count} epochs are done" if count > 1 else "the only epoch is done"
        return f"nothing left to train: {done}; a larger --epoch_count continues the run"
    return None


def position_of(checkpoint: Checkpoint | None) -> Position:
    """Return the position at which a run starts: the checkpoint's, or the beginning."""
    return Position(**checkpoint.manifest["position"]) if checkpoint else Position()


def start_of(checkpoint: Checkpoint) -> Start:
    """Return a checkpoint's trained values and initial factors, in the same form as those of an adapter file."""
    prefix = f"{MODEL}/"
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    trained = {name.removeprefix(prefix): checkpoint.tensors[name] for name in names}
    return Start(str(checkpoint.path), trained, checkpoint.manifest["tokenizer"])


# ------------------------------------------------------------------------------- does it belong to this run


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what is computed, with the types of JSON (lists, not tuples)."""
    sections = {name: values for name, values in config.to_dict().items() if name in COMPARED}
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
    """Check that the settings lead to the same computation as the checkpoint's.

    A setting that did not exist when the checkpoint was written counts as its default.

    Raises:
        ConfigError: the first setting that differs.
    """
    now, then = settings_of(config), checkpoint.manifest["settings"]
    method = config.peft.method
    _compare("peft", method.name, then["peft"]["peft"], checkpoint)
    defaults = settings_of(RunConfig(peft=PeftConfig(method=type(method)())))
    for key, value in now["peft"]["peft_config"].items():
        if key != "load":
            before = then["peft"]["peft_config"].get(key, defaults["peft"]["peft_config"][key])
            _compare(f"{method.flag} {key}", value, before, checkpoint)
    for section in (*COMPARED, "derived"):
        for name, value in now[section].items():
            if name not in (*COMPARED_ELSEWHERE.get(section, ()), *MAY_DIFFER.get(section, ())):
                _compare(name, value, then[section].get(name, defaults[section][name]), checkpoint)
    _check_epochs(config, checkpoint, then["data"]["epoch_count"])


def _compare(name: str, value: Any, before: Any, checkpoint: Checkpoint) -> None:
    if value != before:
        note = " over all devices" if name == "micro_bsz" else ""
        what = f"{_as_text(value)}{note} differs from the checkpoint's {_as_text(before)} ({checkpoint.path})"
        raise ConfigError(name, what=what, hint="Use the same value, or start a new run in another --proj_dir.")


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _check_epochs(config: RunConfig, checkpoint: Checkpoint, before: int) -> None:
    """Allow more epochs than before; the learning-rate schedule then follows the longer run."""
    count = config.data.epoch_count
    if count < before:
        what = f"{count} is less than the checkpoint's {before} ({checkpoint.path})"
        raise ConfigError("epoch_count", what=what, hint=f"Use {before} or more.")
    falls = config.optim.lr_schedule != "constant" and config.optim.lr_init != config.optim.lr_final
    if count > before and falls:
        effect = f"the learning rate follows the schedule of {count} epochs"
        say(f"note: --epoch_count {count} instead of {before}: {effect}")


def inputs_of(fingerprint: Mapping[str, Any], data: TrainingData) -> dict[str, Any]:
    """Return what identifies a run's base and data."""
    return {"base": fingerprint, "data": [{**identity_of(part.samples), "share": part.share} for part in data.parts]}


def check_inputs(inputs: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise ConfigError if base or data differ from the checkpoint's. The files may have been moved."""
    then = checkpoint.manifest["inputs"]
    if json.loads(json.dumps(inputs["base"])) != then["base"]:
        hint = "Use the base that the run started with."
        raise ConfigError("load_model", what=f"is another base model than that of {checkpoint.path}", hint=hint)
    if inputs["data"] != then["data"]:
        now = [[part["documents"], part["tokens"], part["share"]] for part in inputs["data"]]
        before = [[part["documents"], part["tokens"], part["share"]] for part in then["data"]]
        found, same = f"documents, tokens, share {now}", now == before
        if same:
            found = "the same number of documents and tokens, but different contents"
        raise ConfigError(
            "data_file",
            what=f"differs from the data of {checkpoint.path}",
            found=found,
            expected=None if same else before,
        )
