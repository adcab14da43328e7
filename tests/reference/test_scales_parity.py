"""Several scales and tiles against PyTorch: transformers' SigLIP, torch's interpolation, explicit crops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.reference import torch_weights
from vilam3_jax.data.examples import Turn
from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.packing import GroupShape, Sample, assemble_group
from vilam3_jax.data.templates import encode_document
from vilam3_jax.models import build, model_config
from vilam3_jax.models import s2 as scales_lib

SIZE, PATCH, WIDTH, LAYERS, HEADS, MLP, OUT = 31, 6, 24, 3, 3, 40, 20  # 5 x 5 patches of a tile
GRID = SIZE // PATCH


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


class Reference(torch.nn.Module):
    """A SigLIP tower and mlp_downsample, in VILA's order of tokens."""

    def __init__(self, maps, columns):
        super().__init__()
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(
                image_size=SIZE,
                patch_size=PATCH,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=MLP,
                attn_implementation="eager",
            )
        )
        width = 4 * maps * WIDTH
        self.columns = columns
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, OUT),
            torch.nn.GELU(),
            torch.nn.Linear(OUT, OUT),
        )
        torch_weights.randomise(self, seed=3)

    def features(self, tiles):
        """[N, 3, S, S] -> [N, C, g, g], the state before the last block."""
        state = self.tower(tiles, output_hidden_states=True).hidden_states[-2]
        return state.transpose(1, 2).reshape(len(tiles), WIDTH, GRID, GRID)

    def project(self, maps):
        """[N, C, g, g] -> [N, side, side, OUT]: 2 x 2 neighbours to one token, zeros beyond the border."""
        side = -(-maps.shape[-1] // 2)
        short = 2 * side - maps.shape[-1]
        maps = torch.nn.functional.pad(maps, (0, short, 0, short))
        corners = [maps[:, :, r::2, c::2] for r in (0, 1) for c in (0, 1)]
        return self.mlp(torch.cat(corners, dim=1).permute(0, 2, 3, 1))

    def dynamic_s2(self, image, sides, grid):
        """NVILA's method for one PIL image: resizes all scales' maps to the last, projects tiles, merges."""
        grids = [(side, side) for side in sides[:-1]] + [grid]
        maps = []
        for rows, columns in grids:
            tiles = self.features(normalised(cut(image, rows, columns)))
            lines = [torch.cat(list(tiles[r * columns : (r + 1) * columns]), dim=2) for r in range(rows)]
            maps.append(torch.cat(lines, dim=1)[None])
        whole = torch.cat([interpolate(m, size=maps[-1].shape[2:], mode="area") for m in maps], dim=1)
        lines = []
        for r in range(grid[0]):
            cuts = [whole[:, :, r * GRID : (r + 1) * GRID, c * GRID : (c + 1) * GRID] for c in range(grid[1])]
            lines.append(torch.cat([self.project(part) for part in cuts], dim=2))
        return torch.cat(lines, dim=1).reshape(-1, OUT)

    def s2(self, pixels, scales):
        """VILA-1.5's method, tile by tile."""
        maps = []
        for scale in scales:
            image = interpolate(pixels, size=(scale, scale), mode="bicubic", align_corners=False)
            rows = []
            for top in range(0, scale, SIZE):
                tiles = [image[:, :, top : top + SIZE, left : left + SIZE] for left in range(0, scale, SIZE)]
                rows.append(torch.cat([self.features(tile) for tile in tiles], dim=3))
            maps.append(interpolate(torch.cat(rows, dim=2), size=(GRID, GRID), mode="area"))
        tokens = self.project(torch.cat(maps, dim=1))
        return (tokens.transpose(1, 2) if self.columns else tokens).flatten(1, 2)


def our_params(reference):
    state = torch_weights.numpy_state(reference)
    tower = {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
    return {
        "vision_tower": torch_weights.siglip_vision(tower, LAYERS),
        "projector": {
            "norm1": torch_weights.norm(state, "mlp.0"),
            "fc1": torch_weights.linear(state, "mlp.1"),
            "fc2": torch_weights.linear(state, "mlp.3"),
        },
    }


def our_model(order, **keys):
    """(config, structure): only the tower and the projector matter here."""
    cfg = model_config.resolve(
        dict(
            dtype="float32",
            param_dtype="float32",
            remat="none",
            image_size=SIZE,
            **keys,
            vision_tower=dict(
                type="siglip", image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, num_layers=LAYERS,
                num_heads=HEADS, mlp_dim=MLP, norm_eps=1e-6, select_layer=-2, head=True,
            ),
            projector=dict(type="mlp_downsample", token_order=order),
            llm=dict(
                type="llama", vocab_size=8, hidden_size=OUT, num_layers=1, num_heads=2, num_kv_heads=2,
                head_dim=4, mlp_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, lora_rank=0,
                lora_alpha=1.0, lora_targets=(),
            ),
        )
    )  # fmt: skip
    graphdef, abstract = build.abstract_model(cfg, "generative")
    llm = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract["llm"])
    return cfg, lambda params: build.merge(graphdef, {**params, "llm": llm})


def random_images(count, side, seed=0):
    """Uint8 for us, normalised [N, 3, S, S] for torch."""
    ours = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    theirs = (ours.astype(np.float32) / 255 - 0.5) / 0.5
    return jnp.asarray(ours), torch.from_numpy(theirs.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("scales, order", [((31, 62), "column"), ((31, 62, 93), "row")])
def test_s2_features_and_gradients(scales, order):
    reference = Reference(len(scales), order == "column")
    ours, theirs = random_images(2, scales[-1])
    want = reference.s2(theirs, scales)
    cfg, model = our_model(order, s2_scales=scales)
    assert cfg.projector_width == len(scales) * WIDTH and cfg.tokens_per_image == want.shape[1]
    aim = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)

    @jax.jit
    def step(params):
        out, pullback = jax.vjp(lambda p: model(p).encode_images(ours), params)
        return out, pullback(jnp.asarray(aim))[0]

    got, gradient = step(our_params(reference))
    assert float(want.detach().std()) > 0.2
    np.testing.assert_allclose(got, want.detach(), atol=1e-4, rtol=0)
    want.backward(torch.from_numpy(aim))
    patch = next(p for n, p in reference.named_parameters() if n.endswith("patch_embedding.weight"))
    for mine, their in (
        (gradient["vision_tower"]["patch_embed"]["kernel"].transpose(3, 2, 0, 1), patch.grad),
        (gradient["projector"]["fc1"]["kernel"].T, reference.mlp[1].weight.grad),
    ):
        assert their.abs().max() > 0.1
        np.testing.assert_allclose(mine, their, atol=1e-4 * float(their.abs().max()), rtol=0)


def normalised(tiles):
    """PIL images -> [N, 3, S, S]."""
    values = (np.stack([np.asarray(tile, np.float32) for tile in tiles]) / 255 - 0.5) / 0.5
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


def cut(image, rows, columns):
    """PIL tiles row by row."""
    scaled = image.resize((columns * SIZE, rows * SIZE))
    boxes = [
        (c * SIZE, r * SIZE, (c + 1) * SIZE, (r + 1) * SIZE) for r in range(rows) for c in range(columns)
    ]
    return [scaled.crop(box) for box in boxes]


def visual_tokens(cfg, params, model, dialogue, images):
    """Embeddings at the image positions of a packed dialogue, in order: [tokens, OUT]."""
    processor = image_processor(cfg)
    grids = [processor.grid(image) for image in images]
    count = cfg.tokens_per_image
    encoded = encode_document(Letters(), processor.expand(dialogue, grids), count)
    encoded = processor.merge(encoded, grids, count)
    inputs = tuple(tile for image in images for tile in processor.inputs(image))
    # With text before it and empty slots after it: results must not depend on the place in the group.
    shape = GroupShape(
        1, len(encoded) + 8, len(inputs) + 4, count, processor.size, tiled=bool(processor.sides)
    )
    tiles = processor.tile_map(grids)
    text = encode_document(Letters(), [Turn("assistant", "abc", supervised=True)], count)
    packed = [Sample("text", 0, text), Sample("one", 1, encoded, lambda: inputs, tiles)]
    group = assemble_group(shape, [packed])
    names = ("tokens", "images", "image_valid", "visual_index", "image_tiles")
    embedded = jax.jit(lambda p, *batch: model(p).embed(*batch))(
        params, *(getattr(group, name) for name in names)
    )
    return np.asarray(embedded)[group.visual_index >= 0], encoded


class Letters:
    """A character tokenizer."""

    bos_id, eos_id, pad_id, vocab_size = None, 1, 0, 8

    def encode(self, text):
        return [2 + "\n".count(letter) for letter in text]

    encode_opening = encode_continued = encode


def test_dynamic_tiling():
    reference = Reference(1, columns=False)
    cfg, model = our_model("row", image_aspect_ratio="dynamic", max_tiles=6)
    wide, small = (np.asarray(random_images(1, 90, seed)[0][0, :60]) for seed in (1, 2))
    small = small[:20, :20]
    pil = Image.fromarray(wide)
    tiles = [*cut(pil, 2, 3), pil.resize((SIZE, SIZE)), Image.fromarray(small).resize((SIZE, SIZE))]
    with torch.no_grad():
        want = reference.project(reference.features(normalised(tiles))).reshape(-1, OUT)
    turns = [Turn("assistant", "ab<image>\nc<image>d", supervised=True)]
    got, encoded = visual_tokens(cfg, our_params(reference), model, turns, [wide, small])
    assert got.shape == want.shape == (8 * 9, OUT) and float(want.std()) > 0.2
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    text = encoded.tokens[encoded.image_of_token < 0].tolist()
    assert text == [2, 2, *[3] * 7, 2, 2, 1]  # a line end after each tile of the first, none after the second


@pytest.mark.parametrize("sides", [(1, 2, 3), (1, 3)])
def test_dynamic_s2(sides):
    reference = Reference(len(sides), columns=False)
    scales = tuple(SIZE * side for side in sides)
    cfg, model = our_model("row", image_aspect_ratio="dynamic_s2", max_tiles=12, s2_scales=scales)
    shapes, grids = ((60, 80), (75, 70), (9, 80)), ((3, 4), (3, 3), (1, 9))
    images = [np.asarray(random_images(1, 90, n)[0][0, :h, :w]) for n, (h, w) in enumerate(shapes)]
    assert [image_processor(cfg).grid(image) for image in images] == list(grids)
    with torch.no_grad():
        want = torch.cat(
            [reference.dynamic_s2(Image.fromarray(i), sides, g) for i, g in zip(images, grids, strict=True)]
        )
    turns = [Turn("assistant", "a<image>\nb<image><image>", supervised=True)]
    got, encoded = visual_tokens(cfg, our_params(reference), model, turns, images)
    assert got.shape == want.shape == (30 * 9, OUT) and float(want.std()) > 0.2
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert encoded.tokens[encoded.image_of_token < 0].tolist() == [2, 3, 2, 1]


def test_dynamic_s2_of_one_tile_is_the_plain_map_repeated():
    """An image of one tile equals an untiled image bit for bit."""
    reference = Reference(3, columns=False)
    params = our_params(reference)
    keys = dict(image_aspect_ratio="dynamic_s2", max_tiles=1, s2_scales=(SIZE, 2 * SIZE, 3 * SIZE))
    cfg, model = our_model("row", **keys)
    images = [np.asarray(random_images(1, 90, n)[0][0, :60]) for n in range(2)]
    turns = [Turn("assistant", "a<image>\nb<image>", supervised=True)]
    got, _ = visual_tokens(cfg, params, model, turns, images)

    @jax.jit
    def plain(params, inputs):
        built = model(params)
        features = built.vision_tower.features(inputs)
        return built.projector(jnp.concatenate([features] * 3, axis=-1))

    # The batch size of `visual_tokens`: another size may round differently.
    slots = np.zeros((6, SIZE, SIZE, 3), np.uint8)
    slots[:2] = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE))) for image in images]
    np.testing.assert_array_equal(got, np.asarray(plain(params, slots))[:2].reshape(-1, OUT))


@pytest.mark.parametrize("old, new", [(62, 31), (93, 31), (93, 62), (7, 20), (20, 7)])
def test_bicubic(old, new):
    x = np.random.default_rng(0).normal(size=(2, old, old, 3)).astype(np.float32)
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2)
    want = interpolate(theirs, size=(new, new), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    np.testing.assert_allclose(scales_lib.resize_bicubic(jnp.asarray(x), new), want, atol=1e-5)


@pytest.mark.parametrize("old, new", [((54, 54), (27, 27)), ((10, 10), (27, 27)), ((32, 64), (96, 128))])
def test_area(old, new):
    x = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    want = interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size=new, mode="area").permute(0, 2, 3, 1)
    np.testing.assert_allclose(scales_lib.resize_area(jnp.asarray(x), new), want, atol=1e-5)
