"""Flags: what carries over from RWKV-PEFT, what is refused and how, precedence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from rwkv_peft.commands import train as train_command
from rwkv_peft.config.flags import documented_flags
from rwkv_peft.config.method import FullConfig
from rwkv_peft.config.sections import SECTIONS, DataConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig
from rwkv_peft.config.spellings import OPTION_FLAGS
from rwkv_peft.config.yaml_file import write_yaml
from rwkv_peft.errors import ConfigError, UserError, exit_with_message
from rwkv_peft.peft.methods.bone import BoneConfig
from rwkv_peft.peft.registry import method_config
from rwkv_peft.run_config import config_from_argv, config_from_settings, settings_from_argv, uses_starter
from rwkv_peft.training.model_setup import open_base, resolve_shape
from rwkv_peft.training.run import train
from tests.helpers import TINY, write_base

ROOT = Path(__file__).resolve().parents[2]

RWKV_PEFT_SCRIPT = """
--load_model {base} --proj_dir out/metabone --data_file data/roleplay --data_type binidx --vocab_size 80
--ctx_len 512 --epoch_steps 100 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 4
--n_layer 2 --n_embd 64 --pre_ffn 0 --head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0
--beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16
--strategy deepspeed_stage_1 --grad_cp 1 --my_testing x060 --dataload pad --loss_mask pad
--peft bone --bone_config {{"bone_load":"","bone_r":32}} --wandb peft-loss
"""
"""RWKV-PEFT's own scripts/run_bone.sh, but for the shape."""


BONE_32 = BoneConfig(r=32, mode="row")


def resolve(*argv: object) -> RunConfig:
    """The configuration of a command line, with the shape of its base model or of its shape flags."""
    config = config_from_argv([str(word) for word in argv])
    return resolve_shape(config, open_base(config))


def test_a_script_of_rwkv_peft_carries_over(tmp_path, capsys):
    base = write_base(tmp_path / "base.pth")
    config = resolve(*RWKV_PEFT_SCRIPT.format(base=base).split())
    assert config.model == TINY
    assert config.peft.method == BONE_32
    assert (config.data.ctx_len, config.data.dataload, config.data.epoch_steps) == (512, "pad", 100)
    assert (config.train.strategy, config.train.precision, config.train.grad_cp) == ("deepspeed_stage_1", "bf16", 1)
    assert capsys.readouterr().err == "note: ignored, these flags have no effect here: --head_qk --pre_ffn\n"


