"""The shipped mixtures: names in configs, published counts, and datasets that exist."""

import pytest
from absl import flags
from vilam3_jax.configs import mixtures

from vilam3_jax import config as config_lib
from vilam3_jax.data.experts.dialogues.rules import split_row
from vilam3_jax.data.stream import epochs_of
from vilam3_jax.datasets import registry
from vilam3_jax.errors import UserError

RECIPE = "configs/stage4_expert.py:tiny"


@pytest.mark.parametrize("name", mixtures.known())
def test_mixtures_name_datasets_rules_and_stages_that_exist(name):
    mixture = mixtures.get(name)
    assert (config_lib.configs_root() / f"{mixture.stage}.py").is_file()
    for row, weight in mixture.rows:
        dataset, _ = split_row(row)
        assert dataset.partition("/")[0] in registry.names(), row
        variants = registry.get(dataset.partition("/")[0]).configs
        assert not dataset.partition("/")[2] or dataset.partition("/")[2] in variants, row
        assert epochs_of(row, weight) > 0


def test_a_config_names_a_mixture_on_the_command_line_and_in_python():
    rows = mixtures.get("vila_m3_stage4").rows
    argv = [f"--config={RECIPE}", "--config.data.mixture=vila_m3_stage4"]
    assert config_lib.parse(argv, flags.FlagValues()).data.mixture == rows
    assert config_lib.load(RECIPE, {"data.mixture": "vila_m3_stage4"}).data.mixture == rows
    mixed = ("vila_1_5_align", ("mine", 2))
    assert config_lib.load(RECIPE, {"data.mixture": mixed}).data.mixture == (
        ("cc3m_595k/caption", 1),
        ("mine", 2),
    )
    plain = (("a", 1), ("b", 0.5))
    assert config_lib.load(RECIPE, {"data.mixture": plain}).data.mixture == plain


def test_a_recipe_may_name_a_mixture(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from vilam3_jax.configs import stage4_expert\n\n\ndef get_config(arg='tiny'):\n"
        "    config = stage4_expert.get_config(arg)\n    config.data.mixture = ('vila_1_5_align',)\n"
        "    return config\n"
    )
    assert config_lib.load(str(recipe)).data.mixture == (("cc3m_595k/caption", 1),)


def test_a_mixture_of_another_kind_of_run_is_refused():
    pairs = mixtures.get("medical_pairs").rows
    assert (
        config_lib.load("configs/stage1_vision.py:tiny", {"data.mixture": "medical_pairs"}).data.mixture
        == pairs
    )
    for recipe, name in ((RECIPE, "medical_pairs"), ("configs/stage1_vision.py:tiny", "vila_m3_stage4")):
        with pytest.raises(
            UserError, match=rf"data\.mixture: '{name}' is for stage._\w+, but this run has task="
        ):
            config_lib.load(recipe, {"data.mixture": name})


def test_an_unknown_mixture_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"data\.mixture: 'stage9' is not a mixture; known ones are .*stage4"):
        config_lib.load(RECIPE, {"data.mixture": "stage9"})


def test_replay_is_half_an_epoch_of_general_instructions():
    rows = mixtures.get("vila_m3_stage4_replay").rows
    assert rows[:-1] == mixtures.get("vila_m3_stage4").rows
    added = 0.5 * 665_000
    assert 0.14 < added / (added + 1_840_428) < 0.16
