"""What is run in a process of its own, in a file that loads nothing else there."""

import os


def answer(value):
    return value + 1


def fail():
    raise ValueError("a reason")


def die():
    os._exit(3)