@pytest.mark.parametrize(
    "words",
    [
        ['{"r":32}'],
        ['<"r":32>'],
        ['{"bone_load":"",', '"bone_r":32}'],
        ['{"bone_load":"", "r": 32, "bone_mode": "bat"}'],
    ],
)
def test_spellings_of_bone_config(words):
    settings = settings_from_argv(
        ["--peft", "bone", "--n_layer", "1", "--n_embd", "64", "--dry_run", "--bone_config", *words]
    )
    assert config_from_settings(settings).peft.method == BONE_32


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--ctxlen 5", r"--ctxlen: unknown flag. Did you mean --ctx_len\?"),
        ("--lr_ini=5", r"--lr_ini: unknown flag. Did you mean --lr_init\?"),
        ("--peft bone --bone_config {r:64}", "--bone_config: not a JSON object; found {r:64}, expected '{\"r\":64}'"),
        ("--peft bone --bone_config [64]", "--bone_config: not a JSON object"),
        ("--ctx_len five", "--ctx_len: expected an integer; found 'five'"),
        ("--strategy deepspeed_stage_9", "--strategy: invalid choice"),
        ("--my_testing x070", "--my_testing: invalid value; found x070, expected x060"),
        ("--train_type rnn", "--train_type: invalid choice"),
        ("--state_tune 1", "--state_tune: not supported; found 1. Use --train_type state."),
        ("--optim muon", "--optim: invalid choice: 'muon'"),
        ('--train_parts ["time"', '--train_parts: found ["time", expected names'),
        ("--train_parts [1,2]", "--train_parts: found [1,2], expected names"),
        (
            '--peft bone --peft_config {"r":8} --bone_config {"r":8}',
            "--bone_config: cannot be combined with --peft_config",
        ),
        ("stray", "unexpected argument 'stray'"),
        ("--config nowhere.yaml", "--config: no such file nowhere.yaml"),
    ],
)
def test_bad_words_are_one_clear_line(argv, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("[", r"\[")):
        settings_from_argv(argv.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--peft bonn --dry_run --n_layer 1 --n_embd 64", r"--peft: unknown method; found bonn, .*Did you mean bone\?"),
        (
            '--peft bone --bone_config {"rank":8} --n_layer 1 --n_embd 64 --dry_run',
            "--bone_config rank: unknown option",
        ),
        (
            '--peft bone --bone_config {"r":8,"bone_r":16} --n_layer 1 --n_embd 64 --dry_run',
            "--bone_config: an option is given twice",
        ),
        ("--lr_init inf --n_layer 1 --n_embd 64 --dry_run", "--lr_init: invalid value; found inf, expected a finite"),
        ("--random_seed 5000000000 --n_layer 1 --n_embd 64 --dry_run", "--random_seed: invalid value"),
        ("--ctx_len 0 --dry_run --n_layer 1 --n_embd 64", "--ctx_len: invalid value; found 0, expected"),
        ("--n_layer 1 --dry_run", "--n_embd: invalid value; found 0, expected a positive integer"),
        (
            "--n_layer 1 --n_embd 64 --head_size 48 --dim_att 64 --dry_run",
            "--dim_att: .*found 64, .*multiple of head_size 48",
        ),
        (
            "--dataload pack --peft prompt --n_layer 1 --n_embd 64 --dry_run",
            "--dataload: pack clears the model's state",
        ),
        (
            "--dataload only --n_layer 1 --n_embd 64 --dry_run",
            "--micro_bsz: must be 1 with --dataload only, .*; found 4",
        ),
        ("--loss_mask se --n_layer 1 --n_embd 64 --dry_run", "--mask_id: .*found {} with --loss_mask se, expected"),
        ("--chunk_ctx 0 --n_layer 1 --n_embd 64 --dry_run", "--chunk_ctx: invalid value; found 0, expected"),
        ("--magic_prime -7 --n_layer 1 --n_embd 64 --dry_run", "--magic_prime: invalid value; found -7"),
        ("--load_model gone.pth --data_file x", "gone.pth: no such file"),
    ],
)
def test_bad_values_are_one_clear_line(argv, message):
    with pytest.raises(UserError, match=message):
        resolve(*argv.split())


def test_training_needs_data(tmp_path):
    config = config_from_argv(["--n_layer", "1", "--n_embd", "64", "--proj_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--data_file: no data to train on"):
        train(config)


@pytest.mark.parametrize("words", [['{"mask0":"Q: ","mask1":[5,6]}'], ['{"mask0":"Q:', '","mask1":[5,6]}']])
def test_markers_are_json_also_when_a_shell_split_them(words):
    config = resolve("--loss_mask", "se", "--mask_id", *words, "--n_layer", 1, "--n_embd", 64, "--dry_run")
    assert config.data.mask_id == {"mask0": "Q: ", "mask1": [5, 6]}
    with pytest.raises(UserError, match=r"--mask_id: not a JSON object; found mask0, .*mask1"):
        settings_from_argv(["--mask_id", "mask0"])


def test_data_files_are_paths_and_shares(tmp_path):
    words = ["--data_file", "my data/a,b:0.7", "c:0.3"]
    settings = settings_from_argv(words)
    config = config_from_settings(settings)
    assert config.data.sources == (("my data/a,b", 0.7), ("c", 0.3))
    write_yaml(config, tmp_path / "config.yaml")
    assert config_from_settings(settings_from_argv(["--config", str(tmp_path / "config.yaml")])) == config
    (tmp_path / "old.yaml").write_text("data: {data_file: data/chat}\n")
    assert settings_from_argv(["--config", str(tmp_path / "old.yaml")])["data_file"] == ("data/chat",)
    assert uses_starter(settings_from_argv(["--data_file", ""]))


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        ("--long split", "note: --long has no effect with --dataload get\n"),
        ("--dataload pad --magic_prime 5", "note: --magic_prime has no effect with --dataload pad\n"),
        ("--dataload pack --my_exit_tokens 5", "note: --my_exit_tokens has no effect with --dataload pack\n"),
        ('--mask_id {"mask0":1}', "note: --mask_id has no effect with --loss_mask auto\n"),
        ("--chunk_ctx 64", "note: --chunk_ctx has no effect with --train_type none\n"),
        ("--train_type state --infctx_bptt full", "note: --infctx_bptt has no effect with --train_type state\n"),
        ("--train_type infctx --chunk_ctx 64", ""),
        ("--dataload pad --magic_prime 0 --long split", ""),
        ("--magic_prime 5 --my_exit_tokens 9", ""),
    ],
)
def test_flags_that_are_not_read_are_announced(capsys, argv, note):
    settings_from_argv(argv.split())
    assert capsys.readouterr().err == note


