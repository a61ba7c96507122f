"""DenseNet, the backbone of X-DenseNet (Deep Expander Networks).

Each layer reads the concatenation of all earlier maps of its block and appends
`growth` new ones. All readers of a map normalise it with the same batch statistics,
which are therefore computed once. X-DenseNet-BC-40-24-2 has depth 40, growth 24 and the
expander wiring with compress 2. Source: the published code. DenseNet covers its
densenet_cifar, _grouped_cifar and _expander_cifar, ImageNetDenseNet its densenet121 to
201 and their expander twins.
"""

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, Linear, he_fan_out, torch_default, torch_uniform
from nets.layers.norm import BatchNorm, Measured, torch_batch_norm
from nets.layers.pooling import average_pool, global_average_pool, max_pool
from nets.layers.wiring import Wiring

# For ImageNet. depth: growth, layers of each block.
IMAGENET = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}


class BasicLayer(nnx.Module):
    """BN, ReLU, 3x3: the `growth` maps that a layer appends to its input."""

    def __init__(self, channels, growth, *, wiring, dropout, rngs):
        self.norm1 = BatchNorm(channels)
        self.conv1 = wiring.conv(channels, growth, 3, padding=1, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, maps: Sequence[Measured]) -> jax.Array:
        return _drop(self.dropout, self.conv1(self.norm1(maps, "relu")))


class BottleneckLayer(nnx.Module):
    """BN, ReLU, 1x1 to 4 growth, BN, ReLU, 3x3: the `growth` maps that it appends."""

    def __init__(
        self,
        channels: int,
        growth: int,
        *,
        wiring: Wiring,
        norm=BatchNorm,
        init=he_fan_out,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        width = 4 * growth
        options = dict(dense=dict(init=init), rngs=rngs)
        self.norm1 = norm(channels)
        self.conv1 = wiring.conv(channels, width, 1, **options)
        self.norm2 = norm(width)
        self.conv2 = wiring.conv(width, growth, 3, padding=1, **options)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, maps: Sequence[Measured]) -> jax.Array:
        x = _drop(self.dropout, self.conv1(self.norm1(maps, "relu")))
        return _drop(self.dropout, self.conv2(self.norm2(x, "relu")))


