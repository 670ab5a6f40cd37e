"""Resuming: the same remaining batches after a restart, and the states that are refused."""

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.operators import load_operators
from pipeline.shards import ShardSet
from tests.pipeline.loader.loading import advance, name_keys, read_keys, record


@pytest.mark.parametrize(
    ("num_batches", "epoch", "step"),
    [(0, 1, 0), (1, 1, 1), (7, 1, 7), (8, 2, 0), (11, 2, 3), (15, 2, 7), (16, 3, 0), (20, 3, 4)],
)
def test_a_restored_loader_gives_the_same_remaining_batches_and_epochs(make_train, num_batches, epoch, step):
    loader, restored = make_train(), make_train()
    advance(loader, num_batches)
    state = loader.state_dict()
    restored.load_state_dict(state)
    assert (restored.epoch, restored.step) == (epoch, step)
    expected = [record(loader) for _ in range(3)]
    assert [len(batches) for batches in expected] == [8 - step, 8, 8]
    assert [record(restored) for _ in range(3)] == expected


@pytest.mark.parametrize(
    "options",
    [{"decode": "mixed"}, {"decode": "hybrid", "host_share": 0.4}, {"raw": True}, {"size_px": 227, "channels": 4}],
    ids=str,
)
@pytest.mark.parametrize("operators", ["", "stock"], ids=["own operators", "DALI's"])
@pytest.mark.parametrize("num_batches", [3, 6, 16])
def test_every_way_to_the_pixels_resumes_to_the_same_bits(
    make_train, raw_shards, monkeypatch, operators, options, num_batches
):
    monkeypatch.setenv("ALEXNET_OPERATORS", operators)
    options = {"global_batch_size": 10, **options}
    if options.pop("raw", False):
        options["shards"] = raw_shards
    loader, restored = make_train(**options), make_train(**{**options, "num_threads": 1, "prefetch_batches": 1})
    advance(loader, num_batches)
    restored.load_state_dict(loader.state_dict())
    for _ in range(2):
        assert record(restored) == record(loader)


def test_how_hybrid_decoding_is_shared_and_how_many_threads_there_are_may_change_on_resuming(make_train):
    loader = make_train(decode="hybrid", host_share=0.25)
    restored = make_train(decode="hybrid", host_share=0.75, hw_decoder_load=0.2, num_threads=1)
    advance(loader, 5)
    restored.load_state_dict(loader.state_dict())
    assert record(restored) == record(loader)


@pytest.mark.parametrize("form", [{"dtype": "uint8", "layout": "NHWC"}, {"layout": "NHWC"}], ids=str)
def test_what_a_batch_is_kept_as_may_change_on_resuming(make_train, form):
    if form.get("dtype") and not load_operators():
        pytest.skip("DALI's own operators for uint8 are others, which its checkpoint tells apart")
    loader, restored = make_train(), make_train(**form)
    advance(loader, 5)
    restored.load_state_dict(loader.state_dict())
    for _ in loader:
        next(iter(restored))
        assert all(torch.equal(a, b) for a, b in zip(restored.draws, loader.draws, strict=True))


@pytest.mark.parametrize("global_batch_size", [8, 10], ids=["no remainder", "with a remainder"])
def test_a_state_taken_inside_the_loop_at_the_last_batch_resumes_at_the_next_epoch(make_train, global_batch_size):
    loader = make_train(global_batch_size=global_batch_size)
    restored = make_train(global_batch_size=global_batch_size)
    states = [loader.state_dict() for _ in itertools.chain(loader, loader)]
    assert (states[-1]["epoch"], states[-1]["step"]) == (2, len(loader))
    restored.load_state_dict(states[-1])
    assert (restored.epoch, restored.step) == (2, len(loader))  # and the next loop begins epoch 3
    for _ in range(2):
        assert record(restored) == record(loader)


def test_taking_states_does_not_change_the_batches(make_train):
    loader, undisturbed = make_train(), make_train()
    keys = []
    for _ in loader:
        loader.state_dict()
        keys.append(name_keys(loader))
    assert keys == read_keys(undisturbed)


