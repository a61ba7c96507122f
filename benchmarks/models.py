"""Speed and memory of whole training steps, compared with PyTorch.

python -m benchmarks.models --peer
python -m benchmarks.models --variants cfmz:20 gunn:15 --lowerings auto --reference=DIR

Each contestant runs in its own process, so that its peak memory can be measured. The
rounds of the contestants are interleaved, because machines are shared and noisy:
compare the ratios, which are medians over rounds. The lowering `plain` is `auto`
without the C++ kernels. --peer requires PyTorch and pytorchcv. --reference adds the
same steps in another checkout of this repository, such as a git worktree of an older
commit.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import benchmarks
from runtime import processes

CHECKOUT = pathlib.Path(__file__).parents[1]
PEERS = {  # pytorchcv's names
    "cfmz:20": "resnet20_cifar10",
    "xdensenet:40-24": "densenet40_k24_bc_cifar10",
    "xdensenet:40-24-2": "xdensenet40_2_k24_bc_cifar10",
}
PEER_INSTALL = (
    "pip install torch==2.13.0 && pip install --no-deps pytorchcv==0.0.67 (its "
    "dependencies are not needed here)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(PEERS))
    parser.add_argument("--lowerings", nargs="+", default=["auto", "plain", "native"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round")
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    parser.add_argument("--peer", action="store_true", help="add PyTorch's nets")
    parser.add_argument("--reference", type=pathlib.Path, help="add this checkout")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        compete(*json.loads(options.contestant), options)
        return
    if options.peer and not importlib.util.find_spec("pytorchcv"):
        sys.exit(f"error: --peer requires PyTorch and pytorchcv: {PEER_INSTALL}")
    if options.reference and not (options.reference / "benchmarks/models.py").is_file():
        sys.exit(f"error: --reference={options.reference} is not a checkout")
    rows = [row for variant in options.variants for row in table(variant, options)]
    name = benchmarks.machine(rows[0]["device"], options.threads)
    kind = "models-reference" if options.reference else "models"
    benchmarks.write(f"{kind}-{name}-jax{rows[0]['jax']}", rows)


def table(variant: str, options: argparse.Namespace) -> list[dict]:
    """Measures a variant with each lowering, in each checkout, and its peer."""
    players = {}
    for lowering in options.lowerings:
        contestant = ("ours", variant, lowering)
        players["ours", lowering] = Player(contestant, options)
        if options.reference:
            there = Player(contestant, options, options.reference)
            players["reference", lowering] = there
    peer = PEERS.get(variant) if options.peer else None
    if peer:
        players["pytorch", peer] = Player(("pytorch", variant, peer), options)
    for number in range(options.rounds):
        # Alternate the order, so that no contestant is always the first of a round.
        turns = list(players.values())
        for player in turns if number % 2 == 0 else reversed(turns):
            player.play()
    rows = []
    for (framework, name), player in players.items():
        row = {"variant": variant, "framework": framework, "lowering": name}
        row |= player.finish() | {"batch_size": options.batch_size}
        row["of_pytorch"] = ratio(player, players.get(("pytorch", peer)))
        row["of_plain"] = ratio(player, players.get(("ours", "plain")))
        row["of_reference"] = ratio(player, players.get(("reference", name)))
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def ratio(player: "Player", other: "Player | None") -> float | str:
    """Returns the median over rounds of the ratio of two speeds; "" without `other`."""
    if other is None:
        return ""
    pairs = zip(player.speeds, other.speeds, strict=True)
    return round(statistics.median(mine / theirs for mine, theirs in pairs), 3)


class Player:
    """The process of a contestant, which runs the code of a checkout."""

    def __init__(
        self,
        contestant: tuple[str, str, str],
        options: argparse.Namespace,
        checkout: pathlib.Path = CHECKOUT,
    ):
        self.contestant, self.speeds = contestant, []
        self._images = options.batch_size * options.steps
        # These flags and the lines on stdin and stdout must not change: --reference
        # runs them in older checkouts.
        fields = ("batch_size", "dtype", "steps", "threads")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.models"),
                *(f"--{field}={getattr(options, field)}" for field in fields),
                f"--contestant={json.dumps(contestant)}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            # The environment that main.py gives a run; PyTorch gets the same.
            env={"GLIBC_TUNABLES": processes.HUGE_PAGES}
            | os.environ
            | {"PYTHONPATH": str(checkout.absolute())}
            | ({"CXX": "none"} if contestant[2] == "plain" else {}),
        )
        self.facts = self._read()

    def play(self) -> None:
        """Trains one round and records its speed."""
        self._process.stdin.write("play\n")
        self._process.stdin.flush()
        self.speeds.append(self._images / self._read()["seconds"])

    def finish(self) -> dict:
        """Ends the process and returns its speeds, memory and facts."""
        self._process.stdin.close()
        rest = self._read()
        self._process.wait()
        return {
            "images_per_second": round(statistics.median(self.speeds), 1),
            "slowest": round(min(self.speeds), 1),
            "fastest": round(max(self.speeds), 1),
            **self.facts,
            **rest,
        }

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            sys.exit(f"error: the process of {self.contestant} exited with {code}")
        return json.loads(line)


def compete(framework: str, variant: str, name: str, options) -> None:
    """Prints facts, then the time of a round per line of stdin, then peak memory."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        os.sched_setaffinity(0, cores)
    make = ours if framework == "ours" else pytorch
    step, facts, memory = make(variant, name, options)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        # The first step after another contestant's round must allocate anew: up to
        # 1.4 s.
        step(wait=True)
        start = time.perf_counter()
        for _ in range(options.steps - 1):
            step(wait=False)
        step(wait=True)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    print(json.dumps({"peak_memory_mb": round(memory())}))


