"""The jail: how a model-written program is run so that it can hurt nothing but its own scratch
directory.

This is the kernel half of the code sandbox; `tools.py` is the trainer's half and should be read first.  What it
teaches: which walls Linux gives an ordinary user (no root, no container, no daemon), in which order
they go up, and
what each of them is for.  Two kinds of process live here, both with an empty environment and none of the trainer's
memory, files or sockets:

    trainer --socketpair--> zygote (numpy, PIL and cv2 already imported) --fork--> child (locks
    itself, runs, exits)

The *zygote* is this file, started once per worker by `python jail.py`.  It is slow to start (imports) and quick to
fork: a program costs a few milliseconds instead of a fresh interpreter's hundred.  It never sees the program: the
trainer sends three open files, and the child receives and reads them.  The *child* is forked ahead, before its job
comes, and puts up the walls of `LAYERS` in their order, in an empty directory; then it writes the
input image there, runs the program, decodes the output image (a hostile file, hence still inside
the jail) and leaves raw pixels in the
third file.  The zygote watches the clock and the disk, and reports how it ended: that is all it says.  It kills the
child and reports as soon as the child says that it is done; the process is waited for and its
directory removed while the trainer goes on, and always before the next child is forked.

Where the kernel is not Linux there are no walls to be had from Python; the child is then a fresh
interpreter (to
fork after numpy is not safe on macOS) with resource limits only.  `escapes` tries the jail from inside at the start
and says what it could do, so that the report is measured and not believed.

Sources: landlock(7), seccomp(2), capabilities(7), prctl(2), and the kernel's headers for the call
numbers.
"""

import ctypes
import errno
import functools
import gc
import importlib
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
import sysconfig
import tempfile
import time
import types
from contextlib import suppress
from dataclasses import dataclass

# the paper's names, in the scratch directory
INPUT, OUTPUT = "path_to_input_image.jpg", "path_to_output_image.jpg"
PIXELS, SIDE = 4096 * 4096, 16384   # the largest output image, and the longest
# the largest file, and the most a program can print; holds PIXELS raw RGB pixels
FILE_BYTES = 128 << 20
DISK_BYTES, DISK_FILES = 256 << 20, 1000    # the whole scratch directory, looked at every TICK
OPEN_FILES = 32
# seconds between two looks of the zygote at the clock and the disk
TICK = 0.1
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ERROR_BYTES = 2000                  # of the error text; the trainer cuts it again
# bytes that are copied at a time: fresh memory is dear after a fork
BUFFER = 1 << 16
# the first file: bytes of the program; the program; the input image
JOB = struct.Struct("<I")
# the third: width, height, bytes of error text; the text or the image as PPM
RESULT = struct.Struct("<III")
LINUX = sys.platform == "linux"
MODULES = """numpy numpy.fft numpy.linalg numpy.random PIL.Image PIL.ImageChops PIL.ImageColor
PIL.ImageDraw
    PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps PIL.ImageStat unicodedata base64
    bisect cmath collections colorsys contextlib copy dataclasses datetime decimal enum fractions
    functools glob hashlib heapq inspect io itertools json math operator pathlib random re shutil
    statistics string struct tempfile textwrap time traceback typing uuid warnings""".split()
# What programs do, on a small picture: modules make much of what they need only when it is first
# asked for.
REHEARSAL = f"""
from PIL import Image
import numpy as np
Image.new("RGB", (64, 64)).save("{INPUT}", "PPM")
image = Image.open("{INPUT}").rotate(90, expand=True).crop((0, 0, 32, 32)).resize((64, 64),
Image.LANCZOS) image = Image.fromarray(np.clip(np.asarray(image).astype(np.float32) * 1.5, 0,
255).astype(np.uint8)) image.save("{OUTPUT}") Image.open("{OUTPUT}").convert("RGB") try:
    import cv2
    cv2.imwrite("{OUTPUT}", cv2.medianBlur(cv2.flip(cv2.imread("{INPUT}"), -1), 3))
except ImportError:
    pass
"""


