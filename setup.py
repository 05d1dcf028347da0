"""Lists the packages; everything else is in pyproject.toml.

Packages are found automatically, so a new folder is always in the wheel. The C++ and CUDA sources in cuda/ are
installed as rwkv_peft/_csrc.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("RWKV-PEFT"), "rwkv_peft._csrc"],
    package_dir={"rwkv_peft": "RWKV-PEFT/rwkv_peft", "rwkv_peft._csrc": "cuda"},
)
