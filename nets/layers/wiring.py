"""The wiring of a backbone: builds the convolutions that the backbone requests."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from nets import connectivity
from nets.layers.conv import Conv, GroupedConv, Linear
from nets.layers.expander import ExpanderConv, ExpanderLinear
from nets.layers.interleaved import InterleavedConv

KINDS = ("dense", "expander", "grouped", "interleaved")


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How the channels of a backbone's wired convolutions are connected.

    kind: one of KINDS.
    compress: for expanders; each sampling channel keeps in // compress partners (the
      published command line's `expandSize`). Note: with "smaller_side" and in < out,
      the density is in / (compress * out), not 1 / compress.
    sampling: for expanders; see nets/connectivity.py.
    block: for expanders; the graph is drawn between blocks of this many channels, and
      degrees are rounded down to whole blocks. On accelerators, blocks save time
      (layers/blocks.py).
    groups: for grouped convolutions.
    primary_groups, secondary_groups: for interleaved pairs (layers/interleaved.py). If
      one is 0, each layer computes it from primary * secondary = output channels, so
      that it grows as a net widens.
    """

    kind: str = "dense"
    compress: int = 2
    sampling: str = "smaller_side"
    block: int = 1
    groups: int = 2
    primary_groups: int = 2
    secondary_groups: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown wiring {self.kind!r}: choose from {', '.join(KINDS)}"
            )
        if min(self.compress, self.groups, self.block) < 1:
            raise ValueError(
                "compress, groups and block must be at least 1, got "
                f"compress={self.compress}, groups={self.groups}, block={self.block}"
            )
        fixed = (self.primary_groups, self.secondary_groups)
        if min(fixed) < 0 or max(fixed) < 1:
            raise ValueError(
                "one of primary_groups and secondary_groups must be at least 1 and the "
                f"other at least 0, got {fixed[0]} and {fixed[1]}"
            )

    def partitions(self, out_channels: int) -> tuple[int, int]:
        """Returns the primary and secondary groups of an interleaved pair."""
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
        dense: Mapping = {},
        degree: int | None = None,
        secondary_groups: int | None = None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Returns a convolution of this kind.

        Three arguments apply to some kinds only.
        dense: `init`, `bias` and `bias_init` of Conv, for "dense" and "grouped"; the
          other kinds have their own initialiser and no bias.
        degree: for expanders, instead of in // compress.
        secondary_groups: for interleaved pairs, instead of the wiring's.
        """
        shape = (in_channels, out_channels, kernel_size)
        geometry = dict(stride=stride, padding=padding, rngs=rngs)
        if self.kind == "expander":
            return ExpanderConv(
                *shape, **self._expander(in_channels, degree), **geometry
            )
        if self.kind == "interleaved":
            primary, secondary = self.partitions(out_channels)
            secondary = secondary_groups or secondary
            groups = dict(primary_groups=primary, secondary_groups=secondary)
            return InterleavedConv(*shape, **groups, **geometry)
        if self.kind == "grouped":
            return GroupedConv(*shape, groups=self.groups, **dense, **geometry)
        return Conv(*shape, **dense, **geometry)

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        dense: Mapping = {},
        degree: int | None = None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Returns an expander without bias, or for the other kinds a dense layer.

        dense: arguments of Linear for the dense layer.
        degree: for expanders, instead of in // compress.
        """
        shape = (in_features, out_features)
        if self.kind == "expander":
            options = self._expander(in_features, degree)
            return ExpanderLinear(*shape, **options, rngs=rngs)
        return Linear(*shape, **dense, rngs=rngs)

    def partners(self, in_channels: int, out_channels: int) -> int:
        """Returns the number of channels from which each sampling channel draws."""
        side = connectivity.sampled_side(in_channels, out_channels, self.sampling)
        return in_channels if side == "output" else out_channels

    def _expander(self, in_channels: int, degree: int | None) -> dict:
        if degree is None and not (degree := in_channels // self.compress):
            raise ValueError(
                f"compress={self.compress} leaves no connection in a layer with "
                f"{in_channels} input channels: choose at most {in_channels}"
            )
        whole = degree // self.block * self.block
        if not whole:
            raise ValueError(
                f"a degree of {degree} in a layer with {in_channels} input channels is "
                f"less than one block: choose net.wiring.block of at most {degree}, or "
                "a smaller compress"
            )
        return dict(degree=whole, sampling=self.sampling, block=self.block)
