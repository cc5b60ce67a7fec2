"""`make test_container`: build the CPU image and see it work as a stranger would run it.

`GPU_IMAGE=1` builds the GPU image instead. Where there is no GPU, it must say so and exit.

With Docker where there is one, otherwise with buildah and podman. On a host that can't pull the
base image, it is made with debootstrap. The host's pip settings are mounted for the build only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = "docker.io/library/debian:bookworm-slim"
NAME, PORT = "vignette-check", "18000"
MOST_BYTES = 900_000_000
HARDENED = [
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop=all",
    "--security-opt",
    "no-new-privileges",
]
# What podman needs on a host without systemd.
PODMAN = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
PODMAN_RUN = ["--log-driver", "k8s-file", "--cgroup-parent", "vignette", "--cgroups=no-conmon",
              "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=8192:8192"]  # fmt: skip


def main() -> int:
    """Build, run, ask, stop; status 0 if all checks hold, 2 where they can't be made."""
    if sys.argv[1:] not in ([], ["gpu"]):
        print(f"usage: {sys.argv[0]} [gpu]\n\n{__doc__}")
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    target = "gpu" if sys.argv[1:] == ["gpu"] else "cpu"
    docker, image = has_docker(), f"vignette:{target}"
    if not docker and not (shutil.which("podman") and shutil.which("buildah")):
        print("needs a Docker daemon, or podman with buildah and runc", file=sys.stderr)
        return 2
    client, run_flags = (["docker"], []) if docker else (PODMAN, PODMAN_RUN)
    if docker:
        run("docker", "build", "--file", "docker/Dockerfile", "--target", target, "--tag", image,
            ".")  # fmt: skip
    else:
        build_with_buildah(target, image)
    size = int(output(*client, "image", "inspect", "--format", "{{.Size}}", image))
    if target == "gpu":
        print(f"the image has {size / 1e6:.0f} MB")
        check_without_a_gpu([*client, "run", "--rm", *run_flags, *HARDENED, image])
        return 0
    check(size <= MOST_BYTES, f"the image has {size / 1e6:.0f} MB, at most {MOST_BYTES / 1e6:.0f}")
    subprocess.run([*client, "rm", "--force", NAME], capture_output=True, check=False)
    run(*client, "run", "--detach", "--name", NAME, "--network", "host", *run_flags, *HARDENED,
        "--env", f"VIGNETTE_PORT={PORT}", image)  # fmt: skip
    try:
        inspect_running(client)
    except BaseException:
        run(*client, "logs", NAME)
        raise
    finally:
        subprocess.run([*client, "rm", "--force", NAME], capture_output=True, check=False)
    return 0


def check_without_a_gpu(command: list[str]) -> None:
    """The container exits at once and says what to do, instead of opening its port."""
    done = subprocess.run(
        [*command, "--provider", "cuda"], capture_output=True, text=True, check=False, timeout=60
    )
    check(done.returncode == 1, f"without a GPU it exits with {done.returncode}")
    said = done.stderr.strip().splitlines()[-1]
    check("--gpus all" in said, f"it says what to do: {said}")


