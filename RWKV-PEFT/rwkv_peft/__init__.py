"""RWKV-6 fine-tuning with Bone (Block Affine) and other PEFT methods."""

__version__ = "0.1.0"
