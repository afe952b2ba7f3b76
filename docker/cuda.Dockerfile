# autosteer-serve on an NVIDIA GPU, for packages exported with --target cuda. No GPU has run it yet (docs/gpu.md).
#
#   docker build -f docker/cuda.Dockerfile -t autosteer:cuda .
#   docker run --rm --gpus all -p 127.0.0.1:8080:8080 -e AUTOSTEER_API_KEY -v "$PWD/package:/package:ro" autosteer:cuda
#
# CUDA and cuDNN come with onnxruntime-gpu's extras, in the versions that it was built for; the host has the driver.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ffmpeg \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 autosteer
RUN --mount=from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(echo /wheel/*.whl)[gpu,serve,structured]" "onnxruntime-gpu[cuda,cudnn]>=1.26"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8080
HEALTHCHECK --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=5)"]
# --device cuda: without a GPU it does not start, instead of running slowly. Beyond this container it needs a key.
ENTRYPOINT ["autosteer-serve", "/package", "--host", "0.0.0.0", "--port", "8080", "--device", "cuda"]
