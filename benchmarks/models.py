"""Speed and memory of whole training steps, compared with PyTorch.

python -m benchmarks.models --peers
python -m benchmarks.models --peers --variants cfmz:20 gunn:15 --rounds 3
python -m benchmarks.models --variants cfmz:20 --lowerings auto plain --reference=DIR

docs/speed.md defines a step. Times vary with the load of the machine, so compare the
ratios, which are medians over interleaved rounds. The lowering `plain` is `auto`
without the C++ kernels. --peers adds our regular twin of a wired net and the same net
in PyTorch (torch_nets.py); it requires `pip install torch==2.13.0`. --reference adds
the same steps in another checkout of this repository, such as a git worktree of an
older commit.

Each variant is written to results/ as soon as it is measured, so a long table can be
measured in parts. With JAX_COMPILATION_CACHE_DIR set, a second run compiles nothing.
"""

import argparse
import copy
import functools
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import benchmarks
from configs import common
from configs.data_sets import DATA_SETS
from runtime import processes

CHECKOUT = pathlib.Path(__file__).parents[1]


class Net(NamedTuple):
    """A row of the table: a net, and goals for its speed as (floor, aim).

    twin: the regular net that a wired one replaces.
    of_pytorch, of_twin: goals for the speed relative to PyTorch and to the twin. At
      compress 8, expanders are to be faster than the twin; two grouped convolutions may
      take twice the time of the regular one.
    """

    batch_size: int = 64
    twin: str | None = None
    of_pytorch: tuple[float, float] | None = None
    of_twin: tuple[float, float] | None = None


