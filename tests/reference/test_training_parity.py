"""Twenty steps of a tiny VILA: Hugging Face's Trainer on transformers' parts, and our train step."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from torch.nn import GELU, LayerNorm, Linear, Sequential

from tests.reference import torch_weights
from tests.reference.test_projector_parity import Join
from tests.training.helpers import Run
from vilam3_jax import config as config_lib
from vilam3_jax.data import packing
from vilam3_jax.data.batches import join
from vilam3_jax.data.templates import Encoded
from vilam3_jax.models import param_paths
from vilam3_jax.runtime import compat
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.training.optimizer import ScheduleConfig, learning_rate

SIZE, PATCH, VOCAB = 21, 4, 60  # 5 x 5 patches, padded to 6 x 6; a border of 1 pixel is dropped
TOKENS = 9  # of an image
STEPS, BATCHES = 20, 2  # repeated batches, so that the loss falls far
PEAK, WARMUP = 1e-2, 0.12  # 2.4 steps of warm-up: the Trainer rounds up
TOWER = dict(hidden_size=24, num_layers=3, num_heads=3, mlp_dim=40)
LLM = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
THEIR_NAMES = dict(
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    mlp_dim="intermediate_size",
)


def theirs(sizes):
    return {THEIR_NAMES.get(key, key): value for key, value in sizes.items()}


class Vila(torch.nn.Module):
    """SigLIP's hidden state -2 -> mlp_downsample, column-major -> Llama."""

    def __init__(self):
        super().__init__()
        eager = dict(attn_implementation="eager")
        vision = transformers.SiglipVisionConfig(image_size=SIZE, patch_size=PATCH, **theirs(TOWER), **eager)
        llm = transformers.LlamaConfig(vocab_size=VOCAB, rms_norm_eps=1e-5, **theirs(LLM), **eager)
        self.vision_tower = transformers.SiglipVisionModel(vision)
        c, h = TOWER["hidden_size"], LLM["hidden_size"]
        self.mm_projector = Sequential(
            Join(2, columns=True), LayerNorm(4 * c), Linear(4 * c, h), GELU(), Linear(h, h)
        )
        self.llm = transformers.LlamaForCausalLM(llm)

    def forward(self, input_ids, attention_mask, labels, pixel_values, is_image):
        embeds = self.llm.get_input_embeddings()(input_ids)
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        visual = self.mm_projector(states[-2]).flatten(0, 1)
        embeds = embeds.masked_scatter(is_image[..., None], visual)
        return {"loss": self.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels).loss}

    def parameters_for_us(self):
        vision = torch_weights.numpy_state(self.vision_tower)
        return {
            "vision_tower": torch_weights.siglip_vision(vision, TOWER["num_layers"]),
            "projector": torch_weights.projector(self.mm_projector),
            "llm": torch_weights.llama(self.llm),
        }


def sample(rng, index):
    """Text with zero to two images at the start or inside; some tokens are targets."""
    images = index % 3
    text = [int(rng.integers(2, 9)) for _ in range(images + 1)]
    places: list[int] = []
    for number in range(images):
        places += [-1] * text[number] + [number] * TOKENS
    places += [-1] * (text[-1] + 3)
    where = np.asarray(places, np.int32)
    length = len(where)
    loss_mask = (rng.random(length) < 0.6) & (where < 0) & (np.arange(length) > 0)
    loss_mask[-2:] = True
    encoded = Encoded(
        tokens=rng.integers(0, VOCAB, length).astype(np.int32),
        loss_mask=loss_mask.astype(np.float32),
        image_of_token=where,
        visual_offset=np.concatenate(
            [np.arange(TOKENS) if n >= 0 else np.zeros(1) for n in _runs(where)]
        ).astype(np.int32),
        num_images=images,
    )
    pixels = tuple(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(images))
    return packing.Sample(f"sample {index}", index, encoded, lambda: pixels)


def _runs(where):
    """One entry per text token and per image."""
    return [n for i, n in enumerate(where) if n < 0 or i == 0 or where[i - 1] != n]


@cache
def samples(batch):
    rng = np.random.default_rng(batch)
    return tuple(sample(rng, index) for index in range(8))


def batch_for_them(batch):
    """One sample per row, padded on the right."""
    rows = samples(batch)
    length = max(len(row.encoded) for row in rows)

    def padded(values, fill=0):
        return torch.from_numpy(
            np.stack([np.pad(x, (0, length - len(x)), constant_values=fill) for x in values])
        )

    labels = [np.where(row.encoded.loss_mask > 0, row.encoded.tokens, -100) for row in rows]
    pixels = np.stack([image for row in rows for image in row.read_images()]).transpose(0, 3, 1, 2)
    return {
        "input_ids": padded([row.encoded.tokens for row in rows]).long(),
        "attention_mask": padded([np.ones(len(row.encoded), np.int64) for row in rows]),
        "labels": padded(labels, -100).long(),
        "pixel_values": torch.from_numpy((pixels / 255 - 0.5).astype(np.float32) / 0.5),
        "is_image": padded([row.encoded.image_of_token >= 0 for row in rows]),
    }


