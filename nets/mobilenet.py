"""MobileNet, the backbone of X-MobileNet (Deep Expander Networks).

Source: the published code's one mobilenet, with its group types full (dense), groups
and expander. Its widths are not those that the published operation counts are of:
`textbook_widths`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from nets.layers.conv import Conv, Linear, torch_default
from nets.layers.norm import torch_batch_norm
from nets.layers.pooling import global_average_pool
from nets.layers.wiring import Wiring

# (width at multiplier 1, stride of the depthwise convolution) of each published block.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *(5 * ((512, 1),)),
    *((1024, 2), (1024, 1)),
)


class SeparableBlock(nnx.Module):
    """Depthwise 3x3 (stride), BN, ReLU6, pointwise 1x1, BN, ReLU6.

    Only the pointwise convolution is wired; no expander or grouped form of the
    depthwise one exists.
    """

    def __init__(self, in_channels, out_channels, stride, *, wiring, norm_scale, rngs):
        # torch 0.3 counts all channels in the fan, grouped or not.
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
        # The share 1 / compress whichever side samples, not in // compress.
        partners = wiring.partners(in_channels, out_channels)
        self.pointwise = wiring.conv(
            in_channels,
            out_channels,
            1,
            degree=partners // wiring.compress,
            init=torch_default(in_channels),
            rngs=rngs,
        )
        self.pointwise_norm = torch_batch_norm(out_channels, norm_scale, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.depthwise_norm(self.depthwise(x)))
        return nnx.relu6(self.pointwise_norm(self.pointwise(x)))


class MobileNet(nnx.Module):
    """x (N, H, W, 3) -> logits (N, num_classes); published for 224x224.

    blocks: (width at multiplier 1, stride of the depthwise convolution) of each.
    width: multiplier of the widths. The stem (32) and the last block (1024) keep
      theirs, unless `textbook_widths`: then every width is multiplied.
    classifier_inputs: 0: as many as the last block has maps. More: the missing ones
      are zeros. The published counts of X-MobileNet0.5 are those of the textbook
      widths, 512 maps at the end, and yet a classifier of 1024 inputs.
    norm_scale: initial scales of BN, "ones" or "uniform" (torch 0.3: U(0, 1)).
    The first block's pointwise convolution is always dense. The original pools a fixed
    7x7 window, here the whole map, which is the same at 224x224.
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
                f"classifier_inputs {classifier_inputs} is fewer than the {channels} "
                "maps of the last block"
            )
        inputs = channels + self.missing
        default = dict(bias_init=torch_default(inputs))
        self.classifier = Linear(inputs, num_classes, rngs=rngs, **default)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = global_average_pool(x)
        return self.classifier(jnp.pad(x, ((0, 0), (0, self.missing))))
