"""Functions to run in a fresh process, in a file whose import loads nothing else there."""

import os


def answer(value):
    return value + 1


def fail():
    raise ValueError("a reason")


def die():
    os._exit(3)
