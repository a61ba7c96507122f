"""How a convolution is computed: several lowerings of one function of (x, kernel)."""

from jax import lax


def convolution(x, kernel, *, stride=1, padding=0, groups=1, lowering="auto"):
    """x (N, H, W, in) * kernel (kh, kw, in / groups, out) -> (N, H', W', out)."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
