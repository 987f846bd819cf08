"""A rank ends with the exit code it means to end with, whatever threads of torch are doing."""

from tests.harness import run


def test_a_rank_that_leaves_is_not_aborted_by_a_thread_of_gloo() -> None:
    """Seen in a health check whose last collective ended just before the process: all was done, and SIGABRT came."""
    done = run("tests.dist.leaving", ranks=2)
    assert "exitcode: 7) local_rank: 0" in done.stderr
    assert "printed and handled" in done.stdout
    assert "terminate called" not in done.stderr
