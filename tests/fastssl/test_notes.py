"""NoteQueue: messages of all threads, in order, printable, and only while it is attached."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from fastssl.observe.notes import NoteQueue


def test_messages_of_both_packages_are_taken_once_in_order():
    with NoteQueue() as notes:
        logging.getLogger("fastssl_pipelines.executors.dali").info("first")
        logging.getLogger("fastssl.train.checkpoint").warning("100% of %s")
        logging.getLogger("fastssl.data").debug("a detail")
        logging.getLogger("elsewhere").warning("not ours")
        assert notes.take() == ["first", "100% of %s"]
        assert notes.take() == []


def test_names_are_printable():
    with NoteQueue() as notes:
        logging.getLogger("fastssl_pipelines").warning("a\x1b[31m\n.jpg")
    assert notes.take() == [r"a\x1b[31m\n.jpg"]


def test_nothing_is_collected_after_the_end():
    with NoteQueue() as notes:
        pass
    logging.getLogger("fastssl").warning("late")
    assert notes.take() == []


def test_no_message_of_a_thread_is_lost():
    with NoteQueue() as notes, ThreadPoolExecutor(4) as pool:
        log, taken = logging.getLogger("fastssl_pipelines"), []
        calls = [pool.submit(log.info, f"{index}") for index in range(1000)]
        while not all(call.done() for call in calls):
            taken += notes.take()
        taken += notes.take()
    assert sorted(map(int, taken)) == list(range(1000))
