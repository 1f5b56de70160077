import pytest


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread):
    with one_cpu_thread():
        yield
