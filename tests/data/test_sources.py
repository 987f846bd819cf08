"""Every kind of source gives its documents; what cannot be read is named by file and row."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import load_run_config
from tests.data.hub import hub
from tests.harness import ROOT, environment
from trainer.data import lines
from trainer.data.config import DataConfig
from trainer.data.documents import Document, Piece, parse
from trainer.data.mixture import DomainConfig
from trainer.data.parts import is_heldout
from trainer.data.sources import read_documents, streams_of
from trainer.errors import CheckpointError, ConfigError

TEXTS = ["eins", "zwei\nZeilen", "三", "четыре 4️⃣"]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    return bytes(sink.getvalue())


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def tar(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, text in enumerate(texts):
            for ending, content in (("txt", text), ("json", json.dumps({"text": text.upper()}))):
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(content.encode())
                archive.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


FORMATS: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (json_lines(TEXTS), "text"),
    "blank-lines.jsonl": (b"\n" + json_lines(TEXTS).replace(b"\n", b"\r\n\n").rstrip(), "text"),
    "byte-order-mark.jsonl": (b"\xef\xbb\xbf" + json_lines(TEXTS), "text"),
    "a.jsonl.gz": (gzip.compress(json_lines(TEXTS)), "text"),
    "two-members.jsonl.gz": (gzip.compress(json_lines(TEXTS[:2])) + gzip.compress(json_lines(TEXTS[2:])), "text"),
    "a.jsonl.zst": (zstd(json_lines(TEXTS)), "text"),
    "two-frames.jsonl.zst": (zstd(json_lines(TEXTS[:2])) + zstd(json_lines(TEXTS[2:])), "text"),
    "a.jsonl.bz2": (bz2.compress(json_lines(TEXTS)), "text"),
    "a.jsonl.xz": (lzma.compress(json_lines(TEXTS)), "text"),
    "array.json": (json.dumps([{"text": text} for text in TEXTS]).encode(), "text"),
    "a.parquet": (parquet(pa.table({"n": range(4), "text": TEXTS})), "text"),
    "large-strings.parquet": (parquet(pa.table({"text": pa.array(TEXTS, pa.large_string())})), "text"),
    "nested.parquet": (parquet(pa.table({"meta": [{"body": text} for text in TEXTS]})), "meta.body"),
    "dotted.parquet": (parquet(pa.table({"meta.body": TEXTS})), "meta.body"),
    "a.arrow": (arrow(pa.table({"text": TEXTS})), "text"),
    "a.tar": (tar(TEXTS), "txt"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    content, field = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    found = list(read_documents(DataConfig(source=str(tmp_path / name), text_field=field)))
    assert found == [Document(text, name.split(".")[0]) for text in TEXTS]


def test_webdataset_records_are_nested(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(TEXTS))
    found = read_documents(DataConfig(source=str(tmp_path / "a.tar"), text_field="json.text"))
    assert [document.text for document in found] == [text.upper() for text in TEXTS]


def test_names_with_wildcards_are_names(tmp_path: Path) -> None:
    (tmp_path / "[1]*.parquet").write_bytes(parquet(pa.table({"text": ["mine"]})))
    (tmp_path / "1x.parquet").write_bytes(parquet(pa.table({"text": ["not mine"]})))
    found = read_documents(DataConfig(source=str(tmp_path / "[1]*.parquet")))
    assert [document.text for document in found] == ["mine"]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 64]) + content[middle + 64 :]


MANY = [f"document {number} " + "x" * (number % 50) for number in range(1000)]
BAD: dict[str, tuple[bytes, str]] = {
    "truncated.jsonl.zst": (zstd(json_lines(MANY * 50))[:-20], r"as jsonl after row \d+ \(Truncated"),
    "flipped.jsonl.zst": (_flipped(zstd(json_lines(MANY))), r"cannot be read as jsonl after row \d+"),
    "truncated.jsonl.gz": (gzip.compress(json_lines(MANY))[:-9], r"after row \d+ \(Truncated"),
    "not.jsonl.gz": (b"not gzip at all", r"cannot be read as jsonl after row 0"),
    "truncated.parquet": (parquet(pa.table({"text": MANY}))[:-9], "cannot be read as parquet after row 0"),
    "flipped.parquet": (_flipped(parquet(pa.table({"text": MANY}))), r"cannot be read as parquet after row \d+"),
    "truncated.tar": (tar(MANY)[:70_000], r"cannot be read as tar after row \d+"),
    "between-members.tar": (tar(MANY)[: 2048 * 20], r"cannot be read as tar after row 20 \(its end is missing\)"),
    "truncated.arrow": (arrow(pa.table({"text": MANY}))[:-8], r"cannot be read as arrow after row 1000"),
    "column.parquet": (parquet(pa.table({"body": ["a"]})), r"has no column 'text' \(columns: body\); set text_field"),
    "null.parquet": (parquet(pa.table({"text": ["a", None]})), "row 2: field 'text' holds NoneType, not text"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"row 2 is not UTF-8 text \(byte 13: "),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "row 1: field 'text' is not Unicode text"),
    "array.jsonl": (b'["text"]\n', "row 1 is a JSON list, not an object"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "row 1 cannot be read as json"),
    "half.jsonl": (b'{"text": "a"}\n\n{"text": "b', "row 3 cannot be read as json"),
    "domain.jsonl": (b'{"text": "a", "domain": "x/y"}\n', "row 1: 'x/y' cannot name a domain"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_documents(DataConfig(source=str(tmp_path / name), text_field="txt" if ".tar" in name else "text")))
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_bad_documents_can_be_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    content = json_lines(["a"]) + b'{"text": 7}\n{"te\n{"text": "caf\xe9"}\n' + json_lines(["b"])
    (tmp_path / "some.jsonl").write_bytes(content)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines(MANY))[:-9])
    found = read_documents(DataConfig(source=str(tmp_path), on_bad_document="skip"))
    assert [d.text for d in found if d.domain == "some"] == ["a", "b"]


def test_a_source_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.parquet"):
        path = tmp_path / name
        path.write_bytes(json_lines(TEXTS))
        (stream,) = streams_of(DataConfig(source=str(path)))
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} is gone"):
            list(stream.pieces())


def test_small_files_are_read_together_and_large_ones_alone(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    with (tmp_path / "big.jsonl").open("w") as file:
        file.write(json.dumps({"text": "x" * (1 << 24)}))
    streams = streams_of(DataConfig(source=str(tmp_path)))
    assert [len(stream.files) for stream in streams] == [5, 1]
    assert [d.domain for d in read_documents(DataConfig(source=str(tmp_path)))] == ["0", "1", "2", "3", "4", "big"]


def test_files_of_other_kinds_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.csv", "c.jsonl.lz4"):
        (tmp_path / name).write_bytes(json_lines(TEXTS))
    assert len(list(read_documents(DataConfig(source=str(tmp_path))))) == len(TEXTS)
    assert f"2 files of {tmp_path} are of other kinds (.csv, .lz4): not read" in caplog.text


@pytest.mark.parametrize("length", [5 << 20, (3 << 20) + lines.CHUNK + 9])
def test_a_line_that_is_no_document_is_passed_over(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 3 << 20)
    content = json_lines(["a"]) + json_lines(["y" * length]) + json_lines(["z" * (1 << 20), "b"]) + b"17\n"
    (tmp_path / "a.jsonl").write_bytes(content)
    (stream,) = streams_of(DataConfig(source=str(tmp_path / "a.jsonl")))
    found = [document for piece in stream.pieces() for document in parse(piece)]
    place = tmp_path / "a.jsonl"
    assert [d.text[:1] if isinstance(d, Document) else d.problem for d in found] == [
        "a", f"{place}: row 2 has more than 3 MiB; split it into documents", "z", "b",
        f"{place}: row 5 is a JSON int, not an object",
    ]  # fmt: skip


HUB_READER = """
import json, sys
from trainer.data.config import DataConfig
from trainer.data.mixture import DomainConfig
from trainer.data.prepare import prepare
from trainer.data.parts import is_heldout
from trainer.data.sources import read_documents, streams_of
from trainer.errors import EvenkeelError
for number, entry in enumerate(json.loads(sys.argv[1])):
    try:
        config = DataConfig(path=f"{sys.argv[2]}/{number}", domains={"web": DomainConfig(**entry)}, vocab_size=260)
        manifest, _ = prepare(config, workers=1)
        found = [len(streams_of(config)), manifest["domains"]["web"]["train"]["documents"]]
        print(json.dumps([*found, [document.text for document in read_documents(config)]]))
    except EvenkeelError as error:
        print(json.dumps(f"{error.exit_code} {error}"))
