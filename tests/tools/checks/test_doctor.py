"""`alexnet-prep doctor`: machines that nobody has at hand are judged from made-up facts, this one from its own."""

import copy
import json
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tools.checks import doctor, facts
from tools.checks.doctor import Check, judge, spell
from tools.cli import group

GIB = 1 << 30
H100 = {"name": "NVIDIA H100", "memory_bytes": 80 * GIB, "compute_capability": "9.0"}
HEALTHY = {
    "platform": {"system": "Linux", "machine": "x86_64", "python": (3, 11, 7)},
    "cpu": {"model": "Xeon", "cores": 32, "flags": ["avx2", "avx512f"]},
    "memory": {"total_bytes": 256 * GIB, "available_bytes": 200 * GIB},
    "shm_bytes": 128 * GIB,
    "open_files": 65536,
    "driver": {"version": "550.54.15", "cuda": "12.4", "gpus": [H100, H100]},
    "hidden_by": None,
    "torch": {
        "version": "2.13.0", "cuda": "12.8", "cudnn": 91000, "nccl": "2.27.3",
        "gpus": [{**H100, "error": None}, {**H100, "error": None}],
    },
    "dali": {
        "version": "2.4.0", "nvimgcodec": "0.9.0", "extensions": ["jpeg_turbo", "nvjpeg"],
        "decoded": {"cpu": None, "mixed": None}, "fell_back": False, "operators": True,
        "hardware": True,
    },
    "extras": {"ray": [], "parquet": [], "s3": []},
    "shards": {
        "folder": "shards", "exists": True, "free_bytes": 500 * GIB, "num_shards": 267, "num_samples": 1_331_167,
        "total_bytes": 33 * GIB, "encoding": "jpeg",
        "speed": {"sequential_bytes": GIB // 2, "sequential_s": 0.25, "random_pieces": 512,
                  "random_bytes": 512 << 17, "random_s": 0.1, "direct": True},
    },
}  # fmt: skip


def judge_with(path: str, value: object) -> dict[str, Check]:
    """The checks of the healthy machine with one fact changed; `path` names it with dots."""
    facts = copy.deepcopy(HEALTHY)
    *parents, last = path.split(".")
    place = facts
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[int(last) if isinstance(place, list) else last] = value
    return {check.name: check for check in judge(facts)}


def test_all_is_well_on_a_machine_that_has_everything():
    checks = list(judge(HEALTHY))
    assert {check.state for check in checks} == {"ok"} and not any(check.remedy for check in checks)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    for name in ("gpu 1", "decoder mixed", "decoder hardware", "nccl", "disk", "/dev/shm", "open files", "extra s3"):
        assert name in names


