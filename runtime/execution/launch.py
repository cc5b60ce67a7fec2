"""Runs of a session on a device, each queued with bindings made before."""

from functools import cache
from typing import Any

import onnxruntime as ort

_NO_GRAPH = -1  # graph id that disables capture


class Launch:
    """A session with its bindings, and the id of the CUDA graph captured from them."""

    def __init__(
        self,
        session: ort.InferenceSession,
        binding: Any,
        graph_id: int = _NO_GRAPH,
        wait: bool = False,
    ) -> None:
        """wait: return from a run only when it has ended."""
        self._session, self._binding = session, binding
        self._plain, self._captured = _options(_NO_GRAPH, wait), _options(graph_id, wait)

    def run(self, graph: bool = False) -> None:
        """Queue a run of the session.

        graph: replay the captured CUDA graph; the first such run captures it.
        """
        self._session.run_with_iobinding(self._binding, self._captured if graph else self._plain)


@cache
def _options(graph_id: int, wait: bool) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options
