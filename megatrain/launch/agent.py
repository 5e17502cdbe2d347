"""The agent that starts this node's workers, hands on signals and makes one exit code of theirs. Imports no torch.

Where a rank was killed or hangs, it ends the others and starts all of them again; whether that can help is
`resilience/`'s knowledge. The agents of several nodes act together (`peers.py`): a start is one of all nodes' ranks, and
ends with one verdict. What a worker does is in `worker.py`, its process in `ranks.py`: in a session of its own, so that Ctrl-C
reaches the agent alone; on Linux it dies with the agent, whatever kills that.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from megatrain.checkpoint.naming import checkpoint_step
from megatrain.checkpoint.rescue import ENVIRONMENT as COPIES
from megatrain.checkpoint.rescue import RESCUED, Copies, assemble
from megatrain.distributed.rank_environment import RESTARTS
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_INTERRUPTED,
    EXIT_NO_PROGRESS,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    EnvironmentFault,
    OwnedError,
)
from megatrain.launch.fork_server import ForkServer, ForkServerError
from megatrain.launch.nodes import DONE, FAILED, HANGS, STILL, WORKS, Alone, Peers
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
from megatrain.resilience import watchdog
from megatrain.resilience.failure import SAME_FAILURES, Failure, times_seen
from megatrain.resilience.heartbeat import ENVIRONMENT as HEARTBEATS
from megatrain.resilience.heartbeat import Beat, Heartbeats
from megatrain.resilience.ledger import FILE as LEDGER
from megatrain.resilience.ledger import Ledger
from megatrain.resilience.owner import ENVIRONMENT as OWNER
from megatrain.resilience.owner import Ownership
from megatrain.tracking.events import EventLog, read_events

POLL_S = 0.05
"""Seconds between looks at the workers."""

GRACE_PERIOD_S = 2.0
"""Seconds the other workers have, after one failed, to end by themselves with their own message."""

KILL_S = 8.0
"""Seconds from a worker's failure until those still alive are killed."""

OWN_MISTAKES = tuple(error.exit_code for error in (ConfigError, DataError, CheckpointError, DivergedError, OwnedError))
"""Exit codes that say why a worker ended, where 8 may only say that it lost one of the others."""

ABORTED = (-signal.SIGABRT, -signal.SIGTERM)
"""How a rank may die of no more than having lost another, or of being asked to end."""

NOT_RESCUED = (EXIT_OK, DivergedError.exit_code, OwnedError.exit_code, EXIT_INTERRUPTED)
"""Ends after which nobody is to go on from a copy in memory: it is no newer, or not to be gone on from."""

EVENTS = "events.jsonl"
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
HOST = socket.gethostname()


@dataclass(frozen=True)
class Recovery:
    """How an agent takes failures of the workers of the run in `run_dir`, which it owns and whose events.jsonl it adds
    to."""

    run_dir: Path
    owner: Ownership
    max_restarts: int
    limits: watchdog.Limits
    copies: bool = False
    """Whether the ranks keep copies of their state in this agent's memory."""
    modules: Sequence[str] = ()
    """What the workers will import; once for all where the system can fork them from a process that has."""
    since: float | None = None
    """When the agent's life began, for the ledger (time.monotonic(); None is now)."""


