"""The backbones of IGCNets (arXiv 1707.02725): plain and residual, CIFAR and ImageNet.

Dense they are its regular nets (RegConv, ResNet); with the interleaved wiring IGC-LxMy,
L being `primary_groups` and L M the `width`. Facts: the authors' MXNet builders and
symbol files. Every layer is convolution, BN and mostly ReLU; each block that widens
the map also halves its sides, but for the first of an expanding first stage.
"""

import functools

import jax
from flax import nnx

from nets.layers.conv import Conv, Linear, he_fan_in
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# MXNet on CPU keeps the biased variance. The authors started it at 0, as `initial_var`
# can; MXNet itself starts at 1.
MxBatchNorm = functools.partial(BatchNorm, eps=2e-5, running_var="biased")


class ConvBlock(nnx.Module):
    """A convolution, which may be an interleaved pair, its BN, and a ReLU if asked."""

    def __init__(self, conv: nnx.Module, norm: BatchNorm, *, relu: bool = True):
        self.conv, self.norm, self.relu = conv, norm, relu

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.conv(x))
        return nnx.relu(x) if self.relu else x


class Unit(nnx.Module):
    """Two blocks, the second without ReLU; plus the shortcut; ReLU after the sum.

    The shortcut is the input itself where the widths agree, else a 1x1 convolution
    with the unit's stride, and BN. Interleaved units group it like their primaries.
    old_transition: the secondary groups of the first block are as many as the *input*
      width has, not the output width.
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
        options = dict(init=he_fan_in, rngs=rngs)
        old = wiring.partitions(in_channels)[1] if old_transition else None
        shape, geometry = (in_channels, out_channels), dict(stride=stride, **options)
        conv = wiring.conv(*shape, 3, padding=1, secondary_groups=old, **geometry)
        self.block1 = ConvBlock(conv, norm(out_channels))
        conv = wiring.conv(out_channels, out_channels, 3, padding=1, **options)
        self.block2 = ConvBlock(conv, norm(out_channels), relu=False)
        if in_channels == out_channels:
            self.shortcut = None
            return
        if wiring.kind == "interleaved":
            primary, _ = wiring.partitions(out_channels)
            conv = Conv(*shape, 1, groups=primary, **geometry)
        else:
            conv = wiring.conv(*shape, 1, **geometry)
        self.shortcut = ConvBlock(conv, norm(out_channels), relu=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.block2(self.block1(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Plain(nnx.Module):
    """x (N, 32, 32, 3) -> logits (N, num_classes); no shortcuts.

    depth: 3 n + 2, n blocks a stage. width: of the first stage, doubled twice.
    initial_var: running variance before the first step; the authors' is 0.
    The original pools a fixed 8x8 window, here the whole map: the same for 32x32.
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
            raise ValueError(f"a plain net has depth 3 n + 2, which {depth} is not")
        norm = functools.partial(MxBatchNorm, keep=0.99, initial_var=initial_var)
        options = dict(padding=1, init=he_fan_in, rngs=rngs)
        self.stem = ConvBlock(Conv(3, width, 3, **options), norm(width))

        def block(in_channels, out_channels, stride):
            conv = wiring.conv(in_channels, out_channels, 3, stride=stride, **options)
            return ConvBlock(conv, norm(out_channels))

        widths = [width, 2 * width, 4 * width]
        self.stages = _stages(block, width, widths, [(depth - 2) // 3] * 3)
        self.classifier = Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _through(self.stages, self.stem(x))
        return self.classifier(global_average_pool(x))


class IgcResNet(nnx.Module):
    """x (N, 32, 32, 3) -> logits (N, num_classes): "+Ident." of the paper.

    depth: 2 + 2 (n1 + n2 + n3) with n1 <= n2 <= n3 <= n1 + 1 units; as in the original
      an odd depth makes the net of depth - 1.
    transition_secondary: secondary groups where an interleaved net widens. The
      original has the "old" number there, that of the narrower stage, and so twice the
      secondary weights; "new" is the canonical block. Other wirings ignore it.
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
    """x (N, 224, 224, 3) -> logits (N, num_classes). All published ones have depth 18.

    depth: 8 n + 2, n units in each of four stages. width: of the stem.
    expand_first_stage: the first stage is already twice as wide (IGC-L100M2 is, with
      the wiring's primary_groups=0, secondary_groups=2: partitions double with the
      width). Else L stays and M doubles (L4M32: width 128, primary_groups=4).
    The original pools a fixed 7x7 window, here the whole map: the same for 224x224.
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
                f"this ImageNet ResNet has depth 8 n + 2, which {depth} is not"
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
    """How a residual CIFAR net of any depth from 8 on spreads its units."""
    if depth < 8:
        raise ValueError(
            f"a residual CIFAR net has at least depth 8, a unit in each of three "
            f"stages, not {depth}"
        )
    units = []
    for stages_left in (3, 2, 1):
        units.append((depth - 2 - 2 * sum(units)) // (2 * stages_left))
    return units


def _stages(block, channels: int, widths: list[int], counts: list[int]) -> nnx.List:
    """Blocks (in, out, stride) of each stage; the later stages start with stride 2."""
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
