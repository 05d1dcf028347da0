"""PEFT methods: layers that replace `nn.Linear` in any model, and the adapter files that store them.

from rwkv_peft.peft import inject
from rwkv_peft.peft.methods.bone import BoneConfig

inject(model, BoneConfig(r=64), targets=("q_proj", "v_proj"))

Imports config, ops, base_model, errors, console and files only; never model, data or training.
"""

from rwkv_peft.peft.injection import inject

__all__ = ["inject"]
