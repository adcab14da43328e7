"""Optimizers compared with other implementations; groups; dtypes of their state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.helpers import Run, equations, packed_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.training import optimizer as optimizer_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.optimizer import LrGroup
from vilam3_jax.training.train_state import shardings

# Two stacked layers, a matrix, the last matrix of the model, and a stacked vector without decay.
SHAPES = {
    "llm/layers/mlp/up/kernel": (2, 130, 140),
    "projector/fc1/kernel": (140, 130),
    "llm/lm_head/kernel": (6, 5),
    "llm/layers/attn/q/bias": (2, 7),
}
DECAYED = {path: not path.endswith("bias") for path in SHAPES}
PEAK, STEPS = 1e-2, 6


def config_of(name, **settings):
    config = tiny_config()
    config.schedule.update(dict(name="constant", peak=PEAK, warmup_fraction=0.0))
    config.optimizer.update(dict(name=name, clip_norm=0.0, weight_decay=0.1, b2=0.95) | settings)
    return config_lib.resolve(config)


def world(steps=STEPS, seed=0):
    """Parameters and a gradient per step; the layers differ in scale, so that mixing them up shows."""
    rng = np.random.default_rng(seed)
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    grads = [
        {path: rng.normal(size=shape).astype(np.float32) * 10.0**-step for path, shape in SHAPES.items()}
        for step in range(steps)
    ]
    for gradient in grads:
        gradient["llm/layers/mlp/up/kernel"][1] *= 100
    return params, grads


def walk(config, params, grads, groups=None):
    """The parameters after every step."""
    schedule = optimizer_lib.learning_rate(config.schedule, config.num_steps)
    groups = groups or dict.fromkeys(params, LrGroup())
    optimizer = optimizer_lib.make_optimizer(config.optimizer, schedule, groups)
    params = {path: jnp.asarray(x) for path, x in params.items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    seen = []
    for gradient in grads:
        updates, state = update({p: jnp.asarray(g) for p, g in gradient.items()}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def layers(path, x):
    """The layers of a stacked array."""
    return list(x) if "/layers/" in path else [x]


def by_torch(make, params, grads):
    """PyTorch's optimizer with one parameter per layer."""
    import torch

    parts = {
        path: [torch.nn.Parameter(torch.tensor(x)) for x in layers(path, value)]
        for path, value in params.items()
    }
    optimizers = [make(path, ps) for path, ps in parts.items()]
    seen = []
    for gradient in grads:
        for path, ps in parts.items():
            for parameter, g in zip(ps, layers(path, gradient[path]), strict=True):
                parameter.grad = torch.tensor(g)
        for optimizer in optimizers:
            optimizer.step()
        seen.append(
            {
                path: np.stack([p.detach().numpy() for p in ps]).reshape(SHAPES[path])
                for path, ps in parts.items()
            }
        )
    return seen


def decay_of(path):
    return 0.1 if DECAYED[path] else 0.0


def compare(got, want, **tolerance):
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for path in SHAPES:
            np.testing.assert_allclose(a[path], b[path], err_msg=f"{path}, step {step}", **tolerance)


def test_adamw_equals_pytorch():
    import torch

    params, grads = world()

    def adamw(path, parts):
        return torch.optim.AdamW(parts, PEAK, (0.9, 0.95), 1e-8, weight_decay=decay_of(path))

    compare(walk(config_of("adamw"), params, grads)[0], by_torch(adamw, params, grads), atol=3e-6)


def test_adafactor_equals_transformers_layer_by_layer():
    """Without relative steps. Theirs also factors small matrices, and decays before the step."""
    from transformers.optimization import Adafactor

    params, grads = world()

    def adafactor(path, parts):
        return Adafactor(parts, PEAK, scale_parameter=False, relative_step=False, weight_decay=decay_of(path))

    got, want = walk(config_of("adafactor"), params, grads)[0], by_torch(adafactor, params, grads)
    for row in (*got, *want):
        del row["llm/lm_head/kernel"]
    for a, b in zip(got, want, strict=True):
        for path in a:
            # Both decay the parameter before the step.
            np.testing.assert_allclose(a[path], b[path], atol=2e-5, err_msg=path)


