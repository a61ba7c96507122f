"""The peer of benchmarks/pipeline.py: PyTorch's DataLoader, torchvision's transforms.

The transforms are written in Pillow and torch, as torchvision computes them on Pillow
images, so that torchvision need not be installed. This file imports little, because
each worker process imports it.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageOps

from data_sources import crops


class Small(torch.utils.data.Dataset):
    """Images in memory: RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = ImageOps.expand(Image.fromarray(self.images[i]), border=4, fill=0)
        y, x = torch.randint(0, 9, (2,)).tolist()
        return _flip_and_convert(image.crop((x, y, x + 32, y + 32))), 0


class Jpegs(torch.utils.data.Dataset):
    """Files: RandomResizedCrop(size), RandomHorizontalFlip, ToTensor."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        draws = torch.rand(crops.DRAWS).numpy()
        top, left, height, width = crops.random_window(*image.size, draws)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.BILINEAR)
        return _flip_and_convert(image), 0


def _flip_and_convert(image: Image.Image) -> torch.Tensor:
    """Mirrors half of the images; returns (3, H, W) float32 in 0..1."""
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def batches(dataset: torch.utils.data.Dataset, batch_size: int):
    """Yields shuffled batches without end, made by one process per core."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
        multiprocessing_context="spawn",  # forking a process full of threads may hang
    )
    while True:
        yield from loader
