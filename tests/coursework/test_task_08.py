"""Task 8: jail.limit_resources. Most tests record what it asks of the kernel. The last one limits a
real process."""

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from extras import jail

from .check import expect

ROOT = str(Path(jail.__file__).parents[1])


def asked(seconds: float = 2.5, memory_mb: int = 64) -> dict:
    """{"CPU": (soft, hard), ...}: the limits that limit_resources asks the kernel for."""
    seen, names = {}, ("CPU", "FSIZE", "NOFILE", "CORE", "NPROC", "AS")
    where = jail.Jail(0, "", [], [], seconds, memory_mb, [])

    def record(which, limits):
        seen[which] = tuple(limits)
    with mock.patch.object(jail.resource, "setrlimit", record):
        jail.limit_resources(where)
    return {name: seen[getattr(resource, f"RLIMIT_{name}")] for name in names
            if getattr(resource, f"RLIMIT_{name}") in seen}


def limit_of(name: str) -> tuple[int, int]:
    return asked()[name]


def test_processor_time():
    expect(lambda: limit_of("CPU"), (4, 5), {
        "no limit of processor time is set": "raised KeyError",
        "the seconds are rounded down; round them up, and add one": (3, 4),
        "soft and hard limit of the processor time are equal: the hard one is one second later":
            (4, 4),
        "the time is not rounded up to whole seconds": (3.5, 4.5),
    }, "2.5 seconds")
    expect(lambda: asked(seconds=3.0)["CPU"], (4, 5), {
        "one second must be added: the wall clock comes first": (3, 4),
    }, "3 seconds")


def test_the_fixed_limits():
    for name, value, why in (("FSIZE", jail.FILE_BYTES, "one file could fill the disk"),
                             ("NOFILE", jail.OPEN_FILES, "files could be opened without end"),
                             ("CORE", 0, "a crash would leave a file"),
                             ("NPROC", 0, "processes could be started")):
        expect(partial(limit_of, name), (value, value), {
            f"RLIMIT_{name} is not set: {why}": "raised KeyError",
        }, f"RLIMIT_{name}")


@pytest.mark.skipif(not jail.LINUX, reason="only Linux keeps this limit")
def test_memory_comes_on_top_of_the_interpreter():
    page = resource.getpagesize()
    with open("/proc/self/statm") as file:
        used, resident = (int(pages) * page for pages in file.read().split()[:2])

    def in_steps(size: int) -> int:
        """A number of bytes in MB, in steps of 32."""
        return round(size / (32 << 20)) * 32
    expect(lambda: in_steps(limit_of("AS")[0] - used), 64, {
        "no limit of memory is set": "raised KeyError",
        "the memory limit is the program's alone; what the interpreter has already must be added":
            in_steps((64 << 20) - used),
        "memory_mb is taken as bytes; a MB has 2 ** 20": 0,
        "/proc/self/statm counts pages, not bytes": in_steps((64 << 20) + used // page - used),
        "the second number of /proc/self/statm is what is in memory; the first is the address "
        "space": in_steps((64 << 20) + resident - used),
    }, "MB beyond what this process uses, with memory_mb 64")


@pytest.mark.skipif(not jail.LINUX, reason="only Linux keeps this limit")
def test_a_program_that_wants_too_much():
    """In a process of its own with 64 MB: it gets 10 MB and does not get 200 MB."""
    program = (f"import sys; sys.path.insert(0, {json.dumps(ROOT)})\n"
               "from extras import jail\n"
               "jail.limit_resources(jail.Jail(0, '', [], [], 5, 64, []))\n"
               "bytearray(10 << 20)\n"
               "print('small', end=' ')\n"
               "try:\n"
               "    bytearray(200 << 20)\n"
               "    print('large')\n"
               "except MemoryError:\n"
               "    print('stopped')")

    def printed():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              timeout=60)
        if "NotImplementedError" in done.stderr:
            raise NotImplementedError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
        return done.stdout.strip()
    expect(printed, "small stopped", {
        "a program gets more memory than memory_mb": "small large",
        "an honest program gets no memory at all": "",
    }, "10 MB, then 200 MB, of 64")