def batch_for_us(batch):
    """Packed rows: several samples per row, groups of two rows with spare image slots."""
    shape = packing.GroupShape(
        rows=2, seq_len=56, images=6, tokens_per_image=TOKENS, image_size=SIZE, pad_id=1
    )
    stream = iter(samples(batch))
    groups, waiting = [], []
    for _ in range(2):
        rows, waiting = packing.next_group(shape, waiting, lambda: next(stream, None))
        groups.append(packing.assemble_group(shape, rows))
    assert not waiting and next(stream, None) is None
    out = join(groups)
    assert out.segment_ids.max() > 1 and not out.image_valid.all()
    out.images[~out.image_valid] = 77
    return out


class Log(transformers.TrainerCallback):
    """Records what the Trainer logs at each step."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append({key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate")})


class Ordered(transformers.Trainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)


def train_theirs(model, folder, weight_decay):
    """Hugging Face's Trainer with its defaults for AdamW (0.9, 0.999, 1e-8) and clipping (1.0)."""
    log = Log()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=PEAK,
        warmup_steps=WARMUP,
        lr_scheduler_type="cosine",
        weight_decay=weight_decay,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = [batch_for_them(step % BATCHES) for step in range(STEPS)]
    Ordered(model, arguments, train_dataset=data, callbacks=[log]).train()
    return log.rows


def our_run(params, weight_decay):
    config = config_lib.base_config()
    config.model = ConfigDict(
        dict(
            dtype="float32",
            param_dtype="float32",
            remat="qkv",
            vision_tower=dict(
                type="siglip",
                image_size=SIZE,
                patch_size=PATCH,
                norm_eps=1e-6,
                select_layer=-2,
                head=True,
                **TOWER,
            ),
            projector=dict(type="mlp_downsample", token_order="column"),
            llm=dict(
                type="llama",
                vocab_size=VOCAB,
                rope_theta=10_000.0,
                norm_eps=1e-5,
                tie_embeddings=False,
                **LLM,
            ),
        )
    )
    config.num_steps = STEPS
    config.optimizer.update(dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, clip_norm=1.0))
    config.schedule.update(dict(peak=PEAK, warmup_fraction=WARMUP, end_fraction=0.0))
    config.data.rows_per_group = 2
    config.loss_chunk = 16
    run = Run(config, compat.make_mesh([1] * len(MESH_AXES), MESH_AXES, jax.devices()[:1]))
    assert run.config.model.tokens_per_image == TOKENS
    flat = param_paths.flatten(params)
    assert jax.tree.map(jnp.shape, flat) == jax.tree.map(jnp.shape, run.state.trainable)
    placed = jax.device_put(flat, jax.tree.map(lambda x: x.sharding, run.state.trainable))
    run.state = dataclasses.replace(run.state, trainable=placed)
    return run


def reached(path, leaf):
    """The part of a parameter that affects the loss; None if it has no effect.

    The last block, post_norm and head follow the selected features. A key bias shifts all scores of a query
    equally: its gradient is only rounding error, which Adam scales up to full steps.
    """
    if path.startswith(("vision_tower/head", "vision_tower/post_norm")) or path.endswith("attn/k/bias"):
        return None
    return leaf[:-1] if path.startswith("vision_tower/blocks") else leaf


@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_twenty_steps_equal_those_of_the_trainer(tmp_path, weight_decay):
    model = torch_weights.randomise(Vila())
    run = our_run(model.parameters_for_us(), weight_decay)
    start = {path: np.asarray(leaf) for path, leaf in run.state.trainable.items()}
    want = train_theirs(model, tmp_path, weight_decay)
    with jax.default_matmul_precision("highest"):
        got = [run.step(batch_for_us(step % BATCHES)) for step in range(STEPS)]
    assert len(want) == STEPS and want[-1]["loss"] < 0.5 * want[0]["loss"]
    norms = [row["grad_norm"] for row in want]
    assert min(norms) < 1 < max(norms)  # some steps are clipped, some are not
    for key, tolerance in (("learning_rate", 1e-8), ("loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = ([row[key] for row in rows] for rows in (got, want))
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0, err_msg=key)
    end = param_paths.flatten(model.parameters_for_us())
    for path, before in start.items():
        before, ours, theirs = (
            reached(path, np.asarray(x)) for x in (before, run.state.trainable[path], end[path])
        )
        if before is not None:
            moved = np.linalg.norm(theirs - before)
            assert moved > 0.01 and np.linalg.norm(ours - theirs) < 1e-3 * moved, path


@pytest.mark.parametrize("name, end", [("cosine", 0.0), ("cosine", 0.1), ("constant", 0.0)])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.2])
def test_schedules(name, end, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    steps = transformers.TrainingArguments(warmup_steps=warmup, use_cpu=True).get_warmup_steps(25)
    if name == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, steps)
    else:
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, steps, 25, min_lr_rate=end
        )
    ours = learning_rate(ScheduleConfig(name, 0.5, warmup, end), 25)
    for step in range(25):
        assert float(ours(step)) == pytest.approx(schedule.get_last_lr()[0], abs=1e-7)
        optimizer.step()
        schedule.step()
