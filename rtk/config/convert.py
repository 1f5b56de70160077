"""Settings of `rtk convert`."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import check_sparsity, require
from rtk.config.stage import StageConfig


@dataclass(frozen=True)
class ConvertConfig(StageConfig):
    """Turn a published checkpoint into one of rtk's, and the masks in it into a ticket.

    Args:
        file: the checkpoint: safetensors, or what torch.save wrote (.pt, .pth, .ckpt, .tar).
        format: robustness, prune, hidden-networks, smoothing, torchvision or timm; auto tells them
            apart by the names of the tensors. docs/checkpoints.md says which is whose.
        arch: the network; null is the ResNet that the tensors fit, or what the file says.
        entry: of the file, the entry that holds the network; null is model or state_dict.
        sparsity: of hidden-networks: fraction of each layer that is pruned by its scores; null
            makes no ticket of them.
        mean: of the images' channels in [0, 1] scale; null is the file's own, else what its kind of
            network is trained with, which is said.
        std: of the channels, likewise.
        source: what the network was trained on, for reports; null is imagenet for 1000 classes,
            else unknown.
        pretrain: how, for reports, e.g. natural or pgd-l2-3; null reads it off names such as
            resnet50_l2_eps3.ckpt.
        trust: open a pickle that can run code, in a process of its own, as you trust its author.
    """

    file: str = ""
    format: str = "auto"
    arch: str | None = None
    entry: str | None = None
    sparsity: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None
    pretrain: str | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.file), "file", "the path of a checkpoint", self.file)
        require(
            (self.mean is None) == (self.std is None),
            "mean, std",
            "both or neither, as the file's own are left out with either",
            (self.mean, self.std),
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(
                values is None or len(values) == 3, name, "3 numbers, e.g. [0.5,0.5,0.5]", values
            )
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
