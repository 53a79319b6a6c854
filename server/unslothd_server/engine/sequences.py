"""The sequences of a pass, taken apart and put together again: padded to one width, or joined without padding."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from unslothd_server.engine.tokens import IGNORED_LABEL

Inputs = dict[str, Any]
PADDED_KEYS = frozenset({"input_ids", "labels", "attention_mask"})
JOINED_KEYS = frozenset({"input_ids", "labels", "position_ids", "packed_seq_lengths"})


@dataclass(frozen=True)
class Sequence:
    """One row as it is trained on.

    Args:
        ids: Tensor [tokens].
        labels: Tensor [tokens].
    """

    ids: Any
    labels: Any

    def __len__(self) -> int:
        return int(self.ids.shape[0])


def can_be_taken_apart(inputs: Inputs) -> bool:
    """True when the inputs hold nothing but what `sequences_of` understands."""
    return set(inputs) in (PADDED_KEYS, JOINED_KEYS)


def sequences_of(inputs: Inputs) -> list[Sequence]:
    """The sequences of a pass, without padding, in their order.

    Args:
        inputs: Padded rows (attention_mask [sequences, tokens]), or joined ones (input_ids [1, tokens] and
            packed_seq_lengths [sequences]).
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    lengths = inputs.get("packed_seq_lengths")
    if lengths is None:
        kept = inputs["attention_mask"].bool()
        return [Sequence(row[mask], label[mask]) for row, label, mask in zip(ids, labels, kept, strict=True)]
    edges = [0, *lengths.cumsum(0).tolist()]
    return [Sequence(ids[0, start:end], labels[0, start:end]) for start, end in pairwise(edges)]


def padded_inputs(sequences: Iterable[Sequence], width: int, pad_token_id: int, *, rows: int = 0) -> Inputs:
    """Inputs of rows that are filled up on the right.

    Args:
        sequences: At least one, none longer than the width.
        width: Columns.
        pad_token_id: Fills the rows up.
        rows: That there are at least; those beyond the sequences hold padding, and nothing of them is learnt.
    """
    import torch

    given = list(sequences)
    shape = (max(rows, len(given)), width)
    ids = given[0].ids.new_full(shape, pad_token_id)
    labels = given[0].labels.new_full(shape, IGNORED_LABEL)
    mask = torch.zeros(shape, dtype=torch.long, device=ids.device)
    # Attention that sees nothing at all is no number.
    mask[:, 0] = 1
    for index, row in enumerate(given):
        ids[index, : len(row)] = row.ids
        labels[index, : len(row)] = row.labels
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def joined_inputs(sequences: Iterable[Sequence]) -> Inputs:
    """Inputs of one row that holds all sequences; the attention of each ends at its edges.

    Args:
        sequences: At least one.
    """
    import torch

    rows = list(sequences)
    labels = torch.cat([row.labels for row in rows])
    # The last token of one sequence does not predict the first of the next.
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)[:-1]
    labels[starts] = IGNORED_LABEL
    return {
        "input_ids": torch.cat([row.ids for row in rows]).unsqueeze(0),
        "labels": labels.unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
        "packed_seq_lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
    }
