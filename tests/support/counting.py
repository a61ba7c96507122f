"""Derives the counts of a net with another number of classes without building it."""

import dataclasses

from nets.cost import Cost, LayerCost


def with_classes(layers: list[LayerCost], num_classes: int) -> list[LayerCost]:
    """Returns the layers of a net with another number of classes.

    Only the size of the last layer, the classifier, depends on it.
    """
    *rest, classifier = layers
    batch, now = classifier.output_shape
    counts = {
        field.name: getattr(classifier, field.name) * num_classes // now
        for field in dataclasses.fields(Cost)
    }
    shape = (batch, num_classes)
    return [*rest, dataclasses.replace(classifier, **counts, output_shape=shape)]
