"""The main job on real text: convert, make a small base, fine-tune with Bone, merge, compare. `make demo` runs it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / "RWKV-PEFT"), str(ROOT)]

from demo.example import BASE, FINE_TUNE, HELD_OUT, OUT, TOKENIZER, make_inputs, python
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
    print(f"\nheld-out loss {before:.3f} -> {after:.3f} nats per token ({after / before - 1:+.0%})")
    print(f"loss curves   {PICTURE.relative_to(ROOT)}")
    print(f"whole demo    {time.perf_counter() - began:.0f} s")
    print("chat with it  .venv/bin/python demo/chat.py")


def compare() -> tuple[float, float]:
    """Sample from the base and from the merged model, and measure both on problems neither has seen."""
    from rwkv_peft.adapted_model import load_plain
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.evaluation.loss import held_out_loss
    from rwkv_peft.inference.generate import generate

    tokenizer = load_tokenizer(str(TOKENIZER))
    text = json.loads(HELD_OUT.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    prompt = text.split("Assistant:")[0] + "Assistant:"
    print(f"\n--- prompt\n{prompt}")
    losses = []
    for label, path in (("base", BASE), ("fine-tuned, merged", MERGED)):
        model = load_plain(path)
        ids = generate(model, tokenizer.encode(prompt), max_tokens=120, temperature=0.5, top_p=0.5)
        print(f"--- {label}\n{tokenizer.decode(ids).strip()}")
        losses.append(held_out_loss(model, str(HELD_OUT), ctx_len=FINE_TUNE["ctx_len"]))
    return losses[0], losses[1]


def draw_losses(before: float, after: float) -> None:
    """Training loss of the base and of the fine-tune, with the held-out losses, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, title, folder in (
        (axes[0], "Base: Python's library and documentation", OUT / "pretrain"),
        (axes[1], "Bone r=64: math word problems", BONE),
    ):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [line for line in lines if "loss" in line]  # validations have a val_loss
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1, label="training")
        axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
    axes[1].axhline(before, color="tab:red", ls="--", lw=1, label=f"held out, before: {before:.2f}")
    axes[1].axhline(after, color="tab:green", ls="--", lw=1, label=f"held out, after: {after:.2f}")
    axes[1].legend()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    exit_with_message(main)