def test_each_rank_resumes_from_its_own_state_with_a_remainder(make_train):
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "global_batch_size": 10}
        loader, restored = make_train(**options), make_train(**options)
        advance(loader, 8)
        restored.load_state_dict(loader.state_dict())
        for _ in range(2):
            assert record(restored) == record(loader)


def test_a_loader_that_has_run_can_be_set_back(make_train):
    loader = make_train()
    advance(loader, 10)
    state = loader.state_dict()
    first = record(loader)
    record(loader)
    loader.load_state_dict(state)
    assert record(loader) == first


def test_a_restored_loader_saves_a_state_that_restores(make_train):
    loader, second, third = make_train(), make_train(), make_train()
    advance(loader, 10)
    second.load_state_dict(loader.state_dict())
    advance(second, 3)
    third.load_state_dict(second.state_dict())
    advance(loader, 3)
    assert record(third) == record(second) == record(loader)


def test_a_state_survives_json_and_a_weights_only_load(make_train):
    loader = make_train()
    advance(loader, 11)
    state = loader.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state
    restored = make_train()
    restored.load_state_dict(json.loads(json.dumps(state)))
    assert record(restored) == record(loader)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 6}),
        ("global batch size", {"global_batch_size": 16}),
        ("world size", {"world_size": 2}),
        ("rank", {"world_size": 2, "rank": 1}),
        ("transform", {"flip": False}),
        ("transform", {"unit_variance": True}),
        ("decoder", {"decode": "hybrid", "host_share": 0.5}),
        ("decoder", {"decode": "mixed"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(reversed(value)),
)
def test_a_state_of_another_run_is_refused_by_what_differs(make_train, name, options):
    state = make_train(**({"world_size": 2} if name == "rank" else {})).state_dict()
    other = make_train(**options)
    with pytest.raises(UserError, match=f"^the loader's state was saved with {name} .*, this one has "):
        other.load_state_dict(state)
    assert (other.epoch, other.step, len(list(other))) == (1, 0, len(other))  # and the loader is as it was


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"signature": "x"}, "not the state of a loader .JSONDecodeError: Expecting value"),
        ({"signature": "3"}, "not the state of a loader .TypeError"),
        ({"dali": "zz"}, "not the state of a loader .ValueError: non-hexadecimal"),
        ({"dali": "00"}, "DALI cannot go on from the loader's state .*; resume from another checkpoint"),
        ({"step": 9}, "not the state of a loader .ValueError: step 9 of epoch 1.*expected what state_dict.. gave"),
        ({"epoch": 0}, "not the state of a loader .ValueError: step 0 of epoch 0"),
    ],
)
def test_what_is_no_state_is_refused_and_the_loader_goes_on_as_it_was(make_train, damage, message):
    loader, undisturbed = make_train(), make_train()
    state = loader.state_dict()
    for each in (loader, undisturbed):
        advance(each, 3)
    for other in ({**state, **damage}, {}, None):
        with pytest.raises(UserError, match=message if other and damage else "not the state of a loader"):
            loader.load_state_dict(other)
    assert record(loader) == record(undisturbed)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("DALI version", "install that version of nvidia-dali-cuda120"),
        ("graph", "go on with the version of alexnet-dali that saved it"),
        ("device", "resume with the same settings"),
    ],
)
def test_a_state_of_another_dali_graph_or_device_is_refused(make_train, name, remedy):
    loader = make_train()
    state = loader.state_dict()
    signature = json.loads(state["signature"])
    signature[name] = "another"
    with pytest.raises(UserError, match=f"saved with {name} another, this one has .*; {remedy}, or start"):
        loader.load_state_dict({**state, "signature": json.dumps(signature)})
    del signature[name]  # a state from before it was written down
    with pytest.raises(UserError, match=f"saved with {name} None"):
        loader.load_state_dict({**state, "signature": json.dumps(signature)})


def test_a_state_of_other_shards_is_refused(make_train, shards):
    first, *others = shards.manifest.shards
    changed = ShardSet(shards.root, replace(shards.manifest, shards=(replace(first, sha256="0" * 64), *others)))
    with pytest.raises(UserError, match=f"saved with shards {shards.fingerprint}"):
        make_train(shards=changed).load_state_dict(make_train().state_dict())
