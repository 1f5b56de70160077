"""The smoke scale made smaller, so that all figures run in seconds. Not a test itself.

As a script it runs the figures that are named into a folder: shrunk_smoke.py FOLDER NAME...
"""

import sys
from dataclasses import replace
from pathlib import Path

from rtk import recipes
from rtk.config import DataConfig, ModelConfig, round_sparsity
from rtk.recipes import SCALES

_SMOKE = SCALES.get("smoke")
_TARGET = DataConfig("digits[2,3]")


def _short(train):
    return replace(train, epochs=1, batch_size=128, warmup_epochs=0)


SHRUNK = replace(
    _SMOKE,
    source=DataConfig("digits[0,1]"),
    targets=(_TARGET,),
    many_targets=(_TARGET, DataConfig("digits[4,5]"), DataConfig("digits[6,7]")),
    models=(ModelConfig(stem="3x3", width=0.0625),),
    **{
        name: _short(getattr(_SMOKE, name))
        for name in (
            *("natural", "robust", "smoothed", "finetune", "linear", "lmp"),
            *("upstream", "downstream", "segment"),
        )
    },
    attack=replace(_SMOKE.attack, steps=1),
    sweep=(),
    segmentation_settings=replace(_SMOKE.segmentation_settings, epoch_steps=2),
    upstream_attack=replace(_SMOKE.attack, steps=1),
    downstream_attack=replace(_SMOKE.attack, steps=1),
    evaluation=replace(_SMOKE.attack, steps=2),
    replicates=((0, 0), (0, 1)),
    sparsities=(0.9,),
    structured=(0.5,),
    rounds=(2,),
    high=round_sparsity(2, 0.6),
    ood=("digits[0,1]",),
    source_images=100,
)


def main():
    folder, *names = sys.argv[1:]
    for name in names:
        recipes.run(recipes.reproduce(name, SHRUNK, Path(folder)))


if __name__ == "__main__":
    main()
