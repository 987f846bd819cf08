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
from tests.faults.nodes import JOIN_TIMEOUT_S, Agent, Node, NoNamespaces, two_nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    try:
        with two_nodes() as made:
            yield made
    except NoNamespaces as error:
        pytest.skip(f"needs the right to make network namespaces (root): {error}")


@pytest.mark.fault(33, "a node's agent killed and brought back")
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
    assert checkpoints(run_dir)[-1] in (4, 6), "the newest that was published: 6 may still have been in writing"
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


@pytest.mark.slow
@pytest.mark.fault(33, "the node of the rendezvous killed")
def test_without_the_first_node_the_others_end_with_5(
    nodes: list[Node], two_ranks: Reference, record_property: Record
) -> None:
    first, second = nodes
    run_dir = two_ranks.config.parent / "first node lost"
    struck = Agent(first, two_ranks.config, run_dir, nodes=nodes, fault="sleep=5@0:7:forward")
    survivor = Agent(second, two_ranks.config, run_dir, nodes=nodes)
    struck.when("fault:")
    before = time.monotonic()
    struck.send(signal.SIGKILL)
    assert struck.end() == -signal.SIGKILL
    assert survivor.end() == 5, survivor.log[-3000:]
    record_property("detected_in", time.monotonic() - before)
    record_property("steps_lost", lost_steps(run_dir))
    assert any(line.startswith("error: rendezvous at 10.213.7.1") for line in survivor.errors), survivor.log[-3000:]
    again = [Agent(node, two_ranks.config, run_dir, nodes=nodes) for node in nodes]
    assert [job.end() for job in again] == [0, 0], again[0].log[-3000:]
    assert_same_run(run_dir, two_ranks.run_dir)


@pytest.mark.slow
@pytest.mark.fault(33, "one node asked to stop")
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("to", ["launcher", "ranks"])
def test_sigterm_to_one_node_saves_on_all(asked: int, to: str, nodes: list[Node], two_ranks: Reference) -> None:
    run_dir = two_ranks.config.parent / f"node {asked} stops, told by {to}"
    agents = [
        Agent(node, two_ranks.config, run_dir, nodes=nodes, max_restarts=3, fault="sleep=2@0:7:forward")
        for node in nodes
    ]
    agents[0].when("fault:")
    before = time.monotonic()
    agents[asked].send(signal.SIGTERM if to == "ranks" else signal.SIGUSR1, to=to)
    assert [agent.end() for agent in agents] == [75, 75], agents[1 - asked].log[-3000:]
    assert time.monotonic() - before < JOIN_TIMEOUT_S / 2, "nobody waited for a node to come back"
    assert not any("resumed" in agent.log for agent in agents)
    assert lost_steps(run_dir) == 0
    assert checkpoints(run_dir)[-1] in (7, 8)


@pytest.mark.slow
@pytest.mark.fault(33, "one node started with a mistake")
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_on_one_node_ends_all_with_2(wrong: int, nodes: list[Node], two_ranks: Reference) -> None:
    run_dir = two_ranks.config.parent / f"node {wrong} has it wrong"
    patient = "engine.collective_timeout_s=300"  # as long would the others wait for the ranks of this node
    agents = [
        Agent(node, two_ranks.config, run_dir, patient, *(["train.stepz=3"] if number == wrong else []), nodes=nodes)
        for number, node in enumerate(nodes)
    ]
    before = time.monotonic()
    assert [agent.end() for agent in agents] == [2, 2], agents[1 - wrong].log[-3000:]
    assert time.monotonic() - before < JOIN_TIMEOUT_S / 2
    assert sum("train.stepz" in line for agent in agents for line in agent.errors) == 1, "once, and nothing restarted"


@pytest.mark.slow
@pytest.mark.fault(33, "a node that never comes back")
def test_the_others_do_not_wait_forever(nodes: list[Node], two_ranks: Reference, record_property: Record) -> None:
    first, second = nodes
    run_dir = two_ranks.config.parent / "alone"
    survivor = Agent(first, two_ranks.config, run_dir, nodes=nodes, join_timeout=30)
    struck = Agent(
        second, two_ranks.config, run_dir, nodes=nodes, join_timeout=20, fault="kill@1:7:forward,sleep=9@1:7:loss"
    )
    struck.when("fault:")
    before = time.monotonic()
    struck.send(signal.SIGKILL)
    assert survivor.end() == 5, survivor.log[-3000:]
    record_property("detected_in", time.monotonic() - before)
    assert any(line.startswith("error: rendezvous at 10.213.7.1") for line in survivor.errors), survivor.log[-3000:]
    assert checkpoints(run_dir)[-1] in (4, 6), "the newest that was published: 6 may still have been in writing"
