"""Residual networks. Here: cfmz, the CIFAR network of He et al. 2015 as built on neon.

Facts and measurements: cfmz (github.com/apark263/cfmz) on neon 1.2.1. Post-activation
blocks, parameter-free shortcuts (option A), and one addition to the paper: batch
normalisation over the ten logits instead of a bias.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nets.layers.conv import Conv, Linear, he_fan_in
from nets.layers.norm import BatchNorm
from nets.layers.pooling import global_average_pool
from nets.layers.wiring import Wiring

# neon 1.2.1: BN eps 1e-3, biased running variance that starts at 0.
NeonBatchNorm = functools.partial(
    BatchNorm, eps=1e-3, keep=0.9, running_var="biased", initial_var=0.0
)


def shortcut_a(x: jax.Array, out_channels: int, stride: int) -> jax.Array:
    """Option A: every stride-th pixel, then zero channels appended.

    cfmz writes it as a 1x1 convolution with an "Identity" initialiser, which its
    optimizer skips: never updated, never decayed, hence no parameters here.
    """
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out_channels - x.shape[-1])))


class Block(nnx.Module):
    """3x3 (stride), BN, ReLU, 3x3, BN; plus the shortcut; ReLU after the sum."""

    def __init__(self, in_channels, out_channels, stride, *, wiring, norm, init, rngs):
        conv = functools.partial(wiring.conv, padding=1, init=init, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride)
        self.norm1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.out_channels, self.stride = out_channels, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + shortcut_a(x, self.out_channels, self.stride))


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
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6 n + 2, which {depth} is not")
        options = dict(wiring=wiring, norm=NeonBatchNorm, init=he_fan_in, rngs=rngs)
        self.stem = Conv(3, 16, 3, padding=1, init=he_fan_in, rngs=rngs)
        self.stem_norm = NeonBatchNorm(16)
        stages, channels = [], 16
        for width in (16, 32, 64):
            blocks = []
            for _ in range((depth - 2) // 6):
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
