"""`vilam3 plan --generate`: the programs that run, what they read, cost, and errors."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.inference.tiny import model_config, tokenizer, tokenizer_dir  # noqa: F401
from vilam3_jax import cli
from vilam3_jax import config as config_lib
from vilam3_jax.inference import placement
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build
from vilam3_jax.models.model_config import resolve
from vilam3_jax.plan import compiler, generation, hlo, topology
from vilam3_jax.plan import main as plan_main
from vilam3_jax.plan.generation import Generation, Workload
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.mesh import MeshConfig


def of_tokens(model_config, count):  # noqa: F811
    """The tiny model with a vocabulary of `count`."""
    model = copy.deepcopy(model_config)
    model.llm.vocab_size, model.llm.tie_embeddings = count, False
    return resolve(model)


def two_devices():
    return mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])


def placed(model, mesh):
    """Random parameters on a mesh."""
    wanted, structure = jax.tree.flatten(placement.abstract_params(model, mesh))
    values = jax.tree.leaves(build.init_params(model, "generative", jax.random.key(0)))
    pairs = zip(values, wanted, strict=True)
    return structure.unflatten([jax.device_put(x, leaf.sharding) for x, leaf in pairs])


def test_the_programs_are_those_that_run(model_config, tokenizer, monkeypatch):  # noqa: F811
    """Equal StableHLO on two devices: an image, a prompt and an answer."""
    model, mesh = of_tokens(model_config, tokenizer.vocab_size), two_devices()
    generator = Generator(model, placed(model, mesh), tokenizer, max_length=700, batch_size=2, mesh=mesh)
    programs, ran = generator._programs, {}

    def recording(name):
        def run(*args, **options):
            ran.setdefault(name, getattr(programs, name).lower(*args, **options).as_text())
            return getattr(programs, name)(*args, **options)

        return run

    recorded = {name: recording(name) for name in ("encode", "prefill", "decode")}
    monkeypatch.setattr(generator, "_programs", dataclasses.replace(programs, **recorded))
    index = np.full(40, -1, np.int32)
    index[3 : 3 + generator.tokens_per_image] = np.arange(generator.tokens_per_image)
    image = np.zeros((generator.image_size, generator.image_size, 3), np.uint8)
    generator.start(1, size=256).append([Chunk(np.ones(40, np.int32), index, (image,))])
    session = generator.start(2, size=256)
    session.append([Chunk.text([5, 6])] * 2)
    session.decode(20)

    planned = Generation(model, mesh, Workload(slots=2, prompt=40, answer=20, images=1))
    for name in recorded:
        assert getattr(planned, name).lower().as_text() == ran[name], name


def test_what_a_token_reads(model_config):  # noqa: F811
    """Half of the layers and of the head, the norms, and half of the cache; no embeddings and no tower."""
    model = of_tokens(model_config, 320)
    llm = model.llm
    size = np.dtype(model.param_dtype).itemsize
    heads = (llm.num_heads + llm.num_kv_heads) * llm.head_dim
    matrices = llm.num_layers * llm.hidden_size * (2 * heads + 3 * llm.mlp_dim) + llm.hidden_size * 320
    norms = (2 * llm.num_layers + 1) * llm.hidden_size
    cache = 2 * llm.num_layers * 3 * llm.num_kv_heads * 256 * llm.head_dim
    planned = Generation(model, two_devices(), Workload(slots=3, prompt=100, answer=100, images=0))
    assert planned.encode is None and planned.positions == 256 and planned.parts == 1
    assert planned.bytes_per_token() == size * (matrices / 2 + norms + cache / 2)


def test_conditionals_take_either_branch():
    branch = (
        "%{name} (p: bf16[8,8]) -> bf16[8,8] {{\n  %p = bf16[8,8]{{1,0}} parameter(0)\n"
        "  ROOT %f.{name} = bf16[8,8]{{1,0}} fusion(%p), kind=kLoop, calls=%x, "
        'backend_config={{"estimated_cycles":"{cycles}"}}\n}}\n\n'
    )
    text = "HloModule test, is_scheduled=true, num_partitions=1\n\n"
    text += branch.format(name="sampled", cycles=900) + branch.format(name="greedy", cycles=2)
    text += (
        "ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {\n  %a = bf16[8,8]{1,0} parameter(0)\n"
        "  ROOT %c = bf16[8,8]{1,0} conditional(%a, %a, %a), true_computation=%sampled, "
        "false_computation=%greedy\n}\n"
    )
    assert hlo.read(text).cycles == 900 and hlo.read(text, costliest_branch=False).cycles == 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory, model_config):  # noqa: F811
    """A model of one layer on four chips."""
    model = copy.deepcopy(model_config)
    model.llm.num_layers = model.vision_tower.num_layers = 1
    model.vision_tower.select_layer = -1
    model.llm.num_heads, model.llm.num_kv_heads, model.llm.head_dim = 8, 4, 128
    model.llm.max_positions = 1024
    cache = compiler.Cache(tmp_path_factory.mktemp("compiled"))
    workload = Workload(slots=4, prompt=600, answer=100, images=1)
    return generation.make_plan(resolve(model), topology.parse("v6e:2x2"), cache, workload, price=2.0)


@pytest.mark.slow
def test_a_small_model_on_four_chips(plan):
    memory, token = plan.memory, plan.token
    assert memory.fits and plan.positions == 768
    assert memory.cache == 2 * 4 * 1 * 768 * 128 * 2  # keys and values of one of four heads
    assert memory.needed == memory.weights + memory.cache + max(memory.decode, memory.prefill)
    assert min(memory.decode, memory.prefill) > 0
    assert token.dynamic_loops == [] or len(set(token.dynamic_loops)) == 1
    assert token.kernels > 0, "attention to the cache is a kernel"
    computing = token.products + token.others + token.kernels
    assert plan.bandwidth_share == pytest.approx(plan.read_bytes / 1.6e12 / computing)
    assert plan.sampled > 0 and plan.first.worst > 0
    assert plan.time_to_first_token[1] == pytest.approx(plan.prefill.worst + plan.first.worst)
    assert plan.tokens_per_second[1] == pytest.approx(4 / token.worst)
    answer = plan.time_to_first_token[1] + 100 / 4 * token.worst
    assert plan.answers_per_hour[1] == pytest.approx(3600 / answer)
    assert plan.cost[1] == pytest.approx(1000 * answer / 3600 * 4 * 2.0)
    text = plan_main.generation_table(plan)
    assert "4 chips" in text and "fits" in text and "cost of 1,000 answers" in text
    assert json.loads(json.dumps(plan.to_dict()))["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 64])
def test_decoding_reads_at_three_quarters_of_the_bandwidth(tmp_path, slots):
    """VILA-M3 8B on four chips of v6e; no transfer has more bytes than the hidden states of all slots."""
    config = config_lib.load("configs/stage4_expert.py:vila_m3_8b")
    workload = Workload(slots, prompt=1792, answer=256)
    cache = compiler.Cache(tmp_path)
    found = generation.make_plan(config.model, topology.parse("v6e:2x2"), cache, workload)
    assert found.memory.fits and found.bandwidth_share >= 0.75
    assert found.largest_transfer <= 2 * 4096 * max(slots, 16)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--topology=v5e:2x2", "--prompt=1"], "1 image(s) alone take"),
        (["--topology=v5e:2x2", "--prompt=100000"], "positions of"),
        (["--topology=v5e:2x2", "--slots=0"], "slots"),
        (["--topology=2xv5e:2x2"], "a model generates on one slice"),
        (["--topology=v5e:2x2", "--search"], "--search plans training"),
        (["--topology=v5e:4x8"], "32"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path):
    argv = ["plan", "--generate", "--config=configs/stage4_expert.py:tiny", f"--cache={tmp_path}"]
    assert cli.main([*argv, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vilam3 plan: error:") and message in error


def test_flags_of_generation_need_it(capsys, tmp_path):
    argv = ["plan", "--config=configs/stage4_expert.py:tiny", "--topology=v5e:2x2", f"--cache={tmp_path}"]
    assert cli.main([*argv, "--slots=3"]) == 2
    assert "--slots needs --generate" in capsys.readouterr().err


def test_a_stage_without_an_llm_has_nothing_to_generate(capsys, tmp_path):
    argv = ["plan", "--generate", "--config=configs/stage1_vision.py:tiny", "--topology=v5e:2x2"]
    assert cli.main([*argv, f"--cache={tmp_path}"]) == 2
    assert "generates no text" in capsys.readouterr().err
