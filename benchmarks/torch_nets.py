"""Our nets in PyTorch, the peers of benchmarks.models.

`Twin(net)` has the modules, the values and the graphs of one of our nets, and a forward
pass written for PyTorch, for each class of module. It computes what a PyTorch user
would: dense kernels times masks for expanders, as the originals do, and in-place sums
and ReLUs where autograd allows them. Maps are (N, C, H, W); both memory formats work.
Golden files prove the twins (tests/benchmarks/torch_nets_test.py).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

from nets import alexnet, delugenet, densenet, gunn, mobilenet, plain, resnet, vgg
from nets.layers import conv, cross_layer, expander, gradual, interleaved, norm

FORWARDS = {}  # class of our module: forward(twin, ...)


def forward(*kinds: type[nnx.Module]):
    """Registers the forward pass of the twins of these classes."""

    def register(function):
        FORWARDS.update(dict.fromkeys(kinds, function))
        return function

    return register


class Twin(nn.Module):
    """The twin of a module: the same attributes, translated, and its forward pass.

    Kernels have PyTorch's layouts OIHW and OI; those of expanders are dense, and `mask`
    is 1 where pairs are connected. Raises TypeError for a class without forward pass.
    """

    def __init__(self, original: nnx.Module):
        super().__init__()
        if type(original) not in FORWARDS:
            raise TypeError(
                f"no PyTorch twin of {type(original).__name__}: choose from "
                f"{', '.join(kind.__name__ for kind in FORWARDS)}"
            )
        self.compute = FORWARDS[type(original)]
        for name, value in vars(original).items():
            if isinstance(value, nnx.Param):
                tensor = _tensor(original, name, value[...])
                self.register_parameter(name, nn.Parameter(tensor))
            elif isinstance(value, nnx.BatchStat):
                self.register_buffer(name, _tensor(original, name, value[...]))
            elif isinstance(original, gradual.Gradual) and name == "units":
                self.units = nn.ModuleList(map(Twin, gradual.unstack(value)))
            elif isinstance(value, nnx.Module):
                self.add_module(name, _translate(value))
            elif not name.startswith("_"):
                setattr(self, name, value)
        if isinstance(original, expander.Expander):
            ones = jnp.ones_like(original.kernel[...])
            self.register_buffer("mask", _tensor(original, "kernel", ones))

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def _translate(module: nnx.Module) -> nn.Module:
    if isinstance(module, nnx.List):
        return nn.ModuleList(map(_translate, module))
    return Twin(module)


def _tensor(module: nnx.Module, name: str, value: jax.Array) -> torch.Tensor:
    if name == "kernel":
        if isinstance(module, expander.Expander):
            value = module.dense(value)
        value = np.moveaxis(np.asarray(value), (-1, -2), (0, 1))
    return torch.tensor(np.asarray(value))


# Layers.


@forward(conv.Conv, conv.GroupedConv)
def _conv(self, x):
    options = dict(stride=self.stride, padding=self.padding, groups=self.groups)
    return F.conv2d(x, self.kernel, self.bias, **options)


@forward(expander.ExpanderConv)
def _expander_conv(self, x):
    options = dict(stride=self.stride, padding=self.padding, dilation=self.dilation)
    return F.conv2d(x, self.kernel * self.mask, **options)


@forward(conv.Linear)
def _linear(self, x):
    return F.linear(x, self.kernel, self.bias)


@forward(expander.ExpanderLinear)
def _expander_linear(self, x):
    return F.linear(x, self.kernel * self.mask)


@forward(norm.BatchNorm)
def _batch_norm(self, x):
    options = dict(training=self.training, momentum=1 - self.keep, eps=self.eps)
    return F.batch_norm(x, self.mean, self.var, self.scale, self.bias, **options)


@forward(nnx.Dropout)
def _dropout(self, x):
    return F.dropout(x, self.rate, self.training)


@forward(interleaved.InterleavedConv)
def _interleaved_conv(self, x):
    return self.secondary(self.primary(x))


@forward(interleaved.SecondaryConv)
def _secondary_conv(self, x):
    primary_groups, secondary_groups = self.groups
    x = F.conv2d(_permute(x, primary_groups), self.kernel, groups=secondary_groups)
    return _permute(x, secondary_groups)


def _permute(x, branches):
    if x.is_contiguous(memory_format=torch.channels_last):
        # Stays in this memory format, unlike F.channel_shuffle.
        x = x.permute(0, 2, 3, 1)
        channels = x.unflatten(3, (branches, -1)).transpose(3, 4)
        return channels.reshape(x.shape).permute(0, 3, 1, 2)
    return F.channel_shuffle(x, branches)


@forward(cross_layer.CrossLayer)
def _cross_layer(self, sources):
    # As in the original, one normalisation per reader and source: faster in PyTorch
    # than one per source and weighted sums. The first reader updates the statistics.
    total = None
    for i, (x, batch_norm) in enumerate(sources):
        running = batch_norm.mean, batch_norm.var
        if self.training and i < len(sources) - 1:
            running = None, None
        options = dict(training=self.training, momentum=1 - batch_norm.keep)
        options |= dict(weight=self.scale[i], bias=self.bias[i], eps=batch_norm.eps)
        term = F.batch_norm(x, *running, **options)
        total = term if total is None else total.add_(term)
    return total


@forward(gradual.Gradual)
def _gradual(self, x):
    segments = list(x.chunk(self.segments, 1))
    for i, unit in enumerate(self.units):
        state = torch.cat(segments, 1) if self.order == "gradual" else x
        segments[i] = unit(state).add_(segments[i])
    return torch.cat(segments, 1)


def _pool(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


# DenseNet.


@forward(densenet.BasicLayer, densenet.BottleneckLayer)
def _dense_layer(self, x):
    x = _drop(self.dropout, self.conv1(F.relu_(self.norm1(x))))
    if hasattr(self, "conv2"):
        x = _drop(self.dropout, self.conv2(F.relu_(self.norm2(x))))
    return x


@forward(densenet.Transition)
def _dense_transition(self, x):
    x = self.conv(F.relu_(self.norm(x)))
    return F.avg_pool2d(_drop(self.dropout, x), 2)


@forward(densenet.DenseNet, densenet.ImageNetDenseNet)
def _densenet(self, x):
    x = self.stem(x)
    if hasattr(self, "stem_norm"):  # for ImageNet
        x = F.max_pool2d(F.relu_(self.stem_norm(x)), 3, 2, 1)
    for i, layers in enumerate(self.blocks):
        x = self.transitions[i - 1](x) if i else x
        for layer in layers:
            x = torch.cat([x, layer(x)], 1)
    return self.classifier(_pool(F.relu_(self.norm(x))))


def _drop(dropout, x):
    return x if dropout is None else dropout(x)


# ResNet.


@forward(resnet.Shortcut)
def _shortcut(self, x):
    if self.conv is None:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.missing)) if self.missing else x
    x = self.conv(x)
    return x if self.norm is None else self.norm(x)


@forward(resnet.BasicBlock, resnet.BottleneckBlock)
def _block(self, x):
    y = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
    if hasattr(self, "conv3"):
        y = self.norm3(self.conv3(F.relu_(y)))
    return F.relu_(y.add_(self.shortcut(x)))


@forward(resnet.PreactBasicBlock, resnet.PreactBottleneckBlock)
def _preact_block(self, x):
    y = x if self.norm1 is None else F.relu_(self.norm1(x))
    shortcut = self.shortcut(y if self.activation == "both" else x)
    y = self.conv2(F.relu_(self.norm2(self.conv1(y))))
    if hasattr(self, "conv3"):
        y = self.conv3(F.relu_(self.norm3(y)))
    return y.add_(shortcut)


@forward(resnet.ResNet)
def _resnet(self, x):
    x = self.stem(x)
    x = x if self.stem_norm is None else F.relu_(self.stem_norm(x))
    x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
    x = _through(self.stages, x)
    x = x if self.norm is None else F.relu_(self.norm(x))
    return self.classifier(_pool(x))


@forward(resnet.CfmzResNet)
def _cfmz_resnet(self, x):
    x = _through(self.stages, F.relu_(self.stem_norm(self.stem(x))))
    return self.classifier_norm(self.classifier(_pool(x)))


def _through(stages, x):
    for block in itertools.chain(*stages):
        x = block(x)
    return x


# IGCNets.


@forward(plain.ConvBlock)
def _conv_block(self, x, shortcut=None):
    x = self.norm(self.conv(x))
    x = x if shortcut is None else x.add_(shortcut)
    return F.relu_(x) if self.relu else x


@forward(plain.Unit)
def _unit(self, x):
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return self.block2(self.block1(x), shortcut)


@forward(plain.Plain, plain.IgcResNet)
def _plain(self, x):
    return self.classifier(_pool(_through(self.stages, self.stem(x))))


@forward(plain.IgcImageNetResNet)
def _igc_imagenet_resnet(self, x):
    x = F.max_pool2d(self.stem(x), 3, 2, 1)
    return self.classifier(_pool(_through(self.stages, x)))


# DelugeNet. A source is a map and the batch norm that normalises it.


@forward(delugenet.CompositeLayer)
def _composite_layer(self, sources):
    x = _combine(self.cross, sources)
    x = self.conv1(F.relu_(self.norm1(x)))
    x = self.conv2(F.relu_(self.norm2(x)))
    return self.conv3(F.relu_(self.norm3(x)))


@forward(delugenet.Transition)
def _deluge_transition(self, sources):
    return self.conv(self.norm(_combine(self.cross, sources)))


@forward(delugenet.Projection)
def _projection(self, sources):
    return self.conv(_combine(None, sources))


@forward(delugenet.Block)
def _deluge_block(self, previous):
    sources = []
    for i, layer in enumerate([self.opening, *self.layers]):
        x = layer(sources or previous)
        if self.norms is None:  # no cross-layer connections
            sources = []
        sources = [*sources, (x, self.norms and self.norms[i])]
    return sources


@forward(delugenet.DelugeNet)
def _delugenet(self, x):
    x = self.stem(x)
    if self.stem_norm is not None:
        x = F.max_pool2d(F.relu_(self.stem_norm(x)), 3, 2, 1)
    sources = [(x, None)]
    for block in self.blocks:
        sources = block(sources)
    x = F.relu_(self.norm(_combine(self.cross, sources)))
    return self.classifier(_pool(x))


def _combine(cross, sources):
    return sources[-1][0] if cross is None else cross(sources)


# GUNN.


@forward(gunn.Bottleneck)
def _gunn_bottleneck(self, x):
    y = F.relu_(self.norm1(self.conv1(x)))
    y = F.relu_(self.norm2(self.conv2(y)))
    y = self.norm3(self.conv3(y))
    if self.shortcut == "projection":
        return y.add_(self.projection_norm(self.projection(x)))
    return y.add_(x) if self.shortcut == "identity" else y


@forward(gunn.Unit)
def _gunn_unit(self, x):
    return _through([self.bottlenecks], x)


@forward(gunn.Gunn)
def _gunn(self, x):
    x = F.relu_(self.stem_norm(self.stem(x)))
    x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
    for i, layer in enumerate(self.layers):
        x = F.avg_pool2d(x, 2) if i and self.imagenet else x
        x = self.transitions[i](x)
        x = F.avg_pool2d(x, 2) if i and not self.imagenet else x
        x = layer(x)
    x = x if self.last is None else self.last(x)
    return self.classifier(_pool(x))


# VGG, MobileNet, AlexNet.


@forward(vgg.ConvBlock, gunn.Transition)
def _conv_relu(self, x):
    x = self.conv(x)
    return F.relu_(x if self.norm is None else self.norm(x))


@forward(vgg.VGG)
def _vgg(self, x):
    for blocks in self.stages:
        x = F.max_pool2d(_through([blocks], x), 2)
    return self.classifier(F.relu_(self.hidden(_pool(x))))


@forward(mobilenet.SeparableBlock)
def _separable_block(self, x):
    x = F.hardtanh_(self.depthwise_norm(self.depthwise(x)), 0, 6)  # ReLU6
    return F.hardtanh_(self.pointwise_norm(self.pointwise(x)), 0, 6)


@forward(mobilenet.MobileNet)
def _mobilenet(self, x):
    x = _through([self.blocks], F.relu_(self.stem_norm(self.stem(x))))
    return self.classifier(F.pad(_pool(x), (0, self.missing)))


@forward(alexnet.AlexNet)
def _alexnet(self, x):
    for i, (layer, (*_, pooled)) in enumerate(
        zip(self.convs, alexnet.CONVOLUTIONS, strict=True)
    ):
        x = layer(x)
        x = F.relu_(x if self.conv_norms is None else self.conv_norms[i](x))
        x = F.max_pool2d(x, 3, 2) if pooled else x
    x = x.flatten(1)
    for i, linear in enumerate(self.linears[:-1]):
        x = linear(_drop(self.dropout, x))
        x = F.relu_(x if self.linear_norms is None else self.linear_norms[i](x))
    return self.linears[-1](x)
