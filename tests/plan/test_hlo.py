"""Costs of modules, compared with counts by hand: stored texts, and small modules compiled for TPUs."""

import jax
import jax.numpy as jnp
import pytest

from vilam3_jax.plan import hlo, topology
from vilam3_jax.runtime import compat
from vilam3_jax.training import program

HEAD = "HloModule test, is_scheduled=true, num_partitions=8\n\n"
FUSED = """%product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %conv = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

"""


def estimated(name, cycles, operand, calls="product"):
    return (
        f"  %{name} = bf16[8,8]{{1,0:T(8,128)(2,1)}} fusion(%{operand}), kind=kOutput, calls=%{calls}, "
        f'backend_config={{"flag_configs":[],"window_config":{{}},"estimated_cycles":"{cycles}"}}\n'
    )


def loop(name, bound, body_lines):
    """A loop whose bound is the constant `bound`, or else the carried element 1."""
    limit = (
        f"%limit.{name} = s32[] constant({bound})"
        if bound
        else (f"%limit.{name} = s32[] get-tuple-element(%q.{name}), index=1")
    )
    return (
        f"%cond.{name} (q.{name}: (s32[], s32[], bf16[8,8])) -> pred[] {{\n"
        f"  %q.{name} = (s32[], s32[], bf16[8,8]{{1,0}}) parameter(0)\n"
        f"  %i.{name} = s32[] get-tuple-element(%q.{name}), index=0\n"
        f"  {limit}\n"
        f"  ROOT %lt.{name} = pred[] compare(%i.{name}, %limit.{name}), direction=LT\n}}\n\n"
        f"%body.{name} (r.{name}: (s32[], s32[], bf16[8,8])) -> (s32[], s32[], bf16[8,8]) {{\n"
        f"  %r.{name} = (s32[], s32[], bf16[8,8]{{1,0}}) parameter(0)\n"
        f"  %x.{name} = bf16[8,8]{{1,0}} get-tuple-element(%r.{name}), index=2\n"
        f"{body_lines}}}\n\n"
    )


def run(name, start):
    return (
        f"  %w.{name} = (s32[], s32[], bf16[8,8]{{1,0}}) while(%{start}), condition=%cond.{name}, "
        f'body=%body.{name}, metadata={{op_name="jit(step)/{name}/while"}}\n'
    )


def entry(lines):
    return f"ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {{\n  %a = bf16[8,8]{{1,0}} parameter(0)\n{lines}}}\n"


def test_nested_loops_multiply_and_unknown_estimates_are_left_out():
    inner = loop("inner", 5, estimated("f1", 10, "x.inner"))
    outer = loop("outer", 3, estimated("f2", 100, "x.outer") + run("inner", "r.outer"))
    top = run("outer", "a") + estimated("f3", 1000, "a") + estimated("f4", hlo._UNKNOWN, "a")
    cost = hlo.read(HEAD + FUSED + inner + outer + entry(top))
    assert cost.cycles == 1000 + 3 * (100 + 5 * 10)
    assert cost.product_cycles == cost.cycles
    assert cost.without_estimate == 1 and not cost.dynamic_loops


def test_carried_bounds_are_found_and_computed_ones_counted_as_told():
    body = loop("loss", 0, estimated("f1", 7, "x.loss"))
    start = "  %zero = s32[] constant(0)\n  %most = s32[] constant(6)\n  %c = s32[] copy(%most)\n"
    known = start + "  %t = (s32[], s32[], bf16[8,8]{1,0}) tuple(%zero, %c, %a)\n" + run("loss", "t")
    assert hlo.read(HEAD + FUSED + body + entry(known), dynamic_trips=4).cycles == 42
    data = start + '  %m = s32[] custom-call(%a), custom_call_target="AssumeX"\n'
    data += "  %t = (s32[], s32[], bf16[8,8]{1,0}) tuple(%zero, %m, %a)\n" + run("loss", "t")
    cost = hlo.read(HEAD + FUSED + body + entry(data), dynamic_trips=4)
    assert cost.cycles == 28 and cost.dynamic_loops == ["jit(step)/loss/while"]


@pytest.mark.parametrize("bound", [0, 6])
def test_trips_that_were_peeled_off_are_not_counted_again(bound):
    body = loop("layers", bound, estimated("f1", 7, "x.layers"))
    lines = "  %one = s32[] constant(1)\n  %six = s32[] constant(6)\n" + estimated("peeled", 7, "a")
    lines += "  %t = (s32[], s32[], bf16[8,8]{1,0}) tuple(%one, %six, %peeled)\n" + run("layers", "t")
    assert hlo.read(HEAD + FUSED + body + entry(lines)).cycles == 42


def collective(name, result, opcode, groups, operand="a"):
    return f"  %{name} = {result} {opcode}(%{operand}), channel_id=1, {groups}, dimensions={{0}}\n"