@pytest.mark.parametrize(
    ("path", "value", "name", "state", "words"),
    [
        ("platform.machine", "aarch64", "platform", "problem", "Linux on x86-64"),
        ("platform.system", "Darwin", "platform", "problem", "Linux on x86-64"),
        ("platform.python", (3, 10, 1), "platform", "problem", "3.11 or newer"),
        ("cpu.flags", [], "cpu", "warning", "without AVX2"),
        ("memory.available_bytes", GIB, "memory", "warning", "less than 4.0 GiB"),
        ("shm_bytes", 64 << 20, "/dev/shm", "warning", "--shm-size=1g"),
        ("shm_bytes", None, "/dev/shm", "warning", "--shm-size=1g"),
        ("open_files", 256, "open files", "warning", "ulimit -n 523"),
        ("driver", {}, "driver", "warning", "training runs on the CPU"),
        ("driver", {"error": "Driver/library version mismatch"}, "driver", "warning", "reboot"),
        ("driver.version", "470.82.01", "driver", "problem", "driver 525 or newer"),
        ("torch.cuda", "13.0", "torch", "problem", "CUDA 13 needs driver 580 or newer"),
        ("torch.cuda", None, "torch", "problem", "install a CUDA build"),
        ("torch", {"error": "No module named 'torch'"}, "torch", "problem", "pip install torch"),
        ("torch.gpus", [], "gpu 1", "problem", "torch does not see it"),
        ("torch.gpus.1.error", "no kernel image", "gpu 1", "problem", "must know this GPU"),
        ("torch.nccl", None, "nccl", "problem", "several GPUs need it"),
        ("dali", {"error": "No module named 'nvidia'"}, "dali", "problem", "pip install nvidia-dali-cuda120"),
        ("dali.decoded.mixed", "nvjpeg failed", "decoder mixed", "problem", "reinstall"),
        ("dali.fell_back", True, "decoder mixed", "warning", "the GPU decodes nothing"),
        ("shards", {"folder": "s", "error": "no answer within 60 s"}, "shards", "problem", "--shards"),
        ("shards", {"folder": "s", "exists": False, "free_bytes": GIB}, "free space", "warning", "less than 5.0 GiB"),
        ("shards", {"folder": "s", "exists": False}, "shards", "warning", "alexnet-prep shard SOURCE --out s"),
        ("shards.colors_error", "color.json: missing", "colours", "warning", "training needs them"),
        ("shards.speed.sequential_s", 20.0, "disk", "warning", "then memory holds all shards"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_remedy(path, value, name, state, words):
    check = judge_with(path, value)[name]
    assert check.state == state and words in check.remedy
    assert "\n" not in check.found + check.remedy


def test_a_gpu_that_was_hidden_is_no_fault_of_torch():
    facts = copy.deepcopy(HEALTHY)
    facts["torch"]["gpus"], facts["hidden_by"] = [], ""
    checks = {check.name: check for check in judge(facts)}
    assert checks["gpu 0"].state == "warning" and "CUDA_VISIBLE_DEVICES" in checks["gpu 0"].remedy
    assert "problem" not in {check.state for check in checks.values()}


def test_a_machine_without_a_gpu_has_warnings_but_no_problem():
    facts = copy.deepcopy(HEALTHY)
    facts["driver"], facts["torch"] = (
        {},
        {"version": "2.13.0+cpu", "cuda": None, "cudnn": None, "nccl": None, "gpus": []},
    )
    facts["dali"] |= {"decoded": {"cpu": None}, "hardware": None}
    checks = list(judge(facts))
    assert [check.name for check in checks if check.state != "ok"] == ["driver"]
    assert not any(check.name.startswith("gpu") or "hardware" in check.name for check in checks)


def test_a_slow_disk_is_forgiven_in_memory_and_little_data_is_not_judged():
    facts = copy.deepcopy(HEALTHY)
    facts["shards"]["speed"]["sequential_s"] = 20.0
    facts["memory"]["available_bytes"] = 40 * GIB
    assert {check.name: check for check in judge(facts)}["disk"].remedy.endswith("copy the shards to a local SSD")
    facts["shards"]["speed"]["sequential_bytes"] = 1 << 20
    disk = {check.name: check for check in judge(facts)}["disk"]
    assert disk.state == "ok" and "too little to judge by" in disk.found


def test_missing_extras_are_mentioned_with_the_command_and_are_not_a_warning():
    check = judge_with("extras.s3", ["s3fs"])["extra s3"]
    assert check.state == "ok" and "s3fs" in check.found and "pip install 'alexnet-dali[s3]'" in check.found


def test_operators_that_could_not_be_compiled_are_told_with_what_they_need():
    check = judge_with("dali.operators", False)["operators"]
    assert check.state == "ok" and "apt-get install g++" in check.found


def test_a_decoder_that_left_its_work_to_the_cpu_is_told_by_equal_bits():
    _, pixels = facts.make_jpeg()
    other = pixels.copy()
    other[3, 4, 1] ^= 1
    assert facts.fell_back(pixels, pixels.copy()) and not facts.fell_back(pixels, other)
    assert not facts.fell_back(pixels, "nvjpeg failed") and not facts.fell_back("no", "no")


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = dict(project["optional-dependencies"])
    for ours in ("dev", "docs"):
        del extras[ours]
    assert set(extras) <= set(facts.EXTRAS)
    for extra, wanted in extras.items():
        assert {requirement.split(">")[0].split("[")[0] for requirement in wanted} == set(facts.EXTRAS[extra])


def test_shards_behind_a_url_are_left_alone():
    checks = judge_with("shards", {"folder": "s3://bucket/shards"})
    assert checks["shards"].state == "ok" and "disk" not in checks and "free space" not in checks


def test_the_lines_of_nvidia_smi_are_read():
    out = "550.54.15, 81559, 9.0, NVIDIA H100 80GB HBM3\n550.54.15, [N/A], 12.1, NVIDIA GB10, odd name\n"
    told = facts.parse_smi(out)
    assert told["version"] == "550.54.15"
    assert told["gpus"][0] == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 81559 << 20,
        "compute_capability": "9.0",
    }
    assert told["gpus"][1]["memory_bytes"] is None and told["gpus"][1]["name"] == "NVIDIA GB10, odd name"
    assert "error" in facts.parse_smi("") and "error" in facts.parse_smi("No devices were found\n")


def test_nvidia_smi_is_asked_where_it_is_and_its_failure_told(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.find_driver() == {}
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    assert facts.find_driver() == {"error": "Driver/library version mismatch (status 18)"}
    program.write_text("#!/bin/sh\necho '580.1, 1024, 8.9, L4'\n")
    assert facts.find_driver()["gpus"] == [{"name": "L4", "memory_bytes": GIB, "compute_capability": "8.9"}]


def test_a_process_that_hangs_crashes_or_babbles_is_an_error_in_one_line(monkeypatch):
    forever = [sys.executable, "-c", "import signal; signal.pause()"]
    assert facts.run_program(forever, timeout_s=0.5) == ("", "no answer within 0 s")
    assert facts.run_program([sys.executable, "-c", "import no_such"])[1].startswith("ModuleNotFoundError: No module")
    assert "status -11" in facts.run_program([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])[1]
    assert facts.run_program(["/no/such/program"])[1] == "/no/such/program: No such file or directory"
    assert "KeyError" in facts.ask("no such facts")["error"]
    monkeypatch.setattr(facts, "run_program", lambda *_: ("hello", ""))
    assert "expected JSON" in facts.ask("torch")["error"]
    monkeypatch.setattr(facts, "run_program", lambda *_: ('chatter\n{"a": 1}\n', ""))
    assert facts.ask("torch") == {"a": 1}


def test_dali_decodes_a_jpeg_and_what_it_cannot_decode_is_told():
    jpeg, pixels = facts.make_jpeg()
    assert np.abs(facts._try_decoding("cpu", jpeg, pixels).astype(int) - pixels).mean() < 3
    assert "grey levels off" in str(facts._try_decoding("cpu", jpeg, 255 - pixels))
    assert "shape" in str(facts._try_decoding("cpu", jpeg, pixels[:32]))
    said = facts._try_decoding("cpu", jpeg[:100], pixels)
    assert isinstance(said, str) and "\n" not in said


class FakeClock:
    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.mark.parametrize("direct", [True, False])
def test_the_disk_is_read_to_the_end_and_at_random_places(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.setattr(facts, "_knows_direct", lambda _: False)
    files = []
    for number, size in enumerate((9 << 20, 4 << 20, 12_345, 0)):
        files.append(tmp_path / f"{number}.tar")
        files[-1].write_bytes(b"x" * size)
    speed = facts.measure(files, clock=FakeClock(0.001))
    assert speed.sequential_bytes == (13 << 20) + 12_345
    assert speed.random_pieces == 512 and 0 < speed.random_bytes <= 512 << 17
    assert direct or not speed.direct
    short = facts.measure(files, clock=FakeClock(1.0))
    assert short.sequential_bytes == 4 << 20 and short.random_pieces == 1  # the time was over
    with pytest.raises(ValueError, match="no bytes"):
        facts.measure(files[3:])


def run_doctor(*words: object) -> tuple[int, dict[str, dict]]:
    done = CliRunner().invoke(group, ["doctor", *map(str, words), "--json"], standalone_mode=False)
    told = json.loads(done.stdout)
    assert told["ok"] == (done.return_value == 0)
    return done.return_value, {check["name"]: check for check in told["checks"]}


def test_this_machine_passes_with_its_shards_examined(ready_shards):
    status, checks = run_doctor("--shards", ready_shards)
    assert status == 0, [check for check in checks.values() if check["state"] == "problem"]
    assert checks["decoder cpu"]["found"] == "decodes JPEG" and "jpeg_turbo" in checks["dali"]["found"]
    assert "88 images (jpeg) in 6 shards" in checks["shards"]["found"] and "MB/s" in checks["disk"]["found"]
    assert "colours" not in checks


def test_damaged_shards_are_a_problem_and_the_exit_status_says_so(shard_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(shard_dir, tmp_path / "shards")
    answers = {"dali": HEALTHY["dali"], "torch": HEALTHY["torch"]}  # the others are asked in earnest above
    really_ask = facts.ask
    monkeypatch.setattr(facts, "ask", lambda name, *args, **kw: answers.get(name) or really_ask(name, *args, **kw))
    status, checks = run_doctor("--shards", folder)
    assert status == 0 and checks["colours"]["state"] == "warning" and "alexnet-prep pca" in checks["colours"]["found"]
    (folder / "train-000001.tar").unlink()
    status, checks = run_doctor("--shards", folder)
    assert status == 1 and "train-000001.tar: missing" in checks["shards"]["found"]
    status, checks = run_doctor("--shards", tmp_path / "none")
    assert status == 0 and checks["shards"]["state"] == "warning"


def test_the_lines_for_people_show_state_name_and_remedy(monkeypatch):
    lines = [Check("cpu", "ok", "fast"), Check("driver", "problem", "old", "update it")]
    monkeypatch.setattr(doctor, "examine", lambda _: lines)
    done = CliRunner().invoke(group, ["doctor"], standalone_mode=False)
    assert done.return_value == 1
    assert done.stdout.splitlines() == ["ok       cpu     fast", "problem  driver  old", f"{'':17}-> update it"]


def test_on_a_terminal_long_lines_are_broken_between_words_and_else_never():
    found = "2.4.0, nvImageCodec 0.9.0 with jpeg_turbo, nvbmp, nvjpeg, nvjpeg2k, nvpnm, nvtiff, opencv, tiff"
    remedy = "install the driver of NVIDIA that this CUDA needs: 580 or newer, and start the machine again"
    check = Check("dali", "warning", found, remedy)
    whole = spell(check, 17, None)
    assert whole == [f"warning  {'dali':<17}  {found}", f"{'':28}-> {remedy}"]
    broken = spell(check, 17, 80)
    assert max(map(len, broken)) <= 80 and len(broken) == 4
    assert " ".join(line[28:] for line in broken) == f"{found} -> {remedy}"
    assert all(line.startswith(" " * 28) for line in broken[1:])
