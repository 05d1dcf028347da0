"""Compares the estimated peak memory (memory/estimate.py) with the memory that training runs need on a CPU.

Each run is a separate process. The measured value is its peak resident memory (VmHWM) minus the memory after its
imports. Weights and tokens are random. Checkpoints are written while the next step runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from rwkv_peft.base_model import save_base
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import UserError, exit_with_message
from rwkv_peft.memory.estimate import expect
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.run_config import config_from_argv
from rwkv_peft.training.model_setup import open_base, resolve_shape
from rwkv_peft.training.run import train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 2**18
"""Number of tokens of the data."""


@dataclass(frozen=True)
class Case:
    """One run."""

    flags: str
    layers: int = 16
    width: int = 256
    vocab: int = 4096
    stored: str = "fp32"
    """Dtype of the base model file; empty for training from scratch."""


BONE = '--peft bone --bone_config {"r":64,"mode":"MODE"} --ctx_len 512'
LORA = "--peft lora --ctx_len 512"
ROW, COL, LEFT = (BONE.replace("MODE", mode) for mode in ("row", "col", "left"))

CASES = {
    "small (the one of the tests)": Case(f"{ROW} --micro_bsz 2", layers=6),
    "Bone row": Case(f"{ROW} --micro_bsz 4"),
    "Bone row, 1 row of tokens": Case(f"{ROW} --micro_bsz 1", layers=24, width=384),
    "Bone row, large tensors": Case(f"{ROW} --micro_bsz 8", layers=1, width=2048),
    "Bone row, grad_cp": Case(f"{ROW} --micro_bsz 4 --grad_cp 1", layers=12, width=768),
    "Bone row, bf16": Case(f"{ROW} --micro_bsz 6 --precision bf16", stored="bf16"),
    "Bone row, bf16 file in fp32": Case(f"{ROW} --micro_bsz 1", stored="bf16", width=768),
    "Bone row materialized": Case(f"{ROW} --micro_bsz 2 --bone_impl materialized", layers=12, width=512),
    "Bone col": Case(f"{COL} --micro_bsz 4"),
    "Bone left": Case(f"{LEFT} --micro_bsz 4"),
    "LoRA": Case(f"{LORA} --micro_bsz 4"),
    "LoRA, vocabulary 65536": Case(f"{LORA} --micro_bsz 1", layers=4, width=768, vocab=65536),
    "LoRA, nf4": Case(f"{LORA} --micro_bsz 1 --quant nf4", layers=12, width=768),
    "LoRA, nf4, bf16": Case(f"{LORA} --micro_bsz 1 --quant nf4 --precision bf16", width=1024, stored="bf16"),
    "DoRA": Case("--peft dora --ctx_len 512 --micro_bsz 2"),
    "prompt": Case("--peft prompt --ctx_len 512 --micro_bsz 4"),
    "everything": Case("--ctx_len 512 --micro_bsz 1", layers=12, width=512),
    "everything, grad_cp": Case("--ctx_len 128 --micro_bsz 1 --grad_cp 1", layers=12, width=512),
    "everything, vocabulary 65536, bf16": Case(
        "--ctx_len 256 --micro_bsz 1 --precision bf16", stored="bf16", vocab=65536, layers=4, width=512
    ),
    "everything, 2 batches a step": Case("--ctx_len 256 --micro_bsz 1 --accumulate_grad_batches 2", width=512),
    "everything, from scratch": Case("--ctx_len 128 --micro_bsz 1", layers=8, width=768, stored=""),
    "everything, ddp, 2 processes": Case("--ctx_len 64 --micro_bsz 1 --strategy ddp --devices 2", width=512),
    **{
        f"everything, ZeRO {stage}, 2 processes": Case(
            f"--ctx_len 64 --micro_bsz 1 --strategy deepspeed_stage_{stage} --devices 2", width=512
        )
        for stage in (1, 2, 3)
    },
}


def inputs(case: Case, folder: Path) -> list[str]:
    """Return the flags for the case's base model and data. Files that do not exist yet are created in `folder`."""
    data = folder / f"tokens-{case.vocab}"
    if not data.with_suffix(".idx").exists():
        generator = torch.Generator().manual_seed(0)
        with BinidxWriter(data, load_tokenizer("world")) as writer:
            for _ in range(TOKENS // 2048):
                writer.add_document(torch.randint(1, case.vocab - 1, (2048,), generator=generator).tolist())
        Path(f"{data}.meta.json").unlink()  # its vocabulary is larger than that of some cases
    if not case.stored:
        shape = {"n_layer": case.layers, "n_embd": case.width, "vocab_size": case.vocab}
        return ["--data_file", str(data), *(word for k, v in shape.items() for word in (f"--{k}", str(v)))]
    base = folder / f"{case.layers}-{case.width}-{case.vocab}-{case.stored}.pth"
    if not base.exists():
        shape = ModelConfig(n_layer=case.layers, n_embd=case.width, vocab_size=case.vocab).resolved()
        generator = torch.Generator().manual_seed(0)
        state = model_on_meta(shape).state_dict()
        noise = {name: torch.randn(p.shape, generator=generator) * 0.02 for name, p in state.items()}
        save_base({name: tensor.to(DTYPES[case.stored]) for name, tensor in noise.items()}, base)
    return ["--load_model", str(base), "--data_file", str(data)]


def flags_of(case: Case, folder: Path) -> list[str]:
    common = [
        "--epoch_steps",
        "3",
        "--save_every",
        "1",
        "--accelerator",
        "cpu",
        "--proj_dir",
        tempfile.mkdtemp(prefix="run-", dir=folder),
    ]
    return [*case.flags.split(), *inputs(case, folder), *common]


def resident(field: str) -> int:
    """Return VmRSS (current) or VmHWM (peak) in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measure(case: Case, folder: Path) -> None:
    """Run the case in this process, and print by how many bytes its memory grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = resident("VmRSS")
    train(config_from_argv(flags_of(case, folder)))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps(resident("VmHWM") - start))


def compare(name: str, folder: Path) -> tuple[int, int]:
    """Return the estimated and the measured bytes of a case."""
    config = config_from_argv(flags_of(CASES[name], folder))
    base = open_base(config)
    expected = expect(resolve_shape(config, base), base).peak
    command = [sys.executable, __file__, "--case", name, "--folder", str(folder)]
    # One thread: on a busy machine, two threads would wait for each other. The memory does not depend on it.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise UserError(f"run of {name}", (done.stderr.strip().splitlines() or ["killed"])[-1])
    return expected, int(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="Run only cases that match.")
    parser.add_argument("--folder", metavar="DIR", help="Keep base models and data in this folder [a temporary one].")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        measure(CASES[args.case], Path(args.folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        print("| run | layers x width | estimated MB | measured MB | difference |\n|---|---|---|---|---|")
        for name, case in CASES.items():
            if any(fnmatchcase(name, glob) for glob in args.only):
                expected, measured = compare(name, folder)
                shape = f"{case.layers} x {case.width}"
                sizes = f"{expected / 1e6:,.0f} | {measured / 1e6:,.0f} | {expected / measured - 1:+.1%}"
                print(f"| {name} | {shape} | {sizes} |", flush=True)


if __name__ == "__main__":
    exit_with_message(main)
