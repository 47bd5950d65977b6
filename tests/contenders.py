"""Contenders of a benchmark, in a file of their own: the processes in which they compete import it and no more."""

import os
import time


def sleeper(turns, path, name, seconds):
    for figures in turns:
        with open(path, "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        figures["name"] = name


def sudden(turns):
    next(turns)
    os._exit(3)
