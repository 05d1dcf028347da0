"""RWKV-6 (x060, "Finch")."""
