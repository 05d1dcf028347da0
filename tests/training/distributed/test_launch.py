"""Processes started by a launcher: checks of the flags, and two launchers on this machine as two machines."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.errors import ConfigError
from rwkv_peft.training.distributed.launch import check_launch
from tests.training.distributed.pairs import ENVIRONMENT, ROOT
from tests.training.distributed.test_scale import flags_of, in_one, largest_difference, write_data
from tests.training.small_runs import metrics

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {"SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
DEEPSPEED = {"RANK": "0", "LOCAL_RANK": "0", "CROSS_RANK": "0", "MASTER_ADDR": "a"}


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment"),
    [
        (2, 1, {}),
        (1, 1, {"WORLD_SIZE": "4"}),  # left in the shell: no launcher gave this process a rank
        (2, 2, {"MASTER_ADDR": "a", "NODE_RANK": "1"}),
        (2, 1, TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}),
        (1, 2, TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}),
        (4, 2, SLURM | {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}),
        (2, 1, {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}),
        (2, 1, SLURM | TORCHRUN | {"SLURM_NTASKS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}),
        (1, 2, DEEPSPEED | {"WORLD_SIZE": "2", "LOCAL_SIZE": "1"}),
    ],
)
def test_flags_that_agree(devices, num_nodes, environment):
    check_launch(devices, num_nodes, environment)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment", "message"),
    [
        (1, 2, {}, "--num_nodes: 2 machines need a launcher"),
        (
            1,
            1,
            TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "--devices: invalid value; found 1, but torchrun started 2 on this machine, expected 2",
        ),
        (
            1,
            1,
            TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
            "--num_nodes: invalid value; found 1 with --devices 1, but torchrun started 2 processes in total",
        ),
        (
            2,
            2,
            SLURM | {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "2"},
            "--num_nodes: invalid value; found 2 with --devices 2, but srun started 8 processes in total, expected 4",
        ),
        (2, 2, SLURM | {"SLURM_NTASKS": "4"}, "--devices: srun does not report how many tasks run on each machine"),
        (
            1,
            3,
            DEEPSPEED | {"WORLD_SIZE": "2", "LOCAL_SIZE": "1"},
            "--num_nodes: invalid value; found 3 with --devices 1, but the launcher started 2 processes in total",
        ),
    ],
)
def test_flags_that_disagree(devices, num_nodes, environment, message):
    with pytest.raises(ConfigError) as error:
        check_launch(devices, num_nodes, environment)
    assert str(error.value).startswith(message)


def launcher_of(launcher: str, port: int, node: int) -> list[str]:
    """Return the launcher's command on one of two machines with one process each.

    For `deepspeed --hostfile` it is the command that DeepSpeed starts there by ssh.
    """
    if launcher == "torchrun":
        words = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {node} --rdzv-backend c10d"
        return f"{words} --rdzv-id 1 --rdzv-endpoint localhost:{port}".split()
    hosts = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0]}).encode()).decode()
    words = f"-m deepspeed.launcher.launch --world_info={hosts} --node_rank={node} --no_local_rank"
    return f"{words} --master_addr=localhost --master_port={port}".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy"), [("torchrun", "auto"), ("deepspeed", "deepspeed_stage_2")], ids=lambda word: word
)
def test_two_machines_have_the_losses_of_one(launcher: str, strategy: str, tmp_path: Path):
    write_data(tmp_path)
    alone = in_one(tmp_path, "alone", "--epoch_steps", "5", "--precision", "fp32")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    more = ["--epoch_steps", "5", "--precision", "fp32", "--micro_bsz", "1", "--num_nodes", "2", "--strategy", strategy]
    train = ["train.py", *flags_of(tmp_path, "pair", *more)]
    machines = [
        subprocess.Popen(
            [sys.executable, *launcher_of(launcher, port, node), *train],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(output[-4000:] for output in outputs)
    assert largest_difference(metrics(tmp_path / "pair"), alone) < 1e-5
    saved = [output.count("saved ") for output in outputs]
    assert sorted(saved) == [0, 1], "only process 0 may print and save"
