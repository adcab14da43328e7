"""GGUF files: parameters and tokens equal those of the Hugging Face folder; damage is reported."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from foreign import LLAMA, llama_weights, to_llama_cpp, write_folder, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.in_memory import fill
from vilam3_jax.convert.gguf import unpermute
from vilam3_jax.convert.importer import open_source
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import UserError

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def weights():
    return llama_weights()


@pytest.fixture(scope="module")
def path(tmp_path_factory, weights):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", weights)


@given(heads=st.integers(1, 5), half=st.integers(1, 4), seed=st.integers(0, 99))
def test_unpermute_undoes_llama_cpp(heads, half, seed):
    weight = np.random.default_rng(seed).normal(size=(heads * half * 2, 3))
    np.testing.assert_array_equal(unpermute(to_llama_cpp(weight, heads), heads), weight)


@pytest.mark.parametrize("tied", [False, True])
def test_same_parameters_as_the_hugging_face_folder(tmp_path, tied):
    weights = llama_weights(tie_word_embeddings=tied)
    theirs = fill(open_source(write_folder(tmp_path, {**LLAMA, "tie_word_embeddings": tied}, weights)))
    source = open_source(write_gguf(tmp_path / "model.gguf", weights))
    ours = fill(source)
    assert ours.keys() == theirs.keys() and ("llm/lm_head/kernel" in ours) == (not tied)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert source.parts[0].config["norm_eps"] == 1e-5 and source.parts[0].config["tie_embeddings"] is tied
    assert source.parts[0].licence == {"name": "apache-2.0"}


@pytest.mark.parametrize(
    ("kind", "tolerance"), [(Q.F16, 2e-3), (Q.BF16, 1.6e-2), (Q.Q8_0, 0.03), (Q.Q4_1, 0.4)]
)
def test_quantised_weights_come_back_close(tmp_path, weights, kind, tolerance):
    source = open_source(write_gguf(tmp_path / "model.gguf", weights, kind))
    params = fill(source)
    assert set(source.parts[0].dtypes) == {"F32", kind.name}
    for name in "qkvo":
        expected = weights[f"model.layers.1.self_attn.{name}_proj.weight"].T
        error = np.abs(params[f"llm/layers/attn/{name}/kernel"][1] - expected).max()
        assert 0 < error < tolerance


def test_tokenizer_has_the_files_own_split(path, tmp_path):
    tokenizer = open_source(path).tokenizer()
    spell = lambda text, **kwargs: [tokenizer.token(i) for i in tokenizer.encode(text, **kwargs)]  # noqa: E731
    # Digits are single tokens, separate from white space before them; GPT-2's split gives Ġ, Ġ, 1.
    assert spell("  1125") == ["ĠĠ", "1", "1", "2", "5"]
    assert spell("live liver") == ["live", "Ġliver"]
    assert spell("<|im_end|>", allow_special=True) == ["<|im_end|>"]
    assert "<|im_end|>" not in spell("<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.chat_template == "{{ messages }}"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "Liver: 12 ml\n\n  7 é 🫁"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert again.vocab_size == LLAMA["vocab_size"]


def test_other_splits(tmp_path, weights):
    def spell(pre):
        tokenizer = open_source(write_gguf(tmp_path / f"{pre}.gguf", weights, pre=pre)).tokenizer()
        return [tokenizer.token(index) for index in tokenizer.encode("  1 liver")]

    assert spell("gpt-2") == ["Ġ", "Ġ", "1", "Ġliver"]
    assert spell("llama-bpe") == ["Ġ", "Ġ", "1", "Ġliver"]
    with pytest.raises(UserError, match="pre-tokenizer 'viking' is not supported; give"):
        spell("viking")
    file = write_gguf(tmp_path / "spm.gguf", weights, tokenizer="llama")
    with pytest.raises(UserError, match="tokenizer of type 'llama' is not supported; give"):
        open_source(file).tokenizer()


def test_other_architectures_and_rope_scaling_are_refused(tmp_path, weights):
    with pytest.raises(UserError, match="architecture 'gemma' is not supported"):
        open_source(write_gguf(tmp_path / "a.gguf", weights, architecture="gemma"))
    with pytest.raises(UserError, match="rope scaling"):
        open_source(write_gguf(tmp_path / "b.gguf", weights, extra={"llama.rope.scaling.type": "yarn"}))
    with pytest.raises(UserError, match="rope scaling"):
        open_source(write_gguf(tmp_path / "c.gguf", {**weights, "rope_freqs.weight": np.ones(4, np.float32)}))


def test_unknown_tensors_are_listed(tmp_path, weights):
    file = write_gguf(tmp_path / "m.gguf", {**weights, "extra.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"not used: extra\.weight$"):
        fill(open_source(file))


def test_folder_with_several_files_is_refused(tmp_path, weights):
    for name in "ab":
        write_gguf(tmp_path / f"{name}.gguf", weights)
    with pytest.raises(UserError, match=r"holds 2 \.gguf files"):
        open_source(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert open_source(tmp_path).parts[0].files[0].name == "a.gguf"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_reported(path, tmp_path, part):
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        open_source(cut, "gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_header_never_crashes(path, tmp_path, position, value):
    data = bytearray(path.read_bytes())
    data[position] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        source = open_source(damaged, "gguf")
        source.tokenizer()
        fill(source)
    except UserError as error:
        assert "\n" not in str(error)
