"""From a path to token ids that clients own slices of. No torch here."""

from fedllm.data.dataset import Dataset, load_dataset
from fedllm.data.diversity import HeterogeneityReport, heterogeneity
from fedllm.data.partitions import PARTITIONS, Partition, partition
from fedllm.data.render import chat_template
from fedllm.data.rows import Message, Row, Rows
from fedllm.data.tasks import load_rows
from fedllm.data.tokens import TokenSet

__all__ = [
    "PARTITIONS",
    "Dataset",
    "HeterogeneityReport",
    "Message",
    "Partition",
    "Row",
    "Rows",
    "TokenSet",
    "chat_template",
    "heterogeneity",
    "load_dataset",
    "load_rows",
    "partition",
]
