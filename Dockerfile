# The demo, or any other command of lora-dpo, in a container: docs/docker.md.
#
#   docker build -t lora-dpo .                            computes on the CPU
#   docker build -t lora-dpo --build-arg DEVICE=cuda .    and on NVIDIA GPUs
#   docker run --rm --init -p 127.0.0.1:7860:7860 lora-dpo

FROM python:3.11-slim

ARG DEVICE=cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    LORA_DPO_HOME=/work \
    HF_HOME=/work/models/huggingface

RUN useradd --create-home --uid 1000 me && \
    mkdir -p /work/adapters /work/collected /work/models

# torch first and by itself: it is most of the image, and only its own version, which is pinned, changes it.
WORKDIR /libraries
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN case "$DEVICE" in \
      cpu) from=--index-url=https://download.pytorch.org/whl/cpu ;; \
      cuda) from= ;; \
      *) echo "DEVICE is $DEVICE: give cpu or cuda" >&2; exit 1 ;; \
    esac && \
    pip install ${from:+"$from"} "$(grep '^torch==' constraints.txt)"

# Then the other libraries, with a package of that name that is empty: a change of the code installs none of them again.
COPY pyproject.toml ./
RUN mkdir lora_dpo && touch lora_dpo/__init__.py README.md LICENSE && \
    pip install --constraint constraints.txt ".[demo]" && \
    pip uninstall --yes lora-dpo

# In a folder of its own: what was built there before is newer than the code, and would be taken for it.
WORKDIR /src
COPY . .
RUN pip install --no-deps . && \
    cp -r configs data demo /work && \
    cp -r adapters/quickstart /work/adapters && \
    install docker-entrypoint.sh /usr/local/bin/docker-entrypoint && \
    chown -R me:me /work

USER 1000
WORKDIR /work
VOLUME ["/work/adapters", "/work/collected", "/work/models"]
EXPOSE 7860
HEALTHCHECK --start-period=180s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=8)"]
ENTRYPOINT ["docker-entrypoint"]
CMD ["demo", "--host", "0.0.0.0"]
