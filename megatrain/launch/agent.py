"""The agent: start this node's workers, forward signals, and reduce their exit codes to one. Imports no torch.

If a rank is killed or hangs, the agent stops all ranks, and restarts them if `recovery.py` decides to.
The agents of several nodes act together (`nodes.py`): they start all ranks of the job at once and agree on one outcome.
Each worker has its own session (`rank_process.py`), so that Ctrl-C reaches only the agent. On Linux workers die with
the agent, even if it is killed. `training/rank.py` is the worker's program.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from megatrain.checkpoint.rescue import ENVIRONMENT as COPIES
from megatrain.checkpoint.rescue import Copies
from megatrain.distributed.rank_environment import RESTARTS
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    DivergedError,
    EnvironmentFault,
    OwnedError,
)
from megatrain.launch import notices
from megatrain.launch.fork_server import ForkServer, ForkServerError
from megatrain.launch.nodes import DONE, FAILED, HUNG, RUNNING, STALLED, Peers, SingleNode
from megatrain.launch.outcome import (
    GOOD_CODES,
    KILLED,
    LOST_A_PEER,
    TOLD,
    Blame,
    StartOutcome,
    failure_of,
    most_to_blame,
    suspicion,
)
from megatrain.launch.rank_process import (
    LINUX,
    RankProcess,
    describe_end,
    fork_server_environ,
    free_port,
    log_of,
    rank_environ,
    start_rank,
)
from megatrain.launch.recovery import (
    Recovery,
    Restarts,
    assemble_copies,
    decide_restart,
    print_message,
    record_event,
    report_hang,
    save_copies,
)
from megatrain.resilience import watchdog
from megatrain.resilience.fault_classes import ErrorReport
from megatrain.resilience.heartbeat import ENVIRONMENT as HEARTBEATS
from megatrain.resilience.heartbeat import Heartbeats
from megatrain.resilience.ledger import FILE as LEDGER
from megatrain.resilience.ledger import Ledger
from megatrain.resilience.owner import ENVIRONMENT as OWNER

POLL_S = 0.05
"""Seconds between polls of the workers."""

GRACE_PERIOD_S = 2.0
"""Grace period after a worker's failure: seconds in which the others may exit by themselves, before SIGTERM."""

REPORTED_S = 10.0
"""Seconds from a worker's report of an error to SIGKILL if it still runs."""

KILL_S = 8.0
"""Seconds from a worker's failure to SIGKILL for those that still run."""

STOPPING_S = 30.0
"""Seconds between messages that the workers have not ended since they were asked to."""

NOT_RESCUED = (EXIT_OK, DivergedError.exit_code, OwnedError.exit_code, EXIT_INTERRUPTED)
"""Exit codes after which in-memory copies are dropped: they are no newer than the checkpoint, or must not be used."""

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
HOST = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
"""The node's name as Slurm, or else the system, knows it."""


