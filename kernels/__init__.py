"""Triton kernels, one file per op, imported as `rtk.kernels`.

The folder lies beside `rtk/` because kernels are read and tuned on their own; the package maps it
to `rtk.kernels` (see pyproject.toml). An op's file has the stem of its contract in `rtk/ops`.
"""

if __name__ != "rtk.kernels":
    raise ImportError(
        f"kernels was imported as {__name__!r}: import it as `rtk.kernels`, "
        "after `pip install -e .` in the repository's root"
    )
