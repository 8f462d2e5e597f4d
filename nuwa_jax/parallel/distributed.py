"""Many processes as one job: how they find each other, and what they must have in common.

JAX itself finds its peers on TPU VMs, GKE, Kubernetes, SLURM and under Open MPI 4; addresses may be
given instead. What is added here: whoever says "several processes" gets several or an error, never
a run alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import jax
from jax._src import distributed

from nuwa_jax.errors import UserError, report
from nuwa_jax.leaving import leave
from nuwa_jax.parallel.peers import Peers, last_words

# (number of processes, rank) as launchers tell them: mpirun of Open MPI; srun; mpirun of MPICH,
# Intel and Cray; xpk's JobSets of GPUs.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("PMI_SIZE", "PMI_RANK"),
    ("NNODES", "NODE_RANK"),
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says of the job.

    Attributes:
      coordinator: host:port at which process 0 waits for the others.
      num_processes: how many there are; 1: this one runs alone, whatever the environment says.
      process_id: which of them this one is, from 0.
      join_timeout: seconds to wait for all to come.
      peer_timeout: seconds without a sign of life after which a process counts as lost.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int = 300
    peer_timeout: int = 30

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"num_processes is at least 1, got {self.num_processes}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 1e9):
            raise UserError(
                f"process_id is in 0 .. {(self.num_processes or 0) - 1}, got {self.process_id}"
            )
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"coordinator is HOST:PORT of process 0, got {self.coordinator!r}")
        if self.join_timeout < 1 or self.peer_timeout < 2:
            raise UserError(
                "join_timeout is at least 1 second and peer_timeout at least 2, got "
                f"{self.join_timeout} and {self.peer_timeout}"
            )

    def from_environment(self, environ: Mapping[str, str]) -> Launch:
        """Fills what was not given from NUWA_COORDINATOR, NUWA_NUM_PROCESSES, NUWA_PROCESS_ID."""

        def number(name: str) -> int | None:
            text = environ.get(name, "")
            if not re.fullmatch(r"\d*", text):
                raise UserError(f"{name} is a number, got {text!r}")
            return int(text) if text else None

        given = {
            "coordinator": environ.get("NUWA_COORDINATOR") or None,
            "num_processes": number("NUWA_NUM_PROCESSES"),
            "process_id": number("NUWA_PROCESS_ID"),
        }
        missing = {k: v for k, v in given.items() if getattr(self, k) is None and v is not None}
        return dataclasses.replace(self, **missing)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to join: arguments of `jax.distributed.initialize`, and what must come of it.

    Attributes:
      arguments: what JAX is told; what it is not told, it finds out.
      expected: the number of processes, or None: as many as JAX finds.
      says: who says that there are several processes, or "" where nobody does.
    """

    arguments: Mapping[str, Any]
    expected: int | None
    says: str


def plan(launch: Launch, environ: Mapping[str, str]) -> Plan | None:
    """What to do with these flags in this environment; None: run alone.

    Raises:
      UserError: there are several processes, but nothing says where process 0 is or which of them
        this one is; or flags and launcher disagree.
    """
    launch = launch.from_environment(environ)
    count, rank, source = _launcher(environ)
    if launch.num_processes == 1:
        return None
    told = launch.num_processes or count
    coordinator = launch.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator:
        identity = rank if launch.process_id is None else launch.process_id
        if told is None or identity is None:
            raise UserError(
                f"the coordinator is at {coordinator}, but not how many processes there are or "
                "which one this is: give --num_processes=N and --process_id=I as well"
            )
        if told == 1:
            return None
        arguments = dict(coordinator_address=coordinator, num_processes=told, process_id=identity)
        return Plan(arguments, told, f"--coordinator={coordinator}")
    if launch.process_id is not None:
        raise UserError(
            f"this is process {launch.process_id}, but of which job: give --coordinator=HOST:PORT "
            "of process 0 as well"
        )
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if told is None and (slices > 1 or workers):
        told, source = (workers.count(",") + 1) * slices, "TPU_WORKER_HOSTNAMES"
    if told == 1:
        return None
    if source.startswith(("OMPI", "PMI")) and "OMPI_MCA_orte_hnp_uri" not in environ:
        if find_spec("mpi4py") is None:
            raise UserError(
                f"{source} says {count} processes, but not where process 0 is: give "
                "--coordinator=HOST:PORT of the first host, or install mpi4py"
            )
        return Plan({"cluster_detection_method": "mpi4py"}, told, source)
    return Plan({}, told, "--num_processes" if launch.num_processes else source)


