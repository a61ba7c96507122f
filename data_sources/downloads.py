"""Data sets from the network, through TFDS, and only when asked."""

import contextlib
import difflib
import pathlib
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

PROBE_SECONDS = 10.0


def nearest(root: pathlib.Path, name: str, known: Sequence[str]) -> list[str]:
    """Names like one that is neither known to us or TFDS nor in root; else nothing."""
    import tensorflow_datasets as tfds

    here = {x.name for x in root.iterdir()} if root.is_dir() else set()
    every = {*known, *here, *tfds.list_builders(with_community_datasets=False)}
    if name in every:
        return []
    return difflib.get_close_matches(name, every, n=3) or sorted(known)


def fetch(root: pathlib.Path, name: str) -> None:
    """Lets TFDS fetch a set and write its files, for which it imports TensorFlow.

    Raises anything; OSError at once, if there is no connection.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=root)
    _probe({urllib.parse.urlsplit(url)[:2] for url in builder.url_infos})
    builder.download_and_prepare()


def _probe(servers: set[tuple[str, str]]) -> None:
    """Raises OSError unless all (scheme, host) answer; TFDS would retry for 205 s."""
    problem = [f"no answer within {PROBE_SECONDS:.0f} s"]

    def ask():
        try:
            for scheme, host in servers:
                request = urllib.request.Request(f"{scheme}://{host}/", method="HEAD")
                with contextlib.suppress(urllib.error.HTTPError):  # it is there
                    urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            problem.clear()
        except Exception as error:
            problem[:] = [f"{host}: {error}"]

    # In a thread, because name resolution knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if problem:
        raise OSError(f"no connection ({problem[0]})")
