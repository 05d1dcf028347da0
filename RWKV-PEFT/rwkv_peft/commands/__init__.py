"""The subcommands of `rwkv-peft`, one file per command; each has a `main(argv)`.

This is the top layer: it may import every other folder, and only `rwkv_peft/__main__.py` and the scripts of a clone
(train.py, tools/, demo/) import it.
"""
