"""Tests batches that are made ahead: the same ones, in any order, with the error of the batch that was asked for."""

import threading

import pytest

from pqk.compress.train.ahead import Ahead
from pqk.errors import PqkError


class Counted:
    """Batches that are their own number; which thread made which; number 3 cannot be made."""

    truthful = True

    def __init__(self):
        self.made, self.busy = [], threading.Lock()

    def train(self, index, count, size):
        assert self.busy.acquire(blocking=False), "two threads at once"
        self.made.append(index)
        self.busy.release()
        if index == 3:
            raise PqkError("batch 3 is damaged")
        return index, count, size

    def held_out(self, pairs=None, size=None, batch=None):
        assert self.busy.acquire(blocking=False), "two threads at once"
        yield pairs, size, batch
        self.busy.release()


def test_the_next_batch_is_there_and_no_batch_is_made_twice():
    source = Counted()
    ahead = Ahead(source)
    assert [ahead.train(index, 4, 32) for index in range(3)] == [(index, 4, 32) for index in range(3)]
    assert list(ahead.held_out(5)) == [(5, None, None)]
    assert source.made == [0, 1, 2, 3]


def test_another_size_or_number_than_was_expected():
    ahead = Ahead(Counted(), stride=2)
    assert ahead.train(0, 4, 32) == (0, 4, 32)
    assert ahead.train(2, 4, 64) == (2, 4, 64)
    assert ahead.train(20, 2, 64) == (20, 2, 64)


def test_a_batch_that_fails_fails_when_it_is_asked_for():
    ahead = Ahead(Counted())
    assert ahead.train(2, 4, 32) == (2, 4, 32)
    with pytest.raises(PqkError, match="batch 3 is damaged"):
        ahead.train(3, 4, 32)
    assert ahead.train(4, 4, 32) == (4, 4, 32)
