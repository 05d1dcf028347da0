"""Devices, precision and DeepSpeed: what the flags mean on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training.distributed.launch import DeepSpeedEnvironment
from rwkv_peft.training.optim.loss_scaling import LossScaling

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WHOLE_BELOW = 2**20
"""ZeRO-3 shares out larger parameters only. An adapter's matrices are below (Bone r=64 on 4096 x 14336 trains 917,504
numbers): gathering each for every product would cost more than it saves."""


def device_type(train: TrainConfig) -> str:
    """`cuda` or `cpu`; raises ConfigError where a GPU is asked for and there is none."""
    has_gpu = torch.cuda.is_available()
    if train.accelerator == "gpu" and not has_gpu:
        raise ConfigError(
            "accelerator", found="no CUDA device", expected="one for gpu", hint="Use --accelerator cpu, or auto."
        )
    return "cuda" if has_gpu and train.accelerator != "cpu" else "cpu"


def activation_dtype(train: TrainConfig) -> torch.dtype:
    """The model's arithmetic; `auto` is bf16 on a GPU that has it, else fp32.

    Raises:
        ConfigError: fp16 on a CPU, bf16 on a GPU without it.
    """
    device = device_type(train)
    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "auto":
        return torch.bfloat16 if device == "cuda" and has_bf16 else torch.float32
    if train.precision == "fp16" and device == "cpu":
        raise ConfigError("precision", found="fp16 on a CPU", expected="fp32 or bf16")
    if train.precision == "bf16" and not has_bf16:
        raise ConfigError("precision", found="bf16 on a GPU without it", expected="fp16 or fp32")
    return DTYPES[train.precision]


def model_options(train: TrainConfig) -> dict[str, Any]:
    """The flags that the model itself follows."""
    return {
        "dtype": activation_dtype(train),
        "grad_cp": bool(train.grad_cp),
        "wkv_backend": train.wkv,
    }


class KeepDtypes(DeepSpeedPrecision):
    """The model casts for itself: its frozen bf16 weights stay bf16, where Lightning would widen all to fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed, also on CPUs (gloo), and with the loss divided once under accumulation."""

    def __init__(self, stage: int, *, offload: bool = False) -> None:
        super().__init__(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
        self.offload = offload
        """Whether what the optimizer holds, and its step, are the CPU's."""
        if stage == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = WHOLE_BELOW

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed  # not above: it takes seconds, and most runs do without

        # Built with a compiler for 40 seconds, for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Lightning refuses CPUs here, though the engine runs on them; it addresses devices by index.
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Optimizer | None, *args: Any) -> Any:
        if self.zero_stage_3:
            import deepspeed

            # One parameter at a time: the engine would first move the whole model to every device.
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config)
            model.to(self.root_device)  # the buffers
        return super()._setup_model_and_optimizer(model, optimizer, *args)

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: by DeepSpeed's own count of batches, an epoch's last, shorter step would go over into the next epoch."""
        return False

    def block_backward_sync(self) -> AbstractContextManager:
        """The engine itself knows, by what `backward` tells it, when to exchange gradients."""
        return nullcontext()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        steps_now = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(steps_now)
        # Lightning has divided the loss by the accumulated batches; DeepSpeed would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def build_strategy(train: TrainConfig, *, unused: bool = False) -> dict[str, Any]:
    """The trainer's arguments for `--strategy`.

    Args:
        unused: some trained parameters get no gradient in some steps, which DDP has to look for.
    """
    launched = [DeepSpeedEnvironment()] if DeepSpeedEnvironment.detect() else []
    if train.strategy.startswith("deepspeed"):
        stage, _, offload = train.strategy.removeprefix("deepspeed_stage_").partition("_")
        return {"strategy": DeepSpeed(int(stage), offload=bool(offload)), "plugins": [KeepDtypes(), *launched]}
    plugins = [*launched, *([LossScaling(device_type(train))] if train.precision == "fp16" else [])]
    if train.strategy == "auto" and devices_per_node(train) * train.num_nodes == 1:
        return {"strategy": "auto", "plugins": plugins}
    # Buffers, a quantised base among them, never change: they need not be sent around in every step.
    strategy = DDPStrategy(forward_sync_buffers=False, find_unused_parameters=unused)
    return {"strategy": strategy, "plugins": plugins}


def whole_tensors(parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Parameters as they are outside of ZeRO-3, by name, on the CPU.

    Where each process holds a share of a parameter, all must call this, with the same names in the same order.

    Args:
        parameters: the parameters themselves, by name: a detached tensor of a shared one is empty.
        keep: whether this process wants them; the others get {}.
    """
    whole = {}
    for name, tensor in parameters.items():
        with _gathered(tensor):
            if keep:
                whole[name] = tensor.detach().cpu()
    return whole


def _gathered(tensor: Tensor) -> AbstractContextManager:
    """A context in which a tensor that ZeRO-3 shared out is whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(tensor)


def devices_per_node(train: TrainConfig) -> int:
    """Processes on this machine: `--devices`, where auto is every GPU, or one on a CPU."""
    if train.devices != "auto":
        there = torch.cuda.device_count()
        if device_type(train) == "cuda" and int(train.devices) > there:
            raise ConfigError("devices", found=train.devices, expected=f"at most {there}, the GPUs of this machine")
        return int(train.devices)
    return torch.cuda.device_count() if device_type(train) == "cuda" else 1


def world_size(train: TrainConfig) -> int:
    """Processes of the run, on all machines."""
    return devices_per_node(train) * train.num_nodes