def test_a_shape_flag_that_contradicts_the_file_names_both(tmp_path):
    base = write_base(tmp_path / "base.pth")
    with pytest.raises(UserError, match=r"--n_embd: differs from .*base.pth; found 128, expected 64. Omit the flag"):
        resolve("--load_model", base, "--n_embd", 128, "--dry_run")


def test_options_of_another_method_are_announced(capsys):
    settings_from_argv(["--peft", "lora", "--bone_config", '{"r":8}', "--lora_config", '{"lora_r":8,"lora_alpha":16}'])
    assert "--bone_config has no effect with --peft lora" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["time", "ln"], ['["time","ln"]'], ["time,ln"]])
def test_train_parts_are_words_not_characters(words):
    assert settings_from_argv(["--train_parts", *words])["train_parts"] == ("time", "ln")


def test_flag_beats_yaml_beats_default(tmp_path):
    base = write_base(tmp_path / "base.pth")
    argv = '--data_file d --peft bone --bone_config {"r":16} --lr_init 1e-3 --train_parts time --micro_bsz 2'
    first = resolve("--load_model", base, *argv.split())
    write_yaml(first, tmp_path / "config.yaml")
    assert resolve("--config", tmp_path / "config.yaml") == first, "a saved config gives the same run again"
    second = resolve("--config", tmp_path / "config.yaml", "--micro_bsz", 3)
    assert (second.data.micro_bsz, second.optim.lr_init, second.optim.beta1) == (3, 1e-3, 0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {ctx_length: 5}", r"data.ctx_length: unknown key. Did you mean data.ctx_len\?"),
        ("date: {ctx_len: 5}", "config.yaml: unknown key date"),
        ("data: {ctx_len: long}", "ctx_len: invalid value; found long"),
        ("train: {precision: fp12}", r"precision: invalid value; found fp12, expected auto \| fp32"),
        ("data: [", r":1: not valid YAML: "),
        ("peft: {train_parts: time}", "train_parts: invalid value; found 'time', expected a YAML list"),
        ("peft: {peft_config: abc}", "peft_config: invalid value; found 'abc', expected a YAML dict"),
        ("train: {load_model: }", "load_model: invalid value; found nothing, expected text"),
        ("optim: {5: 1}", r"optim.5: unknown key"),
        ("- ctx_len", "has no keys; expected the sections train, model"),
        ("format_version: 2", "written by a newer version of this program; found format_version 2, expected at most 1"),
        ("format_version: new", "written by a newer version"),
        ("ctx_len: five", r"config.yaml: --ctx_len: expected an integer; found 'five'"),
        ("ctx_length: 5", r"config.yaml: unknown key ctx_length. Did you mean ctx_len\?"),
        ("ctx_len:", "--ctx_len: has no value"),
        ("data: 5", "config.yaml: unknown key data"),
        ("ctx_len: [5, 6]", "config.yaml: unexpected argument '6'"),
        ("config: other.yaml", "config.yaml: unknown key config"),
    ],
)
def test_bad_yaml(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        settings_from_argv(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "method", "options"),
    [
        (["--peft", "disha", "--disha_config", '{"mode":"bat","load":"","r":32}'], "bone", {"r": 32, "mode": "row"}),
        (["--peft", "disha", "--disha_config", '{"mode":"bone","load":"","r":32}'], "miss", {"r": 32}),
        (["--peft", "bone", "--bone_config", '{"bone_mode":"bone","r":32}'], "miss", {"r": 32}),
        (["--peft", "lora", "--lora_config", '{"r":4,"rank_pattern":{"att.*":8,"key":2}}'], "lora", {"r": 4}),
        (["--peft", "lora_ga", "--peft_config", '{"gamma":8}'], "lora_ga", {"gamma": 8.0, "rslora": True}),
        (["--peft", "prompt", "--prompt_config", '{"tokens":7}'], "prompt", {"tokens": 7}),
        (["--peft", "lisa", "--lisa_config", '{"layers":1}'], "lisa", {"layers": 1, "interval": 20}),
        (["--peft", "adapter"], "adapter", {"r": 64}),
    ],
)
def test_every_method_goes_through_a_saved_config(argv, method, options, tmp_path):
    shape = ["--n_layer", "1", "--n_embd", "64", "--dry_run"]
    config = resolve(*shape, *argv)
    assert config.peft.method.name == method
    written = config.to_dict()["peft"]["peft_config"]
    assert written | options == written
    write_yaml(config, tmp_path / "config.yaml")
    assert resolve("--config", tmp_path / "config.yaml") == config


