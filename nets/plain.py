"""The backbones of IGCNets (arXiv 1707.02725): plain and residual, CIFAR and ImageNet.

With the dense wiring they are the paper's regular nets (RegConv, ResNet); with the
interleaved wiring they are IGC-LxMy, where L is `primary_groups` and L M the `width`.
Facts from the authors' MXNet builders and symbol files. BN follows every convolution,
and ReLU most of them. A block that widens the map also halves its sides, except the
first block of an expanding first stage.
"""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, GroupedConv, Linear, he_fan_in
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# MXNet on CPU averages the biased variance. MXNet initialises it to 1, but the authors
# to 0 (`initial_var`).
MxBatchNorm = functools.partial(BatchNorm, eps=2e-5, running_var="biased")


class ConvBlock(nnx.Module):
    """A convolution or an interleaved pair, BN, and optionally ReLU."""

    def __init__(self, conv: nnx.Module, norm: BatchNorm, *, relu: bool = True):
        self.conv, self.norm, self.relu = conv, norm, relu

    def __call__(self, x: jax.Array, shortcut: jax.Array | None = None) -> jax.Array:
        """shortcut: a map that is added before the ReLU."""
        return self.norm(self.conv(x), "relu" if self.relu else None, shortcut)


class Unit(nnx.Module):
    """Two blocks, and the shortcut, which is added before the second ReLU.

    The shortcut is the input itself if the widths are equal, else a 1x1 convolution
    with the unit's stride and BN. In interleaved units it is grouped like the primary
    convolutions.
    old_transition: whether the *input* width instead of the output width determines
      the secondary groups of the first block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        old_transition: bool = False,
        norm=MxBatchNorm,
        wiring: Wiring,
        rngs: nnx.Rngs,
    ):
        shape = (in_channels, out_channels)
        options = dict(dense=dict(init=he_fan_in), rngs=rngs)
        old = wiring.partitions(in_channels)[1] if old_transition else None
        conv = wiring.conv(
            *shape, 3, stride=stride, padding=1, secondary_groups=old, **options
        )
        self.block1 = ConvBlock(conv, norm(out_channels))
        conv = wiring.conv(out_channels, out_channels, 3, padding=1, **options)
        self.block2 = ConvBlock(conv, norm(out_channels))
        if in_channels == out_channels:
            self.shortcut = None
            return
        if wiring.kind == "interleaved":
            groups, _ = wiring.partitions(out_channels)
            geometry = dict(stride=stride, groups=groups)
            conv = GroupedConv(*shape, 1, **geometry, init=he_fan_in, rngs=rngs)
        else:
            conv = wiring.conv(*shape, 1, stride=stride, **options)
        self.shortcut = ConvBlock(conv, norm(out_channels), relu=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.block2(self.block1(x), shortcut)


class Plain(nnx.Module):
    """Maps x (N, 32, 32, 3) to logits (N, num_classes), without shortcuts.

    depth: 3 n + 2 for n blocks in each of three stages.
    width: of the first stage; the others have two and four times as many channels.
    initial_var: running variance before the first step; the authors use 0.
    The original pools a fixed 8x8 window; pooling the whole map is the same for 32x32.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        width: int = 16,
        initial_var: float = 1.0,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        if depth < 5 or (depth - 2) % 3:
            raise ValueError(f"a plain net has depth 3 n + 2 with n > 0, got {depth}")
        norm = functools.partial(MxBatchNorm, keep=0.99, initial_var=initial_var)
        stem = Conv(3, width, 3, padding=1, init=he_fan_in, rngs=rngs)
        self.stem = ConvBlock(stem, norm(width))

        def block(in_channels, out_channels, stride):
            options = dict(padding=1, dense=dict(init=he_fan_in), rngs=rngs)
            conv = wiring.conv(in_channels, out_channels, 3, stride=stride, **options)
            return ConvBlock(conv, norm(out_channels))

        widths = [width, 2 * width, 4 * width]
        self.stages = _stages(block, width, widths, [(depth - 2) // 3] * 3)
        self.classifier = Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for blocks in self.stages:
            for block in blocks:
                x = checkpoint_name(block(x), "block")
        return self.classifier(global_average_pool(x))


class IgcResNet(nnx.Module):
    """Maps x (N, 32, 32, 3) to logits (N, num_classes); "+Ident." of the paper.

    depth: 2 + 2 (n1 + n2 + n3) for n1 <= n2 <= n3 <= n1 + 1 units in the three stages.
      As in the original, an odd depth builds the net of depth - 1.
    transition_secondary: secondary groups of the blocks that widen an interleaved net.
      "old": the narrower stage's number, as in the original, which doubles the
      secondary weights. "new": the block is canonical. No effect on other wirings.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        width: int = 16,
        transition_secondary: str = "old",
        initial_var: float = 1.0,
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        if transition_secondary not in ("old", "new"):
            raise ValueError(
                f"unknown transition_secondary {transition_secondary!r}: choose from "
                "old, new"
            )
        norm = functools.partial(MxBatchNorm, initial_var=initial_var)
        conv = Conv(3, width, 3, padding=1, init=he_fan_in, rngs=rngs)
        self.stem = ConvBlock(conv, norm(width))
        old = transition_secondary == "old"
        options = dict(old_transition=old, norm=norm, wiring=wiring, rngs=rngs)
        unit = functools.partial(Unit, **options)
        widths = [width, 2 * width, 4 * width]
        self.stages = _stages(unit, width, widths, units_per_stage(depth))
        self.classifier = Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _through(self.stages, self.stem(x))
        return self.classifier(global_average_pool(x))


class IgcImageNetResNet(nnx.Module):
    """Maps x (N, 224, 224, 3) to logits (N, num_classes). Published with depth 18 only.

    depth: 8 n + 2 for n units in each of four stages.
    width: of the stem.
    expand_first_stage: whether the first stage is twice as wide as the stem. IGC-L100M2
      expands, and L doubles with the width (primary_groups=0, secondary_groups=2). In
      the other nets L is constant and M doubles (L4M32: width 128, primary_groups=4).
    The original pools a fixed 7x7 window; pooling the whole map is the same at 224x224.
    """

    def __init__(
        self,
        *,
        depth: int = 18,
        width: int = 64,
        expand_first_stage: bool = False,
        initial_var: float = 1.0,
        wiring: Wiring = Wiring(),
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or (depth - 2) % 8:
            raise ValueError(
                f"this ImageNet ResNet has depth 8 n + 2 with n > 0, got {depth}"
            )
        norm = functools.partial(MxBatchNorm, initial_var=initial_var)
        conv = Conv(3, width, 7, stride=2, padding=3, init=he_fan_in, rngs=rngs)
        self.stem = ConvBlock(conv, norm(width))
        unit = functools.partial(Unit, norm=norm, wiring=wiring, rngs=rngs)
        first = 2 * width if expand_first_stage else width
        widths = [first, 2 * first, 4 * first, 8 * first]
        self.stages = _stages(unit, width, widths, [(depth - 2) // 8] * 4)
        self.classifier = Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(self.stem(x), 3, stride=2, padding=1)
        return self.classifier(global_average_pool(_through(self.stages, x)))


def units_per_stage(depth: int) -> list[int]:
    """Returns the number of units in each stage of a residual CIFAR net."""
    if depth < 8:
        raise ValueError(
            "a residual CIFAR net has a unit in each of three stages, so its depth is "
            f"at least 8, got {depth}"
        )
    units = []
    for stages_left in (3, 2, 1):
        units.append((depth - 2 - 2 * sum(units)) // (2 * stages_left))
    return units


def _stages(block, channels: int, widths: list[int], counts: list[int]) -> nnx.List:
    """Builds the blocks of each stage by block(in, out, stride)."""
    stages = []
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        blocks = []
        for i in range(count):
            blocks.append(block(channels, width, 2 if stage and not i else 1))
            channels = width
        stages.append(nnx.List(blocks))
    return nnx.List(stages)


def _through(stages, x: jax.Array) -> jax.Array:
    for blocks in stages:
        for block in blocks:
            x = block(x)
    return x
