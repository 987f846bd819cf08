"""A run on two nodes is the run on one; and a node that dies and comes back is one more restart."""

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.faultkit import (
    Record,
    Reference,
    assert_begins_like,
    checkpoints,
    lost_steps,
    on_record,
    processes_of,
)
from tests.faults.nodes import Agent, Node, NoNamespaces, two_nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    try:
        with two_nodes() as made:
            yield made
    except NoNamespaces as error:
        pytest.skip(f"needs the right to make network namespaces (root): {error}")


@pytest.mark.fault(31, "a node's agent killed and brought back")
def test_a_node_that_comes_back_resumes_the_run(
    nodes: list[Node], two_ranks: Reference, record_property: Record
) -> None:
    first, second = nodes
    run_dir = two_ranks.config.parent / "two nodes"
    survivor = Agent(first, two_ranks.config, run_dir, nodes=nodes)
    struck = Agent(second, two_ranks.config, run_dir, nodes=nodes, fault="sleep=5@1:7:forward")
    struck.when("fault:")
    before = time.monotonic()
    struck.send(signal.SIGKILL)
    assert struck.end() == -signal.SIGKILL, "and its rank with it: nothing is left on this node"
    noticed = survivor.when("error (rank 0)", 30)
    record_property("detected_in", noticed - before)
    assert checkpoints(run_dir)[-1] == 6
    record_property("steps_lost", lost_steps(run_dir))
    assert_begins_like(on_record(run_dir), two_ranks.run_dir)

    returned = Agent(second, two_ranks.config, run_dir, nodes=nodes)
    assert survivor.end() == 0, survivor.log[-3000:]
    assert returned.end() == 0, returned.log[-3000:]
    assert_same_run(run_dir, two_ranks.run_dir)
    starts = [json.loads(line) for line in (run_dir / "health.jsonl").read_text().splitlines()]
    assert [start["hosts"] for start in starts] == [["node-a", "node-b"]] * 2
    assert starts[0]["ranks"] == 2
    assert not processes_of(run_dir)
