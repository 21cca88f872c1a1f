"""The fifteen families of form in which public repositories write DenseNets, and the tests that stand for each.

Every family has forms that are rewritten and others that are refused, or only look like it and are left alone. Names
are keys of the tables in `models.py` and `libraries.py`, which `test_wild.py` and `test_libraries.py` go through.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One family of form.

    Attributes:
        title: what it is about.
        rewritten: names in `FORMS` or `DENSE`: every bit stays and chains run rewritten.
        left_alone: names in `REFUSED`, `REJECTED`, `NOT_APPLICABLE` or `LOOK_ALIKES`: no chain of that kind is
            rewritten.
    """

    title: str
    rewritten: tuple[str, ...]
    left_alone: tuple[str, ...]


FAMILIES: dict[int, Family] = {
    1: Family("growing pairwise concats", ("growing", "prepended"), ("MSDNet", "overwritten features")),
    2: Family(
        "lists, tuples, keywords, spellings of concat",
        ("lists in every spelling", "legacy empty tensor", "torchvision DenseNet"),
        ("concat of batches", "HarDNet"),
    ),
    3: Family("chains across modules", ("growing", "torchvision DenseNet", "timm DPN-48b"), ("VoVNet", "GoogLeNet")),
    4: Family(
        "activations",
        (
            "in-place activation, shared",
            "activations as functions",
            "activation of several operations",
            "LeakyReLU",
            "PReLU",
            "no activation",
            "skips and lists",
        ),
        ("RRDB", "RDN"),
    ),
    5: Family("dropout", ("functional dropout", "torchvision DenseNet, drop_rate"), ("stochastic depth",)),
    6: Family(
        "classes of norms",
        (
            "fused norm and activation",
            "norm of its own class",
            "norm averaged over all steps",
            "norm without running statistics",
            "frozen norm",
            "GroupNorm",
            "InstanceNorm",
            "timm DenseNet, LayerNorm2d",
        ),
        ("norm that counts", "RRDB"),
    ),
    7: Family(
        "consumers",
        ("no bottleneck", "grouped convolution", "masked convolution", "dense U-Net"),
        ("PeleeNet", "Inception"),
    ),
    8: Family(
        "several readers",
        ("two norms on one concat", "one norm at two places", "skips and lists", "cropped"),
        ("overwritten features", "ResNet"),
    ),
    9: Family(
        "something between concat and norm",
        (
            "gated features",
            "gated concats",
            "shuffled channels",
            "channel shuffle",
            "random channels",
            "dropout between",
        ),
        ("ShuffleNet",),
    ),
    10: Family("control flow and odd names", ("branches and odd names",), ("branch on values",)),
    11: Family(
        "checkpointed already",
        ("torchvision DenseNet, memory_efficient", "timm DenseNet, memory_efficient"),
        ("checkpoint that counts",),
    ),
    12: Family("wrappers", ("in DataParallel",), ("compiled", "traced")),
    13: Family(
        "in-place activations on features",
        ("activated features", "overwritten concats"),
        ("overwritten features",),
    ),
    14: Family(
        "side effects",
        (
            "buffer of its own",
            "buffer averaged under no_grad",
            "no_grad inside",
            "autocast inside",
            "autocast around every layer",
        ),
        ("stochastic depth", "scheduled", "autocast by a call"),
    ),
    15: Family(
        "1-D, 3-D, segmentation, encoders",
        ("MONAI DenseNet 1-D, BatchNorm", "MONAI DenseNet 3-D, BatchNorm", "dense U-Net", "skips and lists"),
        ("U-Net", "MONAI U-Net"),
    ),
}
