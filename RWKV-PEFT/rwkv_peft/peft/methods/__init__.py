"""One file per PEFT method: its options and its layer.

May import peft/base.py and ops; nothing else knows a method by name.
"""
