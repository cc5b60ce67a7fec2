"""What a reader has had of a request, which may have to be generated again."""

from msgspec.structs import replace

from runtime.request import RequestOutput


class ReplayFilter:
    """Counts tokens: those that were handed on, and those that came in the present try.

    The same image and prompt give the same tokens, whatever they are decoded with: who reads along
    sees neither a gap nor a repeat.
    """

    def __init__(self) -> None:
        self.tokens = self._position = 0

    def again(self) -> None:
        """It is generated from its beginning."""
        self._position = 0

    def fresh(self, output: RequestOutput) -> RequestOutput:
        """What is new in an output."""
        known = max(0, self.tokens - self._position)
        self._position += len(output.token_ids)
        self.tokens = max(self.tokens, self._position)
        return replace(output, completion=output.completion.after(known))
