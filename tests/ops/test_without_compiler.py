"""The operators on a machine without a compiler: plain torch is used, and one line per operator reports why."""

import os
import subprocess
import sys
from pathlib import Path

import rwkv_peft

PROGRAM = """
import os
import torch
from rwkv_peft.errors import UserError
from rwkv_peft.ops.bone.layouts import bone_row
from rwkv_peft.ops.mix.op import relu_square
from rwkv_peft.ops.wkv6.op import active_backend, wkv6

print(os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))
r = torch.ones(1, 2, 1, 4)
for _ in range(2):
    wkv6(r, r, r, r, torch.ones(1, 4))
    relu_square(torch.ones(1, 1, 4))
    bone_row(torch.ones(2, 16), torch.ones(16, 16), torch.ones(1, 16, 16))
print(*active_backend("cpu"), sep="|")
try:
    wkv6(r, r, r, r, torch.ones(1, 4), backend="native")
except UserError as error:
    print(error)
"""


def test_without_a_compiler(tmp_path):
    root = str(Path(rwkv_peft.__file__).parents[1])
    env = {"CXX": "/no/such/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": root}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reason = "no C++ compiler: '/no/such/compiler' is not on PATH"
    built, choice, error = result.stdout.splitlines()
    assert built == "[]", "importing must not build anything"
    assert choice.startswith(f"torch|{reason}")
    assert error.startswith("wkv6 backend native: the compiled operator is not available on cpu: " + reason)
    assert "use backend torch" in error
    warnings = [
        "wkv6 on cpu: using the slower torch backend; native is not available: ",
        "mixes on cpu: using slower torch operations; the compiled ones are not available: ",
        "bone: using slower torch operations; the compiled ones are not available: ",
    ]
    assert [result.stderr.count(warning + reason) for warning in warnings] == [1, 1, 1]
