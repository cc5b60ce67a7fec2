"""Runs them against a server: `python -m tests.clients KSERVE_ENVIRONMENT AIPERF_ENVIRONMENT`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.contestants.servers import free_port
from bench.reliability.running import service

SAMPLES = Path("demo/samples").absolute()
MODEL, REQUESTS = "vignette-demo", 60


def main(kserve: str, aiperf: str) -> None:
    said = {n: s["caption"] for n, s in json.loads((SAMPLES / "captions.json").read_text()).items()}
    grpc = free_port()
    with service("--grpc-port", str(grpc)) as it, tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("with_kserve.py")
        image = SAMPLES / "owl.png"
        subprocess.run(
            [
                f"{kserve}/bin/python",
                script,
                str(it.port),
                str(grpc),
                MODEL,
                image,
                said["owl.png"],
            ],
            check=True,
        )
        rows = [{"text": "what is it", "image": str(SAMPLES / name)} for name in said]
        Path(folder, "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
        subprocess.run(
            [Path(aiperf, "bin", "aiperf").absolute(), "profile", "--model", MODEL,
             "--url", it.url, "--endpoint-type", "chat", "--streaming",
             "--tokenizer", Path("demo/model").absolute(), "--input-file", "images.jsonl",
             "--custom-dataset-type", "single_turn", "--request-count", str(REQUESTS),
             "--concurrency", "8", "--ui", "none", "--output-artifact-dir", "out"],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = json.loads(Path(folder, "out", "profile_export_aiperf.json").read_text())
        failed = found.get("error_summary") or []
        assert not failed, failed
        assert found["request_count"]["avg"] == REQUESTS
        first = found["time_to_first_token"]["avg"]
        rate = found["request_throughput"]["avg"]
        print(f"aiperf: {REQUESTS} streams, none failed, {rate:.1f}/s, first token {first:.0f} ms")


main(*sys.argv[1:])
