"""Labelled images, from folders or generated; every training crop is a function of (seed, sample)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cod_lightning.data.config import DRAWN_SHAPES, DataConfig, ImageConfig, image_errors
from cod_lightning.data.datamodule import StepDataModule
from cod_lightning.data.order import sample_indices, uniform
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.nn.vit import Images

SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
"""Mean and deviation of ImageNet's channels, the usual normalisation."""
VAL_CROP = 0.875
"""Side of the validation crop as a share of the shorter side: 224 of 256."""
ASPECTS = (3 / 4, 4 / 3)
"""Smallest and largest width / height of a training crop."""
CROP_TRIES = 10
CROPS, DRAWINGS = 1, 2
"""Last of the four integers in the key of random numbers; the keys of the sample order are shorter."""

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels."""


class ImageFolder:
    """The images in ROOT/SPLIT/CLASS/; classes and files sorted by name, without those that begin with a dot.

    Raises:
        UserError: there is no such folder, a class has no image, or an image is a link to nothing or no file.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.folder = root / split
        try:
            self.classes = [entry.name for entry in visible(self.folder) if entry.is_dir()]
        except OSError as error:
            raise UserError(f"images.folder={root}: {split}/ cannot be read ({error.strerror})") from error
        if not self.classes:
            raise UserError(f"images.folder={root}: {split}/ has no folders; expected one per class")
        sizes: list[int] = []
        self.files: list[str] = []
        self.content = [self.files, sizes]  # of the fingerprint: names and sizes, not pixels
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            images = [entry for entry in visible(self.folder / name) if entry.name.lower().endswith(SUFFIXES)]
            if not images:
                raise UserError(f"{self.folder / name} has no image; supported: {', '.join(SUFFIXES)}")
            for entry in images:
                try:
                    stat = entry.stat()
                except OSError as error:  # a link to nothing
                    raise UserError(f"{entry.path} cannot be read ({error.strerror}); replace or remove it") from error
                if not S_ISREG(stat.st_mode):  # to open a pipe would wait forever
                    raise UserError(f"{entry.path} is not a file; replace or remove it")
                self.files.append(f"{name}/{entry.name}")
                sizes.append(stat.st_size)
            self.labels += [label] * len(images)

    def read(self, index: int) -> Image.Image:
        """Return one image as RGB. 16-bit images keep their upper 8 bits, as Pillow does for colour but not for grey.

        Raises:
            UserError: it cannot be decoded, or has 32 bits a pixel.
        """
        path = self.folder / self.files[index]
        try:
            with Image.open(path) as image:
                if image.mode in ("I", "F"):
                    raise UserError(f"{path} has 32 bits a pixel (mode {image.mode}); save it with 8 bits a channel")
                if image.mode.startswith("I;16"):
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is not a readable image ({error}); replace or remove it") from error


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones such as .ipynb_checkpoints or ._1.png of macOS."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return sorted(entries, key=lambda entry: entry.name)


DRAWN = {"train": 4096, "val": 256}
"""Images per split."""


