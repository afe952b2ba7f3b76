# autosteer-serve on a Jetson with JetPack 6. No Jetson has run it yet (docs/gpu.md).
#
#   docker build -f docker/jetson.Dockerfile --build-arg ONNXRUNTIME=onnxruntime_gpu-1.26.0-cp310-cp310-linux_aarch64.whl \
#     -t autosteer:jetson .
#   docker run --rm --runtime nvidia -p 127.0.0.1:8080:8080 -e AUTOSTEER_API_KEY -v "$PWD/package:/package:ro" \
#     autosteer:jetson
#
# NVIDIA's onnxruntime for this JetPack lies in the build context, because no package index has it under a fixed address.
ARG JETPACK=r36.4.0
FROM nvcr.io/nvidia/l4t-jetpack:${JETPACK}
ARG ONNXRUNTIME
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ffmpeg python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 autosteer \
 && python3 -m venv /opt/autosteer
ENV PATH=/opt/autosteer/bin:$PATH
WORKDIR /src
COPY . .
# Neither extra, [cpu] or [gpu]: pip would put another onnxruntime over this one.
# hadolint ignore=DL3013
RUN test -n "$ONNXRUNTIME" \
 && pip install --no-cache-dir --upgrade pip \
 && pip install --no-cache-dir "./$ONNXRUNTIME" ".[serve,structured]"
WORKDIR /
USER 10001
EXPOSE 8080
HEALTHCHECK --start-period=300s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=5)"]
ENTRYPOINT ["autosteer-serve", "/package", "--host", "0.0.0.0", "--port", "8080"]
