"""Ctrl-C arrives where nothing is half done, and is never lost: the first at an epoch's end, the second at once."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from hpo.search.interrupts import SIGNALS, Interrupts


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """No signal is ignored, even if the tests run under nohup."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def press(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_is_held_until_it_is_let_through(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        press(number)
        reached.append("held")
        with interrupts.let_through():
            reached.append("never")
    assert reached == ["held"]


def test_where_it_is_let_through_it_is_raised_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.let_through():
        press()
        pytest.fail("the interrupt did not come")


def test_the_first_waits_for_the_end_of_an_epoch() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.patient():
        press()
        reached.append("the rest of the epoch")
        assert interrupts.asked
        interrupts.check()
        reached.append("never")
    assert reached == ["the rest of the epoch"]


def test_the_second_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.patient():
        press()
        press(signal.SIGTERM)
        pytest.fail("the interrupt did not come")


@pytest.mark.parametrize("times", [1, 2])
def test_a_held_part_inside_is_finished_first(times: int) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.patient():
        with interrupts.held():
            for _ in range(times):
                press()
            reached.append("the held part")
        reached.append("the rest of the epoch")
        interrupts.check()
    assert reached == ["the held part", "the rest of the epoch"][: 3 - times]


def test_who_asks_from_another_thread_is_heard_as_a_first_one_and_counts_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.patient():
        for _ in range(2):
            asking = threading.Thread(target=interrupts.request)
            asking.start()
            asking.join()
        reached.append("the rest of the epoch")
        interrupts.check()
    assert reached == ["the rest of the epoch"]


def test_one_that_was_held_to_the_end_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press()


def test_an_error_is_not_covered_up_by_a_held_interrupt() -> None:
    with pytest.raises(ValueError, match="ours"), Interrupts():
        press()
        raise ValueError("ours")


def test_the_first_is_told_once() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with pytest.raises(KeyboardInterrupt), Interrupts(told=lambda: told.put("stopping")):
        press()
        press()
    assert told.get(timeout=10) == "stopping"
    assert told.empty()


def test_what_is_told_may_be_printed_while_the_main_thread_prints() -> None:
    """A print inside of a print is an error of Python's: it would end the run as if that had crashed."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from hpo.search.interrupts import Interrupts\n"
        "with Interrupts(told=lambda: print('stopping', flush=True)) as interrupts:\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    sys.stdout.write('x' * 2**20)\n"  # more than the pipe takes: the main thread waits in there
        "    sys.stdout.flush()\n"
        "    sys.exit(0 if interrupts.asked else 7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert said.count("stopping") == 1


def test_a_part_of_another_thread_holds_nothing_back_and_keeps_its_manners_to_itself() -> None:
    entered, leave = threading.Event(), threading.Event()

    def beat() -> None:
        with interrupts.held():
            entered.set()
            leave.wait(10)

    with Interrupts() as interrupts:
        heart = threading.Thread(target=beat)
        with interrupts.patient():
            heart.start()
            entered.wait(10)
        leave.set()
        heart.join()
        reached = []
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            press()
            press()
            reached.append("still held")
            interrupts.check()
        assert reached == ["still held"]
        interrupts._count = 0


def test_a_third_one_ends_a_process_that_heeds_none() -> None:
    code = (
        "import os, signal, time\n"
        "from hpo.search.interrupts import Interrupts\n"
        "with Interrupts():\n"
        "    for _ in range(3):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still there')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == ""


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_it_does_nothing() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupts() as interrupts, interrupts.let_through():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
