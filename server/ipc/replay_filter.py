"""Drops tokens already delivered when a request is generated again."""

from msgspec.structs import replace

from runtime.request import RequestOutput


class ReplayFilter:
    """Counts tokens: those delivered (`tokens`), and those received in the current try.

    The same image and prompt give the same tokens, whatever else is in the batch, so that clients
    see neither a gap nor a repeat.
    """

    def __init__(self) -> None:
        self.tokens = self._position = 0

    def again(self) -> None:
        """Start a new try, from the first token."""
        self._position = 0

    def fresh(self, output: RequestOutput) -> RequestOutput:
        """An output without the tokens already delivered."""
        known = max(0, self.tokens - self._position)
        self._position += len(output.token_ids)
        self.tokens = max(self.tokens, self._position)
        return replace(output, completion=output.completion.after(known))
