"""Names of RWKV-PEFT, RWKV-LM and Hugging Face, and what they are here, so that existing commands keep working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkv_peft.config.method import METHODS, flag_of
from rwkv_peft.errors import ConfigError

METHOD_FLAGS = {f"{method}_config": method for method in (*METHODS[1:], "disha")}
"""RWKV-PEFT's form of --peft_config: one flag for each method."""

OPTION_FLAGS = {"bone_impl": ("bone", "impl"), "bone_cp": ("bone", "cp")}
"""Flags that set one option of a method: the method and the option."""

ONE_VALUE_FLAGS = {"my_testing": "x060", "rwkv_version": "x060", "sft_split": "train"}
"""Flags of RWKV-PEFT that support only this value here."""

IGNORED_FLAGS = (
    "avg_loss compile data_shuffle dropout ds_bucket_mb fla head_qk head_size_divisor l2warp_sparse load_partial "
    "my_att_shift my_exit my_ffn_shift my_pile_edecay my_pile_shift my_pile_stage "
    "my_pile_version my_pos_emb my_qa_mask my_random_steps my_sample_len op pre_ffn state_tune tiny_att_dim "
    "tiny_att_layer weight_decay_final"
).split()
"""Flags of RWKV-LM and RWKV-PEFT that have no effect here. They are accepted with one note."""

NEUTRAL_VALUES = {"0", "0.0", "-1", "-1.0", "none", "false", ""}
ONLY_NEUTRAL = ("dropout head_qk load_partial my_qa_mask pre_ffn state_tune tiny_att_dim weight_decay_final").split()
"""Ignored flags that would change the training. Any value but a neutral one is an error."""

SUPPORTED_INSTEAD = {"state_tune": "Use --train_type state."}
"""What to use in place of an ignored flag."""


def canonical(method: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a method and its options under the names of this package.

    Later RWKV-PEFT calls row `"bone_mode":"bat"` and MiSS `"bone_mode":"bone"`. It calls both disha, which means MiSS
    if there is no mode. Hugging Face calls col `"init_weights":"bat"`. `bone_r` means `r`, `lora_alpha` means `alpha`.

    Raises:
        ConfigError: two spellings of one option, or a spelling with two possible meanings.
    """
    options = dict(options)
    if options.get("bone_mode") == "bat":
        options["bone_mode"] = "row"
    options = _without_prefix(method, options)
    if method == "pissa" and options.get("init") == "":
        del options["init"]  # RWKV-PEFT's second file, not given
    if method == "disha":
        mode = options.get("mode", "bone")
        method, options["mode"] = "bone", "row" if mode == "bat" else mode
    if method == "bone" and "init_weights" in options:
        if (init := options.pop("init_weights")) != "bat" or "mode" in options:
            raise ConfigError("bone_config", "init_weights", found=init, expected="bat, or mode instead")
        options["mode"] = "col"
    if method == "bone" and options.get("mode") == "bat":
        hint = "Hugging Face's bat is col; RWKV-PEFT's bone_mode bat is row."
        raise ConfigError("bone_config", "mode", found="bat", expected="row or col", hint=hint)
    if method == "bone" and options.get("mode") == "bone":
        del options["mode"]
        return "miss", options
    return method, options


def _without_prefix(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key.removeprefix(f"{method}_"): value for key, value in options.items()}
    if len(plain) < len(options):
        raise ConfigError(flag_of(method), what="an option is given twice", found=", ".join(options))
    return plain
