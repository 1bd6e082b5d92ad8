"""The driver for ranks as actors of a Ray cluster, one actor per rank in a placement group.

See ``ray_worker.py`` for what an actor does. Who ends what: the actors and the placement group
belong to this process (Ray ends them when it is gone), a rank's processes to its actor, the
rendezvous store to this process. An actor whose controller has not asked for reports for
``SILENCE_S`` ends itself.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from everstep.cluster import host, rendezvous
from everstep.cluster.driver import (
    Broken,
    DriverEvent,
    Placement,
    RankExit,
    Reported,
    Waiting,
    wait_silently,
)
from everstep.cluster.errors import LaunchError
from everstep.cluster.helper import Helper
from everstep.cluster.keepers import NO_KEEPERS, KeeperOptions
from everstep.cluster.local_driver import DEFAULT_PRELOAD, DEFAULT_TARGET, START_LOG_NAME
from everstep.cluster.ray_actors import KILL_S, actor_class, kill_actors
from everstep.cluster.ray_cluster import RayCluster, answers, within
from everstep.cluster.ray_metrics import RunMetrics
from everstep.cluster.ray_plan import (
    Node,
    bundle_of,
    lost_with_node,
    rank_order,
    seats_of,
    too_small,
    waiting_words,
    why_it_died,
)
from everstep.cluster.ray_worker import HostSetup, installed_versions, start_log_name
from everstep.cluster.shared_dir import ENDING_S, remove_token, wait_for_ranks, write_token
from everstep.trainer.config import LaunchConfig
from everstep.trainer.rank_spec import RankSpec

SILENCE_S = 120.0
"""A rank ends when its controller has not asked for reports for so long (cut off, or stopped)."""
UNREACHABLE_S = 5.0
"""A rank whose actor does not answer for so long is given up."""
_TAKE_S = 5.0
_POLL_S = 0.1
_SHORT_WAIT_S = 2.0
_LOOK_S = 3.0
_LOOK_EVERY_S = 0.3
_CLOSE_S = 5.0
_FORGET_S = 120.0
RAY_LOG_NAME = "ray.log"
_STORE_TARGET = "everstep.cluster.rendezvous:serve"


@dataclass
class _Rank:
    """A rank whose exit was not told yet."""

    actor: Any
    node: Node
    pending: Any
    """Its call that waits for messages."""
    keeper: str | None
    seen: int = 0
    silent_since_s: float | None = None


class RayDriver:
    """Runs ranks as actors; a ClusterDriver.

    Args:
        open_cluster: joins the cluster; it is left when this driver is closed.
        run_dir: the run's directory, prepared; its folder ``logs`` exists.
        name: of the run, in names of actors and tags of metrics.
        launch: what to ask of the cluster.
        gpus_per_rank: 0, or 1 where ranks run on GPUs.
        threads: CPU threads per rank, or 'auto'.
        keepers: how keepers are started on nodes, where specs name them.
        target: "module:function" that a rank runs.
        preload: modules that are imported before a rank begins.
        store: ranks need a rendezvous store.
        shared: check that all nodes see the run directory.
    """

    def __init__(
        self,
        open_cluster: Callable[[Waiting], RayCluster],
        run_dir: Path,
        *,
        name: str,
        launch: LaunchConfig,
        gpus_per_rank: int = 0,
        threads: int | str = "auto",
        keepers: KeeperOptions = NO_KEEPERS,
        target: str = DEFAULT_TARGET,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        store: bool = True,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._open_cluster = open_cluster
        self._run_dir = run_dir.absolute()
        self._name = name
        self._launch = launch
        self._gpus_per_rank = gpus_per_rank
        self._threads = threads
        self._keepers = keepers
        self._retired: dict[str, Any] = {}
        """An actor on the node of each keeper, whose rank has ended."""
        self._target = target
        self._preload = list(preload)
        self._wants_store = store
        self._silence_s = silence_s
        self._cluster: RayCluster | None = None
        self._group: Any = None
        self._bundle: dict[str, float] = {}
        self._order: list[int] = []
        self._rank_nodes: list[Node] = []
        self._store: Helper | None = None
        self._token: str | None = None
        self._placement: Placement | None = None
        self._ranks: dict[int, _Rank] = {}
        self._metrics: RunMetrics | None = None
        self._broken = False
        self._ending = False
        self._look_until_s = float("-inf")
        self._looked_at_s = float("-inf")

    def place(self, world_size: int, waiting: Waiting = wait_silently) -> Placement:
        """Reserve a place for every rank; waits while others use it. Raises LaunchError."""
        self._cluster = self._open_cluster(waiting)
        self._cluster.messages_to(self._run_dir / "logs" / RAY_LOG_NAME)
        self._bundle = bundle_of(
            self._launch.cpus_per_rank, self._gpus_per_rank, self._launch.resources_per_rank
        )
        self._reserve(world_size, waiting)
        seats = seats_of(self._rank_nodes, self._launch.failure_domain_label)
        store = self._start_store() if self._wants_store else None
        self._metrics = RunMetrics(self._name)
        device = "cuda:0" if self._gpus_per_rank else "cpu"
        self._placement = Placement(seats=seats, store=store, device=device)
        return self._placement

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Create an actor for every rank."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._token = write_token(self._run_dir)
        rank_class = actor_class()
        versions = installed_versions()
        one_host = len({node.address for node in self._rank_nodes}) == 1
        path = [entry or os.getcwd() for entry in sys.path]
        keepers = self._keepers
        if one_host and len({spec.keeper for spec in specs}) > 1 and keepers.interface is None:
            keepers = replace(keepers, interface=host.loopback_interface())
        for spec in specs:
            node = self._rank_nodes[spec.rank]
            setup = HostSetup(
                cwd=os.getcwd(),
                token=self._token,
                node=node.name,
                address=node.address,
                one_host=one_host,
                versions=versions,
                target=self._target,
                preload=self._preload,
                threads=self._threads,
                keepers=asdict(keepers),
                silence_s=self._silence_s,
            )
            again = f"/attempt-{spec.attempt}" if spec.attempt else ""
            actor = rank_class.options(
                name=f"everstep/{self._name}/rank-{spec.rank}{again}",
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                resources={k: v for k, v in self._bundle.items() if k not in ("CPU", "GPU")},
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=self._order[spec.rank]
                ),
            ).remote(path, asdict(setup), asdict(spec) | {"run_dir": str(self._run_dir)})
            actor.run.remote()
            self._ranks[spec.rank] = _Rank(actor, node, actor.take.remote(0, _TAKE_S), spec.keeper)

    def renew(self, waiting: Waiting = wait_silently) -> Placement:
        """Wait until the old ranks' processes are gone; places on dead nodes are found anew."""
        assert self._placement is not None
        self.kill()
        self._let_go()
        self._free_run_dir(waiting)
        if not all(map(_node_answers, self._rank_nodes)):
            self._give_group_back()
            self._forget_dead_nodes(waiting)
            self._reserve(len(self._rank_nodes), waiting)
        self._ending = False
        self._look_until_s = float("-inf")
        seats = seats_of(self._rank_nodes, self._launch.failure_domain_label)
        self._placement = replace(self._placement, seats=seats)
        return self._placement

    def poll(self, timeout_s: float) -> list[DriverEvent]:
        """Reports and exits since the last call."""
        import ray

        events = self._broken_events() + self._ranks_of_dead_nodes()
        ranks = {rank.pending: number for number, rank in self._ranks.items()}
        if not ranks:
            if not events:
                time.sleep(timeout_s)
            return events
        ready, _ = ray.wait(
            list(ranks), num_returns=1, timeout=0 if events else timeout_s, fetch_local=False
        )
        if ready and len(ranks) > 1:
            ready, _ = ray.wait(list(ranks), num_returns=len(ranks), timeout=0, fetch_local=False)
        for reference in ready:
            events += self._hear(ranks[reference])
        return events

    def end_keepers(self, timeout_s: float) -> list[str]:
        """Ask on each node the actor of a rank that has ended there."""
        import ray

        calls = {
            job: actor.end_keeper.remote(job, timeout_s) for job, actor in self._retired.items()
        }
        problems = []
        for job, call in calls.items():
            try:
                problems += ray.get(call, timeout=timeout_s + KILL_S)
            except ray.exceptions.RayError as error:
                problems.append(f"keeper {job} was not ended ({type(error).__name__})")
        return problems

    def ask_stop(self) -> None:
        """Tell every rank, also those that are not there yet."""
        self._ask("stop")

    def dump_stacks(self) -> None:
        """Stacks of all threads of all ranks go to their logs."""
        self._ask("dump")

    def kill(self) -> None:
        """End all actors; their ranks' processes die with them."""
        self._ending = True
        kill_actors([rank.actor for rank in self._ranks.values()])

    def close(self) -> None:
        """End the actors, wait until their ranks are gone, give everything back, and leave."""
        self.kill()
        self._let_go()
        if self._token is not None:
            remove_token(self._run_dir)
            wait_for_ranks(self._run_dir, _CLOSE_S)
            self._token = None
        if self._store is not None:
            self._store.close(_CLOSE_S)
            self._store = None
        self._remove_empty_logs()
        self._give_group_back()
        if self._cluster is not None:
            self._cluster.leave()
            self._cluster = None

    def _let_go(self) -> None:
        kill_actors(list(self._retired.values()))
        self._ranks, self._retired = {}, {}

    def _reserve(self, world_size: int, waiting: Waiting) -> None:
        from ray.util.placement_group import placement_group, placement_group_table

        assert self._cluster is not None
        placement = self._launch.placement
        if not self._launch.wait_for_nodes:
            why = too_small(self._cluster.nodes(), self._bundle, world_size, placement)
            if why is not None:
                raise LaunchError(why)
        self._group = placement_group(
            [self._bundle] * world_size, strategy=placement.upper(), name=f"everstep/{self._name}"
        )
        began_s = time.monotonic()
        while (table := placement_group_table(self._group))["state"] != "CREATED":
            words = waiting_words(self._bundle, world_size, self._cluster.free())
            waited_s = time.monotonic() - began_s
            if waited_s > self._launch.place_timeout_s:
                raise LaunchError(
                    f"{words}, and it did not get free within launch.place_timeout_s="
                    f"{self._launch.place_timeout_s:g} seconds: wait for others to end, raise that "
                    "time, or use a smaller mesh"
                )
            waiting(words if waited_s > _SHORT_WAIT_S else "looking for a place for all ranks")
            time.sleep(_POLL_S)
        nodes = {node.node_id: node for node in self._cluster.nodes()}
        where = table["bundles_to_node_id"]
        try:
            bundle_nodes = [nodes[where[bundle]] for bundle in range(world_size)]
        except KeyError as error:
            raise LaunchError("a node of the Ray cluster died meanwhile: start again") from error
        self._order = rank_order(bundle_nodes, self._launch.failure_domain_label)
        self._rank_nodes = [bundle_nodes[bundle] for bundle in self._order]

    def _free_run_dir(self, waiting: Waiting) -> None:
        remove_token(self._run_dir)
        began_s = time.monotonic()
        while not wait_for_ranks(self._run_dir, _POLL_S):
            waited_s = time.monotonic() - began_s
            if waited_s > _SHORT_WAIT_S:
                waiting("waiting for the end of the ranks' processes")
            if waited_s > ENDING_S:
                raise LaunchError(
                    f"ranks still hold the run directory {self._run_dir} {ENDING_S:g} seconds "
                    "after they were ended: start this command again when their node is back or "
                    "gone for good"
                )

    def _give_group_back(self) -> None:
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            group, self._group = self._group, None
            within(KILL_S, lambda: remove_placement_group(group))

    def _forget_dead_nodes(self, waiting: Waiting) -> None:
        """Wait until Ray knows which nodes are dead: it would put ranks there again."""
        assert self._cluster is not None
        deadline_s = time.monotonic() + _FORGET_S
        while dead := [node for node in self._cluster.nodes() if not _node_answers(node)]:
            waiting(f"waiting until Ray gives up node {dead[0].name}")
            if time.monotonic() > deadline_s:
                raise LaunchError(
                    f"node {dead[0].name} does not answer, and Ray has not given it up within "
                    f"{_FORGET_S:g} seconds: end that node, or start this command again later"
                )
            time.sleep(_POLL_S)

    def _start_store(self) -> str:
        assert self._cluster is not None
        with rendezvous.listen(self._launch.port, self._cluster.own_address()) as listener:
            address, port = listener.getsockname()[:2]
            log = self._run_dir / "logs" / START_LOG_NAME
            self._store = Helper("the rendezvous store", _STORE_TARGET, log, listener=listener)
        return f"{address}:{port}"

    def _remove_empty_logs(self) -> None:
        for rank in range(len(self._rank_nodes)):
            log = self._run_dir / "logs" / start_log_name(rank)
            with contextlib.suppress(OSError):
                if log.stat().st_size == 0:
                    log.unlink()

    def _broken_events(self) -> list[DriverEvent]:
        if self._broken or self._ending:
            return []
        why = None if self._cluster is None else self._cluster.failure()
        if why is None and self._store is not None:
            why = self._store.failure(self._store.poll())
        if why is None:
            return []
        self._broken = True
        return [Broken(why)]

    def _ranks_of_dead_nodes(self) -> list[DriverEvent]:
        """Soon after an error: it may be that of a lost peer, earlier than Ray notices the loss."""
        now_s = time.monotonic()
        if self._ending or now_s > self._look_until_s or now_s < self._looked_at_s + _LOOK_EVERY_S:
            return []
        self._looked_at_s = now_s
        nodes = {rank.node.node_id: rank.node for rank in self._ranks.values()}
        dead = {node_id for node_id, node in nodes.items() if not _node_answers(node)}
        lost = [n for n, rank in self._ranks.items() if rank.node.node_id in dead]
        return [_lost(n, lost_with_node(self._ranks.pop(n).node)) for n in lost]

    def _hear(self, number: int) -> list[DriverEvent]:
        import ray

        rank = self._ranks[number]
        try:
            messages = ray.get(rank.pending)
        except ray.exceptions.ActorUnavailableError:
            return self._unreachable(number)
        except ray.exceptions.RayError as error:
            return [self._died(number, error)]
        rank.silent_since_s = None
        events: list[DriverEvent] = []
        for text in messages:
            message = json.loads(text)
            if "report" in message:
                report = message["report"]
                if number == 0 and report["kind"] == "step" and self._metrics is not None:
                    self._metrics.show(report)
                elif report["kind"] == "error":
                    self._look_until_s = time.monotonic() + _LOOK_S
                events.append(Reported(number, report))
            elif "broken" in message:
                events.append(Broken(message["broken"]))
            else:
                events.append(RankExit(rank=number, code=message["exit"], time_s=message["time"]))
                del self._ranks[number]
                self._retire(rank)
                return events
        rank.seen += len(messages)
        rank.pending = rank.actor.take.remote(rank.seen, _TAKE_S)
        return events

    def _retire(self, rank: _Rank) -> None:
        """A rank has ended: one actor per keeper stays, to end that."""
        if rank.keeper is None or rank.keeper in self._retired:
            kill_actors([rank.actor])
        else:
            self._retired[rank.keeper] = rank.actor

    def _unreachable(self, number: int) -> list[DriverEvent]:
        """Its node may have died, or only the way to it: ask until that is clear."""
        rank = self._ranks[number]
        if self._ending:
            del self._ranks[number]
            return [_lost(number, None)]
        now_s = time.monotonic()
        since_s = rank.silent_since_s = rank.silent_since_s or now_s
        if _node_answers(rank.node) and now_s - since_s < UNREACHABLE_S:
            rank.pending = rank.actor.take.remote(rank.seen, _TAKE_S)
            return []
        del self._ranks[number]
        kill_actors([rank.actor])
        return [_lost(number, lost_with_node(rank.node))]

    def _died(self, number: int, error: Exception) -> DriverEvent:
        import ray

        rank = self._ranks.pop(number)
        if self._ending:
            return _lost(number, None)
        begun = not getattr(error, "actor_init_failed", False)
        why = why_it_died(
            str(error),
            rank.node,
            node_answers=_node_answers(rank.node),
            begun=begun,
            out_of_memory=isinstance(error, ray.exceptions.OutOfMemoryError),
        )
        return _lost(number, why, incurable=not begun)

    def _ask(self, what: str) -> None:
        for rank in self._ranks.values():
            rank.actor.ask.remote(what)


def _node_answers(node: Node) -> bool:
    return answers(f"{node.address}:{node.port}")


def _lost(rank: int, why: str | None, *, incurable: bool = False) -> RankExit:
    return RankExit(
        rank=rank, code=-signal.SIGKILL, time_s=time.time(), why=why, incurable=incurable
    )
