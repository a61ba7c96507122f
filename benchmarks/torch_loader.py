"""The peer of benchmarks/pipeline.py: PyTorch's DataLoader, torchvision's transforms.

Written out with Pillow and torch, as torchvision computes them on Pillow's images, so
that torchvision need not be installed. This file imports nothing else, for the worker
processes import it.
"""

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
        picture = ImageOps.expand(Image.fromarray(self.images[i]), border=4, fill=0)
        y, x = torch.randint(0, 9, (2,)).tolist()
        return _finished(picture.crop((x, y, x + 32, y + 32))), 0


class Jpegs(torch.utils.data.Dataset):
    """Files: RandomResizedCrop(size), RandomHorizontalFlip, ToTensor."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as file:
            picture = Image.open(file).convert("RGB")
        draws = torch.rand(crops.DRAWS).numpy()
        top, left, height, width = crops.random_window(*picture.size, draws)
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((self.size, self.size), Image.BILINEAR)
        return _finished(picture), 0


def _finished(picture: Image.Image) -> torch.Tensor:
    """Mirrored or not, then (3, H, W) float32 in 0..1."""
    if torch.rand(1) < 0.5:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def batches(dataset: torch.utils.data.Dataset, batch_size: int, workers: int):
    """Shuffled batches without end."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # forking a process full of threads may hang
    )
    while True:
        yield from loader
