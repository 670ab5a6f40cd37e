"""Every mode on one fixed batch equals one process: outputs, gradients, five updates, and a state that opens anywhere.

Float64, dropout off; tolerance 1e-9 of each tensor's norm, unless a test says otherwise.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.parallel import predict_traffic
from pipeline.common.errors import UserError
from trainer.commands.options import choose_parallel
from trainer.config import DATA, MODES, Parallel
from trainer.distributed import Ranks, gather, join
from trainer.launch import launch
from trainer.parallel import Traffic, check, count_traffic
from trainer.recipe import RECIPES, Recipe
from trainer.step import Learner

BATCH_SIZE, NUM_CLASSES, NUM_UPDATES, TOLERANCE = 4, 5, 5, 1e-9
# The released source's net, which has everything that could be divided wrongly; He's weights, so that it learns
NARROW = replace(
    RECIPES["original"], width=1 / 16, dropout=0.0, init="he", hidden_bias=0.1, global_batch_size=BATCH_SIZE
)
ALONE = Ranks(0, 1, torch.device("cpu"))


def make_learner(ranks: Ranks, parallel: Parallel, recipe: Recipe = NARROW) -> Learner:
    torch.set_default_dtype(torch.float64)
    try:
        return Learner(recipe, NUM_CLASSES, ranks, seed=3, parallel=parallel)
    finally:
        torch.set_default_dtype(torch.float32)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH_SIZE, 3, 224, 224, generator=generator, dtype=torch.float64)
    return images, torch.arange(BATCH_SIZE) % NUM_CLASSES


def slice_batch(learner: Learner, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mode feeds this rank."""
    images, labels = make_batch()
    size = BATCH_SIZE // ranks.world_size
    own = slice(ranks.rank * size, (ranks.rank + 1) * size)
    return images if learner.split.mode == "columns" else images[own], labels[own]


def count_a_step(learner: Learner, ranks: Ranks) -> Traffic:
    with count_traffic() as traffic:
        learner.step(*slice_batch(learner, ranks))
    return traffic


def train(learner: Learner, ranks: Ranks, num_updates: int) -> dict[str, torch.Tensor]:
    """Updates on the fixed batch. The whole batch's first logits and first gradients, as one process has them."""
    seen, labels = slice_batch(learner, ranks)
    found = {}
    for step in range(num_updates):
        learner.schedule.begin_step(1, step, num_updates)
        logits = learner.step(seen, labels)
        if step == 0:
            parts = [torch.empty_like(logits) for _ in range(ranks.world_size)]
            if ranks.world_size > 1:
                torch.distributed.all_gather(parts, logits.detach().contiguous())
            found["logits"] = torch.cat(parts) if ranks.world_size > 1 else logits.detach()
            for name, weight in learner.model.named_parameters():
                found[name] = learner.split.join(name, weight.grad)
    return found


