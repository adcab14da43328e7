"""The training losses: chunked next-token cross entropy and SigLIP's pairwise sigmoid loss."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.compat import equally_varying
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.matmul import LANES, einsum
from vilam3_jax.sharding.weights import as_weight

_PIECE_BYTES = 2**28


def chunked_cross_entropy(
    hidden: jax.Array,
    head_kernel: Any,
    tokens: jax.Array,
    loss_weights: jax.Array,
    segment_ids: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted next-token cross entropy over packed rows.

    The state at t-1 predicts token t if both have the same segment, other than 0; its loss has the weight
    `loss_weights[t]`, a constant. Positions without a loss cost nothing: the supervised positions of each row
    are moved to its front, and only the chunks that the fullest row needs are computed. The gradient is exact
    and computed in the same pass as the value.

    In a sharded step (`logical_axes.activation_rules`) every device computes its own rows and its part of the
    vocabulary. The kernel is gathered once; its gradient is summed and split once, at the end.

    Args:
      hidden: [B, L, D], states after the final norm.
      head_kernel: [D, V], an array or a `Weight`; it is used in the type of `hidden`, logits are float32.
      tokens: int [B, L].
      loss_weights: float [B, L].
      segment_ids: int [B, L], 0 for padding.
      chunk: positions of every row whose logits [B, chunk, V] are in memory at a time.

    Returns:
      float32 scalars: sum of weighted losses, sum of weights, and sum of weights where the most probable
      token is the target.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, not {chunk}")
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    weights = jnp.where(same, loss_weights[:, 1:].astype(jnp.float32), 0.0)
    # The last position predicts nothing and gets weight 0, so that the length remains L.
    weights = jax.lax.stop_gradient(jnp.pad(weights, ((0, 0), (0, 1))))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    kernel = as_weight(head_kernel)
    spec = kernel.matrix_specs[0] if kernel.specs else (None, None)
    sums: Any = _cross_entropy(hidden, kernel.value, targets, weights, chunk, spec)
    return sums[0], weights.sum(), sums[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, head_kernel, targets, weights, chunk, spec):
    return _on_devices(hidden, head_kernel, targets, weights, chunk, spec, _Wanted(False, False))[0]


def _cross_entropy_forward(hidden, head_kernel, targets, weights, chunk, spec):
    # A frozen head costs no product for its gradient.
    wanted = _Wanted(hidden.perturbed, head_kernel.perturbed)
    hidden, head_kernel, targets, weights = (x.value for x in (hidden, head_kernel, targets, weights))
    return _on_devices(hidden, head_kernel, targets, weights, chunk, spec, wanted)


def _cross_entropy_backward(chunk, spec, gradients, cotangents):
    d_loss, _ = cotangents  # the number of correct predictions is piecewise constant
    if isinstance(d_loss, SymbolicZero):
        return None, None, None, None
    d_hidden, d_kernel = (None if g is None else (g * d_loss).astype(g.dtype) for g in gradients)
    return d_hidden, d_kernel, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


class _Wanted(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    kernel: bool


class _Axes(NamedTuple):
    """Mesh axes that split the tokens, the columns of logits and the stored rows of the kernel."""

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    kernel_rows: tuple[str, ...] = ()
    columns_stored: bool = False  # whether the kernel is stored split over `vocab`


def _on_devices(hidden, head_kernel, targets, weights, chunk, kernel_spec, wanted):
    """Returns ((sum of losses, sum of correct predictions), gradients of hidden and kernel, each or None)."""
    local = partial(_local_cross_entropy, chunk=chunk, wanted=wanted)
    step = logical_axes.current()
    if step is None:
        return local(hidden, head_kernel, targets, weights, axes=_Axes())
    mesh, spec = step
    rows, columns = kernel_spec
    tokens = spec("batch", "length")
    axes = _Axes(
        tokens=logical_axes.mesh_axes("batch") + logical_axes.mesh_axes("length"),
        vocab=logical_axes.mesh_axes("vocab"),
        kernel_rows=logical_axes.split_over(rows),
        columns_stored=bool(logical_axes.split_over(columns)),
    )
    if axes.columns_stored and logical_axes.split_over(columns) != axes.vocab:
        raise UserError(
            f"config parameter_rules has the head's columns over {columns}, activation_rules.vocab the "
            f"logits over {' and '.join(axes.vocab) or 'nothing'}; make them equal"
        )
    states, kernel = PartitionSpec(*tokens, None), PartitionSpec(rows, columns)
    gradients = (states if wanted.hidden else None, kernel if wanted.kernel else None)
    return jax.shard_map(
        partial(local, axes=axes),
        mesh=mesh,
        in_specs=(states, kernel, tokens, tokens),
        out_specs=((PartitionSpec(), PartitionSpec()), gradients),
        check_vma=False,  # nothing is differentiated through it
    )(hidden, head_kernel, targets, weights)


def _local_cross_entropy(hidden, head_kernel, targets, weights, *, chunk, wanted, axes):
    """`_on_devices` for one device's tokens and part of the vocabulary."""
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padded = -(-length // chunk) * chunk
    supervised = weights != 0
    order = jnp.argsort(~supervised, axis=1, stable=True)  # [B, L]: supervised positions first

    def compact(x):
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))

    states, targets, weights = compact(hidden), compact(targets), compact(weights)
    kernel, first_column, vocab = _own_columns(head_kernel.astype(hidden.dtype), axes)
    columns = first_column + jnp.arange(kernel.shape[1])
    used_chunks = (supervised.sum(axis=1).max() + chunk - 1) // chunk

    def take(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)

    def body(i, carry):
        loss_sum, correct_sum, d_states, d_kernel = carry
        x, target, weight = take(states, i), take(targets, i), take(weights, i)
        logits = einsum("bld,dv->blv", x, kernel, preferred_element_type=jnp.float32)
        if kernel.shape[1] * logical_axes.devices_along(axes.vocab) > vocab:
            logits = jnp.where(columns < vocab, logits, -jnp.inf)
        peak = _over(jax.lax.pmax, logits.max(axis=-1, keepdims=True), axes.vocab)
        exponentials = jnp.exp(logits - peak)
        is_target = columns == target[..., None]
        total = exponentials.sum(axis=-1, keepdims=True)
        target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
        total, target_logit = _over(jax.lax.psum, (total, target_logit), axes.vocab)
        loss = jnp.log(total[..., 0]) + peak[..., 0] - target_logit
        loss_sum += (loss * weight).sum()
        correct_sum += jnp.where(target_logit >= peak[..., 0], weight, 0.0).sum()
        if wanted.hidden or wanted.kernel:
            d_logits = ((exponentials / total - is_target) * weight[..., None]).astype(hidden.dtype)
            d_logits = jax.lax.optimization_barrier(d_logits)
        if wanted.hidden:
            d_x = einsum("blv,dv->bld", d_logits, kernel, preferred_element_type=jnp.float32)
            d_x = _over(jax.lax.psum, d_x, axes.vocab).astype(d_states.dtype)
            d_states = jax.lax.dynamic_update_slice_in_dim(d_states, d_x, i * chunk, axis=1)
        if wanted.kernel:
            d_kernel += einsum("bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return loss_sum, correct_sum, d_states, d_kernel

    zero = jnp.zeros((), jnp.float32)
    d_states = jnp.zeros_like(states) if wanted.hidden else None
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if wanted.kernel else None
    carry = (zero, zero, d_states, d_kernel)
    loss_sum, correct_sum, d_states, d_kernel = jax.lax.fori_loop(0, used_chunks, body, carry)
    d_hidden = None
    if wanted.hidden:
        back = jnp.argsort(order, axis=1)[..., None]  # the inverse permutation
        d_hidden = jnp.take_along_axis(d_states[:, :length], back, axis=1)
    if wanted.kernel:
        # Summed over devices in the type of the products, like the gradients of all other weights.
        d_kernel = _stored_gradient(d_kernel.astype(hidden.dtype), vocab, axes).astype(head_kernel.dtype)
    return _over(jax.lax.psum, (loss_sum, correct_sum), axes.tokens), (d_hidden, d_kernel)


def _over(collective, x, axes):
    return collective(x, axes) if axes else x


def _own_columns(kernel, axes):
    """Returns (this device's columns [D, V / parts, rounded up], index of the first, V)."""
    for axis in reversed(axes.kernel_rows):  # one by one, as in `matmul.linear`
        kernel = jax.lax.all_gather(kernel, axis, axis=0, tiled=True)
    if not axes.vocab:
        return kernel, 0, kernel.shape[1]
    parts, own = logical_axes.devices_along(axes.vocab), jax.lax.axis_index(axes.vocab)
    if axes.columns_stored:
        return kernel, own * kernel.shape[1], kernel.shape[1] * parts
    vocab = kernel.shape[1]
    width = -(-vocab // parts)
    kernel = jnp.pad(kernel, ((0, 0), (0, width * parts - vocab)))
    return jax.lax.dynamic_slice_in_dim(kernel, own * width, width, axis=1), own * width, vocab


def _stored_gradient(gradient, vocab, axes):
    """Sums the gradient of a device's columns over all tokens and reshards it as the kernel is stored."""
    exchanged = [axis for axis in axes.kernel_rows if axis in axes.vocab]
    pieces = [gradient]
    thin = axes.kernel_rows and gradient.shape[0] // logical_axes.devices_along(axes.kernel_rows[:1]) < LANES
    if thin and not exchanged:
        # In column blocks: XLA all-reduces a gigabyte instead of scattering thin slices.
        fitting = _PIECE_BYTES // (gradient.shape[0] * gradient.dtype.itemsize)
        width = 2 ** max(fitting.bit_length() - 1, 0)
        pieces = jnp.split(gradient, list(range(width, gradient.shape[1], width)), axis=1)
    for axis in axes.kernel_rows:
        if axis in exchanged:
            pieces = [jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True) for x in pieces]
        else:
            pieces = [jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True) for x in pieces]
    gradient = jnp.concatenate(pieces, axis=1)
    rest = tuple(axis for axis in axes.tokens if axis not in axes.kernel_rows)
    gradient = _over(jax.lax.psum, gradient, rest)
    if axes.vocab and not axes.columns_stored:
        if not set(axes.vocab) & set(axes.kernel_rows):
            gradient = jax.lax.all_gather(gradient, axes.vocab, axis=1, tiled=True)
        gradient = gradient[:, :vocab]
    return gradient


