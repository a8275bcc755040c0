"""Options of the tests: `--live` asks the network whether the corpora are where the table says."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--live", action="store_true", help="run the tests that need a network too")


def pytest_configure(config):
    config.addinivalue_line("markers", "live: needs a network; run by --live alone")


def pytest_collection_modifyitems(config, items):
    # The README's chain takes minutes: begun last, it would keep one of two cores waiting. xdist
    # keeps this order with --no-loadscope-reorder.
    items.sort(key=lambda item: item.path.name != "test_readme.py")
    if not config.getoption("--live"):
        skip = pytest.mark.skip(reason="needs --live")
        for item in items:
            if "live" in item.keywords:
                item.add_marker(skip)
