import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.helpers import Run, packed_batch, pair_batch, tiled_batch, tiny_config
from vilam3_jax.errors import UserError
from vilam3_jax.models import build, param_paths
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.tasks import TASKS

SLOW = pytest.mark.slow  # the other members of a family


def one_device():
    return compat.make_mesh([1] * len(MESH_AXES), MESH_AXES, jax.devices()[:1])


@pytest.mark.parametrize(
    "kind,axes",
    [
        ("generative", dict(fsdp=4, tensor=2)),
        pytest.param("generative", dict(data=2, fsdp=2, tensor=2), marks=SLOW),
        pytest.param("contrastive", dict(fsdp=4, tensor=2), marks=SLOW),
        ("contrastive", dict(data=2, fsdp=2, tensor=2)),
    ],
)
def test_sharded_equals_unsharded_for_ten_steps(kind, axes):
    make = packed_batch if kind == "generative" else pair_batch
    configs = tiny_config(kind), tiny_config(kind, **axes)
    for config in configs:
        config.model.llm.lora_rank, config.model.llm.lora_targets = 4, ("q", "v", "o", "up", "down")
    whole, split = Run(configs[0], one_device()), Run(configs[1])
    for path, leaf in split.state.trainable.items():
        expected = np.asarray(whole.state.trainable[path])
        # Patch filters are resized by a matmul, which some CPUs sum in another order for a shard.
        atol = 2.0**-22 * np.abs(expected).max() if path == "vision_tower/patch_embed/kernel" else 0
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=atol, err_msg=path)
        if leaf.size >= 2048:
            assert len({str(s.index) for s in leaf.addressable_shards}) > 1, f"{path} is not split"
    moments = [x for x in jax.tree.leaves(split.state.opt_state) if x.size >= 2048]
    assert moments and all(not m.sharding.is_fully_replicated for m in moments)
    for index in range(10):
        batch = make(index)
        one, many = whole.step(batch), split.step(batch)
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
        assert many["supervised"] == one["supervised"]


@pytest.mark.slow  # `test_a_tower_has_rules_of_its_own` also splits queries
@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_queries_over_tensor_equal_one_device(kind):
    make = packed_batch if kind == "generative" else pair_batch
    config = tiny_config(kind, data=2, fsdp=2, tensor=2)
    config.activation_rules.update(dict(queries="tensor"))
    with config.activation_rules.ignore_type():
        config.activation_rules.heads = config.activation_rules.kv_heads = None
    one, many = Run(tiny_config(kind), one_device()), Run(config)
    for index in range(5):
        np.testing.assert_allclose(many.step(make(index))["loss"], one.step(make(index))["loss"], rtol=1e-5)


def tower_of_three_heads(kind, **mesh_axes):
    config = tiny_config(kind, **mesh_axes)
    config.model.vision_tower.hidden_size, config.model.vision_tower.num_heads = 48, 3
    if kind == "contrastive":
        config.model.text_tower.hidden_size, config.model.text_tower.num_heads = 48, 3
    return config