@dataclass
class Jail:
    """What a zygote and its children know: plain numbers and paths, nothing
    that a program may not read."""
    parent: int             # process id of the trainer
    tmp: str                # where scratch directories are made
    sites: list[str]        # where numpy, PIL and cv2 are installed: on the path of a program
    readable: list[str]     # what a program may read beside its scratch directory
    seconds: float          # wall clock
    memory_mb: int
    without: list[str]      # layers to leave out (and "fork"): for tests and lessons
    fork: bool = LINUX      # fork a warm interpreter, or start a fresh one for every program
    layers: list[str] = ()  # the layers that this machine has, in order
    zygote: int = 0         # process id
    base: str = ""          # this worker's directory; programs run in base/run


# --- The walls ------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def kernel(function: str, *arguments) -> int:
    """Call a libc function with whole machine words (ctypes would pass
    32-bit ints); OSError where it returns -1."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, function)(*words)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), function)
    return result


def limit_resources(jail: Jail) -> None:
    """Memory, CPU time, file size, open files, processes; and no core dump, which would be a file.

    resource.setrlimit takes (soft, hard); both are the same here, but for CPU:
      RLIMIT_CPU     seconds: one more than jail.seconds, rounded up; hard: yet one more
      RLIMIT_AS      bytes of address space: jail.memory_mb MB (2 ** 20 bytes) beyond what this process has already,
                     the first number of /proc/self/statm (pages); only on Linux
      RLIMIT_FSIZE   FILE_BYTES, RLIMIT_NOFILE OPEN_FILES, RLIMIT_CORE 0, RLIMIT_NPROC 0 (no further process)
    """
    used = 0
    if LINUX:       # the interpreter that was forked is not the program's fault
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    cpu = math.ceil(jail.seconds) + 1       # second line of defence: the zygote's clock comes first
    wanted = {"CPU": cpu, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": 0,
              "AS": used + (jail.memory_mb << 20)}
    for name, value in wanted.items():
        if name == "AS" and not LINUX:
            continue                        # macOS knows the name and refuses the value
        # the soft CPU limit is a signal that can be ignored, the hard one is not
        hard = value + (name == "CPU")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))


def no_new_privileges(jail: Jail) -> None:
    """No set-uid program can lift this process again; Linux asks for it
    before landlock and seccomp."""
    kernel("prctl", 38, 1, 0, 0, 0)


def landlock(jail: Jail) -> None:
    """From here on only the scratch directory can be written, and only
    Python and its libraries can be read."""
    version = kernel("syscall", 444, None, 0, 1)
    file_read, file_write, listing, remove, create, truncate = 4, 2, 8, 32, 256, 1 << 14
    # every right that this kernel knows
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # files, TCP, signals
    attributes = struct.pack("=QQQ", handled, 3 * (version >= 4), 3 * (version >= 6))
    ruleset = kernel("syscall", 444, attributes, len(attributes), 0)
    # Regular files only: no directory, link, pipe or device can be made, so the output cannot be an
    # exotic thing.
    rules = {".": file_read | file_write | listing | remove | create | truncate,
             "/dev/null": file_read | file_write | truncate, "/dev/urandom": file_read,
             "/etc/ld.so.cache": file_read}
    rules |= {path: file_read | listing for path in jail.readable}
    for path, rights in rules.items():
        with suppress(FileNotFoundError):
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
            kernel("syscall", 445, ruleset, 1, struct.pack("=Qi", rights & handled, where), 0)
            os.close(where)
    kernel("syscall", 446, ruleset, 0)
    os.close(ruleset)


def chroot(jail: Jail) -> None:
    """The older wall round the files, where landlock is missing: the scratch directory becomes the
    whole disk.

    Then only modules that the zygote has imported can be imported.
    """
    try:
        os.chroot(".")
    except PermissionError:                     # not root: be root of a user namespace of one's own
        kernel("unshare", 0x10000000)
        os.chroot(".")


def drop_capabilities(jail: Jail) -> None:
    """In a container the trainer is often root: keep the user, lose the powers."""
    kernel("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


def die_with_zygote(jail: Jail) -> None:
    """Nobody may trace this process, and it is killed when the zygote is."""
    kernel("prctl", 4, 0, 0, 0, 0)
    kernel("prctl", 1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != jail.zygote:         # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


# Calls that image code needs, as name:number on x86_64:number on aarch64 ("-": not there).  What is
# not here is refused: sockets, processes and threads, signals to others, tracing, links,
# directories, mounts, shared memory, truncate (any file by its name, before landlock version 3),
# ...
ALLOWED = """read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 lseek:8:62
close:3:57
    close_range:436:436 fstat:5:80 stat:4:- lstat:6:- newfstatat:262:79 statx:332:291 access:21:-
    faccessat:269:48 getdents64:217:61 readlink:89:- readlinkat:267:78 getcwd:79:17 dup:32:23
    dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 mmap:9:222 munmap:11:215 mprotect:10:226
    mremap:25:216 madvise:28:233 brk:12:214 msync:26:227 rt_sigaction:13:134 rt_sigprocmask:14:135
    rt_sigreturn:15:139 rt_sigpending:127:136 sigaltstack:131:132 futex:202:98
    restart_syscall:219:128 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174
    geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150
    getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156 uname:63:160 sysinfo:99:179
    times:100:153 getrusage:98:165 gettimeofday:96:169 clock_gettime:228:113 clock_getres:229:114
    clock_nanosleep:230:115 nanosleep:35:101 time:201:- getrandom:318:278 sched_yield:24:124
    sched_getaffinity:204:123 getcpu:309:168 poll:7:- ppoll:271:73 select:23:- pselect6:270:72
    alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:- unlink:87:- unlinkat:263:35 rename:82:-
    renameat:264:38 renameat2:316:276 ftruncate:77:46 fsync:74:82 fdatasync:75:83
    copy_file_range:326:285 sendfile:40:71 umask:95:166 getrlimit:97:163
    exit:60:93 exit_group:231:94 recvmsg:47:212"""    # the last is how the child gets its job: a program has no socket
# Answers that keep honest programs alive: shutil.copy may think that it changed modes and times,
# files have no attributes, and nothing is a terminal.
PRETENDED = """chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:-
fchownat:260:54
    utime:132:- utimes:235:- utimensat:280:88 futimesat:261:-"""
ATTRIBUTES = "getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13"
# Calls that depend on an argument: name, which argument, mask, values, and whether these values are
# the allowed ones.
# O_TRUNC without writing would empty a file that
INSPECTED = [("open:2:-", 1, 0x203, (0x200, 0x203), False),
             # may only be read (landlock before version 3)
             ("openat:257:56", 2, 0x203, (0x200, 0x203), False),
             # F_SETOWN can make the kernel signal others
             ("fcntl:72:25", 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030), True),
             ("prlimit64:302:261", 0, 0xFFFFFFFF, (0,), True)]      # only one's own limits
# column above, AUDIT_ARCH_*
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}


@functools.cache
def seccomp_program(machine: str) -> bytes:
    """The system-call filter as classic BPF: one list of tests, the first that fits decides."""
    column, architecture = ARCHITECTURES[machine]
    load, mask_with, equal, at_least, answer = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000                # refuse + errno
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]

    def number(call: str) -> int | None:
        digits = call.split(":")[column]
        return None if digits == "-" else int(digits)

    for calls, verdict in ((ALLOWED, allow), (PRETENDED, refuse + 0),
                           (ATTRIBUTES, refuse + errno.ENOTSUP),
                           ("ioctl:16:29", refuse + errno.ENOTTY)):
        for call in calls.split():
            if number(call) is not None:
                code += [(equal, 0, 1, number(call)), (answer, 0, 0, verdict)]
    for call, argument, mask, values, good in INSPECTED:
        if number(call) is None:
            continue
        hit, miss = (allow, refuse + errno.EPERM) if good else (refuse + errno.EACCES, allow)
        tests = [(load, 0, 0, 16 + 8 * argument), (mask_with, 0, 0, mask)]
        for value in values:
            tests += [(equal, 0, 1, value), (answer, 0, 0, hit)]
        tests += [(answer, 0, 0, miss)]
        code += [(equal, 0, len(tests), number(call))] + tests
    # Newer calls do not exist, so that libc falls back on older ones; everything else is not
    # permitted.
    code += [(at_least, 0, 1, 424), (answer, 0, 0, refuse + errno.ENOSYS),
             (answer, 0, 0, refuse + errno.EPERM)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def seccomp(jail: Jail) -> None:
    """From here on the kernel answers only the calls that image code needs.
    Last, because the others need more."""
    program = ctypes.create_string_buffer(seccomp_program(os.uname().machine))
    kernel("prctl", 22, 2, struct.pack("HL", (len(program) - 1) // 8, ctypes.addressof(program)))


LAYERS = {"limits": limit_resources, "no new privileges": no_new_privileges, "landlock": landlock,
          "chroot": chroot,
          "no capabilities": drop_capabilities, "parent death": die_with_zygote, "seccomp": seccomp}


def lock(jail: Jail, *names: str) -> None:
    """Put up these walls round this process; OSError if one fails (then the
    program must not run)."""
    for name in names:
        LAYERS[name](jail)


# --- The child ------------------------------------------------------------------------------------

def preload(jail: Jail) -> None:
    """Import what programs import, so that a fork has it already."""
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    sys.path += [path for path in jail.sites if path not in sys.path]
    for name in MODULES:
        importlib.import_module(name)
    # all file formats, which PIL would load at the first need
    sys.modules["PIL.Image"].init()
    with suppress(ImportError):
        importlib.import_module("cv2").setNumThreads(0)     # the jail allows one thread


def rehearse() -> None:
    """Run REHEARSAL here, so that a fork has what it leaves behind.  A
    machine where it fails is only slower."""
    with suppress(Exception):
        exec(compile(REHEARSAL, "<program>", "exec"), {"__name__": "__main__"})
    for name in (INPUT, OUTPUT):
        with suppress(FileNotFoundError):
            os.unlink(name)


def leave_fresh_memory() -> None:
    """Let the next large blocks of malloc come from memory that was never used: a fork gets it as
    huge pages.

    A page that the zygote has used, even if it is free by now, would be copied, 4 KB at a time, at
    a program's first
    write.  So free memory is returned, its holes are filled with blocks that nobody touches, and the rest of the
    huge page (2 MB) at the end of the heap is given away but for some room for the zygote's own
    needs.
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
    """The life of one program, from the fork to the end of the process.  Does not return.

    The child is started ahead of its job: its walls are up when the trainer's message comes.  alive: a pipe; the
    zygote reads there that the job has come and that it is done, and sees it closing when this
    process is gone.
    """
    status = 1
    try:
        error = ""
        try:
            os.setsid()
            os.chdir(os.path.join(jail.base, "run"))
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 2)
            seed_everything()
            lock(jail, *jail.layers)
        except OSError as problem:
            error = f"the sandbox could not be locked ({problem})"
        message, files, _, _ = socket.recv_fds(trainer, 1, 3)
        if message:
            os.write(alive, message)
            job, output, result = files
            image, error = play(error, job, output, result, alive)
            write_result(result, image, error)
            # the zygote need not wait until the memory of this process is given back
            os.write(alive, message)
        status = 0
    finally:
        os._exit(status)        # no atexit, no destructor, no way back into the zygote's loop


