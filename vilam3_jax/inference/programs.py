"""The programs of generation: pure functions over the state of a session, and their compilation.

`generate` runs them; `plan` compiles them for slices that this host does not have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.inference.sampling import RowSampling, choose
from vilam3_jax.models import build, kv_cache
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.runtime import chips
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import shard
from vilam3_jax.sharding.weights import as_weight


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a model; made by `build_programs`.

    Attributes:
      repeat, lengthen, insert, extract: the functions of this module.
      start, encode, prefill, score, decode: the same, without their leading, fixed arguments.
    """

    start: Any
    repeat: Any
    lengthen: Any
    insert: Any
    extract: Any
    prefill: Any
    score: Any
    decode: Any
    encode: Any


def build_programs(
    model: ModelConfig,
    vocab_size: int,
    columns: int,
    cache_dtype: Any,
    rows: NamedSharding | None,
    mesh: Mesh | None,
) -> Programs:
    """Jits the programs; nothing is traced or compiled before the first call.

    Args:
      model: section `model` of a config.
      vocab_size: V, tokens that can be generated.
      columns: V' of the head, at least V.
      cache_dtype: type of a cache, see `kv_cache`.
      rows: sharding of the rows of a session, see `Generator`.
      mesh: mesh of the parameters if rows are not split over it.
    """
    graphdef, _ = build.abstract_model(model, "generative")
    state, whole = _shardings(rows, mesh, model.llm.num_kv_heads, columns, cache_dtype)
    one_row = state if rows is None else None  # a single row cannot be split

    def of_model(function: Callable[..., Any], *fixed: Any, **options: Any) -> Any:
        traced = _inside(model, mesh, functools.partial(function, graphdef, *fixed))
        return jax.jit(traced, compiler_options=compiler_options(mesh), **options)

    return Programs(
        start=jax.jit(
            functools.partial(start, graphdef, cache_dtype), static_argnums=(1, 2), out_shardings=state
        ),
        repeat=jax.jit(repeat, static_argnums=1, out_shardings=one_row),
        lengthen=jax.jit(lengthen, static_argnums=1, out_shardings=state),
        insert=jax.jit(insert, donate_argnums=0, out_shardings=state),
        extract=jax.jit(extract, out_shardings=one_row),
        prefill=of_model(prefill, vocab_size, donate_argnums=1, out_shardings=state),
        score=of_model(score, vocab_size, out_shardings=whole),
        decode=of_model(
            decode, vocab_size, donate_argnums=1, static_argnames="size", out_shardings=(state, whole)
        ),
        encode=of_model(encode, out_shardings=whole if rows is None else rows),
    )


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
    """XLA options of the programs on the devices of a mesh, by default on JAX's default devices."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    chip = chips.of_kind(device.device_kind)
    if chip is None or not chip.generation_vmem_kib:
        return {}
    return {"xla_tpu_scoped_vmem_limit_kib": chip.generation_vmem_kib}


def _shardings(
    rows: NamedSharding | None, mesh: Mesh | None, kv_heads: int, columns: int, cache_dtype: Any
) -> tuple[Any, Any]:
    """Shardings of the state of a session, and of outputs that every process reads."""
    mesh = rows.mesh if rows is not None else mesh  # type: ignore[assignment]
    if mesh is None:
        return None, None
    of_rows = PartitionSpec() if rows is None else rows.spec
    batch = of_rows[0] if len(of_rows) else None
    heads, vocab = (None if size % mesh.shape["tensor"] else "tensor" for size in (kv_heads, columns))
    specs = kv_cache.partition_specs(cache_dtype, batch, heads)
    cache = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    each = NamedSharding(mesh, PartitionSpec(batch, vocab))
    return State(cache, each, each), NamedSharding(mesh, PartitionSpec())


def _inside(model: ModelConfig, mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a function with activations split over `tensor`; without a mesh, in the caller's context."""
    if mesh is None:
        return function
    rules: dict[str, Any] = {**logical_axes.ACTIVATION_RULES, "length": None}
    # Heads that do not divide, such as InternViT's 25: devices share the queries instead.
    if model.llm.num_heads % mesh.shape["tensor"]:
        rules |= dict(heads="", kv_heads="", queries="tensor")
    if model.vision_tower.num_heads % mesh.shape["tensor"]:
        rules |= dict(tower_heads="", tower_queries="tensor")

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with logical_axes.activation_rules(mesh, rules):
            return function(*args, **options)

    return run