def test_a_saved_config_has_the_form_of_earlier_versions(tmp_path):
    """Sections and keys, with the method as a name and a mapping; a file without a version loads too."""
    config = resolve("--n_layer", 1, "--n_embd", 64, "--dry_run", "--peft", "bone", "--bone_config", '{"r":16}')
    path = tmp_path / "config.yaml"
    write_yaml(config, path)
    content = yaml.safe_load(path.read_text())
    assert list(content) == ["format_version", "model", "peft", "data", "optim", "train"]
    assert list(content["peft"]) == ["peft", "peft_config", "peft_targets", "train_parts", "adapter_dtype", "quant"]
    assert content["peft"]["peft_config"] == {
        "r": 16, "rank_pattern": {}, "load": "", "mode": "row", "g": 0, "rounding": "nearest", "impl": "fused", "cp": 0,
    }  # fmt: skip
    del content["format_version"]
    path.write_text(yaml.safe_dump(content))
    assert resolve("--config", path) == config


def test_a_flat_file_of_flag_names(tmp_path):
    path = tmp_path / "flat.yaml"
    path.write_text(
        "peft: bone\nbone_config: {r: 32}\nbone_impl: materialized\nn_layer: 1\nn_embd: 64\ndry_run: true\n"
        "data_file: [a:0.5, b:0.5]\ntrain_parts: [time, ln]\nlr_init: 1e-4\nhead_size_a: 32\noptim: none\n"
        "vocab_size: 80\nwarmup_steps: -1\nmask_id: {mask0: 'Q:', mask1: [5, 6]}\nloss_mask: se\n"
    )
    config = resolve("--config", path, "--lr_init", "2e-4")
    assert config.peft.method == BoneConfig(r=32, impl="materialized")
    assert config.peft.train_parts == ("time", "ln")
    assert config.data.sources == (("a", 0.5), ("b", 0.5))
    assert config.data.mask_id == {"mask0": "Q:", "mask1": [5, 6]}
    assert (config.optim.lr_init, config.optim.optim, config.optim.warmup_steps) == (2e-4, "adamw", -1)
    assert config.model.head_size == 32
    assert config.train.dry_run


