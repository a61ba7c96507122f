"""Single-tower AlexNet, the backbone of X-AlexNet (Deep Expander Networks).

Source: the published code's alexnet, and its two equal files alexnetexpander1 and 2.
The expander net also replaces dropout by batch normalisation.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import torch_default
from nets.layers.norm import torch_batch_norm
from nets.layers.pooling import max_pool
from nets.layers.wiring import Wiring

# (out channels, kernel size, stride, padding, whether a 3x3 max pooling of stride 2
# follows) of each convolution.
CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)
DEGREES = (256, 256, 512)  # of the three linear layers


class AlexNet(nnx.Module):
    """Maps x (N, image_size, image_size, 3) to logits (N, num_classes).

    image_size: at least 63; determines the inputs of the first linear layer.
    hidden: width of the two inner linear layers.
    dropout: rate before each inner linear layer; the expander net has no dropout.
    batch_norm: whether BN follows every layer but the last; always in the expander net.
    published_degrees: for the expander wiring. True: convolutions are dense and linear
      layers have the absolute DEGREES, and `compress` has no effect. False: all layers
      after the stem keep in // compress connections. Linear layers are never grouped.
    norm_scale: initial BN scales, "ones" or "uniform" (torch 0.3: U(0, 1)).
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        hidden: int = 4096,
        dropout: float = 0.5,
        batch_norm: bool = False,
        published_degrees: bool = True,
        norm_scale: str = "ones",
        wiring: Wiring = Wiring(),
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        expander = wiring.kind == "expander"
        published = expander and published_degrees
        conv_wiring, channels, convs = Wiring(), 3, []  # the stem is dense
        for out, size, stride, padding, _ in CONVOLUTIONS:
            default = torch_default(channels * size**2)
            dense = dict(init=default, bias=True, bias_init=default)
            options = dict(stride=stride, padding=padding, dense=dense, rngs=rngs)
            convs.append(conv_wiring.conv(channels, out, size, **options))
            channels, conv_wiring = out, Wiring() if published else wiring
        self.features = channels * _last_map(image_size) ** 2
        widths = (self.features, hidden, hidden, num_classes)
        linears = []
        for i, degree in enumerate(DEGREES):
            dense = dict(bias_init=torch_default(widths[i]))
            options = dict(dense=dense, degree=degree if published else None, rngs=rngs)
            linears.append(wiring.linear(*widths[i : i + 2], **options))
        self.convs, self.linears = nnx.List(convs), nnx.List(linears)
        norms = functools.partial(_norms, scale=norm_scale, rngs=rngs)
        widths, normalised = [out for out, *_ in CONVOLUTIONS], batch_norm or expander
        self.conv_norms = norms(widths) if normalised else None
        self.linear_norms = norms([hidden, hidden]) if normalised else None
        dropout = 0.0 if expander else dropout
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.image_size = image_size

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (conv, (*_, pooled)) in enumerate(
            zip(self.convs, CONVOLUTIONS, strict=True)
        ):
            x = conv(x)
            x = _normalise_relu(x, self.conv_norms, i)
            x = max_pool(x, 3, stride=2) if pooled else x
            x = checkpoint_name(x, "block")
        # Flattened as (C, H, W), the order of the original's weights.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        if x.shape[1] != self.features:
            raise ValueError(
                f"an AlexNet of image_size {self.image_size} reads {self.features} "
                f"features, but these images yield {x.shape[1]}"
            )
        for i, linear in enumerate(self.linears[:-1]):
            x = linear(x if self.dropout is None else self.dropout(x))
            x = _normalise_relu(x, self.linear_norms, i)
        # Logits are at least float32.
        return self.linears[-1](x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def _norms(widths: list[int], scale: str, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([torch_batch_norm(width, scale, rngs) for width in widths])


def _last_map(image_size: int) -> int:
    """Returns the side of the map that the linear layers read."""
    rows = image_size
    for _, size, stride, padding, pooled in CONVOLUTIONS:
        rows = (rows + 2 * padding - size) // stride + 1
        rows = (rows - 3) // 2 + 1 if pooled else rows
    if rows < 1:
        raise ValueError(f"AlexNet needs image_size of at least 63, got {image_size}")
    return rows


def _normalise_relu(x: jax.Array, norms: nnx.List | None, i: int) -> jax.Array:
    """Returns the ReLU of x, after its normalisation if the net has one."""
    return nnx.relu(x) if norms is None else norms[i](x, "relu")