class State(NamedTuple):
    """What a session holds on the devices.

    Attributes:
      cache: see `models.kv_cache`.
      logits: float32 [B, V'], of the next token; -inf for ids outside the tokenizer's vocabulary.
      held: bool [B, V'], tokens of the dialogue so far.
    """

    cache: Any
    logits: Any
    held: Any


class Generated(NamedTuple):
    """The output of `decode`: ids and log_probs [B, size]; counts, stopped and finite [B]."""

    ids: Any
    log_probs: Any
    counts: Any
    stopped: Any
    finite: Any


def start(graphdef: Any, cache_dtype: Any, params: Any, rows: int, size: int) -> State:
    """An empty cache."""
    llm = build.merge(graphdef, params).llm
    vocab = as_weight(llm.head_kernel()).value.shape[1]
    return State(
        llm.init_cache(rows, size, cache_dtype),
        jnp.zeros((rows, vocab), jnp.float32),
        jnp.zeros((rows, vocab), bool),
    )


def repeat(state: State, rows: int) -> State:
    """Repeats the only row `rows` times."""
    cache = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), state.cache)
    return State(cache, jnp.repeat(state.logits, rows, axis=0), jnp.repeat(state.held, rows, axis=0))


def lengthen(state: State, size: int) -> State:
    """Pads the cache to `size` positions."""
    return state._replace(cache=kv_cache.lengthen(state.cache, size))


def insert(state: State, single: State, row: jax.Array) -> State:
    """Overwrites a row with the only row of `single`, whose cache may be shorter."""

    def put(whole: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, [row if i == axis else 0 for i in range(whole.ndim)])

    cache = jax.tree.map(lambda whole, part: put(whole, part, 1), state.cache, single.cache)
    return State(cache, put(state.logits, single.logits, 0), put(state.held, single.held, 0))


def extract(state: State, row: jax.Array) -> State:
    """A state of one row."""
    cache = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1), state.cache)
    return State(cache, *(jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (state.logits, state.held)))


