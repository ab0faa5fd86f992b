"""Commands in several processes: how each joins the others, and what is said when one of them ends."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

TEXT = """Start the same command in every process, on one machine or on many, with an --out that all of them see. Each
takes its share of the images, on its own devices; process 0 writes the results, which are those of one process. If one
ends, all end; --resume goes on, also with another number of processes."""

WORKER = "JAXVIT_WORKER"
"""Set in the process that works, below the one that watches it: JAX ends a process without a word to Python."""

LOST = 75
"""Status of a worker that lost another process: EX_TEMPFAIL of sysexits.h."""


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The options for several processes."""
    group = parser.add_argument_group("several processes", TEXT)
    group.add_argument(
        "--distributed", action="store_true", help="JAX finds the others: on TPU VMs, under SLURM, Open MPI, Kubernetes"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat",
        type=int,
        default=30,
        metavar="SECONDS",
        help="without a sign of life after which a process counts as dead (default: %(default)s)",
    )


def in_processes(parser: argparse.ArgumentParser, options: argparse.Namespace, work: Callable[[], int]) -> int:
    """Does the work of a command, in one process or as one of several, and returns the exit status."""
    given = (options.coordinator, options.processes, options.process_id)
    if not (options.distributed or any(each is not None for each in given)):
        return work()
    if options.distributed and any(each is not None for each in given):
        parser.error("--distributed finds the processes by itself: leave out --coordinator, --processes, --process-id")
    if not options.distributed and (None in given or not 0 <= options.process_id < options.processes):
        parser.error("several processes need --coordinator HOST:PORT, --processes N and --process-id from 0 to N - 1")
    if WORKER not in os.environ:
        return watched()
    from jaxvit.io import parallel

    status = 1
    try:
        parallel.start(*given, heartbeat=options.heartbeat)
        status = work()
    except parallel.ProcessesError as error:
        print(f"\n{error}", file=sys.stderr)
        status = LOST  # JAX may be writing its own report: the last word is with the process that watches
    except BaseException:
        traceback.print_exc()
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the others learn of it at once: a process that leaves in order is waited for
    return status


def watched() -> int:
    """Runs this command again, as a worker; returns its exit status."""
    worker = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {WORKER: "1"})
    before = signal.signal(signal.SIGTERM, lambda number, frame: worker.terminate())
    try:
        while True:
            try:
                status = worker.wait()
                break
            except KeyboardInterrupt:  # the worker was told so too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
    # On lines of their own: a worker that is killed leaves its progress bar behind.
    if status in (LOST, -signal.SIGABRT):
        print(
            "\nerror: another process of this run has ended, or cannot be reached (JAX's own report is above); start "
            "all of them again with --resume, which goes on from what is done",
            file=sys.stderr,
        )
    elif status < 0:
        print(f"\nerror: the worker was ended by {signal.Signals(-status).name}; --resume goes on", file=sys.stderr)
    return 1 if status < 0 or status == LOST else status
