"""Every setting of a run: the sections (frozen dataclasses), the command-line flags made of them, and config.yaml.

Imports errors, console and files only, and never torch, so that --help stays fast.
"""
