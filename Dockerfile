# alexnet-dali on NVIDIA GPUs. Not built by CI, which has no GPU: linted (make lint), and held to the project's own
# files by tests/test_habits.py.
#
#   docker build --tag alexnet-dali .
#   docker run --rm --gpus all --shm-size 1g alexnet-dali
#
# Least NVIDIA driver: 580, because PyTorch's default wheels bring CUDA 13. DALI needs 525.60 (CUDA 12, which this image
# has), so with PyTorch's wheels for CUDA 12, 525.60 will do: --build-arg TORCH_INDEX=(the URL of their index).
FROM nvidia/cuda:12.9.1-runtime-ubuntu24.04

# The compilers and libjpeg-turbo's headers are for the C and C++ parts, which are compiled at their first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev libjpeg-turbo8-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/alexnet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG TORCH_INDEX=""
WORKDIR /opt/source
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/alexnet \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch
COPY pipeline pipeline
COPY trainer trainer
COPY tools tools
RUN pip install --constraint constraints.txt ".[parquet,s3]"

# Shards and runs are looked for in the folder that the job is given: -v /data:/data
WORKDIR /data
RUN useradd --uid 10001 --create-home alexnet && chown alexnet /data
USER 10001
CMD ["alexnet-prep", "doctor"]
