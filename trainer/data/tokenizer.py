"""Tokenizers: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Whatever it was, it is saved as one `tokenizer.json` beside the tokens, with the token that ends a document named in
the manifest, so that training and export need neither the network nor the original.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
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
