"""Laws of the config: what is typed is what is meant, and all that is wrong is told at once, by name."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipes.config import rules
from llmrecipes.config.loading import BARE, leaves_of, load_config, matching_keys
from llmrecipes.config.schema import EvaluationConfig, InferenceConfig, RunConfig
from llmrecipes.config.show import config_text, help_text, run_yaml
from llmrecipes.errors import ConfigError

NEEDED = {"model_name": "m", "output_dir": "o"}


def load(**flags: object) -> RunConfig:
    return load_config(RunConfig, {**NEEDED, **flags}).config


def problems(**flags: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, {**NEEDED, **flags})
    return str(caught.value).splitlines()


MARKS = (BARE, "???")
"""A flag without a value, and what omegaconf takes for a value that is missing."""


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text not in MARKS))
def test_text_is_taken_as_typed(text: str) -> None:
    assert load_config(InferenceConfig, {"model_name": text, "prompt": "x"}).config.model_name == text


def test_the_mark_of_a_missing_value_is_a_missing_value() -> None:
    with pytest.raises(ConfigError, match="--model_name is required"):
        load_config(InferenceConfig, {"model_name": "???", "prompt": "x"})


@pytest.mark.parametrize(
    "text",
    ["1e3", "None", "1,2", "1.10", "false", "${oc.env:HOME}", "a\\${b}", "a\\\\${b}", "{a:b}", "StateDictType.a"],
)
def test_a_folder_keeps_its_name(text: str) -> None:
    assert load(output_dir=text).output_dir == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("true", True), ("1", True), ("yes", True), (BARE, True), ("false", False), ("0", False), ("no", False)],
)
def test_booleans_understand_words(typed: str, meant: bool) -> None:
    assert load(run_validation=typed).run_validation is meant


def test_numbers_keep_their_kind() -> None:
    config = load(lr="1e-3", num_epochs="2")
    assert (config.lr, config.num_epochs) == (1e-3, 2)
    for flag, value in [("lr", "abc"), ("lr", "nan"), ("num_epochs", "1e3"), ("num_epochs", "2.5"), ("lr", "-1")]:
        assert f"--{flag}" in problems(**{flag: value})[0]


def test_every_problem_is_told_at_once() -> None:
    told = problems(lrr="1", batch_size_training="0", run_validation="maybe", quantization="5bit")
    assert len(told) == 4
    assert "did you mean --lr?" in told[0]
    assert "smallest is 1" in told[1]
    assert "true or false" in told[2]
    assert "4bit, 8bit or fp8" in told[3]


@pytest.mark.parametrize(
    ("typed", "guess"),
    [
        ("lerning_rate", "did you mean --lr?"),
        ("learning-rate", "did you mean --lr?"),
        ("per_device_train_batch_size", "did you mean --batch_size_training?"),
        ("max_steps", "did you mean --max_train_step?"),
        ("num_train_epochs", "did you mean --num_epochs?"),
        ("load_in_4bit", "did you mean --quantization 4bit?"),
        ("shading_strategy", "did you mean --sharding_strategy?"),
        ("burning_state", "--help lists all keys"),
    ],
)
def test_a_key_that_is_none_gets_a_guess_only_where_one_is_near(typed: str, guess: str) -> None:
    assert problems(**{typed: "3"}) == [f"--{typed}: {typed} is not a key of this command; {guess}"]


def test_names_of_other_trainers_are_no_keys_and_stand_for_some() -> None:
    leaves = {leaf.key: leaf for leaf in leaves_of(RunConfig)}
    assert not [name for name in rules.NAMES_ELSEWHERE if matching_keys(name, leaves)]
    assert {ours.split()[0] for ours in rules.NAMES_ELSEWHERE.values()} <= leaves.keys()


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--model_name is required.*\n--output_dir is required"):
        load_config(RunConfig, {})


def test_a_flag_without_a_value_is_no_folder() -> None:
    assert "needs a value" in problems(output_dir=BARE)[0]


def test_undotted_names_find_their_section() -> None:
    config = load(use_peft="true", lora_alpha="16", r="4", pure_bf16=BARE, target_modules="[q_proj, 'k_proj']")
    assert (config.lora_config.lora_alpha, config.lora_config.r) == (16, 4)
    assert config.lora_config.target_modules == ["q_proj", "k_proj"]
    assert config.fsdp_config.pure_bf16
    assert "say which" in problems(task_type="CAUSAL_LM")[0]


def test_an_undotted_name_of_a_data_set_is_the_chosen_ones() -> None:
    config = load(data_path="x", dataset="alpaca_dataset", skip_bad_rows="3")
    assert (config.alpaca_dataset.data_path, config.alpaca_dataset.skip_bad_rows) == ("x", 3)
    assert config.samsum_dataset.data_path == "" and config.samsum_dataset.skip_bad_rows == 0
    assert load(data_path="y").samsum_dataset.data_path == "y"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((word, "off") for word in ("", " ", "off", "OFF", "false", "no", "none", "None", "0", None)),
        *((word, "auto") for word in ("auto", "true", "yes", "1")),
        *((word, word) for word in ("cache", "./none", "~/off", "/tmp/no")),
    ],
)
def test_the_cache_is_off_automatic_or_a_folder(given: Any, meant: str) -> None:
    assert load(data_cache=given).data_cache == meant


INEFFECTIVE: list[tuple[dict[str, Any], str]] = [
    ({"lora_config.r": "16"}, "--use_peft"),
    ({"use_peft": "true", "peft_method": "prefix", "lora_config.r": "16"}, "--peft_method lora"),
    ({"use_peft": "true", "from_peft_checkpoint": "x", "lora_config.r": "16"}, "the adapter's own settings hold"),
    ({"peft_method": "lora"}, "--use_peft"),
    ({"quantization_config.quant_type": "nf4"}, "--quantization 4bit"),
    ({"quantization_config.compute": "int8"}, "--quantization 4bit or fp8"),
    ({"use_peft": "true", "quantization": "8bit", "quantization_config.compute": "int8"}, "--quantization 4bit or fp8"),
    *(
        ({"use_peft": "true", "quantization": "fp8", f"quantization_config.{key}": value}, "--quantization 4bit;")
        for key, value in (
            ("quant_type", "fp4"),
            ("use_double_quant", "true"),
            ("quant_storage", "float16"),
            ("compute_dtype", "float32"),
        )
    ),
    ({"gradient_clipping_threshold": "0.3"}, "--gradient_clipping"),
    ({"lr_scheduler": "cosine", "gamma": "0.9"}, "--lr_scheduler step"),
    ({"group_by_length": "true"}, "--batching_strategy padding"),
    ({"run_validation": "false", "val_batch_size": "2"}, "--run_validation"),
    ({"num_freeze_layers": "2"}, "--freeze_layers"),
    ({"alpaca_dataset.data_path": "x"}, "--dataset alpaca_dataset"),
    ({"wandb_config.project": "x"}, "--use_wandb"),
    ({"fsdp_config.sharding_strategy": "NO_SHARD"}, "--enable_fsdp"),
]


@pytest.mark.parametrize(("flags", "remedy"), INEFFECTIVE)
def test_a_flag_without_effect_is_an_error_naming_the_remedy(flags: dict[str, Any], remedy: str) -> None:
    told = problems(**flags)
    assert len(told) == 1
    assert "no effect" in told[0] and remedy in told[0] and list(flags)[-1] in told[0]


@pytest.mark.parametrize(
    "flags",
    [
        {"quantization": "8bit"},
        {"quantization": "fp8"},
        {"lora_config.use_dora": "true", "use_peft": "true", "quantization": "fp8"},
        {"use_peft": "true", "freeze_layers": "true"},
        {"use_fp16": "true", "mixed_precision": "false"},
        {"warmup_steps": "1", "warmup_ratio": "0.1"},
        {"enable_fsdp": "true"},
        {"freeze_LLM_only": "true"},
        {"dataset": "custom_dataset"},
        {"dataset": "llamaguard_toxicchat_dataset"},
        {"pure_bf16": "true", "use_fp16": "true"},
    ],
)
def test_choices_that_cannot_work_are_refused(flags: dict[str, Any]) -> None:
    assert f"--{next(iter(flags))}" in problems(**flags)[0]


def test_old_names_and_forms_are_understood() -> None:
    loaded = load_config(
        RunConfig,
        {**NEEDED, "micro_batch_size": "2", "gradient_clipping": "0.5", "use_peft": "1", "quantization": "True"},
    )
    config = loaded.config
    assert (config.batch_size_training, config.gradient_clipping, config.quantization) == (2, True, "8bit")
    assert config.gradient_clipping_threshold == 0.5
    assert any("batch_size_training" in notice for notice in loaded.notices)
    assert "enable_fsdp" in problems(**{"fsdp_config.checkpoint_type": "StateDictType.FULL_STATE_DICT"})[0]


def test_bare_quantization_is_8bit_and_says_so() -> None:
    loaded = load_config(RunConfig, {**NEEDED, "quantization": BARE, "use_peft": BARE})
    assert loaded.config.quantization == "8bit"
    assert any("8bit" in notice for notice in loaded.notices)


@pytest.mark.parametrize("quantization", ["4bit", "fp8"])
def test_matmuls_in_fp8_say_that_they_are_beyond_the_bound(quantization: str) -> None:
    stored = {**NEEDED, "use_peft": BARE, "quantization": quantization}
    told = [load_config(RunConfig, {**stored, "compute": compute}).notices for compute in ("int8", "fp8")]
    assert ["beyond the bound" in " ".join(notices) for notices in told] == [False, True]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_go_on_top_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model_name: m\noutput_dir: 010\nlr: 1e-3\nuse_peft: yes\nlora_config:\n  r: 4\n")
    loaded = load_config(RunConfig, {"config": path, "lr": "2e-3"})
    assert (loaded.config.lr, loaded.config.lora_config.r, loaded.config.output_dir) == (2e-3, 4, "010")
    assert loaded.origins["lr"] == "--lr"
    assert loaded.origins["lora_config.r"] == f"{path}:6"
    assert loaded.origins["seed"] == "default"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 1\nlrr: 2\n", "a.yaml:2: lrr"),
        ("lr: 1\nlr: 2\n", "a.yaml:2: lr stands here a second time"),
        ("model_name: !!python/object/apply:os.system [ls]\n", "tag"),
        ("lr: [\n", "not valid YAML"),
        ("- a\n", "found a list"),
        ("lora_config:\n  r: x\n", "a.yaml:2: expected a whole number"),
        ("on: 1\n", "a.yaml:1: on"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, {**NEEDED, "config": write(tmp_path / "a.yaml", text)})
    assert told in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "quick.yaml", "")
    with pytest.raises(ConfigError, match=r"no such file.*quick\.yaml"):
        load_config(RunConfig, {"config": str(tmp_path / "quik.yaml")})


def test_run_yaml_reproduces_the_config(tmp_path: Path) -> None:
    loaded = load_config(
        RunConfig,
        {**NEEDED, "use_peft": "1", "r": "4", "target_modules": "a,b", "lr": "3e-4", "report_to": "tensorboard"},
    )
    path = write(tmp_path / "run.yaml", run_yaml(loaded, {}))
    assert load_config(RunConfig, {"config": path}).config == loaded.config


def test_help_and_print_config_show_every_key() -> None:
    for schema in (RunConfig, InferenceConfig, EvaluationConfig):
        flags = {**NEEDED} if schema is RunConfig else {"model_name": "m"}
        loaded: Any = load_config(schema, flags)
        for key in loaded.origins:
            assert f"--{key} " in help_text("x", schema)
        shown = config_text(loaded, {"device": "cpu"})
        assert "model_name: m  # --model_name" in shown
        assert "device: cpu  # auto" in shown


def test_flags_may_come_from_python_as_values() -> None:
    assert load(use_peft=True, lora_config={"r": 3}, lr=0.5).lora_config.r == 3
