"""To be quiet in one thread takes nothing away from the others."""

import logging
import threading
import warnings
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from lora_dpo import quiet


def bars():
    return transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()


@pytest.fixture(autouse=True)
def with_bars():
    before = bars()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    (transformers_logging.enable_progress_bar if before[0] else transformers_logging.disable_progress_bar)()
    (datasets.enable_progress_bars if before[1] else datasets.disable_progress_bars)()


@pytest.mark.parametrize("first_out", ["first in", "second in"])
def test_it_is_quiet_until_the_last_thread_is_out(first_out):
    level = logging.getLogger("bitsandbytes").level
    inside, leave = threading.Event(), threading.Event()

    def other():
        with quiet.quiet_libraries():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    if first_out == "first in":
        thread.start()
        assert inside.wait(60)
        with quiet.quiet_libraries():
            leave.set()
            thread.join()
            assert bars() == (False, False)
            assert logging.getLogger("bitsandbytes").level == logging.ERROR
    else:
        with quiet.quiet_libraries():
            thread.start()
            assert inside.wait(60)
        assert bars() == (False, False)
        leave.set()
        thread.join()
    assert bars() == (True, True)
    assert logging.getLogger("bitsandbytes").level == level


def test_warnings_of_other_threads_are_heard_while_and_after_one_is_quiet():
    """With `warnings.catch_warnings` in two threads that overlap, the filters of the first stay for good."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        one, other = quiet.quiet_libraries(), quiet.quiet_libraries()
        one.__enter__()
        warnings.warn("while one is quiet", UserWarning, stacklevel=1)
        other.__enter__()
        one.__exit__(None, None, None)
        warnings.warn("while the other is", UserWarning, stacklevel=1)
        other.__exit__(None, None, None)
        warnings.warn("afterwards", FutureWarning, stacklevel=1)
        warnings.warn_explicit("what will be renamed", FutureWarning, "peft/x.py", 1, module="peft.x")
    assert [str(one.message) for one in heard] == ["while one is quiet", "while the other is", "afterwards"]


def test_filters_do_not_pile_up():
    for _ in range(3):
        quiet.never_warn(SyntaxWarning, "nowhere")
    assert len([one for one in warnings.filters if one[2] is SyntaxWarning and "nowhere" in str(one[3])]) == 1


def test_no_thread_of_ours_takes_the_warnings_of_all():
    """`catch_warnings` is for the main thread: the command line alone has it."""
    package = Path(quiet.__file__).parent
    found = {path.name for path in package.rglob("*.py") if "with warnings.catch_warnings" in path.read_text("utf-8")}
    assert found == {"folder.py", "commands.py", "merge.py"}  # `strictness`, and the commands
