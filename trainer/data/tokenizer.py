"""Tokenizers: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Whatever it was, it is saved as one `tokenizer.json` beside the tokens, with the token that ends a document named in
the manifest, so that training and export need neither the network nor the original.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.config import DataConfig
from trainer.data.documents import BadDocument, Document, parse
from trainer.data.parts import text_digest
from trainer.data.sources import Stream, bad_document
from trainer.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
_READ_FOR_SAMPLE = 64
"""How many times the sample is read at most to choose it from: not ten terabytes for eight megabytes."""
_KNOWN_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text can be encoded, decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample_for_training(config: DataConfig, streams: list[Stream]) -> Iterator[str]:
    """Documents for the tokenizer: those with the smallest hashes, up to data.tokenizer_sample_mb.

    They are chosen from all text, or, of a source much larger, from the beginnings of its streams. Raises ConfigError
    for a bad document on the way.
    """
    budget_bytes = int(config.tokenizer_sample_mb * 1e6)
    stream_bytes = max(_READ_FOR_SAMPLE * budget_bytes // max(len(streams), 1), 1)
    heap: list[tuple[int, str]] = []  # largest hash on top
    kept = 0
    for document in itertools.chain.from_iterable(_beginning(config, each, stream_bytes) for each in streams):
        heapq.heappush(heap, (-int.from_bytes(text_digest(document.text)[:8], "big"), document.text))
        kept += len(document.text.encode())
        while kept > budget_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[1].encode())
    yield from (text for _, text in sorted(heap, reverse=True))


def _beginning(config: DataConfig, stream: Stream, num_bytes: int) -> Iterator[Document]:
    filters = config.filters_of(stream.domain)
    for piece in stream.pieces():
        for found in parse(piece):
            if isinstance(found, BadDocument):
                if config.on_bad_document == "stop":
                    raise bad_document(found)
            elif filters.length_problem(len(found.text), "characters") == "":
                yield found
        num_bytes -= len(piece.payload)
        if num_bytes <= 0:
            return


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs: ids of added tokens may lie beyond the count of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a tokenizer.json, a folder that holds one, or (this asks the network) a hub name."""
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if path.is_dir() or path.suffix or path.is_absolute() or name.startswith("."):
            raise ConfigError(
                f"data.tokenizer: {file} does not exist; give a tokenizer.json, its folder, or a hub name"
            )
        return Tokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError(f"data.tokenizer: '{name}' cannot be loaded ({str(error).splitlines()[0]})") from error


def end_of_document(tokenizer: Tokenizer) -> int:
    """Id of the token put after each document.

    Raises ConfigError if the tokenizer has no token known to mean that.
    """
    for token in _KNOWN_ENDS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    raise ConfigError(
        f"data.tokenizer: has none of the end tokens {', '.join(_KNOWN_ENDS)}; add one as a special token"
    )
