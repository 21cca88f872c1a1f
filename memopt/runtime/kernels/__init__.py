"""Fused kernels of the fast runtime: one file an operation, its plain-torch reference beside it.

Every operation works on matrices of positions × channels (channels-last): P = batch · spatial positions rows, the
channels side by side in a row. A feature arena is such a matrix; an interval of its channels is a view with the arena's
row stride. Importing an operation's file defines a `torch.ops.memopt` operator: compiled by Triton on CUDA, the
reference on a CPU, nothing but shapes on fake tensors.
"""