def test_lion_equals_its_paper():
    """arXiv:2302.06675, algorithm 2, in numpy."""
    params, grads = world()
    x, m, want = dict(params), {path: np.zeros_like(v) for path, v in params.items()}, []
    for gradient in grads:
        for path, g in gradient.items():
            step = np.sign(0.9 * m[path] + 0.1 * g) + decay_of(path) * x[path]
            x[path], m[path] = x[path] - PEAK * step, 0.95 * m[path] + 0.05 * g
        want.append(dict(x))
    compare(walk(config_of("lion"), params, grads)[0], want, atol=1e-5)


def orthogonalised(matrix):
    """Five steps of Muon's Newton-Schulz iteration in float64."""
    x = matrix.astype(np.float64)
    x = (x.T if x.shape[0] > x.shape[1] else x) / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_every_layer_by_itself():
    """Equals NumPy; and, loosely, PyTorch, which uses bfloat16 and no bias correction."""
    import torch

    params, grads = world(steps=1)
    got = walk(config_of("muon"), params, grads)[0][0]
    for path in ("llm/layers/mlp/up/kernel", "projector/fc1/kernel"):
        theirs = by_torch(
            lambda _, parts: torch.optim.Muon(
                parts, PEAK, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            {path: params[path]},
            [{path: grads[0][path]}],
        )[0][path]
        for new, old, g, other in zip(
            *(layers(path, x[path]) for x in (got, params, grads[0])), layers(path, theirs), strict=True
        ):
            step = 0.2 * np.sqrt(max(g.shape)) * orthogonalised(g)
            np.testing.assert_allclose(new, old - PEAK * (step + 0.1 * old), atol=2e-6)
            assert np.abs(np.asarray(new) - other).max() < 0.05 * np.abs(other - old).max()
            assert 0.1 < np.sqrt(np.mean(step**2)) < 0.3  # the RMS of AdamW's steps


def test_muon_leaves_the_rest_to_adamw():
    params, grads = world()
    muon, adamw = (walk(config_of(name), params, grads)[0] for name in ("muon", "adamw"))
    for path in ("llm/lm_head/kernel", "llm/layers/attn/q/bias"):
        np.testing.assert_array_equal(muon[-1][path], adamw[-1][path])
    assert np.abs(muon[-1]["projector/fc1/kernel"] - adamw[-1]["projector/fc1/kernel"]).max() > 1e-3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_sharded_equals_one_device_and_the_state_is_split(name):
    """The update alone, of the tiny model's parameters."""
    config = config_of(name).replace({"model.llm.mlp_dim": 256})
    params, grads, reached = {}, [], []
    for count, axes in ((1, dict(fsdp=1)), (8, dict(data=2, fsdp=2, tensor=2))):
        mesh = compat.make_mesh([axes.get(a, 1) for a in MESH_AXES], MESH_AXES, jax.devices()[:count])
        program = program_lib.build(config, mesh)
        optimizer, placed = program.optimizer, shardings(program.state)
        if not reached:
            rng = np.random.default_rng(0)
            params, *grads = (
                {
                    path: rng.normal(size=leaf.shape).astype(np.float32)
                    for path, leaf in program.shapes.items()
                }
                for _ in range(4)
            )
        now = jax.device_put(params, placed.trainable)
        state = jax.jit(optimizer.init, out_shardings=placed.opt_state)(now)
        update = jax.jit(optimizer.update, out_shardings=(placed.trainable, placed.opt_state))
        for gradient in grads:
            updates, state = update(jax.device_put(gradient, placed.trainable), state, now)
            now = optax.apply_updates(now, updates)
        reached.append(now)
        if count > 1:
            large = [x for x in jax.tree.leaves(state) if x.size >= 2048]
            assert large and all(not x.sharding.is_fully_replicated for x in large)
    for path in params:
        np.testing.assert_allclose(reached[1][path], reached[0][path], atol=1e-5, err_msg=path)


def test_groups_scale_rates_and_decay():
    config = config_of("adamw")
    rows = (
        (r"llm/lm_head/.*", {"rate": 0.5, "decay": 0.0}),
        (r"projector/.*", {"decay": 3}),
        (r".*", 1.0),
    )
    params, grads = world(steps=1)
    zero = [{path: np.zeros_like(g) for path, g in grads[0].items()}]  # decay alone
    groups = optimizer_lib.lr_groups(rows, list(params))
    rates = {path: group.rate for path, group in groups.items()}
    assert rates == {path: 0.5 if "lm_head" in path else 1.0 for path in params}
    got = walk(config, params, zero, groups)[0][0]
    for path, factor in {
        "llm/lm_head/kernel": 0.0,
        "projector/fc1/kernel": 3.0,
        "llm/layers/mlp/up/kernel": 1.0,
        "llm/layers/attn/q/bias": 0.0,
    }.items():
        np.testing.assert_allclose(got[path], params[path] * (1 - PEAK * 0.1 * factor), rtol=1e-6)
    moved = walk(config, params, grads, groups)[0][0]["llm/lm_head/kernel"] - params["llm/lm_head/kernel"]
    np.testing.assert_allclose(np.abs(moved), 0.5 * PEAK, rtol=1e-4)  # AdamW's first step


@pytest.mark.parametrize(
    "setting", ["fast", -1.0, {"speed": 2.0}, {"rate": "fast"}, {"rate": 1.0, "decay": -0.1}, None]
)
def test_a_setting_of_another_form_is_refused(setting):
    with pytest.raises(UserError, match="config trainable"):
        optimizer_lib.lr_groups(((r".*", setting),), list(SHAPES))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_stored_as_asked_and_computed_in_float32(name):
    params, grads = world()
    exact, wide = walk(config_of(name), params, grads)
    low = config_of(name, mu_dtype="bfloat16", nu_dtype="bfloat16")
    rounded, narrow = walk(low, params, grads)
    types = {x.dtype for x in jax.tree.leaves(wide) if x.ndim > 1}
    assert types == {jnp.dtype("float32")}
    types = {x.dtype for x in jax.tree.leaves(narrow) if x.ndim > 1}
    assert types == {jnp.dtype("bfloat16")}
    # Nothing is stored before the first step, so nothing is rounded.
    np.testing.assert_array_equal(exact[0]["llm/lm_head/kernel"], rounded[0]["llm/lm_head/kernel"])
    difference = np.abs(exact[-1]["projector/fc1/kernel"] - rounded[-1]["projector/fc1/kernel"])
    assert 0 < difference.max() < 0.1 * PEAK * STEPS


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(name="sgd"), "optimizer.name='sgd': must be 'adamw' or"),
        (dict(name="lion", nu_dtype="bfloat16"), "nu_dtype: lion does not keep this moment"),
        (dict(name="adafactor", mu_dtype="bfloat16"), "mu_dtype: adafactor"),
        (dict(mu_dtype="int8"), "mu_dtype='int8'"),
        (dict(nu_dtype="bfloat16", b2=0.999), "never change"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_of(**{"name": "adamw", **change})


def small_run(**changes):
    config = tiny_config()
    config.update_from_flattened_dict({"schedule.warmup_fraction": 0.0, "loss_chunk": 48, **changes})
    return Run(config, compat.make_mesh([1] * len(MESH_AXES), MESH_AXES, jax.devices()[:1]))


def test_master_weights_are_float32_and_products_bfloat16():
    """A step below the resolution of bfloat16 changes parameters; no product has a float32 factor."""
    run = small_run(**{"model.dtype": "bfloat16", "schedule.peak": 1e-7})
    batch = jax.tree.map(jnp.asarray, packed_batch(0, rows=2))
    types = {
        factor.aval.dtype.name
        for equation, _ in equations(jax.make_jaxpr(run.program.step)(run.state, batch).jaxpr)
        if equation.primitive.name == "dot_general"
        for factor in equation.invars
    }
    assert types == {"bfloat16"}
    before = jax.tree.map(jnp.copy, run.state.trainable)  # the step donates its state
    run.step(batch)
    assert {x.dtype for x in run.state.trainable.values()} == {jnp.dtype("float32")}
    path = "llm/layers/mlp/up/kernel"
    assert np.mean(run.state.trainable[path] != before[path]) > 0.9
    assert np.mean(run.state.trainable[path].astype("bfloat16") != before[path].astype("bfloat16")) < 0.1


def test_no_two_leaves_of_a_fresh_state_share_a_buffer():
    """The step donates the whole state; XLA for CPUs aborts if a buffer is donated twice."""
    state = small_run(ema_decay=0.9).state
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.slow
def test_bfloat16_parameters_train():
    """Gradients accumulate in float32; moments and the moving average are float32."""
    types = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16"}
    run = small_run(**types, grad_accum=2, ema_decay=0.9)
    batch = packed_batch(0, rows=2)
    losses = [run.step(batch)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3
    assert {x.dtype for x in run.state.trainable.values()} == {jnp.dtype("bfloat16")}
    moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
    assert {x.dtype for x in (*moments, *run.state.ema.values())} == {jnp.dtype("float32")}
