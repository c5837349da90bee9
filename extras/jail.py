"""The jail: a program that a model wrote can damage nothing but its own scratch directory.

This is the kernel half of the sandbox; extras/worker.py is the trainer's half and lists what is
covered. Here you see which restrictions Linux offers to an ordinary user (no root, no container, no
daemon), in which order they are applied, and what each of them is for. Two kinds of process live
here, both with an empty environment and without the trainer's memory, files or sockets:

    trainer --socketpair--> zygote (numpy, PIL and cv2 already imported)
                              --fork--> child (restricts itself, runs the program, exits)

The *zygote* is this file, started once per worker by `python jail.py`. It is slow to start, because
of the imports, and quick to fork: a program costs a few milliseconds instead of the hundred of a
fresh interpreter. The zygote never sees the program: the trainer sends three open files, and the
child receives and reads them.

The *child* is forked before its job comes. In an empty directory it applies the layers of `LAYERS`
in their order. Then it writes the input image there, runs the program, decodes the output image (a
hostile file, so it is decoded inside the jail) and leaves raw pixels in the third file.

The zygote watches the clock and the disk and reports how the child ended; it reports nothing else.
It kills the child and reports as soon as the child says that it is done. While the trainer
continues, the zygote waits for the process and removes its directory, always before it forks the
next child.

Where the kernel is not Linux, Python cannot apply any of the layers but the resource limits. The
child is then a fresh interpreter, because a fork after numpy is not safe on macOS. At the start
`escapes` tries to break out of the jail from inside and says what worked, so that the report is
measured and not believed.

Sources: landlock(7), seccomp(2), capabilities(7), prctl(2), and the kernel's headers for the call
numbers.
"""

import ctypes
import errno
import functools
import gc
import importlib
import itertools
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from dataclasses import dataclass

# The paper's names of the two images, in the scratch directory.
INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"
PIXELS, SIDE = 4096 * 4096, 16384           # of the output image: at most, and along one side
# The largest file, and the most that a program can print; it holds PIXELS raw RGB pixels.
FILE_BYTES = 128 << 20
DISK_BYTES, DISK_FILES = 256 << 20, 1000    # the whole scratch directory
OPEN_FILES = 32
TICK = 0.1          # seconds between two looks of the zygote at the clock and the disk
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ERROR_BYTES = 2000                          # of the error text; the trainer shortens it again
BUFFER = 1 << 16    # bytes copied at a time: after a fork, fresh memory is expensive
JOB = struct.Struct("<I")           # first file: length of the program; the program; the image
RESULT = struct.Struct("<III")      # third: width, height, length of the error; the error or a PPM
LINUX = sys.platform == "linux"
MODULES = """
    numpy numpy.fft numpy.linalg numpy.random PIL.Image PIL.ImageChops PIL.ImageColor
    PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps PIL.ImageStat
    unicodedata base64 bisect cmath collections colorsys contextlib copy dataclasses datetime
    decimal enum fractions functools glob hashlib heapq inspect io itertools json math operator
    pathlib random re shutil statistics string struct tempfile textwrap time traceback typing uuid
    warnings
""".split()
# What programs usually do, on a small picture: modules create much of what they need only when
# they are first used.
REHEARSAL = f"""
from PIL import Image
import numpy as np
Image.new("RGB", (64, 64)).save("{INPUT}", "PPM")
image = Image.open("{INPUT}").rotate(90, expand=True)
image = image.crop((0, 0, 32, 32)).resize((64, 64), Image.LANCZOS)
brighter = np.clip(np.asarray(image).astype(np.float32) * 1.5, 0, 255)
image = Image.fromarray(brighter.astype(np.uint8))
image.save("{OUTPUT}")
Image.open("{OUTPUT}").convert("RGB")
try:
    import cv2
    cv2.imwrite("{OUTPUT}", cv2.medianBlur(cv2.flip(cv2.imread("{INPUT}"), -1), 3))
except ImportError:
    pass
"""


