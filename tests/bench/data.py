"""`data`: how fast text becomes tokens, against bare `tokenizers` and against how others do it, in one run.

`python -m tests.bench.data [--source FOLDER] [--megabytes N] [--workers N]` prints a table; `make bench` takes the
defaults. The text is written once, as four jsonl files. Times are of the wall clock, tasks in turn, since whole
machines are compared; what else runs on them is in the figures, so CPU time against bare encoding is given too.

- bare: the best of `encode_batch_fast` in one process with its own threads, and of N processes that each hold their
  share of the texts already; nothing is read, sent, filtered, hashed or written.
- prepare: all of `trainer.data.prepare` but the training of the tokenizer: start of the workers, reading, exact
  duplicates, tokens, shards, hashes.
- megatron style: the scheme of Megatron-LM's tools/preprocess_data.py: lines through `Pool.imap` in chunks of 32, one
  `encode` each, the parent adds documents to an IndexedDatasetBuilder. Nothing is filtered or hashed. The start of the
  pool is not counted.
- datatrove: its JsonlReader and DocumentTokenizer under a LocalPipelineExecutor, a file a task; of `make bench-peers`.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import site
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

if TYPE_CHECKING:  # workers import this module again: nothing heavy at the top
    from tests.bench.report import Report

NUM_FILES = 4
VOCABULARY = 16384
ROUNDS = 2


class Spent(NamedTuple):
    """Seconds of one task."""

    wall: float
    cpu: float


class Text(NamedTuple):
    """What all tasks work on."""

    folder: Path
    tokenizer: Path
    megabytes: float
    workers: int

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "text").glob("*.jsonl"))


def write_text(folder: Path, source: str, megabytes: float, workers: int) -> Text:
    """The source's documents, again and again with a number before them, until there is enough; and a tokenizer."""
    from trainer.data.config import DataConfig
    from trainer.data.sources import read_documents, streams_of
    from trainer.data.tokenizer import sample_for_training, train_bpe

    config = DataConfig(source=source, tokenizer_sample_mb=2.0)
    tokenizer = train_bpe(sample_for_training(config, streams_of(config)), VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [document.text for document in read_documents(config)]
    (folder / "text").mkdir()
    size = 0
    files = [(folder / "text" / f"{number}.jsonl").open("w") for number in range(NUM_FILES)]
    for number in itertools.count():
        text = f"{number}\n{texts[number % len(texts)]}"
        size += len(text.encode())
        files[number % NUM_FILES].write(json.dumps({"text": text, "domain": "all"}) + "\n")
        if size >= megabytes * 1e6:
            break
    for file in files:
        file.close()
    return Text(folder, folder / "tokenizer.json", size / 1e6, workers)


def _texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


@contextmanager
def _stopwatch(spent: list[Spent]) -> Iterator[None]:
    """Add what the block took; of child processes, those that end in it count."""
    begin, cpu = time.perf_counter(), _cpu_s()
    yield
    spent.append(Spent(time.perf_counter() - begin, _cpu_s() - cpu))


def _cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare_threads(text: Text, spent: list[Spent]) -> None:
    """encode_batch_fast in this process, with its own threads."""
    texts = [each for path in text.files for each in _texts(path)]
    tokenizer = Tokenizer.from_file(str(text.tokenizer))
    with _stopwatch(spent):
        _encode(tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), 256):
        tokenizer.encode_batch_fast(texts[start : start + 256])


def bare_processes(text: Text, spent: list[Spent]) -> None:
    """From a common start until the last of N processes has encoded its share."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(text.workers + 1), context.SimpleQueue()
    processes = [
        context.Process(target=_bare_process, args=(text, number, barrier, times)) for number in range(text.workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begin = time.perf_counter()
    cpu = sum(times.get() for _ in processes)
    spent.append(Spent(time.perf_counter() - begin, cpu))
    for process in processes:
        process.join()


def _bare_process(text: Text, number: int, barrier: Any, times: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(text.tokenizer))
    everything = itertools.chain.from_iterable(_texts(path) for path in text.files)
    texts = list(itertools.islice(everything, number, None, text.workers))
    barrier.wait()
    begin = time.process_time()
    _encode(tokenizer, texts)
    times.put(time.process_time() - begin)


def prepare_all(text: Text, spent: list[Spent]) -> None:
    """A whole preparation."""
    from trainer.data.config import DataConfig
    from trainer.data.prepare import prepare

    path = text.folder / "prepared"
    config = DataConfig(path=str(path), source=str(text.folder / "text"), tokenizer=str(text.tokenizer))
    with _stopwatch(spent):
        prepare(config, workers=text.workers)
    shutil.rmtree(path)


_megatron_tokenizer: Tokenizer | None = None


def _megatron_start(path: str) -> None:
    global _megatron_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _megatron_tokenizer = Tokenizer.from_file(path)


def _megatron_encode(line: str) -> list[int]:
    assert _megatron_tokenizer is not None
    return [*_megatron_tokenizer.encode(json.loads(line)["text"]).ids, 0]


def megatron_style(text: Text, spent: list[Spent]) -> None:
    """The peer's way, its pool already started."""
    import torch

    from trainer.data import indexed  # noqa: F401  (quiets megatron's import)

    builder_module = importlib.import_module("megatron.core.datasets.indexed_dataset")
    context = multiprocessing.get_context("spawn")
    with context.Pool(text.workers, _megatron_start, (str(text.tokenizer),)) as pool:
        pool.map(_megatron_encode, ['{"text": "start"}'] * text.workers * 8, chunksize=1)
        with _stopwatch(spent):
            dtype = builder_module.DType.optimal_dtype(VOCABULARY)
            builder = builder_module.IndexedDatasetBuilder(str(text.folder / "peer.bin"), dtype=dtype)
            for path in text.files:
                with path.open() as lines:
                    for ids in pool.imap(_megatron_encode, lines, 32):
                        builder.add_document(torch.IntTensor(ids), [len(ids)])
            builder.finalize(str(text.folder / "peer.idx"))


