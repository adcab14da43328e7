"""Samples per second of the loader on one core, compared with PyTorch's DataLoader on the same data.

Run: taskset -c 0 python benchmarks/loader.py [--images DIR] [--tokenizer DIR] [--samples 400] [--rounds 3]

Both sides read the same dialogues, tokenise them for training (loss masks) with the same fast tokenizer and
yield 8 images of 384 pixels per batch. Ours packs, and reads two datasets: one with the original files, and
one with decoded images (its cost and size are printed too). Theirs is `torch.utils.data.DataLoader` in this
process with `SiglipImageProcessor`; it reads the files from memory, stacks the images and pads the tokens.
The loaders alternate. Every record is a distinct file, so caches do not help. Times are CPU times of the
process, all threads, since other programs may share the core.

Other measurements, one per run:
  --memory N     resident memory over N samples of the prepared data
  --first N      seconds until the first batch of a dataset of N records in 100 shards
  --stalls       waiting time of a consumer that takes 100 ms per batch
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilam3_jax import config as config_lib
from vilam3_jax.data import decoded_images
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.examples import IMAGE_MARKER, Example, ImageRef, Turn
from vilam3_jax.data.images import decode_scaled
from vilam3_jax.data.loader import Loader, build_loader
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from vilam3_jax.tasks import TASKS

STEP_SECONDS = 0.1
IMAGES_A_BATCH = 8
SIZE = 384
SHARDS_OF_MANY = 100
QUESTIONS = (
    "What does this image show?",
    "Is there a focal consolidation in the right lower lobe, and how large is the effusion?",
    "Describe the findings of this study for the referring physician.",
    "Which organ is at the centre of this slice, and is its contour regular?",
)
ANSWERS = (
    "The lungs are clear. There is no pleural effusion or pneumothorax. The heart is of normal size.",
    "Yes. There is an opacity in the right lower lobe of about 4 cm, with a small effusion beside it, that "
    "was not there on the earlier film.",
    "The image shows an axial slice through the brain. A mass with a bright rim lies in the left temporal "
    "lobe; the midline is shifted by about 5 mm, and the ventricle on that side is narrowed.",
    "No.",
)


def originals(folder: Path | None, side: int) -> list[bytes]:
    """JPEG files of a folder, or generated images with structure and noise, half of them grey."""
    if folder is not None:
        names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        return [name.read_bytes() for name in names]
    rng = np.random.default_rng(0)
    files = []
    for number in range(32):
        coarse = rng.integers(0, 256, (12, 12, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, (side, side, 1)), 0, 255).astype(np.uint8)
        image = Image.fromarray(noisy)
        buffer = io.BytesIO()
        (image.convert("L") if number % 2 else image).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def distinct(jpeg: bytes, number: int) -> bytes:
    """The same image with a comment, so that no two files are equal."""
    text = str(number).encode()
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def dialogue(number: int) -> tuple[Turn, ...]:
    """One to three rounds; the image is in the first question."""
    turns: list[Turn] = []
    for place in range(1 + number % 3):
        question = QUESTIONS[(number + place) % len(QUESTIONS)]
        turns.append(Turn("user", question if place else f"{IMAGE_MARKER}\n{question}"))
        turns.append(Turn("assistant", ANSWERS[(number // 3 + place) % len(ANSWERS)], True))
    return tuple(turns)


def tokenizer_of(folder: Path | None, out: Path) -> Tokenizer:
    """The tokenizer of a folder, or one trained on the dialogues."""
    return load_tokenizer(folder) if folder else train_bpe([*QUESTIONS, *ANSWERS] * 3, 2000, out)


def write(folder: Path, images: Sequence[bytes]) -> int:
    """Writes a dataset with one dialogue per image; returns its size in bytes."""
    with ExampleWriter(folder, "train") as writer:
        for number, data in enumerate(images):
            writer.write(Example(f"{number}", "conversation", (ImageRef(data=data),), dialogue(number)))
    return sum(file.stat().st_size for file in folder.iterdir())


def our_loader(folder: Path, tokenizer: Tokenizer, size: int = SIZE) -> Loader:
    """The loader of stage 3 with batches of one group."""
    config = config_lib.load("configs/stage3_instruct.py:vila_m3_8b")
    config = config.replace(
        {
            "model.template": "chatml",
            "model.image_size": size,
            "model.vision_tower.image_size": size,
            "model.llm.vocab_size": max(config.model.llm.vocab_size, tokenizer.vocab_size),
            "data.path": str(folder),
            "data.mixture": (),
            "data.seq_len": 4096,
            "data.loader_shards": 1,
            "data.global_rows": 1,
            "data.rows_per_group": 1,
            "data.images_per_group": IMAGES_A_BATCH,
        }
    )
    batch_format = TASKS[config.task].batch_format
    return build_loader(
        config.data, config.model, batch_format, "train", seed=config.seed, tokenizer=tokenizer
    )


def ours(folder: Path, tokenizer: Tokenizer) -> Iterator[int]:
    """Samples of each batch of our loader, of one pass."""
    loader = our_loader(folder, tokenizer)
    try:
        for batch in loader:
            assert isinstance(batch, PackedBatch)
            yield int(batch.segment_ids.max(axis=1).sum())
    finally:
        loader.close()


def theirs(files: Sequence[bytes], tokenizer_folder: Path, tokens_per_image: int) -> Iterator[int]:
    """Samples of each batch of PyTorch's loader."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # built for another PyTorch: declare the operators that it misses
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import PreTrainedTokenizerFast, SiglipImageProcessor

    torch.set_num_threads(1)
    processor = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    encode = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))

    class Dialogues(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = Image.open(io.BytesIO(files[index])).convert("RGB")
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            ids: list[int] = []
            labels: list[int] = []
            for turn in dialogue(index):
                before, found, text = turn.text.rpartition(IMAGE_MARKER)
                asked = f"<|im_start|>{turn.role}\n{before}"
                pieces = [(asked, False)] if found else []
                if turn.role == "assistant":
                    pieces += [(asked, False), (f"{text}<|im_end|>", True)]
                else:
                    pieces += [(f"{'' if found else asked}{text}<|im_end|>\n", False)]
                for place, (piece, target) in enumerate(pieces):
                    if found and place == 1:
                        ids += [0] * tokens_per_image
                        labels += [-100] * tokens_per_image
                    new = encode(piece, add_special_tokens=False)["input_ids"]
                    ids += new
                    labels += new if target else [-100] * len(new)
            return {"pixels": pixels, "ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([item["ids"] for item in items], batch_first=True)
        return {
            "pixel_values": torch.stack([item["pixels"] for item in items]),
            "input_ids": ids,
            "attention_mask": ids != 0,
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=-100),
        }

    for batch in torch.utils.data.DataLoader(Dialogues(), IMAGES_A_BATCH, collate_fn=collate):
        yield batch["pixel_values"].shape[0]


def speed(batches: Iterator[int], samples: int) -> tuple[float, float]:
    """(samples per second of CPU, of wall time) over `samples`, after the first batches."""
    for _, _ in zip(range(3), batches, strict=False):
        pass  # threads, caches and imports
    done, cpu, wall = 0, time.process_time(), time.perf_counter()
    for count in batches:
        done += count
        if done >= samples:
            break
    rates = done / (time.process_time() - cpu), done / (time.perf_counter() - wall)
    batches.close()  # type: ignore[attr-defined]
    return rates


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Prints a line for each loader and the ratios of the medians."""
    kinds = originals(args.images, args.side)
    count = args.samples + 12 * IMAGES_A_BATCH  # our loader reads ahead
    files = [distinct(kinds[n % len(kinds)], n) for n in range(count)]
    tokenizer = tokenizer_of(args.tokenizer, folder / "tokenizer")
    bytes_of = {"original": write(folder / "original", files)}
    began = time.process_time()
    pixels = [decoded_images.encode(decode_scaled(file, SIZE)) for file in files]
    cost = (time.process_time() - began) / count
    bytes_of["prepared"] = write(folder / "prepared", pixels)
    sizes = ", ".join(f"{name} {size / count / 1e3:.0f} kB" for name, size in bytes_of.items())
    print(f"a record: {sizes}; to decode, scale and store an image: {cost * 1e3:.1f} ms of CPU")
    peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    per_image = config_lib.load("configs/stage3_instruct.py:vila_m3_8b").model.tokens_per_image
    tokenizer_folder = args.tokenizer or folder / "tokenizer"
    loaders = {
        "ours, prepared": lambda: ours(folder / "prepared", tokenizer),
        "ours, original": lambda: ours(folder / "original", tokenizer),
    }
    if peers:
        loaders["torch DataLoader"] = lambda: theirs(files, tokenizer_folder, per_image)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(args.rounds):
        for name, start in loaders.items():
            rates[name].append(speed(start(), args.samples))
    middle = {name: np.median(np.array(found), axis=0) for name, found in rates.items()}
    for name, (cpu, wall) in middle.items():
        ratio = f"  x{cpu / middle['torch DataLoader'][0]:.2f}" if peers else ""
        print(
            f"  {name:18} {cpu:7.0f} samples per second of CPU, {wall:7.0f} of wall time{ratio}", flush=True
        )


def rss_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def memory(args: argparse.Namespace, folder: Path) -> None:
    """Prints the resident memory along the way."""
    kinds = originals(args.images, args.side)
    tokenizer = tokenizer_of(args.tokenizer, folder / "tokenizer")
    pixels = [decoded_images.encode(decode_scaled(file, SIZE)) for file in kinds]
    write(folder / "prepared", [pixels[n % len(pixels)] for n in range(2000)])
    loader, marks = our_loader(folder / "prepared", tokenizer), [args.memory * n // 10 for n in range(11)]
    began = time.perf_counter()
    for _ in loader:
        if loader.stats.samples >= marks[0]:
            print(f"  {loader.stats.samples:7} samples: {rss_mib():6.0f} MiB", flush=True)
            marks = [mark for mark in marks if mark > loader.stats.samples]
            if not marks:
                break
    print(f"  {loader.stats.samples / (time.perf_counter() - began):.0f} samples per second")
    loader.close()


def first(args: argparse.Namespace, folder: Path) -> None:
    """Prints the seconds until the first batch; the shards are links to one file."""
    tokenizer = tokenizer_of(args.tokenizer, folder / "tokenizer")
    each = args.first // SHARDS_OF_MANY
    image = decoded_images.encode(np.zeros((SIZE, SIZE, 3), np.uint8))
    data = folder / "many"
    with ExampleWriter(data, "train") as writer:
        for number in range(each):
            writer.write(Example(f"{number}", "conversation", (ImageRef(data=image),), dialogue(number)))
    metadata, tfds_info = (json.loads((data / n).read_text()) for n in ("metadata.json", "dataset_info.json"))
    split = metadata["splits"]["train"]
    (shard,) = split["shards"]
    names = [
        shard["file"].replace("00000-of-00001", f"{n:05d}-of-{SHARDS_OF_MANY:05d}")
        for n in range(SHARDS_OF_MANY)
    ]
    for name in names:
        os.link(data / shard["file"], data / name)
    split["shards"] = [{**shard, "file": name} for name in names]
    split["records"] = each * SHARDS_OF_MANY
    tfds_info["splits"][0]["shardLengths"] = [str(each)] * SHARDS_OF_MANY
    for name, values in (("metadata.json", metadata), ("dataset_info.json", tfds_info)):
        (data / name).write_text(json.dumps(values))
    began, cpu, before = time.perf_counter(), time.process_time(), rss_mib()
    loader = our_loader(data, tokenizer)
    next(iter(loader))
    records = len(loader.samples.sources[0])
    print(
        f"  first batch of {records} records: {time.perf_counter() - began:.2f} s, "
        f"{time.process_time() - cpu:.2f} s of CPU, {rss_mib() - before:.0f} MiB"
    )
    loader.close()


def stalls(args: argparse.Namespace, folder: Path) -> None:
    """Prints how long a consumer waits if it sleeps `STEP_SECONDS` after every batch."""
    kinds = originals(args.images, args.side)
    files = [distinct(kinds[n % len(kinds)], n) for n in range(args.samples)]
    tokenizer = tokenizer_of(args.tokenizer, folder / "tokenizer")
    write(folder / "original", files)
    write(folder / "prepared", [decoded_images.encode(decode_scaled(file, SIZE)) for file in files])
    for name in ("original", "prepared"):
        batches, waits = ours(folder / name, tokenizer), []
        next(batches)
        for _ in range(args.samples // IMAGES_A_BATCH):
            time.sleep(STEP_SECONDS)
            asked = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - asked)
        share = sum(waits) / (sum(waits) + len(waits) * STEP_SECONDS)
        late = np.mean(np.array(waits) > 0.01 * STEP_SECONDS)
        print(
            f"  {name}: waited for {share:.2%} of the time, {late:.0%} of steps over 1 ms, "
            f"median {np.median(waits) * 1e3:.2f} ms"
        )
        batches.close()  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder with JPEG files (default: generated ones)")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: one trained on the dialogues)")
    parser.add_argument("--side", type=int, default=1024, help="side of generated JPEGs (default: 1024)")
    parser.add_argument("--samples", type=int, default=400, help="of a round (default: 400)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="N")
    parser.add_argument("--first", type=int, metavar="N")
    parser.add_argument("--stalls", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        chosen = memory if args.memory else first if args.first else stalls if args.stalls else compare
        chosen(args, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
