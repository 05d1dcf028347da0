"""The whole workflow on real text: convert, train a small base model, fine-tune it with Bone, merge, compare.

`make demo` runs it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / "RWKV-PEFT"), str(ROOT)]

from demo.example import BASE, FINE_TUNE, OUT, TOKENIZER, VALIDATION, make_inputs, python
from rwkv_peft.errors import exit_with_message

BONE, MERGED, PICTURE = OUT / "bone", OUT / "merged.pth", OUT / "loss.png"


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    make_inputs()
    flags = [word for name, value in FINE_TUNE.items() for word in (f"--{name}", value)]
    python("train.py", *flags, "--proj_dir", BONE, "--peft", "bone", "--bone_config", '{"r":64}')
    adapter = BONE / "rwkv-0.safetensors"
    python("tools/merge.py", "--base_model", BASE, "--adapter", adapter, "--output", MERGED)
    before, after = compare()
    draw_losses(before, after)
    print(f"\nvalidation loss {before:.3f} -> {after:.3f} nats per token ({after / before - 1:+.0%})")
    print(f"loss curves     {PICTURE.relative_to(ROOT)}")
    print(f"total time      {time.perf_counter() - began:.0f} s")
    print("chat with it    .venv/bin/python demo/chat.py")


def compare() -> tuple[float, float]:
    """Let the base model and the merged model answer one question; return the validation loss of both.

    The question and the validation problems are not in the training data.
    """
    from rwkv_peft.evaluation.loss import validation_loss
    from rwkv_peft.inference.text import generate, load

    text = json.loads(VALIDATION.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    prompt = text.split("Assistant:")[0] + "Assistant:"
    print(f"\n--- prompt\n{prompt}")
    losses = []
    for label, path in (("base", BASE), ("fine-tuned, merged", MERGED)):
        model = load(path)
        answer = generate(model, prompt, tokenizer=str(TOKENIZER), max_tokens=120, temperature=0.5, top_p=0.5)
        print(f"--- {label}\n{answer.strip()}")
        losses.append(validation_loss(model, str(VALIDATION), ctx_len=FINE_TUNE["ctx_len"]))
    return losses[0], losses[1]


def draw_losses(before: float, after: float) -> None:
    """Plot the training loss of the base model and of the fine-tune, with the validation losses, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, title, folder in (
        (axes[0], "Base: Python's library and documentation", OUT / "pretrain"),
        (axes[1], "Bone r=64: math word problems", BONE),
    ):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [line for line in lines if "loss" in line]  # the others are validations
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1, label="training")
        axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
    axes[1].axhline(before, color="tab:red", ls="--", lw=1, label=f"validation, before: {before:.2f}")
    axes[1].axhline(after, color="tab:green", ls="--", lw=1, label=f"validation, after: {after:.2f}")
    axes[1].legend()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    exit_with_message(main)
