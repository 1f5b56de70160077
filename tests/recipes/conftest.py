from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_cpu_thread():
    """On models this small more threads, or a GPU, are slower; and on a GPU bits may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_cpu_thread():
    with one_cpu_thread():
        yield
