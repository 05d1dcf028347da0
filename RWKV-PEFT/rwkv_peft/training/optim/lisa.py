"""LISA (arXiv 2403.17919): freezes all blocks but the ones that train in the current steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.training.distributed.sharding import inner_optimizer, moment_holders


class BlockFreezer:
    """Freezes and unfreezes blocks as the method's `active_blocks` says; the rest of the model always trains.

    Args:
        config: resolved; its method changes the active blocks during training.
    """

    def __init__(self, config: RunConfig) -> None:
        self._method, self._n_layer, self._seed = config.peft.method, config.model.n_layer, config.data.random_seed
        self._active: frozenset[int] | None = None
        self._trainable: list[list[nn.Parameter]] = []
        """Per block, the parameters that train when it is active (`--train_parts`); known from the first call on."""

    def apply(self, blocks: Sequence[nn.Module], optimizer: Optimizer, step: int) -> None:
        """Freeze and unfreeze blocks for optimizer step `step`.

        A frozen block's moments are dropped, which is what makes LISA small. DeepSpeed updates with a zero gradient if
        a parameter has none, so the groups of a frozen block also get a learning rate of 0 (`active`), and moments are
        dropped again when a block is unfrozen. DeepSpeed's groups do not hold the model's parameters, so groups are
        found by block.
        """
        active = self._method.active_blocks(step, self._n_layer, self._seed)
        if active == self._active:
            return
        self._active = active
        if not self._trainable:
            self._trainable = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        for index, parameters in enumerate(self._trainable):
            for parameter in parameters:
                parameter.requires_grad_(index in active)
                parameter.grad = parameter.grad if index in active else None
        for number, group in enumerate(optimizer.param_groups):
            was_active = group.get("active", 0)
            group["active"] = int(group["block"] is None or group["block"] in active)
            if not (was_active and group["active"]):
                for tensor in moment_holders(optimizer, number):
                    inner_optimizer(optimizer).state.pop(tensor, None)
