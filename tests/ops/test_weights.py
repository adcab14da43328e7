"""`Weight`s: which parameters become one, and that they pass through JAX's transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.models.gemma3 import Gemma3Embed
from vilam3_jax.models.layers import Embed, Linear
from vilam3_jax.ops.quantized import QuantizedKernel
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.matmul import linear
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.sharding.weights import Weight, annotate, as_weight

SHAPES = {
    "llm/embed/embedding": (11, 4),
    "llm/layers/attn/q/kernel": (3, 4, 6),
    "llm/layers/attn/q/lora_a": (3, 4, 2),
    "llm/layers/attn/q/lora_b": (3, 2, 6),
    "llm/layers/attn/q/bias": (3, 6),
    "llm/final_norm/scale": (4,),
    "vision_tower/patch_embed/kernel": (2, 2, 3, 4),
    "vision_tower/position_embedding": (9, 4),
    "logit_scale": (),
}
MATRICES = [path for path in SHAPES if path.endswith(("embedding", "kernel", "lora_a", "lora_b"))][:4]


@pytest.fixture(scope="module")
def mesh():
    return compat.make_mesh([2, 2, 1, 2], MESH_AXES, jax.devices()[:8])


def params_of(mesh, *spec):
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    return params, dict.fromkeys(params, NamedSharding(mesh, PartitionSpec(*spec)))


def test_matrices_alone_are_wrapped(mesh):
    params, shardings = params_of(mesh)
    found = annotate(params, shardings)
    assert list(found) == list(params)
    assert [path for path, value in found.items() if isinstance(value, Weight)] == MATRICES
    for path, value in found.items():
        assert as_weight(value).value is params[path]


def test_specs_have_an_entry_per_dimension(mesh):
    found = annotate(*params_of(mesh, None, "fsdp"))
    assert found["llm/layers/attn/q/kernel"].specs == ((None, "fsdp", None),)
    assert found["llm/layers/attn/q/kernel"].matrix_specs == (("fsdp", None),)
    assert found["llm/embed/embedding"].specs == ((None, "fsdp"),)
    assert found["llm/embed/embedding"].T.specs == (("fsdp", None),)
    assert found["llm/embed/embedding"].T.value.shape == (4, 11)


def test_every_array_of_a_quantised_kernel_has_a_spec(mesh):
    path = "llm/layers/mlp/up/kernel"
    kernel = QuantizedKernel(jnp.zeros((3, 4, 6), jnp.int8), jnp.ones((3, 1, 6)), "int8", jnp.float32)
    values, scales = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), ()))
    shardings = {path: QuantizedKernel(values, scales, "int8", jnp.float32)}
    weight = annotate({path: kernel}, shardings)[path]
    assert weight.value is kernel
    assert weight.specs == ((None, "fsdp", None), (None, None, None))


def test_a_parameter_without_a_sharding_is_an_error(mesh):
    params, shardings = params_of(mesh)
    del shardings["llm/embed/embedding"]
    with pytest.raises(KeyError, match="llm/embed/embedding"):
        annotate(params, shardings)


def test_products_of_named_kernels_alone_are_replaced(mesh):
    def doubled(spec, x, kernel):
        return 2 * jnp.einsum(spec, x, kernel)

    path = "llm/layers/attn/q/kernel"
    found = annotate(*params_of(mesh), {path: doubled})
    assert {name for name in MATRICES if found[name].einsum is not None} == {path}
    x, kernel = jnp.arange(8.0).reshape(2, 4), jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(linear(x, Weight(kernel, einsum=doubled), (4,), (3,)), 2 * (x @ kernel))
    np.testing.assert_array_equal(linear(x, Weight(kernel), (4,), (3,)), x @ kernel)
    np.testing.assert_array_equal(linear(x, kernel, (4,), (3,)), x @ kernel)


def test_a_stack_is_scanned_layer_by_layer(mesh):
    """`scan` slices the value and keeps the specs; the gradient is a `Weight` again."""
    stack = jax.random.normal(jax.random.key(0), (3, 4, 4))
    weight = Weight(stack, ((None, "fsdp", "tensor"),))
    x = jax.random.normal(jax.random.key(1), (8, 4))

    def run(weight, x):
        def body(x, layer):
            assert layer.value.shape == (4, 4) and layer.matrix_specs == (("fsdp", "tensor"),)
            return linear(x, layer, (4,), (4,)), None

        return jax.lax.scan(body, x, weight)[0].sum()

    want = jax.grad(lambda stack: (x @ stack[0] @ stack[1] @ stack[2]).sum())(stack)
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        gradient = jax.jit(jax.grad(run))(weight, x)
    assert isinstance(gradient, Weight) and gradient.specs == weight.specs
    np.testing.assert_allclose(gradient.value, want, atol=1e-4)


class Model(nnx.Module):
    def __init__(self):
        kwargs = dict(rngs=nnx.Rngs(params=0, lora=1), dtype="float32", param_dtype="float32")
        self.embed = Embed(16, 8, **kwargs)
        self.inner = Linear(8, (4, 4), lora_rank=2, **kwargs)
        self.outer = Linear((4, 4), 8, **kwargs)

    def __call__(self, tokens):
        return self.outer(jnp.tanh(self.inner(self.embed(tokens))))


def test_a_model_of_annotated_parameters_computes_the_same(mesh):
    graphdef, params = compat.split(Model())
    params["inner"]["lora_b"] = jax.random.normal(jax.random.key(3), (2, 16))
    flat = {f"{layer}/{name}": value for layer, layers in params.items() for name, value in layers.items()}
    specs = {"embedding": ("tensor", "fsdp"), "kernel": ("fsdp", "tensor"), "lora_a": ("fsdp", None)}
    shardings = {
        path: NamedSharding(mesh, PartitionSpec(*specs.get(path.split("/")[1], ()))) for path in flat
    }
    tokens = jax.random.randint(jax.random.key(2), (8, 5), 0, 16)

    def loss(flat):
        nested = {layer: {} for layer in params}
        for path, value in flat.items():
            layer, name = path.split("/")
            nested[layer][name] = value
        return jnp.square(compat.merge(graphdef, nested)(tokens)).sum()

    want, want_gradient = jax.value_and_grad(loss)(flat)
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        step = jax.jit(jax.value_and_grad(lambda flat: loss(annotate(flat, shardings))))
        compiled = step.lower(jax.device_put(flat, shardings)).compile()
    got, gradient = compiled(jax.device_put(flat, shardings))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, expected in want_gradient.items():
        np.testing.assert_allclose(gradient[path], expected, rtol=1e-4, atol=1e-5, err_msg=path)
    assert " reduce-scatter(" in compiled.as_text(), "a kernel's gradient is split where it is summed"


@pytest.mark.parametrize("embed", [Embed, Gemma3Embed])
def test_embeddings_of_a_sharded_step_equal_the_plain_ones(mesh, embed):
    graphdef, params = compat.split(embed(16, 8, rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32"))
    ids = jnp.arange(24).reshape(4, 6) % 16
    table = {"llm/embed/embedding": params["embedding"]}
    stored = annotate(table, {"llm/embed/embedding": NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))})
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        got = jax.jit(lambda weight: compat.merge(graphdef, {"embedding": weight})(ids))(
            stored["llm/embed/embedding"]
        )
    np.testing.assert_allclose(got, compat.merge(graphdef, params)(ids), rtol=1e-6)
