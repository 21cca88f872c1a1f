import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from memopt_cli.errors import CommandError
from memopt_cli.train import cifar, digits, folder
from memopt_cli.train.data import load_data, split
from PIL import Image

KINDS = {kind.folder: kind for kind in cifar.KINDS}
COUNT = 3


def write_cifar(root: Path, kind: cifar.Kind, labels: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A folder as published, with few images."""
    place = root / kind.folder
    place.mkdir(parents=True)
    for number, name in enumerate((*kind.train, kind.test)):
        pixels = np.random.default_rng(number).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        if kind.labels:
            (place / name).write_bytes(pickle.dumps({"data": pixels, kind.labels: list(labels)}, protocol=2))
        else:
            extra = np.zeros((len(labels), kind.label_bytes - 1), np.uint8)
            column = np.array(labels, np.uint8)[:, None]
            (place / name).write_bytes(np.concatenate([extra, column, pixels], axis=1).tobytes())
    return place


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("below", [True, False])
def test_cifar_is_read_as_published(tmp_path: Path, name: str, below: bool) -> None:
    place = write_cifar(tmp_path, KINDS[name])
    data = load_data(str(tmp_path if below else place), image_size=32)
    kind = KINDS[name]
    assert (data.name, data.classes, data.flip, data.size) == (kind.name, kind.classes, True, 32)
    assert len(data.train) == COUNT * len(kind.train)
    assert data.test is not None
    first = np.random.default_rng(0).integers(0, 256, (COUNT, 3072), dtype=np.uint8)
    images, labels = data.train.fetch([2, 0])
    assert labels.tolist() == [2, 0]
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), first[[2, 0]].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    place = write_cifar(tmp_path, KINDS[name])
    file = place / KINDS[name].train[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CommandError, match=r"is cut short or damaged .* Fetch it again") as error:
        load_data(str(tmp_path), 32)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    place = write_cifar(tmp_path, KINDS[name])
    (place / KINDS[name].test).unlink()
    with pytest.raises(CommandError, match=f"{KINDS[name].test} is missing from"):
        load_data(str(tmp_path), 32)


@pytest.mark.parametrize("name", KINDS)
def test_labels_out_of_range_are_refused(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path, KINDS[name], labels=(0, 200, 1))
    with pytest.raises(CommandError, match="image 1 has label 200, and there are classes 0 to"):
        load_data(str(tmp_path), 32)


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return eval, ("1 / 0",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    place = write_cifar(tmp_path, KINDS["cifar-10-batches-py"])
    (place / "data_batch_3").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CommandError, match=r"asks for builtins.eval, which is no array"):
        load_data(str(tmp_path), 32)


def test_pixels_must_fit_labels(tmp_path: Path) -> None:
    place = write_cifar(tmp_path, KINDS["cifar-10-batches-py"])
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1, 2]}
    (place / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(CommandError, match="do not fit 3 labels"):
        load_data(str(tmp_path), 32)


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (10, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_of_images(tmp_path: Path) -> None:
    for split_name in ("train", "test"):
        paint(tmp_path / split_name / "cats" / "a.png", (255, 0, 0))
        paint(tmp_path / split_name / "dogs" / "b.png", (0, 255, 0), (64, 32))
    paint(tmp_path / "train" / "dogs" / "deeper" / "c.bmp", (0, 0, 255))
    (tmp_path / "train" / "dogs" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path), 16)
    assert (len(data.train), len(data.test or ()), data.classes, data.lazy) == (3, 2, 2, True)
    images, labels = data.train.fetch([0, 1, 2])
    assert labels.tolist() == [0, 1, 1]
    assert images.shape == (3, 3, 16, 16)
    assert images.float().mean((2, 3)).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_classes_may_lie_directly_below(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", (1, 2, 3))
    paint(tmp_path / "b" / "2.png", (1, 2, 3))
    data = load_data(str(tmp_path), 8)
    assert (len(data.train), data.test, data.classes) == (2, None, 2)


def test_images_are_cut_from_the_middle(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    images, _ = load_data(str(tmp_path), 10).train.fetch([0])
    assert images.unique().tolist() == [255]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", (1, 2, 3), (64, 64))
    content = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(CommandError, match=r"1.png is cut short or no image .* Replace or remove it"):
        load_data(str(tmp_path), 8).train.fetch([0])


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a" / "1.png", (1, 2, 3))
    paint(tmp_path / "test" / "b" / "1.png", (1, 2, 3))
    with pytest.raises(CommandError, match="is a class that the training images do not have"):
        load_data(str(tmp_path), 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("file", "is a file"), ("empty", "holds neither CIFAR .* nor images")],
)
def test_the_wrong_folder_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match=message):
        load_data(str(tmp_path / name), 32)


def test_without_pillow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(CommandError, match="pip install pillow"):
        folder.load(tmp_path, 32)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    published = load_digits()
    pixels, labels = digits.read()
    assert np.array_equal(pixels.numpy(), published.images)
    assert np.array_equal(labels.numpy(), published.target)


def test_digits_are_enlarged_and_complete() -> None:
    data = load_data(None, image_size=99)
    images = data.train.images  # type: ignore[attr-defined]
    assert images.shape == (1500, 3, 32, 32)
    assert len(data.test or ()) == 297
    assert (data.classes, data.flip) == (10, False)
    assert images.max() == 255
    white = images.float() / 255
    assert white.mean().item() == pytest.approx(data.mean[0], abs=1e-3)
    assert white.std().item() == pytest.approx(data.deviation[0], abs=1e-3)


def test_split_shares_all_images_out() -> None:
    data = load_data(None, 32)
    train, valid = split(data.train, None, seed=1)
    assert (len(train), len(valid)) == (1350, 150)
    assert sorted(train.numbers + valid.numbers) == list(range(1500))
    assert split(data.train, None, seed=1)[0] == train
    assert split(data.train, None, seed=2)[0].numbers != train.numbers
    chosen = valid.fetch([3])
    assert torch.equal(chosen[0], data.train.fetch([valid.numbers[3]])[0])


@pytest.mark.parametrize("count", [1500, 2000])
def test_split_leaves_something_to_train_on(count: int) -> None:
    with pytest.raises(CommandError, match="leaves nothing to train on: there are 1500"):
        split(load_data(None, 32).train, count, 0)