class DrawnImages:
    """Stripes and shapes of random position, size and colours, with noise; image n of a split depends on n alone."""

    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size
        self.classes = list(DRAWN_SHAPES)
        self.labels = [number % len(DRAWN_SHAPES) for number in range(DRAWN[split])]
        self.content = ["drawn", split, size, len(self.labels)]

    def read(self, index: int) -> Image.Image:
        shape = (self.size, self.size, 3)
        numbers = uniform(9 + self.size**2 * 3, list(DRAWN).index(self.split), index, 0, DRAWINGS)
        (left, up, large, fine, turn, slope, *colour), noise = numbers[:9], numbers[9:].reshape(shape)
        y, x = np.mgrid[0 : self.size, 0 : self.size] * (2 / self.size) - 1
        y, x, radius = y + 0.6 * (up - 0.5), x + 0.6 * (left - 0.5), 0.4 + 0.3 * large

        def striped(z: np.ndarray) -> np.ndarray:
            return np.sin((4 + 6 * fine) * z + 2 * np.pi * turn) > 0

        far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        ink = {
            "checks": lambda: striped(x) ^ striped(y),
            "cross": lambda: (near < 0.15) & (far < radius),
            "diagonals": lambda: striped(y + x if slope < 0.5 else y - x),
            "disc": lambda: np.hypot(x, y) < radius,
            "horizontals": lambda: striped(y),
            "ring": lambda: np.abs(np.hypot(x, y) - radius) < 0.15,
            "square": lambda: far < radius,
            "verticals": lambda: striped(x),
        }[self.classes[self.labels[index]]]()
        paper = np.array(colour)
        pixels = np.where(ink[..., None], (paper + 0.5) % 1, paper) + 0.4 * (noise - 0.5)
        return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def random_crop(width: int, height: int, min_crop: float, numbers: np.ndarray) -> Box:
    """Return the first of `CROP_TRIES` boxes with random area, aspect and position that lies within the image.

    Args:
        width: width of the image.
        height: height of the image.
        min_crop: smallest share of the image's area; the largest is 1. The logarithm of the aspect is uniform.
        numbers: uniform in [0, 1) [4 * CROP_TRIES].

    Returns:
        Whole pixels; if no box fits, the largest centre with an allowed aspect.
    """
    low, high = ASPECTS
    for share, aspect, left, up in numbers.reshape(CROP_TRIES, 4):
        area = width * height * (min_crop + (1 - min_crop) * share)
        ratio = low * (high / low) ** aspect
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(up * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def centre_crop(width: int, height: int) -> Box:
    side = VAL_CROP * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def pixels(image: Image.Image, size: int, box: Box, flip: bool = False) -> Tensor:
    """Resize the part of an image inside `box`, bicubic with antialiasing, and normalise: float32 [3, size, size]."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    values = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray((values[:, ::-1] if flip else values).transpose(2, 0, 1)))


class TrainImages(Dataset):
    """Maps (image, sample), where samples are counted over all epochs, to a random crop and its label."""

    def __init__(self, images: ImageFolder | DrawnImages, config: ImageConfig, seed: int) -> None:
        self.images, self.config, self.seed = images, config, seed

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        number, sample = index
        image = self.images.read(number)
        flip, *numbers = uniform(1 + 4 * CROP_TRIES, self.seed, sample, 0, CROPS)
        box = random_crop(*image.size, self.config.min_crop, np.array(numbers))
        return pixels(image, self.config.size, box, bool(flip < 0.5)), self.images.labels[number]


class ValImages(Dataset):
    """Maps an index to the centre crop of that image, its label, and the index; -1 to zeros with the label `IGNORE`."""

    def __init__(self, images: ImageFolder | DrawnImages, config: ImageConfig) -> None:
        self.images, self.size = images, config.size

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if index < 0:
            return torch.zeros(3, self.size, self.size), IGNORE, index
        image = self.images.read(index)
        return pixels(image, self.size, centre_crop(*image.size)), self.images.labels[index], index


class ImageDataModule(StepDataModule):
    """Batches of images and labels.

    Training: (float32 [batch_size / world_size, 3, size, size], int64 [batch_size / world_size]).

    Validation: (float32 [m, 3, size, size], int64 [m], int64 [m]) with m = `micro_batch_size`: images, labels and
    indices in the whole split; the image with the index -1 has the label `IGNORE`.

    Attributes, after `setup`: `classes` and those of `StepDataModule`.
    """

    classes: list[str]
    train_set: TrainImages
    val_set: ValImages

    def __init__(
        self, images: ImageConfig, config: DataConfig, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(config, seed, rank=rank, world_size=world_size)
        self.images = images

    def setting_errors(self) -> list[str]:
        return image_errors(self.images)

    def open(self) -> None:
        """List the images of both splits; the fingerprint is that of their names and sizes."""
        config = self.images
        if config.source == "folder":
            train, val = (ImageFolder(Path(config.folder or ""), split) for split in ("train", "val"))
            if different := sorted(set(train.classes) ^ set(val.classes)):
                names = ", ".join(different[:5])
                raise UserError(f"images.folder={config.folder}: only one of train/ and val/ has {names}")
            if config.classes not in (None, len(train.classes)):
                raise UserError(f"images.folder={config.folder} has {len(train.classes)}, not {config.classes} classes")
        else:
            train, val = (DrawnImages(split, config.size) for split in ("train", "val"))
        self.classes = train.classes
        self.train_set, self.val_set = TrainImages(train, config, self.seed), ValImages(val, config)
        self.fingerprint = hashlib.sha256(json.dumps([train.content, val.content]).encode()).hexdigest()
        self.source = f"images.source={config.source}" + (f", {config.folder}" if config.source == "folder" else "")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"classes": self.classes}

    def sample_keys(self, first: int, count: int) -> np.ndarray:
        """Return (image, sample): int64 [count, 2]."""
        images = sample_indices(first, count, seed=self.seed, chunk_sizes=(len(self.train_set),))
        return np.stack((images, first + np.arange(count)), axis=1)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of the validation images."""
        return self._val_loader(self.val_set, self.config.loader_workers)

    @property
    def val_count(self) -> int:
        return len(self.val_set)

    def probe_batch(self, n: int) -> Images:
        """Return `n` validation images, evenly spread, with their labels.

        Raises:
            UserError: there are fewer.
        """
        if n > self.val_count:
            raise UserError(
                f"trainer.probe_rows={n}, but {self.source} has {self.val_count} validation images: lower "
                "trainer.probe_rows"
            )
        indices = np.linspace(0, self.val_count - 1, n).round().astype(int)
        images, labels, _ = zip(*(self.val_set[index] for index in indices), strict=True)
        return Images(torch.stack(images), torch.tensor(labels))
