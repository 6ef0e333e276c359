"""What the suite leaves out for its time, and ``--whole`` runs: a costly test runs for the families that its mark names."""

from __future__ import annotations


def pytest_collection_modifyitems(config, items):
    if config.getoption("--whole"):
        return
    left_out = [item for item in items if left_out_of_the_suite(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def left_out_of_the_suite(item):
    mark = item.get_closest_marker("costly")
    return mark is not None and item.callspec.params["row"].name not in mark.args
