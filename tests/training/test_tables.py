import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.sharding import path_rules

PATHS = ["llm/embed/embedding", "llm/layers/attn/q/kernel", "projector/fc1/kernel"]


def test_first_matching_row_wins_and_matches_the_whole_path():
    table = ((r"llm/embed/.*", 0.5), (r"llm/.*", 0.0), (r"projector/fc1", 9.0), (r"projector/.*", 1.0))
    found = path_rules.resolve(table, PATHS, "trainable", optional=[r"projector/fc1"])
    assert found == {PATHS[0]: 0.5, PATHS[1]: 0.0, PATHS[2]: 1.0}


def test_unmatched_parameters_stop_the_run_by_name():
    with pytest.raises(UserError, match="projector/fc1/kernel"):
        path_rules.resolve(((r"llm/.*", 0.0),), PATHS, "trainable")


def test_unused_rows_stop_the_run_by_name():
    with pytest.raises(UserError, match="vision_tower"):
        path_rules.resolve(((r"vision_tower/.*", 1.0), (r".*", 0.0)), PATHS, "trainable")
