"""Images per second of each input pipeline: python -m benchmarks.pipeline

Small images: 50,000 images of 32x32 noise with a border of 4, in batches of 128.
`tf.data` makes numpy batches on an otherwise idle host; `device` draws a plan, sends it
and runs it in JAX, one dispatch per batch. Photographs: generated JPEGs of 500x375, or
the files in --photographs=DIR, in random_resized crops of 224 and batches of 64, by
`threads`.

The peer is PyTorch's DataLoader with one process per core and torchvision's transforms
(torch_loader.py); it is skipped if PyTorch is not installed. Rounds are interleaved in
one run of a few minutes, and the median of the repeats counts. ratio: ours relative to
the peer's. grown_mb: the memory that this process gained after the first repeat, in
more than an epoch.

waits-*.csv: the share of a training run in which the loop waits for the next batch of
tf.data, while the previous step may still be computing.
"""

import argparse
import functools
import importlib.metadata
import itertools
import os
import pathlib
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

import benchmarks
import input_pipeline
import train
from configs import common
from runtime import devices, dispatch, processes

REPEATS, SECONDS, MADE_UP = 5, 4.0, 300
TRAINED, STEPS = ("cfmz:20", "xdensenet:40-24-2"), 40
BATCH_SIZE, WARM_UP = {"small": 128, "photographs": 64}, {"small": 50, "photographs": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photographs", type=pathlib.Path, help="folder of JPEGs")
    folder = parser.parse_args().photographs
    processes.set_environment()  # as main.py
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or make_photographs(pathlib.Path(temporary, "made_up"))
        paths = small_paths() | photograph_paths(folder, pathlib.Path(temporary, "set"))
        rows = measure(paths)
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"pipeline-{name}-jax{jax.__version__}", rows)
    rows = [waits(variant) for variant in TRAINED]
    benchmarks.write(f"waits-{name}-jax{jax.__version__}", rows)


def measure(paths: dict) -> list[dict]:
    """Measures each pipeline; paths: (kind, path) -> endless iterator over batches."""
    speeds, grown = {key: [] for key in paths}, {key: [] for key in paths}
    for _ in range(REPEATS):
        for key, batches in paths.items():
            before, kind = resident_mb(), key[0]
            speeds[key].append(speed(batches, WARM_UP[kind]) * BATCH_SIZE[kind])
            grown[key].append(resident_mb() - before)
    rows = []
    for (kind, path), found in speeds.items():
        median, peer = statistics.median(found), speeds.get((kind, "torch"))
        rows.append(
            {
                "images": kind,
                "path": path,
                "device": jax.devices()[0].device_kind if path == "device" else "host",
                "batch_size": BATCH_SIZE[kind],
                "images_per_second": round(median),
                "slowest": round(min(found)),
                "fastest": round(max(found)),
                "ratio": round(median / statistics.median(peer), 2) if peer else "",
                "grown_mb": round(sum(grown[kind, path][1:])),
                "repeats": REPEATS,
                "cores": os.cpu_count(),
                "jax": jax.__version__,
                "tensorflow": version("tensorflow-cpu", "tensorflow"),
                "torch": version("torch"),
            }
        )
        print(
            "{images:12} {path:8} {images_per_second:>9,} images/s, ratio {ratio}, "
            "grown by {grown_mb} MB".format(**rows[-1])
        )
    return rows


def small_paths() -> dict:
    """Returns the pipelines for small images, in the form that `measure` takes."""
    config = common.base()
    config.train.batch_size = BATCH_SIZE["small"]
    config.data.pipeline = "tf.data"  # 'auto' is the device
    examples = small_examples()
    tf_data = input_pipeline.batches(config, "train", examples=examples)
    device = device_batches(config, examples)
    paths = {("small", "tf.data"): tf_data, ("small", "device"): device}
    if version("torch"):
        from benchmarks import torch_loader

        dataset = torch_loader.Small(examples.images)
        paths["small", "torch"] = torch_loader.batches(dataset, BATCH_SIZE["small"])
    return paths


