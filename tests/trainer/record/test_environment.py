"""The record of the surroundings says what is needed to judge a number, and nothing of who made it."""

import json
import platform
import re
import shutil
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.record import environment as module
from trainer.record.environment import environment

ROOT = Path(__file__).resolve().parents[3]


def test_the_record_is_json_and_names_versions_hardware_command_and_time(monkeypatch):
    monkeypatch.setattr("sys.argv", ["alexnet-train", "--name", "two words"])
    record = json.loads(json.dumps(environment(), allow_nan=False))
    assert record["python"] == platform.python_version()
    assert record["torch"] == torch.__version__
    assert re.match(r"\d+\.\d+", record["dali"])
    assert re.match(r"\d+\.\d+", record["numpy"])
    assert record["command"] == "alexnet-train --name 'two words'"
    assert record["num_cores"] >= 1
    assert record["memory_bytes"] > 2**28
    assert len(record["gpus"]) == torch.cuda.device_count()
    started = datetime.fromisoformat(record["started"])
    assert started.utcoffset() == timedelta(0)
    assert datetime(2025, 1, 1, tzinfo=UTC) < started


def test_no_host_name_is_recorded(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    record = environment()
    assert "secret-host" not in str(record)
    assert not {"host", "hostname", "node", "user"} & record.keys()


def test_the_commit_of_a_checkout_is_recorded():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout, or no git here")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip(f"git does not read this checkout: {head.stderr.strip()}")
    assert environment()["git_commit"].removesuffix("-dirty") == head.stdout.strip()


def test_a_machine_without_git_or_the_packages_is_recorded_with_gaps(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_version", lambda _name: None)
    record = environment()
    assert record["git_commit"] is None
    assert record["dali"] is None


def test_a_program_that_fails_or_is_not_there_gives_nothing(tmp_path):
    assert module._output("false") is None
    assert module._output(str(tmp_path / "missing")) is None
    assert module._output("echo", "yes") == "yes"


def test_gpus_are_named_with_their_memory_and_driver(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = SimpleNamespace(name="GTX 580", total_memory=3 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: gpu)
    record = environment()
    assert record["gpus"] == [{"name": "GTX 580", "memory_bytes": 3 * 2**30}] * 2
    assert record["gpu_driver"] == "580.1"