def launch(
    command: Sequence[str],
    num_workers: int,
    log_dir: Path,
    recovery: Recovery | None = None,
    peers: Peers | None = None,
) -> int:
    """Run `command` as `num_workers` ranks on this machine, and on those of the `peers`, and wait for them all.

    Rank 0 shares the terminal; the others write to `log_dir`/rank_XXXXX.log. SIGTERM and SIGUSR1 go on to the workers,
    who save and end; the agent then waits as long as that takes. Ctrl-C asks for the same, a second one kills.

    With a `recovery`, ranks that were killed or hang are started again, all together.

    Returns the job's exit code, the same on all nodes: 0, 75 (saved after a signal), 6 (the same failure again and
    again), the code of the first worker that failed, or 1 for a worker that a signal killed and that is not started again.

    Raises EnvironmentFault where another node's agent is gone.
    """
    peers = peers or Alone()
    agent = _Agent(command, num_workers, log_dir, recovery, peers)
    previous = {number: signal.getsignal(number) for number in FORWARDED_SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup means it
            signal.signal(number, agent.on_signal)
    try:
        return agent.run()
    finally:
        agent.close()
        for number, handler in previous.items():
            # srun may end the other agents once one has left (--wait): their code, agreed on, must not become SIGTERM's
            signal.signal(number, handler if peers.size == 1 else signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------- waiting


@dataclass(frozen=True)
class _Ending:
    """How one start of a node's workers ended: its exit code and, where starting again may help, the failure.

    `blame` sorts nodes by how likely theirs is the failure that ended all, the likeliest first; it is None where a node's
    ranks only ended because others did. `message` is what there is to say of it, `rank0_code` how rank 0 ended where it
    did so by itself, hence with words of its own; `asked` whether the node's ranks had been asked to stop.
    """

    code: int
    blame: tuple[bool, bool, int] | None = None
    failure: Failure | None = None
    message: str = ""
    rank0_code: int | None = None
    witnesses: tuple[watchdog.Witness, ...] = ()
    asked: bool = False

    @staticmethod
    def from_json(found: dict[str, Any]) -> _Ending:
        """What another agent sent of `asdict(ending)`."""
        witnesses = [watchdog.Witness(**{**one, "beat": Beat(**one["beat"])}) for one in found["witnesses"]]
        failure = Failure(**found["failure"]) if found["failure"] else None
        blame = tuple(found["blame"]) if found["blame"] else None
        return _Ending(**{**found, "blame": blame, "failure": failure, "witnesses": tuple(witnesses)})


class _Agent:
    """Starts the workers and waits for them; one instance a launch."""

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
        self.pending: deque[int] = deque()
        self.forwarded: set[int] = set()
        self.interrupts = 0
        self.restarts = 0
        self.copies = Copies() if recovery is not None and recovery.copies else None
        self.fork_server: ForkServer | None = None
        self.ledger: Ledger | None = None
        if recovery is not None and peers.node == 0:
            self.ledger = Ledger(recovery.run_dir / LEDGER, self.heartbeats, recovery.owner.check, recovery.since)
        self.can_fork = LINUX and recovery is not None and bool(recovery.modules)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the waiting loop acts on it."""
        self.pending.append(number)

    def run(self) -> int:
        """Start the workers, again where that can help: the job's exit code."""
        try:
            while True:
                self._start()
                ending = self._agree(self._wait())
                code: int | None = ending.code
                self._book_end(ending)
                if self.peers.node == 0 and ending.failure is not None and self.recovery is not None:
                    code = self._take(ending.failure, ending.asked, self.recovery)
                code = self.peers.all_gather(code)[0]
                if code is not None:
                    self._rescue(code)
                    return code
                self.restarts += 1
        except EnvironmentFault as lost:
            self._write_down_loss(str(lost))
            self._rescue(None)
            if self.ledger is not None:
                self.ledger.end("node lost")
            raise

    def close(self) -> None:
        """Leave no process behind."""
        self.kill()
        if self.fork_server is not None:
            self.fork_server.close()
        if self.ledger is not None:
            self.ledger.close()  # last of all, for it books this, too
        self.heartbeats.close()
        if self.copies is not None:
            self.copies.close()

    def _book_end(self, ending: _Ending) -> None:
        """How this start ended, for the ledger."""
        if self.ledger is not None:
            names = {EXIT_OK: "done", EXIT_SAVED_AFTER_SIGNAL: "saved", EXIT_INTERRUPTED: "interrupted"}
            how = names.get(ending.code, f"exit code {ending.code}")
            self.ledger.end(ending.failure.how if ending.failure else how)

    def _start(self) -> None:
        self.heartbeats.clear()
        if self.ledger is not None:
            self.ledger.begin()
        shared = self.heartbeats.file
        places = self.peers.all_gather([HOST, free_port()])
        self.hosts = [host for host, _ in places]
        port = places[0][1]
        self.workers = []
        for local_rank in range(self.num_workers):
            environ = rank_environ(local_rank, self.num_workers, self.peers, port)
            environ |= {HEARTBEATS: str(shared), RESTARTS: str(self.restarts)}
            if self.recovery is not None:
                environ[OWNER] = str(self.recovery.owner.number)
            if self.copies is not None:
                environ[COPIES] = str(self.copies.folder)
            worker = self._fork(environ) if self.can_fork else None
            self.workers.append(worker or start_rank(self.command, environ, self.log_dir, shared))

    def _fork(self, environ: dict[str, str]) -> RankProcess | None:
        """A rank from the nursery; None where that does not work, which is said once."""
        assert self.recovery is not None
        owner = self.recovery.owner

        def hurry() -> bool:
            owner.beat()  # the first imports may take minutes
            return len(self.pending) > 1

        try:
            if self.fork_server is None:
                self.fork_server = ForkServer(
                    self.recovery.modules, fork_server_environ(environ), [self.heartbeats.file]
                )
            rank = int(environ["RANK"])
            log = log_of(self.log_dir, rank)
            module, *arguments = self.command[2:]  # behind python -m
            process = self.fork_server.fork(module, arguments, environ, log, hurry)
            return RankProcess(rank, int(environ["LOCAL_RANK"]), process, log)
        except ForkServerError as error:
            if self.fork_server is not None:  # it must not make this rank later, beside the one that is started now
                self.fork_server.close()
                self.fork_server = None
            self.can_fork = False
            say(f"ranks cannot be forked ({error}); starting them one by one")
            return None

    def _agree(self, mine: _Ending) -> _Ending:
        """How this start ended for the whole job, as node 0 sees it and says; on the others how it ended there."""
        mine = replace(mine, asked=bool(self.forwarded or self.pending))
        endings = [_Ending.from_json(found) for found in self.peers.gather_to_first(asdict(mine))]
        if self.peers.node != 0:
            return mine
        blamed = [ending for ending in endings if ending.blame is not None]
        witnesses = tuple(witness for ending in endings for witness in ending.witnesses)
        if blamed:
            chosen = min(blamed, key=lambda ending: ending.blame or ())
            told = chosen.code > EXIT_DEFECT and chosen.code == endings[0].rank0_code
            if chosen.message and not told:
                say(chosen.message)
        elif witnesses and self.recovery is not None:
            failure = self._name_culprit(witnesses, self.recovery)
            chosen = _Ending(EnvironmentFault.exit_code, failure=failure)
        else:
            chosen = max(endings, key=lambda ending: ending.code)
        return replace(chosen, asked=any(ending.asked for ending in endings))

    def _write_down_loss(self, what: str) -> None:
        """Another node's agent is gone: so says events.jsonl, if this node can."""
        if self.recovery is not None and self.peers.node == 0:
            step = max(self.heartbeats.read(local_rank).step for local_rank in range(self.num_workers))
            _note(self.recovery.run_dir, "node_lost", step, detail=what)

    def _rescue(self, code: int | None) -> None:
        """The job ends with `code` (None: another agent is gone): bring copies in memory that are newer than the last
        checkpoint to the disk, so that the next start goes on from them."""
        if self.copies is None or self.recovery is None or code in NOT_RESCUED:
            return
        self.kill()
        checkpoints = self.recovery.run_dir / "checkpoints"
        with _said("copies in memory could not be brought to the disk"):
            self.recovery.owner.check()
            steps = self.copies.rescue(checkpoints, alone=code is None)
            if code is None and steps:
                say(f"brought the copies of step {', '.join(map(str, steps))} in memory to {checkpoints / RESCUED}")
        if code is None:
            return
        self.peers.all_gather(None)  # every node's part is on the disk, or cannot get there
        if self.peers.node != 0:
            return
        with _said("copies in memory could not be made a checkpoint"):
            self.recovery.owner.check()  # it may have taken long
            made, problems = assemble(checkpoints)
            for problem in problems:
                say(problem)
            if made is not None:
                say(f"made {made} of the copies in memory; the next start goes on from there")
                _note(self.recovery.run_dir, "rescue", checkpoint_step(made) or 0, checkpoint=str(made))

    def _take(self, failure: Failure, asked: bool, recovery: Recovery) -> int | None:
        """Write a failure down; the exit code it ends the job with, None to start all ranks again."""
        try:
            seen = times_seen(failure, read_events(recovery.run_dir / EVENTS))
        except OSError:  # none yet, or the disk is away
            seen = 1
        _note(recovery.run_dir, "failure", failure.step, **failure.event(), times=seen)
        code, what_now = None, f"starting all ranks again (restart {self.restarts + 1} of {recovery.max_restarts})"
        if asked:
            code, what_now = EnvironmentFault.exit_code, "not started again, for the job was asked to stop"
        elif seen >= SAME_FAILURES:
            code = EXIT_NO_PROGRESS
            what_now = f"the same {seen} times in a row; not started again. {self._where_to_look(failure.rank)}"
        elif self.restarts >= recovery.max_restarts:
            code = EXIT_DEFECT if failure.how != "hang" else EnvironmentFault.exit_code
            what_now = f"not started again (resilience.max_restarts={recovery.max_restarts})"
            what_now += f". {self._where_to_look(failure.rank)}"
        say(f"{failure}; {what_now}")
        if code is None:
            _note(recovery.run_dir, "restart", failure.step, restarts=self.restarts + 1)
        return code

    def _where_to_look(self, rank: int) -> str:
        log = log_of(self.log_dir, rank)
        return f"Its log is {log}" if log else "Its output is above"

    def _wait(self) -> _Ending:
        """Until every worker of the job has ended, on whichever node."""
        while True:
            self._hand_on_signals()
            if self.ledger is not None:
                self.ledger.watch()
            if self.interrupts > 1:
                self.peers.tell(FAILED)
                self.kill()
                return _Ending(EXIT_INTERRUPTED, (False, False, -1), None, "stopped without saving (second Ctrl-C)")
            failed = [worker for worker in self._look() if worker.code not in (EXIT_OK, EXIT_SAVED_AFTER_SIGNAL)]
            if failed:
                self.peers.tell(FAILED)
                return self._end_after(min(failed, key=self._blame))
            if (ending := self._end_with_others()) is not None:
                return ending
            time.sleep(POLL_S)

    def _end_with_others(self) -> _Ending | None:
        """Say how this node's ranks fare, and whether this start is over, all nodes considered."""
        self.peers.tell(self._state())
        states = self.peers.states()
        if FAILED in states:
            return self._end_after(None)
        if set(states) == {DONE}:
            return self._verdict(None)
        if self.peers.node == 0 and STILL in states and set(states) <= {STILL, DONE}:
            self.peers.tell(HANGS)
            return self._question()
        return self._question() if states[0] == HANGS else None

    def _state(self) -> str:
        alive = self._alive()
        if not alive:
            return DONE
        if self.recovery is None:
            return WORKS
        self.recovery.owner.beat()
        return (
            STILL
            if watchdog.hangs(self.heartbeats, [worker.local_rank for worker in alive], self.recovery.limits)
            else WORKS
        )

    def _question(self) -> _Ending:
        """The job hangs: have every rank of this node show its stacks, and end them."""
        assert self.recovery is not None, "only a run that can recover is watched"
        if self.ledger is not None:
            self.ledger.freeze(hung=True)
        files = {worker.local_rank: watchdog.stack_file(self.recovery.run_dir, worker.rank) for worker in self.workers}
        pids = {worker.local_rank: worker.process.pid for worker in self._alive()}
        witnesses = watchdog.question(pids, self.heartbeats, files)
        self._look()
        if all(worker.code in (EXIT_OK, EXIT_SAVED_AFTER_SIGNAL) for worker in self.workers):
            return self._verdict(None)  # they were only slow to leave
        self.kill()
        first = self.peers.node * self.num_workers
        return _Ending(
            EnvironmentFault.exit_code,
            witnesses=tuple(replace(witness, rank=first + witness.rank) for witness in witnesses),
        )

    def _name_culprit(self, witnesses: Sequence[watchdog.Witness], recovery: Recovery) -> Failure:
        """Who holds up a job that hangs; writes down what all have shown."""
        guilty = watchdog.culprits(witnesses)
        step = min(witness.beat.step for witness in witnesses)
        first = guilty[0] if guilty else witnesses[0]
        silent = min(witness.beat.age_s for witness in witnesses)
        for witness in witnesses:
            where = {"guilty": witness in guilty, "host": self.hosts[witness.rank // self.num_workers]}
            _note(recovery.run_dir, "hang", witness.beat.step, **witness.event(), **where)
        others = "; ".join(str(witness) for witness in witnesses if witness is not first)
        detail = f"no rank has moved for {silent:.1f} s; {first}{f'; {others}' if others else ''}"
        if not guilty:
            detail += "; all wait alike, so the network is the likely culprit"
        host = self.hosts[first.rank // self.num_workers]
        return Failure("hang", first.rank, step, first.beat.phase, host, detail)

    def kill(self) -> None:
        """Kill every worker that still runs, and what it started; returns once they are gone.

        Raises EnvironmentFault, once all were killed, where the kernel does not let one go.
        """
        held: EnvironmentFault | None = None
        for worker in self._alive():
            try:
                worker.kill()
            except EnvironmentFault as error:
                held = held or error
        if held is not None:
            raise held

    def _alive(self) -> list[RankProcess]:
        return [worker for worker in self.workers if worker.code is None]

    def _look(self) -> list[RankProcess]:
        """The workers that ended since the last look."""
        ended = []
        for worker in self._alive():
            worker.code = worker.process.poll()
            if worker.code is not None:
                ended.append(worker)
        return ended

    def _hand_on_signals(self) -> None:
        """Send on what arrived. Ctrl-C and a closed terminal become SIGTERM: save and end."""
        while self.pending:
            number = self.pending.popleft()
            if number == signal.SIGINT:
                self.interrupts += 1
                if self.interrupts == 1:
                    say("stopping: the workers save and end; press Ctrl-C again to stop without saving")
            number = number if number == signal.SIGUSR1 else int(signal.SIGTERM)
            self.forwarded.add(number)
            for worker in self._alive():
                worker.process.send_signal(number)

    @staticmethod
    def _blame(worker: RankProcess) -> tuple[bool, bool, int]:
        """Sorts workers that ended together: killed ones first, those that may only have lost a peer last."""
        return not worker.killed, worker.code == EnvironmentFault.exit_code, worker.rank

    def _end_after(self, first: RankProcess | None) -> _Ending:
        """One worker failed, another node's where it is None: let the others end, kill those that do not, and say why."""
        if self.ledger is not None:
            self.ledger.freeze()
        started = time.monotonic()
        asked = False
        rank0_code = None
        cause = first
        while self._alive() and (elapsed := time.monotonic() - started) < KILL_S:
            if not asked and elapsed > GRACE_PERIOD_S:
                asked = True
                for worker in self._alive():
                    worker.process.terminate()
            for worker in self._look():
                if worker.rank == 0 and not asked:
                    rank0_code = worker.code
                if cause is None and worker.killed and not asked:
                    cause = worker
                elif (cause is None or cause.code == EnvironmentFault.exit_code) and (
                    worker.code in OWN_MISTAKES or (worker.killed and worker.code not in ABORTED)
                ):
                    cause = worker  # whoever lost this peer noticed before it had ended
            time.sleep(POLL_S)
        self.kill()
        return replace(self._verdict(cause), rank0_code=cause.code if cause and cause.rank == 0 else rank0_code)

    def _verdict(self, cause: RankProcess | None) -> _Ending:
        """How this node's workers ended: the one whose failure ended the others, if that was one of them."""
        if cause is None:
            saved = any(worker.code == EXIT_SAVED_AFTER_SIGNAL for worker in self.workers)
            return _Ending(EXIT_SAVED_AFTER_SIGNAL if saved else EXIT_OK)
        code = cause.code
        assert code is not None, "a worker that has not ended cannot have failed"
        blame = self._blame(cause)
        if -code in self.forwarded:
            name = signal.Signals(-code).name
            message = f"stopped by {name} before training began or after its end; start again to continue"
            return _Ending(EXIT_SAVED_AFTER_SIGNAL, blame, message=message)
        if code < 0 and self.recovery is not None:
            beat = self.heartbeats.read(cause.local_rank)
            failure = Failure(signal.Signals(-code).name, cause.rank, beat.step, beat.phase, HOST)
            return _Ending(EXIT_DEFECT, blame, failure)
        message = describe_end(cause.rank, code, cause.log)
        return _Ending(EXIT_DEFECT if code < 0 else code, blame, message=message)


def _note(run_dir: Path, kind: str, step: int, **detail: Any) -> None:
    """Write an event down. A disk that refuses must not end the agent, which holds the copies in memory."""
    try:
        events = EventLog(run_dir / EVENTS)
        try:
            events.emit(kind, step, **detail)
        finally:
            events.close()
    except OSError as error:
        say(f"{run_dir / EVENTS} cannot be written ({error.strerror}); it lacks: {kind} at step {step}")


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """A disk that refuses a rescue, or another owner, is told and changes nothing else."""
    try:
        yield
    except (OSError, OwnedError) as error:
        say(f"{what}: {error}; the last checkpoint is what there is")


def say(message: str) -> None:
    """One line of the agent's own to the terminal."""
    print(f"megatrain: {message}", file=sys.stderr, flush=True)
