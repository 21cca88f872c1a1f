"""Naive DenseNets (arXiv 1608.06993), written the ways people write them and with no memory tricks.

They need nothing but torch, and each file stands alone: copy one and it works.

| file | network | how its layers concatenate |
|---|---|---|
| `bc.py` | with bottlenecks, 32x32 images or ImageNet | every layer is given the list of earlier features |
| `growing.py` | with bottlenecks, 32x32 images | pairwise, `[x, new]` or `[new, x]`: the tensor grows |
| `plain.py` | without bottleneck or compression | pairwise, in a layer that is an `nn.Sequential` |
| `volumetric.py` | 3-D, for CT volumes | pairwise, by keyword, around an `nn.Sequential` |
| `signal.py` | 1-D, for 12-lead electrocardiograms | all earlier features are arguments, `layer(*features)` |

Each of these has a class `DenseNet` that can be built without arguments; its arguments make it as small as wanted.
`train.py` trains any of them, or any other classifier.
"""
