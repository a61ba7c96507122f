"""The originals' own figures beside ours: seconds per epoch, memory and test error.

python -m benchmarks.originals cfmz xnets
python -m benchmarks.originals xnets --rounds 3 --steps 2

cfmz: the table of its README, by depth. xnets: the seconds per epoch of its training
logs on CIFAR-10, of dense nets and of the expanders with the same growth; "of dense" is
the time relative to the dense net, with which an expander takes turns. Ours are
measured as in benchmarks.models, with the recipe's batch size, without input pipeline
and evaluation; our memory is the peak of the process.
"""

import argparse
import copy
import dataclasses
import statistics

import benchmarks
from benchmarks.models import Player, play, ratio
from configs import common
from configs.data_sets import DATA_SETS
from runtime.workdir import read_rows


@dataclasses.dataclass(frozen=True)
class Original:
    """A published row: seconds per epoch on its GPU, and the GPU's memory in MiB."""

    variant: str
    seconds: float
    memory: int | None = None


# Groups that take turns. The first of a group is the dense net.
SYSTEMS = {
    # README of cfmz, one TITAN X.
    "cfmz": (
        (Original("cfmz:20", 11, 521),),
        (Original("cfmz:32", 18, 636),),
        (Original("cfmz:56", 30, 860),),
        (Original("cfmz:110", 60, 1277),),
    ),
    # Logs of Deep-Expander-Networks, median over epochs of the training time on one
    # GPU, which they do not name.
    "xnets": (
        (Original("xdensenet:40-24", 39.6), Original("xdensenet:40-24-2", 40.3)),
        (Original("xdensenet:40-36", 64.7), Original("xdensenet:40-36-2", 65.3)),
        (Original("xdensenet:40-48", 82.8), Original("xdensenet:40-48-2", 86.5)),
        (Original("xdensenet:40-60", 109.2), Original("xdensenet:40-60-2", 109.2)),
    ),
}
DATA = "cifar10"
IMAGES = DATA_SETS[DATA].num_train
# The runs of our test errors: files in results/.
RUNS = {"cfmz:20": "cfmz20-160of180epochs-seed*-h200-*.csv"}
HEADER = {  # heading of each column before the errors
    "variant": "variant",
    "published_seconds": "s/epoch, published",
    "seconds": "s/epoch, ours",
    "published_of_dense": "of dense, published",
    "of_dense": "of dense, ours",
    "published_memory_mib": "MiB, published",
    "memory_mib": "MiB, ours",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    options = parser.parse_args()
    for system in options.systems:
        rows = [row for group in SYSTEMS[system] for row in measure(group, options)]
        print(markdown(rows))
        name = benchmarks.machine(rows[0]["device"], options.threads)
        benchmarks.write(f"originals-{system}-{name}-jax{rows[0]['jax']}", rows)


def measure(group: tuple[Original, ...], options: argparse.Namespace) -> list[dict]:
    """Returns a row for each net of a group; they take turns."""
    players, batch_sizes = [], []
    for original in group:
        own = copy.copy(options)
        config = benchmarks.get_config(f"{original.variant},{DATA}")
        own.batch_size = config.train.batch_size
        batch_sizes.append(own.batch_size)
        players.append(Player(("ours", original.variant, "auto"), own))
    play(players, options.rounds)
    rows = []
    for original, player, batch_size in zip(group, players, batch_sizes, strict=True):
        found = player.finish()
        published_ratio = round(original.seconds / group[0].seconds, 3)
        our_ratio = round(1 / ratio(player, players[0]), 3)
        row = {
            "variant": original.variant,
            "published_seconds": original.seconds,
            "seconds": round(IMAGES / found["images_per_second"], 1),
            "published_of_dense": published_ratio if len(group) > 1 else "",
            "of_dense": our_ratio if len(group) > 1 else "",
            "published_memory_mib": original.memory or "",
            "memory_mib": found["peak_memory_mb"],
            **_errors(original.variant),
            "batch_size": batch_size,
        }
        fields = ("slowest", "fastest", "compile_seconds", "device", "jax")
        row |= {name: found[name] for name in fields}
        row |= {name: getattr(options, name) for name in ("dtype", "rounds", "steps")}
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def _errors(variant: str) -> dict:
    """Returns the published error and the mean of our runs, in percent."""
    family, _, name = variant.partition(":")
    row = common.load_family(family).VARIANTS[name].published[DATA]
    runs = benchmarks.RESULTS.glob(RUNS[variant]) if variant in RUNS else ()
    last = [100 * (1 - read_rows(path)[-1]["test_accuracy"]) for path in sorted(runs)]
    return {
        "published_error": row.error,
        "published_selection": row.selection,
        "error": round(statistics.mean(last), 2) if last else "",
        "error_sd": round(statistics.stdev(last), 2) if last else "",
        "seeds": len(last),
    }


def markdown(rows: list[dict]) -> str:
    """Returns the rows of `measure`, or of its file, as a Markdown table."""
    table = [[*HEADER.values(), "error in %, published", "error in %, ours"]]
    for row in rows:
        error = f"{float(row['published_error']):.2f} ({row['published_selection']})"
        ours = f"{row['error']} ± {row['error_sd']} ({row['seeds']} seeds)"
        cells = [str(row[name]) for name in HEADER]
        table.append([*cells, error, ours if row["error"] else ""])
    # Omits columns without an entry.
    used = [i for i, cells in enumerate(zip(*table[1:], strict=True)) if any(cells)]
    lines = [[line[i] for i in used] for line in table]
    lines.insert(1, ["---"] * len(used))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
