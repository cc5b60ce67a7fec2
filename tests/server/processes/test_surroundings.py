"""Ports, folders and shared memory that others use, too."""

import os
import socket

import numpy as np
import pytest

from server.ipc.shared import NoSharedMemory, PixelStore, RunFolder
from server.processes.ports import CannotListen, Ports
from server.settings import Settings
from server.telemetry.metrics import Metrics, count_as, forget_gauges, make_files


def test_a_port_is_taken_from_the_first_moment(tmp_path):
    first = Ports(Settings(_env_file=None, port=0))
    number = first.number
    try:
        with pytest.raises(CannotListen, match="choose another with --port"):
            Ports(Settings(_env_file=None, port=number))
    finally:
        first.close()
    Ports(Settings(_env_file=None, port=number)).close()


def test_a_host_that_is_none_is_named():
    for host in ("no.such.host.invalid", "192.0.2.1", "a..b"):
        with pytest.raises(CannotListen, match="--host"):
            Ports(Settings(_env_file=None, port=0, host=host))


def test_an_address_that_is_switched_off_is_left_out(monkeypatch):
    there = [
        (family, socket.SOCK_STREAM, 6, "", (address, 0))
        for family, address in ((socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "127.0.0.1"))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: there)
    ports = Ports(Settings(_env_file=None, port=0, host="localhost"))
    assert [sock.getsockname()[0] for sock in ports.public] == ["127.0.0.1"]
    ports.close()


def test_a_run_keeps_its_folder_whoever_starts(monkeypatch, tmp_path):
    first, second = RunFolder(), RunFolder()
    assert first.path.exists() and second.path.exists()
    os.close(first._lock)  # as if the process died
    third = RunFolder()
    assert not first.path.exists() and second.path.exists()
    second.remove()
    third.remove()


def test_metrics_have_their_room_from_the_start(tmp_path, monkeypatch):
    from prometheus_client import values

    before = values.ValueClass
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "to be restored")
    try:
        make_files(tmp_path, ["front-0"], [])
        sizes = {path.name: path.stat() for path in (tmp_path / "metrics").iterdir()}
        assert all(s.st_blocks * 512 >= s.st_size == 64 * 1024 for s in sizes.values())
        for life in (1, 2):
            count_as(tmp_path, "front-0")
            metrics = Metrics()
            metrics.requests.labels("m", "ok").inc()
            metrics.inside.labels("m").set(5)
            assert (
                f'vignette_requests_total{{model="m",outcome="ok"}} {life}.0'
                in metrics.render().decode()
            )
            assert 'vignette_requests_inside{model="m"} 5.0' in metrics.render().decode()
            forget_gauges(tmp_path, "front-0")
            assert 'vignette_requests_inside{model="m"} 5.0' not in metrics.render().decode()
        assert {path.name for path in (tmp_path / "metrics").iterdir()} == set(sizes)
    finally:
        values.ValueClass = before


def test_only_what_counts_by_key_has_room_for_keys(tmp_path):
    make_files(tmp_path, ["front-0"], ["worker-0"], keys=100)
    large = [f.name for f in (tmp_path / "metrics").iterdir() if f.stat().st_size > 64 * 1024]
    assert large == ["counter_front-0.db"]


def test_full_shared_memory_is_a_message(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSharedMemory, match="MiB of metrics"):
        make_files(tmp_path, ["front-0"], [])
    with pytest.raises(NoSharedMemory, match="--shm-size"):
        PixelStore(tmp_path / "p", 4, (3, 8, 8), create=True)


def test_both_ends_of_a_store_see_the_same_bytes(tmp_path):
    mine = PixelStore(tmp_path / "x", 2, (3, 8, 8), create=True)
    theirs = PixelStore(tmp_path / "x", 2, (3, 8, 8))
    slot = mine.take()
    mine[slot][:] = 7
    assert (theirs[slot] == 7).all()
    mine.give_back(slot)
    assert sorted([mine.take(), mine.take()]) == [0, 1]
    assert np.asarray(theirs[1]).dtype == np.uint8
