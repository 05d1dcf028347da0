"""Which folders are packages; everything else is in pyproject.toml.

Packages are found by themselves, so that no new folder can be missing from a wheel. cuda/ holds the C++ and CUDA
sources; an installed package has them as rwkv_peft/_csrc.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("RWKV-PEFT"), "rwkv_peft._csrc"],
    package_dir={"rwkv_peft": "RWKV-PEFT/rwkv_peft", "rwkv_peft._csrc": "cuda"},
)
