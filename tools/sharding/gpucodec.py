"""Preparation on an NVIDIA GPU: nvImageCodec decodes and encodes, torch resizes in between, nothing visits the host.

The decision that shaped it: the GPU gets the files that are in order and the CPU the odd ones (other formats, CMYK,
whatever needs mending, whatever the GPU gives back undone), so that a file is used, mended or refused alike on both.
One thing escapes it: damage inside a scan is for nvJPEG to notice, where libjpeg-turbo stops at the first wrong code;
`images/decode.py` is the strict one. Decoders, rounding and the order of passes differ, and so does a pixel by a
grey level or so. `on_host=True` makes the same calls with nvImageCodec's CPU backend, for machines without a GPU and
for tests. Left out: choice of the device (the current one of CUDA) and the size of batches.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import simplejpeg

from pipeline.common.errors import UserError
from pipeline.images.decode import BadImage, check_size
from pipeline.images.jpegfile import EOI, is_plain, survey
from pipeline.images.resize import find_windows, resize
from tools.sharding.hostcodec import Encoding, Prepared, try_prepare

if TYPE_CHECKING:
    import torch

# The chroma filter of libjpeg-turbo's default, so that GPU and CPU see the same pixels.
DECODER_OPTIONS = ":fancy_upsampling=1"
# Of each preparer, for the parts that nvJPEG leaves to the host: there is a process for each core already.
NUM_HOST_THREADS = 1
# Pixels an output: torch's antialiased filter keeps its weights in a block's 48 KiB of shared memory, enough for 47.
LARGEST_SCALE = 40.0


class GpuPreparer:
    """Call it with encoded images: their samples in the same order, a BadImage for each that cannot be used.

    State: a decoder and an encoder, on the current CUDA device of the process that made it. Raises UserError if there
    is none.
    """

    def __init__(self, *, encoding: Encoding, quality: int, on_host: bool = False) -> None:
        import torch

        if not on_host and not torch.cuda.is_available():
            raise UserError(
                f"--device gpu: torch {torch.__version__} sees no CUDA device, one NVIDIA GPU expected; "
                "see `nvidia-smi`, install a torch built for CUDA, or use --device cpu"
            )
        try:
            from nvidia import nvimgcodec as codec
        except ImportError as error:
            raise UserError(
                f"--device gpu: nvImageCodec cannot be imported ({error}); `pip install nvidia-nvimgcodec-cu12`"
            ) from error
        self._codec: Any = codec
        self._encoding, self._quality, self._on_host = encoding, quality, on_host
        if on_host:
            device, decoders, encoders = codec.NVIMGCODEC_DEVICE_CPU_ONLY, [codec.CPU_ONLY], [codec.CPU_ONLY]
        else:
            # Without nvImageCodec's own fall-back to the CPU, which lets damaged files pass.
            device, decoders = torch.cuda.current_device(), [codec.HW_GPU_ONLY, codec.GPU_ONLY, codec.HYBRID_CPU_GPU]
            encoders = [codec.GPU_ONLY, codec.HYBRID_CPU_GPU]
        common = {"device_id": device, "max_num_cpu_threads": NUM_HOST_THREADS}
        self._decoder = codec.Decoder(
            **common, backends=[codec.Backend(kind) for kind in decoders], options=DECODER_OPTIONS
        )
        self._encoder = codec.Encoder(**common, backends=[codec.Backend(kind) for kind in encoders])
        self._decode_params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB, sample_format=codec.SampleFormat.I_RGB
        )
        self._encode_params = codec.EncodeParams(
            quality_type=codec.QualityType.QUALITY,
            quality_value=quality,
            chroma_subsampling=codec.ChromaSubsampling.CSS_420,
        )

    def __call__(self, contents: Sequence[bytes]) -> list[Prepared | BadImage]:
        squares = self._decode([index for index, data in enumerate(contents) if is_in_order(data)], contents)
        done = dict(zip(squares, self._encode(list(squares.values())), strict=True))
        return [
            Prepared(content, None)
            if (content := done.get(index)) is not None
            else try_prepare(data, encoding=self._encoding, quality=self._quality)
            for index, data in enumerate(contents)
        ]

    def _decode(self, chosen: list[int], contents: Sequence[bytes]) -> dict[int, "torch.Tensor"]:
        """Index -> (256, 256, 3) uint8 on the device, of those that could be decoded there."""
        import torch

        squares: dict[int, torch.Tensor] = {}
        if not chosen:
            return squares
        images = self._decoder.decode(
            [contents[index] for index in chosen], params=self._decode_params, cuda_stream=self._stream()
        )
        for index, image in zip(chosen, images, strict=True):
            if image is None:
                continue
            try:
                pixels = self._to_tensor(image)
                rows, columns = find_windows(*pixels.shape[:2])
                if max(rows.scale, columns.scale) > LARGEST_SCALE:
                    continue
                part = pixels[rows.start : rows.stop, columns.start :]
                squares[index] = resize(part, rows, columns, as_float=True)
            except torch.cuda.OutOfMemoryError:
                continue  # a picture too large for this device is none of its business
        return squares

    def _encode(self, squares: list["torch.Tensor"]) -> list[bytes | None]:
        """Each as the bytes of a sample; None where the encoder could not."""
        import torch

        if not squares:
            return []
        if self._encoding == "raw":
            return [square.tobytes() for square in torch.stack(squares).cpu().numpy()]
        stream = self._stream()
        sources = [square.numpy() for square in squares] if self._on_host else squares
        images = [self._codec.as_image(source, stream) for source in sources]
        encoded = self._encoder.encode(images, codec="jpeg", params=self._encode_params, cuda_stream=stream)
        return [None if code is None else bytes(memoryview(code)) for code in encoded]

    def _to_tensor(self, image: Any) -> "torch.Tensor":
        """(H, W, 3) uint8 where the decoder put it, without a copy."""
        import numpy as np
        import torch

        if self._on_host:  # nvImageCodec offers DLPack for a device's memory only
            return torch.from_numpy(np.asarray(image))
        return torch.from_dlpack(image.to_dlpack(cuda_stream=self._stream()))

    def _stream(self) -> int:
        """torch's stream, on which the codec's work and the resizing follow each other."""
        import torch

        return 0 if self._on_host else torch.cuda.current_stream().cuda_stream


def is_in_order(data: bytes) -> bool:
    """A JPEG of one or three components, 8 bits, within the limits, with all its markers and nothing to mend."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        check_size(width, height)
    except (ValueError, KeyError, BadImage):
        return False
    if space not in ("YCbCr", "Gray"):
        return False
    if is_plain(data) and data.endswith(EOI):
        return True
    found = survey(data)
    return found is not None and found.is_complete and found.precision == 8 and not found.repairs
