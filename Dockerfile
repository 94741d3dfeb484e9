# The environment of a machine that runs unclip, with the tree in /opt/unclip.
#
#   docker build --target cpu -t unclip:cpu .
#   docker build --target gpu -t unclip:gpu .     needs NVIDIA's driver and container toolkit where it runs
#
# --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes torch's smaller build for CPUs.
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# KubeRay asks by wget whether a machine is well; deploy/spot-drain.sh asks the cloud by curl.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 unclip \
    && install --directory --owner=unclip /opt/unclip /local
USER 1000
WORKDIR /opt/unclip
ENV PATH=/home/unclip/venv/bin:$PATH \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    UNCLIP_CACHE=/local
COPY --chown=unclip pyproject.toml constraints.txt README.md ./
COPY --chown=unclip models models
COPY --chown=unclip pipeline pipeline
COPY --chown=unclip jobs jobs
COPY --chown=unclip configs configs
COPY --chown=unclip deploy deploy
RUN python -m venv /home/unclip/venv

FROM base AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt -e '.[cpu,s3,gcs,azure]'
ENTRYPOINT []
CMD ["unclip", "--help"]

FROM base AS gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir -c constraints.txt -e '.[gpu,s3,gcs,azure]'
ENTRYPOINT []
CMD ["unclip", "--help"]