@contextlib.contextmanager
def job(launch: Launch, environ: Mapping[str, str] | None = None) -> Iterator[int]:
    """Joins the other processes, if there are any, and stays with them until the block ends.

    To be entered before anything touches a device. If a process is lost or fails, all others end
    within about `peer_timeout` + 15 seconds with exit code `peers.LOST` and say which it was. An
    exception in the block ends the process here, so that the others need not wait for it.

    Yields:
      Which process this is; 0 if it is alone.

    Raises:
      UserError: the job has several processes and they did not come together.
    """
    chosen = plan(launch, os.environ if environ is None else environ)
    if chosen is None or not _join(chosen, launch):
        yield 0
        return
    peers = Peers(launch.peer_timeout)
    with peers.watching():
        try:
            _check_count(chosen)
            yield jax.process_index()
        except SystemExit:
            raise
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                peers.wait_for_verdict(error)
            code = report(error)
            peers.failed(error)
            leave(code)  # an orderly end would wait for the others
        peers.ending()
        jax.distributed.shutdown()


def _join(chosen: Plan, launch: Launch) -> bool:
    """Whether there is a job of several processes, joined now."""
    timeouts = dict(
        initialization_timeout=launch.join_timeout,
        # Later than `Peers`, which can say who was lost: JAX counts from a heartbeat that may be
        # half of this time old.
        heartbeat_timeout_seconds=2 * launch.peer_timeout + 20,
    )
    address = chosen.arguments.get("coordinator_address", "the address that JAX found")
    number = chosen.expected or "several"
    which = chosen.arguments.get("process_id")
    this = "this process" if which is None else f"process {which} of {number}"
    failure = (
        f"{this} could not join the others at {address} within {launch.join_timeout} s: check that "
        "all processes were started, that they name the same coordinator and number of processes, "
        "each another process_id, and that the port is open (--join_timeout=SECONDS waits longer)"
    )
    # Its handler would swallow SIGTERM; stopping is agreed on in `agreement`.
    jax.config.update("jax_enable_preemption_service", False)
    with last_words(lambda: (failure, 2)):
        try:
            jax.distributed.initialize(**chosen.arguments, **timeouts)
        except ValueError as error:
            alone = str(error).startswith("coordinator_address should be defined")
            if alone and not chosen.says:
                return False
            raise UserError(
                f"{chosen.says or 'the environment'} says {number} processes, but JAX does not "
                f"find the others here ({error}): start through srun, mpirun, a JobSet or on a TPU "
                "pod with jax[tpu] installed, give --coordinator=HOST:PORT, --num_processes=N and "
                "--process_id=I, or --num_processes=1 to run alone"
            ) from error
        except (RuntimeError, OSError, KeyError) as error:
            raise UserError(f"{failure} ({' '.join(str(error).split())[:300]})") from error
    if distributed.global_state.num_processes == 1 and chosen.expected is None:
        jax.distributed.shutdown()
        return False
    return True


def _check_count(chosen: Plan) -> None:
    joined, found = distributed.global_state.num_processes, jax.process_count()
    expected = chosen.expected or joined
    if not joined == found == expected:
        raise UserError(
            f"{chosen.says or 'the environment'} says {expected} processes, but {joined} came "
            f"together, of which {found} have devices: start as many as that, each on devices of "
            "its own"
        )


def _launcher(environ: Mapping[str, str]) -> tuple[int | None, int | None, str]:
    """What the launcher says: the number of processes, which one this is, and in which variable."""
    for count, rank in LAUNCHERS:
        if environ.get(count, "").isdigit() and environ.get(rank, "").isdigit():
            return int(environ[count]), int(environ[rank]), count
    return None, None, ""
