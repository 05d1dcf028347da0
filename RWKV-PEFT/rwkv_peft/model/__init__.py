"""The RWKV-6 model (x060, "Finch"): its modules, its recurrent state, and how weights are initialized or loaded.

A model knows nothing of PEFT methods: `peft` replaces its linear layers from outside. This package may import `ops`,
`base_model`, `config`, `errors` and `files`.
"""
