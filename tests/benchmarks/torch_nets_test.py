"""The PyTorch twins equal the original networks, by their golden files."""

import json
import pathlib

import jax
import numpy as np
import pytest

import convert
from tests.conftest import SHARED
from tests.support.golden_files import FORMAT, Golden, channels_first

OWN = pathlib.Path(__file__).parents[1] / "golden"


def networks():
    """Returns the golden files of networks, ours and those of ../shared, once each."""
    found = {}
    for root in (SHARED / "golden", OWN):
        for path in sorted(root.rglob("*.json")):
            facts = json.loads(path.read_text())
            if isinstance(facts, dict) and facts.get("format") == FORMAT:
                found[path.relative_to(root).as_posix()] = path
    return [pytest.param(path, id=name) for name, path in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize("path", networks())
def test_twins_equal_the_originals(path):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_nets

    golden = Golden.read(path)
    facts, arrays = golden.facts, golden.arrays
    with jax.enable_x64(True):
        net, tensors = convert.build(facts), golden.tensors()
        # DelugeNets load other values for evaluation than for training.
        net.eval()
        convert.load(net, tensors)
        evaluated = torch_nets.Twin(net).eval()
        net.train()
        convert.load(net, tensors)
        twin = torch_nets.Twin(net)
    for module in twin.modules():
        if hasattr(module, "rate"):  # golden files have no dropout
            module.rate = 0.0
    count = sum(parameter.numel() for parameter in twin.parameters())
    assert count == facts["trainable_params"]
    images = torch.tensor(channels_first(golden.images()))
    with torch.no_grad():
        assert close(evaluated(images), arrays["logits_eval"])
    for layout in (torch.contiguous_format, torch.channels_last):
        twin.to(memory_format=layout).zero_grad()
        logits = twin(images.to(memory_format=layout))
        assert close(logits, arrays["logits_train"])
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(golden.labels(), dtype=torch.int64)
        )
        loss.backward()
        assert close(loss, arrays["loss_train"])
        gradients = torch.cat([x.grad.flatten() for x in twin.parameters()])
        assert close(gradients.norm(), np.linalg.norm(arrays["grad_norm"]))


def close(actual, expected):
    actual = actual.detach().numpy()
    return np.abs(actual - expected).max() <= 1e-9 * np.abs(expected).max()
