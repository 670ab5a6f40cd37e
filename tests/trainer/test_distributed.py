"""What ranks agree on: that they are alike, and sums that do not depend on how the batch was cut."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.common.errors import UserError
from trainer import distributed
from trainer.distributed import Ranks, check_alike, choose_meeting, describe_software, launch_id, restart_count
from trainer.evaluate import count_errors

TWO = Ranks(0, 2, torch.device("cpu"))


def test_the_mistakes_of_slices_add_up_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 10, generator=generator), torch.randint(10, (50,), generator=generator)
    parts = sum(count_errors(logits[i::3], labels[i::3]) for i in range(3))
    torch.testing.assert_close(parts, count_errors(logits, labels), rtol=1e-6, atol=0)


def test_what_differs_between_ranks_is_named_with_both_values(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda facts, _: [facts, {**facts, "--seed": "1"}])
    with pytest.raises(
        UserError, match="ranks differ in --seed: rank 0 has 0, rank 1 has 1; give all machines the same"
    ):
        check_alike({"shards": "a", "--seed": "0"}, TWO)
    monkeypatch.setattr(distributed, "gather", lambda facts, _: [facts, dict(facts)])
    check_alike({"shards": "a", "--seed": "0"}, TWO)


def test_the_software_is_told_by_its_code_and_versions():
    facts = describe_software()
    assert facts["torch"] == torch.__version__ and facts == describe_software()
    assert len(facts["the code of alexnet-dali (SHA-256)"]) == 12


def test_restarts_are_counted_by_whichever_launcher_there_is(monkeypatch):
    for name in (distributed.RESTART, distributed.LAUNCH_ID, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert restart_count() == 0 and launch_id() is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert restart_count() == 2 and launch_id() == "job"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default: every job's
    assert launch_id() not in ("none", None) and launch_id() == launch_id()
    monkeypatch.setenv(distributed.LAUNCH_ID, "ours")
    assert launch_id() == "ours"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_that_are_started_again_meet_by_another_name_in_the_store_of_those_before(order):
    store = torch.distributed.HashStore()
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as ranks:
            found = {future.result() for future in [ranks.submit(choose_meeting, store, rank, 3) for rank in order]}
        assert len(found) == 1
        names += found
    store.set("word/1", "of one that died")
    with ThreadPoolExecutor(2) as ranks:
        found = {future.result() for future in [ranks.submit(choose_meeting, store, rank, 2) for rank in (0, 1)]}
    assert len({*names, *found}) == 4
