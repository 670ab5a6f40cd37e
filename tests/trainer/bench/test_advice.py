"""What `alexnet-bench train` concludes from its numbers."""

from dataclasses import replace

import pytest

from trainer.bench.advice import Diagnosis, Readings, diagnose

GIB = 2**30
BALANCED_GPU = Readings(
    feed=10_000,
    step=10_000,
    together=9_800,
    data_wait_fraction=0.01,
    decode_limit=14_000,
    on_gpu=True,
    precision="float32",
    encoding="jpeg",
    decode="mixed",
    threads_per_rank=8,
    num_cores=16,
    num_ranks=2,
    num_gpus_visible=2,
    raw_bytes=234 * GIB,
)


def given(**changes: object) -> Diagnosis:
    return diagnose(replace(BALANCED_GPU, **changes))


@pytest.mark.parametrize(
    ("feed", "step", "together", "limit"),
    [
        (13_000, 10_000, 9_900, "step"),
        (10_000, 10_000, 9_100, "step"),
        (13_000, 10_000, 10_400, "step"),  # faster together than alone is noise
        (5_000, 10_000, 4_900, "feeding"),
        (9_999, 10_000, 9_500, "feeding"),
        (5_000, 10_000, 4_400, "overlap"),
        (10_000, 5_000, 4_400, "overlap"),
        (2_000, 2_000, 1_000, "overlap"),
    ],
)
def test_the_slower_one_limits_unless_both_together_are_well_below_it(feed, step, together, limit):
    assert given(feed=feed, step=step, together=together).limit == limit


def test_a_limiting_step_says_what_the_loader_gives_and_asks_for_bf16_and_more_gpus():
    found = given(feed=13_000, together=9_900, num_ranks=1)
    assert "the loader gives 1.30x of what the step takes" in found.finding and "1% of the time" in found.finding
    assert found.advice == ("try --set precision=bf16", "more GPUs are visible: --gpus 2")
    assert "bf16" not in " ".join(given(feed=13_000, together=9_900, precision="bf16").advice)


def test_a_limiting_step_on_the_cpu_asks_for_a_gpu_and_not_for_bf16():
    on_cpu = {"feed": 2_000, "step": 40, "together": 39, "on_gpu": False, "num_ranks": 1, "decode": "cpu"}
    assert given(**on_cpu, num_gpus_visible=0).advice[0].startswith("the network runs on the CPU: a GPU")
    assert given(**on_cpu).advice == ("more GPUs are visible: --gpus 2",)


SLOW_FEED = {"feed": 5_000, "together": 4_950}


def test_idle_cores_are_offered_to_the_decoder_first():
    found = given(**SLOW_FEED, threads_per_rank=2)
    assert found.advice[0] == "more threads: 2 x 2 of 16 cores decode; --threads 8"
    assert "--threads" not in " ".join(given(**SLOW_FEED).advice)


@pytest.mark.parametrize("decode", ["mixed", "cpu"])
def test_decoding_on_one_device_leads_to_decoding_on_both(decode):
    assert f"(now {decode}): --decode hybrid" in given(**SLOW_FEED, decode=decode).advice[0]


def test_hybrid_decoding_is_not_advised_where_it_runs_or_cannot():
    assert "hybrid" not in " ".join(given(**SLOW_FEED, decode="hybrid").advice)
    assert "hybrid" not in " ".join(given(**SLOW_FEED, on_gpu=False, decode="cpu").advice)


def test_decoded_images_are_kept_where_a_gpu_decodes_and_lie_on_the_disk_elsewhere():
    advice = " ".join(given(**SLOW_FEED, raw_bytes=2 * GIB).advice)
    assert "--cache-gib 2.0 keeps all decoded images in the GPU's memory" in advice
    on_cpu = " ".join(given(**SLOW_FEED, decode="cpu").advice)
    assert "--cache-gib" not in on_cpu and "234.0 GiB of disk, alexnet-prep shard --encoding raw" in on_cpu


def test_the_disk_is_suspected_when_the_loader_stays_far_from_decoding_alone():
    on_cpu = {"feed": 1_000, "together": 990, "on_gpu": False, "decode": "cpu"}
    assert "alexnet-prep doctor" in given(**on_cpu, decode_limit=4_000).advice[-1]
    near = given(**on_cpu, decode_limit=1_200)
    assert "83% of decoding alone, so leave decoding out" in near.advice[0]
    assert "doctor" not in " ".join(near.advice)


@pytest.mark.parametrize(("decode_limit", "words"), [(20_000, "doctor"), (5_500, "a faster disk")])
def test_raw_shards_lead_to_the_disk_and_not_to_raw_shards(decode_limit, words):
    found = given(**SLOW_FEED, encoding="raw", decode_limit=decode_limit)
    assert words in found.advice[-1] and "--encoding" not in " ".join(found.advice)


def test_overlap_on_a_gpu_leads_to_what_is_shared():
    lost = {"feed": 10_000, "step": 10_000, "together": 6_000}
    assert given(**lost).advice == (
        "decoding (mixed) and step share the GPU: compare with --decode cpu",
        "2 x 8 decoding threads leave none of 16 cores to the ranks themselves: --threads 7",
    )
    assert "torch.profiler" in given(**lost, decode="cpu", threads_per_rank=6).advice[0]
    assert "60% of the slower one" in given(**lost).finding


@pytest.mark.parametrize(
    ("feed", "step", "words", "absent"),
    [
        (900, 100, "feeding takes 10%: shorten the step", "raw"),
        (100, 900, "feeding takes 90%: shorten feeding", "a GPU"),
        (100, 100, "feeding takes 50%: shorten both", "nothing is absent"),
    ],
)
def test_overlap_on_the_cpu_leads_to_the_part_that_takes_most_of_an_images_time(feed, step, words, absent):
    both = 1 / (1 / feed + 1 / step)
    on_cpu = {"on_gpu": False, "decode": "cpu", "num_ranks": 1, "num_gpus_visible": 0}
    found = given(feed=feed, step=step, together=min(both, 0.8 * min(feed, step)), **on_cpu)
    assert found.limit == "overlap" and "same 16 cores" in found.finding
    assert words in found.advice[0] and absent not in " ".join(found.advice)


def test_there_is_always_something_to_change():
    for on_gpu in (True, False):
        for encoding in ("jpeg", "raw"):
            for decode in ("cpu", "mixed", "hybrid"):
                for rates in ((1, 2, 1), (2, 1, 1), (1, 1, 0.5), (1, 9, 0.5), (9, 1, 0.5)):
                    feed, step, together = (1000 * rate for rate in rates)
                    for limit in (800, 1_000, 100_000):
                        for gpus in (0, 2):
                            found = given(
                                feed=feed, step=step, together=together, decode_limit=limit, on_gpu=on_gpu,
                                encoding=encoding, decode=decode, num_gpus_visible=gpus, precision="bf16",
                            )  # fmt: skip
                            assert found.advice and all("\n" not in line for line in (found.finding, *found.advice))
