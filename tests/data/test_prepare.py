"""A whole preparation: the same corpus whatever happens on the way, and nothing lost when it cannot go on."""

import dataclasses
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import prepare as command_module
from launch._cli import run_command
from tests.harness import command, environment
from trainer.data.config import DataConfig
from trainer.data.manifest import read_manifest
from trainer.data.mixture import DomainConfig, FilterConfig
from trainer.data.prepare import Status, is_heldout, prepare
from trainer.errors import CheckpointError, ConfigError, EvenkeelError, StorageError

# A process that only prepares: what workers and a killed parent do, without the seconds that a command's imports take.
PREPARER = """
import json, resource, sys
from trainer.data.config import DataConfig
from trainer.data.mixture import DomainConfig
from trainer.data.prepare import prepare
if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    domains = {name: DomainConfig(source=source) for name, source in arguments["domains"].items()}
    prepare(DataConfig(**arguments["data"], domains=domains), workers=arguments["workers"])
    assert "torch" not in sys.modules and "datasets" not in sys.modules
    print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
WORDS = ["quick", "brown", "fox", "jumps", "lazy", "dogs", "seven", "wizards", "judge", "vow", "black", "quartz"]


SHORT = 2264  # characters; some texts of 300 words have fewer, some more


def text_of(number: int, length: int = 300) -> str:
    draw = random.Random(number)
    return " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(length))


def write_jsonl(path: Path, numbers: range, length: int = 300) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text_of(n, length)}) + "\n" for n in numbers))
    return path


def preparer(config: DataConfig, workers: int, **options: object) -> "subprocess.Popen[str]":
    fields = ("path", "source", "vocab_size", "tokenizer_sample_mb")
    domains = {name: entry.source for name, entry in config.domains.items()}
    arguments = {"data": {name: getattr(config, name) for name in fields}, "domains": domains, "workers": workers}
    return subprocess.Popen(
        [sys.executable, "-c", PREPARER, json.dumps(arguments)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


def contents(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def many_parts(tmp_path: Path) -> DataConfig:
    """About a dozen parts in three streams, with copies across them."""
    names = [f"d{number}" for number in range(3)]
    sources = [
        write_jsonl(tmp_path / "source" / f"{name}.jsonl", range(number * 280, number * 280 + 300), 430)
        for number, name in enumerate(names)
    ]
    domains = {name: DomainConfig(source=str(source)) for name, source in zip(names, sources, strict=True)}
    return DataConfig(path=str(tmp_path / "out"), domains=domains, vocab_size=300, tokenizer_sample_mb=0.2)


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    """Three domains in three formats, with copies, near-copies and bad documents between them."""
    first = [text_of(n) for n in range(300)]
    second = [*first[:20], *(text_of(n) for n in range(300, 600))]
    third = [text.replace("quartz", "granite", 1) for text in first[20:40]] + [text_of(n) for n in range(600, 800)]
    pq.write_table(pa.table({"body": first, "n": range(300)}), tmp_path / "first.parquet", row_group_size=50)
    (tmp_path / "second").mkdir()
    for name, part in (("a", second[:100]), ("b", second[100:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part) + '{"text": 7}\n{"te\n'
        with pa.output_stream(tmp_path / "second" / f"{name}.jsonl.zst", compression="zstd") as file:
            file.write(lines.encode())
    with (
        pa.OSFile(str(tmp_path / "third.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"text": "string"})) as w,
    ):
        w.write_table(pa.table({"text": third}))
    return DataConfig(
        path=str(tmp_path / "out"),
        vocab_size=300,
        domains={
            "first": DomainConfig(source=str(tmp_path / "first.parquet"), text_field="body", weight=1.0),
            "second": DomainConfig(source=str(tmp_path / "second"), weight=2.0, min_characters=SHORT),
            "third": DomainConfig(source=str(tmp_path / "third.arrow"), weight=0.5, max_epochs=2),
        },
        filters=FilterConfig(near_duplicates=0.8),
        on_bad_document="skip",
    )


def test_a_mixture_is_the_same_for_any_number_of_workers(mixture: DataConfig, tmp_path: Path) -> None:
    alone, _ = prepare(mixture, workers=1)
    several = dataclasses.replace(mixture, path=str(tmp_path / "several"))
    manifest, _ = prepare(several, workers=2)
    assert contents(mixture.path) == contents(several.path)

    assert manifest == alone == read_manifest(tmp_path / "several")
    dropped = manifest["dropped"]
    assert set(manifest["domains"]) == {"first", "second", "third"}
    assert "first" not in dropped, "what came first stays"
    assert dropped["second"]["bad_document"] == 4
    assert len(manifest["bad_documents"]) == 4
    assert "a.jsonl.zst: row 101: field 'text' holds int" in manifest["bad_documents"][0]
    short = [n for n in range(300, 600) if len(text_of(n)) < SHORT]
    short_copies = [n for n in range(20) if len(text_of(n)) < SHORT]
    assert short
    assert dropped["second"]["min_characters"] == len(short) + len(short_copies)
    assert dropped["second"]["duplicate"] == 20 - len(short_copies)
    changed = [n for n in range(20, 40) if "quartz" in text_of(n)]
    assert dropped["third"] == {"near_duplicate": len(changed), "duplicate": 20 - len(changed)} or (
        len(changed) == 20 and dropped["third"] == {"near_duplicate": 20}
    )
    for name, total in (("first", 300), ("third", 200)):
        counts = manifest["domains"][name]
        assert counts["train"]["documents"] + counts["heldout"]["documents"] == total
    heldout = sum(is_heldout(text_of(n), mixture.heldout_fraction) for n in range(300))
    assert manifest["domains"]["first"]["heldout"]["documents"] == heldout


def test_weights_and_caps_may_change_and_sources_may_not(mixture: DataConfig) -> None:
    prepare(mixture)
    third = mixture.domains["third"]
    again = mixture.domains | {"third": dataclasses.replace(third, weight=9.0, max_epochs=7)}
    assert prepare(dataclasses.replace(mixture, domains=again)) == (read_manifest(Path(mixture.path)), False)
    other = mixture.domains | {"third": dataclasses.replace(third, min_characters=3)}
    with pytest.raises(ConfigError, match="prepared with other settings"):
        prepare(dataclasses.replace(mixture, domains=other))


def killed_once(config: DataConfig, workers: int, when: Callable[[Path], bool]) -> bool:
    """Start a preparation and kill -9 it as soon as `when` says so of its folder; False if it ended before."""
    process = preparer(config, workers)
    staging = Path(config.path).with_name(f".{Path(config.path).name}.tmp")
    while process.poll() is None and not when(staging):
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers leave with their parent"
    return process.returncode == -signal.SIGKILL


def journal_lines(staging: Path) -> int:
    try:
        return (staging / "parts" / "journal.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def after_lines(number: int) -> Callable[[Path], bool]:
    return lambda staging: journal_lines(staging) > number


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_anywhere_and_the_outcome_is_the_same(many_parts: DataConfig, workers: int, tmp_path: Path) -> None:
    whole = dataclasses.replace(many_parts, path=str(tmp_path / "whole"))
    prepare(whole)
    draw = random.Random(workers)
    moments: list[Callable[[Path], bool]] = [
        lambda staging: staging.exists(),
        *(after_lines(draw.randrange(2, 10)) for _ in range(3)),
        lambda staging: any(staging.glob("corpus/*.bin")),
    ]  # fmt: skip
    killed = [killed_once(many_parts, workers, moment) for moment in moments]
    assert sum(killed) >= 3
    assert not Path(many_parts.path).exists() or not killed[-1]
    seen: list[Status] = []
    prepare(many_parts, workers=workers, progress=seen.append)
    assert contents(many_parts.path) == contents(whole.path)
    if killed[-1]:
        assert any(status.stage.startswith("verifying") for status in seen)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "out", "whole", ".out.lock", ".whole.lock"}


def stopped_at(config: DataConfig, stage: str, action: Callable[[], object], workers: int = 1) -> None:
    """Prepare, and do something when a stage begins to show progress."""
    done = []

    def progress(status: Status) -> None:
        if not done and status.stage == stage and (status.done or stage != "tokenizing"):
            done.append(action())

    prepare(config, workers=workers, progress=progress)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_finished_parts_are_kept_unless_they_or_their_text_changed(many_parts: DataConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(many_parts, path=str(tmp_path / "whole"))
    prepare(whole)
    with pytest.raises(KeyboardInterrupt):
        stopped_at(many_parts, "looking for copies", interrupt)
    parts = tmp_path / ".out.tmp" / "parts"
    times = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert len(times) > 8
    damaged, missing = sorted(times)[1], sorted(times)[4]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    missing.unlink()
    redone: set[str] = set()

    def look() -> None:
        redone.update(path.name for path, before in times.items() if path.stat().st_mtime_ns != before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_at(many_parts, "looking for copies", look)
    assert redone == {damaged.name, missing.name}

    first = tmp_path / "source" / "d0.jsonl"
    original = first.read_bytes()
    first.write_bytes(original.replace(b"quick", b"quack", 1))
    changed = dataclasses.replace(many_parts, path=str(tmp_path / "changed"))
    prepare(changed)
    prepare(many_parts)
    assert contents(many_parts.path) == contents(changed.path) != contents(whole.path)


def test_another_tokenizer_or_setting_uses_no_old_part(many_parts: DataConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(many_parts, vocab_size=280)
    fresh = dataclasses.replace(other, path=str(tmp_path / "fresh"))
    prepare(fresh)
    with pytest.raises(KeyboardInterrupt):
        stopped_at(many_parts, "writing shards", interrupt)
    prepare(other)
    assert contents(other.path) == contents(fresh.path)


TROUBLES: dict[str, tuple[Callable[[Path], object], str, type[EvenkeelError], str]] = {
    "a file grows": (
        lambda folder: (folder / "source" / "d2.jsonl").open("a").write('{"text": "more"}\n'),
        "tokenizing", CheckpointError, "d2.jsonl changed since the preparation began",
    ),
    "a file vanishes": (
        lambda folder: (folder / "source" / "d2.jsonl").unlink(), "tokenizing", CheckpointError, "d2.jsonl is gone",
    ),
    "the source vanishes": (
        lambda folder: shutil.rmtree(folder / "source"), "training the tokenizer", CheckpointError, "jsonl is gone",
    ),
    "the output vanishes": (
        lambda folder: shutil.rmtree(folder / ".out.tmp"), "tokenizing", StorageError, "No such file or directory",
    ),
    "the output vanishes late": (
        lambda folder: shutil.rmtree(folder / ".out.tmp"), "writing shards", StorageError, "No such file or directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_what_changes_under_a_preparation_ends_it_in_one_line(
    name: str, many_parts: DataConfig, tmp_path: Path, data_config: DataConfig
) -> None:
    action, stage, kind, message = TROUBLES[name]
    before = contents(data_config.path)
    with pytest.raises(kind, match=message) as caught:
        stopped_at(many_parts, stage, lambda: action(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert not Path(many_parts.path).exists()
    assert contents(data_config.path) == before


def config_file(config: DataConfig, **more: object) -> Path:
    path = Path(config.path).parent / "config.yaml"
    data = {key: value for key, value in dataclasses.asdict(config).items() if value and key != "filters"}
    path.write_text(json.dumps({"data": data | more}))
    return path


def test_a_worker_that_is_killed_is_exit_5(many_parts: DataConfig, tmp_path: Path) -> None:
    process = preparer(many_parts, 2)
    while journal_lines(tmp_path / ".out.tmp") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert "PeerLostError: a worker process died" in errors
    prepare(many_parts)


def test_two_preparers_of_one_folder_do_the_work_once(many_parts: DataConfig) -> None:
    processes = [preparer(many_parts, 1) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert read_manifest(Path(many_parts.path)) is not None


def test_a_full_disk_is_exit_6_and_the_next_start_goes_on(
    many_parts: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on file sizes stands for the full disk: parts fit, the first large shard does not."""
    path = config_file(many_parts)
    limit = 600_000
    done = subprocess.run(
        command("launch.prepare", str(path), "--workers", "2"), env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert "File too large" in lines[0]
    assert "finished parts are kept in" in lines[0]
    for messages in (["verifying", "prepared in"], ["already prepared"]):
        assert run_command(command_module.main, [str(path), "--workers", "2"]) == 0
        shown = capsys.readouterr().out
        assert all(message in shown for message in messages)


def cut_shard(folder: Path) -> None:
    path = next(folder.glob("out/*-train.bin"))
    path.write_bytes(path.read_bytes()[:-2])


LATER: dict[str, tuple[Callable[[Path], object], list[str], int, str]] = {
    "nothing": (lambda folder: None, [], 0, ""),
    "source removed": (lambda folder: (folder / "a.jsonl").unlink(), [], 0, ""),
    "source grown": (lambda folder: (folder / "a.jsonl").open("a").write("\n"), [], 3, "a.jsonl has"),
    "shard cut": (cut_shard, [], 3, "a-train.bin has"),
    "shard removed": (lambda folder: (folder / "out" / "a-train.idx").unlink(), [], 3, "a-train.idx is missing"),
    "old format": (
        lambda folder: (folder / "out" / "manifest.json").write_text('{"format": 1}'), [], 2, "has format 1, this code",
    ),
    "manifest cut": (lambda folder: (folder / "out" / "manifest.json").write_text("{"), [], 2, "is unreadable"),
    "other vocabulary": (lambda folder: None, ["data.vocab_size=290"], 2, "vocab_size: 280 -> 290"),
    "no workers": (lambda folder: None, ["--workers", "0"], 2, "--workers: 0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_what_changed_since_is_noticed_by_the_next_preparation(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, more, code, message = LATER[name]
    source = write_jsonl(tmp_path / "a.jsonl", range(40), 30)
    config = DataConfig(path=str(tmp_path / "out"), source=str(source), vocab_size=280)
    prepare(config)
    action(tmp_path)
    before = contents(config.path)
    assert run_command(command_module.main, [str(config_file(config)), *more]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if code else 0), lines
    assert message in "".join(lines)
    assert contents(config.path) == before


def test_a_given_tokenizer_must_stay_that_of_the_shards(tmp_path: Path, data_config: DataConfig) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", range(40), 30)
    given = tmp_path / "given.json"
    shutil.copy(f"{data_config.path}/tokenizer.json", given)
    config = DataConfig(path=str(tmp_path / "out"), source=str(source), tokenizer=str(given))
    prepare(config)
    prepare(config)
    given.write_text(given.read_text().replace("<|endoftext|>", "</s>"))
    with pytest.raises(CheckpointError, match="is not the tokenizer that"):
        prepare(config)


def test_a_domain_without_documents_is_named(mixture: DataConfig) -> None:
    strict = dataclasses.replace(mixture.domains["third"], min_characters=10**9)
    with pytest.raises(ConfigError, match=r"data.domains.third: .* has no document to train on .*min_characters"):
        prepare(dataclasses.replace(mixture, domains=mixture.domains | {"third": strict}))


def test_a_column_that_names_no_domains_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {n}", "domain": f"d{n}"}) + "\n" for n in range(1100)))
    with pytest.raises(ConfigError, match="names 1100 domains"):
        prepare(DataConfig(path=str(tmp_path / "out"), source=str(source), vocab_size=280))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Eight times the text, 64 MB more of it, in the memory of the parent and of the largest worker."""
    peaks = []
    for name, repeats in (("small", 1), ("large", 8)):
        source = tmp_path / f"{name}.jsonl"
        with source.open("w") as file:
            for number in range(2000 * repeats):
                file.write(json.dumps({"text": text_of(number, 600)}) + "\n")
        config = DataConfig(path=str(tmp_path / name), source=str(source), vocab_size=300, tokenizer_sample_mb=0.5)
        output, errors = preparer(config, 2).communicate()
        assert output, errors
        peaks.append([int(word) / 1024 for word in output.split()])
        size = source.stat().st_size / 2**20
    growth = [after - before for before, after in zip(*peaks, strict=True)]
    assert size > 60, size
    assert max(growth) < 16, (growth, peaks)
