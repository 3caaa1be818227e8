"""Keep the libraries' progress bars and advice out of the way: faces draw their own."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of transformers and datasets, and no advice that a user cannot act on."""
    import datasets
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        # bitsandbytes asks to install an optional CPU kernel that is not used
        with warnings.catch_warnings(), errors_only("bitsandbytes"):
            warnings.simplefilter("ignore", FutureWarning)  # what the libraries will rename
            yield
    finally:
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Nothing below an error from the logger of that name and those under it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