class Transition(nnx.Module):
    """BN, ReLU, 1x1, 2x2 average pool."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        wiring: Wiring,
        norm=BatchNorm,
        init=he_fan_out,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.norm = norm(in_channels)
        options = dict(dense=dict(init=init), rngs=rngs)
        self.conv = wiring.conv(in_channels, out_channels, 1, **options)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, maps: Sequence[Measured]) -> jax.Array:
        x = self.conv(self.norm(maps, "relu"))
        return average_pool(_drop(self.dropout, x), 2)


class DenseNet(nnx.Module):
    """Maps x (N, 32, 32, 3) to logits (N, num_classes).

    depth: 6 n + 4 for n layers in each of three blocks; 3 n + 4 without `bottleneck`.
    reduction: a transition keeps floor(channels * reduction) maps.
    wired_transitions: whether the wiring applies to transitions; otherwise they are
      dense. The published logs have both: dense in 40-24-2 and 40-36-2, expander in
      40-48-2 and 40-60-2.
    """

    def __init__(
        self,
        *,
        depth: int = 40,
        growth: int = 24,
        reduction: float = 0.5,
        bottleneck: bool = True,
        dropout: float = 0.0,
        wired_transitions: bool = True,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        convolutions = 6 if bottleneck else 3
        if depth < convolutions + 4 or (depth - 4) % convolutions:
            raise ValueError(
                f"a DenseNet {'with' if bottleneck else 'without'} bottleneck has "
                f"depth {convolutions} n + 4 with n > 0, got {depth}"
            )
        layer = BottleneckLayer if bottleneck else BasicLayer
        options = dict(wiring=wiring, dropout=dropout, rngs=rngs)
        transition_options = options | (
            {} if wired_transitions else {"wiring": Wiring()}
        )
        channels = 2 * growth
        self.stem = Conv(3, channels, 3, padding=1, init=he_fan_out, rngs=rngs)
        blocks, transitions = [], []
        for block in range(3):
            if block:
                reduced = int(channels * reduction)
                transitions.append(Transition(channels, reduced, **transition_options))
                channels = reduced
            layers = []
            for _ in range((depth - 4) // convolutions):
                layers.append(layer(channels, growth, **options))
                channels += growth
            blocks.append(nnx.List(layers))
        self.blocks, self.transitions = nnx.List(blocks), nnx.List(transitions)
        self.norm = BatchNorm(channels)
        self.classifier = Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = self.norm(_run_blocks(self, x), "relu")
        return self.classifier(global_average_pool(x))


class ImageNetDenseNet(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes); published for 224x224.

    depth: a key of IMAGENET.
    growth, blocks: maps that a layer appends, and layers in each block; 0 and () take
      them from IMAGENET.
    wired_transitions: whether the wiring applies to transitions; published: no.
    norm_scale: initial BN scales, "ones" or "uniform" (torch 0.3: U(0, 1)).
    The original ends in a fixed 7x7 pooling window; pooling the whole map is the same
    at 224x224.
    """

    def __init__(
        self,
        *,
        depth: int = 121,
        growth: int = 0,
        blocks: tuple[int, ...] = (),
        wired_transitions: bool = False,
        norm_scale: str = "ones",
        wiring: Wiring = Wiring(),
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        if depth not in IMAGENET:
            raise ValueError(
                f"an ImageNet DenseNet has depth {', '.join(map(str, IMAGENET))}, "
                f"got {depth}"
            )
        growth, blocks = growth or IMAGENET[depth][0], blocks or IMAGENET[depth][1]
        norm = functools.partial(torch_batch_norm, scale=norm_scale, rngs=rngs)
        options = dict(norm=norm, init=torch_uniform, rngs=rngs)
        transition_wiring = wiring if wired_transitions else Wiring()
        channels = 2 * growth
        stem = dict(stride=2, padding=3, init=torch_uniform, rngs=rngs)
        self.stem, self.stem_norm = Conv(3, channels, 7, **stem), norm(channels)
        stages, transitions = [], []
        for block, count in enumerate(blocks):
            if block:
                geometry = (channels, channels // 2)
                transition = Transition(*geometry, wiring=transition_wiring, **options)
                transitions.append(transition)
                channels //= 2
            layers = []
            for _ in range(count):
                layers.append(
                    BottleneckLayer(channels, growth, wiring=wiring, **options)
                )
                channels += growth
            stages.append(nnx.List(layers))
        self.blocks, self.transitions = nnx.List(stages), nnx.List(transitions)
        self.norm = norm(channels)
        default = dict(bias_init=torch_default(channels))
        self.classifier = Linear(channels, num_classes, rngs=rngs, **default)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem_norm(self.stem(x), "relu")
        x = max_pool(x, 3, stride=2, padding=1)
        x = self.norm(_run_blocks(self, x), "relu")
        return self.classifier(global_average_pool(x))


def _run_blocks(net: DenseNet | ImageNetDenseNet, x: jax.Array) -> list[Measured]:
    """Returns the input and the new maps of the last block, measured."""
    for i, layers in enumerate(net.blocks):
        is_last = i == len(net.blocks) - 1
        final = net.norm if is_last else net.transitions[i].norm
        # The next reader measures a map for all later ones.
        reader, *readers = [*(layer.norm1 for layer in layers), final]
        maps = [reader.measure(x)]
        for layer, reader in zip(layers, readers, strict=True):
            new = checkpoint_name(layer(maps), "block")
            maps.append(reader.measure(new))
        if not is_last:
            x = checkpoint_name(net.transitions[i](maps), "block")
    return maps


def _drop(dropout: nnx.Dropout | None, x: jax.Array) -> jax.Array:
    return x if dropout is None else dropout(x)
