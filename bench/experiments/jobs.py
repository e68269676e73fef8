"""Work in processes of its own, several at a time, each of which leaves one file."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import progress

LOG_TAIL = 2000  # characters of a failed job's log that are shown


@dataclass(frozen=True)
class Job:
    """What one process is to make.

    Args:
        name: that progress is told by.
        path: of the file that it leaves; NAME.log beside it has what it printed, and stays if it fails.
        spec: what the process is told, in JSON, along with `path`.
    """

    name: str
    path: Path
    spec: Mapping[str, object] = field(compare=False)

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.path.with_suffix(".log")


def _start(command: Sequence[str], job: Job) -> subprocess.Popen:
    job.path.parent.mkdir(parents=True, exist_ok=True)
    spec = json.dumps(dict(job.spec) | {"path": str(job.path.resolve())})
    with job.log.open("w") as log:
        # In a session of its own: Ctrl-C is for this process, which then ends the others.
        return subprocess.Popen([*command, spec], stdout=log, stderr=log, start_new_session=True)


def _end(workers: Iterable[subprocess.Popen]) -> None:
    workers = list(workers)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def run_all(
    command: Sequence[str],
    missing: Callable[[], Iterable[Job]],
    collect: Callable[[Job], str],
    at_a_time: int,
) -> list[str]:
    """Do all that is missing. Ctrl-C and SIGTERM end what is under way.

    Args:
        command: starts a process; the job's JSON is its last argument.
        missing: the jobs that are left, most important first; asked again and again, so that it may name what
            became possible meanwhile. None is started twice.
        collect: takes over the file that a job left and tells of it in a few words.
        at_a_time: processes.

    Returns:
        The names of the jobs that failed: the process did, or `collect` raised OSError or ValueError.
    """
    running: dict[Job, subprocess.Popen] = {}
    started: set[Job] = set()
    failed: list[Job] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            for job in missing():
                if len(running) < at_a_time and job not in started:
                    progress(f"{job.name}: started")
                    started.add(job)
                    running[job] = _start(command, job)
            if not running:
                return [job.name for job in failed]
            time.sleep(0.2)
            for job in [job for job, worker in running.items() if worker.poll() is not None]:
                code = running.pop(job).returncode
                try:
                    if code:
                        raise ValueError(
                            f"exit code {code}\n{job.log.read_text(errors='replace')[-LOG_TAIL:]}"
                        )
                    told = collect(job)
                except (OSError, ValueError) as error:
                    progress(f"{job.name}: FAILED, see {job.log}: {error}")
                    failed.append(job)
                else:
                    job.log.unlink()
                    progress(f"{job.name}: {told}")
    finally:
        _end(running.values())
        signal.signal(signal.SIGTERM, previous)
