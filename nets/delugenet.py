"""DelugeNet: each layer reads a weighted sum of all earlier layers of its block.

DelugeNets (arXiv 1611.05552; facts from the published code). The weights are per
channel: a depthwise convolution along the axis of layers, with no shortcut beside it.
As in the original, the stem for 32x32 and the opening of the first block for ImageNet
are bare convolutions, and transitions have no ReLU.
"""

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, Linear
from nets.layers.cross_layer import CrossLayer, Source, make_source, unstack_scales
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# Bottleneck width of the first block; each block doubles it.
FIRST_WIDTH = {"cifar": 32, "imagenet": 64}


class CompositeLayer(nnx.Module):
    """Cross-layer convolution of the sources, then three times BN, ReLU, convolution.

    The convolutions are 1x1 to `width`, 3x3, and 1x1 to 2 width. With num_sources=1
    there is no cross-layer convolution: the layer reads the last source.
    """

    def __init__(self, channels, width, num_sources, *, wiring, rngs):
        conv = functools.partial(wiring.conv, rngs=rngs)
        self.cross = _make_cross(channels, num_sources)
        self.norm1 = BatchNorm(channels)
        self.conv1 = conv(channels, width, 1)
        self.norm2 = BatchNorm(width)
        self.conv2 = conv(width, width, 3, padding=1)
        self.norm3 = BatchNorm(width)
        self.conv3 = conv(width, 2 * width, 1)

    def __call__(self, sources: Sequence[Source]) -> jax.Array:
        x = _combine(self.cross, sources)
        x = self.conv1(self.norm1(x, "relu"))
        x = self.conv2(self.norm2(x, "relu"))
        return self.conv3(self.norm3(x, "relu"))


class Transition(nnx.Module):
    """Cross-layer convolution over all sources of a block, BN, strided 3x3; no ReLU."""

    def __init__(self, in_channels, out_channels, num_sources, *, rngs):
        self.cross = _make_cross(in_channels, num_sources)
        self.norm = BatchNorm(in_channels)
        self.conv = Conv(in_channels, out_channels, 3, stride=2, padding=1, rngs=rngs)

    def __call__(self, sources: Sequence[Source]) -> jax.Array:
        return self.conv(self.norm(_combine(self.cross, sources)))


def _make_cross(channels: int, num_sources: int) -> CrossLayer | None:
    return CrossLayer(channels, num_sources) if num_sources > 1 else None


def _combine(cross: CrossLayer | None, sources: Sequence[Source]) -> jax.Array:
    return sources[-1].raw if cross is None else cross(sources)


class Projection(nnx.Module):
    """Opens the first block for ImageNet with a bare 1x1 convolution of one source."""

    def __init__(self, in_channels, out_channels, *, rngs):
        self.conv = Conv(in_channels, out_channels, 1, rngs=rngs)

    def __call__(self, sources: Sequence[Source]) -> jax.Array:
        (source,) = sources
        return self.conv(source.raw)


class Block(nnx.Module):
    """An opening unit that reads the previous block, then layers that read this block.

    Every output is a source. `norms` has the batch statistics of each source, which all
    its readers share; it is None without cross-layer connections.
    """

    def __init__(self, opening, width, num_layers, *, cross_layer, wiring, rngs):
        self.opening = opening
        options = dict(wiring=wiring, rngs=rngs)
        layers = [
            CompositeLayer(2 * width, width, i + 1 if cross_layer else 1, **options)
            for i in range(num_layers)
        ]
        norms = [BatchNorm(2 * width, affine=False) for _ in range(num_layers + 1)]
        self.layers = nnx.List(layers)
        self.norms = nnx.List(norms) if cross_layer else None

    def sources(
        self, previous: Sequence[Source], reader: CrossLayer | None
    ) -> list[Source]:
        """Computes the sources of this block from the previous one's, oldest first.

        reader: the cross-layer convolution after this block, which reads all sources.
        """
        x = checkpoint_name(self.opening(previous), "block")
        if self.norms is None:
            for layer in self.layers:
                x = checkpoint_name(layer([Source(x)]), "block")
            return [Source(x)]
        readers = [layer.cross for layer in self.layers if layer.cross is not None]
        readers.append(reader)
        gains = unstack_scales(readers)
        sources = [make_source(x, self.norms[0], 0, gains)]
        for i, layer in enumerate(self.layers, start=1):
            x = checkpoint_name(layer(sources), "block")
            sources.append(make_source(x, self.norms[i], i, gains))
        return sources


class DelugeNet(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes).

    layers: composite layers in each block. Published nets are named after
      3 sum(layers) + 2, which does not count transitions.
    width: multiplier of FIRST_WIDTH, the bottleneck width of the first block. The
      sources of a block are twice as wide as its bottlenecks.
    form: "cifar" for 32x32, "imagenet" for 224x224.
    cross_layer: False is our control, a chain in which each layer reads only the one
      before it.
    The wiring applies to the composite layers; all other convolutions are dense.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int] = (8, 16, 24),
        width: float = 1.0,
        form: str = "cifar",
        cross_layer: bool = True,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        n = _first_width(layers, width, form)
        options = dict(wiring=wiring, rngs=rngs)
        imagenet = form == "imagenet"
        stem = dict(stride=2, padding=3) if imagenet else dict(padding=1)
        self.stem = Conv(3, n, 7 if imagenet else 3, **stem, rngs=rngs)
        self.stem_norm = BatchNorm(n) if imagenet else None
        blocks, num_sources = [], 1
        for i, num_layers in enumerate(layers):
            if i:
                n = 2 * n
                opening = Transition(n, 2 * n, num_sources, rngs=rngs)
            elif imagenet:
                opening = Projection(n, 2 * n, rngs=rngs)
            else:  # one of this block's composite layers
                opening = CompositeLayer(n, n, 1, **options)
                num_layers -= 1
            block = Block(opening, n, num_layers, cross_layer=cross_layer, **options)
            blocks.append(block)
            num_sources = num_layers + 1 if cross_layer else 1
        self.blocks = nnx.List(blocks)
        self.cross = _make_cross(2 * n, num_sources)
        self.norm = BatchNorm(2 * n)
        self.classifier = Linear(2 * n, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        if self.stem_norm is not None:
            x = max_pool(self.stem_norm(x, "relu"), 3, stride=2, padding=1)
        sources = [Source(x)]
        # For each block, the convolution that reads all its sources.
        readers = [block.opening.cross for block in list(self.blocks)[1:]]
        for block, reader in zip(self.blocks, [*readers, self.cross], strict=True):
            sources = block.sources(sources, reader)
        x = self.norm(_combine(self.cross, sources), "relu")
        return self.classifier(global_average_pool(x))


def _first_width(layers: Sequence[int], width: float, form: str) -> int:
    if form not in FIRST_WIDTH:
        raise ValueError(f"unknown form {form!r}: choose from {', '.join(FIRST_WIDTH)}")
    if not layers:
        raise ValueError("a DelugeNet needs at least one block, got layers=()")
    for block, num_layers in enumerate(layers, start=1):
        # Sources are the layers of a block and its opening, which may be a layer.
        least = 2 if form == "cifar" and block == 1 else 1
        if num_layers < least:
            raise ValueError(
                f"block {block} needs at least {least} composite layers, to have 2 "
                f"sources, got {num_layers}: layers={tuple(layers)}"
            )
    first = FIRST_WIDTH[form] * width
    if first < 1 or first != int(first):
        raise ValueError(
            f"width times {FIRST_WIDTH[form]} must be a whole number of channels, got "
            f"{width} * {FIRST_WIDTH[form]} = {first}"
        )
    return int(first)