def test_a_config_is_built_and_checked_in_python():
    config = RunConfig(peft=PeftConfig(method=BoneConfig(r=8)), train=TrainConfig(dry_run=True))
    assert config.to_dict()["peft"]["peft"] == "bone"
    assert RunConfig().peft.method == FullConfig()
    assert DataConfig(data_file="one").data_file == ("one",)
    assert OptimConfig(lr_init=1).lr_init == 1.0
    for build, message in (
        (
            lambda: BoneConfig(mode="rows"),
            r"--bone_config mode: invalid value; found 'rows', expected row \| col \| left",
        ),
        (lambda: BoneConfig(cp=True), r"--bone_config cp: invalid value; found True, expected 0 \| 1"),
        (lambda: BoneConfig(rank_pattern={"key": "8"}), "rank_pattern: .*expected a JSON object with integer values"),
        (lambda: TrainConfig(devices=2), "--devices: invalid value; found 2, expected text"),
        (lambda: TrainConfig(precision="fp12"), r"--precision: invalid value; found 'fp12', expected auto \| fp32"),
        (lambda: PeftConfig(method="bone"), "--method: invalid value; found 'bone', expected a MethodConfig"),
        (
            lambda: PeftConfig(train_parts="time"),
            "--train_parts: invalid value; found 'time', expected a list of names",
        ),
        (lambda: DataConfig(mask_id=5), "--mask_id: invalid value; found 5, expected a JSON object"),
    ):
        with pytest.raises(ConfigError, match=message):
            build()


def test_flags_for_single_options_name_real_options():
    for method, option in OPTION_FLAGS.values():
        assert option in asdict(method_config(method, {}))


def test_options_of_a_saved_run_stay_with_its_method(tmp_path):
    """`--peft lora` over a Bone run's config takes LoRA's defaults, not Bone's options."""
    (tmp_path / "config.yaml").write_text("peft: {peft: bone, peft_config: {r: 16, mode: row}}")
    shape = ["--n_layer", "1", "--n_embd", "64", "--dry_run", "--config", tmp_path / "config.yaml"]
    assert resolve(*shape).peft.method.r == 16
    assert resolve(*shape, "--peft", "lora").peft.method.r == 32
    assert resolve(*shape, "--bone_config", '{"r":32}').peft.method.r == 32


def test_bare_means_neither_model_nor_data_nor_shape():
    assert uses_starter(settings_from_argv(["--peft", "bone", "--bone_config", '{"r":64}', "--micro_bsz", "2"]))
    for flag in ("--load_model", "--data_file", "--n_layer", "--vocab_size"):
        assert not uses_starter(settings_from_argv([flag, "7"])), flag


def test_every_flag_has_a_help_sentence():
    for owner in SECTIONS.values():
        for name, _, text in documented_flags(owner):
            assert text.endswith("."), f"{owner.__name__}.{name}"


def test_help_is_grouped_and_needs_no_heavy_import():
    """Timing belongs in a benchmark; what makes help slow is importing torch, and that can be checked."""
    code = (
        "import sys; sys.argv = ['train.py', '--help']; import runpy\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "AdamW and its learning rate:" in result.stdout
    assert "--bone_config" in result.stdout


def test_errors_are_one_line_and_exit_code_2_unless_debug(monkeypatch):
    words = ["train.py", "--load_model", "gone.pth", "--data_file", "x"]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: gone.pth: no such file; expected a .pth model file.\n"
    monkeypatch.setattr(sys, "argv", [*words, "--debug"])
    with pytest.raises(UserError, match=r"gone\.pth"):  # with its traceback
        exit_with_message(train_command.main)


def test_bone_checkpointing_has_flags_of_its_own(capsys, tmp_path):
    bone = ["--peft", "bone", "--bone_config", '{"r":16}']
    options = settings_from_argv([*bone, "--bone_impl", "materialized", "--bone_cp", "1"])["peft_config"]
    assert options == {"r": 16, "impl": "materialized", "cp": 1}
    assert capsys.readouterr().err == ""
    settings_from_argv([*bone, "--bone_cp", "1"])
    assert capsys.readouterr().err == "note: --bone_cp has no effect with --bone_impl fused\n"
    (tmp_path / "run.yaml").write_text("peft:\n  peft: bone\n  peft_config: {r: 32, impl: materialized}\n")
    assert settings_from_argv(["--config", str(tmp_path / "run.yaml"), "--bone_cp", "1"])["peft_config"]["r"] == 32
    with pytest.raises(UserError, match="bone_cp: needs --peft bone; found --peft lora"):
        settings_from_argv(["--peft", "lora", "--bone_cp", "1"])
