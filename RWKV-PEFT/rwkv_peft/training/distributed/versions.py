"""Which versions of Lightning and DeepSpeed this code was tested with.

`training/distributed/` uses a few attributes that these packages do not promise to keep. They are listed here, so that
another version fails with a clear message before training instead of somewhere inside it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from rwkv_peft.errors import UserError

TESTED = {"pytorch-lightning": "2.6.6", "deepspeed": "0.19.8"}
"""Package and tested version. Patch releases of the same minor version are accepted."""


def check_versions(*packages: str) -> None:
    """Check that each package is installed with the tested minor version.

    Raises:
        UserError: a package is missing, or another minor version of it is installed.
    """
    for name in packages:
        minor = TESTED[name].split(".")[:2]
        expected, hint = f"{'.'.join(minor)}.x", f"Install the tested version: pip install {name}=={TESTED[name]}"
        try:
            found = version(name)
        except PackageNotFoundError:
            raise UserError(name, "not installed", expected=expected, hint=hint) from None
        if found.split(".")[:2] != minor:
            raise UserError(name, "wrong version installed", found=found, expected=expected, hint=hint)
