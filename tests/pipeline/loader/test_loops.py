"""However a loop is left and come back to: every epoch has len(loader) steps, a sample is delivered or not consumed."""

import gc
import itertools
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.common.errors import UserError
from pipeline.loader import read_pixels
from pipeline.shards import ShardSet
from tests.pipeline.loader.loading import NUM_TRAIN, NUM_VAL, flatten, list_images, named, read_keys, record
from tests.pipeline.loader.test_faults import garble_one_image

ASKED = ("keys", "_read_number")  # by the test, of a batch that was delivered
TRACED = (str(Path(pipeline.__file__).parent), threading.__file__)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_loader_that_nobody_holds_is_gone_at_once_with_all_that_its_graph_holds(kind, make_train, make_eval):
    gc.disable()
    try:
        loader = make_train() if kind == "train" else make_eval(crops="ten", batch_size=8)
        list_images(loader)
        stream = loader._stream if kind == "train" else loader._idle
        held = [weakref.ref(one) for one in (loader, stream, stream._pipeline)]
        assert all(one() is not None for one in held)
        del loader, stream
        assert [one() for one in held] == [None, None, None]
    finally:
        gc.enable()


def take_islice(loader, num):
    return [loader.keys.tolist() for _ in itertools.islice(loader, num)]


def take_break(loader, num):
    taken = []
    for _ in loader:
        taken.append(loader.keys.tolist())
        if len(taken) == num:
            break
    return taken


def take_next(loader, num):
    batches = iter(loader)
    return [loader.keys.tolist() for _ in range(num) if next(batches)]


def take_one_iterator_each(loader, num):
    return [loader.keys.tolist() for _ in range(num) if next(iter(loader))]


def take_error(loader, num):
    taken = []
    with pytest.raises(RuntimeError, match="of the user's"):
        for _ in loader:
            taken.append(loader.keys.tolist())
            if len(taken) == num:
                raise RuntimeError("of the user's own")
    return taken


def take_in_a_thread(loader, num):
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(take_islice(loader, num)))
    thread.start()
    thread.join()
    return taken


WAYS = (take_islice, take_break, take_next, take_one_iterator_each, take_error, take_in_a_thread)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("come_back", WAYS)
@pytest.mark.parametrize("num", [1, 5, 8])
def test_a_training_loop_that_is_left_is_gone_on_with_whichever_way(make_train, leave, come_back, num):
    loader, undisturbed = make_train(), make_train()
    expected = [[keys for keys in (undisturbed.keys.tolist() for _ in undisturbed)] for _ in range(2)]
    taken = leave(loader, num)
    assert (loader.epoch, loader.step) == (1, num)
    if num < 8:
        taken += come_back(loader, 8 - num)
    assert taken == expected[0]
    assert (loader.epoch, loader.step) == (1, 8)
    assert come_back(loader, 8) == expected[1] and loader.epoch == 2


def test_bounded_loops_have_as_many_batches_in_each_epoch(make_train):
    loader = make_train(global_batch_size=10)  # with a remainder, which is dropped
    assert [len(take_islice(loader, len(loader))) for _ in range(4)] == [6] * 4
    assert [len(take_break(loader, len(loader))) for _ in range(4)] == [6] * 4
    assert [len(list(loader)) for _ in range(2)] == [6] * 2


def test_two_loops_at_a_time_get_different_batches_of_one_epoch(make_train):
    loader, undisturbed = make_train(), make_train()
    pairs = [(one.images, other.images) for one, other in zip(loader, loader, strict=True)]
    plain = [batch.images for batch in undisturbed]
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in zip(flatten(pairs), plain, strict=True))
    outer = [len(list(loader)) for _ in loader]
    assert outer == [7] and loader.epoch == 3  # the inner loop took what was left of the epoch


def test_an_iterator_of_a_past_epoch_is_over(make_train):
    loader = make_train()
    old = iter(loader)
    list(loader)
    next(iter(loader))
    assert next(old, None) is None and (loader.epoch, loader.step) == (2, 1)


