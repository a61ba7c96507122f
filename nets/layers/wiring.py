"""What a backbone gets when it asks for a convolution: network = backbone x wiring."""

import dataclasses

from flax import nnx

from nets import connectivity
from nets.layers.conv import Conv, Linear, he_fan_out, torch_uniform
from nets.layers.expander import ExpanderConv, ExpanderLinear
from nets.layers.interleaved import InterleavedConv

KINDS = ("dense", "expander", "grouped", "interleaved")


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
    primary_groups, secondary_groups: interleaved only (nets/layers/interleaved.py). One
      of them may be 0: it follows from a layer's width, primary * secondary = outputs,
      so that one stays and the other grows as a net widens. An interleaved pair has
      the initialiser of its origin.
    """

    kind: str = "dense"
    compress: int = 2
    sampling: str = "smaller_side"
    groups: int = 2
    primary_groups: int = 2
    secondary_groups: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown wiring {self.kind!r}: choose from {KINDS}")
        if self.compress < 1 or self.groups < 1:
            raise ValueError(
                "compress and groups must be at least 1, got "
                f"compress={self.compress}, groups={self.groups}"
            )
        fixed = (self.primary_groups, self.secondary_groups)
        if min(fixed) < 0 or max(fixed) < 1:
            raise ValueError(
                "one of primary_groups and secondary_groups must be at least 1 and the "
                f"other at least 0, got {fixed[0]} and {fixed[1]}"
            )

    def partitions(self, out_channels: int) -> tuple[int, int]:
        """Primary and secondary groups of an interleaved pair with so many outputs."""
        primary = self.primary_groups or out_channels // self.secondary_groups
        return primary, self.secondary_groups or out_channels // primary

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        degree: int | None = None,
        secondary_groups: int | None = None,
        bias: bool = False,
        init=he_fan_out,
        bias_init=None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """A convolution. An expander and an interleaved pair have an initialiser of
        their own and no bias; a layer may state their degree and secondary groups.
        """
        geometry = dict(stride=stride, padding=padding, rngs=rngs)
        shape = (in_channels, out_channels, kernel_size)
        if self.kind == "expander":
            degree = self._degree(in_channels) if degree is None else degree
            sampling = self.sampling
            return ExpanderConv(*shape, degree=degree, sampling=sampling, **geometry)
        if self.kind == "interleaved":
            primary, secondary = self.partitions(out_channels)
            secondary = secondary_groups or secondary
            groups = dict(primary_groups=primary, secondary_groups=secondary)
            return InterleavedConv(*shape, **groups, **geometry)
        groups = self.groups if self.kind == "grouped" else 1
        biases = dict(bias=bias, bias_init=bias_init)
        return Conv(*shape, groups=groups, init=init, **biases, **geometry)

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        degree: int | None = None,
        init=torch_uniform,
        bias_init=None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """An expander without bias, or for the other kinds a dense layer with one."""
        shape = (in_features, out_features)
        if self.kind == "expander":
            degree = self._degree(in_features) if degree is None else degree
            options = dict(degree=degree, sampling=self.sampling, rngs=rngs)
            return ExpanderLinear(*shape, **options)
        return Linear(*shape, init=init, bias_init=bias_init, rngs=rngs)

    def partners(self, in_channels: int, out_channels: int) -> int:
        """How many channels each sampling channel of an expander draws from."""
        side = connectivity.sampled_side(in_channels, out_channels, self.sampling)
        return in_channels if side == "output" else out_channels

    def _degree(self, in_channels: int) -> int:
        if degree := in_channels // self.compress:
            return degree
        raise ValueError(
            f"compress {self.compress} leaves no connection to a layer "
            f"of {in_channels} input channels: choose at most {in_channels}"
        )