"""


def test_a_hub_dataset_is_read_at_its_commit(tmp_path: Path) -> None:
    commit, other = "1234567890" * 4, "0123456789" * 4
    texts = [[f"text {n}" for n in range(70)], ["the last one"]]
    files = {f"data/train-0000{n}-of-00002.parquet": parquet(pa.table({"body": part})) for n, part in enumerate(texts)}
    entry = {"source": "hub:owner/name", "revision": commit, "text_field": "body"}
    changes = [{}, {"streaming": False}, {"revision": other}, {"text_field": "text"}]
    with hub("owner/name", commit, files) as address:
        done = subprocess.run(
            [sys.executable, "-c", HUB_READER, json.dumps([entry | change for change in changes]), str(tmp_path)],
            env=environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache")), capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    streamed, downloaded, missing, wrong = (json.loads(line) for line in done.stdout.splitlines())
    kept = sum(not is_heldout(text, 0.02) for part in texts for text in part)
    assert streamed == [2, kept, texts[0] + texts[1]]
    assert downloaded == [1, kept, texts[0] + texts[1]]
    assert missing.startswith("2 data.domains.web.source: hub:owner/name cannot be opened (")
    assert wrong.startswith("2 hub:owner/name (shard 0): has no column 'text' (columns: body)")


@given(
    st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=40), max_size=30),
    st.integers(1, 50),
    st.booleans(),
)
def test_lines_are_cut_without_loss(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int, final_newline: bool
) -> None:
    """Whatever the size of chunks, rows keep their order, numbers and text."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = json_lines(texts)
    path.write_bytes(content if final_newline else content.rstrip(b"\n"))
    template = Piece(str(path), 1, 0, "json_lines", b"", "text", "", "d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        pieces = list(lines.json_line_pieces(path, template))
    assert [d for piece in pieces for d in parse(piece)] == [Document(text, "d") for text in texts]
    row = 1
    for piece in pieces:
        assert piece.first_row == row
        row += piece.rows
    assert row - 1 >= len(texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"domains": {"a": {"source": "hub:o/n"}}}, "domains.a.revision: '' must be the 40"),
        (lambda c: c | {"domains": {"a": {"source": "hub:o/n", "revision": "main"}}}, "'main' must be the 40"),
        (lambda c: c | {"domains": {"a": {"source": "x", "revision": "0" * 40}}}, "revision: only hub: sources"),
        (lambda c: c | {"domains": {"a": {"source": "x", "streaming": False}}}, "streaming: only hub: sources"),
        (lambda c: c | {"domains": {"a": {}}}, "domains.a.source: is empty"),
        (lambda c: c | {"domains": {"a/b": {"source": "x"}}}, "'a/b' cannot name a domain"),
        (lambda c: c | {"domains": {"a": {"source": "x", "weight": -1}}}, "domains.a.weight: -1.0 must be finite"),
        (lambda c: c | {"domains": {"a": {"source": "x", "weight": 0.0}}}, "weights: at least one domain needs"),
        (lambda c: c | {"domains": {"a": {"source": "x"}}, "source": "y"}, "source: is not read beside data.domains"),
        (
            lambda c: c | {"domains": {"a": {"source": "x", "weight": 1.0}, "b": {"source": "y"}}},
            "domains.b.weight: is missing",
        ),
        (
            lambda c: c | {"domains": {"a": {"source": "x", "max_characters": 5}}, "filters": {"min_characters": 9}},
            "domains.a.max_characters: 5 must be 0",
        ),
        (lambda c: c | {"source": "hub:o/n"}, "source: hub:o/n needs a revision"),
        (lambda c: c | {"filters": {"near_duplicates": 0.2}}, "filters.near_duplicates: 0.2 must be 0"),
        (lambda c: c | {"filters": {"min_tokens": 5, "max_tokens": 3}}, "filters.max_tokens: 3 must be 0"),
        (lambda c: c | {"max_epochs": {"a": -1.0}}, "max_epochs.a: -1.0"),
        (lambda c: c | {"on_bad_document": "hope"}, "on_bad_document"),
        (lambda c: c | {"domains": {"a": {"sorce": "x"}}}, "sorce"),
    ],
)
def test_contradictions_are_refused_when_the_config_is_read(
    change: Callable[[dict[str, object]], dict[str, object]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"data": change({})}))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert message in str(caught.value)


def test_the_example_mixture_can_be_included_and_sets_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"include: [{ROOT}/configs/quickstart.yaml, {ROOT}/configs/mixtures/example.yaml]\n")
    data = load_run_config(path, ["data.weights.code=0.5", "data.max_epochs.web=0"]).data
    assert list(data.domains) == ["web", "code", "manuals"]
    assert data.sampling_weights == {"web": 0.7, "code": 0.5, "manuals": 0.1}
    assert data.epoch_caps == {"code": 4, "manuals": 4}
    assert data.filters_of("code").min_characters == 100
    assert data.filters_of("web").min_characters == 50


def test_nothing_is_looked_up_in_the_network_for_local_sources(tmp_path: Path) -> None:
    """A folder that looks like a hub name is a folder, and a missing one is not asked for elsewhere."""
    with pytest.raises(ConfigError, match="allenai/c4 does not exist"):
        list(read_documents(DataConfig(domains={"a": DomainConfig(source="allenai/c4")})))