@pytest.mark.parametrize("kind", ["generative", pytest.param("contrastive", marks=SLOW)])
@pytest.mark.parametrize("queries", ["tensor", pytest.param("", marks=SLOW)])
def test_a_tower_has_rules_of_its_own(kind, queries):
    """Its three heads cannot be split in two; the LLM's heads are split."""
    make = packed_batch if kind == "generative" else pair_batch
    config = tower_of_three_heads(kind, data=2, fsdp=2, tensor=2)
    if queries:
        with pytest.raises(UserError, match="tower_heads and tower_queries"):
            Run(config).step(make(0))
    config.activation_rules.update(dict(tower_heads="", tower_queries=queries))
    one, many = Run(tower_of_three_heads(kind), one_device()), Run(config)
    for index in range(3):
        whole, split = one.step(make(index)), many.step(make(index))
        np.testing.assert_allclose(split["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(split["grad_norm"], whole["grad_norm"], rtol=1e-4)
    if kind == "generative":
        heads, text = config.model.llm.num_heads, many.text()
        row = f"{make(0).tokens.shape[1]},{{}},{config.model.llm.head_dim}]"
        assert re.search(rf"\[\d+,{row.format(heads // 2)}", text)
        assert not re.search(rf"\[\d+,{row.format(heads)}", text)


@pytest.mark.parametrize(
    "rules",
    [
        dict(embed="tensor"),
        pytest.param(dict(mlp=""), marks=SLOW),
        pytest.param(dict(tower_mlp=""), marks=SLOW),
    ],
)
def test_other_rules_equal_one_device(rules):
    config = tiny_config(data=2, fsdp=2, tensor=2)
    with config.activation_rules.ignore_type():
        config.activation_rules.update(rules)
    one, many = Run(tiny_config(), one_device()), Run(config)
    for index in range(3):
        whole, split = one.step(packed_batch(index)), many.step(packed_batch(index))
        np.testing.assert_allclose(split["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(split["grad_norm"], whole["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize(
    "axes, attention",
    [
        (dict(fsdp=2, context=2, tensor=2), "auto"),
        pytest.param(dict(data=2, context=4), "ring", marks=SLOW),
    ],
)
def test_rows_over_devices_equal_one_device(axes, attention):
    """`auto` uses all-to-all. Adam hides the scale of a gradient, so compare norms too."""
    config = tiny_config(**axes)
    config.attention = attention
    one, many = Run(tiny_config(), one_device()), Run(config)
    for index in range(3):
        whole, split = one.step(packed_batch(index)), many.step(packed_batch(index))
        np.testing.assert_allclose(split["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(split["grad_norm"], whole["grad_norm"], rtol=1e-4)
    for path, leaf in many.state.trainable.items():
        if not path.endswith("attn/k/bias"):  # see test_two_scales_sharded_equal_one_device
            np.testing.assert_allclose(leaf, one.state.trainable[path], atol=2e-5, err_msg=path)
    moved = "all-to-all" if attention == "auto" else "collective-permute"
    assert moved in many.text()


@pytest.mark.parametrize("slots", [pytest.param(4, marks=SLOW), 3])
def test_images_are_split_over_the_devices_of_a_row(slots):
    """Four groups of images on eight devices, with four slots, or with three and one of padding."""
    batches = [packed_batch(index, rows=4, slots=slots) for index in range(3)]
    config = tiny_config(data=2, fsdp=2, context=2)
    one, many = Run(tiny_config(), one_device()), Run(config)
    for batch in batches:
        whole, split = one.step(batch), many.step(batch)
        np.testing.assert_allclose(split["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(split["grad_norm"], whole["grad_norm"], rtol=1e-4)
    tower = config.model.vision_tower
    patches = (tower.image_size // tower.patch_size) ** 2
    text = many.text()
    assert f"f32[2,{patches},{tower.mlp_dim}]" in text
    assert f"f32[{slots},{patches},{tower.mlp_dim}]" not in text


def other_families(**mesh_axes):
    """InternViT, a projector with norms between its layers, and a Llama with Qwen's additions."""
    config = tiny_config(**mesh_axes)
    with config.unlocked():
        config.model.vision_tower.type = "intern_vit"
        del config.model.vision_tower.head
        config.model.projector.type = "mlp_downsample_3x3_fix"
        config.model.llm.update(dict(qkv_bias=True, o_bias=True, qk_norm=True, tie_embeddings=False))
        scaling = dict(type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
        with config.model.llm.ignore_type():
            config.model.llm.rope_scaling = dict(scaling, original_max_positions=16)
    return config


@pytest.mark.parametrize(
    "axes", [pytest.param(dict(fsdp=4, tensor=2), marks=SLOW), dict(data=2, fsdp=2, tensor=2)]
)
def test_other_families_sharded_equal_one_device(axes):
    one, many = Run(other_families(), one_device()), Run(other_families(**axes))
    for index in range(5):
        batch = packed_batch(index)
        np.testing.assert_allclose(many.step(batch)["loss"], one.step(batch)["loss"], rtol=1e-5)
    for path, leaf in many.state.trainable.items():
        np.testing.assert_allclose(leaf, one.state.trainable[path], atol=2e-5, err_msg=path)


def two_scales(**mesh_axes):
    config = tiny_config(**mesh_axes)
    with config.unlocked():
        config.model.s2_scales = (32, 64)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resize", "dynamic_s2"])
@pytest.mark.parametrize("last", ["tensor", "context"])
def test_two_scales_sharded_equal_one_device(mode, last):
    configs = two_scales(), two_scales(data=2, fsdp=2, **{last: 2})
    for config in configs:
        config.model.update(image_aspect_ratio=mode, max_tiles=4)
        config.data.images_per_group = 6  # the slots of `tiled_batch`
    one, many = Run(configs[0], one_device()), Run(configs[1])
    before = np.asarray(one.state.trainable["vision_tower/patch_embed/kernel"])
    for index in range(5):
        batch = packed_batch(index, side=64) if mode == "resize" else tiled_batch(index)
        np.testing.assert_allclose(many.step(batch)["loss"], one.step(batch)["loss"], rtol=1e-5)
    for path, leaf in many.state.trainable.items():
        # Softmax ignores a bias of all keys, so its gradient is rounding noise, which AdamW amplifies.
        if not path.endswith("attn/k/bias"):
            np.testing.assert_allclose(leaf, one.state.trainable[path], atol=2e-5, err_msg=path)
    assert np.abs(one.state.trainable["vision_tower/patch_embed/kernel"] - before).max() > 1e-4


def test_activations_are_split_inside_the_step():
    run = Run(tiny_config(fsdp=4, tensor=2))
    run.step(packed_batch(0))
    text = run.text()
    rows, length = packed_batch(0).tokens.shape
    mlp = run.config.model.llm.mlp_dim
    assert f"f32[{rows // 4},{length},{mlp // 2}]" in text, (
        "the MLP's hidden activations are not split over fsdp x tensor"
    )
    assert f"f32[{rows},{length},{mlp}]" not in text


@pytest.mark.slow
def test_the_loss_falls_on_a_repeated_batch():
    config = tiny_config(fsdp=4, tensor=2)
    config.num_steps = 60
    run, batch = Run(config), packed_batch(0)
    losses = [run.step(batch)["loss"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_equals_one_large_batch():
    plain, parts = tiny_config(fsdp=2, tensor=4), tiny_config(fsdp=2, tensor=4)
    parts.grad_accum = 4
    for config in (plain, parts):
        config.ema_decay, config.skip.spike, config.skip.window = 0.9, 3.0, 2
    one, four = Run(plain), Run(parts)
    for index in range(4):
        batch = packed_batch(index)
        whole, split = one.step(batch), four.step(batch)
        for key in ("loss", "grad_norm", "skipped"):
            np.testing.assert_allclose(split[key], whole[key], rtol=1e-5, err_msg=key)
    for path, average in four.state.ema.items():
        assert average.sharding == four.state.trainable[path].sharding
        np.testing.assert_allclose(average, one.state.ema[path], atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_accumulation_keeps_groups_of_rows_whole():
    plain, parts = tiny_config(fsdp=2, tensor=4), tiny_config(fsdp=2, tensor=4)
    for config in (plain, parts):
        config.data.rows_per_group = 2
    parts.grad_accum = 2
    batch = packed_batch(0, rows_per_group=2)
    np.testing.assert_allclose(Run(parts).step(batch)["loss"], Run(plain).step(batch)["loss"], rtol=1e-5)


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state():
    config = tiny_config(fsdp=4, tensor=2)
    config.trainable = ((r"projector/.*", 1.0), (r".*", 0.0))
    run = Run(config)
    before = {path: np.asarray(leaf) for path, leaf in run.state.all_params().items()}
    run.step(packed_batch(0))
    run.step(packed_batch(1))
    assert set(run.state.trainable) == {path for path in before if path.startswith("projector/")}
    for path, leaf in run.state.frozen.items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert all(np.any(np.asarray(leaf) != before[path]) for path, leaf in run.state.trainable.items())
    trained = sum(leaf.size for leaf in run.state.trainable.values())
    held = sum(leaf.size for leaf in jax.tree.leaves(run.state.opt_state))
    assert held <= 2 * trained + 8


def test_a_group_multiplier_scales_its_update():
    slow, fast = tiny_config(), tiny_config()
    for config, rate in ((slow, 0.25), (fast, 1.0)):
        config.trainable = ((r"projector/.*", rate), (r".*", 0.0))
        config.schedule.name, config.schedule.warmup_fraction = "constant", 0.0
    moved = []
    for config in (slow, fast):
        run = Run(config, one_device())
        start = {path: np.asarray(leaf) for path, leaf in run.state.trainable.items()}
        run.step(packed_batch(0))
        run.step(packed_batch(0))
        moved.append(
            {path: np.abs(np.asarray(leaf) - start[path]).max() for path, leaf in run.state.trainable.items()}
        )
    for path in moved[0]:
        assert moved[0][path] == pytest.approx(0.25 * moved[1][path], rel=0.05)


def test_the_loss_is_the_token_mean_over_the_global_batch():
    config = tiny_config()
    graphdef, _ = build.abstract_model(config.model, "generative")
    params = param_paths.flatten(build.init_params(config.model, "generative", jax.random.key(0)))

    def loss(batch):
        return TASKS["generative"].loss(build.merge(graphdef, param_paths.unflatten(params)), batch, 16)

    batch = jax.tree.map(jnp.asarray, packed_batch(3))
    whole = loss(batch)
    halves = [jax.tree.map(lambda x, part=part: x[part], batch) for part in (slice(0, 4), slice(4, 8))]
    parts = [loss(half) for half in halves]
    np.testing.assert_allclose(whole.loss, parts[0].loss + parts[1].loss, rtol=1e-5)
    assert float(whole.weight) == sum(float(part.weight) for part in parts)


@pytest.mark.parametrize(
    "axes, line, tied",
    [
        pytest.param(dict(data=2, fsdp=2, tensor=2), 1, False, marks=SLOW),
        (dict(data=2, fsdp=2, tensor=2), 1, True),
        pytest.param(dict(fsdp=4, tensor=2), 2, False, marks=SLOW),
        pytest.param(dict(fsdp=2, tensor=4), 1, False, marks=SLOW),
    ],
)
def test_an_odd_vocabulary_and_fsdp_in_two_axes_equal_one_device(axes, line, tied, monkeypatch):
    configs = tiny_config(), tiny_config(**axes)
    for config in configs:
        config.model.llm.vocab_size += 1
        # With the default, AdamW turns the rounding noise of a zero gradient into a full step.
        config.optimizer.eps = 1e-3
        config.model.llm.tie_embeddings = tied
    one = Run(configs[0], one_device())
    monkeypatch.setattr(mesh_lib, "_line", lambda fsdp, devices: line)
    many = Run(configs[1])
    table = many.state.trainable["llm/embed/embedding"].sharding.spec
    assert table[0] is None and "tensor" in table[1]  # split over the width, by both
    for index in range(5):
        batch = packed_batch(index)
        np.testing.assert_allclose(many.step(batch)["loss"], one.step(batch)["loss"], rtol=1e-5)
    for path, leaf in many.state.trainable.items():
        np.testing.assert_allclose(leaf, one.state.trainable[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize("axes", [dict(fsdp=8), pytest.param(dict(data=2, fsdp=4), marks=SLOW)])
def test_weights_are_gathered_and_gradients_scattered(axes):
    config = tiny_config(**axes)
    run = Run(config)
    run.step(packed_batch(0))
    text = run.text()
    llm = config.model.llm
    whole = f"[{llm.hidden_size},{llm.mlp_dim}]"
    reduced = [line for line in text.splitlines() if " all-reduce(" in line and whole in line]
    assert not reduced, "a weight's gradient is all-reduced"
    assert " reduce-scatter(" in text and " all-gather(" in text


def test_a_group_without_image_slots_is_text_alone():
    config = tiny_config(fsdp=8)
    batch = packed_batch(0)
    batch.visual_index[:] = -1
    run = Run(config)
    full = run.step(batch)["loss"]
    none = Run(config)
    batch = dataclasses.replace(batch, images=batch.images[:, :0], image_valid=batch.image_valid[:, :0])
    np.testing.assert_allclose(none.step(batch)["loss"], full, rtol=1e-6)