def run_modes(modes: tuple[str, ...], folder: str) -> int:
    with join(use_gpu=False) as ranks:
        for mode in modes:
            learner = make_learner(ranks, Parallel(mode, bucket_mib=0.5))
            first = train(learner, ranks, NUM_UPDATES)
            copy = make_learner(ranks, Parallel(mode))
            copy.load_state_dict(torch.load(Path(folder) / "one.pt", weights_only=True))  # one process's, gone on with
            train(copy, ranks, 1)
            states = deepcopy((learner.state_dict(), copy.state_dict()))  # a step changes tensors in place
            model = copy.whole_model().eval()
            with torch.no_grad():
                outputs = model(make_batch()[0])
            result = {"first": first, "state": states[0], "continued": states[1], "outputs": outputs}
            traffic = count_a_step(learner, ranks)
            result["sent"] = [gather(traffic.sent_bytes, ranks), gather(traffic.collectives, ranks)]
            if mode == "data":
                small = make_learner(ranks, Parallel(mode, gradients="bf16"))
                result["bf16"] = train(small, ranks, 1)
                result["bf16 sent"] = count_a_step(small, ranks).sent_bytes
            if ranks.is_first:
                torch.save(result, Path(folder) / f"{mode}.pt")
    return 0


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A folder with what one process computes."""
    folder = tmp_path_factory.mktemp("one")
    learner = make_learner(ALONE, Parallel())
    first = train(learner, ALONE, NUM_UPDATES)
    torch.save(learner.state_dict(), folder / "one.pt")
    train(learner, ALONE, 1)
    with torch.no_grad():
        outputs = learner.model.eval()(make_batch()[0])
    torch.save({"first": first, "continued": learner.state_dict(), "outputs": outputs}, folder / "expected.pt")
    return folder


def assert_close(got, expected, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape and (got - expected).norm() <= tolerance * expected.norm()


def assert_same_state(got: dict, expected: dict) -> None:
    assert list(got["model"]) == list(expected["model"])
    for name, weight in expected["model"].items():
        assert_close(got["model"][name], weight)
    assert got["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, values in expected["optimizer"]["state"].items():
        assert_close(got["optimizer"]["state"][index]["momentum_buffer"], values["momentum_buffer"])


def assert_modes_equal_one_process(folder: Path, modes: tuple[str, ...], num_ranks: int) -> None:
    assert launch(run_modes, (modes, str(folder)), num_ranks) == 0
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert expected["first"]["conv1.weight"].norm() > 1e-6  # gradients that could be wrong
    for mode in modes:
        got = torch.load(folder / f"{mode}.pt", weights_only=True)
        assert set(got["first"]) == set(expected["first"])
        for name, tensor in expected["first"].items():
            assert_close(got["first"][name], tensor)
        assert_same_state(got["state"], torch.load(folder / "one.pt", weights_only=True))
        assert_same_state(got["continued"], expected["continued"])
        assert_close(got["outputs"], expected["outputs"])
        sent, collectives = got["sent"]
        predicted = predict_traffic(mode, NARROW, NUM_CLASSES, num_ranks, activation_bytes=8, gradient_bytes=8)
        outputs = 2 * (num_ranks - 1) / num_ranks * BATCH_SIZE * NUM_CLASSES * 4  # predicted in float32
        for rank in range(num_ranks):
            assert sent[rank]["parameters"] == pytest.approx(predicted.sent_bytes["parameters"], rel=1e-12)
            assert sent[rank]["activations"] == predicted.sent_bytes["activations"] + (outputs if mode != "data" else 0)
            assert collectives[rank]["activations"] == predicted.collectives["activations"]
        if mode == "data":
            assert got["bf16 sent"]["parameters"] == pytest.approx(predicted.sent_bytes["parameters"] / 4)  # of float64
            for name, tensor in expected["first"].items():
                assert_close(got["bf16"][name], tensor, 2**-7)
            assert (got["bf16"]["fc6.weight"] != expected["first"]["fc6.weight"]).any()


def test_every_mode_on_two_ranks_equals_one_process_and_sends_what_the_shapes_say(one):
    assert_modes_equal_one_process(one, ("data", "columns", "hybrid"), 2)


@pytest.mark.slow
def test_data_and_hybrid_on_four_ranks_equal_one_process_and_send_what_the_shapes_say(one):
    assert_modes_equal_one_process(one, ("data", "hybrid"), 4)


@pytest.mark.parametrize(
    ("mode", "changes", "world_size", "parts"),
    [
        ("columns", {}, 4, ("4 ranks, expected 2", "--parallel data or hybrid")),
        ("columns", {"num_towers": 1}, 2, ("num_towers=1", "--parallel data or hybrid")),
        ("columns", {"lrn_across_towers": True}, 2, ("lrn_across_towers=true",)),
        ("hybrid", {"width": 1.0, "global_batch_size": 129}, 3, ("4096 units", "3 ranks", "--parallel data")),
        ("data", {"global_batch_size": 128}, 3, ("128", "3 ranks", "--global-batch-size 126")),
    ],
    ids=str,
)
def test_a_mode_that_recipe_or_ranks_do_not_allow_is_refused_with_the_remedy(mode, changes, world_size, parts):
    with pytest.raises(UserError) as error:
        check(mode, replace(RECIPES["paper"], **changes), world_size)
    assert all(part in str(error.value) for part in parts), error.value


def test_hybrid_takes_any_number_of_ranks_that_divides_4096():
    for world_size in (2, 4, 8, 64, 4096):
        check("hybrid", replace(RECIPES["paper"], global_batch_size=4096), world_size)


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


def choose_mode(world_size, asked=None, saved=None) -> Parallel:
    return choose_parallel(PAPER, world_size, asked=asked or {}, saved=saved or {})


def test_what_is_asked_for_goes_before_what_the_run_had_and_that_before_the_default():
    assert choose_mode(2) == DATA == choose_mode(1, {"mode": "columns"})
    saved = {"mode": "hybrid", "gradients": "bf16"}
    assert choose_mode(2, saved=saved) == Parallel("hybrid", gradients="bf16")
    assert choose_mode(2, {"mode": "columns"}, saved) == Parallel("columns", gradients="bf16")


def test_a_mode_that_the_ranks_do_not_allow_is_refused_if_asked_for_and_left_if_not(capsys):
    with pytest.raises(UserError, match="4 ranks, expected 2"):
        choose_mode(4, {"mode": "columns"})
    assert choose_mode(4, saved={"mode": "columns"}) == DATA
    assert "the run had --parallel columns, this one has data" in capsys.readouterr().err
