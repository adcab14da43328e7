"""Compares an import from a GGUF file with transformers on the same file: logits, argmax, token ids.

    python benchmarks/import_parity.py --gguf FILE.gguf --text FILE.txt

Requires transformers, torch and accelerate. Prints one figure per line.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from ml_collections import ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from vilam3_jax.convert.importer import fill, open_source
from vilam3_jax.models import param_paths
from vilam3_jax.models.llama import Llama
from vilam3_jax.runtime import compat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; ids are compared line by line")
    parser.add_argument("--tokens", type=int, default=512, help="number of tokens for the logits")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")

    start = time.perf_counter()
    source = open_source(arguments.gguf)
    flat = fill(source)
    print(f"import_seconds {time.perf_counter() - start:.1f}")
    print(f"parameters {sum(value.size for value in flat.values())}")

    where = dict(pretrained_model_name_or_path=arguments.gguf.parent, gguf_file=arguments.gguf.name)
    theirs = AutoTokenizer.from_pretrained(**where)
    ours = source.tokenizer()
    text = arguments.text.read_text()
    lines = text.splitlines()
    differing = [
        line
        for line in lines
        if ours.encode(line, allow_special=True) != theirs.encode(line, add_special_tokens=False)
    ]
    print(f"lines {len(lines)}\nlines_with_other_ids {len(differing)}")
    for line in differing[:5]:
        print(f"  {line[:80]!r}")

    tokens = np.asarray([ours.encode(text)[: arguments.tokens]], np.int32)
    reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).logits.numpy()

    settings = dict(dtype="float32", param_dtype="float32", remat="none")
    model = nnx.eval_shape(lambda: Llama(ConfigDict(source.parts[0].config), rngs=nnx.Rngs(0), **settings))
    params = {path.removeprefix("llm/"): jnp.asarray(value) for path, value in flat.items()}
    graphdef, _ = compat.split(model)

    @jax.jit
    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        llama = compat.merge(graphdef, params)
        positions = jnp.arange(tokens.shape[1])[None]
        return llama.logits(llama(llama.embed(tokens), jnp.ones_like(tokens), positions))

    actual = np.asarray(forward(param_paths.unflatten(params), tokens))
    print(f"tokens {tokens.shape[1]}")
    print(f"max_abs_logit {np.abs(expected).max():.2f}")
    print(f"max_abs_difference {np.abs(actual - expected).max():.2e}")
    print(f"argmax_differs {int((actual.argmax(-1) != expected.argmax(-1)).sum())}")


if __name__ == "__main__":
    main()
