"""Typed sections of configs: what they accept, and how their errors name key and fix."""

import dataclasses
import json

import pytest
from absl import flags

from vilam3_jax import config as config_lib
from vilam3_jax import train
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, describe, flatten, from_mapping, setting
from vilam3_jax.training.optimizer import OptimizerConfig
from vilam3_jax.training.run_config import RunConfig

RECIPE = "configs/stage3_instruct.py:tiny"


@pytest.fixture(scope="module")
def config():
    return config_lib.load(RECIPE)


@dataclasses.dataclass(frozen=True)
class Inner(Section):
    key = "outer.inner"
    size: int
    rate: float = setting(default=0.5, at_least=0, at_most=1)
    sides: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer(Section):
    key = "outer"
    inner: Inner
    mode: str = setting(default="fast", choices=("fast", "exact"))


@pytest.mark.parametrize(
    "key, message",
    [
        ("num_step", r"config key num_step: unknown; did you mean num_steps\?"),
        (
            "optimizer.clipnorm",
            r"config key optimizer\.clipnorm: unknown; did you mean optimizer\.clip_norm\?",
        ),
        ("model.llm.hiden_size", r"model\.llm\.hiden_size: unknown; did you mean model\.llm\.hidden_size\?"),
        ("zzz", r"config key zzz: unknown$"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(config, key, message):
    with pytest.raises(UserError, match=message):
        config_lib.load(RECIPE, {key: 1})
    with pytest.raises(UserError, match=message):
        config_lib.parse([f"--config={RECIPE}", f"--config.{key}=1"], flags.FlagValues())
    with pytest.raises(UserError, match=message):
        config.replace({key: 1})


def test_an_unknown_key_in_a_recipe_is_refused():
    recipe = config_lib.base_config()
    with recipe.unlocked():
        recipe.skip.windw, recipe.data.seq_length = 4, 128
    with pytest.raises(UserError, match=r"config key data\.seq_length: unknown; did you mean seq_len\?"):
        config_lib.resolve(recipe)
    with recipe.unlocked():
        del recipe.data.seq_length
    with pytest.raises(UserError, match=r"config key skip\.windw: unknown; did you mean window\?"):
        config_lib.resolve(recipe)


@pytest.mark.parametrize("old, new", config_lib.RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(old, new):
    message = rf"config key {old} is now {new}; rename it"
    with pytest.raises(UserError, match=message):
        config_lib.load(RECIPE, {old: ""})
    with pytest.raises(UserError, match=message):
        config_lib.parse([f"--config={RECIPE}", f"--config.{old}="], flags.FlagValues())
    recipe = config_lib.base_config()
    *parents, name = old.split(".")
    with recipe.unlocked():
        section = recipe[parents[0]] if parents else recipe
        section[name] = ""
    with pytest.raises(UserError, match=message):
        config_lib.resolve(recipe)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": "ten"}, r"config num_steps='ten': must be of type int"),
        ({"num_steps": 1.5}, r"config num_steps=1\.5: must be of type int"),
        ({"num_steps": True}, r"config num_steps=True: must be of type int"),
        ({"name": 7}, r"config name=7: must be of type str"),
        ({"optimizer.weight_decay": "much"}, r"config optimizer\.weight_decay='much': must be of type float"),
        ({"quantization.gradients": 1}, r"config quantization\.gradients=1: must be of type bool"),
        ({"num_steps": 0}, r"config num_steps=0: must be at least 1"),
        ({"data.seq_len": 0}, r"config data\.seq_len=0: must be at least 1"),
        ({"optimizer.b2": 1.5}, r"config optimizer\.b2=1\.5: must be from 0 to 0\.9999999"),
        ({"schedule.warmup_fraction": float("nan")}, r"warmup_fraction=nan: must be from 0 to 1"),
        ({"schedule.name": "linear"}, r"config schedule\.name='linear': must be 'cosine' or 'constant'"),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        config.replace(changes)


def test_an_integer_is_a_float():
    made = from_mapping(OptimizerConfig, {"weight_decay": 1})
    assert made.weight_decay == 1.0 and isinstance(made.weight_decay, float)


def test_bounds_are_included():
    assert Inner(1, rate=0.0).rate == 0.0 and Inner(1, rate=1.0).rate == 1.0
    with pytest.raises(UserError, match=r"config outer\.inner\.rate=1\.01: must be from 0 to 1"):
        Inner(1, rate=1.01)


def test_nested_sections_come_from_nested_mappings():
    made = from_mapping(Outer, {"inner": {"size": 3, "sides": [1, 2]}})
    assert made == Outer(Inner(3, 0.5, (1, 2)), "fast")
    assert from_mapping(Outer, made.to_dict()) == made
    with pytest.raises(UserError, match=r"config: outer\.inner\.size missing"):
        from_mapping(Outer, {"inner": {}})
    with pytest.raises(UserError, match=r"config key outer\.inner\.sise: unknown; did you mean size\?"):
        from_mapping(Outer, {"inner": {"sise": 3}})
    with pytest.raises(UserError, match=r"config outer\.mode='slow': must be 'fast' or 'exact'"):
        from_mapping(Outer, {"inner": {"size": 3}, "mode": "slow"})


def test_replace_copies_and_validates(config):
    before = config.snapshot()
    changed = config.replace({"data.seq_len": 8, "model.llm.num_layers": 1}, num_steps=3)
    assert (changed.data.seq_len, changed.model.llm.num_layers, changed.num_steps) == (8, 1, 3)
    assert config.snapshot() == before
    assert config.replace(optimizer=OptimizerConfig(name="lion")).optimizer.name == "lion"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_steps = 7
    # Also what concerns several fields.
    with pytest.raises(UserError, match=r"optimizer\.nu_dtype: lion does not keep this moment"):
        config.replace({"optimizer.name": "lion", "optimizer.nu_dtype": "bfloat16"})


def test_a_config_survives_json(config):
    assert from_mapping(RunConfig, json.loads(config.to_json())) == config
    assert config_lib.resolve(config) is config


@pytest.mark.parametrize(
    "recipe", [RECIPE, "configs/stage1_vision.py:vila_m3_8b", "configs/stage4_expert.py:vila_m3_40b"]
)
def test_every_key_is_described(recipe):
    config = config_lib.load(recipe)
    rows = {key: (value, text) for key, value, text in describe(config)}
    assert {key.split(".")[0] for key in rows} == set(config.to_dict())
    values = flatten(config.to_dict())
    assert all(rows[key][0] == value for key, value in values.items() if key in rows)
    assert [key for key in values if not any(key == k or key.startswith(f"{k}.") for k in rows)] == []
    assert [key for key, (_, text) in rows.items() if not text] == []


def test_train_prints_the_keys_and_does_not_train(capsys):
    assert train.main([f"--config={RECIPE}", "--print", "--config.num_steps=7"]) == 0
    assert "num_steps = 7\n    optimizer steps of the run.\n" in capsys.readouterr().out
