"""MobileNet, the backbone of X-MobileNet (Deep Expander Networks).

Source: the published code's mobilenet with the group types full (dense), groups and
expander. The published operation counts do not match its widths; they match
`textbook_widths`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import Conv, Linear, torch_default
from nets.layers.norm import torch_batch_norm
from nets.layers.pooling import global_average_pool
from nets.layers.wiring import Wiring

# (width at multiplier 1, stride of the depthwise convolution) of the published blocks.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *(5 * ((512, 1),)),
    *((1024, 2), (1024, 1)),
)


class SeparableBlock(nnx.Module):
    """Depthwise 3x3 with stride, BN, ReLU6, pointwise 1x1, BN, ReLU6.

    The wiring applies to the pointwise convolution.
    """

    def __init__(self, in_channels, out_channels, stride, *, wiring, norm_scale, rngs):
        # The fan in torch 0.3 counts the channels of all groups.
        self.depthwise = Conv(
            in_channels,
            in_channels,
            3,
            stride=stride,
            padding=1,
            groups=in_channels,
            init=torch_default(9 * in_channels),
            rngs=rngs,
        )
        self.depthwise_norm = torch_batch_norm(in_channels, norm_scale, rngs)
        # A share of 1 / compress of all pairs, whichever side samples.
        partners = wiring.partners(in_channels, out_channels)
        self.pointwise = wiring.conv(
            in_channels,
            out_channels,
            1,
            dense=dict(init=torch_default(in_channels)),
            degree=partners // wiring.compress,
            rngs=rngs,
        )
        self.pointwise_norm = torch_batch_norm(out_channels, norm_scale, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.depthwise_norm(self.depthwise(x), "relu6")
        return self.pointwise_norm(self.pointwise(x), "relu6")


class MobileNet(nnx.Module):
    """Maps x (N, H, W, 3) to logits (N, num_classes); published for 224x224.

    blocks: for each block (width at multiplier 1, stride of the depthwise convolution).
    width: multiplier of all widths, except for the stem (32) and the last block (1024).
    textbook_widths: whether to multiply these two as well.
    classifier_inputs: inputs of the classifier, padded with zeros; 0: the width of the
      last block. The published counts of X-MobileNet0.5 assume textbook widths, with
      512 maps in the last block, but a classifier with 1024 inputs.
    norm_scale: initial BN scales, "ones" or "uniform" (torch 0.3: U(0, 1)).
    The first block's pointwise convolution is always dense. The original pools a fixed
    7x7 window; pooling the whole map is the same at 224x224.
    """

    def __init__(
        self,
        *,
        blocks: tuple[tuple[int, int], ...] = BLOCKS,
        width: float = 1.0,
        textbook_widths: bool = False,
        classifier_inputs: int = 0,
        norm_scale: str = "ones",
        wiring: Wiring = Wiring(),
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        options = dict(norm_scale=norm_scale, rngs=rngs)
        channels = int(32 * width) if textbook_widths else 32
        self.stem = Conv(
            3, channels, 3, stride=2, padding=1, init=torch_default(27), rngs=rngs
        )
        self.stem_norm = torch_batch_norm(channels, norm_scale, rngs)
        layers, block_wiring = [], Wiring()
        for i, (out, stride) in enumerate(blocks, 1):
            if textbook_widths or i < len(blocks):
                out = int(out * width)
            geometry = (channels, out, stride)
            layers.append(SeparableBlock(*geometry, wiring=block_wiring, **options))
            channels, block_wiring = out, wiring
        self.blocks = nnx.List(layers)
        self.missing = (classifier_inputs or channels) - channels
        if self.missing < 0:
            raise ValueError(
                f"classifier_inputs must be 0 or at least the {channels} maps of the "
                f"last block, got {classifier_inputs}"
            )
        inputs = channels + self.missing
        default = dict(bias_init=torch_default(inputs))
        self.classifier = Linear(inputs, num_classes, rngs=rngs, **default)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem_norm(self.stem(x), "relu")
        for block in self.blocks:
            x = checkpoint_name(block(x), "block")
        x = global_average_pool(x)
        return self.classifier(jnp.pad(x, ((0, 0), (0, self.missing))))
