"""The corpus of a run, opened as the whole configuration wants it."""

from configs.schema import RunConfig
from trainer.data.corpus import TokenCorpus


def open_corpus(config: RunConfig) -> TokenCorpus:
    """What `launch.prepare` wrote for this run, cut into its rows."""
    return TokenCorpus.open(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.seed,
        mask_documents=config.model.document_mask,
        steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
    )
