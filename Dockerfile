# The base image of every function: Python, mlfuncs and what it needs to serve; no function, no compiler, no index, no
# proxy and no certificate of the machine that built it. `mlfuncs build` puts a function's wheels and bundle on top.
#
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim --tag mlfuncs/base .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
LABEL dev.mlfuncs.stage=build
# Settings of pip for this stage alone: an index of your own, its certificates. Nothing of it reaches the image.
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG CERTIFICATES
ENV PIP_CERT=${CERTIFICATES:-${PIP_CERT}}
# Extras whose dependencies are put in as well, e.g. "platform" for the image of the platform itself.
ARG EXTRAS=
# The Python that functions are packed for, e.g. 3.11; a Python image of another version is refused.
ARG FOR_PYTHON=
# Byte code is written by `prepare.py --compile` alone, the same from the same sources whenever it runs.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONHASHSEED=0
RUN ["python", "-m", "venv", "/opt/mlfuncs"]
WORKDIR /src
# certificates.pem is there when the building machine has authorities of its own; it stays in this stage.
COPY pyproject.toml certificates.pe[m] ./
# Its own packages are copied beside the dependencies, so that a change of them downloads nothing.
COPY runtime/mlfuncs_runtime/images/prepare.py ./
RUN python prepare.py pyproject.toml core.txt "$EXTRAS"
RUN ["/opt/mlfuncs/bin/python", "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--quiet", "-r", "core.txt"]
RUN ["/opt/mlfuncs/bin/python", "prepare.py", "--libraries"]
RUN ["/opt/mlfuncs/bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip"]
RUN ["python", "prepare.py", "--compile", "/opt/mlfuncs/lib"]
COPY pyproject.toml LICENSE /opt/mlfuncs/src/
COPY mlfuncs /opt/mlfuncs/src/mlfuncs
COPY runtime /opt/mlfuncs/src/runtime
COPY pipelines /opt/mlfuncs/src/pipelines
COPY featurestore /opt/mlfuncs/src/featurestore
RUN ["python", "prepare.py", "--compile", "/opt/mlfuncs/src"]

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="mlfuncs base" \
      org.opencontainers.image.description="Serves an mlfuncs function" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Where the extra "cuda" has its libraries; without it these are the Python image's own, unchanged.
COPY --from=build /etc/ld.so.conf.d /etc/ld.so.conf.d
COPY --from=build /etc/ld.so.cache /etc/ld.so.cache
COPY --from=build /opt/mlfuncs/bin /opt/mlfuncs/bin
COPY --from=build /opt/mlfuncs/pyvenv.cfg /opt/mlfuncs/pyvenv.cfg
COPY --from=build /opt/mlfuncs/lib /opt/mlfuncs/lib
COPY --from=build /opt/mlfuncs/src /opt/mlfuncs/src
# A volume mounted here belongs to the user below.
COPY --from=build --chown=10001:10001 /home-of-mlfuncs /home/mlfuncs
# The root file system may be read-only: all that is written goes to /tmp. The user has a number and no name.
ENV PATH=/opt/mlfuncs/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    USER=mlfuncs \
    MLFUNCS_HOME=/tmp/mlfuncs \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/opt/mlfuncs/bin/python", "-P", "-m", "mlfuncs_runtime.docker.entry", "--check"]
# The process with id 1 passes signals on, reaps orphans, and ends as the worker ends.
ENTRYPOINT ["/opt/mlfuncs/bin/python", "-P", "-m", "mlfuncs_runtime.docker.entry"]
