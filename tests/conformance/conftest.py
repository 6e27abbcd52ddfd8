"""Makes transformers' own tests importable for the files beside this one, and their marks known.

The files are not named `test_*.py`: `make test` passes them by, and nothing is fetched before one of them is collected.
"""

import upstream


MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers")


def pytest_pycollect_makemodule(module_path, parent):
    upstream.make_importable()
