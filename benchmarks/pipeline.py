"""Images per second of both ways to pad, crop and flip: python -m benchmarks.pipeline

50,000 images of 32x32x3 (noise: the pixels do not matter), border of 4, batches of 128.
tf.data: batches that arrive in numpy, nothing else running. device: plans drawn, sent
and carried out by JAX, one dispatch per batch. Median of the repeats, a minute in all.
"""

import importlib.metadata
import itertools
import os
import statistics
import time

import jax
import numpy as np

import benchmarks
import input_pipeline
from configs import common

REPEATS, SECONDS = 5, 2.0


def main() -> None:
    config = common.base()
    config.train.batch_size = 128
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = np.zeros(len(images), np.int32)
    examples = input_pipeline.Examples(images, labels, 10, (0.0,) * 3, (1.0,) * 3)
    batches = input_pipeline.batches(config, "train", examples=examples)
    paths = {"tf.data": lambda: next(batches), "device": device_path(config, examples)}
    rows = []
    for name, next_batch in paths.items():
        speeds = [speed(next_batch) * config.train.batch_size for _ in range(REPEATS)]
        rows.append(
            {
                "path": name,
                "device": "host" if name == "tf.data" else jax.devices()[0].device_kind,
                "batch_size": config.train.batch_size,
                "images_per_second": round(statistics.median(speeds)),
                "slowest": round(min(speeds)),
                "fastest": round(max(speeds)),
                "repeats": REPEATS,
                "cores": os.cpu_count(),
                "jax": jax.__version__,
                "tensorflow": tensorflow_version(),
            }
        )
        print("{path:8} {images_per_second:>9,} images/s".format(**rows[-1]))
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"pipeline-{name}-jax{jax.__version__}", rows)


def device_path(config, examples):
    """A function that starts a batch on the device and returns it."""
    padded = input_pipeline.pad(config.data, examples)
    data = jax.device_put((padded, examples.labels))
    plans = input_pipeline.plans(config, len(examples.labels))
    apply_plan = jax.jit(input_pipeline.apply_plan)
    return lambda: apply_plan(*data, next(plans))


def speed(next_batch) -> float:
    """Batches per second after a warm-up."""
    for _ in range(50):
        batch = next_batch()
    jax.block_until_ready(batch)
    start = time.perf_counter()
    for count in itertools.count(1):
        batch = next_batch()
        if time.perf_counter() - start > SECONDS:
            jax.block_until_ready(batch)
            return count / (time.perf_counter() - start)


def tensorflow_version() -> str:
    names = "tensorflow-cpu", "tensorflow"
    found = [d.version for n in names for d in importlib.metadata.distributions(name=n)]
    return found[0] if found else ""


if __name__ == "__main__":
    main()
