"""The file of what was measured on a device: unusable ones are named once and ignored."""

import json
import multiprocessing
import os
import stat

import pytest

from lorasb_kernels.ops.triton import route_files
from lorasb_kernels.ops.triton.route_files import DeviceFile, RouteFile, read_routes
from tests.ops.triton.routes import MEASURED_ON, device_file, entry


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    monkeypatch.setattr(route_files, "_SAID", set())


def content(**changes) -> str:
    whole = json.loads(RouteFile("sm_86", MEASURED_ON, {"a": entry(two_call=2.0)}).text())
    return json.dumps({**whole, **changes})


def test_what_is_kept_is_read():
    kept, found = device_file(), {"a": entry(two_call=2.0, fused=1.0)}
    assert kept.read() == {}
    assert kept.add(found) == found
    assert device_file().read() == found
    assert kept.path.name.startswith("nvidia-rtx-a6000-")


def test_the_first_measurement_stands_unless_it_is_replaced():
    kept, first, second = device_file(), entry(two_call=1.0), entry(two_call=9.0)
    kept.add({"a": first})
    assert kept.add({"a": second, "b": second}) == {"a": first, "b": second}
    assert kept.read() == {"a": first, "b": second}
    assert kept.add({"a": second}, replace=True) == {"a": second}
    assert kept.read()["a"] == second


def test_every_version_has_a_file_of_its_own():
    paths = {route_files.file_path({**MEASURED_ON, name: "other"}) for name in MEASURED_ON}
    assert len(paths | {route_files.file_path(MEASURED_ON)}) == 1 + len(MEASURED_ON)


ROUTE = {"two_call": {"microseconds": 1, "tile": {"num_warps": 4}}}
TILE = {"num_warps": 4, "num_stages": 3, "BLOCK_M": 100, "BLOCK_N": 64, "BLOCK_K": 32}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a file of measured routes"),
        ("[]", "not a file of measured routes"),
        (content()[:-40], "not a file of measured routes"),
        ("[" * 100_000, "not a file of measured routes"),
        (b"\xff\xfe\x00", "not a file of measured routes"),
        (content(format=2), "format is 2; expected 3"),
        (content(measured_on={**MEASURED_ON, "driver": "1.1"}), "driver 1.1"),
        (content(measured_on={**MEASURED_ON, "device": "NVIDIA L40S"}), "device NVIDIA L40S"),
        (content(arch="sm_90"), "was measured on"),
        (content(expand={"a": {}}), "not a file of measured routes"),
        (content(expand={"a": {"date": "", "rows": 1, "routes": ROUTE}}), "not a file of"),
        (
            content(expand={"a": {"date": "", "rows": 1, "routes": {"guess": ROUTE["two_call"]}}}),
            "a route is 'guess'",
        ),
        (
            content(
                expand={
                    "a": {
                        "date": "",
                        "rows": 1,
                        "routes": {"two_call": {"microseconds": 1, "tile": TILE}},
                    }
                }
            ),
            "BLOCK_M of a tile is 100; expected a power of two",
        ),
        (content(expand={"a": {"date": "", "rows": 1, "routes": {}}}), "expected two_call among"),
    ],
)
def test_a_stale_foreign_or_damaged_file_is_named_once_and_replaced(text, reason, caplog):
    kept, found = device_file(), {"b": entry(two_call=3.0)}
    kept.path.parent.mkdir(parents=True)
    kept.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert [kept.read(), kept.read()] == [{}, {}]
    (message,) = (record.message for record in caplog.records)
    assert "measured routes are ignored" in message
    assert str(kept.path) in message
    assert reason in message
    assert kept.add(found) == found
    assert read_routes(kept.path).expand == found
    assert len(caplog.records) == 1


def test_a_folder_in_place_of_the_file_is_named_once(caplog):
    kept, found = device_file(), {"b": entry(two_call=3.0)}
    kept.path.mkdir(parents=True)
    assert kept.read() == {}
    assert kept.add(found) == kept.add(found) == found
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2, messages
    assert "ignored" in messages[0]
    assert "used but not kept" in messages[1]


@pytest.mark.parametrize("obstacle", ["a file in place of the folder", "no permission"])
def test_a_folder_that_cannot_be_written_is_named_once(obstacle, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "locked"
    monkeypatch.setenv("LORASB_CACHE", str(folder))
    if obstacle == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.mkdir()
        folder.chmod(stat.S_IREAD | stat.S_IEXEC)
    else:
        folder.write_text("not a folder")
    kept, found = device_file(), {"a": entry(two_call=3.0)}
    assert kept.read() == {}
    assert kept.add(found) == kept.add(found) == found
    kept_not = [r.message for r in caplog.records if "used but not kept" in r.message]
    assert len(kept_not) == 1
    assert str(folder) in kept_not[0]


def test_a_user_without_a_home_folder_keeps_it_in_the_temporary_one(monkeypatch):
    monkeypatch.delenv("LORASB_CACHE")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(route_files, "cache_folder", no_home)
    assert f"lorasb-{os.getuid()}" in str(route_files.file_path(MEASURED_ON))


def test_a_file_system_without_locks_loses_nothing_of_a_single_process(monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(route_files.fcntl, "flock", no_locks)
    kept = DeviceFile(device_file().path, "sm_86", MEASURED_ON)
    kept.add({"a": entry(two_call=1.0)})
    kept.add({"b": entry(two_call=2.0)})
    assert set(kept.read()) == {"a", "b"}


def keep_many(name: str, count: int) -> None:
    for i in range(count):
        device_file().add({f"{name} {i}": entry(two_call=1.0)})


def test_processes_that_write_at_once_lose_nothing():
    fork = multiprocessing.get_context("fork")  # they only write files
    writers = [fork.Process(target=keep_many, args=(name, 25)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(device_file().read()) == 75
