"""Operators: WKV6, and what builds their compiled forms. Imports nothing above `config`."""
