"""Task 8: jail.limit_resources. What it asks of the kernel is recorded;
then one process is really locked."""

import json
import resource
import subprocess
import sys
from unittest import mock

import pytest

from extras import jail

from .check import expect

ROOT = jail.__file__.rpartition("/")[0]


def asked(seconds: float = 2.5, memory_mb: int = 64) -> dict:
    """{"CPU": (soft, hard), ...}; AS less what this process uses, to 256 MB,
    as the names below say."""
    seen, names = {}, ("CPU", "FSIZE", "NOFILE", "CORE", "NPROC", "AS")
    where = jail.Jail(0, "", [], [], seconds, memory_mb, [])
    with mock.patch.object(jail.resource, "setrlimit", lambda which,
                           limits: seen.update({which: tuple(limits)})):
        jail.limit_resources(where)
    return {name: seen[getattr(resource, f"RLIMIT_{name}")] for name in names
            if getattr(resource, f"RLIMIT_{name}") in seen}


def test_processor_time():
    expect(lambda: asked()["CPU"], (4, 5), {
        "no limit of processor time is set": "raised KeyError",
        "the seconds are rounded down; up, and one more": (3, 4),
        "soft and hard limit of the processor time are equal: the hard one is one second later": (4,
            4),
        "one second must be added: the wall clock comes first": (3, 4),
        "the time is not rounded up to whole seconds": (3.5, 4.5)}, "2.5 seconds")


def test_the_fixed_limits():
    for name, value, why in (("FSIZE", jail.FILE_BYTES, "one file could fill the disk"),
                             ("NOFILE", jail.OPEN_FILES, "files could be opened without end"),
                             ("CORE", 0, "a crash would leave a file"),
                             ("NPROC", 0, "processes could be started")):
        expect(lambda: asked()[name], (value, value), {
            f"RLIMIT_{name} is not set: {why}": "raised KeyError"}, f"RLIMIT_{name}")


@pytest.mark.skipif(not jail.LINUX, reason="only Linux keeps this limit")
def test_memory_comes_on_top_of_the_interpreter():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()

    def beyond():
        """MB that a program would have beyond what this process already uses, in steps of 32."""
        return round((asked()["AS"][0] - used) / (32 << 20)) * 32
    expect(beyond, 64, {
        "no limit of memory is set": "raised KeyError",
        "the memory limit is the program's alone; what the interpreter has already must be added": round(
            ((64 << 20) - used) / (32 << 20)) * 32,
        "memory_mb is taken as bytes; a MB has 2 ** 20": 0,
        "/proc/self/statm counts pages, not bytes": round(((64 << 20) - used) / (32 << 20)) * 32,
        "the second number of /proc/self/statm is what is in memory; the first is the address space": round(
            ((64 << 20) - used + resident()) / (32 << 20)) * 32,
    }, "64 MB")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not jail.LINUX, reason="only Linux keeps this limit")
def test_a_program_that_wants_too_much():
    """In a process of its own: 10 MB can be had, 200 MB of 64 cannot."""
    program = (f"import json, sys; sys.path.insert(0, {json.dumps(ROOT)}); import jail\n"
               "jail.limit_resources(jail.Jail(0, '', [], [], 5, 64, []))\n"
               "bytearray(10 << 20); print('small', end=' ')\n"
               "try:\n    bytearray(200 << 20); print('large')\nexcept MemoryError:\n    "
               "print('stopped')")

    def printed():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              timeout=60)
        if "NotImplementedError" in done.stderr:
            raise NotImplementedError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
        return done.stdout.strip()
    expect(printed, "small stopped", {
        "a program gets more memory than memory_mb": "small large",
        "an honest program gets no memory at all": ""}, "10 MB, then 200 MB, of 64")
