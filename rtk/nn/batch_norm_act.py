"""BatchNormAct2d: nn.BatchNorm2d that adds a residual and applies ReLU in the same passes."""

from __future__ import annotations

from torch import Tensor, nn

from rtk import ops


class BatchNormAct2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with `forward(x, residual=None, relu=False)`: a drop-in.

    Takes nn.BatchNorm2d's arguments, has its state_dict keys, and called with `x` alone does what
    it does, bit for bit on a CPU. On a GPU, channels_last activations take `ops.batch_norm_act`.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Return relu(batch norm of `x` + residual), (N, C, H, W) like `x`.

        Args:
            x: (N, C, H, W), floating.
            residual: like `x`, or None.
            relu: whether the ReLU follows.

        Raises:
            RtkError: if shapes do not fit, or in training there is one value a channel only.
        """
        self._check_input_dim(x)
        training, mean, var = self.training, self.running_mean, self.running_var
        updates = training and self.track_running_stats
        has_buffers = mean is not None or var is not None
        running = (not training and has_buffers) or updates
        count: Tensor | None = self.num_batches_tracked if updates else None
        momentum = self.momentum
        if momentum is None:  # the mean over all batches so far; reading the count synchronises
            momentum = 0.0
            if count is not None:
                count.add_(1)
                momentum, count = 1.0 / float(count), None
        return ops.batch_norm_act(
            x,
            residual,
            self.weight,
            self.bias,
            mean if running else None,
            var if running else None,
            training=training or not has_buffers,
            relu=relu,
            momentum=momentum,
            eps=self.eps,
            num_batches_tracked=count,
        )
