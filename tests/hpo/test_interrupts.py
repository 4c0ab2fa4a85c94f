"""Ctrl-C arrives where nothing is half done, and is never lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hpo.interrupts import SIGNALS, Interrupts


def press(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_is_held_until_it_is_let_through(number: signal.Signals) -> None:
    reached = []
    with Interrupts() as interrupts:
        press(number)
        reached.append("held")
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            reached.append("never")
    assert reached == ["held"]


def test_where_it_is_let_through_it_is_raised_at_once() -> None:
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.let_through():
        press()
        pytest.fail("the interrupt did not come")


def test_a_held_part_inside_is_finished_first() -> None:
    reached = []
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.let_through():
        with interrupts.held():
            press()
            reached.append("the held part")
        reached.append("never")
    assert reached == ["the held part"]


def test_one_that_was_held_to_the_end_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press()


def test_an_error_is_not_covered_up_by_a_held_interrupt() -> None:
    with pytest.raises(ValueError, match="ours"), Interrupts():
        press()
        raise ValueError("ours")


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
