"""What data a run trains on, and in which order, as a few characters: so that a run that goes on finds both again."""

import hashlib
from collections.abc import Sequence

import numpy as np

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader
from llmrecipes.data.store import SampleStore


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Returns a hash of every id and label."""
    hashed = hashlib.blake2b(digest_size=16)
    if isinstance(samples, SampleStore):
        for array in (samples.ids, samples.supervised, samples.starts, samples.ends):
            hashed.update(np.ascontiguousarray(array).data)
    else:
        for sample in samples:
            hashed.update(np.int64(len(sample.input_ids)).tobytes())
            hashed.update(np.ascontiguousarray(sample.input_ids).data)
            hashed.update(np.ascontiguousarray(sample.labels).data)
    return hashed.hexdigest()


def order_fingerprint(loader: Loader, epoch: int) -> str:
    """Returns a hash of which samples each step of an epoch takes, in which order; not of how a step is cut up."""
    hashed = hashlib.blake2b(digest_size=16)
    for window in loader.window_rows(epoch):
        indices = [index for batch in window for row in batch for index in row]
        hashed.update(np.asarray([-1, *indices], dtype=np.int64).data)
    return hashed.hexdigest()
