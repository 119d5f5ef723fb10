# syntax=docker/dockerfile:1
# One image with every program of Rookery, as rookery-NAME. docker-compose.yml runs the whole system from it; each service
# there names its program.
#
#   docker build -t rookery .
#   docker run --rm rookery rookery-gateway --help

# The rust-version of Cargo.toml.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-slim-bookworm AS build
# For jemalloc.
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The caches keep a second build short. They are no part of the layer, so what was built is copied out in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --profile dist --locked --workspace --bins \
 && for name in api client gateway ipconf loadtest state; do \
      install -D "target/dist/$name" "/out/rookery-$name" || exit 1; \
    done

# The same Debian as that of the build: the programs are linked with its libc.
FROM debian:bookworm-slim
# curl asks /readyz in health checks.
RUN apt-get update \
 && apt-get install -y --no-install-recommends curl \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/rookery rookery \
 && install -d -o rookery -g rookery -m 0700 /var/lib/rookery
COPY --from=build /out/ /usr/local/bin/
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
# Relative paths of a configuration, and what the client keeps, end up here.
WORKDIR /var/lib/rookery
ENV XDG_STATE_HOME=/var/lib/rookery
# gateway 7000 and 7001 (admin), state 7100 and 7101, ipconf 6789 and 6790, api 8080 and 8081. Every server listens on
# 127.0.0.1 of the container unless it is told otherwise.
EXPOSE 6789 6790 7000 7001 7100 7101 8080 8081
CMD ["rookery-client", "--help"]