def play(error: str, job: int, output: int, result: int, alive: int) -> tuple:
    """Run the job: (image, error).  job: the program and the input image;
    output: what it prints."""
    os.dup2(output, 1)
    try:
        with open(job, "rb", buffering=0, closefd=False) as file, open(INPUT, "wb",
                                                                       buffering=0) as image:
            file.seek(0)
            source = file.read(*JOB.unpack(file.read(JOB.size)))
            shutil.copyfileobj(file, image, BUFFER)
        close_all_but_standard_and(result, alive)   # the trainer's socket above all
    except OSError as problem:                      # a full disk
        error = error or f"the sandbox could not start the program ({problem})"
    error = error or run_program(source)
    return (None, error) if error else read_output()


def close_all_but_standard_and(*kept: int) -> None:
    edges = [2, *sorted(kept), 65536]
    for low, high in zip(edges, edges[1:]):
        # an empty range at 0 would close everything (close_range(0, -1))
        if low + 1 < high:
            os.closerange(low + 1, high)


def run_program(source: bytes) -> str:
    """Run the program as `__main__`; return what went wrong in one line, or an empty string."""
    stdout = sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="replace",
                                            closefd=False)
    sys.argv = ["program.py"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    error = ""
    try:
        # One dictionary for globals and locals: with two, a function would not see the program's
        # own imports.
        exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            error = f"the program stopped itself: exit({stop.code!r})"
    # whatever a program raises is an observation for the model
    except BaseException as problem:
        error = describe(problem)
    # its arrays would leave too little memory to decode its image
    main.__dict__.clear()
    with suppress(OSError, ValueError):     # it may be full or closed
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
        # A link is not followed and a pipe is not waited for: the file must be an ordinary one.
        fd = os.open(OUTPUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, f"no image was written to {OUTPUT}"
    except OSError:
        return None, f"{OUTPUT} is not an ordinary file"
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None, f"{OUTPUT} is not an ordinary file"
    # ours is stricter, and is checked before anything is decoded
    Image.MAX_IMAGE_PIXELS = None
    try:
        with open(fd, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > PIXELS or max(image.size) > SIDE:
                return None, (f"{OUTPUT} has {image.width} x {image.height} pixels; "
                              f"the most is {PIXELS}, and {SIDE} along a side")
            image.load()
            return (image if image.mode == "RGB" else image.convert("RGB")), ""
    except Exception as problem:        # a decoder that is fed hostile bytes may raise anything
        return None, f"{OUTPUT} cannot be read as an image ({type(problem).__name__})"


def write_result(result: int, image, error: str) -> None:
    text = error.encode(errors="replace")[:ERROR_BYTES]
    width, height = image.size if image else (0, 0)
    with open(result, "wb", closefd=False) as file:
        file.write(RESULT.pack(width, height, len(text)) + text)
        if image:
            image.save(file, "PPM")     # a line of text and raw pixels, in pieces


# --- The zygote -----------------------------------------------------------------------------------

def in_fork(function) -> int:
    """Run a function in a fork; its result (0..254) is the exit status, 255 if it raised."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def available_layers(jail: Jail) -> list[str]:
    """Try each wall in a fork of its own; chroot only stands in for landlock."""
    layers = []
    for name, layer in LAYERS.items():
        if name in jail.without or (name == "chroot" and "landlock" in layers) or not (LINUX or name
                == "limits"):
            continue                # elsewhere the same call numbers mean other things
        needs = [no_new_privileges] if "no new privileges" in layers else []
        if in_fork(lambda: [wall(jail) for wall in needs + [layer]] and 0) == 0:
            layers.append(name)
    return layers


def escapes(jail: Jail) -> list[str]:
    """Lock a fork and try to get out; the names of what worked.  This is
    what `Sandbox.describe` reports."""
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
        lock(jail, *jail.layers)
        worked = 0
        for bit, attempt in enumerate(attempts.values()):
            with suppress(OSError):
                attempt()
                worked |= 1 << bit
        return worked

    worked = in_fork(trial)
    wipe(scratch)
    return [name for bit, name in enumerate(attempts) if worked >> bit & 1]


def launch(jail: Jail, trainer: socket.socket, alive: int) -> int:
    """Start the next child; its process id."""
    if jail.fork:
        pid = os.fork()
        if pid == 0:
            child(jail, trainer, alive)
        return pid
    fds = trainer.fileno(), alive
    for fd in fds:
        os.set_inheritable(fd, True)
    return os.posix_spawn(sys.executable,
                          [sys.executable, "-s", "-B", __file__, "child", json.dumps(vars(jail)),
                                           *map(str, fds)], os.environ)


def execute(jail: Jail, trainer: socket.socket) -> None:
    """One program in a fresh scratch directory.  The reply says why it had
    to be stopped or died, if it did."""
    scratch = os.path.join(jail.base, "run")
    # a left-over would raise, and the trainer would replace this worker
    os.mkdir(scratch, 0o700)
    gone, alive = os.pipe()
    pid = launch(jail, trainer, alive)
    os.close(alive)
    try:
        end = watch(jail, trainer, gone, scratch)
        # is it gone?  Then so is this worker; the trainer starts another and tries again
        os.stat(scratch)
        # reply at once: what it may still do before the signal arrives is nobody's any more
        if end is not None:
            kill(pid)
            reply(trainer, end)
    finally:
        kill(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(gone)
        wipe(scratch)
    if end is None:
        reply(trainer, f"the program was killed ({signal.strsignal(-code)})" if code < 0 else
              f"the program ended its own process (exit status {code})")


def kill(pid: int) -> None:
    # it may only have closed the pipe; without seccomp it may have children
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def watch(jail: Jail, trainer: socket.socket, gone: int, scratch: str) -> str | None:
    """Wait for the end of the child: the reason to stop it, "" if it says
    that it is done, None if it is gone."""
    events = select.poll()
    events.register(trainer, select.POLLHUP)    # no event but the end: the trainer is gone
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
            if not said or deadline:            # a program that says "done" itself has ended itself
                return "" if said else None
            deadline = time.monotonic() + jail.seconds
        elif left <= 0:
            return f"the program ran longer than {jail.seconds:g} s"
        elif deadline and disk_is_full(scratch):
            return f"the program wrote more than {DISK_BYTES >> 20} MB or {DISK_FILES} files"


def reply(trainer: socket.socket, error: str) -> None:
    trainer.sendall(json.dumps({"error": error}).encode() + b"\n")


def disk_is_full(scratch: str) -> bool:
    used = 0
    for count, entry in enumerate(os.scandir(scratch)):
        with suppress(FileNotFoundError):       # removed under our eyes
            used += 512 * entry.stat(follow_symlinks=False).st_blocks
        if used > DISK_BYTES or count >= DISK_FILES:
            return True
    return False


def wipe(directory: str) -> None:
    """Remove a directory.  Quick for the flat one that a jailed program
    leaves; `rm` copes with any other."""
    try:
        for entry in os.scandir(directory):
            os.unlink(entry)
        os.rmdir(directory)
    except OSError:
        subprocess.run(["rm", "-rf", "--", directory], stdin=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)


def main(role: str, jail: Jail, *fds: int) -> None:
    os.set_inheritable(fds[0], False)
    trainer = socket.socket(fileno=fds[0])
    if role == "child":
        preload(jail)
        child(jail, trainer, fds[1])
    jail.base = tempfile.mkdtemp(prefix="arft-", dir=jail.tmp)
    os.chdir(jail.base)
    try:
        jail.zygote, jail.fork = os.getpid(), jail.fork and "fork" not in jail.without
        if jail.fork:
            preload(jail)
            rehearse()
            # the collector would touch, and so copy, every page after each fork
            gc.freeze()
            with suppress(KeyError):
                seccomp_program(os.uname().machine)     # likewise made once
        jail.layers = available_layers(jail)
        hello = {"base": jail.base, "layers": jail.layers, "escapes": escapes(jail)}
        leave_fresh_memory()
        trainer.sendall(json.dumps(hello).encode() + b"\n")
        while True:
            execute(jail, trainer)
    except ConnectionError:
        pass                            # the trainer is gone; nothing is left to say
    except OSError as problem:
        print(f"a sandbox worker gives up and is replaced: {problem}", file=sys.stderr)
    finally:
        wipe(jail.base)


if __name__ == "__main__":
    main(sys.argv[1], Jail(**json.loads(sys.argv[2])), *map(int, sys.argv[3:]))
