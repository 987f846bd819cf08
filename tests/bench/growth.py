"""How the cost of a step grows: `python -m tests.bench.growth [CURVE ...]`, some minutes; `make bench` leaves it out.

Forward and backward of a small model along one axis at a time: experts at the same active parameters, experts a token
uses, sequence length (tokens alike, and one row), layers, vocabulary, micro-batches, documents in a row, and ranks
(whole steps of the training loop with work in proportion: CPU seconds of the busiest rank). Times are the least CPU
time of a few rounds, points in turn. A line is fitted through the logarithms: its slope is the exponent. Beside it is
the exponent that the same fit gives for what theory says of the same points: FLOPs over this machine's rate of products
plus bytes of parameters over its rate of copies, both measured first. A curve whose exponent is more than 0.15 above
theory, over all points or over the last three, is marked as a defect. tests.bench.figures draws what this writes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from moe.arithmetic import count_parameters, flops_per_token
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.bench.growth_fit import Curve, write_curves
from tests.bench.report import hardware, versions
from tests.bench.reweighting import small_corpus, stepper, timed_config
from tests.bench.timing import interleaved, keep_freed_memory
from tests.harness import run
from trainer import ranks
from trainer.process_group import start_process_group, stop_process_group

ROUNDS = 3
BASE = ModelConfig(
    hidden_size=256, num_layers=2, num_dense_layers=0, num_heads=4, num_kv_heads=2, num_experts=16, top_k=2,
    expert_intermediate_size=128, num_shared_experts=0, uniform_routing=True,
)  # fmt: skip


class Point(NamedTuple):
    """One size of a step."""

    model: ModelConfig = BASE
    vocab: int = 1024
    batch: int = 4
    length: int = 512
    micro_batches: int = 1
    documents: int = 1


CURVES: dict[str, dict[int, Point]] = {
    "experts": {e: Point(replace(BASE, num_experts=e)) for e in (8, 16, 32, 64, 128, 256)},
    "top_k": {k: Point(replace(BASE, num_experts=64, top_k=k)) for k in (1, 2, 4, 8, 16)},
    "sequence, tokens alike": {t: Point(batch=8192 // t, length=t) for t in (512, 1024, 2048, 4096, 8192)},
    "sequence, one row": {t: Point(batch=1, length=t) for t in (512, 1024, 2048, 4096, 8192)},
    "layers": {n: Point(replace(BASE, num_layers=n)) for n in (1, 2, 4, 8)},
    "vocabulary": {v: Point(vocab=v, batch=1) for v in (4096, 8192, 16384, 32768, 65536, 131072)},
    "micro-batches": {m: Point(batch=2, micro_batches=m) for m in (1, 2, 4, 8)},
    "documents": {d: Point(replace(BASE, document_mask=True), documents=d) for d in (1, 4, 16, 64)},
}
RANKS = (1, 2, 4)
SPENT = "CPU seconds a step: "


class Machine(NamedTuple):
    """What one core does a second."""

    flops: float
    bytes: float


def machine() -> Machine:
    """Rates of a large product and of a copy."""
    left, right, large = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(2**24)
    there = torch.empty_like(large)
    times = interleaved({"product": lambda: left @ right, "copy": lambda: there.copy_(large)}, rounds=5)
    return Machine(2 * 1024**3 / times["product"].minimum, 8 * 2**24 / times["copy"].minimum)


def step_of(point: Point) -> Callable[[], None]:
    """Forward and backward of all micro-batches of a point."""
    torch.manual_seed(0)
    model = MoEDecoder(point.model, vocab_size=point.vocab)
    tokens = torch.randint(0, point.vocab, (point.batch, point.length + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    documents = torch.arange(point.length).mul(point.documents).div(point.length, rounding_mode="floor")
    documents = documents.expand(point.batch, -1)

    def step() -> None:
        for _ in range(point.micro_batches):
            model(inputs, labels, documents).mean().backward()
        model.zero_grad()
        model.take_loads("train")

    return step


def theory(point: Point, rates: Machine) -> float:
    """Seconds by FLOPs and by parameters: read forward and backward, their gradients written and added."""
    tokens = point.batch * point.length * point.micro_batches
    flops = flops_per_token(point.model, point.vocab, point.length) * tokens
    moved = 4 * 4 * count_parameters(point.model, point.vocab).num_total * point.micro_batches
    return flops / rates.flops + moved / rates.bytes


def measure(name: str, rates: Machine) -> Curve:
    """One curve that a process can measure by itself."""
    points = CURVES[name]
    times = interleaved({str(size): step_of(point) for size, point in points.items()}, rounds=ROUNDS)
    seconds = [times[str(size)].minimum for size in points]
    return Curve(list(points), seconds, [theory(point, rates) for point in points.values()])


def measure_ranks() -> Curve:
    """CPU seconds of a step on the busiest rank; the work of a rank is the same for all numbers of them."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        config = timed_config(Path(folder), small_corpus(Path(folder)))
        for number in RANKS:
            done = run("tests.bench.growth", "--rank-of", str(config), ranks=number)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            said = [line.removeprefix(SPENT) for line in done.stdout.splitlines() if line.startswith(SPENT)]
            seconds.append(max(map(float, said)))
    return Curve(list(RANKS), seconds, [seconds[0]] * len(RANKS))


def one_rank(config: Path) -> None:
    """The child of `measure_ranks`: prints the median CPU time of its steps."""
    start_process_group(60)
    size = ranks.world_size()
    step = stepper(config, "deferred", [f"train.global_batch_size={16 * size}"])
    spent = []
    for _ in range(8):
        begin = time.process_time()
        step()
        spent.append(time.process_time() - begin)
    sys.stdout.write(f"{SPENT}{statistics.median(spent[2:]):.6f}\n")
    sys.stdout.flush()
    stop_process_group()


def table(curves: Mapping[str, Curve]) -> Table:
    """Exponents beside those of theory; curves that rise faster are marked."""
    shown = Table("axis", "from", "to", "exponent", "theory", "last points", "theory", "", box=None)
    for name, curve in curves.items():
        exponents = (f"{value:.2f}" for value in (*curve.exponents, *curve.last_exponents))
        mark = "DEFECT: above theory" if curve.is_steep else ""
        shown.add_row(name, str(curve.size[0]), str(curve.size[-1]), *exponents, mark)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"some of: {', '.join([*CURVES, 'ranks'])}")
    parser.add_argument("--out", type=Path, default=Path("runs/growth.json"), help="default: %(default)s")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank_of:
        one_rank(arguments.rank_of)
        return
    unknown = [name for name in arguments.curves if name not in (*CURVES, "ranks")]
    if unknown:
        parser.error(f"no curve '{unknown[0]}'; there are {', '.join([*CURVES, 'ranks'])}")
    keep_freed_memory()
    rates, found = machine(), dict[str, Curve]()
    for name in arguments.curves or [*CURVES, "ranks"]:
        begin = time.monotonic()
        found[name] = measure_ranks() if name == "ranks" else measure(name, rates)
        sys.stderr.write(f"{name} done in {time.monotonic() - begin:.0f} s\n")
    Console().print(table(found))
    facts = {"hardware": hardware(), "versions": versions(), "rounds": ROUNDS, "rates": rates._asdict()}
    write_curves(arguments.out, facts, found)


if __name__ == "__main__":
    main()