def next_logits(model: Any, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 [..., V'] of hidden [..., D]; -inf for ids outside the tokenizer's vocabulary."""
    logits = model.llm.logits(hidden)
    if logits.shape[-1] % logical_axes.axis_size("vocab") == 0:  # every device keeps its own columns
        logits = shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def encode(
    graphdef: Any, params: Any, images: jax.Array, image_valid: jax.Array, image_tiles: jax.Array | None
) -> jax.Array:
    """The image tokens that `prefill` inserts, [G, M*T, D]; see `Vila.visual_tokens`."""
    return build.merge(graphdef, params).visual_tokens(images, image_valid, image_tiles)


def prefill(
    graphdef: Any, vocab_size: int, params: Any, state: State, lengths: jax.Array, sizes: jax.Array,
    tokens: jax.Array, visual_index: jax.Array | None, visual: jax.Array | None,
) -> State:  # fmt: skip
    """Appends a padded chunk to the cache; rows with size 0 keep their logits."""
    model = build.merge(graphdef, params)
    embeds = model.insert(tokens, visual_index, visual)
    steps = jnp.arange(tokens.shape[1])[None]
    hidden, cache = model.llm.forward_cached(embeds, lengths[:, None] + steps, state.cache, lengths)
    last = jnp.take_along_axis(hidden, jnp.maximum(sizes - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where((sizes > 0)[:, None], next_logits(model, last, vocab_size), state.logits)
    is_text = steps < sizes[:, None]
    if visual_index is not None:
        is_text &= visual_index < 0
    # A row without positions is a new dialogue.
    held = state.held & (lengths > 0)[:, None]
    return State(cache, logits, hold(held, jnp.where(is_text, tokens, held.shape[1])))


def hold(held: jax.Array, tokens: jax.Array) -> jax.Array:
    """Adds tokens [B, n] to the set of each row; ids beyond the vocabulary are none."""
    return held.at[jnp.arange(held.shape[0])[:, None], tokens].set(True, mode="drop")


def score(
    graphdef: Any, vocab_size: int, params: Any, state: State, lengths: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Float32 [B, L] log-probabilities of tokens [B, L] that follow the rows."""
    model = build.merge(graphdef, params)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.llm.forward_cached(model.embed(tokens), positions, state.cache, lengths)
    after = next_logits(model, hidden[:, :-1], vocab_size)
    logits = jnp.concatenate([state.logits[:, None], after], axis=1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def decode(
    graphdef: Any, vocab_size: int, params: Any, state: State, lengths: jax.Array, active: jax.Array,
    limits: jax.Array, sampling: RowSampling, allowed: jax.Array | None, stops: jax.Array, room: jax.Array,
    until: jax.Array, *, size: int,
) -> tuple[State, Generated]:  # fmt: skip
    """The decoding loop on the device, until every row is done, or `until` active ones are.

    A row that is done keeps its length; later cache entries beyond that length are overwritten.
    """
    model = build.merge(graphdef, params)
    start = lengths

    def pick(logits: jax.Array, held: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        """The next token, its log-probability, whether it is a stop, and whether the logits are finite."""
        if allowed is not None:
            outside = jnp.zeros((logits.shape[0], logits.shape[1] - vocab_size), bool)
            within = jnp.concatenate([allowed[:, :vocab_size], outside], axis=1)
            logits = jnp.where(within, logits, -jnp.inf)
        token, log_prob = choose(logits, held, lengths, sampling)
        highest = logits.max(axis=-1)  # NaN if one is NaN
        return token, log_prob, (token[:, None] == stops).any(axis=1), jnp.isfinite(highest)

    def finished(lengths: jax.Array, stop: jax.Array, finite: jax.Array) -> jax.Array:
        return stop | ~finite | (lengths >= room) | (lengths - start >= limits)

    def unfinished(loop: dict[str, Any]) -> jax.Array:
        done = loop["done"]
        return ~done.all() & ((done & active).sum() < until)

    def advance(loop: dict[str, Any]) -> dict[str, Any]:
        running, lengths, state = ~loop["done"], loop["lengths"], loop["state"]
        token, rows = loop["token"], jnp.arange(loop["token"].shape[0])
        place = jnp.where(running, lengths - start, size)
        hidden, cache = model.llm.forward_cached(
            model.embed(token[:, None]), lengths[:, None], state.cache, lengths
        )
        logits = jnp.where(running[:, None], next_logits(model, hidden[:, 0], vocab_size), state.logits)
        held = hold(state.held, jnp.where(running, token, state.held.shape[1])[:, None])
        lengths = lengths + running
        following, log_prob, stop, finite = pick(logits, held, lengths)
        return {
            "token": following,
            "log_prob": log_prob,
            "stopped": loop["stopped"] | (running & stop),
            "finite": loop["finite"] & (finite | ~running),
            "done": loop["done"] | finished(lengths, stop, finite),
            "lengths": lengths,
            "ids": loop["ids"].at[rows, place].set(token, mode="drop"),
            "log_probs": loop["log_probs"].at[rows, place].set(loop["log_prob"], mode="drop"),
            "state": State(cache, logits, held),
        }

    token, log_prob, stop, finite = pick(state.logits, state.held, lengths)
    loop = {
        "token": token,
        "log_prob": log_prob,
        "stopped": active & stop,
        "finite": finite | ~active,
        "done": ~active | finished(lengths, stop, finite),
        "lengths": lengths,
        "ids": jnp.zeros((lengths.shape[0], size), jnp.int32),
        "log_probs": jnp.zeros((lengths.shape[0], size), jnp.float32),
        "state": state,
    }
    loop = jax.lax.while_loop(unfinished, advance, loop)
    out = (loop["ids"], loop["log_probs"], loop["lengths"] - start, loop["stopped"], loop["finite"])
    return loop["state"], Generated(*out)
