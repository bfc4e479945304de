import os
import signal
import time

import pytest

from convnext_cli.runs.interrupt import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _keep_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_wish_with_its_name(number):
    request = StopRequest()
    request.listen()
    assert request.reason(needed_seconds=0.0) is None

    os.kill(os.getpid(), number)

    assert request.reason(needed_seconds=0.0) == number.name


def test_a_terminal_that_is_gone_is_nothing_to_a_run_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    request.listen()

    os.kill(os.getpid(), signal.SIGHUP)

    assert request.reason(needed_seconds=0.0) is None


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    request = StopRequest()
    request.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("left", "stops"), [(200.0, False), (100.0, True), (1.0, True)])
def test_a_job_stops_while_there_is_time_for_a_step_a_save_and_a_margin(left, stops):
    request = StopRequest(deadline=time.time() + left)

    assert (request.reason(needed_seconds=90.0) is not None) == stops


def test_the_time_limit_of_a_job_that_is_over_is_not_heeded():
    assert StopRequest(deadline=time.time() - 5.0).reason(needed_seconds=90.0) is None
