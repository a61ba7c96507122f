"""The residual networks of fb.resnet.torch and cfmz.

ResNet: fb.resnet.torch (github.com/facebookarchive/fb.resnet.torch), post-activation
and pre-activation, for CIFAR and ImageNet; with the expander wiring it is the X-ResNet
of Deep Expander Networks. CfmzResNet: the CIFAR network of He et al. 2015 as cfmz
(github.com/apark263/cfmz) builds it on neon 1.2.1, which differs from the paper in one
point: the ten logits are batch-normalised and have no bias.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, Linear, he_fan_in, he_fan_out, torch_default
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# neon 1.2.1: BN eps 1e-3, biased running variance that starts at 0.
NeonBatchNorm = functools.partial(
    BatchNorm, eps=1e-3, keep=0.9, running_var="biased", initial_var=0.0
)
# For ImageNet. depth: blocks of each stage, and whether they are bottlenecks.
IMAGENET = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


class Shortcut(nnx.Module):
    """Maps the input of a block to the shape of its output.

    kind: an option of He et al. 2015.
      A: subsamples by `stride` and appends zero channels; no parameters (cfmz writes it
        as a 1x1 convolution with an "Identity" initialiser that its optimizer skips).
      B: a 1x1 convolution, with `norm` if given, if the width changes; else A.
      C: a 1x1 convolution in every block.
    """

    def __init__(self, in_channels, out_channels, stride, *, kind, norm, init, rngs):
        if kind not in ("A", "B", "C"):
            raise ValueError(f"unknown shortcut {kind!r}: choose from A, B, C")
        if kind == "A" and out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"shortcut A requires an equal or doubled width, got {in_channels} -> "
                f"{out_channels} channels: choose shortcut B or C"
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


class BasicBlock(nnx.Module):
    """3x3, BN, ReLU, 3x3, BN; plus the shortcut; then ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str = "A",
        norm=BatchNorm,
        init=he_fan_out,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        channels = (in_channels, out_channels)
        conv = functools.partial(wiring.conv, dense=dict(init=init), rngs=rngs)
        self.conv1 = conv(*channels, 3, stride=stride, padding=1)
        self.norm1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        options = dict(kind=shortcut, norm=norm, init=init, rngs=rngs)
        self.shortcut = Shortcut(*channels, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(self.conv1(x), "relu")
        return self.norm2(self.conv2(y), "relu", self.shortcut(x))


class BottleneckBlock(nnx.Module):
    """1x1 to a quarter of the width, 3x3, 1x1, with BN and ReLU as in `BasicBlock`.

    The 3x3 convolution has the stride, where fb.resnet.torch deviates from the paper.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        width = out_channels // 4
        self.conv1 = wiring.conv(in_channels, width, 1, rngs=rngs)
        self.norm1 = BatchNorm(width)
        self.conv2 = wiring.conv(width, width, 3, stride=stride, padding=1, rngs=rngs)
        self.norm2 = BatchNorm(width)
        self.conv3 = wiring.conv(width, out_channels, 1, rngs=rngs)
        self.norm3 = BatchNorm(out_channels)
        options = dict(kind=shortcut, norm=BatchNorm, init=he_fan_out, rngs=rngs)
        self.shortcut = Shortcut(in_channels, out_channels, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(self.conv1(x), "relu")
        y = self.norm2(self.conv2(y), "relu")
        return self.norm3(self.conv3(y), "relu", self.shortcut(x))


class PreactBasicBlock(nnx.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3; plus the shortcut; nothing after the sum.

    activation: where the first BN and ReLU apply. "both": to branch and shortcut (the
      first block of a stage). "branch": to the branch alone (later blocks). "none":
      nowhere (the first block for ImageNet, whose stem ends in BN, ReLU, pool).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str,
        activation: str,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        channels = (in_channels, out_channels)
        self.norm1 = None if activation == "none" else BatchNorm(in_channels)
        self.conv1 = wiring.conv(*channels, 3, stride=stride, padding=1, rngs=rngs)
        self.norm2 = BatchNorm(out_channels)
        self.conv2 = wiring.conv(out_channels, out_channels, 3, padding=1, rngs=rngs)
        options = dict(kind=shortcut, norm=None, init=he_fan_out, rngs=rngs)
        self.shortcut = Shortcut(*channels, stride, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.norm1 is None else self.norm1(x, "relu")
        shortcut = self.shortcut(y if self.activation == "both" else x)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y, "relu"))
        return checkpoint_name(y + shortcut, "block")


class PreactBottleneckBlock(nnx.Module):
    """BN, ReLU and convolution three times, as in `BottleneckBlock`; plus the shortcut.

    activation: see `PreactBasicBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        shortcut: str,
        activation: str,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        width = out_channels // 4
        self.norm1 = None if activation == "none" else BatchNorm(in_channels)
        self.conv1 = wiring.conv(in_channels, width, 1, rngs=rngs)
        self.norm2 = BatchNorm(width)
        self.conv2 = wiring.conv(width, width, 3, stride=stride, padding=1, rngs=rngs)
        self.norm3 = BatchNorm(width)
        self.conv3 = wiring.conv(width, out_channels, 1, rngs=rngs)
        options = dict(kind=shortcut, norm=None, init=he_fan_out, rngs=rngs)
        self.shortcut = Shortcut(in_channels, out_channels, stride, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.norm1 is None else self.norm1(x, "relu")
        shortcut = self.shortcut(y if self.activation == "both" else x)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y, "relu"))
        y = self.conv3(self.norm3(y, "relu"))
        return checkpoint_name(y + shortcut, "block")


class ResNet(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes).

    form: "cifar" for 32x32, "imagenet" for 224x224.
    depth: 6 n + 2 for CIFAR, a key of IMAGENET for ImageNet.
    shortcut: A, B or C; fb.resnet.torch's default is A for CIFAR and B for ImageNet.
    torch_bias: initialises the classifier's bias as torch and X-ResNet do, with
      U(-1/sqrt(in), 1/sqrt(in)), instead of 0.
    The wiring applies to the residual branches; stem, shortcuts and classifier are
    dense, as in X-ResNet. The originals pool fixed windows of 8x8 or 7x7, which equals
    pooling the whole map at the published sizes.
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
        options = dict(shortcut=shortcut, wiring=wiring, rngs=rngs)
        if preactivation:
            block = PreactBottleneckBlock if bottleneck else PreactBasicBlock
        else:
            block = BottleneckBlock if bottleneck else BasicBlock
        stages = []
        for stage, count in enumerate(counts):
            out, blocks = width * 2**stage * (4 if bottleneck else 1), []
            for i in range(count):
                if preactivation:
                    first = "none" if imagenet and not stage else "both"
                    options["activation"] = "branch" if i else first
                stride = 2 if stage and not i else 1
                blocks.append(block(channels, out, stride, **options))
                channels = out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.norm = BatchNorm(channels) if preactivation else None
        bias = dict(bias_init=torch_default(channels)) if torch_bias else {}
        self.classifier = Linear(channels, num_classes, **bias, rngs=rngs)
        self.pool = imagenet

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x if self.stem_norm is None else self.stem_norm(x, "relu")
        x = max_pool(x, 3, stride=2, padding=1) if self.pool else x
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        x = x if self.norm is None else self.norm(x, "relu")
        return self.classifier(global_average_pool(x))


def _plan(form: str, depth: int) -> tuple[int, tuple[int, ...], bool]:
    """Returns the first width, the blocks per stage, whether they are bottlenecks."""
    if form == "cifar":
        return 16, (_cifar_blocks(depth),) * 3, False
    if form != "imagenet":
        raise ValueError(f"unknown form {form!r}: choose from cifar, imagenet")
    if depth not in IMAGENET:
        raise ValueError(
            f"an ImageNet ResNet has depth {', '.join(map(str, IMAGENET))}, got {depth}"
        )
    return 64, *IMAGENET[depth]


def _cifar_blocks(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6 n + 2 with n > 0, got {depth}")
    return (depth - 2) // 6


class CfmzResNet(nnx.Module):
    """Maps x (N, 32, 32, 3) to logits (N, num_classes); depth 6 n + 2.

    Strided convolutions pad (1, 1), so their windows start at -1, unlike "SAME". In
    training, logits are normalised over the batch and so depend on its classes.
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
                blocks.append(BasicBlock(channels, width, stride, **options))
                channels = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.classifier = Linear(64, num_classes, bias=False, init=he_fan_in, rngs=rngs)
        self.classifier_norm = NeonBatchNorm(num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem_norm(self.stem(x), "relu")
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.classifier_norm(self.classifier(global_average_pool(x)))