def test_evaluation_loops_are_independent_of_each_other(make_eval):
    loader = make_eval(batch_size=5)
    whole = list_images(loader)
    assert all(torch.equal(a.images, b.images) for a, b in zip(loader, loader, strict=True))
    for _ in itertools.islice(loader, 2):
        assert list_images(loader) == whole
    held = iter(loader)
    next(held)
    assert list_images(loader) == whole and len(list(held)) == len(loader) - 1
    assert next(held, None) is None and next(held, None) is None


class Interruption:
    """Raises KeyboardInterrupt at the `number`-th line that the package, or threading, runs in this thread."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame, event, _):
        is_ours = frame.f_code.co_filename.startswith(TRACED) and not frame.f_code.co_name.endswith(ASKED)
        return self._count if is_ours else None

    def _count(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._count


def test_an_interruption_at_any_line_of_the_loader_loses_no_sample(make_train):
    loader, num_interrupted = make_train(), 0
    for number in range(1, 400):
        epoch, keys = loader.epoch + (loader.step == len(loader)), []
        try:
            with Interruption(number):
                for _ in loader:
                    keys += loader.keys.tolist()
        except KeyboardInterrupt:
            num_interrupted += 1
        while loader.epoch == epoch and loader.step < len(loader):
            for _ in loader:
                keys += loader.keys.tolist()
        assert sorted(keys) == list(range(NUM_TRAIN)), number
    assert num_interrupted > 100


def test_an_interrupted_evaluation_goes_on_with_the_same_iterator_or_anew(make_eval):
    loader, num_interrupted = make_eval(batch_size=5), 0
    for number in range(1, 150):
        keys, batches = [], iter(loader)
        while len(keys) < NUM_VAL:
            try:
                with Interruption(number):
                    for _ in batches:
                        keys += loader.keys.tolist()
            except KeyboardInterrupt:
                num_interrupted += 1
                number = 10**9
        assert keys == list(range(NUM_VAL)), number
    assert num_interrupted > 50
    assert sum(len(batch.labels) for batch in loader) == NUM_VAL


@pytest.mark.parametrize("reader", ["train", "eval"])
def test_after_an_image_that_cannot_be_decoded_the_loader_refuses_with_the_same_words(
    private_shards, make_train, make_eval, reader
):
    split = "train" if reader == "train" else "val"
    key = garble_one_image(private_shards, split)
    opened = ShardSet.open(private_shards.root)
    loader = make_train(shards=opened) if reader == "train" else make_eval(shards=opened)
    for _ in range(3):
        with pytest.raises(UserError, match=named(f"sample {key} cannot be decoded")):
            list(loader)
    if reader == "train":
        assert loader.epoch == 1


def test_a_state_can_be_loaded_after_an_error(private_shards, make_train):
    good = make_train(shards=ShardSet.open(private_shards.root))
    state = good.state_dict()
    expected = record(good)
    data = private_shards.tars("train")[1].read_bytes()
    garble_one_image(private_shards, "train")
    loader = make_train(shards=ShardSet.open(private_shards.root))
    with pytest.raises(UserError, match=named("cannot be decoded")):
        list(loader)
    private_shards.tars("train")[1].write_bytes(data)
    loader.load_state_dict(state)
    assert record(loader) == expected


def run_forked(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except UserError as error:
            os._exit(3 if "is a fork; make it in the process that reads it" in str(error) else 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_forked_loader_says_so_in_one_line(make_train, make_eval, num_before):
    for loader in (make_train(), make_eval()):
        batches = iter(loader)
        for _ in range(num_before):
            next(batches)
        assert run_forked(lambda batches=batches: next(batches)) == 3


def test_a_loader_keeps_its_own_device_under_another_default(make_train, make_eval, shards):
    expected = record(make_train()), list_images(make_eval())
    torch.set_default_device("meta")
    try:
        got = record(make_train()), list_images(make_eval()), list(read_pixels(shards))
    finally:
        torch.set_default_device(None)
    assert got[:2] == expected and got[2][0].labels.device.type == "cpu"


def test_an_epoch_is_the_same_whichever_way_the_one_before_it_ended(make_train):
    one, other = make_train(global_batch_size=10), make_train(global_batch_size=10)
    list(one)
    take_break(other, 6)
    assert read_keys(one) == read_keys(other)
