"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 10 classes, 32x32.

Read from the binary version: records of one label byte and 3072 bytes of red, green and
blue planes. The Python version holds the same images as pickles, which would be executed.
The checksum is the one on the data set's page.
"""

from pathlib import Path

import numpy as np

from tcore.data.archives import Archive, read_tar
from tcore.data.images import ImageSet
from tcore.files import InputError

NAME = "cifar-10-binary.tar.gz"
ARCHIVES = (
    Archive(NAME, f"https://www.cs.toronto.edu/~kriz/{NAME}", "md5:c32a1d4ab5d03f1284b67883e8d87530"),
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-bin"
BATCHES = {
    "train": tuple(f"{FOLDER}/data_batch_{i}.bin" for i in range(1, 6)),
    "test": (f"{FOLDER}/test_batch.bin",),
}
RECORD = 1 + 3 * 32 * 32


def load(settings: None, archives: dict[str, Path]) -> dict[str, ImageSet]:
    """The splits 'train' (batches in order) and 'test'."""
    content = read_tar(archives[NAME], sum(BATCHES.values(), ()))

    def split(name: str) -> ImageSet:
        records = np.frombuffer(b"".join(content[batch] for batch in BATCHES[name]), np.uint8)
        if len(records) % RECORD:
            raise InputError(f"{archives[NAME]}: {name} batches are not whole records of {RECORD} bytes")
        records = records.reshape(-1, RECORD)
        return ImageSet(
            pixels=np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
            labels=records[:, 0].astype(np.int64),
            index=np.arange(len(records)),
            class_names=CLASSES,
            origin=f"CIFAR-10, {name}",
        )

    return {name: split(name) for name in BATCHES}
