"""The model by which `--parallel auto` chooses: bytes of the paper's net by hand, and what follows from the link."""

from dataclasses import replace

import pytest

from pipeline.common.errors import UserError
from trainer.commands.options import choose_parallel
from trainer.interconnect import (
    NETWORK,
    NVLINK,
    PCIE4,
    PCIE5,
    Device,
    Link,
    choose,
    find_link,
    has_nvlink,
    predict_rate,
    predict_traffic,
)
from trainer.parallel import DATA, MODES, Parallel
from trainer.recipe import RECIPES

PAPER = RECIPES["paper"]
NUM_WEIGHTS, NUM_CONV = 60_965_224, 2_334_080


def test_bytes_of_the_papers_net_at_batch_128_on_two_ranks_are_those_counted_by_hand():
    data, columns, hybrid = (predict_traffic(mode, PAPER, 1000, 2) for mode in MODES)
    assert data.sent_bytes == {"parameters": 4 * NUM_WEIGHTS, "activations": 0, "input": 0}
    conv3, fc6, fc7, fc8 = 128 * 128 * 13 * 13, 128 * 128 * 36, 128 * 2048, 64 * 1000  # what the other tower needs
    assert columns.sent_bytes["activations"] == 2 * 4 * (conv3 + fc6 + fc7 + fc8)
    assert columns.sent_bytes["input"] == 64 * (224 * 224 * 3 + 12) and columns.sent_bytes["parameters"] == 0
    assert hybrid.sent_bytes["parameters"] == 4 * NUM_CONV and hybrid.sent_bytes["input"] == 0
    assert hybrid.sent_bytes["activations"] == 2 * 4 * (64 * 9216 + fc7 + fc8)


def test_data_parallel_sends_twice_the_weights_however_many_ranks():
    for num_ranks in (2, 8, 64):
        sent = predict_traffic("data", replace(PAPER, global_batch_size=64), 1000, num_ranks).sent_bytes["parameters"]
        assert sent == pytest.approx(2 * (num_ranks - 1) / num_ranks * 4 * NUM_WEIGHTS)


def test_a_link_without_cost_leaves_the_update_alone_and_a_slow_one_costs_what_it_takes():
    free, device = Link("free", 1e30, 0.0), Device(images_per_s=1000.0, memory_bytes_per_s=1e30)
    assert all(predict_rate(mode, PAPER, 1000, 2, free, device) == pytest.approx(2000) for mode in MODES)
    slow = Link("slow", 1e6 / 0.8, 0.0)  # a megabyte a second, as reached
    for mode in ("columns", "hybrid"):
        sent = sum(predict_traffic(mode, PAPER, 1000, 2).sent_bytes.values())
        expected = 128 / (128 / 2000 + sent / 1e6)
        assert predict_rate(mode, PAPER, 1000, 2, slow, device) == pytest.approx(expected)


def test_gradients_hide_behind_the_backward_pass_until_they_take_longer():
    device = Device(images_per_s=1000.0, memory_bytes_per_s=1e30)
    hidden, behind_s = Link("fast", 1e10 / 0.8, 0.0), 0.6 * 64 / 1000
    large, last = 4 * (NUM_WEIGHTS - NUM_CONV), 4 * NUM_CONV
    assert large / 1e10 < behind_s
    assert predict_rate("data", PAPER, 1000, 2, hidden, device) == pytest.approx(128 / (0.064 + last / 1e10))
    slow = Link("slow", 1e9 / 0.8, 0.0)
    expected = 128 / (0.064 + last / 1e9 + large / 1e9 - behind_s)
    assert predict_rate("data", PAPER, 1000, 2, slow, device) == pytest.approx(expected)


def test_the_fastest_mode_is_chosen_and_its_reason_told():
    mode, why = choose(PAPER, 1000, 2, PCIE4, Device())
    rates = {mode: predict_rate(mode, PAPER, 1000, 2, PCIE4, Device()) for mode in MODES}
    assert mode == max(rates, key=rates.get) != "data"
    assert "2 ranks over PCIe 4 x16 and batches of 128" in why
    assert all(f"{mode} {rate:,.0f}" in why for mode, rate in rates.items())
    narrow = replace(PAPER, width=1 / 16)  # few weights, as many pixels
    assert choose(narrow, 1000, 2, PCIE4, Device())[0] == "data"
    assert "columns" not in choose(PAPER, 1000, 4, NVLINK, Device())[1]
    with pytest.raises(UserError, match="multiple of the 3 ranks"):
        choose(PAPER, 1000, 3, NVLINK, Device())


TOPOLOGY = """\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity
GPU0\t X \t{link}\t0-15\t0
GPU1\t{link}\t X \t0-15\t0

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.mark.parametrize(("link", "expected"), [("NV18", True), ("NV4", True), ("PHB", False), ("SYS", False)])
def test_nvlink_is_read_off_the_drivers_matrix(link, expected):
    assert has_nvlink(TOPOLOGY.format(link=link)) is expected
    assert not has_nvlink("")


@pytest.mark.parametrize(
    ("topology", "generation", "link"),
    [("NV4", "5", NVLINK), ("PHB", "5\n5", PCIE5), ("PHB", "5\n4", PCIE4), ("PHB", "", PCIE4)],
)
def test_the_link_is_what_the_driver_says(monkeypatch, topology, generation, link):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    answers = {"topo": TOPOLOGY.format(link=topology), "--query-gpu=pcie.link.gen.max": generation}
    monkeypatch.setattr("trainer.interconnect._ask", lambda _, what, *__: answers[what])
    assert find_link(True, 2) == link
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_link(True, 4) == NETWORK and find_link(True, 2) == link


def choose_mode(world_size, asked=None, saved=None, recipe=PAPER) -> Parallel:
    return choose_parallel(recipe, 1000, world_size, use_gpu=False, asked=asked or {}, saved=saved or {})


def test_what_is_asked_for_goes_before_what_the_run_had_and_that_before_the_default(capsys):
    assert choose_mode(2) == DATA == choose_mode(1, {"mode": "columns"})
    saved = {"mode": "hybrid", "gradients": "bf16"}
    assert choose_mode(2, saved=saved) == Parallel("hybrid", gradients="bf16")
    assert choose_mode(2, {"mode": "columns"}, saved) == Parallel("columns", gradients="bf16")
    assert choose_mode(2, {"mode": "auto"}).mode in MODES
    assert "--parallel auto takes" in capsys.readouterr().err


def test_a_mode_that_the_ranks_do_not_allow_is_refused_if_asked_for_and_left_if_not(capsys):
    with pytest.raises(UserError, match="4 ranks, expected 2"):
        choose_mode(4, {"mode": "columns"})
    assert choose_mode(4, saved={"mode": "columns"}) == DATA
    assert "the run had --parallel columns, this one has data" in capsys.readouterr().err