def ours(variant: str, lowering: str, options):
    """Compiles our train step; returns (step, facts, memory in MiB) for `compete`."""
    import jax
    import numpy as np

    import input_pipeline
    import train
    from runtime import devices, dispatch

    family, _, row = variant.partition(":")
    config = importlib.import_module(f"configs.{family}").get_config(row)
    config.net.lowering = "auto" if lowering == "plain" else lowering
    config.train.update(batch_size=options.batch_size, dtype=options.dtype)
    rng, size = np.random.default_rng(0), options.batch_size
    side = 32 if config.data.crop == "pad" else config.data.image_size
    image = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    label = rng.integers(0, config.net.num_classes, size).astype(np.int32)
    names = tuple(map(str, range(config.net.num_classes)))
    facts = input_pipeline.Facts(
        names, image.shape[1:], mean=(125.0,) * 3, std=(60.0,) * 3, num_train=50_000
    )
    mesh = devices.make_mesh(jax.devices()[:1])
    program, state = train.create_train_state(config, facts)
    state = devices.place(state, mesh)
    batch = devices.shard({"image": image, "label": label}, mesh)
    start = time.perf_counter()
    train_step = functools.partial(train.train_step, program)
    step_fn = dispatch.make_train_step(train_step, mesh)
    compiled = step_fn.lower(state, batch).compile()
    seconds = time.perf_counter() - start

    def step(wait: bool) -> None:
        nonlocal state
        state, totals, _ = compiled(state, batch)
        if wait:
            jax.block_until_ready(totals)

    def memory() -> float:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", 0) / 2**20 or resident_memory()

    step(wait=True)
    kind = jax.devices()[0].device_kind
    columns = {"compile_seconds": round(seconds, 1), "device": kind}
    return step, columns | {"jax": jax.__version__}, memory


def pytorch(variant: str, name: str, options):
    """Builds PyTorch's train step; returns (step, facts, memory in MiB)."""
    import torch
    from pytorchcv.model_provider import get_model
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    to = functools.partial(torch.Tensor.to, device="cuda" if cuda else "cpu")
    layout = {"memory_format": torch.channels_last}  # the faster one
    net = get_model(name, pretrained=False).to(**layout).train()
    net = net.cuda() if cuda else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    x = to(torch.randn(options.batch_size, 3, 32, 32)).to(**layout)
    y = to(torch.randint(0, 10, (options.batch_size,)))

    def step(wait: bool) -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        if wait and cuda:
            torch.cuda.synchronize()

    def memory() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_memory()

    step(wait=True)
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    facts = {"compile_seconds": "", "device": kind, "jax": ""}
    return step, facts, memory


def resident_memory() -> float:
    """Returns the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
