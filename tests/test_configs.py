"""Every shipped recipe, resolved, equals its snapshot, so that changed defaults show in diffs."""

import sys
from pathlib import Path

import pytest
from absl import flags

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError

SNAPSHOTS = Path(__file__).parent / "snapshots"
STAGES = ("stage1_vision", "stage2a_align", "stage2b_pretrain", "stage3_instruct", "stage4_expert")
RECIPES = (
    [f"configs/{stage}.py:tiny" for stage in STAGES]
    + [f"configs/{stage}.py:vila_m3_{size}" for stage in STAGES[1:] for size in ("3b", "8b", "13b", "40b")]
    + [f"configs/quickstart/{stage}.py:{size}" for stage in STAGES for size in ("smoke", "default", "full")]
)


def snapshot_file(recipe):
    return SNAPSHOTS / (recipe.removeprefix("configs/").replace("/", "-").replace(".py:", "-") + ".txt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_snapshot(recipe):
    expected = snapshot_file(recipe).read_text()
    assert config_lib.load(recipe).snapshot() == expected, (
        f"{recipe} resolves differently; if that is meant: python -m tests.test_configs --update"
    )


def test_no_recipe_and_no_snapshot_is_forgotten():
    root = config_lib.configs_root()
    stages = {f"configs/{p.relative_to(root)}" for p in root.rglob("stage*.py")}
    assert stages == {recipe.partition(":")[0] for recipe in RECIPES}
    assert {p.name for p in SNAPSHOTS.glob("*.txt")} == {snapshot_file(recipe).name for recipe in RECIPES}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=configs/stage9.py"], "configs/stage9.py: no such config.*stage3_instruct.py"),
        (["--config=configs/stage3_instruct.py:giant"], "'giant'.*tiny"),
        (["--config=configs/quickstart/stage3_instruct.py:huge"], "'huge'.*default"),
        (["--config=configs/stage3_instruct.py:tiny", "--config.num_step=3"], "num_step.*num_steps"),
        (["--config=configs/stage3_instruct.py:tiny", "--config.num_steps=many"], "num_steps"),
        (
            ["--config=configs/stage3_instruct.py:tiny", "--config.task=dreaming"],
            "task='dreaming': must be 'gen",
        ),
        (["--config=configs/stage3_instruct.py:tiny", "--nonsense=1"], "nonsense"),
        (["--config", "configs/stage9.py"], "no such config"),
        (["--config"], "no such config"),
        ([], "--config"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        config_lib.parse(arguments, flags.FlagValues())


@pytest.mark.parametrize(
    "key,value",
    [
        ("grad_accum", 0), ("loss_chunk", 0), ("eval_batches", 0), ("eval_every", -1),
        ("checkpoint_every", -1),
        ("data.seq_len", 0), ("data.rows_per_group", 0), ("data.global_rows", -8), ("data.loader_shards", 0),
        ("schedule.peak", -1.0), ("schedule.peak", float("nan")), ("schedule.warmup_fraction", 2.0),
        ("optimizer.clip_norm", -1.0), ("optimizer.b2", 2.0), ("mesh.cpu_devices", -1), ("seed", -1),
        ("model.llm.num_kv_heads", 0), ("model.vision_tower.patch_size", 0), ("model.llm.hidden_size", -4),
        ("model.dtype", "float8"), ("model.param_dtype", "int8"),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused(key, value):
    with pytest.raises(UserError, match=rf"config {key}=.*: must be"):
        config_lib.load("configs/stage3_instruct.py:tiny", {key: value})


@pytest.mark.parametrize(
    "text,message",
    [
        ("def get_config(arg=''):\n    return nothing\n", r"my run\.py:2: the recipe fails with NameError"),
        ("import nowhere\n", r"my run\.py:1: the recipe fails with ModuleNotFoundError"),
        ("def get_config(\n", "the recipe fails with SyntaxError"),
        ("x = 1\n", r"has no get_config\(arg\)"),
        ("def get_config(arg=''):\n    pass\n", "must return a ConfigDict"),
        (
            "from vilam3_jax import config\n\n\ndef get_config(arg=''):\n    return config.base_config()\n",
            "names no model",
        ),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_recipe_that_fails_is_named(tmp_path, text, message, joined):
    file = tmp_path / "my run.py"
    file.write_text(text)
    arguments = [f"--config={file}"] if joined else ["--config", str(file)]
    with pytest.raises(UserError, match=message) as told:
        config_lib.parse(arguments, flags.FlagValues())
    assert "\n" not in str(told.value)


def test_activation_rules_are_set_on_the_command_line():
    argv = ["--config=configs/stage3_instruct.py:tiny", "--config.activation_rules.heads="]
    argv += ["--config.activation_rules.queries=tensor"]
    rules = config_lib.parse(argv, flags.FlagValues()).activation_rules
    assert rules["heads"] == "" and rules["queries"] == "tensor"
    with pytest.raises(UserError, match=r"activation_rules\.heads='tensr': must be tensor or '' for none"):
        config_lib.parse([*argv[:1], "--config.activation_rules.heads=tensr"], flags.FlagValues())


@pytest.mark.parametrize(
    "rules,message",
    [
        ({"vocab": "fsdp"}, "activation_rules.vocab='fsdp': must be tensor or '' for none"),
        ({"mlp": "data"}, "activation_rules.mlp='data': must be tensor"),
        ({"length": "tensor"}, "activation_rules.length='tensor': must be context or '' for none"),
        ({"queries": "tensor"}, "heads and queries cannot both be split over tensor"),
        ({"tower_queries": "tensor"}, "tower_heads and tower_queries cannot both"),
        ({"heads": "", "queries": "tensor", "tower_heads": "tensor"}, "tower_heads and tower_queries"),
        ({"tower_heads": "queries"}, "must be tensor or '' for none, or 'heads'"),
        ({"batch": ["data"]}, "must be data and fsdp"),
    ],
)
def test_activation_rules_that_contradict_the_batch_or_each_other(rules, message):
    config = config_lib.load("configs/stage3_instruct.py:tiny")
    with pytest.raises(UserError, match=message):
        config.replace({f"activation_rules.{name}": axes for name, axes in rules.items()})


def test_pairs_are_not_accumulated():
    with pytest.raises(UserError, match="grad_accum=2: must be 1, as a contrastive run"):
        config_lib.load("configs/stage1_vision.py:tiny", {"grad_accum": 2})


def test_parts_are_swapped_and_then_overridden():
    spec = "configs/stage3_instruct.py:vila_m3_8b,llm=qwen3_8b,tower=siglip_so400m_448,template=qwen2"
    config = config_lib.parse([f"--config={spec}", "--config.model.llm.num_layers=2"], flags.FlagValues())
    llm = config.model.llm
    assert (llm.num_layers, llm.qk_norm, llm.hidden_size) == (2, True, 4096)
    assert config.model.image_size == config.model.vision_tower.image_size == 448
    assert config.model.template == "qwen2"


def test_overrides_reach_the_model():
    config = config_lib.parse(
        ["--config=configs/stage3_instruct.py:tiny", "--config.model.llm.num_layers=5"], flags.FlagValues()
    )
    assert config.model.llm.num_layers == 5
    assert config_lib.load("configs/stage3_instruct.py:tiny", {"seed": 7}).seed == 7
    with pytest.raises(UserError, match=r"sead.*seed"):
        config_lib.load("configs/stage3_instruct.py:tiny", {"sead": 7})


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python -m tests.test_configs --update")
    SNAPSHOTS.mkdir(exist_ok=True)
    for stale in SNAPSHOTS.glob("*.txt"):
        stale.unlink()
    for name in RECIPES:
        snapshot_file(name).write_text(config_lib.load(name).snapshot())
