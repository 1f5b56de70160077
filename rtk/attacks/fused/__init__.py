"""The input gradient of ResNet-like networks in fused operators.

While a network is attacked its weights are constants and its batch norms affine, so a convolution,
its batch norm, the addition of a skip connection and the ReLU are one operator with prepared
weights, and so is the way back. `reader` finds what a network consists of, `program` runs it,
`route` decides whether a call takes it and has compared it with autograd before it does.
"""

from rtk.attacks.fused.layers import NotApplicable
from rtk.attacks.fused.program import FusedProgram
from rtk.attacks.fused.route import Route, enabled, why_not

__all__ = ["FusedProgram", "NotApplicable", "Route", "enabled", "why_not"]
