import torch
from memopt_cli.train import digits
from memopt_cli.train.batches import Batches, Share
from memopt_cli.train.grey import GreyBatches


def test_grey_batches_are_the_first_colour_of_the_others() -> None:
    data = digits.load()
    assert data.test is not None
    for channels_last in (False, True):
        both = [kind(data, 50, Share(), 1, True, torch.device("cpu"), channels_last) for kind in (Batches, GreyBatches)]
        of_each = [[next(b.training(data.train, 3)), next(b.evaluation(data.test))] for b in both]
        for (images, labels), (grey, same_labels) in zip(*of_each, strict=True):
            assert torch.equal(images[:, :1], grey)
            assert torch.equal(labels, same_labels)
            assert grey.is_contiguous()
            assert grey.untyped_storage().nbytes() == grey.nbytes