@pytest.mark.parametrize(
    "opcode,result,groups,kind,sent",
    [
        ("all-gather", "bf16[64,8]{1,0}", "replica_groups={{0,1,2,3},{4,5,6,7}}", "all-gather", 768),
        ("all-reduce", "f32[64]{0}", "replica_groups=[1,8]<=[8]", "all-reduce", 2 * 256 * 7 / 8),
        ("reduce-scatter", "f32[8]{0}", "replica_groups=[2,4]<=[4,2]T(1,0)", "reduce-scatter", 96),
        ("all-to-all", "f32[64]{0}", "replica_groups=mesh['a'=4,'b'=2] {'b'}", "all-to-all", 128),
        (
            "all-gather-start",
            "(bf16[16,8]{1,0}, bf16[64,8]{1,0})",
            "replica_groups=mesh['a'=4,'b'=2] {'a'}",
            "all-gather",
            768,
        ),
        (
            "collective-permute-start",
            "(f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})",
            "source_target_pairs={{0,1},{1,2}}",
            "collective-permute",
            128,
        ),
        (
            "all-reduce",
            "(f32[8]{0}, /*index=1*/bf16[16]{0})",
            "replica_groups=mesh['a'=8] {'a':(2)4}",
            "all-reduce",
            2 * 64 * 3 / 4,
        ),
    ],
)
def test_wire_bytes_of_a_collective(opcode, result, groups, kind, sent):
    cost = hlo.read(HEAD + entry(collective("x", result, opcode, groups)))
    assert cost.wire_bytes() == {kind: sent}
    assert cost.collectives[0][0].overlapped == opcode.endswith("-start")


@pytest.mark.parametrize(
    "kind,slices,sent",
    [("ALL_REDUCE", "0,1", 128), ("ALL_GATHER", "1:4", 3 * 128), ("ONE_TO_ONE", "0,1", 128)],
)
@pytest.mark.parametrize("between", [True, False])
def test_a_transfer_between_slices(kind, slices, sent, between):
    text = f'_xla_host_transfer_rendezvous="r",_xla_megascale_target="{{{slices}}}x{{0:7}}",'
    text = f'frontend_attributes={{{text}_xla_megascale_transfer_type="{kind}"}}'
    lines = (
        f"  %s = (f32[4,8]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=5, {text}\n"
        f"  %r = (f32[4,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=4, {text}\n"
    )
    work = estimated("f", 3, "a") if between else ""
    done = "  %d = (f32[4,8]{1,0}, token[]) recv-done(%r), channel_id=4\n"
    cost = hlo.read(HEAD + FUSED + entry(lines + work + done + estimated("g", 4, "a")))
    name = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
    assert cost.wire_bytes() == {name: sent}
    ((item, count),) = cost.collectives
    assert count == 1 and item.overlapped == between
    assert item.group == ((0, 8) if slices == "0,1" else (0, 8, 16, 24))


@pytest.mark.parametrize(
    "groups,ids",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_as_modules_write_them(groups, ids):
    assert hlo._group(groups, 8) == ids


def test_an_asynchronous_transfer_counts_once_and_a_reduce_scatter_as_itself():
    """In libtpu's form: a start, fusions that repeat the gather, a done; an all-reduce with a slice."""
    groups = "replica_groups={{0,1,2,3,4,5,6,7}}"

    def part(name, marker):
        gather = collective(f"g{name}", "bf16[64,8]{1,0}", "all-gather", groups, f"p{name}")
        target = f'custom_call_target="AsyncCollective{marker}"'
        marked = f"  ROOT %c{name} = bf16[64,8]{{1,0}} custom-call(%g{name}), {target}\n" if marker else ""
        return f"%{name} (p{name}: bf16[8,8]) -> bf16[64,8] {{\n{gather}{marked}}}\n\n"

    scatter = (
        "%all-reduce-scatter.3 (in: f32[64]) -> f32[8] {\n  %in = f32[64]{0} parameter(0)\n"
        + collective("ar", "f32[64]{0}", "all-reduce", "replica_groups=[1,8]<=[8]", "in").replace(
            "=1,", "=2,", 1
        )
        + "  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %in)\n}\n\n"
    )
    top = (
        "  %s = bf16[64,8]{1,0} fusion(%a), kind=kCustom, calls=%begin\n"
        + estimated("m", 50, "s", "middle")
        + "  %e = bf16[64,8]{1,0} fusion(%m), kind=kCustom, calls=%finish\n"
        + "  %r = f32[8]{0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.3\n"
    )
    text = HEAD + part("begin", "Start") + part("middle", "") + part("finish", "Done") + scatter + entry(top)
    cost = hlo.read(text)
    assert cost.wire_bytes() == {"all-gather": 64 * 8 * 2 * 7 / 8, "reduce-scatter": 64 * 4 * 7 / 8}
    assert [item.overlapped for item, _ in cost.collectives] == [True, False]
    assert cost.cycles == 50


def test_of_what_the_sparse_cores_do_only_transfers_count():
    groups = "replica_groups={{0,1,2,3,4,5,6,7}}"
    aside = (
        "%aside (p: bf16[8,8]) -> bf16[64,8] {\n  %p = bf16[8,8]{1,0} parameter(0)\n"
        + estimated("f2", 100, "p")
        + collective("g", "bf16[64,8]{1,0}", "all-gather", groups, "f2")
        + '}, execution_thread="sparsecore"\n\n'
    )
    top = (
        "  %s = ((bf16[8,8]), bf16[64,8]{1,0}) call-start(%a), "
        'async_execution_thread="sparsecore", to_apply=%aside\n'
        + estimated("m", 50, "a")
        + "  ROOT %d = bf16[64,8]{1,0} call-done(%s)\n"
    )
    cost = hlo.read(HEAD + FUSED + aside + entry(top))
    assert cost.cycles == 50 and cost.wire_bytes() == {"all-gather": 64 * 8 * 2 * 7 / 8}
    assert [item.overlapped for item, _ in cost.collectives] == [True]


def test_kernels_are_listed_with_their_shapes_though_their_configs_have_line_breaks():
    text = (
        '  %splash_mha_fwd.7 = bf16[4,32,8]{2,1,0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/splash_mha_fwd"}, backend_config={"body":"x\n}\n%no = f32[] (\\"\n"}\n'
    )
    cost = hlo.read(HEAD + FUSED + entry(text + estimated("f", 3, "a")))
    ((kernel, count),) = cost.kernels
    assert (kernel.name, count, cost.cycles) == ("splash_mha_fwd", 1, 3)
    assert kernel.operands[0].dims == (8, 8) and kernel.results[0].dims == (4, 32, 8)


def compile_on(name, function, *shapes, specs=None):
    """Text of the module, compiled with the options of a training step."""
    devices = topology.parse(name).devices()
    mesh = compat.make_mesh([len(devices)], ["x"], devices)
    spec = jax.sharding.PartitionSpec
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec(*axes)))
        for shape, axes in zip(shapes, specs or [()] * len(shapes), strict=True)
    ]
    with jax.set_mesh(mesh):
        options = program.compiler_options((), mesh)
        return jax.jit(function, compiler_options=options).lower(*arguments).compile().as_text()


