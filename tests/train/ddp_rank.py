"""One rank of a training with DistributedDataParallel, for test_ddp.py. Not a test itself.

    python ddp_rank.py FOLDER BACKEND RANK RANKS

trains on this rank's share of each batch, naturally and then on PGD's images, and leaves what it
saw in FOLDER/RANK.pt. In fp64 (but the loss), with batch norm in eval mode and an attack that
starts at the image, so that the ranks together do what one process does.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from rtk.attacks import PGD, GraphedAttack
from rtk.data import Batches, Split
from rtk.train import accuracy, make_step

STEPS = 7
BATCH = 8
ATTACKS = {"natural": None, "pgd": PGD(eps=0.1, step_size=0.04, steps=3, random_start=False)}


class Network(nn.Module):
    """Counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)  # buffers, which the wrapper's forward sends around
        self.fc = nn.Linear(8, 4)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def data():
    """Return STEPS batches, the same ones in every process."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def run(name, device, wrap=lambda network: network, share=slice(None), graph="auto"):
    """Train a new network; return what can be compared."""
    torch.manual_seed(0)
    network = Network().double().to(device).eval()
    model = wrap(network)
    wrapped = []
    model.register_forward_pre_hook(lambda *_: wrapped.append(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = make_step(model, optimizer, ATTACKS[name], amp=None, graph=graph)
        losses = [step(x[share].to(device), y[share].to(device)) for x, y in data()]
    return {
        "model": model,
        "losses": torch.stack(losses).cpu(),
        "weights": {name: p.detach().cpu() for name, p in network.named_parameters()},
        "wrapped": len(wrapped),
        "forwards": network.forwards,
        "warnings": [str(w.message) for w in caught if "make_step" in str(w.message)],
        "captured": isinstance(step._attack, GraphedAttack) and step._attack.captured,
    }


def main(folder, backend, rank, ranks):
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)

    def wrap(network):
        return nn.parallel.DistributedDataParallel(
            network, device_ids=[rank] if backend == "nccl" else None
        )

    mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    found = {name: run(name, device, wrap, mine) for name in ATTACKS}
    model = found["pgd"]["model"]
    if rank == 0:  # the others do not take part
        images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
        batches = Batches(Split(images, torch.arange(6) % 4), 4, device=device)
        found["alone"] = accuracy(model, batches, ATTACKS["pgd"]).images
    torch.distributed.barrier()
    for of_run in (found["natural"], found["pgd"]):
        del of_run["model"]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
