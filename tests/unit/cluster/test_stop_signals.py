import os
import signal
import threading

from everstep.cluster.lifecycle import StopAsked
from everstep.cluster.stop_signals import StopSignals


def test_signals_are_collected_while_entered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.take() == []
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        asked = signals.take()
        assert sorted(asked, key=lambda ask: ask.by) == [
            StopAsked("Ctrl-C", insistent=True),
            StopAsked("SIGTERM", insistent=False),
        ]
        assert signals.take() == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.take() == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    taken: list[list[StopAsked]] = []

    def enter() -> None:
        with StopSignals() as signals:
            taken.append(signals.take())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(20)
    assert taken == [[]]