@dataclass
class Jail:
    """What a zygote and its children know: numbers and paths, no secret from any program."""
    parent: int             # process id of the trainer
    tmp: str                # where scratch directories are made
    sites: list[str]        # where numpy, PIL and cv2 are installed: on the path of a program
    readable: list[str]     # what a program may read apart from its scratch directory
    seconds: float          # wall clock
    memory_mb: int
    without: list[str]      # layers to leave out (and "fork"): for tests and lessons
    fork: bool = LINUX      # fork a warm interpreter, or start a fresh one for every program
    layers: list[str] = ()  # the layers that this machine has, in order
    zygote: int = 0         # process id
    base: str = ""          # this worker's directory; programs run in base/run


# --- The layers -----------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def call_libc(function: str, *arguments) -> int:
    """Call a function of libc with whole machine words, where ctypes would pass 32-bit integers.

    Raises OSError where the function returns -1.
    """
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, function)(*words)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), function)
    return result


def limit_resources(jail: Jail) -> None:
    """Limit memory, CPU time, file size, open files and processes, and forbid core dumps.

    A core dump would be a file. resource.setrlimit takes (soft, hard); both are the same here,
    except for CPU:
      RLIMIT_CPU     seconds: one more than jail.seconds, rounded up; the hard limit one more again
      RLIMIT_AS      bytes of address space: jail.memory_mb MB (2 ** 20 bytes) beyond what this
                     process has already, which is the first number of /proc/self/statm (pages);
                     only on Linux
      RLIMIT_FSIZE   FILE_BYTES
      RLIMIT_NOFILE  OPEN_FILES
      RLIMIT_CORE    0
      RLIMIT_NPROC   0 (no further process)
    """
    used = 0
    if LINUX:       # the program does not pay for the interpreter that was forked
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    cpu = math.ceil(jail.seconds) + 1       # second line of defence: the zygote's clock comes first
    wanted = {"CPU": cpu, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": 0,
              "AS": used + (jail.memory_mb << 20)}
    for name, value in wanted.items():
        if name == "AS" and not LINUX:
            continue                        # macOS knows the name and refuses the value
        # The soft CPU limit is a signal, which a program can ignore; the hard limit kills.
        hard = value + (name == "CPU")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))


def forbid_new_privileges(jail: Jail) -> None:
    """No set-uid program can raise the rights of this process again.

    Linux demands this before landlock and seccomp.
    """
    call_libc("prctl", 38, 1, 0, 0, 0)


def landlock(jail: Jail) -> None:
    """From here on a process can write only in its directory and read only `jail.readable`."""
    version = call_libc("syscall", 444, None, 0, 1)
    file_read, file_write, listing, remove, create, truncate = 4, 2, 8, 32, 256, 1 << 14
    # Every right that this version of landlock knows, then TCP, then signals and abstract sockets.
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", handled, 3 * (version >= 4), 3 * (version >= 6))
    ruleset = call_libc("syscall", 444, attributes, len(attributes), 0)
    # Only regular files can be made, no directory, link, pipe or device: so the output cannot be
    # anything exotic.
    rules = {".": file_read | file_write | listing | remove | create | truncate,
             "/dev/null": file_read | file_write | truncate, "/dev/urandom": file_read,
             "/etc/ld.so.cache": file_read}
    rules |= {path: file_read | listing for path in jail.readable}
    for path, rights in rules.items():
        with suppress(FileNotFoundError):
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights & handled, where)
            call_libc("syscall", 445, ruleset, 1, rule, 0)
            os.close(where)
    call_libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


def chroot(jail: Jail) -> None:
    """Make the scratch directory the whole disk: the older protection, where landlock is missing.

    After that a program can import only modules that the zygote has imported.
    """
    try:
        os.chroot(".")
    except PermissionError:         # not root: become root in a user namespace of its own
        call_libc("unshare", 0x10000000)
        os.chroot(".")


