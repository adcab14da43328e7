"""`llm=FOLDER` in the argument of a recipe: an imported LLM brings its shapes, tokenizer and weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from absl import flags
from foreign import LLAMA, SIGLIP, llama_weights, siglip_weights, write_folder

from vilam3_jax import cli
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.errors import UserError
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folder of imports: `llm` (with a tokenizer), `tower`, and `source` of the LLM."""
    folder = tmp_path_factory.mktemp("imported")
    train_bpe(["liver spleen"], 270, folder / "words")
    write_folder(folder / "source", LLAMA, llama_weights())
    write_folder(folder / "siglip", SIGLIP, siglip_weights())
    for source, out, more in (
        ("source", "llm", ["--tokenizer", str(folder / "words")]),
        ("siglip", "tower", []),
    ):
        argv = ["convert", "import", "--source", str(folder / source), "--out", str(folder / out), *more]
        assert cli.main(argv) == 0
    return folder


def parse(spec, *overrides):
    argv = [f"--config=configs/{spec}", *(f"--config.{one}" for one in overrides)]
    return config_lib.parse(argv, flags.FlagValues())


@pytest.mark.parametrize(
    "recipe", ["stage2a_align", "stage2b_pretrain", "stage3_instruct", "stage4_expert", "small_data"]
)
def test_it_brings_shapes_tokenizer_and_weights_and_keeps_lora(imported, recipe):
    llm = str(imported / "llm")
    for config in (
        parse(f"{recipe}.py:smollm2_135m,llm={llm}"),
        config_lib.load(f"configs/{recipe}.py:smollm2_135m,llm={llm}"),
    ):
        stored = exports.load_model_config(llm).llm
        assert (config.init.llm, config.model.tokenizer) == (llm, f"{llm}/tokenizer")
        assert config.model.llm.lora_rank == 16 and stored.lora_rank == 0
        lora = {"lora_rank": 0, "lora_alpha": stored.lora_alpha, "lora_targets": ()}
        assert config.model.llm.replace(lora) == stored
        assert config.model.vision_tower.image_size == 96


def test_what_the_user_sets_comes_first(imported):
    llm = str(imported / "llm")
    spec = f"stage3_instruct.py:tiny,llm={llm}"
    config = parse(spec, "model.tokenizer=words", "init.llm=other", "model.llm.rope_theta=5.0")
    assert (config.model.tokenizer, config.init.llm, config.model.llm.rope_theta) == ("words", "other", 5.0)
    # The stage before has trained the LLM: `everything` must not be overwritten by the import.
    before = parse(spec, "init.everything=before")
    assert (before.init.llm, before.init.everything) == ("", "before")
    both = config_lib.load(f"configs/{spec}", {"init.everything": "before", "init.llm": llm})
    assert (both.init.llm, both.init.everything) == (llm, "before")
    assert parse(spec, "init.llm=").init.llm == ""


def test_a_run_starts_from_it(imported):
    config = parse(f"stage2a_align.py:tiny,llm={imported / 'llm'}")
    state, origin = program_lib.build(
        config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1])
    ).initial_state()
    assert origin["llm"] == str(imported / "llm") and origin["projector"] == "fresh"
    name = "llm/embed/embedding"
    (rows,) = exports.stored_rows(imported / "llm")[name]
    np.testing.assert_array_equal(
        np.asarray(state.params()[name], np.float32), rows.read().astype(np.float32)
    )


@pytest.mark.parametrize(
    ("recipe", "folder", "message"),
    [
        ("stage2a_align", "nowhere", r"llm '.*nowhere': unknown; known are .*qwen3_8b.*imported LLM"),
        (
            "stage2a_align",
            "source",
            r"is not an import; make one with `vilam3 convert import --source .*source",
        ),
        ("stage2a_align", "tower", r"llm '.*tower': holds a (vision_tower|contrastive), not an LLM"),
        ("stage1_vision", "llm", r"trains no LLM; leave out llm=.*model\.tokenizer="),
    ],
)
def test_a_folder_without_an_llm_is_one_sentence(imported, recipe, folder, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(f"{recipe}.py:tiny,llm={imported / folder}")
    assert "\n" not in str(caught.value)