def sigmoid_contrastive_loss(
    img: jax.Array,
    txt: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    valid: jax.Array | None = None,
    labels: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SigLIP's loss (arXiv:2303.15343): every image-text pair of the batch is a binary classification.

    In a sharded step (`logical_axes.activation_rules`) texts travel around the devices that share the batch,
    as in the paper: a device has the logits of its own images and one device's texts in memory at a time. The
    gradient is exact and computed in the same pass as the value.

    Args:
      img: [B, E], unit length.
      txt: [B, E], unit length; row i belongs to image i.
      logit_scale: scalar, the logarithm of the inverse temperature.
      logit_bias: scalar.
      valid: bool [B], which rows form pairs; None for all.
      labels: int [B, T], such as the texts' tokens; image i matches text j if rows i and j are equal. None
        for i = j, as in the paper.

    Returns:
      float32 scalars: -log sigmoid summed over all pairs of valid rows; the number of valid rows; the number
      of their images whose highest score is with a text of their own label.
    """
    batch = img.shape[0]
    valid = jnp.ones(batch, bool) if valid is None else valid
    labels = jnp.arange(batch)[:, None] if labels is None else labels
    scalars = (jnp.asarray(x, jnp.float32) for x in (logit_scale, logit_bias))
    sums: Any = _sigmoid_pairs(img, txt, *scalars, valid, labels)
    return sums[0], valid.sum().astype(jnp.float32), sums[1]


@jax.custom_vjp
def _sigmoid_pairs(*arguments):
    return _ring_of_texts(*arguments, with_gradients=False)[0]


def _sigmoid_pairs_backward(gradients, cotangents):
    d_loss, _ = cotangents  # the number of correct images is piecewise constant
    return *((g * d_loss).astype(g.dtype) for g in gradients), None, None


def _ring_of_texts(*arguments, with_gradients):
    """Returns ((sum of losses, number of correct images), gradients of the first four arguments or None)."""
    step = logical_axes.current()
    if step is None:
        return _pair_with_texts(*arguments, axes=(), with_gradients=with_gradients)
    mesh, spec = step
    rows, one = spec("batch"), spec()
    return jax.shard_map(
        partial(_pair_with_texts, axes=logical_axes.as_tuple(rows[0]), with_gradients=with_gradients),
        mesh=mesh,
        in_specs=(rows, rows, one, one, rows, rows),
        out_specs=((one, one), (rows, rows, one, one) if with_gradients else None),
    )(*arguments)


_sigmoid_pairs.defvjp(partial(_ring_of_texts, with_gradients=True), _sigmoid_pairs_backward)


def _pair_with_texts(img, txt, log_scale, bias, valid, labels, *, axes, with_gradients):
    """Pairs one device's images with the texts of every device along `axes` in turn."""
    devices = jax.lax.axis_size(axes) if axes else 1
    here = jax.lax.axis_index(axes) if axes else 0
    count = img.shape[0]
    scale = jnp.exp(log_scale)

    def onwards(tree):
        neighbours = [(i, (i - 1) % devices) for i in range(devices)]
        return jax.lax.ppermute(tree, axes, neighbours) if axes else tree

    def body(turn, carry):
        texts, d_txt, sums, best = carry
        their_txt, their_valid, their_labels = texts
        products = jnp.einsum("ie,je->ij", img, their_txt, preferred_element_type=jnp.float32)
        logits = products * scale + bias
        same = (labels[:, None] == their_labels[None]).all(axis=-1)
        sign = jnp.where(same, 1.0, -1.0)
        pairs = valid[:, None] & their_valid[None]
        loss = -jnp.where(pairs, jax.nn.log_sigmoid(sign * logits), 0.0).sum()

        scores = jnp.where(their_valid[None], products, -jnp.inf)
        column = jnp.argmax(scores, axis=1)[:, None]
        score = jnp.take_along_axis(scores, column, axis=1)[:, 0]
        index = (here + turn) % devices * count + column[:, 0]
        found = score, index, jnp.take_along_axis(same, column, 1)[:, 0]
        # Of equal scores the first text of the global batch counts, whatever the order of devices.
        better = (score > best[0]) | ((score == best[0]) & (found[1] < best[1]))
        best = tuple(jnp.where(better, new, old) for new, old in zip(found, best, strict=True))

        if with_gradients:
            d_logits = jnp.where(pairs, -sign * jax.nn.sigmoid(-sign * logits), 0.0)
            d_products = d_logits * scale
            d_img = jnp.einsum("ij,je->ie", d_products, their_txt, preferred_element_type=jnp.float32)
            d_txt += jnp.einsum("ij,ie->je", d_products, img, preferred_element_type=jnp.float32)
            more = loss, d_img, (d_products * products).sum(), d_logits.sum()
        else:
            more = (loss,)
        sums = jax.tree.map(jnp.add, sums, more)
        return onwards(texts), onwards(d_txt), sums, best

    zero, rows = jnp.zeros((), jnp.float32), jnp.zeros(img.shape, jnp.float32)
    sums = (zero, rows, zero, zero) if with_gradients else (zero,)
    d_txt = rows if with_gradients else ()
    best = jnp.full(count, -jnp.inf), jnp.full(count, devices * count), jnp.zeros(count, bool)
    # The carry starts equal on all devices but will differ.
    varying = jax.tree.map(lambda x: equally_varying(x, valid)[0], (d_txt, sums, best))
    _, d_txt, sums, best = jax.lax.fori_loop(0, devices, body, ((txt, valid, labels), *varying))
    correct = (best[2] & valid).sum().astype(jnp.float32)
    total = partial(_over, jax.lax.psum, axes=axes)
    gradients = None
    if with_gradients:
        _, d_img, d_scale, d_bias = sums
        gradients = d_img.astype(img.dtype), d_txt.astype(txt.dtype), total(d_scale), total(d_bias)
    return (total(sums[0]), total(correct)), gradients