NETS = {
    "cfmz:20": Net(64, None, (1.0, 1.2)),
    "cfmz:110": Net(64, None, (0.9, 1.2)),
    "xdensenet:40-24": Net(64, None, (1.15, 1.3)),
    "xdensenet:40-24-2": Net(64, "xdensenet:40-24", (1.1, 1.4), (1.0, 1.0)),
    "xdensenet:40-48-2": Net(64, "xdensenet:40-48", (1.1, 1.4), (1.0, 1.0)),
    "xdensenet:40-100-8": Net(64, "xdensenet:40-100", None, (1.4, 2.0)),
    "xdensenet:40-24-groups-2": Net(64, "xdensenet:40-24", (0.9, 1.3)),
    "igcnets:plain-38-L24M2": Net(64, "igcnets:plain-38-W16", (1.1, 1.5), (0.5, 0.5)),
    "igcnets:resnet-20-L24M2": Net(64, "igcnets:resnet-20-W16", (1.1, 1.5), (0.5, 0.5)),
    "igcnets:plain-20-L4M8": Net(64, "igcnets:plain-20-W16", (0.9, 1.2)),
    "gunn:15": Net(32, None, (1.1, 1.3)),
    "delugenets:146": Net(32, None, (1.0, 1.3)),
    "xvgg:16-bn-expander": Net(64, "xvgg:16-bn", (0.9, 1.1)),
    # At 224x224.
    "xmobilenet:0.5-4": Net(8, "xmobilenet:0.5", (0.8, 1.0)),
    "fb_resnet:resnet-18": Net(8, None, (0.8, 1.0)),
    "ximagenet:densenet-121": Net(8, None, (0.8, 1.0)),
    "ximagenet:densenet-121-2": Net(8, "ximagenet:densenet-121", (0.8, 1.0)),
    "igcnets:imagenet-L100M2": Net(8, "igcnets:imagenet-W64", (0.9, 1.5)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(NETS))
    parser.add_argument("--lowerings", nargs="+", default=["auto"])
    parser.add_argument("--batch_size", type=int, help="instead of the default table's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round")
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    parser.add_argument("--peers", action="store_true", help="add twin and PyTorch")
    parser.add_argument("--reference", type=pathlib.Path, help="add this checkout")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        compete(*json.loads(options.contestant), options)
        return
    if options.peers and not importlib.util.find_spec("torch"):
        sys.exit("error: --peers requires PyTorch: pip install torch==2.13.0")
    if options.reference and not (options.reference / "benchmarks/models.py").is_file():
        sys.exit(f"error: --reference={options.reference} is not a checkout")
    try:
        for variant in options.variants:
            benchmarks.get_config(variant)
    except ValueError as error:
        sys.exit(f"error: {error}")
    kind = "models" if options.peers else "models-lowerings"
    kind = "models-reference" if options.reference else kind
    for variant in options.variants:
        rows = table(variant, options)
        name = benchmarks.machine(rows[0]["device"], options.threads)
        benchmarks.merge(f"{kind}-{name}-jax{rows[0]['jax']}", rows, "variant")


def table(variant: str, options: argparse.Namespace) -> list[dict]:
    """Measures a variant with each lowering, in each checkout, and its peers."""
    net, options = NETS.get(variant, Net()), copy.copy(options)
    options.batch_size = options.batch_size or net.batch_size
    players = {}
    for lowering in options.lowerings:
        contestant = ("ours", variant, lowering)
        players["ours", lowering] = Player(contestant, options)
        if options.reference:
            there = Player(contestant, options, options.reference)
            players["reference", lowering] = there
    if options.peers:
        if net.twin:
            players["twin", "auto"] = Player(("ours", net.twin, "auto"), options)
        players["pytorch", ""] = Player(("pytorch", variant, ""), options)
    play(list(players.values()), options.rounds)
    rows = []
    for (framework, lowering), player in players.items():
        row = {"variant": variant, "framework": framework, "lowering": lowering}
        row |= player.finish()
        fields = ("batch_size", "dtype", "rounds", "steps")
        row |= {name: getattr(options, name) for name in fields}
        row["of_pytorch"] = ratio(player, players.get(("pytorch", "")))
        row["of_twin"] = ratio(player, players.get(("twin", "auto")))
        row["of_plain"] = ratio(player, players.get(("ours", "plain")))
        row["of_reference"] = ratio(player, players.get(("reference", lowering)))
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def play(players: Sequence["Player"], rounds: int) -> None:
    """Runs the rounds of all players in turn."""
    for number in range(rounds):
        # Alternate the order, so that no contestant is always the first of a round.
        for player in players if number % 2 == 0 else reversed(players):
            player.play()


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
        # The first step after another contestant's round allocates anew: up to 1.4 s.
        step(wait=True)
        start = time.perf_counter()
        for _ in range(options.steps - 1):
            step(wait=False)
        step(wait=True)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    print(json.dumps({"peak_memory_mb": round(memory())}))


def configure(variant: str, options):
    """Returns the configuration of a variant, for a step like PyTorch's."""
    config = benchmarks.get_config(variant)
    config.augment = common.base().augment
    config.train.update(
        batch_size=options.batch_size, dtype=options.dtype, batch_norm_groups=1
    )
    return config


def ours(variant: str, lowering: str, options):
    """Compiles our train step; returns (step, facts, memory in MiB) for `compete`."""
    import jax
    import numpy as np

    import input_pipeline
    import train
    from runtime import devices, dispatch

    config = configure(variant, options)
    config.net.lowering = "auto" if lowering == "plain" else lowering
    size, side = options.batch_size, DATA_SETS[config.data.name].image_size
    rng = np.random.default_rng(0)
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
    seconds = round(time.perf_counter() - start, 1)

    def step(wait: bool) -> None:
        nonlocal state
        state, totals, _ = compiled(state, batch)
        if wait:
            jax.block_until_ready(totals)

    def memory() -> float:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", 0) / 2**20 or resident_memory()

    step(wait=True)
    columns = {
        "compile_seconds": "" if jax.config.jax_compilation_cache_dir else seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        # The temporary buffers, among them everything saved for the backward pass.
        "live_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }
    return step, columns, memory


def pytorch(variant: str, _, options):
    """Builds PyTorch's train step; returns (step, facts, memory in MiB)."""
    import jax
    import torch
    from flax import nnx
    from torch.nn.functional import cross_entropy

    import nets
    from benchmarks import torch_nets

    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to PyTorch
    config = configure(variant, options)
    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    net = torch_nets.Twin(nets.create(config.net, nnx.Rngs(0))).to(device)
    size, side = options.batch_size, DATA_SETS[config.data.name].image_size
    x = torch.randn(size, 3, side, side, device=device)
    y = torch.randint(config.net.num_classes, (size,), device=device)
    optimizer = None
    fields = ("momentum", "nesterov", "weight_decay")
    recipe = {field: config.optimizer[field] for field in fields}

    def set_layout(name: str) -> None:
        nonlocal x, optimizer
        layout = {"memory_format": getattr(torch, name)}
        x, parameters = x.contiguous(**layout), net.to(**layout).parameters()
        # A new one, because its velocities have the layout of the parameters.
        optimizer = torch.optim.SGD(parameters, 0.1, **recipe, fused=True)

    def loss():
        bfloat16 = options.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return cross_entropy(net(x), y)

    def step(wait: bool) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if wait and cuda:
            torch.cuda.synchronize()

    def seconds(name: str) -> float:
        set_layout(name)
        step(wait=True)
        start = time.perf_counter()
        step(wait=True)
        return time.perf_counter() - start

    def memory() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_memory()

    layout = min(("contiguous_format", "channels_last"), key=seconds)
    set_layout(layout)
    step(wait=True)
    known = [x, *net.parameters(), *net.buffers()]
    facts = {
        "lowering": layout,
        "compile_seconds": "",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "jax": "",
        "live_mib": round(saved_bytes(loss, known) / 2**20),
    }
    return step, facts, memory


def saved_bytes(loss, known) -> int:
    """Returns the bytes that autograd saves to differentiate loss().

    known: tensors that exist anyway and are not counted.
    """
    from torch.autograd.graph import saved_tensors_hooks

    existing, saved = {x.untyped_storage().data_ptr() for x in known}, {}

    def pack(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        graph = loss()  # keeps what is saved, so that no address occurs twice
    del graph
    return sum(size for pointer, size in saved.items() if pointer not in existing)


def resident_memory() -> float:
    """Returns the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
