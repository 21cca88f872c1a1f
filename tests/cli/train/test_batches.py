from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memopt_cli.errors import CommandError
from memopt_cli.train.batches import Batches, Share, _crop
from memopt_cli.train.data import DataSet, InMemory
from PIL import Image

from densenet_models.train import PADDING_LABEL

CPU = torch.device("cpu")
COUNT, SIZE = 22, 8


def data_set(count: int = COUNT, *, flip: bool = True) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return DataSet("x", InMemory(images, torch.arange(count)), None, count, SIZE, (0.5,) * 3, (0.25,) * 3, flip)


ALONE = Share()


def batches(data: DataSet, share: Share = ALONE, **options: object) -> Batches:
    return Batches(data, **{"size": 4, "share": share, "seed": 1, "augment": True, "device": CPU, **options})


def test_each_image_comes_at_most_once_an_epoch() -> None:
    data = data_set()
    labels = torch.cat([labels for _, labels in batches(data).training(data.train, epoch=0)])
    assert len(labels) == len(set(labels.tolist())) == 20
    assert labels.tolist() != sorted(labels.tolist())
    again = torch.cat([labels for _, labels in batches(data).training(data.train, epoch=1)])
    assert labels.tolist() != again.tolist()


@pytest.mark.parametrize("first", [0, 2, 5])
def test_an_epoch_begun_later_gives_the_same_batches(first: int) -> None:
    data = data_set()
    whole = list(batches(data).training(data.train, 3))[first:]
    rest = list(batches(data).training(data.train, 3, first))
    assert len(rest) == 5 - first
    for (images, labels), (other, other_labels) in zip(whole, rest, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_out_what_one_would_take(ranks: int) -> None:
    """Augmentation included."""
    data = data_set()
    whole = list(batches(data).training(data.train, 0))
    shares = [list(batches(data, Share(rank, ranks)).training(data.train, 0)) for rank in range(ranks)]
    for number, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([share[number][0] for share in shares]))
        assert torch.equal(labels, torch.cat([share[number][1] for share in shares]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_sees_every_image_once(ranks: int) -> None:
    data = data_set()
    seen = []
    lengths = set()
    for rank in range(ranks):
        mine = list(batches(data, Share(rank, ranks)).evaluation(data.train))
        lengths.add(len(mine))
        seen += [label for _, labels in mine for label in labels.tolist() if label != PADDING_LABEL]
        assert {len(labels) for _, labels in mine} == {4 // ranks}
    assert sorted(seen) == list(range(COUNT))
    assert len(lengths) == 1, "every process must take as many batches: they wait for one another"


def test_images_are_normalised() -> None:
    data = data_set()
    (images, _), *_ = batches(data).evaluation(data.train)
    expected = (data.train.images[:4].float() / 255 - 0.5) / 0.25  # type: ignore[attr-defined]
    torch.testing.assert_close(images, expected)


def test_crop_moves_and_mirrors() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4) + 1
    moves = torch.tensor([[1, 1], [0, 2]])
    cut = _crop(images, moves, torch.tensor([False, False]), margin=1)
    assert torch.equal(cut[0], images[0])
    assert torch.equal(cut[1][:, 1:, :3], images[1][:, :3, 1:])
    assert not cut[1][:, 0].any()
    assert not cut[1][:, :, 3].any()
    mirrored = _crop(images, torch.ones(2, 2, dtype=torch.int64), torch.tensor([True, False]), margin=1)
    assert torch.equal(mirrored[0], images[0].flip(2))
    assert torch.equal(mirrored[1], images[1])


def test_mirroring_is_only_where_it_keeps_the_class() -> None:
    data = replace(data_set(64, flip=False), mean=(0.0,) * 3, deviation=(1 / 255,) * 3)

    def mirrored(flip: bool) -> int:
        chosen = replace(data, flip=flip)
        pictures = InMemory(torch.zeros(64, 3, SIZE, SIZE, dtype=torch.uint8), torch.arange(64))
        pictures.images[:, :, :, :4] = torch.tensor([40, 30, 20, 10], dtype=torch.uint8)
        made = batches(chosen, size=64).training(pictures, 0)
        # Falling from left to right: where bright pixels lie left of dark ones.
        return sum(int(image[0, 4].argmax() > image[0, 4].ne(0).nonzero().min()) for image in next(made)[0])

    assert mirrored(False) == 0
    assert 16 < mirrored(True) < 48


def test_without_augmentation_images_are_as_they_are() -> None:
    data = data_set()
    for images, labels in batches(data, augment=False).training(data.train, 0):
        expected = (data.train.images[labels].float() / 255 - 0.5) / 0.25  # type: ignore[attr-defined]
        torch.testing.assert_close(images, expected)


def test_channels_last() -> None:
    data = data_set()
    (images, _), *_ = batches(data, channels_last=True).training(data.train, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def files(tmp_path: Path) -> DataSet:
    from memopt_cli.train import folder

    for number in range(COUNT):
        path = tmp_path / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), (number, 2 * number, 0)).save(path)
    return folder.load(tmp_path, SIZE)


def test_workers_change_nothing(files: DataSet) -> None:
    alone = list(batches(files).training(files.train, 0))
    helped = list(batches(files, workers=2).training(files.train, 0))
    for (images, labels), (other, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_one_line_from_a_worker_too(files: DataSet, workers: int, tmp_path: Path) -> None:
    (tmp_path / "class0" / "02.png").write_bytes(b"no image")
    with pytest.raises(CommandError) as error:
        list(batches(files, workers=workers).evaluation(files.train))
    assert "02.png is cut short or no image" in str(error.value)
    assert "\n" not in str(error.value)
