# Three images of one source: `slim` for the services without torch (controller, gateway, preprocess, detokenizer), `cpu` and `cuda` for
# all of them. `make images` builds the first two. Build arguments: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS as pip knows them.

FROM python:3.11-slim AS base
ENV PATH=/opt/twinlens/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1

FROM base AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/twinlens
RUN python3 -m venv --without-pip /opt/twinlens
WORKDIR /src
COPY requirements/slim.txt requirements/
RUN pip install --require-hashes --requirement requirements/slim.txt

# The project itself, as a wheel.
FROM build AS wheel
COPY requirements/build.txt requirements/
RUN pip install --require-hashes --requirement requirements/build.txt
COPY pyproject.toml README.md ./
COPY common common
COPY compute compute
COPY proto proto
COPY services services
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# The C kernels, for every x86 CPU that has their instructions: the images have no compiler.
FROM build AS kernels
RUN if [ "$(uname -m)" = x86_64 ]; then apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev; fi
COPY common common
COPY compute compute
RUN if [ "$(uname -m)" = x86_64 ]; then PYTHONSAFEPATH= python -m compute.kernels.library; fi

FROM build AS build-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

FROM build AS build-cpu
COPY requirements/cpu.txt requirements/
RUN pip install --require-hashes --requirement requirements/cpu.txt
# torch's CPU build: as pip is configured, else from PyTorch's own index. What only compiling against torch needs is left out.
ARG TORCH=torch==2.13.0+cpu
RUN (pip install --no-deps "$TORCH" 2>/dev/null || pip install --no-deps "$TORCH" --extra-index-url https://download.pytorch.org/whl/cpu) \
    && cd /opt/twinlens/lib/python3.11/site-packages/torch && rm -rf include share test
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
COPY --from=kernels /src/compute/kernels /opt/twinlens/lib/python3.11/site-packages/compute/kernels

FROM build AS build-cuda
COPY requirements/cuda.txt requirements/
RUN pip install --require-hashes --requirement requirements/cuda.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

FROM base AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title=Twinlens \
      org.opencontainers.image.description="Serves vision-language models with vision and language as separate processes on separate cards" \
      org.opencontainers.image.version=$VERSION
RUN groupadd --gid 10001 twinlens && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin twinlens
COPY models/tiny-ocr /opt/twinlens/models/tiny-ocr
COPY scripts/probe /opt/twinlens/bin/twinlens-probe
# A container is a host of its own: others reach it by its address.
ENV TWINLENS_MODEL=/opt/twinlens/models/tiny-ocr \
    TWINLENS_LISTEN=tcp://0.0.0.0:5555 \
    TWINLENS_CONTROL_LISTEN=0.0.0.0:50050 \
    TWINLENS_CONTROLLER=controller:50050 \
    TWINLENS_HOST=0.0.0.0 \
    TWINLENS_HEALTH_PORT=8080
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK --interval=5s --timeout=10s --start-period=10m --retries=3 CMD ["twinlens-probe"]
ENTRYPOINT ["python", "-m"]
CMD ["services.controller", "--help"]

FROM runtime AS slim
COPY --from=build-slim /opt/twinlens /opt/twinlens

FROM runtime AS cpu
COPY --from=build-cpu /opt/twinlens /opt/twinlens

# Triton compiles a small module in C for each kind of kernel launch, when it comes for the first time.
FROM runtime AS cuda
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/twinlens /opt/twinlens
