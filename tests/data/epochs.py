"""Which documents a pipeline gives in its first epoch, counted."""

import collections


def first_epoch(iterator, num_documents, num_streams):
    """Document id -> how often its beginning was given, of the documents of the first epoch.

    Takes rows of each stream of the process until it can give no other document of that epoch.

    Args:
        iterator: A `PipelineIterator` that has given nothing yet.
        num_documents: Of every source.
        num_streams: Of the run.
    """
    seen = collections.Counter()
    for index, stream in iterator._streams.items():
        last = -(-(num_documents - index) // num_streams)  # Positions of the first epoch.
        while not _is_past(stream.get_state(), last):
            for piece in stream.next_row().pieces:
                if piece.position < last and piece.start == 0:
                    seen[piece.sequence.document_id] += 1
    return seen


def _is_past(state, last):
    """Whether a stream has drawn all positions before `last`, and holds none of them any more."""
    packer = state["packer"]
    held = [p for pieces in (*packer["open"], *state["closed"], packer["texts"]) for p in pieces]
    drawn = min(state["mixture"]["position"].values())
    return drawn >= last and all(position >= last for _, position, _, _ in held)
