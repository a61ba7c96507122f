"""What a backbone gets when it asks for a convolution: network = backbone x wiring."""

import dataclasses

from flax import nnx

from nets.layers.conv import Conv, he_fan_out
from nets.layers.expander import ExpanderConv

KINDS = ("dense", "expander", "grouped")


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How the channels of a backbone's wired convolutions are connected.

    kind: one of KINDS.
    compress: expander only; each sampling channel keeps in // compress partners (the
      published command line's `expandSize`, a divisor; a layer may state an absolute
      degree instead). Under `smaller_side` sampling and in < out this keeps a share
      of in / (compress out), less than 1/compress.
    sampling: expander only; nets/connectivity.py.
    groups: grouped only.
    """

    kind: str = "dense"
    compress: int = 2
    sampling: str = "smaller_side"
    groups: int = 2

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown wiring {self.kind!r}: choose from {KINDS}")
        if self.compress < 1 or self.groups < 1:
            raise ValueError(
                "compress and groups must be at least 1, got "
                f"compress={self.compress}, groups={self.groups}"
            )

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        degree: int | None = None,
        init=he_fan_out,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """A convolution without bias; `init` is for kernels stored densely."""
        geometry = dict(stride=stride, padding=padding, rngs=rngs)
        shape = (in_channels, out_channels, kernel_size)
        if self.kind == "expander":
            if degree is None and not (degree := in_channels // self.compress):
                raise ValueError(
                    f"compress {self.compress} leaves no connection to a convolution "
                    f"of {in_channels} input channels: choose at most {in_channels}"
                )
            sampling = self.sampling
            return ExpanderConv(*shape, degree=degree, sampling=sampling, **geometry)
        groups = self.groups if self.kind == "grouped" else 1
        return Conv(*shape, groups=groups, init=init, **geometry)
