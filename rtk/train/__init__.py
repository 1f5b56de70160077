"""Training: the step, the loop, the optimiser, the checkpoint."""

from rtk.train.accuracy import Accuracy, accuracy
from rtk.train.checkpoint import CHECKPOINT, Checkpoint, load_state, save_checkpoint
from rtk.train.distributed import check_batch_size
from rtk.train.free import make_free_step
from rtk.train.loop import resolve_arithmetic, train
from rtk.train.miou import ConfusionMatrix
from rtk.train.optim import learning_rate, make_optimizer
from rtk.train.segmentation_accuracy import SegmentationAccuracy, segmentation_accuracy
from rtk.train.setup import resolve_device, seed_everything, set_threads
from rtk.train.step import make_step

__all__ = [
    "CHECKPOINT",
    "Accuracy",
    "Checkpoint",
    "ConfusionMatrix",
    "SegmentationAccuracy",
    "accuracy",
    "check_batch_size",
    "learning_rate",
    "load_state",
    "make_free_step",
    "make_optimizer",
    "make_step",
    "resolve_arithmetic",
    "resolve_device",
    "save_checkpoint",
    "seed_everything",
    "segmentation_accuracy",
    "set_threads",
    "train",
]
