"""`launch.data show`: training samples as text."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from launch._stream import Stream
from trainer.data.corpus import IGNORED_LABEL, PADDING_DOCUMENT
from trainer.errors import ConfigError

_CHUNK = 4096


def show(stream: Stream, console: Console, *, samples: Sequence[int] | None, domain: str, count: int) -> None:
    """Print samples: those with these numbers, or the next `count`, of one domain if named.

    A token that is no target of the one before it (the first of a row, or of a document under masks) stands between
    marks and dim; borders and padding are named.
    """
    corpus = stream.corpus
    if domain and domain not in corpus.domain_names:
        raise ConfigError(f"--domain: {domain} is no domain of the corpus; it has {', '.join(corpus.domain_names)}")
    if count < 1:
        raise ConfigError(f"--count: {count} must be at least 1")
    wanted = corpus.domain_names.index(domain) if domain else None
    chosen = _next(stream, wanted, count) if samples is None else _of(stream, samples, wanted)
    console.print(Text.assemble(("«text»", "dim"), " is read but is no target: nothing is learnt from predicting it"))
    for sample in chosen:
        console.print(_sample(stream, sample))


def _next(stream: Stream, domain: int | None, count: int) -> Iterator[int]:
    plan, found = stream.corpus.plan, 0
    stop = max(stream.planned, stream.trained + count)
    if plan.end is not None:
        stop = min(stop, plan.end)
    phases = plan.phases(stop)
    for phase, end in zip(phases, [*(each.start for each in phases[1:]), stop], strict=True):
        if domain is not None and not phase.shares_D[domain]:
            continue
        for start in range(max(phase.start, stream.trained), end, _CHUNK):
            domains_S, _ = plan.locate(np.arange(start, min(start + _CHUNK, end)))
            for offset in range(len(domains_S)) if domain is None else np.flatnonzero(domains_S == domain).tolist():
                yield start + offset
                found += 1
                if found == count:
                    return
    if not found:
        of = "" if domain is None else f" of {stream.corpus.domain_names[domain]}"
        raise ConfigError(f"show: the run has no sample{of} ahead; name some with --samples")


def _of(stream: Stream, samples: Sequence[int], domain: int | None) -> list[int]:
    domains_S, _ = stream.corpus.plan.locate(np.array(samples))
    chosen = [sample for sample, of in zip(samples, domains_S.tolist(), strict=True) if domain in (None, of)]
    if not chosen:
        raise ConfigError("--domain: none of --samples is of this domain")
    return chosen


def _sample(stream: Stream, sample: int) -> Text:
    corpus = stream.corpus
    (domain,), (row,) = (each.tolist() for each in corpus.plan.locate(np.array([sample])))
    rows = corpus.train_batch(np.array([sample]))
    tokens, labels, documents = (each[0] for each in (rows.tokens_ST, rows.labels_ST, rows.documents_ST))
    epoch = corpus.plan.visits(sample)[domain] // corpus.plan.rows_D[domain]
    targets, padding = int((labels != IGNORED_LABEL).sum()), int((documents == PADDING_DOCUMENT).sum())
    is_stream = stream.config.data.packing == "split"
    text = Text()
    text.append(
        f"\nsample {sample} · {corpus.domain_names[domain]} · row {row} · epoch {epoch + 1} · "
        f"phase {corpus.plan.phase(sample).number} · {targets} targets of {len(labels)}\n",
        style="bold cyan",
    )
    for document in documents.unique_consecutive().tolist():
        if document == PADDING_DOCUMENT:
            text.append(f"[padding: {padding} tokens]", style="yellow")
            continue
        (places,) = (documents == document).nonzero(as_tuple=True)
        first, last = int(places[0]), int(places[-1])
        text.append(f"[document {document}] ", style="yellow")
        # In one stream each input is the target of the one before it, if that one asks for it.
        is_target = first > 0 and is_stream and int(labels[first - 1]) != IGNORED_LABEL
        if is_target:
            text.append(corpus.decode([int(tokens[first])]))
        else:
            text.append(f"«{corpus.decode([int(tokens[first])])}»", style="dim")
        rest = tokens[first + 1 : last + 1].tolist()
        if (last + 1 == len(labels) or not is_stream) and int(labels[last]) != IGNORED_LABEL:
            rest.append(int(labels[last]))  # a target that is no input of this row
        text.append(corpus.decode(rest))
        text.append("\n")
    return text
