"""Plot every learning-rate schedule of --lr_schedule: python tools/plot_schedules.py docs/pictures/schedules.png"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import UserError, exit_with_message
from rwkv_peft.training.optim.schedule import SCHEDULES, learning_rate

STEPS, WARMUP, LR_INIT, LR_FINAL = 1000, 50, 1e-4, 1e-6


def main(argv: Sequence[str]) -> None:
    """Write the picture that the command line names."""
    if len(argv) != 1:
        hint = "Example: python tools/plot_schedules.py docs/pictures/schedules.png"
        raise UserError("command line", "no picture to write", expected="one path of a .png file", hint=hint)
    plot(Path(argv[0]))


def plot(path: Path) -> None:
    """Plot all schedules with the same flags, on a linear and on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, scale in zip(axes, ("linear", "log"), strict=True):
        for name in sorted(SCHEDULES, key="constant".__eq__):  # constant last and dashed: wsd starts with the same line
            optim = OptimConfig(lr_schedule=name, lr_init=LR_INIT, lr_final=LR_FINAL, warmup_steps=WARMUP)
            rates = [learning_rate(step, STEPS, optim) for step in range(STEPS)]
            axis.plot(rates, "k--" if name == "constant" else "-", label=name)
        axis.set(yscale=scale, xlabel="optimizer step", ylabel=f"learning rate ({scale} axis)")
        axis.grid(alpha=0.3)
    axes[0].ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    axes[1].legend(loc="lower left", bbox_to_anchor=(0.06, 0))
    flags = f"--lr_init {LR_INIT:g} --lr_final {LR_FINAL:g} --warmup_steps {WARMUP}, {STEPS} steps"
    figure.suptitle(f"--lr_schedule, with {flags}")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    exit_with_message(main)
