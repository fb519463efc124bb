import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

from utils import signals
from utils.signals import StopRequest


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_first_signal_is_remembered(number):
    usual = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert signal.getsignal(number) == usual


def test_a_repeated_signal_is_the_same_request():
    """torchrun passes on to its ranks what Ctrl-C or a scheduler has sent to all of them."""
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert stop.number == signal.SIGINT


def test_a_later_signal_acts_as_usual(monkeypatch):
    monkeypatch.setattr(signals, "REPEATED_WITHIN", 0.05)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGTERM


def test_processes_that_load_images_leave_requests_to_the_trainer():
    code = "import time, utils.signals; utils.signals.ignore_requests(); print('on', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.poll() is None
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
