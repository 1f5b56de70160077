"""Pretrain: train a network on a source task, naturally or on adversarial examples."""

from __future__ import annotations

from pathlib import Path

from rtk import attacks, data, distributed, models
from rtk.config import PretrainConfig
from rtk.identity import claim_folder, config_hash, to_dict
from rtk.train import (
    CHECKPOINT,
    accuracy,
    check_batch_size,
    resolve_arithmetic,
    resolve_device,
    seed_everything,
    set_threads,
    train,
)


@distributed.stage
def run(config: PretrainConfig) -> Path:
    """Pretrain as `config` says and return the checkpoint's path.

    A run that was stopped goes on where it was; a finished one is left as it is. The pixels'
    mean and deviation are measured on the training images and become part of the model.

    Raises:
        RtkError: for bad settings or data, or a loss that becomes NaN.
    """
    device = resolve_device(config.device)
    set_threads(config.threads)
    check_batch_size(config.train.batch_size)
    dataset = data.load(config.data)
    seed_everything(config.seed)
    mean, std = data.channel_stats(dataset.train)
    arch = models.resolve_arch(config.model.arch)
    stem = models.resolve_stem(config.model.stem, dataset.image_size, arch)
    spec = models.ModelSpec(arch, stem, config.model.width, len(dataset.classes), mean, std)
    attack = attacks.create(config.attack)
    model = models.create(spec).to(device)
    folder = claim_folder(config)  # once nothing in the settings can be wrong any more
    channels_last, _ = resolve_arithmetic(config.train, device)
    batches = data.Batches(
        dataset.train,
        config.train.batch_size,
        augment=dataset.augment if config.data.augment == "auto" else config.data.augment,
        shuffle=True,
        drop_last=True,
        seed=config.seed,
        device=device,
        channels_last=channels_last,
    )
    test = data.Batches(dataset.test, config.train.batch_size, device=device)
    train(
        model,
        batches,
        config.train,
        folder=folder,
        meta={
            "stage": "pretrain",
            "config": to_dict(config),
            "config_hash": config_hash(config),
            "classes": list(dataset.classes),
            "lineage": {
                "arch": spec.arch,
                "source": config.data.name,
                "pretrain": config.attack.label,
                "robust": attack is not None,
                "pretrain_seed": config.seed,
                "seed": config.seed,
            },
        },
        attack=attack,
        evaluate=lambda m: {"top1": accuracy(m, test).top1},
        resume=config.resume,
        label=f"pretrain {config.attack.label}",
    )
    return folder / CHECKPOINT
