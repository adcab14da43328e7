"""Generation beside transformers, in one process: SmolLM2-135M, float32, greedy.

    PYTHONPATH=tests/experts python benchmarks/generation.py --llm FOLDER [--rounds 3]

FOLDER is a Hugging Face folder or a GGUF file, such as the one that `make quickstart` downloads. Prints, as
medians over the rounds: tokens per second of one dialogue, useful tokens per second of 16 dialogues of
mixed lengths in batches of 8, time to the first token, and the share of the limit of reading the weights.
transformers answers them in two static, padded batches, each of which runs until its longest answer ends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torchvision_operators import declare_operators  # of tests/experts
from vilam3_jax.configs import models

from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.importer import import_model
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.inference.batching import Batcher, Script, Turn
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build, model_config, param_paths

ROWS, MAX_LENGTH = 8, 512
_OPERATORS = declare_operators()  # before transformers is imported


def workload(vocab_size: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of 16 dialogues; lengths from 20 to 200, answers from 4 to 128 tokens."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(100, vocab_size, rng.integers(20, 200)).tolist(), int(new))
        for new in np.geomspace(4, 128, 16).astype(int)[rng.permutation(16)]
    ]


def load_ours(source: Path, folder: Path, rows: int) -> Generator:
    """A generator around the imported LLM; its tower and projector are not used."""
    export = folder / "export"
    if not export.exists():
        import_model(source, export)
    config = models.get("tiny")
    config.llm = exports.load_model_config(export).llm.to_dict()
    config = model_config.resolve(config)
    wanted = param_paths.flatten(build.abstract_model(config, "generative")[1])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    llm = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in wanted.items()
        if path.startswith("llm/")
    }
    rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in llm}
    params = param_paths.unflatten(rest | exports.load_params(export, llm))
    tokenizer = load_tokenizer(export / "tokenizer")
    return Generator(config, params, tokenizer, max_length=MAX_LENGTH, batch_size=rows)


def say(prompt: list[int], new: int) -> Script[int]:
    """A dialogue of one turn; returns the number of its tokens."""
    answer = yield Turn(Chunk.text(prompt), new, ())
    return len(answer.ids)


def theirs(model: Any, prompts: list[list[int]], new: int) -> None:
    """One static batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def streaming_limit(parameters: int) -> float:
    """Seconds to read float32 weights once, through a matrix-vector product."""
    matrix, vector = jnp.ones((parameters // 1024, 1024)), jnp.ones(1024)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    return min(seconds(lambda: product(matrix, vector).block_until_ready()) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    file = {"gguf_file": options.llm.name} if options.llm.is_file() else {}
    folder = options.llm.parent if options.llm.is_file() else options.llm
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
    reference.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as scratch:
        alone = load_ours(options.llm, Path(scratch), 1)
        batched = load_ours(options.llm, Path(scratch), ROWS)
    work = workload(alone.vocab_size)
    prompt, new = work[0][0][:60], 128
    useful = sum(new for _, new in work)
    halves = [work[:ROWS], work[ROWS:]]

    def run(generator: Generator, dialogues: list[tuple[list[int], int]]) -> None:
        assert sum(Batcher(generator).run(say(*one) for one in dialogues)) == sum(n for _, n in dialogues)

    tasks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "one dialogue": (lambda: run(alone, [(prompt, new)]), lambda: theirs(reference, [prompt], new)),
        "first token": (lambda: run(alone, [(prompt, 1)]), lambda: theirs(reference, [prompt], 1)),
        "16 dialogues": (
            lambda: run(batched, work),
            lambda: [theirs(reference, [p for p, _ in half], max(n for _, n in half)) for half in halves],
        ),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for number in range(options.rounds + 1):  # the first compiles
        for name, (ours, other) in tasks.items():
            pair = seconds(ours), seconds(other)
            if number:
                measured[name].append(pair)
    weights = param_paths.flatten(build.abstract_model(alone.model, "generative")[1])
    count = sum(int(np.prod(leaf.shape)) for path, leaf in weights.items() if path.startswith("llm/"))
    limit = streaming_limit(count)
    print("| | ours | transformers | ratio (rounds) |\n|---|---|---|---|")
    for name, pairs in measured.items():
        own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        if name == "first token":
            shown = f"{own * 1000:.0f} ms | {other * 1000:.0f} ms"
        else:
            tokens = new if name == "one dialogue" else useful
            shown = f"{tokens / own:.1f} tokens/s | {tokens / other:.1f} tokens/s"
        middle = statistics.median(ratios)
        print(f"| {name} | {shown} | {middle:.2f} ({', '.join(f'{r:.2f}' for r in ratios)}) |")
    own = statistics.median(a for a, _ in measured["16 dialogues"])
    print(f"\nReading {count * 4 / 1e6:.0f} MB of weights takes {limit * 1000:.0f} ms.")
    single = statistics.median(a for a, _ in measured["one dialogue"])
    print(f"One dialogue: {new * limit / single:.0%} of that limit.")
    print(
        f"16 dialogues in batches of {ROWS}: {useful / ROWS * limit / own:.0%} of the limit of full batches."
    )


if __name__ == "__main__":
    main()
