"""VGG for 32x32 images, the backbone of X-VGG (Deep Expander Networks).

Source: the published code's vgg16cifar, vgg16cifar_bn, vgg16cifarexpander and
vgg16cifar_bnexpander, and the layer lists for depth 11, 13 and 19 in the same files.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Linear, torch_default
from nets.layers.norm import torch_batch_norm
from nets.layers.pooling import global_average_pool, max_pool
from nets.layers.wiring import Wiring

# depth: widths of the convolutions of each stage; a max pooling ends each stage.
STAGES = {
    11: ((64,), (128,), 2 * (256,), 2 * (512,), 2 * (512,)),
    13: (2 * (64,), 2 * (128,), 2 * (256,), 2 * (512,), 2 * (512,)),
    16: (2 * (64,), 2 * (128,), 3 * (256,), 3 * (512,), 3 * (512,)),
    19: (2 * (64,), 2 * (128,), 4 * (256,), 4 * (512,), 4 * (512,)),
}
# depth: expander degrees of all convolutions after the stem. The published log for
# depth 16 is named "64*3_16*9_128"; 128 is the degree of the hidden linear layer.
DEGREES = {
    11: 3 * (32,) + 4 * (64,),
    13: (16,) + 4 * (32,) + 4 * (64,),
    16: 3 * (64,) + 9 * (16,),
    19: (16,) + 6 * (32,) + 8 * (64,),
}
HIDDEN_DEGREE = 128


class ConvBlock(nnx.Module):
    """3x3 convolution, optionally BN, ReLU."""

    def __init__(self, conv: nnx.Module, norm: nnx.Module | None):
        self.conv, self.norm = conv, norm

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return nnx.relu(x) if self.norm is None else self.norm(x, "relu")


class VGG(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes); published for 32x32, the minimum.

    depth: a key of STAGES. The stem and the last linear layer are always dense.
    batch_norm: whether BN follows every convolution. Without it, the expander net still
      normalises after its stem; its signals shrink with the density of each layer, as
      in the original.
    published_degrees: for the expander wiring. True: layers have the absolute DEGREES,
      and `compress` has no effect; a convolution with no more inputs than its degree is
      dense with bias. False: in // compress connections, as in the other backbones.
    norm_scale: initial BN scales, "ones" or "uniform" (torch 0.3: U(0, 1)).
    The original has ten classes and flattens its last map of one pixel, which equals
    pooling.
    """

    def __init__(
        self,
        *,
        depth: int = 16,
        batch_norm: bool = True,
        published_degrees: bool = True,
        norm_scale: str = "ones",
        wiring: Wiring = Wiring(),
        num_classes: int = 10,
        rngs: nnx.Rngs,
    ):
        if depth not in STAGES:
            raise ValueError(
                f"a VGG has depth {', '.join(map(str, STAGES))}, got {depth}"
            )
        expander = wiring.kind == "expander"
        published = expander and published_degrees
        degrees = DEGREES[depth] if published else len(DEGREES[depth]) * (None,)
        stem = (Wiring(), None, batch_norm or expander)
        layers = iter([stem, *((wiring, degree, batch_norm) for degree in degrees)])
        stages, channels = [], 3
        for widths in STAGES[depth]:
            blocks = []
            for width in widths:
                layer_wiring, degree, normalised = next(layers)
                conv = _conv(channels, width, layer_wiring, degree, rngs)
                norm = torch_batch_norm(width, norm_scale, rngs) if normalised else None
                blocks.append(ConvBlock(conv, norm))
                channels = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        dense = dict(bias_init=torch_default(channels))
        options = dict(dense=dense, degree=HIDDEN_DEGREE if published else None)
        self.hidden = wiring.linear(channels, channels, **options, rngs=rngs)
        self.classifier = Linear(channels, num_classes, **dense, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for blocks in self.stages:
            for block in blocks:
                x = checkpoint_name(block(x), "block")
            x = max_pool(x, 2, stride=2)
        return self.classifier(nnx.relu(self.hidden(global_average_pool(x))))


def _conv(in_channels, out_channels, wiring, degree, rngs) -> nnx.Module:
    if degree is not None and degree >= in_channels:
        wiring = Wiring()
    options = dict(padding=1, dense=dict(bias=True), degree=degree, rngs=rngs)
    return wiring.conv(in_channels, out_channels, 3, **options)
