"""The old name of tools/inspect_data.py.

A program that has this folder on its path, and imports the standard library's `inspect`, finds this file first. It
then gets the standard module.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

if __name__ == "__main__":
    sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "RWKV-PEFT")

    from rwkv_peft.commands.inspect_data import main
    from rwkv_peft.errors import exit_with_message

    exit_with_message(main)
else:
    spec = PathFinder.find_spec("inspect", [os.path.dirname(os.__file__)])
    sys.modules[__name__] = module_from_spec(spec)  # the import system returns what it finds there
    spec.loader.exec_module(sys.modules[__name__])
