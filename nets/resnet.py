"""Residual networks: fb.resnet.torch's two, and cfmz's.

ResNet: fb.resnet.torch (github.com/facebookarchive/fb.resnet.torch), post-activation
and pre-activation, for CIFAR and ImageNet; with the expander wiring the X-ResNet of
Deep Expander Networks. CfmzResNet: the CIFAR network of He et al. 2015 as cfmz
(github.com/apark263/cfmz) builds it on neon 1.2.1, with one addition to the paper:
batch normalisation over the ten logits instead of a bias.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nets.layers.conv import Conv, Linear, he_fan_in, he_fan_out, torch_default
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# neon 1.2.1: BN eps 1e-3, biased running variance that starts at 0.
NeonBatchNorm = functools.partial(
    BatchNorm, eps=1e-3, keep=0.9, running_var="biased", initial_var=0.0
)


# ImageNet: blocks of each stage, and whether they are bottlenecks.
IMAGENET = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


class Shortcut(nnx.Module):
    """How a block's input reaches its sum, in `kind` of He et al. 2015.

    A: every stride-th pixel, then zero channels appended; no parameters (cfmz writes
      it as a 1x1 convolution with an "Identity" initialiser which its optimizer skips).
    B: a 1x1 convolution, with `norm` if given, where the width changes; C: everywhere.
    """

    def __init__(self, in_channels, out_channels, stride, *, kind, norm, init, rngs):
        if kind not in ("A", "B", "C"):
            raise ValueError(f"unknown shortcut {kind!r}: choose from A, B, C")
        if kind == "A" and out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"shortcut A keeps or doubles the width, but {in_channels} channels "
                f"meet {out_channels}: choose shortcut B or C"
            )
        projects = kind == "C" or (kind == "B" and in_channels != out_channels)
        channels, options = (in_channels, out_channels), dict(init=init, rngs=rngs)
        self.conv = Conv(*channels, 1, stride=stride, **options) if projects else None
        self.norm = norm(out_channels) if projects and norm else None
        self.stride, self.missing = stride, out_channels - in_channels

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.conv is None:
            x = x[:, :: self.stride, :: self.stride]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.missing)))
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


def _branch(in_channels: int, out_channels: int, stride: int, bottleneck: bool):
    """(in, out, kernel size, stride) of the convolutions of a residual branch.

    A bottleneck's stride is on its 3x3: fb.resnet.torch's deviation from the paper.
    """
    if not bottleneck:
        first = (in_channels, out_channels, 3, stride)
        return (first, (out_channels, out_channels, 3, 1))
    width = out_channels // 4
    return (
        (in_channels, width, 1, 1),
        (width, width, 3, stride),
        (width, out_channels, 1, 1),
    )


class Block(nnx.Module):
    """Convolutions, each with BN, ReLU between them; plus the shortcut; then ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        bottleneck: bool = False,
        shortcut: str = "A",
        norm=BatchNorm,
        init=he_fan_out,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        geometry = _branch(in_channels, out_channels, stride, bottleneck)
        for i, (inputs, outputs, size, step) in enumerate(geometry, 1):
            options = dict(stride=step, padding=size // 2, init=init, rngs=rngs)
            setattr(self, f"conv{i}", wiring.conv(inputs, outputs, size, **options))
            setattr(self, f"norm{i}", norm(outputs))
        self.shortcut = Shortcut(
            in_channels,
            out_channels,
            stride,
            kind=shortcut,
            norm=norm,
            init=init,
            rngs=rngs,
        )
        self.depth = len(geometry)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = nnx.relu(y) if i < self.depth else y
        return nnx.relu(y + self.shortcut(x))


class PreactBlock(nnx.Module):
    """BN and ReLU before each convolution; plus the shortcut; nothing after the sum.

    `activation` of the input: "both" (of branch and shortcut: the first block of a
    stage), "branch" (the later ones), "none" (the first after ImageNet's stem, which
    has ended in BN, ReLU and pool).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        bottleneck: bool,
        shortcut: str,
        activation: str,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        geometry = _branch(in_channels, out_channels, stride, bottleneck)
        for i, (inputs, outputs, size, step) in enumerate(geometry, 1):
            norm = BatchNorm(inputs) if i > 1 or activation != "none" else None
            setattr(self, f"norm{i}", norm)
            options = dict(stride=step, padding=size // 2, rngs=rngs)
            setattr(self, f"conv{i}", wiring.conv(inputs, outputs, size, **options))
        self.shortcut = Shortcut(
            in_channels,
            out_channels,
            stride,
            kind=shortcut,
            norm=None,
            init=he_fan_out,
            rngs=rngs,
        )
        self.depth, self.activation = len(geometry), activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.norm1 is None else nnx.relu(self.norm1(x))
        shortcut = self.shortcut(y if self.activation == "both" else x)
        y = self.conv1(y)
        for i in range(2, self.depth + 1):
            y = getattr(self, f"conv{i}")(nnx.relu(getattr(self, f"norm{i}")(y)))
        return y + shortcut


class ResNet(nnx.Module):
    """x (N, H, W, 3) -> logits (N, num_classes).

    depth: 6 n + 2 for form "cifar" (32x32), a key of IMAGENET for form "imagenet"
      (224x224). shortcut: A, B or C; fb.resnet.torch's defaults are A and B.
    torch_bias: the classifier's initial bias is torch's U(-1/sqrt(in), 1/sqrt(in)), as
      X-ResNet's is, not 0.
    The wiring is that of the residual branches; stem, shortcuts and classifier are
    dense, as in X-ResNet. The originals pool fixed 8x8 or 7x7 windows, here the whole
    map, which is the same at the published sizes.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        form: str = "cifar",
        shortcut: str = "A",
        preactivation: bool = False,
        torch_bias: bool = False,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        width, counts, bottleneck = _plan(form, depth)
        channels, imagenet = width, form == "imagenet"
        stem = dict(stride=2, padding=3) if imagenet else dict(padding=1)
        self.stem = Conv(3, channels, 7 if imagenet else 3, **stem, rngs=rngs)
        bare = preactivation and not imagenet
        self.stem_norm = None if bare else BatchNorm(channels)
        options = dict(
            bottleneck=bottleneck, shortcut=shortcut, wiring=wiring, rngs=rngs
        )
        stages = []
        for stage, count in enumerate(counts):
            blocks = []
            for i in range(count):
                out = width * 2**stage * (4 if bottleneck else 1)
                geometry = (channels, out, 2 if stage and not i else 1)
                if preactivation:
                    first = "none" if imagenet and not stage else "both"
                    activation = "branch" if i else first
                    block = PreactBlock(*geometry, activation=activation, **options)
                else:
                    block = Block(*geometry, **options)
                blocks.append(block)
                channels = out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.norm = BatchNorm(channels) if preactivation else None
        bias = dict(bias_init=torch_default(channels)) if torch_bias else {}
        self.classifier = Linear(channels, num_classes, **bias, rngs=rngs)
        self.pool = imagenet

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x if self.stem_norm is None else nnx.relu(self.stem_norm(x))
        x = max_pool(x, 3, stride=2, padding=1) if self.pool else x
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        x = x if self.norm is None else nnx.relu(self.norm(x))
        return self.classifier(global_average_pool(x))


def _plan(form: str, depth: int) -> tuple[int, tuple[int, ...], bool]:
    """Width of the first stage, blocks of each stage, whether they are bottlenecks."""
    if form == "cifar":
        return 16, (_cifar_blocks(depth),) * 3, False
    if form != "imagenet":
        raise ValueError(f"unknown form {form!r}: choose from cifar, imagenet")
    if depth not in IMAGENET:
        raise ValueError(
            f"an ImageNet ResNet has depth {', '.join(map(str, IMAGENET))}, not {depth}"
        )
    return 64, *IMAGENET[depth]


def _cifar_blocks(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6 n + 2, which {depth} is not")
    return (depth - 2) // 6


class CfmzResNet(nnx.Module):
    """x (N, 32, 32, 3) -> logits (N, num_classes) of the 6n+2-layer network.

    Even-sized maps are strided with padding (1, 1), anchored at -1 (not "SAME").
    Training logits are normalised over the batch, so they depend on its class mix.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        blocks_per_stage = _cifar_blocks(depth)
        options = dict(wiring=wiring, norm=NeonBatchNorm, init=he_fan_in, rngs=rngs)
        self.stem = Conv(3, 16, 3, padding=1, init=he_fan_in, rngs=rngs)
        self.stem_norm = NeonBatchNorm(16)
        stages, channels = [], 16
        for width in (16, 32, 64):
            blocks = []
            for _ in range(blocks_per_stage):
                stride = 1 if width == channels else 2
                blocks.append(Block(channels, width, stride, **options))
                channels = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.classifier = Linear(64, num_classes, bias=False, init=he_fan_in, rngs=rngs)
        self.classifier_norm = NeonBatchNorm(num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.classifier_norm(self.classifier(global_average_pool(x)))
