"""ResNet-like networks in eval mode as programs of fused operators.

Weights are constants and batch norms affine, so a convolution, its batch norm, the addition of a
skip connection and the ReLU are one operator with prepared weights. `reader` finds what a network
consists of, `program` runs it. For inference by `rtk.nn.fuse`; `rtk.attacks.fused` adds the way
back.
"""
