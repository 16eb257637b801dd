"""Several processes as one run: join, agree on what to run, decide together, and end together.

`join` holds a roll call on the coordinator's port (roll.py), then starts `jax.distributed` there. The connections of
the roll call stay open (link.py). Over them the processes compare what they run (`agree`), share decisions
(`from_first`, `from_all`, `barrier`), stop at the same step when one is preempted (`preemption_requested`), and report
a failed or lost process. JAX alone would leave the others in a collective until a heartbeat is missed, and then abort
them with a stack trace.

Without `join`, every function acts for a single process.
"""

from sbs_jax.hosts.api import (
    agree,
    barrier,
    check_alone,
    clear_preemption,
    collect_activities,
    describe,
    detect,
    fail,
    from_all,
    from_first,
    has_peers,
    is_first,
    join,
    leave,
    numbered,
    preemption_requested,
    request_preemption,
    set_stall_handlers,
    source_digests,
)
from sbs_jax.hosts.roll import HostsError, Place

__all__ = [
    "HostsError",
    "Place",
    "agree",
    "barrier",
    "check_alone",
    "clear_preemption",
    "collect_activities",
    "describe",
    "detect",
    "fail",
    "from_all",
    "from_first",
    "has_peers",
    "is_first",
    "join",
    "leave",
    "numbered",
    "preemption_requested",
    "request_preemption",
    "set_stall_handlers",
    "source_digests",
]
