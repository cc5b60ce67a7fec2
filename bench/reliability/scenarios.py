"""All scenarios by their names in the table."""

from collections.abc import Callable

from bench.reliability import (
    admission,
    beside,
    calls,
    clients,
    cluster,
    endurance,
    images,
    processes,
    protocols,
    surroundings,
    urls,
)
from bench.reliability.running import Verdict

SCENARIOS: dict[str, tuple[int, Callable[..., Verdict]]] = {
    "twice the capacity, open loop": (1, admission.overload),
    "a full queue": (2, admission.full_queue),
    "a deadline in the queue": (3, admission.deadline_in_the_queue),
    "clients that leave": (4, clients.disconnects),
    "clients that reset together": (5, clients.resets),
    "SIGKILL of the worker under load": (6, processes.kills),
    "SIGSTOP of the worker": (7, processes.stopped_worker),
    "an engine that fails on one image": (8, processes.faults),
    "SIGTERM under load, and a second": (9, processes.sigterm),
    "slow heads and bodies": (10, clients.slow_clients),
    "oversized bodies": (11, clients.oversized),
    "bombs, mutants, odd images": (12, images.broken_images),
    "image_url tricks": (13, urls.url_tricks),
    "starts that can't succeed": (14, processes.bad_starts),
    "schemathesis": (15, endurance.fuzzing),
    "mixed load for an hour": (16, endurance.soak),
    "Content-Types and forms that take long to read": (17, beside.content_types),
    "JSON that takes long to read": (18, beside.large_json),
    "answers that nobody reads": (19, beside.unread_answers),
    "images that take long to decode": (20, beside.expensive_images),
    "idle connections": (21, surroundings.idle_connections),
    "a second instance in another container": (22, surroundings.second_instance),
    "a worker that somebody kills": (23, surroundings.killed_while_asked),
    "two servers on one port": (24, surroundings.same_port),
    "a log that nobody reads": (25, surroundings.unread_log),
    "shared memory that is full": (26, surroundings.full_memory),
    "settings without room for them": (27, surroundings.wild_settings),
    "ambiguous images among others": (28, surroundings.neighbours),
    "signals, heads, decoders": (29, surroundings.small_ones),
    "all attacks for two hours": (30, beside.siege),
    "a worker killed under streams and gRPC": (31, protocols.killed_under_streams),
    "replicas and nodes of a cluster that die": (32, cluster.dying_cluster),
    "gRPC calls that are held, wrong or left": (33, calls.held_calls),
}
