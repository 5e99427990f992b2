"""The processes of a distributed run take one answer, whoever asks first and whoever never asks."""

import datetime
import threading

import pytest
from torch.distributed import HashStore, TCPStore

from lorasb_kernels.ops.triton.agreement import agreed, group_store


def test_a_process_alone_answers_for_itself():
    assert agreed("shape", lambda: "mine", None) == "mine"
    assert group_store() is None


def test_the_first_answers_for_all_and_the_others_compute_nothing():
    store, begun, free = HashStore(), threading.Event(), threading.Event()
    answers = {}

    def slow():
        begun.set()
        free.wait()
        return "first"

    def ask(rank, answer):
        answers[rank] = agreed("shape", answer, store)

    threads = [threading.Thread(target=ask, args=(0, slow))]
    threads[0].start()
    begun.wait()
    threads += [threading.Thread(target=ask, args=(rank, pytest.fail)) for rank in (1, 2)]
    for thread in threads[1:]:
        thread.start()
    free.set()
    for thread in threads:
        thread.join()
    assert answers == {0: "first", 1: "first", 2: "first"}
    assert agreed("another shape", lambda: "second", store) == "second"


def test_others_do_not_wait_for_one_that_failed():
    store = HashStore()
    with pytest.raises(ZeroDivisionError):
        agreed("shape", lambda: str(1 / 0), store)
    with pytest.raises(RuntimeError, match="the process that measures for all of them failed"):
        agreed("shape", pytest.fail, store)


def test_others_do_not_wait_for_ever():
    store = TCPStore("localhost", 0, is_master=True)
    store.add("shape/asked", 1)  # by a process that died then
    with pytest.raises(RuntimeError):
        agreed("shape", pytest.fail, store, datetime.timedelta(milliseconds=50))
