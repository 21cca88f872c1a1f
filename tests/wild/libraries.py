"""DenseNets of torchvision, timm and MONAI, small, and other networks of theirs that only look like it."""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

_missing = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision() -> Any:
    """Builds of torchvision for CUDA miss their operators beside a torch for the CPU; its models need none."""
    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            _missing.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torchvision")


_import_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of what they import warns
    import monai.networks.nets as monai_nets
    import timm
    import torchvision.models as torchvision_models
    from timm.layers import GroupNormAct, SyncBatchNormAct, convert_sync_batchnorm
    from timm.models.densenet import DenseNet as TimmDenseNet

__all__ = ["DENSE", "LOOK_ALIKES", "SyncBatchNormAct", "convert_sync_batchnorm"]

SMALL = {"growth_rate": 8, "block_config": (2, 3, 2, 2)}


def _torchvision(**options: Any) -> nn.Module:
    return torchvision_models.DenseNet(**SMALL, num_init_features=16, num_classes=5, **options)


def _timm(**options: Any) -> nn.Module:
    return TimmDenseNet(**SMALL, num_classes=5, **options)


def _monai(dimensions: int, **options: Any) -> nn.Module:
    sizes = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2, 2), "bn_size": 2}
    return monai_nets.DenseNet(dimensions, 2, 5, **sizes, **options)


INSTANCE = {"norm": "instance", "act": ("leakyrelu", {"negative_slope": 0.1})}
GROUP = {"norm": ("group", {"num_groups": 2}), "act": "swish"}
IMAGE, PICTURE, SIGNAL, VOLUME = (2, 3, 64, 64), (2, 2, 64, 64), (2, 2, 64), (2, 2, 32, 32, 32)

Make = Callable[[], nn.Module]
DENSE: dict[str, tuple[Make, tuple[int, ...], int]] = {
    "torchvision DenseNet": (_torchvision, IMAGE, 13),
    "torchvision DenseNet, drop_rate": (partial(_torchvision, drop_rate=0.2), IMAGE, 13),
    "torchvision DenseNet, memory_efficient": (partial(_torchvision, memory_efficient=True), IMAGE, 13),
    "timm DenseNet, BatchNormAct2d": (_timm, IMAGE, 13),
    "timm DenseNet, GroupNormAct": (partial(_timm, norm_layer=partial(GroupNormAct, group_size=2)), IMAGE, 13),
    "timm DenseNet, LayerNorm2d": (partial(_timm, norm_layer="layernorm2d"), IMAGE, 13),
    "timm DenseNet, SiLU, drop rates": (partial(_timm, act_layer="silu", drop_rate=0.1, proj_drop_rate=0.1), IMAGE, 13),
    "timm DenseNet, memory_efficient": (partial(_timm, memory_efficient=True), IMAGE, 13),
    "timm DPN-48b": (lambda: timm.create_model("dpn48b", num_classes=5), IMAGE, 19),
    "timm RDNet": (lambda: timm.create_model("rdnet_tiny", num_classes=5), IMAGE, 1),
    **{
        f"MONAI DenseNet {dimensions}-D, {norm}": (partial(_monai, dimensions, **options), shape, 9)
        for dimensions, shape in ((1, SIGNAL), (2, PICTURE), (3, VOLUME))
        for norm, options in (
            ("BatchNorm", {}),
            ("InstanceNorm, LeakyReLU", INSTANCE),
            ("GroupNorm, Swish", GROUP),
        )
    },
}
"""By name: the model, the shape of its input, how many chains at least are rewritten: all that are found."""


def _from_torchvision(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(torchvision_models, name)(num_classes=5, **options)


def _from_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=5)


LOOK_ALIKES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "torchvision GoogLeNet": (partial(_from_torchvision, "googlenet", aux_logits=False, init_weights=False), IMAGE),
    "torchvision ShuffleNet V2": (partial(_from_torchvision, "shufflenet_v2_x0_5"), IMAGE),
    "torchvision SqueezeNet": (partial(_from_torchvision, "squeezenet1_1"), IMAGE),
    "torchvision ResNet-18": (partial(_from_torchvision, "resnet18"), IMAGE),
    "timm VoVNet": (partial(_from_timm, "ese_vovnet19b_dw"), IMAGE),
    "timm HRNet": (partial(_from_timm, "hrnet_w18_small"), IMAGE),
    "timm DLA-34": (partial(_from_timm, "dla34"), IMAGE),
    "timm CSPDarkNet": (partial(_from_timm, "cspdarknet53"), IMAGE),
    "timm SelecSLS": (partial(_from_timm, "selecsls42b"), IMAGE),
    "MONAI U-Net": (lambda: monai_nets.UNet(2, 2, 5, (4, 8, 16), (2, 2)), PICTURE),
    "MONAI BasicUNet": (lambda: monai_nets.BasicUNet(2, 2, 5, (4, 4, 8, 8, 16, 4)), PICTURE),
}
"""Networks that concatenate, and have no concat → norm → activation chain."""