def datatrove(text: Text, spent: list[Spent]) -> None:
    """Its pipeline, with the start of its processes as with ours. Raises ImportError if it is not installed."""
    for folder in Path(".venv-bench").glob("lib/python*/site-packages"):
        site.addsitedir(str(folder))  # behind our own packages, which stay the versions they are
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = text.folder / "datatrove"
    tokenizer = DocumentTokenizer(
        str(out / "tokens"), str(text.tokenizer), eos_token="<|endoftext|>", shuffle_documents=False
    )
    pipeline = [JsonlReader(str(text.folder / "text")), tokenizer]
    executor = LocalPipelineExecutor(pipeline, NUM_FILES, text.workers, str(out / "logs"), start_method="spawn")
    with _stopwatch(spent), _no_stderr():
        executor.run()
    shutil.rmtree(out)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Without the log that the pipeline's processes write."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


TASKS: dict[str, Callable[[Text, list[Spent]], None]] = {
    "prepare": prepare_all,
    "bare, threads": bare_threads,
    "bare, processes": bare_processes,
    "megatron style": megatron_style,
    "datatrove": datatrove,
}


def measure(report: "Report", *, source: str = "local_python", megabytes: float = 48, workers: int = 0) -> None:
    """Prepare against bare encoding and the peers."""
    from trainer.data.pool import usable_cores

    spent: dict[str, list[Spent]] = {name: [] for name in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder), source, megabytes, workers or usable_cores())
        for _ in range(ROUNDS):
            for name in list(spent):
                try:
                    TASKS[name](text, spent[name])
                except Exception as error:  # a peer that is not installed, or does not work
                    if name != "datatrove":
                        raise
                    report.not_run("data/prepare_over_datatrove", error)
                    del spent[name]
    walls = {name: [each.wall for each in times] for name, times in spent.items()}
    bare = min(("bare, threads", "bare, processes"), key=lambda name: statistics.median(walls[name]))
    compared = {"bare_tokenizers": bare, "megatron_style": "megatron style", "datatrove": "datatrove"}
    for key, name in compared.items():
        if name in walls:
            ratio = _ratio(walls[name], walls["prepare"])
            speeds = [
                f"{each}: {text.megabytes / statistics.median(walls[each]):.1f} MB/s" for each in ("prepare", name)
            ]
            report.add(f"data/prepare_over_{key}", *ratio, note=", ".join(speeds))
    cpu = {name: [each.cpu for each in spent[name]] for name in ("prepare", bare)}
    note = f"of {text.megabytes:.0f} MB by {text.workers} workers; {bare}"
    report.add("data/prepare_over_bare_cpu", *_ratio(cpu[bare], cpu["prepare"]), note=note)


def _ratio(others: list[float], ours: list[float]) -> tuple[float, float]:
    """Our speed over theirs: of medians, and of the best of each."""
    return statistics.median(others) / statistics.median(ours), min(others) / min(ours)


def stream_rows() -> list[tuple[str, str]]:
    """Figures of the stream that the loader deals out, if its bench is there."""
    if importlib.util.find_spec("tests.bench.data_stream") is None:
        return []
    return list(importlib.import_module("tests.bench.data_stream").rows())


def main(argv: list[str]) -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    from tests.bench.report import Report

    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source", default="local_python", help="as data.source (default: local_python)")
    parser.add_argument("--megabytes", type=float, default=48, help="text to work on (default: 48)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a usable core)")
    arguments = parser.parse_args(argv)
    report = Report()
    measure(report, source=arguments.source, megabytes=arguments.megabytes, workers=arguments.workers)
    console = Console(width=None if sys.stdout.isatty() else 120)
    report.print(console)
    if rows := stream_rows():
        table = Table("the stream", "")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
