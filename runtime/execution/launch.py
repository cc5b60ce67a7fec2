"""Runs of a session on a device, each queued with bindings made before."""

from typing import Any

import onnxruntime as ort

NO_GRAPH = -1  # graph id that disables capture


class Launch:
    """A session with its bindings, and the id of the CUDA graph captured from them."""

    def __init__(
        self, session: ort.InferenceSession, binding: Any, graph_id: int = NO_GRAPH
    ) -> None:
        self._session, self._binding = session, binding
        self._options = {
            (graph, wait): _run_options(graph_id if graph else NO_GRAPH, wait)
            for graph in (True, False)
            for wait in (True, False)
        }

    def run(self, graph: bool, wait: bool = False) -> None:
        """Queue a run of the session. wait: return only when it has ended.

        graph: replay the captured CUDA graph; the first such run captures it.
        """
        self._session.run_with_iobinding(self._binding, self._options[graph, wait])


def _run_options(graph_id: int, wait: bool) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options