def test_compiled_loops_count_their_trips():
    def cycles(trips):
        def step(x, w):
            return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=trips)[0]

        return hlo.read(compile_on("v5e:2x4", step, (512, 1024), (1024, 1024))).product_cycles

    assert cycles(12) == pytest.approx(2 * cycles(6), rel=0.02)
    at_peak = 6 * 2 * 512 * 1024 * 1024 / 197e12 * 1.5e9  # replicated on every chip
    assert at_peak < cycles(6) < 2 * at_peak


TRANSFERS = {  # name → (operation on the local array, bytes sent per byte of it on n devices)
    "all-gather": (lambda x, n: jax.lax.all_gather(x, "x", tiled=True)[:512], lambda n: n - 1),
    "reduce-scatter": (
        lambda x, n: jax.lax.psum_scatter(jnp.tile(x, (n, 1)), "x", tiled=True),
        lambda n: n - 1,
    ),
    "all-reduce": (lambda x, n: jax.lax.psum(x, "x"), lambda n: 2 * (n - 1) / n),
    "all-to-all": (lambda x, n: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), lambda n: (n - 1) / n),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("v5e:2x4", marks=pytest.mark.slow),
        pytest.param("v6e:2x4", marks=pytest.mark.slow),
        "v5p:2x2x1",
        "tpu7x:2x2x1",
    ],
)
@pytest.mark.parametrize("kind", TRANSFERS)
def test_compiled_transfers_beside_products(name, kind):
    """Chips overlap transfers in different ways; the bytes are the same."""
    transfer, sent = TRANSFERS[kind]
    devices = len(topology.parse(name).devices())

    def block(x, w):
        moved = transfer(x, devices)
        for _ in range(4):  # overlaps with the transfer
            w = jnp.tanh(w @ w)
        return moved + w[:512]

    def step(x, w):
        axes = jax.sharding.PartitionSpec("x")
        return jax.shard_map(block, in_specs=(axes, axes), out_specs=axes)(x, w)

    text = compile_on(name, step, (devices * 512, 2048), (devices * 2048, 2048), specs=[("x",), ("x",)])
    cost = hlo.read(text)
    assert sum(cost.wire_bytes().values()) == 512 * 2048 * 2 * sent(devices)
    if kind in ("all-gather", "reduce-scatter") and not name.startswith("v5e"):  # without sparse cores
        assert all(item.overlapped for item, _ in cost.collectives)


def test_attributes_with_line_breaks_do_not_end_a_computation():
    kernel = (
        '  %splash.1 = bf16[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n}}, metadata={op_name="attend"}\n'
    )
    cost = hlo.read(HEAD + FUSED + entry(kernel + estimated("f1", 7, "a")))
    assert [item.name for item, _ in cost.kernels] == ["splash"] and cost.cycles == 7
    assert cost.product_flops == 2 * 8**3
