"""Images: folders, crops, and one order for any number of ranks."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.data.images import (
    CROP_TRIES,
    DRAWN_SHAPES,
    MEAN,
    STD,
    DrawnImages,
    ImageDataModule,
    ImageFolder,
    centre_crop,
    random_crop,
)
from cod_lightning.data.order import uniform
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE


@pytest.fixture
def root(tmp_path):
    """Three classes with four training and two validation images each, of several formats and sizes."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("zebra", "ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                noise = uniform(40 * (30 + number) * 3, label, number).reshape(40, 30 + number, 3)
                suffix = ("png", "jpg", "JPEG", "jpeg")[number]
                Image.fromarray((255 * noise).astype(np.uint8)).save(tmp_path / split / name / f"{number}.{suffix}")
    return tmp_path


def opened(root=None, seed=1, batch_size=4, micro_batch_size=2, rank=0, world_size=1, **changes) -> ImageDataModule:
    source = {"source": "folder", "folder": str(root)} if root else {}
    config = DataConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
    data = ImageDataModule(
        ImageConfig(**{**source, "size": 16, **changes}), config, seed, rank=rank, world_size=world_size
    )
    data.setup()
    return data


def test_classes_and_files_are_sorted(root):
    data = opened(root, classes=3)
    assert data.classes == ["ant", "bee", "zebra"]
    images = data.train_set.images
    assert images.files[:5] == ["ant/0.png", "ant/1.jpg", "ant/2.JPEG", "ant/3.jpeg", "bee/0.png"]
    assert images.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert images.read(2).size == (32, 40)


