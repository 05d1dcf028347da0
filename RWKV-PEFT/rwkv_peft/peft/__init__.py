"""PEFT methods: layers that take the place of `nn.Linear`, in any model."""
