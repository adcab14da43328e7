"""The program built from the config equals the one that training runs."""

import pytest

from tests.training.helpers import tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax import train
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.data.batches import arrays
from vilam3_jax.datasets import phantoms, prepare, train_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.plan import topology
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.device_put import DevicePut

CASES = {
    "packed": {},
    "groups of two rows": {"rows_per_group": 2, "images_per_group": 3},
    "pairs": {"task": "contrastive"},
    "tiles": {"image_aspect_ratio": "dynamic_s2"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    phantoms.make_phantoms(root / "samples", seed=1, num=3)
    arguments = ["quickstart", "--source", str(root / "samples"), "--out", str(root / "data")]
    assert prepare.main([*arguments, "--size", "smoke"]) == 0
    train_tokenizer.main(["--data", str(root / "data"), "--out", str(root / "tokenizer"), "--vocab_size=600"])
    return root


def make_config(world, changes):
    config = tiny_config(changes.get("task", "generative"), data=2, fsdp=2, tensor=2)
    config.data.path, config.model.tokenizer = str(world / "data"), str(world / "tokenizer")
    config.data.mixture = (("pairs", 1.0),) if config.task == "contrastive" else (("instruct", 1.0),)
    config.data.seq_len = 128
    with config.unlocked():
        if "image_aspect_ratio" in changes:
            config.model.update(dict(image_aspect_ratio="dynamic_s2", s2_scales=(32, 64), max_tiles=4))
            config.data.images_per_group = 5
    for key in ("rows_per_group", "images_per_group"):
        config.data[key] = changes.get(key, config.data[key])
    return config_lib.resolve(config)


def built(config):
    """The program of a recipe's config."""
    config = config_lib.resolve(config)
    return program_lib.build(config, mesh_lib.build_mesh(config.mesh))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_step_from_the_config_alone_is_the_step_on_the_loaders_batches(world, changes):
    """The same StableHLO as with the state of `initial_state` and a batch of the loader."""
    config = make_config(world, changes)
    program = built(config)
    loader = loader_lib.build_loader(
        config.data, config.model, program.task.batch_format, "train", seed=config.seed, experts="off"
    )
    batch = next(iter(loader))
    loader.close()
    batch = DevicePut(program.task.batch_format(config.data, config.model).units, program.mesh)(batch)
    state, _ = program.initial_state()
    with program.context():
        training = built(config).step.lower(state, batch)
    assert program.lower().as_text() == training.as_text()
    given, expected = (
        {name: x.sharding for name, x in arrays(one).items()} for one in (batch, program.batch)
    )
    assert given == expected
    assert "sharding" in training.as_text()


def test_training_takes_its_step_from_the_program(world, tmp_path, monkeypatch):
    """`train` compiles the result of `Program.lower`, called once."""
    lowered = []
    lower = program_lib.Program.lower
    monkeypatch.setattr(
        program_lib.Program, "lower", lambda self: lowered.append(lower(self).as_text()) or lower(self)
    )
    config = make_config(world, {}).replace(num_steps=2)
    train.train(config, tmp_path / "run", quiet=True)
    assert lowered == [lower(built(config)).as_text()]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"grad_accum": 2}, r"grad_accum=2: 4 groups of rows at a time are not divisible by the 8 devices"),
        ({"trainable": ((r".*", 0.0),)}, "nothing would be trained"),
        ({"trainable": (r".*", 1.0)}, r"config trainable: '\.\*' is not a row"),
        ({"trainable": ((r"(", 1.0),)}, r"config trainable: '\(' is not a regular expression"),
        ({"parameter_rules": ((r".*", ("nope",)),)}, "parameter_rules.*names nope; axes are data"),
        ({"parameter_rules": ((r".*",),)}, "parameter_rules.*is not a row"),
        ({"model.llm.lora_rank": 4, "model.llm.lora_targets": ()}, "lora_rank=4 with lora_targets"),
        ({"model.llm.lora_rank": -4}, "lora_rank=-4"),
    ],
)
def test_settings_that_cannot_run_are_one_clear_error(changes, message):
    config = tiny_config(fsdp=8)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        built(config)


def test_heads_that_the_mesh_cannot_split_are_one_clear_error():
    config = tiny_config(tensor=8)
    with pytest.raises(UserError, match="heads do not split into 8"):
        built(config).lower()


def test_a_batch_that_does_not_divide_is_refused():
    config = tiny_config(data=2, fsdp=4)
    config.data.global_rows = 4
    with pytest.raises(UserError, match=r"data\.global_rows"):
        built(config)


def test_what_tpus_are_told_and_the_config_has_the_last_word():
    pytest.importorskip("libtpu")
    name = "xla_tpu_scoped_vmem_limit_kib"
    offload = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
    mesh_config = config_lib.resolve(tiny_config(fsdp=-1)).mesh
    meshes = {
        generation: mesh_lib.build_mesh(mesh_config, topology.parse(f"{generation}:{shape}").devices())
        for generation, shape in (("v4", "2x2x1"), ("v5e", "2x2"), ("v5p", "2x2x1"), ("v6e", "2x2"))
    }
    told = {key: program_lib.compiler_options((), mesh) for key, mesh in meshes.items()}
    assert told["v4"] == {} and 16384 < told["v5p"][name] < told["v6e"][name]
    assert [key for key in told if told[key].get(offload)] == ["v5p", "v6e"] and offload not in told["v5e"]
    overrides = ((name, 16384), (offload, False))
    last = program_lib.compiler_options(overrides, meshes["v5p"])
    assert (last[name], last[offload]) == (16384, False)
    for mesh in meshes.values():
        program_lib.check_compiler_options(overrides, mesh)
    assert program_lib.compiler_options((), mesh_lib.build_mesh(mesh_config)) == {}


def test_an_option_that_the_compiler_does_not_know_is_refused_before_the_run():
    mesh = mesh_lib.build_mesh(config_lib.resolve(tiny_config(fsdp=8)).mesh)
    program_lib.check_compiler_options((("xla_cpu_enable_fast_math", True),), mesh)
    with pytest.raises(UserError, match="xla_no_such_thing"):
        program_lib.check_compiler_options((("xla_no_such_thing", True),), mesh)


@pytest.mark.parametrize(
    "rows", [("xla_option", True), (("xla_option",),), ((1, True),), (("xla_option", (1,)),), (7,)]
)
def test_compiler_options_are_rows_of_name_and_value(rows):
    config = tiny_config()
    config.compiler_options = rows
    with pytest.raises(UserError, match="compiler_options"):
        config_lib.resolve(config)