def launch(
    command: Sequence[str],
    num_workers: int,
    log_dir: Path,
    recovery: Recovery | None = None,
    peers: Peers | None = None,
) -> int:
    """Run `command` as `num_workers` ranks on this node and on each node of `peers`, and wait for all of them.

    Rank 0 shares the terminal; the others write to `log_dir`/rank_XXXXX.log. SIGTERM and SIGUSR1 are forwarded to the
    workers, which save and exit; the agent waits for them without a time limit. Ctrl-C does the same; a second Ctrl-C
    kills them.

    With a `recovery`, all ranks are restarted if one is killed or hangs.

    Returns the job's exit code, the same on all nodes: 0, 75 (saved after a signal), 6 (the same failure repeatedly),
    130 (second Ctrl-C), the code of the first worker that failed, or 1 if a signal killed a worker that is not
    restarted.

    Raises:
        EnvironmentFault: another node's agent died or is unreachable.
    """
    peers = peers or SingleNode()
    agent = Agent(command, num_workers, log_dir, recovery, peers)
    previous = {number: signal.getsignal(number) for number in FORWARDED_SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # a signal that is ignored already, as under nohup, stays ignored
            signal.signal(number, agent.on_signal)
    try:
        return agent.run()
    finally:
        agent.close()
        for number, handler in previous.items():
            # srun may send SIGTERM to an agent once another has exited (--wait); the agreed exit code must stand
            signal.signal(number, handler if peers.size == 1 else signal.SIG_IGN)


class Agent:
    """The supervisor of this node's workers, for one launch."""

    def __init__(
        self, command: Sequence[str], num_workers: int, log_dir: Path, recovery: Recovery | None, peers: Peers
    ) -> None:
        self.peers = peers
        self.command = command
        self.num_workers = num_workers
        self.log_dir = log_dir
        self.recovery = recovery
        self.heartbeats = Heartbeats(num_workers)
        self.workers: list[RankProcess] = []
        self.hosts = [HOST]
        self.pending_signals: deque[int] = deque()
        self.forwarded_signals: set[int] = set()
        self.reported: dict[int, float] = {}
        self.interrupts = 0
        self.asked_at: float | None = None
        self.next_notice = 0.0
        self.starts = 0
        self.restarts = Restarts()
        self.copies = Copies() if recovery is not None and recovery.copies else None
        self.fork_server: ForkServer | None = None
        self.ledger: Ledger | None = None
        if recovery is not None and peers.node == 0:
            self.ledger = Ledger(recovery.run_dir / LEDGER, self.heartbeats, recovery.owner.check, recovery.since)
        self.can_fork = LINUX and recovery is not None and bool(recovery.modules)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Queue a signal for the wait loop to forward."""
        self.pending_signals.append(number)

    def run(self) -> int:
        """Start the workers, restart them if that may help, and return the job's exit code."""
        try:
            while True:
                self._start_workers()
                outcome = self._agree(self._wait())
                self._record_end(outcome)
                code: int | None = outcome.code
                if self.peers.node == 0 and outcome.failure is not None and self.recovery is not None:
                    self.restarts.began_at(self.heartbeats.account(0).first)
                    code = decide_restart(
                        outcome.failure, self.recovery, self.restarts, outcome.stop_requested, self.log_dir
                    )
                code = self.peers.all_gather(code)[0]
                if code is not None:
                    self.rescue_copies(code)
                    return code
                self.starts += 1
        except EnvironmentFault as lost:
            self._record_lost_node(str(lost))
            self.rescue_copies(None)
            if self.ledger is not None:
                self.ledger.end("node lost")
            raise

    def close(self) -> None:
        """Kill the running workers and release all resources."""
        self.kill()
        if self.fork_server is not None:
            self.fork_server.close()
        if self.ledger is not None:
            self.ledger.close()  # last, so that it accounts for the time until now
        self.heartbeats.close()
        if self.copies is not None:
            self.copies.close()

    def kill(self) -> None:
        """Kill every running worker and its child processes, and wait until they are gone.

        Raises:
            EnvironmentFault: a process does not exit. The others were killed all the same.
        """
        stuck: EnvironmentFault | None = None
        for worker in self._running():
            try:
                worker.kill()
            except EnvironmentFault as error:
                stuck = stuck or error
        if stuck is not None:
            raise stuck

    def rescue_copies(self, code: int | None) -> None:
        """Write in-memory copies newer than the checkpoint to disk, before exit with `code` (None: a node was lost)."""
        if self.copies is None or self.recovery is None or code in NOT_RESCUED:
            return
        self.kill()
        save_copies(self.copies, self.recovery, alone=code is None)
        if code is None:
            return
        self.peers.all_gather(None)  # barrier: every node has written its part or failed to
        if self.peers.node == 0:
            assemble_copies(self.recovery)

    # ------------------------------------------------------------------------------------------------ starting

    def _start_workers(self) -> None:
        """Start this node's ranks, at the same time as the other nodes start theirs."""
        self.heartbeats.clear()
        self.reported = {}
        if self.ledger is not None:
            self.ledger.begin()
        heartbeat_file = self.heartbeats.file
        endpoints = self.peers.all_gather([HOST, free_port()])
        self.hosts = [host for host, _ in endpoints]
        port = endpoints[0][1]
        self.workers = []
        for local_rank in range(self.num_workers):
            environ = rank_environ(local_rank, self.num_workers, self.peers, port)
            environ |= {HEARTBEATS: str(heartbeat_file), RESTARTS: str(self.starts)}
            if self.recovery is not None:
                environ[OWNER] = str(self.recovery.owner.number)
            if self.copies is not None:
                environ[COPIES] = str(self.copies.folder)
            worker = self.fork_rank(environ) if self.can_fork else None
            self.workers.append(worker or start_rank(self.command, environ, self.log_dir, heartbeat_file))

    def fork_rank(self, environ: dict[str, str]) -> RankProcess | None:
        """Start a rank through the fork server. If that fails, print why, stop using the server and return None."""
        assert self.recovery is not None
        owner = self.recovery.owner

        def cancelled() -> bool:
            owner.beat()  # the fork server's first imports may take minutes
            return len(self.pending_signals) > 1

        try:
            if self.fork_server is None:
                self.log_dir.mkdir(parents=True, exist_ok=True)
                own_log = self.log_dir / "fork_server.log"
                self.fork_server = ForkServer(
                    self.recovery.modules, fork_server_environ(environ), [self.heartbeats.file], own_log
                )
            rank = int(environ["RANK"])
            log = log_of(self.log_dir, rank)
            module, *arguments = self.command[2:]  # after what `python_command` puts in front
            process = self.fork_server.fork(module, arguments, environ, log, cancelled)
            return RankProcess(rank, int(environ["LOCAL_RANK"]), process, log)
        except ForkServerError as error:
            if self.fork_server is not None:  # close it, or it might still fork this rank later
                self.fork_server.close()
                self.fork_server = None
            self.can_fork = False
            print_message(f"ranks cannot be forked ({error}); starting them one by one")
            return None

    # ------------------------------------------------------------------------------------------------- waiting

    def _wait(self) -> StartOutcome:
        """Wait until this start is over on all nodes, and return its outcome on this node."""
        while True:
            self._forward_signals()
            self._tell_of_long_stop()
            if self.ledger is not None:
                self.ledger.watch()
            failed = [worker for worker in self._poll() if not self._is_good(worker)]
            if self.interrupts > 1 and self._running():
                self.peers.report_state(FAILED)
                self.kill()
                message = notices.cut_short(self.log_dir.parent, self.heartbeats.account(0).done)
                return StartOutcome(EXIT_INTERRUPTED, (KILLED, -1), message=message)
            failed = failed or self._end_after_report()
            if failed:
                self.peers.report_state(FAILED)
                return self._stop_after_failure(min(failed, key=self._blame))
            if (outcome := self._follow_peers()) is not None:
                return outcome
            time.sleep(POLL_S)

    def _end_after_report(self) -> list[RankProcess]:
        """Kill workers that reported an error `REPORTED_S` seconds ago and still run; return them.

        After an error of a device a process may hang at its exit, while the other ranks wait for it.
        """
        now = time.monotonic()
        for worker in self._running():
            if self.heartbeats.report(worker.local_rank):
                self.reported.setdefault(worker.rank, now)
        late = [worker for worker in self._running() if now - self.reported.get(worker.rank, now) > REPORTED_S]
        for worker in late:
            worker.kill()
        return late

    def _follow_peers(self) -> StartOutcome | None:
        """Report this node's state and read all others; return the outcome if this start is over, else None."""
        self.peers.report_state(self._state())
        states = self.peers.states()
        if FAILED in states:
            return self._stop_after_failure(None)
        if set(states) == {DONE}:
            return self._outcome(None)
        if self.peers.node == 0 and STALLED in states and set(states) <= {STALLED, DONE}:
            self.peers.report_state(HUNG)
            return self._stop_hung_workers()
        return self._stop_hung_workers() if states[0] == HUNG else None

    def _state(self) -> str:
        running = self._running()
        if not running:
            return DONE
        if self.recovery is None:
            return RUNNING
        self.recovery.owner.beat()
        local_ranks = [worker.local_rank for worker in running]
        return STALLED if watchdog.hangs(self.heartbeats, local_ranks, self.recovery.limits) else RUNNING

    def _forward_signals(self) -> None:
        """Forward queued signals to the workers. Ctrl-C and SIGHUP are sent as SIGTERM: save and exit."""
        while self.pending_signals:
            number = self.pending_signals.popleft()
            if number == signal.SIGINT:
                self.interrupts += 1
                if self.interrupts == 1:
                    print_message(notices.STOPPING)
                    self._record_interrupt()
            self.heartbeats.ask(number)  # before the signal: the ranks name what their user sent
            number = number if number == signal.SIGUSR1 else int(signal.SIGTERM)
            self.forwarded_signals.add(number)
            if self.asked_at is None:
                self.asked_at = time.monotonic()
                self.next_notice = STOPPING_S
            for worker in self._running():
                worker.process.send_signal(number)

    def _tell_of_long_stop(self) -> None:
        """Say on node 0, from time to time, what the workers do that were asked to save and end."""
        waited = 0.0 if self.asked_at is None else time.monotonic() - self.asked_at
        if self.asked_at is None or waited < self.next_notice or self.peers.node != 0 or not self._running():
            return
        self.next_notice += STOPPING_S
        print_message(notices.long_stop(waited, self.heartbeats.read(0), interrupted=self.interrupts > 0))

    def _running(self) -> list[RankProcess]:
        return [worker for worker in self.workers if worker.code is None]

    def _poll(self) -> list[RankProcess]:
        """Return the workers that ended since the last poll."""
        ended = []
        for worker in self._running():
            worker.code = worker.process.poll()
            if worker.code is not None:
                ended.append(worker)
        return ended

    def _is_good(self, worker: RankProcess) -> bool:
        """Return whether a worker ended well: with a good exit code, which a rank of a run must have announced."""
        announced = self.heartbeats.ended(worker.local_rank) if self.recovery is not None else worker.code
        return worker.code in GOOD_CODES and announced == worker.code

    # ------------------------------------------------------------------------------------------------- ending

    def _stop_after_failure(self, failed: RankProcess | None) -> StartOutcome:
        """Stop the workers after `failed` has failed (None: a worker on another node), and return the outcome.

        They first get a grace period to exit by themselves, then SIGTERM, then SIGKILL. The outcome names the cause.
        """
        if self.ledger is not None:
            self.ledger.freeze()
        started = time.monotonic()
        terminated = False
        rank0_code = None
        cause = failed
        while self._running() and (elapsed := time.monotonic() - started) < KILL_S:
            if not terminated and elapsed > GRACE_PERIOD_S:
                terminated = True
                for worker in self._running():
                    worker.process.terminate()
            for worker in self._poll():
                if worker.rank == 0 and not terminated:
                    rank0_code = worker.code
                if self._is_good(worker):
                    continue
                how, _ = self._blame(worker)
                if cause is None and (how <= TOLD or (worker.killed and not terminated)):
                    cause = worker
                elif cause is not None and self._blame(cause)[0] == LOST_A_PEER and how <= TOLD:
                    cause = worker  # a peer may notice the loss of this worker before the worker has exited
            time.sleep(POLL_S)
        self.kill()
        return replace(self._outcome(cause), rank0_code=cause.code if cause and cause.rank == 0 else rank0_code)

    def _stop_hung_workers(self) -> StartOutcome:
        """Collect the stacks of this node's ranks, then kill the ranks."""
        assert self.recovery is not None, "only a run with a recovery is watched for hangs"
        if self.ledger is not None:
            self.ledger.freeze(hung=True)
        files = {worker.local_rank: watchdog.stack_file(self.recovery.run_dir, worker.rank) for worker in self.workers}
        pids = {worker.local_rank: worker.process.pid for worker in self._running()}
        witnesses = watchdog.collect_stacks(pids, self.heartbeats, files)
        self._poll()
        if all(self._is_good(worker) for worker in self.workers):
            return self._outcome(None)  # they were only slow to exit
        self.kill()
        first_rank = self.peers.node * self.num_workers
        return StartOutcome(
            EXIT_ENVIRONMENT,
            witnesses=tuple(replace(witness, rank=first_rank + witness.rank) for witness in witnesses),
        )

    def _outcome(self, cause: RankProcess | None) -> StartOutcome:
        """Return the outcome on this node. `cause` is the worker whose failure ended the others (None: no failure)."""
        if cause is None:
            saved = any(worker.code == EXIT_SAVED_AFTER_SIGNAL for worker in self.workers)
            return StartOutcome(EXIT_SAVED_AFTER_SIGNAL if saved else EXIT_OK)
        blame, code = self._blame(cause), cause.code
        assert code is not None, "a worker that is still running cannot have failed"
        if -code in self.forwarded_signals:
            message = notices.outside_training(-code, self.interrupts > 0)
            return StartOutcome(EXIT_SAVED_AFTER_SIGNAL, blame, message=message)
        beat = self.heartbeats.read(cause.local_rank)
        if self.recovery and (failure := failure_of(cause.rank, code, self._report(cause), beat, HOST)):
            return StartOutcome(EXIT_DEFECT, blame, failure)
        message = describe_end(cause.rank, code, cause.log)
        return StartOutcome(EXIT_DEFECT if code < 0 else code, blame, message=message)

    def _report(self, worker: RankProcess) -> ErrorReport | None:
        """Return the report of the error that ended a worker, if it left one."""
        return ErrorReport.from_json(self.heartbeats.report(worker.local_rank))

    def _blame(self, worker: RankProcess) -> Blame:
        """Return the sort key of a worker that failed."""
        assert worker.code is not None, "a worker that is still running cannot have failed"
        return suspicion(worker.code, self._report(worker)), worker.rank

    def _agree(self, own: StartOutcome) -> StartOutcome:
        """Gather the outcomes of all nodes. Node 0 prints and returns the job's outcome; other nodes return `own`."""
        own = replace(own, stop_requested=bool(self.forwarded_signals or self.pending_signals))
        outcomes = [StartOutcome.from_json(found) for found in self.peers.gather_to_first(asdict(own))]
        if self.peers.node != 0:
            return own
        witnesses = [witness for outcome in outcomes for witness in outcome.witnesses]
        chosen = most_to_blame(outcomes)
        if chosen is not None:
            already_reported = chosen.code > EXIT_DEFECT and chosen.code == outcomes[0].rank0_code
            if chosen.message and not already_reported:
                print_message(chosen.message)
        elif witnesses and self.recovery is not None:
            hosts = [host for host in self.hosts for _ in range(self.num_workers)]
            failure = report_hang(witnesses, hosts, self.recovery.run_dir)
            chosen = StartOutcome(EXIT_ENVIRONMENT, failure=failure)
        else:
            chosen = max(outcomes, key=lambda outcome: outcome.code)
        return replace(chosen, stop_requested=any(outcome.stop_requested for outcome in outcomes))

    def _record_end(self, outcome: StartOutcome) -> None:
        """Record in the ledger how this start ended."""
        if self.ledger is not None:
            names = {EXIT_OK: "done", EXIT_SAVED_AFTER_SIGNAL: "saved", EXIT_INTERRUPTED: "interrupted"}
            how = names.get(outcome.code, f"exit code {outcome.code}")
            self.ledger.end(outcome.failure.how if outcome.failure else how)

    def _record_lost_node(self, detail: str) -> None:
        """On node 0, record in events.jsonl that another node's agent died or is unreachable."""
        if self.recovery is not None and self.peers.node == 0:
            record_event(self.recovery.run_dir, "node_lost", self._step(), detail=detail)

    def _record_interrupt(self) -> None:
        """On node 0, record Ctrl-C in events.jsonl: the ranks are sent SIGTERM for it, and record only that."""
        if self.recovery is not None and self.peers.node == 0:
            record_event(self.recovery.run_dir, "interrupt", self._step())

    def _step(self) -> int:
        """Return the latest step of this node's ranks."""
        return max(self.heartbeats.read(local_rank).step for local_rank in range(self.num_workers))
