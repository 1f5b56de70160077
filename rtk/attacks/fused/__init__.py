"""The input gradient of ResNet-like networks in fused operators.

The forward is that of `rtk.nn._fused`, and so is the reading of a network; `program` adds the way
back, `route` decides whether a call takes it and has compared it with autograd before it does.
"""

from rtk.attacks.fused.program import FusedProgram
from rtk.attacks.fused.route import Route, enabled, why_not
from rtk.nn._fused.layers import NotApplicable

__all__ = ["FusedProgram", "NotApplicable", "Route", "enabled", "why_not"]
