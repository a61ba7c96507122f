"""GUNN: Gradually Updated Neural Networks (arXiv 1711.09280).

Facts from the published code (github.com/joe-siyuan-qiao/GUNN), which contains GUNN-15,
GUNN-18 and their layer. GUNN-24 and Wide GUNN-18 were not published; configs/gunn.py
documents how they are derived.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, Linear
from nets.layers.gradual import Gradual, Order
from nets.layers.norm import BatchNorm
from nets.layers.pooling import average_pool, global_average_pool, max_pool
from nets.layers.wiring import Wiring

SHORTCUTS = ("projection", "identity", "none")


class Bottleneck(nnx.Module):
    """1x1 to expansion * out, BN, ReLU, 3x3, BN, ReLU, 1x1 to out, BN; plus shortcut.

    Nothing follows the sum. The wiring applies to the first two convolutions; the last
    one has few weights and mixes the groups of a grouped wiring.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        shortcut: str,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        if shortcut not in SHORTCUTS:
            raise ValueError(
                f"unknown shortcut {shortcut!r}: choose from {', '.join(SHORTCUTS)}"
            )
        if shortcut == "identity" and in_channels != out_channels:
            raise ValueError(
                "an identity shortcut requires equal widths, got "
                f"{in_channels} -> {out_channels} channels"
            )
        width = expansion * out_channels
        self.conv1 = wiring.conv(in_channels, width, 1, rngs=rngs)
        self.norm1 = BatchNorm(width)
        self.conv2 = wiring.conv(width, width, 3, padding=1, rngs=rngs)
        self.norm2 = BatchNorm(width)
        self.conv3 = Conv(width, out_channels, 1, rngs=rngs)
        self.norm3 = BatchNorm(out_channels)
        self.shortcut = shortcut
        if shortcut == "projection":
            self.projection = Conv(in_channels, out_channels, 1, rngs=rngs)
            self.projection_norm = BatchNorm(out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(self.conv1(x), "relu")
        y = self.norm2(self.conv2(y), "relu")
        y = self.norm3(self.conv3(y))
        if self.shortcut == "projection":
            return y + self.projection_norm(self.projection(x))
        return y + x if self.shortcut == "identity" else y


class Unit(nnx.Module):
    """The update of a segment: a sequence of bottlenecks, one for each shortcut."""

    def __init__(
        self, in_channels, out_channels, *, shortcuts, expansion, wiring, rngs
    ):
        if not shortcuts:
            raise ValueError("a unit needs at least one bottleneck, got shortcuts=()")
        bottlenecks, options = [], dict(expansion=expansion, wiring=wiring, rngs=rngs)
        for shortcut in shortcuts:
            block = Bottleneck(in_channels, out_channels, shortcut=shortcut, **options)
            bottlenecks.append(block)
            in_channels = out_channels
        self.bottlenecks = nnx.List(bottlenecks)

    def __call__(self, x: jax.Array) -> jax.Array:
        for bottleneck in self.bottlenecks:
            x = bottleneck(x)
        return x


def make_gunn_layer(
    channels: int,
    segments: int,
    *,
    shortcuts: Sequence[str],
    expansion: int = 2,
    order: Order = "gradual",
    wiring: Wiring = Wiring(),
    rngs: nnx.Rngs,
) -> Gradual:
    """Returns a layer that updates each segment from all channels."""
    options = dict(shortcuts=shortcuts, expansion=expansion, wiring=wiring)
    unit = lambda rngs: Unit(channels, channels // segments, **options, rngs=rngs)
    return Gradual(channels, segments, unit, order=order, rngs=rngs)


class Transition(nnx.Module):
    """1x1 convolution, BN, ReLU."""

    def __init__(self, in_channels, out_channels, *, rngs):
        self.conv = Conv(in_channels, out_channels, 1, rngs=rngs)
        self.norm = BatchNorm(out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x), "relu")


class Gunn(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes).

    channels, segments: of the GUNN layer in each stage; each stage halves the map.
    shortcuts: one for each bottleneck of a unit, in order. Published: ("projection",)
      for CIFAR and ("none",) for ImageNet.
    form: "cifar" has a 3x3 stem, pools after each transition and ends in another one;
      "imagenet" has a 7x7 stem with max pooling, pools the signed output of a layer
      before the transition, and ends in the last layer.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (240, 300, 360),
        segments: Sequence[int] = (20, 25, 30),
        expansion: int = 2,
        shortcuts: Sequence[str] = ("projection",),
        form: str = "cifar",
        order: Order = "gradual",
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        if form not in ("cifar", "imagenet"):
            raise ValueError(f"unknown form {form!r}: choose from cifar, imagenet")
        if len(channels) != len(segments) or not channels:
            raise ValueError(
                "channels and segments need one number per stage, got "
                f"{tuple(channels)} and {tuple(segments)}"
            )
        self.imagenet = form == "imagenet"
        geometry = dict(stride=2, padding=3) if self.imagenet else dict(padding=1)
        self.stem = Conv(3, 64, 7 if self.imagenet else 3, **geometry, rngs=rngs)
        self.stem_norm = BatchNorm(64)
        options = dict(shortcuts=tuple(shortcuts), expansion=expansion, order=order)
        options |= dict(wiring=wiring, rngs=rngs)
        transitions, layers, previous = [], [], 64
        for width, count in zip(channels, segments, strict=True):
            transitions.append(Transition(previous, width, rngs=rngs))
            layers.append(make_gunn_layer(width, count, **options))
            previous = width
        self.transitions, self.layers = nnx.List(transitions), nnx.List(layers)
        last = None if self.imagenet else Transition(previous, previous, rngs=rngs)
        self.last = last
        self.classifier = Linear(previous, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem_norm(self.stem(x), "relu")
        x = max_pool(x, 3, stride=2, padding=1) if self.imagenet else x
        for i, layer in enumerate(self.layers):
            x = average_pool(x, 2) if i and self.imagenet else x
            x = self.transitions[i](x)
            x = average_pool(x, 2) if i and not self.imagenet else x
            x = checkpoint_name(layer(x), "block")
        x = x if self.last is None else self.last(x)
        return self.classifier(global_average_pool(x))