def has_docker() -> bool:
    """Whether a Docker daemon answers; the client alone builds nothing."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def inspect_running(client: list[str]) -> None:
    """Check each promise of a running container."""
    started = time.monotonic()
    wait_until_ready()
    print(f"ready after {time.monotonic() - started:.1f} s")
    said = json.loads((ROOT / "demo/samples/captions.json").read_text())["owl.png"]["caption"]
    image = (ROOT / "demo/samples/owl.png").read_bytes()
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/caption", image, timeout=30) as answer:
        caption = json.load(answer)["caption"]
    check(caption == said, f"it captions over HTTP: {caption}")
    folder = output(
        *client, "exec", NAME, "python", "-m", "vignette", "caption", "demo/samples/owl.png"
    )
    check(json.loads(folder)["caption"] == said, "it captions files without the server")
    health = [*client, "exec", NAME, "python", "-m", "server.probe"]
    check(subprocess.run(health, check=False).returncode == 0, "its health check passes")
    user = output(*client, "exec", NAME, "id", "-u")
    check(user == "10001", f"it runs as user {user}, not root")
    write = [*client, "exec", NAME, "touch", "/app/x"]
    refused = subprocess.run(write, capture_output=True, check=False).returncode != 0
    check(refused, "its root file system is read-only")
    look = "from importlib.util import find_spec as f; print(f('torch'), f('pip'))"
    found = output(*client, "exec", NAME, "python", "-c", look)
    check(found == "None None", "neither torch nor pip is in it")
    run(*client, "stop", "--time", "10", NAME)
    code = output(*client, "inspect", "--format", "{{.State.ExitCode}}", NAME)
    check(code == "0", f"stopped, it drains and exits with {code}")


def build_with_buildah(target: str, image: str) -> None:
    """Build with `buildah bud`, which needs no daemon."""
    if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode != 0:
        fetch_base()
    with tempfile.TemporaryDirectory() as name:
        run("buildah", "--storage-driver", "overlay", "bud", "--isolation", "chroot", "--network",
            "host", "--format", "docker", "--pull-never", *host_settings(Path(name)),
            "--file", "docker/Dockerfile", "--target", target, "--tag", image, ".")  # fmt: skip


def fetch_base() -> None:
    """Pull the base image, or make it from the host's own Debian mirror."""
    pull = ["podman", "pull", BASE]
    if subprocess.run(pull, capture_output=True, check=False).returncode == 0:
        return
    if shutil.which("debootstrap") is None:
        print(f"{BASE} can't be pulled: install debootstrap to make it", file=sys.stderr)
        raise SystemExit(2)
    mirror = output("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)",
                    "Created-By: Packages")  # fmt: skip
    site = next((line.split()[0] for line in mirror.splitlines() if " bookworm main" in line), None)
    if site is None:
        print(f"{BASE} can't be pulled, and this is no Debian 12 to make it from", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as root:
        run("debootstrap", "--variant=minbase", "bookworm", root, site, quiet=True)
        for part in (
            "sources.list",
            "sources.list.d",
            "apt.conf.d",
        ):  # the host's way to packages
            source, target = Path("/etc/apt") / part, Path(root) / "etc/apt" / part
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)
        tar = subprocess.Popen(
            ["tar", "-C", root, "--numeric-owner", "-c", "."], stdout=subprocess.PIPE
        )
        subprocess.run(["podman", "import", "-", BASE], stdin=tar.stdout, check=True)
        check(tar.wait() == 0, "the base image is packed")


def host_settings(folder: Path) -> list[str]:
    """Flags that pass the host's pip settings, certificates and package folders to the build."""
    shown = output(sys.executable, "-m", "pip", "config", "list")
    settings = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    values = {key.rsplit(".", 1)[-1]: value.strip("'\"") for key, value in settings.items()}
    if not values:
        return []
    flags: list[str] = []
    if certificate := values.pop("cert", os.environ.get("SSL_CERT_FILE")):
        shutil.copy(certificate, folder / "ca.crt")
        values["cert"] = "/run/host/ca.crt"
    known = ("index-url", "extra-index-url", "find-links", "cert", "trusted-host")
    lines = [f"{key} = {' '.join(value.split())}" for key, value in values.items() if key in known]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines]) + "\n")
    for word in " ".join(values.values()).replace("\\n", " ").split():
        path = Path(word.removeprefix("file://"))
        path = path.parent if path.name == "simple" else path  # an index has its files beside it
        if path.is_absolute() and path.is_dir():
            flags += ["--volume", f"{path}:{path}:ro"]
    return [
        *flags, "--volume", f"{folder}:/run/host:ro",
        "--build-arg", "PIP_CONFIG_FILE=/run/host/pip.conf",
    ]  # fmt: skip


def wait_until_ready() -> None:
    """Wait for /health/ready; raises OSError after a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def check(holds: bool, what: str) -> None:
    """Print a check's outcome; exit with status 1 if it does not hold."""
    print(("ok    " if holds else "FAIL  ") + what, flush=True)
    if not holds:
        raise SystemExit(1)


def run(*command: str, quiet: bool = False) -> None:
    """Run a command in the repository's root; its failure ends the check."""
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL if quiet else None)


def output(*command: str) -> str:
    """A command's standard output, stripped."""
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
