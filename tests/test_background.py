import threading

import pytest

from utils.background import Background


def test_jobs_are_done_in_order_beside_the_caller():
    done, threads = [], set()

    def job(number: int) -> None:
        threads.add(threading.current_thread())
        done.append(number)

    with Background() as background:
        for number in range(20):
            background.put(lambda number=number: job(number))
    assert done == list(range(20))
    assert threading.main_thread() not in threads
    assert len(threads) == 1


def test_the_caller_waits_where_too_many_jobs_do():
    first_may_end, put = threading.Event(), []

    def fill(background: Background) -> None:
        for number in range(4):
            background.put(lambda: first_may_end.wait(20))
            put.append(number)

    with Background(waiting=2) as background:
        filling = threading.Thread(target=fill, args=(background,))
        filling.start()
        filling.join(0.3)
        assert put == [0, 1]
        first_may_end.set()
        filling.join(20)
        assert put == [0, 1, 2, 3]


def fail() -> None:
    raise OSError("disk full")


def test_an_error_is_raised_when_the_block_ends():
    with pytest.raises(OSError, match="disk full"), Background() as background:
        background.put(fail)


def test_an_error_stops_the_caller():
    put = []

    def fail_often() -> None:
        with Background() as background:
            for number in range(100):
                background.put(fail)
                put.append(number)

    with pytest.raises(OSError, match="disk full"):
        fail_often()
    assert len(put) <= 2


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_block_leaves_waiting_jobs_undone(kind):
    started, may_end, done = threading.Event(), threading.Event(), []

    def running() -> None:
        started.set()
        may_end.wait(20)
        done.append("running")

    background = Background()

    def stopped() -> None:
        with background:
            background.put(running)
            background.put(lambda: done.append("waiting"))
            started.wait(20)
            threading.Timer(0.1, may_end.set).start()
            raise kind

    with pytest.raises(kind):
        stopped()
    assert done == ["running"]  # a file that is being written is written
    assert not any(thread.is_alive() for thread in background.thread._threads)
