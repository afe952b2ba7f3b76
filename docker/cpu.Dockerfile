# autosteer-serve on the CPU: x86-64 or ARM64.
#
#   docker build -f docker/cpu.Dockerfile -t autosteer:cpu .
#   docker run --rm -p 127.0.0.1:8080:8080 -e AUTOSTEER_API_KEY -v "$PWD/package:/package:ro" autosteer:cpu
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
    pip install --no-cache-dir "$(echo /wheel/*.whl)[cpu,serve,structured]"
USER 10001
EXPOSE 8080
HEALTHCHECK --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=5)"]
# Beyond this container it needs a key: AUTOSTEER_API_KEY. Options follow the image's name.
ENTRYPOINT ["autosteer-serve", "/package", "--host", "0.0.0.0", "--port", "8080"]
