"""Generation beside transformers, in one process: SmolLM2-135M, float32, greedy.

    PYTHONPATH=tests/experts python benchmarks/generation.py --llm FOLDER [--rounds 3] \
        [--dtype int8] [--cache_dtype int8]

FOLDER is a Hugging Face folder or a GGUF file, such as the one that `make quickstart` downloads. Prints, as
medians over the rounds: tokens per second of one dialogue, useful tokens per second of 16 dialogues of
mixed lengths in batches of 8, time to the first token, and the share of the limit of reading the weights.
transformers answers them in two static, padded batches, each of which runs until its longest answer ends.
With --dtype or --cache_dtype, prints the same of our model in these types beside float32, and its memory.
"""

from __future__ import annotations

import argparse
import collections
import functools
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
from vilam3_jax.checkpoints.exports import LOADED_DTYPES
from vilam3_jax.convert.importer import import_model
from vilam3_jax.inference.batching import Batcher, Script, Turn
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.inference.loading import load_generator
from vilam3_jax.models import build, model_config, param_paths
from vilam3_jax.models.kv_cache import CACHE_DTYPES

ROWS, MAX_LENGTH = 8, 512
_OPERATORS = declare_operators()  # before transformers is imported


def workload(vocab_size: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of 16 dialogues; lengths from 20 to 200, answers from 4 to 128 tokens."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(100, vocab_size, rng.integers(20, 200)).tolist(), int(new))
        for new in np.geomspace(4, 128, 16).astype(int)[rng.permutation(16)]
    ]


def export_ours(source: Path, folder: Path) -> Path:
    """An export of a VILA around the imported LLM; its tower and projector are not used."""
    export, whole = folder / "llm", folder / "vila"
    import_model(source, export)
    sections = models.get("tiny")
    sections.llm = exports.load_model_config(export).llm.to_dict()
    config = model_config.resolve(sections)
    wanted = param_paths.flatten(build.abstract_model(config, "generative")[1])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    llm = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in wanted.items()
        if path.startswith("llm/")
    }
    rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in llm}
    params = param_paths.unflatten(rest | exports.load_params(export, llm))
    described = {**sections.to_dict(), "kind": "generative"}
    exports.export_model(whole, params, described, export / "tokenizer", {})
    return whole


def load_ours(export: Path, rows: int, dtype: str | None = None, cache_dtype: str | None = None) -> Generator:
    """A generator of `rows` rows."""
    return load_generator(
        export, max_length=MAX_LENGTH, batch_size=rows, dtype=dtype, cache_dtype=cache_dtype
    )[0]


def megabytes(generator: Generator) -> str:
    """Memory of the LLM and of the cache of `ROWS` rows."""
    llm = sum(x.nbytes for x in jax.tree.leaves(generator._params["llm"]))
    cache = sum(x.nbytes for x in generator.start(ROWS, size=MAX_LENGTH)._state.cache.values())
    return f"weights {llm / 1e6:.0f} MB, cache {cache / 1e6:.1f} MB"


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


class Runs:
    """Seconds of every task, by system and round."""

    def __init__(self, tasks: dict[str, dict[str, Callable[[], Any]]]):
        """`tasks`: system → task → what to measure."""
        self._tasks = tasks
        self._seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)

    def measure(self, rounds: int) -> None:
        """Runs the systems in turn; a first round compiles."""
        for number in range(rounds + 1):
            for system, tasks in self._tasks.items():
                for task, run in tasks.items():
                    took = seconds(run)
                    if number:
                        self._seconds[system, task].append(took)

    def median(self, system: str, task: str) -> float:
        """Median over the rounds."""
        return statistics.median(self._seconds[system, task])

    def table(self, first: str, second: str, tokens: dict[str, int]) -> str:
        """Tokens per second of two systems and their ratio; milliseconds of tasks without `tokens`."""
        lines = [f"| | {first} | {second} | ratio (rounds) |", "|---|---|---|---|"]
        for task in self._tasks[first]:
            pairs = zip(self._seconds[first, task], self._seconds[second, task], strict=True)
            ratios = sorted(b / a for a, b in pairs)
            shown = [
                f"{tokens[task] / self.median(system, task):.1f} tokens/s"
                if task in tokens
                else f"{self.median(system, task) * 1000:.0f} ms"
                for system in (first, second)
            ]
            every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {task} | {' | '.join(shown)} | {statistics.median(ratios):.2f} ({every}) |")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=LOADED_DTYPES)
    parser.add_argument("--cache_dtype", choices=CACHE_DTYPES)
    options = parser.parse_args()
    file = {"gguf_file": options.llm.name} if options.llm.is_file() else {}
    folder = options.llm.parent if options.llm.is_file() else options.llm
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
    reference.generation_config.eos_token_id = None
    given = {name: value for name in ("dtype", "cache_dtype") if (value := getattr(options, name))}
    types = {"ours": {}}
    if given:
        types["ours, " + ", ".join(f"{name} {value}" for name, value in given.items())] = given
    with tempfile.TemporaryDirectory() as scratch:
        export = export_ours(options.llm, Path(scratch))
        loaded = {
            system: (load_ours(export, 1, **of_model), load_ours(export, ROWS, **of_model))
            for system, of_model in types.items()
        }
    work = workload(loaded["ours"][0].vocab_size)
    prompt, new = work[0][0][:60], 128
    tokens = {"one dialogue": new, "16 dialogues": sum(new for _, new in work)}
    halves = [work[:ROWS], work[ROWS:]]

    def run(generator: Generator, dialogues: list[tuple[list[int], int]]) -> None:
        assert sum(Batcher(generator).run(say(*one) for one in dialogues)) == sum(n for _, n in dialogues)

    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        system: {
            "one dialogue": functools.partial(run, alone, [(prompt, new)]),
            "first token": functools.partial(run, alone, [(prompt, 1)]),
            "16 dialogues": functools.partial(run, batched, work),
        }
        for system, (alone, batched) in loaded.items()
    }
    tasks["transformers"] = {
        "one dialogue": lambda: theirs(reference, [prompt], new),
        "first token": lambda: theirs(reference, [prompt], 1),
        "16 dialogues": lambda: [
            theirs(reference, [p for p, _ in half], max(n for _, n in half)) for half in halves
        ],
    }
    runs = Runs(tasks)
    runs.measure(options.rounds)
    print(runs.table("ours", "transformers", tokens))
    for system, (_, batched) in loaded.items():
        if system != "ours":
            print("\n" + runs.table(system, "ours", tokens) + "\n")
        print(f"{system}: {megabytes(batched)}")
    weights = param_paths.flatten(build.abstract_model(loaded["ours"][0].model, "generative")[1])
    count = sum(int(np.prod(leaf.shape)) for path, leaf in weights.items() if path.startswith("llm/"))
    limit = streaming_limit(count)
    print(f"\nReading {count * 4 / 1e6:.0f} MB of weights takes {limit * 1000:.0f} ms.")
    print(f"One dialogue: {new * limit / runs.median('ours', 'one dialogue'):.0%} of that limit.")
    full = tokens["16 dialogues"] / ROWS * limit / runs.median("ours", "16 dialogues")
    print(f"16 dialogues in batches of {ROWS}: {full:.0%} of the limit of full batches.")


if __name__ == "__main__":
    main()
