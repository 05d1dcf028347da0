"""PEFT methods: layers that take the place of `nn.Linear`, in any model.

from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.peft import inject

inject(model, PeftConfig(peft="bone", peft_config={"r": 64}, peft_targets=("q_proj", "v_proj")))
"""

from rwkv_peft.peft.injection import inject

__all__ = ["inject"]
