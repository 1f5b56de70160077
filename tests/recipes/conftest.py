import pytest


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread_unless_gpu):
    pass
