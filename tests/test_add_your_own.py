"""The extension points: the examples of the "add your own" pages, installed beside the package."""

import configparser
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.evals import parsers, protocol
from vilam3_jax.models import families
from vilam3_jax.ops.attention import MaskInfo, attention, backends
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding import mesh as mesh_lib

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page, language):
    """The code blocks of a page in one language."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def install(site, pages):
    """Writes the modules of pages, and one distribution with their entry points."""
    info = site / "my_extensions-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-extensions\nVersion: 1.0\n")
    points = ""
    for page, module in pages.items():
        settings = configparser.ConfigParser()
        settings.read_string(blocks(page, "ini")[0])
        ((group, rows),) = settings["options.entry_points"].items()
        points += f"[{group}]{rows}\n"
        (site / f"{module}.py").write_text(blocks(page, "python")[0])
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs pages; registries and modules are restored afterwards."""
    registries = (families._registry, backends._registry, protocol._registry, parsers.PARSERS)
    before, modules = [dict(registry) for registry in registries], set(sys.modules)

    def install_pages(**pages):
        install(tmp_path / "site", {f"add_your_own_{page}.md": module for page, module in pages.items()})
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        importlib.invalidate_caches()
        return list(pages.values())

    yield install_pages
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    for name in set(sys.modules) - modules:
        if name in ("olmo2", "plain", "laterality"):
            del sys.modules[name]


def test_a_model_family_has_parity_with_transformers(installed, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.reference import decoder_parity, torch_weights

    installed(model="olmo2")
    config = transformers.Olmo2Config(
        vocab_size=decoder_parity.VOCAB,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=None,
        attn_implementation="eager",
    )
    reference = torch_weights.randomise(transformers.Olmo2ForCausalLM(config))
    with jax.default_matmul_precision("highest"):
        pair = decoder_parity.imported(reference, tmp_path / "olmo2")
        assert type(pair.config).__name__ == "Olmo2Config"
        decoder_parity.check_logits(pair, 13)
        decoder_parity.check_packing(pair, (5, 8))
        decoder_parity.check_cache(pair, 13, prefill=6)
        decoder_parity.check_export(pair, tmp_path)


def test_a_model_family_trains(installed):
    from tests.training import helpers

    installed(model="olmo2")
    config = helpers.tiny_config(fsdp=4, tensor=2)
    config.model.llm.type = "olmo2"
    run = helpers.Run(config)
    losses = [run.step(helpers.packed_batch(0))["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] and "llm/layers/attn/q_norm/scale" in run.program.shapes


def rows(seed, batch=2, length=21, heads=4, kv_heads=2, width=8):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, width)] + [(batch, length, kv_heads, width)] * 2
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [9, 8, 4], axis=1)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], jnp.asarray(segments)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_an_attention_backend_equals_xla(installed, mask):
    installed(attention="plain")
    arrays, segments = rows(0)
    info = MaskInfo(segments, segments, **mask)

    def run(choice):
        def total(*arrays):
            with backends.use(choice):
                return (attention(*arrays, info) ** 2).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)

    assert "plain" in backends.names()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run("plain"), run("xla"))
    mesh = mesh_lib.build_mesh(mesh_lib.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with logical_axes.activation_rules(mesh, logical_axes.ACTIVATION_RULES):
        sharded = jax.jit(lambda: run("plain"))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, atol=2e-5), sharded, run("xla"))


def test_the_last_registered_backend_is_asked_first_and_may_decline(installed):
    installed(attention="plain")
    (q, k, _), segments = rows(0)
    call = backends.call_of(q, k.shape[1], MaskInfo(segments, segments), sharded=False)
    assert backends.select(call).name == "plain"
    long = dataclasses.replace(call, kv_len=1000)
    assert backends.select(long).name == "xla"
    assert backends.explain(long)[0] == "plain: would hold 21 x 1000 scores"


def test_a_protocol_is_found_by_its_name(installed):
    before = protocol.names()
    installed(protocol="laterality")
    assert set(protocol.names()) - set(before) == {"laterality@1"}
    found = protocol.get("laterality@1")
    assert found.split == "test" and len(found.hash) == 64
    parse = parsers.PARSERS["laterality_side"]
    assert parse("Left.", ()) == "left" and parse("left or right", ()) is None


SCRIPT = """
import json
from vilam3_jax.datasets import registry
from vilam3_jax.evals import protocol
from vilam3_jax.models import families
from vilam3_jax.ops.attention import backends
from vilam3_experts import descriptors
print(json.dumps([
    "olmo2" in families.names("llm"),
    "plain" in backends.names(),
    "laterality@1" in protocol.names(),
    registry.get("polyps").__name__,
    "BODY" in descriptors.registry(),
]))
"""


def test_one_of_each_from_outside_the_package(tmp_path):
    """A separate process finds five extensions, none of which touches a file of ours."""
    site, template = tmp_path / "site", DOCS.parent / "examples" / "template_expert"
    pages = {"model": "olmo2", "attention": "plain", "protocol": "laterality", "dataset": "polyps"}
    install(site, {f"add_your_own_{page}.md": module for page, module in pages.items()})
    points = site / "my_extensions-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[vilam3.experts]\nBODY = template_expert:BODY\n")
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(site), str(template)]!r}\n{SCRIPT}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == [True, True, True, "Polyps", True]