def test_an_epoch_has_every_image_once_and_the_next_another_order(root):
    data = opened(root)
    requested = np.concatenate([data.batch_keys(step) for step in range(6)])
    assert requested[:, 1].tolist() == list(range(24))
    assert sorted(requested[:12, 0]) == sorted(requested[12:, 0]) == list(range(12))
    assert requested[:12, 0].tolist() != requested[12:, 0].tolist()
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * 3
    expected = data.train_set[tuple(requested[5])]
    assert torch.equal(batches[1][0][1], expected[0])
    assert batches[1][1][1] == expected[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_one_global_batch(root, ranks):
    shares = [opened(root, rank=rank, world_size=ranks).train_dataloader() for rank in range(ranks)]
    for (images, labels), *parts in zip(opened(root).train_dataloader(), *shares, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("ranks", [1, 4])
def test_validation_has_every_image_once_and_equally_many_batches(root, ranks):
    shares = [list(opened(root, rank=rank, world_size=ranks).val_dataloader()) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    images, labels, index = (torch.cat(part) for part in zip(*(b for share in shares for b in share), strict=True))
    assert sorted(index[index >= 0].tolist()) == list(range(6))
    assert (labels[index < 0] == IGNORE).all()
    assert not images[index < 0].any()
    assert (labels[index >= 0] == index[index >= 0] // 2).all()


def test_a_crop_depends_only_on_seed_and_sample(root):
    train_images = opened(root).train_set
    assert torch.equal(train_images[3, 7][0], pickle.loads(pickle.dumps(opened(root).train_set))[3, 7][0])
    assert not torch.equal(train_images[3, 7][0], train_images[3, 8][0])
    assert not torch.equal(train_images[3, 7][0], opened(root, seed=2).train_set[3, 7][0])


def test_pixels_are_normalised(tmp_path):
    noise = (255 * uniform(16 * 16 * 3, 0).reshape(16, 16, 3)).astype(np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "noise").mkdir(parents=True)
        Image.fromarray(noise).save(tmp_path / split / "noise" / "0.png")
    data = opened(tmp_path, size=14, patch_size=7)
    centre = torch.from_numpy(((noise / 255 - MEAN) / STD)[1:15, 1:15]).permute(2, 0, 1).float()
    torch.testing.assert_close(data.val_set[0][0], centre)  # 14 is 0.875 of 16: nothing is resized
    torch.testing.assert_close(data.probe_batch(1).pixels[0], centre)
    whole = opened(tmp_path, size=16, min_crop=1).train_set
    image = torch.from_numpy((noise / 255 - MEAN) / STD).permute(2, 0, 1).float()
    flipped = [not torch.allclose(whole[0, sample][0], image, atol=1e-5) for sample in range(20)]
    assert 4 < sum(flipped) < 16
    torch.testing.assert_close(whole[0, flipped.index(True)][0], image.flip(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (10, 400), (400, 10), (1, 1)])
@pytest.mark.parametrize("min_crop", [0.08, 0.9, 1.0])
def test_crops_lie_inside_with_the_requested_area_and_aspect(width, height, min_crop):
    shares = []
    for sample in range(50):
        left, up, right, low = random_crop(width, height, min_crop, uniform(40, sample))
        w, h = right - left, low - up
        assert 0 <= left < right <= width
        assert 0 <= up < low <= height
        shares.append(w * h / (width * height))
        if min(width, height) > 20:
            assert 0.72 < w / h < 1.39
            assert shares[-1] > min_crop - 0.03
    if (width, height, min_crop) == (500, 375, 0.08):
        assert min(shares) < 0.2
        assert max(shares) > 0.6


@pytest.mark.parametrize(
    ("size", "numbers", "box"),
    [
        ((8, 8), (0.0, 0.5, 0.999, 0.0), (4, 0, 8, 4)),  # a quarter of the area reaches the border
        ((8, 8), (0.0, 0.5, 0.0, 0.999), (0, 4, 4, 8)),
        ((10, 400), (0.9, 0.5, 0.0, 0.0), (0, 193, 10, 206)),  # too wide: the largest centre of aspect 3 / 4
        ((400, 10), (0.9, 0.5, 0.0, 0.0), (193, 0, 206, 10)),
    ],
)
def test_a_crop_is_at_the_drawn_place_or_the_centre(size, numbers, box):
    assert random_crop(*size, 0.25, np.tile(numbers, CROP_TRIES)) == box


def test_the_crop_of_validation_is_at_the_centre():
    assert centre_crop(40, 32) == (6, 2, 34, 30)
    assert centre_crop(32, 40) == (2, 6, 30, 34)


def test_a_probe_is_spread_over_the_classes(root):
    data = opened(root)
    probe = data.probe_batch(3)
    assert probe.labels.tolist() == [0, 1, 2]
    assert torch.equal(probe.pixels, torch.stack([data.val_set[index][0] for index in (0, 2, 5)]))


def test_a_drawn_image_depends_only_on_its_number():
    images = DrawnImages("train", 32)
    assert images.classes == sorted(DRAWN_SHAPES)
    assert images.labels[:9] == [*range(8), 0]
    again, val = DrawnImages("train", 32), DrawnImages("val", 32)
    for number in range(8):
        pixels = np.asarray(images.read(number))
        assert pixels.shape == (32, 32, 3)
        assert (pixels == np.asarray(again.read(number))).all()
        assert (pixels != np.asarray(val.read(number))).any()
    # Rows of horizontal stripes differ more than their columns; noise has a deviation of 0.12 of 255.
    stripes = np.asarray(images.read(DRAWN_SHAPES.index("horizontals")), float)
    assert stripes.mean((1, 2)).std() > 4 * stripes.mean((0, 2)).std()


def test_hidden_files_and_folders_are_skipped(root):
    fingerprint = opened(root).fingerprint
    (root / "train" / "ant" / "._0.png").touch()
    for folder in ("train/.ipynb_checkpoints", "val/.DS_Store"):
        (root / folder).mkdir()
    assert opened(root).fingerprint == fingerprint


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_broken_image_is_named(root, damage):
    path = root / "train" / "bee" / "1.jpg"
    path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:400])
    with pytest.raises(UserError, match=r"train/bee/1\.jpg is not a readable image"):
        list(opened(root).train_dataloader())


def test_a_pipe_among_the_images_is_named(root):
    os.mkfifo(root / "train" / "bee" / "9.png")
    with pytest.raises(UserError, match=r"train/bee/9\.png is not a file; replace or remove it"):
        ImageFolder(root, "train")


def test_grey_of_16_bits_is_read_as_8(root):
    grey = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
    Image.fromarray(grey).save(root / "train" / "ant" / "0.png")
    pixels = np.asarray(ImageFolder(root, "train").read(0))
    assert (pixels == (grey // 256)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_named(root, dtype):
    Image.fromarray(np.ones((40, 30), dtype)).save(root / "train" / "ant" / "0.png", format="tiff")
    with pytest.raises(UserError, match=r"train/ant/0\.png has 32 bits a pixel \(mode [IF]\); save it with 8 bits"):
        ImageFolder(root, "train").read(0)


def rename_an_image(root):
    (root / "train" / "yak").mkdir()
    (root / "train" / "bee" / "0.png").rename(root / "train" / "yak" / "0.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"train/ cannot be read \(No such file"),
        (lambda root: shutil.rmtree(root / "val"), r"val/ cannot be read"),
        (lambda root: (root / "train" / "yak").mkdir(), r"yak has no image; supported: \.jpg"),
        (rename_an_image, "only one of train/ and val/ has yak"),
        (
            lambda root: (root / "val" / "ant" / "9.png").symlink_to("nothing"),
            r"ant/9\.png cannot be read \(No such file or directory\); replace or remove it",
        ),
    ],
    ids=["no folder", "no split", "empty class", "other classes", "link to nothing"],
)
def test_an_incomplete_folder_is_named(root, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        opened(root)


def test_another_number_of_classes_is_refused(root):
    with pytest.raises(UserError, match=r"has 3, not 1000 classes"):
        opened(root, classes=1000)


def test_a_batch_must_divide_among_the_ranks(root):
    with pytest.raises(UserError, match=r"data\.batch_size=4 is not divisible by 3"):
        opened(root, world_size=3)


def test_too_large_a_probe_is_refused(root):
    with pytest.raises(UserError, match=r"trainer\.probe_rows=7, but .* validation images"):
        opened(root).probe_batch(7)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"source": "web"}, "images.source='web'"),
        ({"source": "folder"}, "images.folder is empty"),
        ({"patch_size": 5}, "images.size=16"),
        ({"min_crop": 0.0}, "images.min_crop=0.0"),
        ({"classes": 0}, "images.classes=0"),
    ],
)
def test_bad_settings_are_named(change, word):
    with pytest.raises(UserError, match=word):
        opened(**change)


def test_a_run_resumes_only_on_the_same_images(root):
    before = opened(root).state_dict()
    opened(root).load_state_dict(before)
    (root / "train" / "bee" / "0.png").rename(root / "train" / "bee" / "9.png")
    with pytest.raises(UserError, match="the checkpoint was trained on a set with fingerprint"):
        opened(root).load_state_dict(before)