def small_examples() -> input_pipeline.InMemory:
    """Returns 50,000 images (32, 32, 3) of noise."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = np.zeros(len(images), np.int32)
    return input_pipeline.InMemory(images, labels, tuple(map(str, range(10))))


def photograph_paths(folder: pathlib.Path, directory: pathlib.Path) -> dict:
    """Links the files of `folder` into a data set in `directory` and loads it."""
    suffixes = (".jpg", ".jpeg")
    files = sorted(x for x in folder.rglob("*") if x.suffix.lower() in suffixes)
    for split in ("train", "test"):
        for i, file in enumerate(files):
            label = directory / split / f"class{i % 2}"
            label.mkdir(parents=True, exist_ok=True)
            (label / f"{i}.jpg").symlink_to(file.absolute())
    config = common.base()
    config.data.update(name=directory.name, dir=str(directory.parent))
    config.data.update(crop="random_resized", image_size=224)
    config.train.batch_size = BATCH_SIZE["photographs"]
    paths = {("photographs", "threads"): input_pipeline.batches(config, "train")}
    if version("torch"):
        from benchmarks import torch_loader

        dataset = torch_loader.Jpegs([str(x) for x in files], 224)
        batch_size = BATCH_SIZE["photographs"]
        paths["photographs", "torch"] = torch_loader.batches(dataset, batch_size)
    return paths


def make_photographs(folder: pathlib.Path) -> pathlib.Path:
    """Writes JPEGs of noisy clouds, 500x375 and about 100 kB, and returns `folder`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(MADE_UP):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC)).astype(np.int16)
        pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / f"{i}.jpg", quality=92)
    return folder


def waits(variant: str) -> dict:
    """Trains a variant for a few steps; returns the share of time spent waiting."""
    config = benchmarks.get_config(variant)
    config.train.batch_size = BATCH_SIZE["small"]
    config.data.pipeline = "tf.data"  # 'auto' is the device
    examples = small_examples()
    mesh, waited = devices.make_mesh(), []
    facts = input_pipeline.facts(config.data, examples)
    program, state = train.create_train_state(config, facts)
    state = devices.place(state, mesh)
    batches = input_pipeline.batches

    def watched(*arguments, **options):
        iterator = batches(*arguments, **options)
        while True:
            start = time.perf_counter()
            batch = next(iterator)
            waited.append(time.perf_counter() - start)
            yield batch

    with unittest.mock.patch.object(input_pipeline, "batches", watched):
        step = functools.partial(train.train_step, program)
        advance = dispatch.make_advance(config, step, mesh, examples, facts, state, 0)
    for _ in range(2):  # the first round is a warm-up
        waited.clear()
        start = time.perf_counter()
        for _ in range(STEPS):
            state, totals, _ = advance(state, 1)
        jax.block_until_ready(totals)
        seconds = time.perf_counter() - start
    found = {
        "variant": variant,
        "images_per_second": round(STEPS * config.train.batch_size / seconds, 1),
        "waited_share": round(sum(waited) / seconds, 4),
        "steps": STEPS,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    print("  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    return found


def device_batches(config, examples) -> Iterator[dict]:
    """Yields batches that the device is still computing."""
    padded = examples.padded(config.data.pad, config.data.border)
    data = jax.device_put((padded, examples.labels))
    plans = input_pipeline.plans(config, len(examples))
    apply_plan = jax.jit(input_pipeline.apply_plan)
    return (apply_plan(*data, plan) for plan in plans)


def speed(batches: Iterator, warm_up: int) -> float:
    """Returns batches per second, after a warm-up that consumes prefetched ones."""
    for _ in range(warm_up):
        batch = next(batches)
    jax.block_until_ready(batch)
    start = time.perf_counter()
    for count in itertools.count(1):
        batch = next(batches)
        if time.perf_counter() - start > SECONDS:
            jax.block_until_ready(batch)
            return count / (time.perf_counter() - start)


def resident_mb() -> float:
    """Returns the memory of this process, or 0 on systems without /proc."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def version(*names: str) -> str:
    """Returns the version of the first installed distribution, '' if none is."""
    found = [d.version for n in names for d in importlib.metadata.distributions(name=n)]
    return found[0] if found else ""


if __name__ == "__main__":
    main()
