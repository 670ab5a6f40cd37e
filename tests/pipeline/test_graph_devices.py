"""The GPU's graphs, serialised without a GPU: the CPU's operators, one by one, and on which device each is to run."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline import graph
from pipeline.options import LoaderOptions, Transform, make_spec

CROPS = ("train", "centre", "ten")
ON_GPU = {"CropMirrorNormalize", "Crop", "Stack"}  # of the operators that a GPU runs, those known by their names


def read_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message: number and value."""
    at = 0

    def read_number() -> int:
        nonlocal at
        number = shift = 0
        while True:
            at, byte = at + 1, data[at]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while at < len(data):
        field, kind = divmod(read_number(), 8)
        if kind == 0:
            yield field, read_number()
            continue
        size = {1: 8, 5: 4}.get(kind) or read_number()
        yield field, data[at : at + size]
        at += size


def list_operators(serialised: bytes) -> list[tuple[str, str]]:
    """Name and device of each operator of a serialised pipeline, in order (dali.proto: PipelineDef.op is 5)."""
    found = []
    for operator in (value for field, value in read_fields(serialised) if field == 5):
        name, device = "", "cpu"
        for field, value in read_fields(operator):
            if field == 1:
                name = value.decode()
            elif isinstance(value, bytes) and value.startswith(b"\n\x06device"):
                device = next(part.decode() for part in (v for _, v in read_fields(value)) if part in WORDS)
        found.append((name, device))
    return found


WORDS = (b"cpu", b"gpu", b"mixed")


@pytest.fixture
def serialise(shards, colors, monkeypatch):
    """The operators of a graph that is never built: so it needs no GPU."""
    monkeypatch.setattr(graph.Pipeline, "build", lambda self: None)

    def serialise(crops: str, decode: str, device: str, **transform) -> list[tuple[str, str]]:
        split = "train" if crops == "train" else "val"
        spec = make_spec(shards, split, LoaderOptions(decode=decode), batch_size=4, device="cpu")
        spec = replace(spec, device=device, cache_gib=transform.pop("cache_gib", 0.0))
        if crops == "train":
            pipeline = graph.train_graph(shards, colors, Transform(**transform), spec)
        else:
            pipeline = graph.eval_graph(shards, colors, Transform(**transform, lighting=None), spec, crops)
        return list_operators(pipeline.serialize())

    return serialise


@pytest.mark.parametrize("transform", [{}, {"mean": "channel", "dtype": "float16", "layout": "NHWC"}], ids=str)
@pytest.mark.parametrize("decode", ["mixed", "hybrid"])
@pytest.mark.parametrize("crops", CROPS)
def test_the_gpus_graph_has_the_cpus_operators_in_their_order(serialise, crops, decode, transform):
    on_cpu, on_gpu = (serialise(crops, decode, device, **transform) for device in ("cpu", "gpu"))
    assert [name for name, _ in on_gpu] == [name for name, _ in on_cpu]
    assert {device for _, device in on_cpu} == {"cpu"}
    assert {device for _, device in on_gpu} == {"cpu", "mixed", "gpu"}


@pytest.mark.parametrize("decode", ["cpu", "mixed", "hybrid"])
@pytest.mark.parametrize("crops", CROPS)
def test_each_operator_of_the_gpus_graph_runs_where_it_should(serialise, monkeypatch, crops, decode):
    monkeypatch.setenv("ALEXNET_OPERATORS", "stock")
    operators = serialise(crops, decode, "gpu")
    for name, device in operators:
        if name in ON_GPU:
            assert device == "gpu", operators
        elif name.startswith(("readers", "random", "reductions", "GetProperty", "_TensorSubscript", "ExternalSource")):
            assert device == "cpu", operators
    decoders = [device for name, device in operators if name.startswith("decoders")]
    assert decoders == {"cpu": ["cpu"], "mixed": ["mixed"], "hybrid": ["cpu", "mixed"]}[decode]
    finishing = [device for name, device in operators if name == "CropMirrorNormalize"]
    assert len(finishing) == (10 if crops == "ten" else 1)
    if crops == "train":  # the lighting: three numbers of each image, on the host; the mean image behind it
        arithmetic = [device for name, device in operators if name == "_ArithmeticGenericOp"]
        assert arithmetic == ["cpu", "cpu", "gpu"]


def test_the_whole_augmentation_is_in_the_graph(serialise, monkeypatch):
    """Paper, section 4.1: random crop, reflection and lighting, behind the decoder and before the network."""
    monkeypatch.setenv("ALEXNET_OPERATORS", "stock")
    assert [name for name, _ in serialise("train", "mixed", "gpu", mean="channel")] == [
        "readers__Webdataset",
        "random__Uniform",
        "random__Uniform",
        "decoders__ImageCrop",
        "Constant",
        "Constant",
        "random__Normal",
        "_ArithmeticGenericOp",
        "reductions__Sum",
        "_ArithmeticGenericOp",
        "random__CoinFlip",
        "CropMirrorNormalize",
        "GetProperty",
        "_TensorSubscript",
    ]


def test_a_cache_of_decoded_images_is_the_decoders_and_the_crop_comes_behind_it(serialise):
    operators = serialise("train", "mixed", "gpu", cache_gib=1.0)
    assert ("decoders__Image", "mixed") in operators and ("Crop", "gpu") in operators
    assert "decoders__ImageCrop" not in dict(operators)
