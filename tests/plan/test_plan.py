"""`vilam3 plan`: estimates, search, cache and errors."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.training.helpers import tiny_config
from vilam3_jax import cli
from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention
from vilam3_jax.plan import compiler, estimate, hlo, search, topology
from vilam3_jax.plan import main as plan_main
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.chips import GIB
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.training import program as program_lib


def small(**changes):
    """One narrow layer of each kind: compiles in seconds."""
    config = tiny_config(fsdp=8)
    config.name = "small"
    config.model.llm.num_layers = 1
    config.model.vision_tower.num_layers, config.model.vision_tower.select_layer = 1, -1
    config.data.seq_len, config.loss_chunk = 128, 128
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return compiler.Cache(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def plan(cache):
    return estimate.make_plan(small(), topology.parse("v5e:2x4"), cache, price=2.0)


@pytest.mark.slow
def test_a_small_step_on_eight_chips(plan):
    memory, speed = plan.memory, plan.speed
    assert memory.fits and 0 < memory.parameters < memory.needed < memory.limit == 15.75 * GIB
    assert memory.optimizer == pytest.approx(
        2 * memory.parameters, rel=0.01
    )  # Adam's two moments and counters
    assert speed.cycles / speed.clock == pytest.approx(speed.products + speed.others)
    assert speed.products > 0 and speed.best <= speed.worst
    assert speed.worst == pytest.approx(
        speed.products + speed.others + speed.kernels + sum(speed.collectives.values())
    )
    assert plan.tokens_per_second[1] == pytest.approx(8 * 128 / speed.worst)
    assert plan.mfu[1] == pytest.approx(plan.model_flops / (speed.worst * 8 * 197e12))
    assert plan.cost[0] == pytest.approx(2 * plan.chip_hours[0])
    assert plan.chip_hours[0] == pytest.approx(8 * 20 * speed.best / 3600)
    text = plan_main.table(plan)
    assert "8 chips" in text and "v5litepod-8" in text and "fits" in text and "cost" in text


@pytest.mark.slow
def test_the_search_ranks_goes_on_where_it_ended_and_keeps_its_bound(tmp_path, plan):
    lines = []
    cache = compiler.Cache(tmp_path)
    wanted = topology.parse("v5e:2x2")
    first = search.search(small(), wanted, cache, None, 2, lines.append)
    assert cache.compiled == 2 and len(first) == 2
    again = compiler.Cache(tmp_path)
    more = search.search(small(), wanted, again, None, 1, lines.append)
    assert again.compiled == 1 and len(more) == 3
    speeds = [found.tokens_per_second[1] for found in more]
    assert speeds == sorted(speeds, reverse=True)
    assert all(found in more for found in first)


@pytest.mark.slow
def test_another_price_compiles_nothing(cache, plan):
    before = cache.compiled
    dear = estimate.make_plan(small(), topology.parse("v5e:2x4"), cache, price=20.0)
    assert cache.compiled == before > 0 and dear.cost[0] == pytest.approx(10 * plan.cost[0])
    assert dataclasses.replace(dear, cost=plan.cost) == plan


@pytest.mark.parametrize("rows,steps", [(8, 20), (6, 20), (16, 20), (4, 20), (32, 20)])
def test_a_search_gives_every_device_rows(monkeypatch, tmp_path, rows, steps):
    asked, lines = [], []

    def make_plan(config, wanted, cache, price, only_if_resident):
        asked.append((config.data.global_rows, config.num_steps))
        raise UserError("not now")

    monkeypatch.setattr(estimate, "make_plan", make_plan)
    config = small(**{"data.global_rows": rows, "data.rows_per_group": 2, "num_steps": steps})
    search.search(config, topology.parse("v5e:2x4"), compiler.Cache(tmp_path), None, 3, lines.append)
    scaled, fewer = asked[0]
    assert (scaled, fewer) == (math.lcm(rows, 16), steps * rows // math.lcm(rows, 16))
    assert any("too few rows" in line for line in lines) == (scaled != rows)


def holding(limit):
    """A `make_plan` whose steps need one GiB per row that a device computes at a time."""
    asked = []

    def make_plan(config, wanted, cache, price, only_if_resident):
        mesh = mesh_lib.build_mesh(config.mesh, wanted.devices())
        program_lib.build(config, mesh)  # raises if not divisible
        ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
        needed = config.data.global_rows / (config.grad_accum * ways)
        asked.append(config)
        memory = estimate.Memory(0.1 * GIB, 0.1 * GIB, 0.0, needed * GIB, needed * GIB, limit * GIB)
        speed = (2.0, 1.0) if memory.fits else None
        return estimate.Plan(
            "small", "small", wanted.name, wanted.product, 8, 8, dict(mesh.shape), config.model.remat,
            config.data.global_rows, memory, tokens_per_second=speed,
        )  # fmt: skip

    return make_plan, asked


@pytest.mark.parametrize(
    "limit,changes",
    [
        (4, {}),
        (2, {"grad_accum": 2}),
        (1, {"grad_accum": 4, "data.rows_per_group": 1, "data.images_per_group": 3}),
        (
            0.25,
            {
                "grad_accum": 16,
                "data.rows_per_group": 1,
                "data.images_per_group": 3,
                "mesh.context": 4,
                "mesh.fsdp": 2,
            },
        ),
    ],
)
def test_a_search_computes_less_at_a_time_until_it_fits(monkeypatch, tmp_path, limit, changes):
    make_plan, asked = holding(limit)
    monkeypatch.setattr(estimate, "make_plan", make_plan)
    given = {"data.global_rows": 32, "data.rows_per_group": 2, "data.images_per_group": 5}
    given |= {"model.remat": "full", "mesh.data": 1}
    wanted = topology.parse("v5e:2x4")
    plans = search.search(small(**given), wanted, compiler.Cache(tmp_path), None, 99, lambda line: None)
    first = next(plan for plan in plans if plan.memory.fits)
    assert first.changes == changes
    assert small(**(given | changes)).snapshot() in [one.snapshot() for one in asked]
    assert set(search.as_flags(changes).split()) <= set(plan_main.table(first).split())


def test_a_search_keeps_the_rows_where_every_device_has_one(monkeypatch, tmp_path):
    """Groups of two rows need sixteen rows; groups of one need the given eight, without accumulation."""
    make_plan, asked = holding(1)
    monkeypatch.setattr(estimate, "make_plan", make_plan)
    given = {"data.global_rows": 8, "data.rows_per_group": 2, "data.images_per_group": 5, "num_steps": 20}
    config = small(**given, **{"model.remat": "full", "mesh.data": 1})
    wanted = topology.parse("v5e:2x4")
    plans = search.search(config, wanted, compiler.Cache(tmp_path), None, 99, lambda line: None)
    assert [(one.data.global_rows, one.num_steps) for one in asked[:2]] == [(16, 10), (8, 20)]
    (first, *_) = [plan for plan in plans if plan.memory.fits]
    assert first.changes == {"data.rows_per_group": 1, "data.images_per_group": 3}


def test_a_search_shares_rows_between_copies_of_the_parameters_first(monkeypatch, tmp_path):
    make_plan, asked = holding(0.5)

    def no_more_than_four(config, *arguments, **named):
        if config.mesh.fsdp > 4:
            raise UserError("a width does not divide")
        return make_plan(config, *arguments, **named)

    monkeypatch.setattr(estimate, "make_plan", no_more_than_four)
    config = small(**{"data.global_rows": 32, "model.remat": "full"})
    wanted = topology.parse("v5e:2x4")
    plans = search.search(config, wanted, compiler.Cache(tmp_path), None, 99, lambda line: None)
    (shared,) = {(one.mesh.data, one.mesh.fsdp) for one in asked if one.mesh.context == 2}
    assert shared == (1, 4) and plans[0].changes["mesh.context"] == 2


def test_a_search_that_finds_nothing_keeps_the_rows_and_tries_no_copies(monkeypatch, tmp_path):
    make_plan, asked = holding(0.001)
    monkeypatch.setattr(estimate, "make_plan", make_plan)
    config = small(**{"data.global_rows": 32, "data.rows_per_group": 2, "data.images_per_group": 5})
    plans = search.search(
        config, topology.parse("v5e:2x4"), compiler.Cache(tmp_path), None, 99, lambda line: None
    )
    assert not any(plan.memory.fits for plan in plans) and len(plans) == len(asked)
    assert all(one.mesh.data == 1 for one in asked)
    assert plans[0].memory.needed == min(plan.memory.needed for plan in plans)


def test_what_is_known_only_in_part_is_not_taken_for_the_nearest():
    make_plan, _ = holding(1)
    known = make_plan(small(), topology.parse("v5e:2x4"), None, None, True)
    memory = dataclasses.replace(known.memory, temporary=9.0 * GIB, needed=18.1 * GIB)
    compiled = dataclasses.replace(known, memory=memory, tokens_per_second=None)
    only_held = dataclasses.replace(memory, temporary=0.0, needed=18.0 * GIB)
    held_only = dataclasses.replace(compiled, memory=only_held)
    assert sorted([held_only, compiled], key=search._rank) == [compiled, held_only]


def test_a_moving_average_is_held_with_the_optimizers_state():
    parts = {}
    for decay in (0.0, 0.999):
        config = config_lib.resolve(tiny_config())
        config = config.replace({"ema_decay": decay, "optimizer.mu_dtype": "float32"})
        program = program_lib.build(config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1]))
        parts[decay] = estimate._resident(program, topology.parse("v5e:1x1").chip)
    assert parts[0.999][0] == parts[0.0][0] and parts[0.999][2] == parts[0.0][2]
    np.testing.assert_allclose(parts[0.999][1] / parts[0.0][1], 1.5, rtol=1e-4)


def test_what_cannot_hold_its_parameters_is_not_compiled(tmp_path):
    cache, lines = compiler.Cache(tmp_path), []
    wanted = topology.parse("v5e:2x4")
    wanted = dataclasses.replace(wanted, chip=dataclasses.replace(wanted.chip, hbm_bytes=1000))
    plans = search.search(small(), wanted, cache, None, 12, lines.append)
    assert cache.compiled == 0 and plans and not any(plan.memory.fits for plan in plans)
    assert any("for parameters, optimizer and batch alone, does not fit" in line for line in lines)
    assert "without gradients and activations" in plan_main.table(plans[0])


def of_kernels(**changes):
    """One layer of each kind, of the smallest sizes with the kernels of VILA-M3."""
    config = config_lib.load("configs/stage4_expert.py:vila_m3_8b")
    llm = dict(num_layers=1, hidden_size=256, num_heads=2, num_kv_heads=1, mlp_dim=512, vocab_size=1031)
    tower = dict(num_layers=1, select_layer=-1, hidden_size=256, num_heads=2, mlp_dim=512, image_size=112)
    data = dict(global_rows=32, seq_len=512, images_per_group=2)
    parts = {"model.llm": llm, "model.vision_tower": tower, "data": data}
    sizes = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    mesh = {"mesh.data": 1, "mesh.fsdp": -1}
    return config.replace({**sizes, "model.image_size": 112, **mesh, **changes})


_LORA = {
    "model.llm.lora_rank": 8,
    "model.llm.lora_targets": ("q", "v", "o", "up"),
    "trainable": ((r"llm/.*lora_[ab]", 1.0), (r".*", 0.0)),
}
_QUERY_RULES = {"heads": "", "kv_heads": "", "queries": "tensor"}
_QUERIES = {f"activation_rules.{name}": axis for name, axis in _QUERY_RULES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "name,changes",
    [
        ("v4:2x2x1", {}),
        ("v5e:2x2", {}),
        ("v6e:2x2", {}),
        ("tpu7x:2x2x1", {}),
        ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.context": 2}),
        ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.context": 2, "attention": "ring"}),
        ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.tensor": 2}),
        ("v5p:2x2x1", {"mesh.fsdp": 2, "mesh.tensor": 2, **_QUERIES}),
        ("v5p:2x2x2", {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}),
        ("2xv5p:2x2x1", {"mesh.data": 2}),
        ("v5p:2x2x1", {"optimizer.name": "muon", "ema_decay": 0.9, "skip.spike": 5.0}),
        ("v5e:2x2", {"quantization.matmul": "int8", "quantization.gradients": True}),
        ("v5p:2x2x1", {"quantization.frozen": "nf4", **_LORA}),
    ],
)
def test_what_a_run_may_ask_for_compiles_for_tpus(tmp_path, name, changes, accumulate):
    config = of_kernels(**changes, grad_accum=accumulate)
    plan = estimate.make_plan(config, topology.parse(name), compiler.Cache(tmp_path))
    assert plan.memory.fits and plan.speed.products > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_memory_of_a_chip_is_what_libtpu_gives(tmp_path, name):
    config = of_kernels(**{"data.seq_len": 4096, "data.global_rows": 2**16})
    wanted = topology.parse(name)
    plan = estimate.make_plan(config, wanted, compiler.Cache(tmp_path))
    assert not plan.memory.fits and plan.memory.limit == pytest.approx(wanted.chip.hbm_bytes, abs=0.01 * GIB)


@pytest.mark.slow
def test_accumulation_compiles_for_tpus(tmp_path):
    """XLA would try to move bfloat16 all-reduces out of the loop, and fail."""
    plan = estimate.make_plan(of_kernels(grad_accum=2), topology.parse("v5p:2x2x1"), compiler.Cache(tmp_path))
    assert plan.memory.fits


def test_a_compiled_step_is_kept(tmp_path, monkeypatch):
    calls, made = [], compiler.Compiled("HloModule m", 10.0, 4.0)
    monkeypatch.setattr(compiler, "compile_lowered", lambda lowered: calls.append(lowered) or made)

    def compiled(slice_="v5e:2x4", **changes):
        config = small(**changes)
        program = program_lib.build(config, mesh_lib.build_mesh(config.mesh))
        assert compiler.Cache(tmp_path).compile(program, topology.parse(slice_)) == made
        return len(calls)

    assert compiled() == 1 == compiled(name="another", log_every=7)
    assert compiled(loss_chunk=64) == 2
    assert compiled("v6e:2x4") == 3
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    assert compiled() == 4 == compiled()
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    assert compiled() == 5 == compiled()


def test_a_cache_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*file/folder: cannot be made"):
        compiler.Cache(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    "text,needed,limit",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 27.8G of 15.75G hbm. E",
            27.8,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(32.00G) exceeds available HBM (15.75G).",
            32,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 2.00G hbm.", 0.5, 2),
    ],
)
def test_too_little_memory_is_an_answer(text, needed, limit):
    found = compiler._out_of_memory(RuntimeError(text))
    assert found == (pytest.approx(needed * GIB), pytest.approx(limit * GIB))
    memory = dataclasses.replace(estimate.Memory(0, 0, 0, 0, 0, 0), needed=found[0], limit=found[1])
    assert memory.fits == (needed < limit)


def test_what_exceeds_the_memory_of_the_chip_does_not_fit(tmp_path, monkeypatch):
    made = compiler.Compiled("HloModule m", 17.0 * GIB, 15.0 * GIB)
    monkeypatch.setattr(compiler, "compile_lowered", lambda lowered: made)
    plan = estimate.make_plan(small(), topology.parse("v5e:2x4"), compiler.Cache(tmp_path))
    assert not plan.memory.fits and plan.speed is None and plan.tokens_per_second is None
    assert "does not fit: needs 17.00 of 15.75 GiB" in plan_main.table(plan)
    assert search._rank(plan)[0] == 1 and "does not fit" in search._outcome(plan)


@pytest.mark.slow
@pytest.mark.parametrize("held, fits", [(4, True), (10, False)])
def test_what_fits_is_counted_as_the_compiler_counts_what_does_not(held, fits):
    """By hand: a donated argument, another one, and two products."""
    pytest.importorskip("libtpu")
    (device, *_) = topology.parse("v5e:2x2").devices()
    placed = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((held * GIB // 4096, 1024), jnp.float32, sharding=placed)
    y = jax.ShapeDtypeStruct((40_960, 256), jnp.bfloat16, sharding=placed)

    def step(x, y):
        scores = jnp.tanh(y @ y.T)
        return x * 2, ((scores @ scores) @ y).sum()

    compiled = compiler.compile_lowered(jax.jit(step, donate_argnums=0).lower(x, y))
    by_hand = held * GIB + 2 * y.size + 2 * 2 * 40_960**2
    np.testing.assert_allclose(compiled.needed, by_hand, rtol=2e-3)
    assert bool(compiled.text) == fits
    if fits:
        np.testing.assert_allclose(compiled.temporary, 2 * 2 * 40_960**2, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("held, fits", [(84, True), (92, False)])
def test_what_sparse_cores_gather_is_counted_once(held, fits):
    """Two weights of 2 GiB are gathered at a time; libtpu 0.0.52 lists them again for the sparse cores."""
    pytest.importorskip("libtpu")
    slice_ = topology.parse("v5p:2x2x1")
    mesh = jax.sharding.Mesh(np.array(slice_.devices()), ("fsdp",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))

    def step(kept, x, weights):
        for weight in weights:
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole))
        return kept + 1, x

    kept = jax.ShapeDtypeStruct((4, held * GIB // 512, 128), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((8192, 32768), jnp.bfloat16, sharding=split)
    weights = [jax.ShapeDtypeStruct((32768, 32768), jnp.bfloat16, sharding=split)] * 4
    options = dict.fromkeys(program_lib.ON_SPARSE_CORES, True)
    lowered = jax.jit(step, donate_argnums=0, compiler_options=options).lower(kept, x, weights)
    compiled = compiler.compile_lowered(lowered)
    assert bool(compiled.text) == fits
    assert (compiled.needed <= slice_.chip.hbm_bytes) == fits
    if fits:
        assert compiled.temporary < 3 * weights[0].size * 2


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_how_far(cache):
    config = small(**{"data.seq_len": 65_536, "data.global_rows": 128, "loss_chunk": 65_536})
    plan = estimate.make_plan(config, topology.parse("v5e:2x4"), cache)
    assert not plan.memory.fits and plan.memory.needed > plan.memory.limit
    assert plan.speed is None and "does not fit: needs" in plan_main.table(plan)
    json.dumps(plan.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_two_slices_sum_gradients_over_the_network_between_them(plan, cache):
    config = small(**{"mesh.data": 2, "mesh.fsdp": 8, "data.global_rows": 2 * small().data.global_rows})
    two = estimate.make_plan(config, topology.parse("2xv5e:2x4"), cache)
    assert two.chips == 16 and two.memory.fits and two.mesh["data"] == 2
    reduced = [plan.speed.collectives.get("all-reduce", 0.0), two.speed.collectives["all-reduce"]]
    # A chip's share of the float32 parameters at 3.125 GB/s, in both directions.
    assert reduced[1] - reduced[0] > 0.5 * two.memory.parameters / 3.125e9


def test_other_errors_of_the_compiler_are_not_taken_for_that():
    with pytest.raises(UserError, match="refuses this step: INTERNAL"):
        compiler._out_of_memory(RuntimeError("INTERNAL: something else"))


def shapes(*dims):
    return tuple(hlo.Shape("bf16", size) for size in dims)


def test_attention_kernels_by_hand():
    q, kv = (2, 32, 4096, 128), (2, 8, 4096, 128)
    segments = tuple(hlo.Shape("s32", size) for size in ((2, 4096, 128), (2, 8, 4096)))
    places = hlo.Shape("s32", (4096, 128))
    forward = hlo.Kernel("splash_mha_fwd_residuals", "", shapes(q, kv, kv) + segments, shapes(q))
    whole = 2 * 2 * 2 * 32 * 4096**2 * 128
    assert estimate.attention_flops(forward) == whole

    def causal(kernel):
        return dataclasses.replace(kernel, operands=(*kernel.operands, places))

    assert estimate.attention_flops(causal(forward)) == whole / 2
    dq = hlo.Kernel("splash_mha_dq", "", shapes(q, kv, kv, q) + segments, shapes(q))
    assert estimate.attention_flops(causal(dq)) == whole * 3 / 4
    dkv = hlo.Kernel("splash_mha_dkv", "", shapes(q, kv, kv, q) + segments, shapes(kv, kv))
    assert estimate.attention_flops(causal(dkv)) == whole
    fused = dataclasses.replace(dkv, results=shapes((4096, 128), (2, 1, 32, 4096, 128), kv, kv))
    assert estimate.attention_flops(causal(fused)) == whole * 5 / 4
    assert estimate.attention_flops(hlo.Kernel("other", "", shapes(q, kv, kv), ())) is None


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("split", ["heads", "queries"])
def test_kernels_say_whether_they_are_causal(causal, split):
    """Also with padded rows, and with queries sharded over devices."""
    axes = [dict(fsdp=2, tensor=2).get(axis, 1) for axis in MESH_AXES]
    mesh = compat.make_mesh(axes, MESH_AXES, topology.parse("v5e:2x2").devices())
    rules = {**ACTIVATION_RULES, **(_QUERY_RULES if split == "queries" else {})}

    def argument(kind, *sizes):
        placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.ShapeDtypeStruct(sizes, kind, sharding=placed)

    q, ids = argument(jnp.bfloat16, 4, 700, 2, 128), argument(jnp.int32, 4, 700)

    def total(q, k, v, ids):
        out = attention(q, k, v, MaskInfo(ids, ids, causal=causal))
        return out.astype(jnp.float32).sum()

    with logical_axes.activation_rules(mesh, rules):
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, q, q, ids).compile().as_text()
    flops = sum(times * estimate.attention_flops(kernel) for kernel, times in hlo.read(text).kernels)
    scores = 2 * 768 * 768  # per device: two rows of one head, or half the queries of two heads
    assert flops == 2 * scores * 128 * (2 + 5) / (2 if causal else 1)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--topology=v9:4x4"], "v9:4x4"),
        ([], "--topology=NAME is missing"),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=3"], "does not match the 8 device"),
        (["--topology=v5e:2x4", "--config.data.global_rows=4"], "data.global_rows"),
        (["--topology=v5e:2x4", "--nonsense=1"], "nonsense"),
        (["--topology=v5e:2x4", "num_steps=7"], "num_steps=7: not understood"),
        (["--topology=v5e:2x4", "--price=-3"], "price"),
        (["--topology=v5e:2x4", "--price=nan"], "must be a number"),
        (["--topology=v5e:2x4", "--slices=-2"], "slices"),
        (["--topology=v5e:2x4", "--search", "--compiles=0"], "compiles"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path):
    argv = ["plan", "--config=configs/stage4_expert.py:tiny", f"--cache={tmp_path}", *arguments]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vilam3 plan: error:") and message in error


def test_help_names_every_flag(capsys):
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("topology", "slices", "price", "json", "search", "compiles", "cache"):
        assert f"--{name}" in text