def drop_capabilities(jail: Jail) -> None:
    """Keep the user but lose its powers: in a container the trainer is often root."""
    call_libc("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


def die_with_zygote(jail: Jail) -> None:
    """Nobody may trace this process, and the kernel kills it when the zygote dies."""
    call_libc("prctl", 4, 0, 0, 0, 0)
    call_libc("prctl", 1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != jail.zygote:         # the zygote died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


# Calls that image code needs, as name:number on x86_64:number on aarch64 ("-": it has no such
# call). Everything else is refused: sockets, processes and threads, signals to others, tracing,
# links, directories, mounts, shared memory, truncate (before landlock version 3 it would cut any
# file, by its name), ... The last one, recvmsg, is how the child gets its job; a program has no
# socket to receive from.
ALLOWED = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 lseek:8:62
    close:3:57 close_range:436:436 fstat:5:80 stat:4:- lstat:6:- newfstatat:262:79 statx:332:291
    access:21:- faccessat:269:48 getdents64:217:61 readlink:89:- readlinkat:267:78 getcwd:79:17
    dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 mmap:9:222 munmap:11:215
    mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 msync:26:227 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 sigaltstack:131:132
    futex:202:98 restart_syscall:219:128 getpid:39:172 getppid:110:173 gettid:186:178
    getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148
    getresgid:120:150 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156 uname:63:160
    sysinfo:99:179 times:100:153 getrusage:98:165 gettimeofday:96:169 clock_gettime:228:113
    clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101 time:201:- getrandom:318:278
    sched_yield:24:124 sched_getaffinity:204:123 getcpu:309:168 poll:7:- ppoll:271:73 select:23:-
    pselect6:270:72 alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:- unlink:87:-
    unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 ftruncate:77:46 fsync:74:82
    fdatasync:75:83 copy_file_range:326:285 sendfile:40:71 umask:95:166 getrlimit:97:163
    exit:60:93 exit_group:231:94 recvmsg:47:212
"""
# Answers that keep honest programs alive: shutil.copy may think that it has changed modes and
# times, files have no attributes, and nothing is a terminal.
PRETENDED = """
    chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:- fchownat:260:54
    utime:132:- utimes:235:- utimensat:280:88 futimesat:261:-
"""
ATTRIBUTES = """
    getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12
    flistxattr:196:13
"""
# Calls that depend on one argument: the call, which argument, a mask for it, values, and whether
# exactly these values are allowed (True) or exactly these are refused (False).
INSPECTED = [
    # O_TRUNC without writing would empty a file that may only be read (before landlock version 3).
    ("open:2:-", 1, 0x203, (0x200, 0x203), False),
    ("openat:257:56", 2, 0x203, (0x200, 0x203), False),
    # F_SETOWN can make the kernel send signals to other processes.
    ("fcntl:72:25", 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030), True),
    # A process may look at and change its own limits only.
    ("prlimit64:302:261", 0, 0xFFFFFFFF, (0,), True),
]
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}     # column; AUDIT_ARCH_*
LOAD, MASK, EQUAL, AT_LEAST, ANSWER = 0x20, 0x54, 0x15, 0x35, 0x06          # classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000                    # REFUSE + errno


@functools.cache
def seccomp_program(machine: str) -> bytes:
    """The filter of system calls as classic BPF: a list of tests; the first that fits decides."""
    column, architecture = ARCHITECTURES[machine]

    def number(call: str) -> int | None:
        digits = call.split(":")[column]
        return None if digits == "-" else int(digits)

    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (ANSWER, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for calls, verdict in ((ALLOWED, ALLOW), (PRETENDED, REFUSE + 0),
                           (ATTRIBUTES, REFUSE + errno.ENOTSUP),
                           ("ioctl:16:29", REFUSE + errno.ENOTTY)):
        for call in calls.split():
            if number(call) is not None:
                code += [(EQUAL, 0, 1, number(call)), (ANSWER, 0, 0, verdict)]
    for call, argument, mask, values, good in INSPECTED:
        if number(call) is not None:
            tests = inspect_argument(argument, mask, values, good)
            code += [(EQUAL, 0, len(tests), number(call)), *tests]
    # Calls newer than these do not exist, so that libc falls back on older ones. Everything else
    # is not permitted.
    code += [(AT_LEAST, 0, 1, 424), (ANSWER, 0, 0, REFUSE + errno.ENOSYS),
             (ANSWER, 0, 0, REFUSE + errno.EPERM)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def inspect_argument(argument: int, mask: int, values: tuple[int, ...], good: bool) -> list[tuple]:
    """The tests of a call in INSPECTED, which always answer."""
    hit, miss = (ALLOW, REFUSE + errno.EPERM) if good else (REFUSE + errno.EACCES, ALLOW)
    tests = [(LOAD, 0, 0, 16 + 8 * argument), (MASK, 0, 0, mask)]
    for value in values:
        tests += [(EQUAL, 0, 1, value), (ANSWER, 0, 0, hit)]
    return tests + [(ANSWER, 0, 0, miss)]


def seccomp(jail: Jail) -> None:
    """From here on the kernel answers only the calls that image code needs.

    This layer is the last one, because the others need more calls.
    """
    program = ctypes.create_string_buffer(seccomp_program(os.uname().machine))
    filters = struct.pack("HL", (len(program) - 1) // 8, ctypes.addressof(program))
    call_libc("prctl", 22, 2, filters)


LAYERS = {"limits": limit_resources, "no new privileges": forbid_new_privileges,
          "landlock": landlock, "chroot": chroot, "no capabilities": drop_capabilities,
          "parent death": die_with_zygote, "seccomp": seccomp}


def apply_layers(jail: Jail, *names: str) -> None:
    """Restrict this process. OSError if a layer fails: then the program must not run."""
    for name in names:
        LAYERS[name](jail)


# --- The child ------------------------------------------------------------------------------------


def preload(jail: Jail) -> None:
    """Import what programs import, so that a fork has it already."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]
    sys.path += [path for path in jail.sites if path not in sys.path]
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["PIL.Image"].init()     # all file formats, which PIL would load when needed
    with suppress(ImportError):
        importlib.import_module("cv2").setNumThreads(0)     # the jail allows one thread


def rehearse() -> None:
    """Run REHEARSAL here, so that a fork has what it leaves behind.

    A machine where it fails is slower, and nothing else.
    """
    with suppress(Exception):
        exec(compile(REHEARSAL, "<program>", "exec"), {"__name__": "__main__"})
    for name in (INPUT, OUTPUT):
        with suppress(FileNotFoundError):
            os.unlink(name)


def leave_fresh_memory() -> None:
    """Let malloc take its next large blocks from memory that was never used.

    A fork gets such memory as huge pages. A page that the zygote has used, even one that is free by
    now, would be copied at a program's first write, 4 KB at a time. So free memory is returned, its
    holes are filled with blocks that nobody touches, and the rest of the huge page (2 MB) at the
    end of the heap is given away, except for some room that the zygote itself needs.
    """
    if not hasattr(libc, "malloc_trim"):        # only glibc
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc_trim(0)
    end, block, huge, room = libc.sbrk(ctypes.c_long(0)), 0, 2 << 20, 128 << 10
    while block < end:
        block = libc.malloc(ctypes.c_long(BUFFER))
    libc.malloc(ctypes.c_long(2 * huge - (block + BUFFER) % huge - room))


def child(jail: Jail, trainer: socket.socket, alive: int) -> None:
    """The life of one program, from the fork to the end of the process. Does not return.

    The child starts before its job, so that its layers are in force when the trainer's message
    comes. alive: a pipe, on which the zygote reads that the job has come and that it is done; it
    sees the pipe closing when this process is gone.
    """
    status = 1
    try:
        error = enter(jail)
        message, files, _, _ = socket.recv_fds(trainer, 1, 3)
        if message:
            os.write(alive, message)
            job, output, result = files
            image, error = run_job(error, job, output, result, alive)
            write_result(result, image, error)
            os.write(alive, message)    # the zygote need not wait until our memory is given back
        status = 0
    finally:
        os._exit(status)        # no atexit, no destructor, no way back into the zygote's loop


def enter(jail: Jail) -> str:
    """Go into the scratch directory and restrict this process. Returns what went wrong, or ""."""
    try:
        os.setsid()
        os.chdir(os.path.join(jail.base, "run"))
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 2)
        seed_everything()
        apply_layers(jail, *jail.layers)
    except OSError as problem:
        return f"the sandbox could not be locked ({problem})"
    return ""


def run_job(error: str, job: int, output: int, result: int, alive: int) -> tuple:
    """Run one job: (image, error). error: what went wrong before, then the program does not run.

    job: the file with the program and the input image. output: the file for what it prints.
    """
    os.dup2(output, 1)
    try:
        with (open(job, "rb", buffering=0, closefd=False) as file,
              open(INPUT, "wb", buffering=0) as image):
            file.seek(0)
            source = file.read(*JOB.unpack(file.read(JOB.size)))
            shutil.copyfileobj(file, image, BUFFER)
        close_files_except(result, alive)           # the trainer's socket above all
    except OSError as problem:                      # a full disk
        error = error or f"the sandbox could not start the program ({problem})"
    error = error or run_program(source)
    return (None, error) if error else read_output()


def close_files_except(*kept: int) -> None:
    """Close all open files but these and the three standard ones."""
    edges = [2, *sorted(kept), 65536]
    for low, high in itertools.pairwise(edges):
        if low + 1 < high:      # an empty range at 0 would close everything (close_range(0, -1))
            os.closerange(low + 1, high)


def run_program(source: bytes) -> str:
    """Run the program as `__main__`. Returns what went wrong in one line, or ""."""
    stdout = sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8",
                                            errors="replace", closefd=False)
    sys.argv = ["program.py"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    error = ""
    try:
        # One dictionary for globals and locals: with two of them, a function would not see what
        # the program itself has imported.
        exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            error = f"the program stopped itself: exit({stop.code!r})"
    except BaseException as problem:    # whatever a program raises is an observation for the model
        error = describe(problem)
    main.__dict__.clear()       # its arrays would leave too little memory to decode its image
    with suppress(OSError, ValueError):     # the file may be full or closed
        stdout.flush()
    return error


def seed_everything() -> None:
    random.seed(0)
    sys.modules["numpy.random"].seed(0)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setRNGSeed(0)


def describe(problem: BaseException) -> str:
    """The exception in one line, with the program's own line number.

    >>> describe(KeyError("colour"))
    "KeyError: 'colour'"
    """
    name = "MemoryError" if isinstance(problem, MemoryError) else type(problem).__name__
    if isinstance(problem, SyntaxError):
        text, line = problem.msg, problem.lineno
    else:
        text, line, trace = str(problem), None, problem.__traceback__
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<program>" else line
            trace = trace.tb_next
    text = " ".join(str(text).split())[:400]
    return name + (f": {text}" if text else "") + (f" (line {line})" if line else "")


def read_output() -> tuple:
    """Decode the file that the program left: (RGB image, "") or (None, error)."""
    from PIL import Image
    try:
        # The file must be an ordinary one: we follow no link and wait for no pipe.
        fd = os.open(OUTPUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, f"no image was written to {OUTPUT}"
    except OSError:
        return None, f"{OUTPUT} is not an ordinary file"
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None, f"{OUTPUT} is not an ordinary file"
    Image.MAX_IMAGE_PIXELS = None       # our own limit is stricter, and comes before any decoding
    try:
        with open(fd, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > PIXELS or max(image.size) > SIDE:
                return None, (f"{OUTPUT} has {image.width} x {image.height} pixels; "
                              f"the most is {PIXELS}, and {SIDE} along a side")
            image.load()
            return (image if image.mode == "RGB" else image.convert("RGB")), ""
    except Exception as problem:        # a decoder that reads hostile bytes may raise anything
        return None, f"{OUTPUT} cannot be read as an image ({type(problem).__name__})"


def write_result(result: int, image, error: str) -> None:
    """Write the third file: RESULT, then the error text or the image."""
    text = error.encode(errors="replace")[:ERROR_BYTES]
    width, height = image.size if image else (0, 0)
    with open(result, "wb", closefd=False) as file:
        file.write(RESULT.pack(width, height, len(text)) + text)
        if image:
            image.save(file, "PPM")     # a line of text and raw pixels, in pieces


# --- The zygote -----------------------------------------------------------------------------------


def run_in_fork(function) -> int:
    """Run a function in a fork. Its result (0 to 254) is the exit status; 255 if it raised."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def available_layers(jail: Jail) -> list[str]:
    """Try each layer in a fork of its own; chroot is tried only where landlock is missing."""
    layers = []
    for name in LAYERS:
        if name in jail.without or (name == "chroot" and "landlock" in layers):
            continue
        if not LINUX and name != "limits":      # the same call numbers mean other things there
            continue
        needed = [needs for needs in ("no new privileges",) if needs in layers]
        if run_in_fork(lambda names=(*needed, name): apply_layers(jail, *names)) == 0:
            layers.append(name)
    return layers


def escapes(jail: Jail) -> list[str]:
    """Restrict a fork and let it try to break out. Returns the names of what worked.

    This is what `Sandbox.describe` reports.
    """
    outside, scratch = os.path.join(jail.base, "outside"), os.path.join(jail.base, "run")
    os.mkdir(scratch)
    with open(outside, "w") as file:
        file.write("a file that no program may read")

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    attempts = {"read files": lambda: open(outside).close(),
                "write files": lambda: open(outside, "a").close(),
                "use the network": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
                "start processes": fork, "signal processes": lambda: os.kill(jail.zygote, 0)}

    def trial() -> int:
        os.chdir(scratch)
        apply_layers(jail, *jail.layers)
        worked = 0
        for bit, attempt in enumerate(attempts.values()):
            with suppress(OSError):
                attempt()
                worked |= 1 << bit
        return worked

    worked = run_in_fork(trial)
    wipe(scratch)
    return [name for bit, name in enumerate(attempts) if worked >> bit & 1]


def launch(jail: Jail, trainer: socket.socket, alive: int) -> int:
    """Start the next child. Returns its process id."""
    if jail.fork:
        pid = os.fork()
        if pid == 0:
            child(jail, trainer, alive)
        return pid
    fds = trainer.fileno(), alive
    for fd in fds:
        os.set_inheritable(fd, True)
    command = [sys.executable, "-s", "-B", __file__, "child", json.dumps(vars(jail)),
               *map(str, fds)]
    return os.posix_spawn(sys.executable, command, os.environ)


def execute(jail: Jail, trainer: socket.socket) -> None:
    """Run one program in a fresh scratch directory.

    The reply says why the program had to be stopped or how it died, if it was stopped or died.
    """
    scratch = os.path.join(jail.base, "run")
    os.mkdir(scratch, 0o700)    # raises if something is left there: the trainer replaces us then
    gone, alive = os.pipe()
    pid = launch(jail, trainer, alive)
    os.close(alive)
    try:
        end = watch(jail, trainer, gone, scratch)
        # Raises if somebody removed the directory: the trainer then starts another worker and
        # tries again.
        os.stat(scratch)
        if end is not None:
            # Reply at once: what the child may still do before the signal arrives matters to
            # nobody.
            kill(pid)
            reply(trainer, end)
    finally:
        kill(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(gone)
        wipe(scratch)
    if end is None and code < 0:
        reply(trainer, f"the program was killed ({signal.strsignal(-code)})")
    elif end is None:
        reply(trainer, f"the program ended its own process (exit status {code})")


def kill(pid: int) -> None:
    """Kill the child and, where there is no seccomp, the processes that it started."""
    for send in (os.killpg, os.kill):       # it may only have closed the pipe
        with suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def watch(jail: Jail, trainer: socket.socket, gone: int, scratch: str) -> str | None:
    """Wait for the end of the child.

    Returns the reason to stop it, "" if it says that it is done, or None if it is gone.
    """
    events = select.poll()
    events.register(trainer, select.POLLHUP)    # only one event: the trainer is gone
    events.register(gone, select.POLLIN)
    deadline = None                             # until the job has come
    while True:
        left = deadline - time.monotonic() if deadline else TICK
        ready = dict(events.poll(1000 * max(0.0, min(TICK, left))))
        if trainer.fileno() in ready or os.getppid() != jail.parent:
            raise ConnectionError("the trainer is gone")
        if gone in ready:
            said = os.read(gone, 1)
            if not said and not deadline:
                raise ChildProcessError("a child died before its job came")
            if not said or deadline:    # a program that says "done" itself has ended itself
                return "" if said else None
            deadline = time.monotonic() + jail.seconds
        elif left <= 0:
            return f"the program ran longer than {jail.seconds:g} s"
        elif deadline and disk_is_full(scratch):
            return f"the program wrote more than {DISK_BYTES >> 20} MB or {DISK_FILES} files"


def reply(trainer: socket.socket, error: str) -> None:
    trainer.sendall(json.dumps({"error": error}).encode() + b"\n")


def disk_is_full(scratch: str) -> bool:
    """Whether the scratch directory holds more than DISK_BYTES, or DISK_FILES files and more."""
    used = 0
    for count, entry in enumerate(os.scandir(scratch)):
        with suppress(FileNotFoundError):       # the program removed it in the meantime
            used += 512 * entry.stat(follow_symlinks=False).st_blocks
        if used > DISK_BYTES or count >= DISK_FILES:
            return True
    return False


def wipe(directory: str) -> None:
    """Remove a directory: quickly if it is flat, as a jailed program leaves it, else with `rm`."""
    try:
        for entry in os.scandir(directory):
            os.unlink(entry)
        os.rmdir(directory)
    except OSError:
        subprocess.run(["rm", "-rf", "--", directory], stdin=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)


def main(role: str, jail: Jail, *fds: int) -> None:
    """role: zygote, or child where every program gets a fresh interpreter.

    fds: the trainer's socket; for a child also the pipe to the zygote.
    """
    os.set_inheritable(fds[0], False)
    trainer = socket.socket(fileno=fds[0])
    if role == "child":
        preload(jail)
        child(jail, trainer, fds[1])
    jail.base = tempfile.mkdtemp(prefix="arft-", dir=jail.tmp)
    os.chdir(jail.base)
    try:
        serve(jail, trainer)
    except ConnectionError:
        pass                            # the trainer is gone, and nobody is left to be told
    except OSError as problem:
        print(f"a sandbox worker gives up and is replaced: {problem}", file=sys.stderr)
    finally:
        wipe(jail.base)


def serve(jail: Jail, trainer: socket.socket) -> None:
    """Get ready, say so to the trainer, then run one program after the other."""
    jail.zygote, jail.fork = os.getpid(), jail.fork and "fork" not in jail.without
    if jail.fork:
        preload(jail)
        rehearse()
        gc.freeze()     # after each fork the collector would touch, and so copy, every page
        with suppress(KeyError):
            seccomp_program(os.uname().machine)     # every fork has it in its cache
    jail.layers = available_layers(jail)
    hello = {"base": jail.base, "layers": jail.layers, "escapes": escapes(jail)}
    leave_fresh_memory()
    trainer.sendall(json.dumps(hello).encode() + b"\n")
    while True:
        execute(jail, trainer)


if __name__ == "__main__":
    main(sys.argv[1], Jail(**json.loads(sys.argv[2])), *map(int, sys.argv[3:]))
