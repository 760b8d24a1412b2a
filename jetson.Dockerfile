# One image for every JetPack: the base brings CUDA, TensorRT and the interpreter that has TensorRT's module; the daemon gets a newer one.
#
#   JetPack 5 (Xavier, Orin):  docker build -f jetson.Dockerfile --build-arg JETPACK_IMAGE=nvcr.io/nvidia/l4t-tensorrt:r8.5.2-runtime \
#                                --build-arg "CUDA_PYTHON=cuda-python<12" .
#   JetPack 6 (Orin):          docker build -f jetson.Dockerfile --build-arg JETPACK_IMAGE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-runtime .
#   run:                       docker run --runtime nvidia -p 8080:8080 -v hotspare:/var/lib/hotspare hotspare
#   both at once:              docker compose up -d
#
# Written from NVIDIA's documentation and checked as text by the tests; no image was built without a Jetson (see docs/proven.md).
ARG JETPACK_IMAGE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-runtime
FROM ${JETPACK_IMAGE}

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# gcc: chat models are compiled for the CPU at hand where TensorRT does not take them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip python3-venv python3-numpy gcc libc6-dev curl ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# The daemon's own interpreter: JetPack 5 ends at Python 3.8, the network-facing half needs 3.10 or newer. uv brings a maintained build.
ARG DAEMON_PYTHON=3.12
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install uv \
    && UV_PYTHON_INSTALL_DIR=/opt/python /opt/uv/bin/uv venv --python ${DAEMON_PYTHON} /opt/hotspare

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY agent ./agent
COPY converters ./converters
COPY coordinator ./coordinator
COPY models ./models
RUN /opt/uv/bin/uv pip install --python /opt/hotspare/bin/python '.[cpu]'

# The worker runs under the system's interpreter, the only one with JetPack's TensorRT, in an environment that sees its packages (Ubuntu
# 24.04 of JetPack 7 lets pip touch no other); it needs numpy, a runtime and, for TensorRT, access to the GPU's memory. CUDA 11.4 of
# JetPack 5 needs cuda-python 11, later ones the 12 of theirs.
ARG CUDA_PYTHON="cuda-python>=12,<13"
RUN python3 -m venv --system-site-packages /opt/worker \
    && /opt/worker/bin/pip install 'onnxruntime>=1.19' 'opencv-python-headless>=4.9' 'av>=12' "${CUDA_PYTHON}"
ENV HOTSPARE__WORKER__PYTHON=/opt/worker/bin/python \
    HOTSPARE__HTTP__HOST=0.0.0.0 \
    HOTSPARE_STATE=/var/lib/hotspare

RUN useradd --system --home-dir /var/lib/hotspare --create-home --groups video hotspare
USER hotspare
VOLUME /var/lib/hotspare
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s CMD curl -fsS http://127.0.0.1:8080/healthz || exit 1
ENTRYPOINT ["/opt/hotspare/bin/hotspare"]
CMD ["run"]
