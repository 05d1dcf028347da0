"""Launchers of a run's processes: Lightning, torchrun, Slurm's srun or DeepSpeed's launcher (docs/multi_node.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment

from rwkv_peft.errors import ConfigError


class DeepSpeedEnvironment(LightningEnvironment):
    """Environment variables of the `deepspeed` launcher. Lightning reads all of them except the node rank."""

    @staticmethod
    def detect() -> bool:
        return "CROSS_RANK" in os.environ and "LOCAL_RANK" in os.environ

    def node_rank(self) -> int:
        return int(os.environ["CROSS_RANK"])


def leave_group() -> None:
    """End the process group. Its threads could otherwise abort a program at exit, after all its work is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_launch(devices: int, num_nodes: int, environment: Mapping[str, str]) -> None:
    """Compare the flags with the launcher's environment variables, before processes wait for others that never start.

    Args:
        devices: processes per machine, from the flags.
        num_nodes: machines, from the flags.
        environment: environment variables.
    Raises:
        ConfigError: they differ, or there are several machines but no launcher.
    """
    name, total, each = _launched(environment)
    if not name:
        if num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= set(environment):
            raise ConfigError(
                "num_nodes",
                what=f"{num_nodes} machines need a launcher (torchrun, srun or deepspeed)",
                hint="See docs/multi_node.md.",
            )
        return
    if each is not None and each != devices:
        found = f"{devices}, but {name} started {each} on this machine"
        raise ConfigError("devices", found=found, expected=each)
    if total != devices * num_nodes:
        found = f"{num_nodes} with --devices {devices}, but {name} started {total} processes in total"
        fits = total % devices == 0
        expected = total // devices if fits else "processes = machines x devices"
        raise ConfigError("num_nodes", found=found, expected=expected)


def _launched(environment: Mapping[str, str]) -> tuple[str, int, int | None]:
    """Return the launcher, its number of processes, and that on this machine, if known; without one: ("", 1, None)."""
    # Lightning tells srun from a shell in the same way.
    in_a_shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    within = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & set(environment)
    if "SLURM_NTASKS" in environment and not in_a_shell and not within:
        return "srun", int(environment["SLURM_NTASKS"]), _slurm_tasks_per_node(environment)
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return "", 1, None
    each = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher"
    return name, int(environment["WORLD_SIZE"]), int(each) if each else None


def _slurm_tasks_per_node(environment: Mapping[str, str]) -> int | None:
    each = environment.get("SLURM_NTASKS_PER_NODE")
    if each is None and int(environment["SLURM_NTASKS"]) > 1:
        raise ConfigError(
            "devices",
            what="srun does not report how many tasks run on each machine",
            expected="#SBATCH --ntasks-per-node instead of --ntasks",
        )
    return int(each) if each else None
