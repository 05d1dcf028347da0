"""Convert text, instructions and chats to a binidx pair: `rwkv-peft convert`, and tools/json2binidx.py in a clone."""

from rwkv_peft.data.convert.command_line import main

__all__ = ["main"]
