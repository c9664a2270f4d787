"""From a path to token ids that clients own slices of. No torch here."""

from fedllm.data.dataset import Dataset, load_dataset
from fedllm.data.diversity import HeterogeneityReport, heterogeneity
from fedllm.data.messages import read_messages, read_tools
from fedllm.data.partitions import PARTITIONS, Partition, partition
from fedllm.data.render import Renderer, make_renderer
from fedllm.data.rows import Message, Row, Rows, ToolCall
from fedllm.data.stream import StreamedRow, stream_rows
from fedllm.data.tasks import load_rows
from fedllm.data.template import chat_template
from fedllm.data.tokens import TokenSet

__all__ = [
    "PARTITIONS",
    "Dataset",
    "HeterogeneityReport",
    "Message",
    "Partition",
    "Renderer",
    "Row",
    "Rows",
    "StreamedRow",
    "TokenSet",
    "ToolCall",
    "chat_template",
    "heterogeneity",
    "load_dataset",
    "load_rows",
    "make_renderer",
    "partition",
    "read_messages",
    "read_tools",
    "stream_rows",
]
