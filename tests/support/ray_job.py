"""Bulk runs on a Ray cluster of this machine: `python -m tests.support.ray_job OUTPUT INPUT`.

The nodes work in another folder than this process. A node is added in the middle, and the other
one dies.
"""

import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from ray.cluster_utils import Cluster

from runtime.model.preprocess import MAX_PIXELS
from server.bulk.captioners.engine import EngineSetup
from server.bulk.captioners.ray import RayCaptioning, TaskSetup
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import parts
from server.bulk.outputs.opening import open_output
from server.bulk.run import BulkRun, CaptionSettings
from tests.support.fakes import allergic_worker, fake_folder

_CORES = 3  # of a node: two engines, and one core that decodes


def main(output: str, given: str) -> None:
    os.chdir("/")
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}  # not 3 s
    # Without cores of its own: all work is on nodes that die or come.
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=_CORES)]
    cluster.wait_for_nodes()
    engine = EngineSetup(fake_folder(Path(output).parent / "engine"), main=allergic_worker)
    work = TaskSetup(engine, None, {}, 10**7, MAX_PIXELS, with_images=False)
    os.chdir(Path(given).parent)
    inputs = parts([Path(given).name], Columns(), 10**7)
    with (
        closing(open_output(output, overwrite=False)) as opened,
        closing(RayCaptioning(cluster.address, 1, work)) as captioning,
    ):
        job = BulkRun(opened, CaptionSettings("fake", {}))
        job.read()
        found = captioning.run(inputs, job.index)
        job.write(job.once(found), partial(disturb, cluster, nodes))
    cluster.shutdown()
    skipped = sum(part.skipped.total() for part in inputs)
    counts = job.counts
    print(f"{counts.captioned} captioned, {counts.failed} failed, {skipped} skipped")
    print(f"{len(nodes)} nodes left")


def disturb(cluster: Cluster, nodes: list, told) -> None:
    if told.ended == 40 and len(nodes) == 1:
        nodes.append(cluster.add_node(num_cpus=_CORES))
    if told.ended == 80:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
